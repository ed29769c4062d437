"""Formats: from rows in each data set's own shape to conversations in normal form, and what is said of rows that have none."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import JSON_VALUES, hub_layout, lines, source_of

from engine.config.schema import SourceSection
from engine.data import readers, rows
from engine.data.conversation import Conversation, Dropped, Pair, RawJson, RowError, Tokens, check, normal
from engine.errors import UserError
from tests.conftest import ROOT


@pytest.fixture(scope="module", autouse=True)
def _own_folder_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def convert(row: dict[str, Any], **keys: Any) -> Conversation | Pair | Tokens:
    """Convert one row, its format recognised unless ``reader`` names it."""
    source = source_of("x.jsonl", **keys)
    _, spec = readers.find(source, row, "x.jsonl")
    return readers.convert(spec, row, source)


def messages_of(row: dict[str, Any], **keys: Any) -> list[dict[str, Any]]:
    made = convert(row, **keys)
    assert isinstance(made, Conversation)
    check(made, "all_assistant")
    return made.messages


def chat(*turns: str) -> list[dict[str, str]]:
    """Return messages of the roles that the first letters name: "s:…", "u:…", "a:…", "t:…"."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


# --- the sets that have a choice of their own ------------------------------------------------------------------------


def oasst(name: str, parent: str | None, role: str, text: str) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u-1",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": None if role == "prompter" else 0,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.001, "severe_toxicity": 0.0},
        "message_tree_id": "m1",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["spam", "quality"], "value": [0.0, 0.8], "count": [3, 3]},
    }


def squad(context: str, question: str, *answers: str) -> dict[str, Any]:
    found = {"text": list(answers), "answer_start": [context.find(answer) for answer in answers]}
    return {"id": "5733be28", "title": "University", "context": context, "question": question, "answers": found}


def openr1(problem: str, *generations: str) -> dict[str, Any]:
    return {
        "problem": problem,
        "solution": "not this one",
        "answer": "4",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": "a1",
        "is_reasoning_complete": [True] * len(generations),
        "generations": list(generations),
        "correctness_math_verify": [True] * len(generations),
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": len(generations),
        "messages": [{"content": problem, "role": "user"}, {"content": generations[0], "role": "assistant"}],
    }


def numina(problem: str, solution: str) -> dict[str, Any]:
    return {
        "problem": problem,
        "solution": solution,
        "answer": "5",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
        "source": "cn_contest",
        "synthetic": False,
    }


def openmath(problem: str, solution: str) -> dict[str, Any]:
    return {
        "problem": problem,
        "generated_solution": solution,
        "expected_answer": "4",
        "problem_source": "augmented_math",
    }


TREE = [
    oasst("m1", None, "prompter", "Hi"),
    oasst("m2", "m1", "assistant", "Hello"),
    oasst("m3", "m1", "assistant", "Good day"),
    oasst("m4", "m2", "prompter", "Why?"),
    oasst("m5", "m4", "assistant", "Because"),
    oasst("m6", "m4", "assistant", "So"),
    oasst("m7", "m6", "prompter", "Thanks"),
    oasst("m8", "m6", "prompter", "I see"),
    oasst("n1", None, "prompter", "Nobody answers"),
]
BUILTIN: dict[str, tuple[dict[str, list[dict[str, Any]]], list[Any]]] = {
    # name: (rows by split, what is made of the training rows: messages, or the reason why a row is dropped)
    "squad": (
        {
            "train": [squad("Lima is in Peru.", "Where is Lima?", "Peru", "in Peru"), squad("Lima.", "Who?")],
            "validation": [squad("Oslo.", "What?", "Oslo")],
        },
        [chat("s:Lima is in Peru.", "u:Where is Lima?", "a:Peru"), "no answer"],
    ),
    "open_assistant": (
        {"train": TREE, "validation": TREE[:2]},
        [
            chat("u:Hi", "a:Good day"),
            chat("u:Hi", "a:Hello", "u:Why?", "a:Because"),
            chat("u:Hi", "a:Hello", "u:Why?", "a:So"),
            "no answer",
        ],
    ),
    "openmathinstruct2": (
        {"train": [openmath("2+2?", "It is $4$.")], "train_1M": []},
        [chat("u:2+2?", "a:It is $4$.")],
    ),
    "tulu3_sft": (
        {
            "train": [
                {
                    "id": "oasst1_1",
                    "messages": [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}],
                    "source": "ai2-adapt-dev/oasst1_converted",
                }
            ]
        },
        [chat("u:Hi", "a:Hello")],
    ),
    "gsm8k": (
        {
            "train": [{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}],
            "test": [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}],
        },
        [chat("u:2+2?", "a:2+2=<<2+2=4>>4\n#### 4")],
    ),
    "openr1_math": (
        {"train": [openr1("2+2?", "<think>\nTwo.\n</think>\n\n4", "<think>\nWell.\n</think>\n\n4")]},
        [chat("u:2+2?", "a:<think>\nTwo.\n</think>\n\n4")],
    ),
    "numinamath": ({"train": [numina("2+3?", "It is $5$.")]}, [chat("u:2+3?", "a:It is $5$.")]),
    "deepscaler": (
        {
            "train": [
                {"problem": "2+2?", "answer": "4", "solution": "Add: $4$."},
                {"problem": "2+5?", "answer": "7", "solution": ""},
            ]
        },
        [chat("u:2+2?", "a:Add: $4$."), chat("u:2+5?", "a:")],
    ),
}


def choice(name: str) -> dict[str, Any]:
    """Return the keys of a choice of the data group."""
    keys: dict[str, Any] = yaml.safe_load((ROOT / "conf" / "data" / f"{name}.yaml").read_text())
    return keys


def convert_all(source: SourceSection) -> list[Any]:
    """Return what is made of every row: messages, or why it is dropped."""
    found = rows.read(source)
    stream = list(found)
    first = stream[0][1]
    assert not isinstance(first, RowError)
    _, spec = readers.find(source, first, source.path)
    made: list[Any] = []
    for _, row in spec.gather(iter(stream)) if spec.gather else stream:
        assert not isinstance(row, RowError)
        try:
            conversation = readers.convert(spec, row, source)
        except Dropped as dropped:
            made.append(str(dropped))
        else:
            assert isinstance(conversation, Conversation) and conversation.tools is None
            check(conversation, "all_assistant")
            made.append(conversation.messages)
    return made


@pytest.mark.parametrize("name", BUILTIN)
def test_the_sets_with_a_choice_of_their_own(name: str, tmp_path: Path) -> None:
    """Rows in each set's shape, read by ``datasets`` from a folder laid out like the hub's, with the keys of its YAML."""
    splits, expected = BUILTIN[name]
    keys = choice(name)
    subset = keys.get("subset", "default")
    suffix = "json" if name == "deepscaler" else "parquet"
    folder = hub_layout(tmp_path / "hub", {k: v or splits["train"] for k, v in splits.items()}, subset, suffix)
    own = {k: v for k, v in keys.items() if k in SourceSection.model_fields}
    assert keys["train_path"].count("/") == 1
    assert convert_all(source_of(folder, split=keys.get("train_split", "train"), **own)) == expected
    if "val_path" in keys:
        assert keys["val_path"] == keys["train_path"]
        assert len(convert_all(source_of(folder, split=keys["val_split"], **own))) == len(splits[keys["val_split"]]) - (
            name == "open_assistant"
        )
    recognised = source_of(folder, **{k: v for k, v in own.items() if k == "subset"})
    if name != "openmathinstruct2":  # the only one whose columns no format has
        assert convert_all(recognised) == expected


def test_default_choice_is_tulu() -> None:
    assert choice("default_sft") == {"defaults": ["tulu3_sft"]}


# --- the tree of OpenAssistant ---------------------------------------------------------------------------------------


def gathered(*items: dict[str, Any]) -> list[tuple[str, Any]]:
    spec = readers.READERS["open_assistant"]
    assert spec.gather is not None
    found = []
    for place, row in spec.gather((f"row {i}", item) for i, item in enumerate(items)):
        try:
            if isinstance(row, RowError):
                raise row
            made = readers.convert(spec, row, source_of("x"))
            assert isinstance(made, Conversation)
            found.append((place, [turn["content"] for turn in made.messages]))
        except (RowError, Dropped) as reason:
            found.append((place, repr(reason)))
    return found


def test_paths_have_the_place_of_their_leaf() -> None:
    assert gathered(*TREE) == [
        ("row 2", ["Hi", "Good day"]),
        ("row 4", ["Hi", "Hello", "Why?", "Because"]),
        ("row 6", ["Hi", "Hello", "Why?", "So"]),  # for its two leaves one path
        ("row 8", "Dropped('no answer')"),
    ]
    assert sorted(gathered(*TREE[::-1]), key=str) != []
    assert sorted(path for _, path in gathered(*TREE[::-1]) if isinstance(path, list)) == sorted(
        path for _, path in gathered(*TREE) if isinstance(path, list)
    )


def test_trees_that_are_none() -> None:
    lost = "Dropped('a parent that is not among the rows')"
    assert gathered(*TREE[2:5]) == [("row 0", lost), ("row 2", lost)]
    assert gathered({**TREE[0], "text": None}) == [("row 0", "RowError(\"field 'text' must be a string, got None\")")]
    assert gathered({**TREE[0], "role": "user"}) == [
        ("row 0", "RowError(\"field 'role' must be prompter or assistant, got 'user'\")")
    ]
    assert gathered({**TREE[0], "parent_id": 3}) == [
        ("row 0", "RowError(\"field 'parent_id' must be a string or null, got 3\")")
    ]
    assert gathered(TREE[0], TREE[1], TREE[1])[0] == ("row 2", "RowError(\"message_id 'm2' is that of row 1 too\")")
    circle = "RowError(\"'parent_id' leads in a circle; each tree has one message whose 'parent_id' is null\")"
    assert gathered({**TREE[0], "parent_id": "m2"}, TREE[1]) == [("row 0", circle)]
    assert gathered({**TREE[0], "parent_id": "m2"}, TREE[1], TREE[2]) == [("row 2", circle)]


# --- formats ---------------------------------------------------------------------------------------------------------

TURNS = chat("u:Hi", "a:Hello")


@pytest.mark.parametrize(
    ("row", "keys", "name"),
    [
        ({"messages": TURNS}, {}, "messages"),
        ({"messages": TURNS, "problem": "", "solution": ""}, {}, "messages"),
        ({"conversations": TURNS}, {}, "messages: conversations"),
        ({"conversations": TURNS}, {"reader": "messages"}, "messages: conversations"),
        ({"dialog": TURNS}, {"chat_key": "dialog"}, "messages: dialog"),
        ({"dialog": TURNS}, {"chat_key": "dialog", "reader": "messages"}, "messages"),
        ({"messages": json.dumps(TURNS)}, {}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, {}, "sharegpt"),
        (
            {"messages": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Hello"}]},
            {},
            "sharegpt: messages",
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, {}, "alpaca"),
        ({"input": "Hi", "output": "Hello"}, {}, "response: input → output"),
        ({"prompt": "Hi", "completion": "Hello"}, {}, "response: prompt → completion"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {}, "response: prompt → completion"),
        ({"prompt": "Hi", "response": "Hello"}, {}, "response: prompt → response"),
        ({"question": "Hi", "answer": "Hello", "id": 3}, {"reader": "response"}, "response: question → answer"),
        ({"problem": "Hi", "solution": "Hello", "answer": "3"}, {}, "response: problem → solution"),
        ({"instruction": "Hi", "response": "Hello"}, {}, "response: instruction → response"),
        ({"instruction": "Hi", "context": "", "response": "Hello", "category": "chat"}, {}, "dolly"),
        ({"a": "Hi", "b": "Hello"}, {"input_key": "a", "output_key": "b"}, "response: a → b"),
        ({"a": "Hi", "b": "Hello"}, {"input_key": "a", "output_key": "b", "reader": "response"}, "response"),
        (
            {"problem": "Hi", "answer": "Hello"},
            {"output_key": "answer", "reader": "response"},
            "response: problem → answer",
        ),
        ({"context": "", "question": "Hi", "answers": {"text": ["Hello"]}}, {}, "squad"),
    ],
)
def test_formats_are_recognised(row: dict[str, Any], keys: dict[str, Any], name: str) -> None:
    source = source_of("x.jsonl", **keys)
    found, spec = readers.find(source, row, "x.jsonl")
    assert found == name
    made = readers.convert(pickle.loads(pickle.dumps(spec)), row, source)
    assert isinstance(made, Conversation) and made.messages == TURNS


def test_formats_that_are_not_recognised() -> None:
    with pytest.raises(UserError) as error:
        readers.find(source_of("x.jsonl"), {"text": "Hi", "id": 1}, "x.jsonl")
    assert str(error.value) == (
        "x.jsonl: no known format has these columns ('text', 'id'); a row holds 'messages', 'conversations', 'input_ids', "
        "'instruction' and 'output', 'input' and 'output', 'prompt' and 'completion', 'prompt' and 'response', 'question' and "
        "'answer', 'problem' and 'solution', 'instruction' and 'response', 'chosen' and 'rejected', or set data.reader (messages, "
        "response, alpaca, dolly, sharegpt, pretokenized, open_assistant, squad, preference, binary_preference, helpsteer3, or "
        "module:function of your own) and its keys."
    )
    with pytest.raises(UserError) as error:
        readers.find(
            source_of("x.jsonl", reader="response", input_key="q"), {"question": "Hi", "answer": "Hello"}, "x.jsonl"
        )
    assert str(error.value) == (
        "x.jsonl: no columns of a question and its answer are known among these ('question', 'answer'); set data.input_key and "
        "data.output_key."
    )
    with pytest.raises(UserError) as error:
        readers.find(source_of("x.jsonl", reader="chat"), {"messages": TURNS}, "x.jsonl")
    assert str(error.value) == (
        "data.reader=chat: no such reader; choose messages, response, alpaca, dolly, sharegpt, pretokenized, open_assistant, "
        "squad, preference, binary_preference, helpsteer3 or module:function."
    )


def test_response() -> None:
    row = {"q": TURNS[:1], "a": TURNS[1:], "system": "Be brief."}
    assert messages_of(row, reader="response", input_key="q", output_key="a") == chat("s:Be brief.", "u:Hi", "a:Hello")
    row = {"q": [*TURNS, *chat("u:Why?")], "a": "So."}
    assert messages_of(row, input_key="q", output_key="a") == chat("u:Hi", "a:Hello", "u:Why?", "a:So.")
    assert messages_of({"q": "Hi", "a": " \n"}, input_key="q", output_key="a") == chat("u:Hi", "a: \n")  # dropped later
    for empty in ({"q": "Hi"}, {"q": "Hi", "a": None}, {"q": "Hi", "a": []}):
        with pytest.raises(Dropped, match="^no 'a'$"):
            convert(empty, reader="response", input_key="q", output_key="a")


def test_dolly() -> None:
    row = {"instruction": "Who?", "context": "Ann is here.", "response": "Ann", "category": "closed_qa"}
    assert messages_of(row, reader="dolly") == chat("u:Who?\nAnn is here.", "a:Ann")


def test_alpaca() -> None:
    assert messages_of({"instruction": "Add", "input": "1 and 2", "output": "3"}) == chat("u:Add\n1 and 2", "a:3")
    assert messages_of({"instruction": "Add", "input": None, "output": "3", "system": "Be brief."}) == chat(
        "s:Be brief.", "u:Add", "a:3"
    )


def test_the_system_prompt() -> None:
    """The row's own column, else the recipe's prompt, and only where the conversation opens with neither system nor developer."""
    opened = [{"role": "developer", "content": "Own."}, *TURNS]
    assert messages_of({"messages": TURNS, "system": "Row."}, system_prompt="All.") == [*chat("s:Row."), *TURNS]
    assert messages_of({"messages": TURNS, "system": ""}, system_prompt="All.") == [*chat("s:All."), *TURNS]
    assert messages_of({"messages": TURNS, "system": None}, system_prompt="All.") == [*chat("s:All."), *TURNS]
    assert messages_of({"messages": TURNS, "role": "Row."}, system_key="role") == [*chat("s:Row."), *TURNS]
    assert messages_of({"messages": opened, "system": "Row."}, system_prompt="All.") == opened
    assert messages_of({"messages": [*chat("s:"), *TURNS]}, system_prompt="All.") == [*chat("s:"), *TURNS]
    assert messages_of({"messages": TURNS}) == TURNS


def test_sharegpt() -> None:
    functions = '[{"name": "a", "arguments": {"x" : 1.50}}, {"name": "b", "arguments": {}}]'
    row = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi", "weight": None},
            {"from": "function_call", "value": functions},
            {"from": "observation", "value": '{"y": 2}'},
            {"from": "function_response", "value": "3"},
            {"from": "chatgpt", "value": "Hello", "train": False},
            {"from": "user", "value": "Why?"},
            {"from": "function_call", "value": {"name": "c", "arguments": '{"z":  1}'}},
            {"from": "tool", "value": "4"},
            {"from": "assistant", "value": "So.", "weight": 0.5},
        ],
        "tools": '[{"name": "a", "parameters": {"default": null}}]',
        "system": "Not this one.",
    }
    made = convert(row)
    assert isinstance(made, Conversation)
    contents = chat("s:Be brief.", "u:Hi", "a:", 't:{"y": 2}', "t:3", "a:Hello", "u:Why?", "a:", "t:4", "a:So.")
    assert [{k: turn[k] for k in ("role", "content")} for turn in made.messages] == contents
    first, second = made.messages[2]["tool_calls"]
    assert first == {"type": "function", "function": {"name": "a", "arguments": {"x": 1.5}}}
    assert str(first["function"]["arguments"]) == '{"x" : 1.50}'
    assert str(second["function"]["arguments"]) == "{}"
    assert str(made.messages[7]["tool_calls"][0]["function"]["arguments"]) == '{"z":  1}'
    assert made.messages[5]["train"] is False and made.messages[9]["weight"] == 0.5
    assert made.tools == [{"type": "function", "function": {"name": "a", "parameters": {"default": None}}}]


def test_pretokenized() -> None:
    ids = [5, 6, 7]
    assert convert({"input_ids": ids}) == Tokens(ids, [True, True, True])
    assert convert({"input_ids": ids, "labels": [-100, 6, 7], "mask": [1, 1, 1]}) == Tokens(ids, [False, True, True])
    for name in ("loss_mask", "completion_mask", "assistant_masks", "mask"):
        row = {"input_ids": ids, name: [0, True, 0], "attention_mask": [1, 1, 1], "text": "abc"}
        assert convert(row) == Tokens(ids, [False, True, False])


# --- messages and tools in normal form -------------------------------------------------------------------------------


def test_contents_and_roles() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo", "image": None}]
    call = {"name": "f", "arguments": {}}
    made = normal(
        [
            {"role": "user", "content": "Hi", "name": "Ann", "tool_calls": None},
            {
                "role": "assistant",
                "content": parts,
                "tool_calls": [],
                "reasoning_content": "Well.",
                "weight": 1,
                "train": True,
            },
            {"role": "user", "content": [], "train": False},
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "f", "content": "1"},
            {"role": "assistant", "tool_calls": [call, {"id": "c2", "type": "function", "function": call}]},
        ]
    )
    wrapped = {"type": "function", "function": call}
    assert made.messages == [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "Well.", "weight": 1, "train": True},
        {"role": "user", "content": "", "train": False},
        {"role": "assistant", "content": "", "tool_calls": [wrapped]},
        {"role": "tool", "name": "f", "content": "1"},
        {"role": "assistant", "content": "", "tool_calls": [wrapped, {"id": "c2", **wrapped}]},
    ]
    assert made.tools is None


@pytest.mark.parametrize(
    ("arguments", "kind", "value"),
    [
        ({"b": 1, "a": [2.0, None]}, dict, {"b": 1, "a": [2.0, None]}),
        (' {"b":1,\n"a": 1e2}', RawJson, {"b": 1, "a": 100.0}),
        ("{}", RawJson, {}),
        ("[1]", str, "[1]"),
        ("ls -l", str, "ls -l"),
        ("", str, ""),
        (None, dict, {}),
    ],
)
def test_arguments(arguments: Any, kind: type, value: Any) -> None:
    (turn,) = normal([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]).messages
    made = turn["tool_calls"][0]["function"]["arguments"]
    assert type(made) is kind and made == value
    if kind is not dict:
        assert str(made) == arguments
    else:
        assert json.dumps(made) == json.dumps(arguments or {})


def test_raw_json_survives_the_way_to_another_process() -> None:
    made = pickle.loads(pickle.dumps(RawJson({"a": 1}, '{"a":1}')))
    assert type(made) is RawJson and made == {"a": 1} and str(made) == '{"a":1}'


def test_tool_calls_as_json_text() -> None:
    text = '[{"id": "c1", "type": "function", "function": {"name": "f", "arguments": { "x":1 }}}]'
    (turn,) = normal([{"role": "assistant", "tool_calls": text}]).messages
    (call,) = turn["tool_calls"]
    assert call == {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert str(call["function"]["arguments"]) == '{ "x":1 }'


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "f", "parameters": {"a": None}}],
        [{"type": "function", "function": {"name": "f", "parameters": {"a": None}}}],
        ['{"name": "f", "parameters": {"a": null}}'],
        '[{"name": "f", "parameters": {"a": null}}]',
        '[{"type": "function", "function": {"name": "f", "parameters": {"a": null}}}]',
        [{"name": "f", "parameters": '{"a": null}'}],
        [{"type": "function", "function": '{"name": "f", "parameters": {"a": null}}'}],
    ],
)
def test_tools(tools: Any) -> None:
    expected = [{"type": "function", "function": {"name": "f", "parameters": {"a": None}}}]
    made = convert({"messages": TURNS, "tools": tools})
    assert isinstance(made, Conversation) and made.tools == expected
    made = convert({"messages": TURNS, "functions": tools}, tool_key="functions")
    assert isinstance(made, Conversation) and made.tools == expected


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_no_tools(tools: Any) -> None:
    made = convert({"messages": TURNS, "tools": tools})
    assert isinstance(made, Conversation) and made.tools is None


@st.composite
def written(draw: Any, value: Any) -> str:
    """Write a value as JSON with odd white space and escapes."""
    space = st.text(" \t\r\n", max_size=2)
    if isinstance(value, dict):
        inner = ",".join(
            f"{draw(space)}{json.dumps(k, ensure_ascii=draw(st.booleans()))}{draw(space)}:{draw(written(v))}"
            for k, v in value.items()
        )
        text = "{" + (inner or draw(space)) + "}"
    elif isinstance(value, list):
        text = "[" + (",".join(draw(written(v)) for v in value) or draw(space)) + "]"
    else:
        text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    return f"{draw(space)}{text}{draw(space)}"


@settings(max_examples=200, deadline=None)
@given(
    st.data(),
    st.lists(st.dictionaries(st.text(max_size=6), JSON_VALUES, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_arguments_are_cut_out_as_they_are_written(
    data: Any, all_arguments: list[dict[str, Any]], single: bool
) -> None:
    texts, calls = [], []
    for arguments in all_arguments[: 1 if single else None]:
        text = data.draw(written(arguments))
        texts.append(text.strip(" \t\r\n"))
        name = data.draw(written("f"))
        members = [f'"name":{name}', f' "arguments" \n:{text}', f'"x{{": {data.draw(written([1, {"arguments": {}}]))}']
        call = "{" + ",".join(data.draw(st.permutations(members))) + "}"
        calls.append(f'{{"type": "function", "function":{call}}}' if data.draw(st.booleans()) else call)
    value = calls[0] if single else f" [{','.join(calls)} ]"
    row = {"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": value}]}
    made = messages_of(row)[1]["tool_calls"]
    for call, text, arguments in zip(made, texts, all_arguments, strict=False):
        assert str(call["function"]["arguments"]) == text
        assert dict(call["function"]["arguments"]) == arguments
        assert text in value
    assert len(made) == len(texts)


# --- readers of one's own --------------------------------------------------------------------------------------------

OWN = """
from engine.data.conversation import Dropped, RowError
def turns(row):
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]
def both(row):
    return {"messages": turns(row), "tools": row["t"]}
def ids(row):
    return {"input_ids": [1, 2], "labels": [-100, 2]}
def wrong(row):
    return "Hi"
def refuses(row):
    raise RowError("too short")
def drops(row):
    raise Dropped("in Latin")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_readers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own")
def test_a_reader_of_ones_own() -> None:
    row = {"q": "Hi", "a": "Hello", "t": [{"name": "f"}], "tools": [{"name": "g"}], "system": "Be brief."}
    expected = chat("s:Be brief.", "u:Hi", "a:Hello")
    assert convert(row, reader="own_readers:turns") == Conversation(expected)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert convert(row, reader="own_readers:both") == Conversation(expected, tools)
    assert convert(row, reader="own_readers:ids") == Tokens([1, 2], [False, True])
    with pytest.raises(RowError, match="^too short$"):
        convert(row, reader="own_readers:refuses")
    with pytest.raises(Dropped, match="^in Latin$"):
        convert(row, reader="own_readers:drops")
    with pytest.raises(RowError) as error:
        convert({}, reader="own_readers:turns")
    assert (
        str(error.value) == "data.reader failed on this row (KeyError('q')); it raises RowError on rows it cannot use"
    )
    with pytest.raises(RowError) as error:
        convert({}, reader="own_readers:wrong")
    assert str(error.value) == (
        "data.reader must return a list of messages, {'messages', 'tools'}, {'chosen', 'rejected', 'tools'} or "
        "{'input_ids', 'labels'}, got 'Hi'"
    )
    with pytest.raises(UserError, match="data.reader: own_readers:nothing cannot be imported"):
        convert(row, reader="own_readers:nothing")


# --- rows that cannot be used ----------------------------------------------------------------------------------------


def call_of(**call: Any) -> dict[str, Any]:
    return {"messages": [*TURNS, {"role": "assistant", "content": "", "tool_calls": [call]}]}


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no messages": ({"id": 1}, {"reader": "messages"}, "no list 'messages' (the columns are 'id')"),
    "messages empty": ({"messages": []}, {}, "'messages' is empty"),
    "messages not json": (
        {"messages": "[{]"},
        {"reader": "messages"},
        "messages is not JSON (Expecting property name enclosed in double quotes: line 1 column 3 (char 2)), got '[{]'",
    ),
    "message no object": (
        {"messages": ["Hi"]},
        {},
        "messages[0] must be an object with 'role' and 'content', got 'Hi'",
    ),
    "unknown role": (
        {"messages": [{"role": "gpt", "content": "Hi"}]},
        {},
        "messages[0].role is 'gpt'; known roles are system, developer, user, assistant, tool",
    ),
    "no content": ({"messages": [{"role": "user"}]}, {}, "messages[0].content must be a string, got None"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        {},
        "messages[0].content[0] must be a part of type 'text' with a string 'text', got {'type': 'image', 'url': 'x'}",
    ),
    "half a surrogate": (
        {"messages": [*TURNS, {"role": "user", "content": "\ud83d"}]},
        {},
        "messages[2].content holds half a surrogate pair (a \\ud83d, say, without its other half), which no text has",
    ),
    "half a surrogate in arguments": (
        call_of(name="f", arguments='{"a": "\\ud83d"}'),
        {},
        "messages[2].tool_calls holds half a surrogate pair (a \\ud83d, say, without its other half), which no text has",
    ),
    "half a surrogate in a tool": (
        {"messages": TURNS, "tools": [{"name": "\ude00"}]},
        {},
        "tools[0] holds half a surrogate pair (a \\ud83d, say, without its other half), which no text has",
    ),
    "train no boolean": (
        {"messages": [{**TURNS[0], "train": "no"}]},
        {},
        "messages[0].train must be true or false, got 'no'",
    ),
    "train on the user": (
        {"messages": [{**TURNS[0], "train": True}]},
        {},
        "messages[0].train is for assistant turns, and this one's role is 'user'",
    ),
    "weight on the user": (
        {"messages": [{**TURNS[0], "weight": 0}]},
        {},
        "messages[0].weight is for assistant turns, and this one's role is 'user'",
    ),
    "weight below 0": (
        {"messages": [{**TURNS[1], "weight": -1}]},
        {},
        "messages[0].weight must be a number of at least 0, got -1",
    ),
    "weight a boolean": (
        {"messages": [{**TURNS[1], "weight": True}]},
        {},
        "messages[0].weight must be a number of at least 0, got True",
    ),
    "weight without end": (
        {"messages": [{**TURNS[1], "weight": float("inf")}]},
        {},
        "messages[0].weight must be a number of at least 0, got inf",
    ),
    "calls of the user": (
        {"messages": [{**TURNS[0], "tool_calls": [{"name": "f"}]}]},
        {},
        "messages[0].tool_calls belongs to an assistant turn, and this one's role is 'user'",
    ),
    "calls no list": (
        {"messages": [{**TURNS[1], "tool_calls": {"name": "f"}}]},
        {},
        "messages[0].tool_calls must be a list, got {'name': 'f'}",
    ),
    "call without name": (
        call_of(arguments={}),
        {},
        "messages[2].tool_calls[0] must be an object with 'name' and 'arguments', or one with these two in 'function', got "
        "{'arguments': {}}",
    ),
    "arguments a list": (
        call_of(name="f", arguments=[1]),
        {},
        "messages[2].tool_calls[0]: 'arguments' must be an object or a string, got [1]",
    ),
    "tools no list": (
        {"messages": TURNS, "tools": {"name": "f"}},
        {},
        "tools must be a list, or a JSON string of one, got {'name': 'f'}",
    ),
    "tools not json": (
        {"messages": TURNS, "tools": "f()"},
        {},
        "tools is not JSON (Expecting value: line 1 column 1 (char 0)), got 'f()'",
    ),
    "tool without name": (
        {"messages": TURNS, "tools": [{"function": {"description": "f"}}]},
        {},
        "tools[0] must be an object with a 'name', or one with such a 'function', got {'function': {'description': 'f'}}",
    ),
    "response input missing": (
        {"output": "Hi"},
        {"reader": "response", "input_key": "input", "output_key": "output"},
        "field 'input' must be a string or a list of messages, got None",
    ),
    "response output a number": (
        {"input": "Hi", "output": 3},
        {},
        "field 'output' must be a string or a list of messages, got 3",
    ),
    "alpaca output a number": ({"instruction": "Hi", "output": 3}, {}, "field 'output' must be a string, got 3"),
    "sharegpt speaker": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "bing", "value": "Hello"}]},
        {},
        "conversations[1].from is 'bing'; known are human, user, gpt, assistant, chatgpt, model, function_call, observation, tool, "
        "function_response, system",
    ),
    "sharegpt value": (
        {"conversations": [{"from": "human", "value": None}]},
        {},
        "conversations[0].value must be a string, got None",
    ),
    "sharegpt turn": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"value": "Hello"}]},
        {},
        "conversations[1] must be an object with 'from' and 'value', got {'value': 'Hello'}",
    ),
    "sharegpt call": (
        {"conversations": [{"from": "function_call", "value": "f(1)"}]},
        {},
        "conversations[0].value is not JSON (Expecting value: line 1 column 1 (char 0)), got 'f(1)'",
    ),
    "sharegpt no call": (
        {"conversations": [{"from": "function_call", "value": "[]"}]},
        {},
        "conversations[0].value must be a function call or a list of them, got '[]'",
    ),
    "squad answers": (
        {"context": "", "question": "", "answers": None},
        {},
        "field 'answers' must be an object with a list 'text', got None",
    ),
    "squad question": (
        {"context": "", "question": None, "answers": {"text": ["Hi"]}},
        {},
        "field 'question' must hold a string, got None",
    ),
    "no ids": ({"input_ids": []}, {}, "field 'input_ids' must be a list of token ids, got []"),
    "an id below 0": ({"input_ids": [1, -1]}, {}, "input_ids[1] must be a whole number of at least 0, got -1"),
    "an id no integer": ({"input_ids": [1.0]}, {}, "input_ids[0] must be a whole number of at least 0, got 1.0"),
    "labels too short": (
        {"input_ids": [1, 2], "labels": [1]},
        {},
        "field 'labels' must be a list as long as 'input_ids' (2), got 1 entries",
    ),
    "labels shifted": (
        {"input_ids": [1, 2], "labels": [2, -100]},
        {},
        "labels[0] must be -100 or input_ids[0], which is 1, got 2 (unshifted)",
    ),
    "mask of twos": ({"input_ids": [1, 2], "mask": [0, 2]}, {}, "mask[1] must be 0 or 1, got 2"),
    "padding": (
        {"input_ids": [1, 0], "attention_mask": [1, 0]},
        {},
        "'attention_mask' has zeros: leave out the padding, since samples are packed without",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str) -> None:
    row, keys, sentence = BAD[name]
    with pytest.raises(RowError) as error:
        convert(row, **keys)
    assert str(error.value) == sentence


def test_nothing_to_train() -> None:
    for roles in ("user", "system", "tool"):
        made = normal([{"role": roles, "content": "Hi"}])
        check(made, "all")
        with pytest.raises(RowError) as error:
            check(made, "last_assistant")
        assert (
            str(error.value) == "no assistant turn, so nothing to train; set data.train_on=all to train on every token"
        )


def test_rows_of_a_file_with_different_tools_stay_apart(tmp_path: Path) -> None:
    """The first row's tools say nothing about the second's."""
    file = tmp_path / "a.jsonl"
    items = [{"messages": TURNS, "tools": [{"name": name, "parameters": {name: 1}}]} for name in "ab"]
    file.write_bytes(lines(*items))
    source = source_of(file)
    for (_, row), item in zip(rows.read(source), items, strict=True):
        assert not isinstance(row, RowError)
        made = readers.convert(readers.READERS["messages"], row, source)
        assert isinstance(made, Conversation) and made.tools == [{"type": "function", "function": item["tools"][0]}]


def test_arguments_nested_beyond_reason() -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(RowError, match="^its tools or tool calls are nested too deeply to be read; flatten them$"):
        convert(call_of(name="f", arguments={"a": deep}))


def test_the_examples_of_the_guide_are_what_they_are_said_to_be() -> None:
    """docs/data.md: two rows a format, each under the format's name."""
    text = (ROOT / "docs" / "data.md").read_text()
    text = text.partition("### Preference pairs")[0]  # test_preferences.py has the others
    examples = re.findall(r"^\*\*(\w+)\*\* \(.*?```json\n(.*?)```", text, re.M | re.S)
    assert [name for name, _ in examples] == list(EXAMPLES)
    for name, block in examples:
        items: list[tuple[str, Any]] = [(name, json.loads(line)) for line in block.splitlines()]
        assert len(items) == 2
        source = source_of("x.jsonl")
        found, spec = readers.find(source, items[0][1], "x.jsonl")
        assert found.split(":")[0] == name
        made = []
        for _, row in spec.gather(iter(items)) if spec.gather else items:
            try:
                one = readers.convert(spec, row, source)
            except Dropped as dropped:
                made.append(str(dropped))
            else:
                assert not isinstance(one, Pair)
                made.append(one.trained if isinstance(one, Tokens) else one.messages[-1]["content"])
        assert made == EXAMPLES[name]


EXAMPLES: dict[str, list[Any]] = {
    "messages": ["4", "Lima"],
    "response": ["4", "Lima"],
    "alpaca": ["fromage", "7"],
    "sharegpt": ["4", "It rains."],
    "pretokenized": [[False, False, True, True]] * 2,
    "squad": ["Peru", "no answer"],
    "open_assistant": ["4"],
}
