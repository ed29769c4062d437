"""Pairs: from rows in each data set's own shape to two conversations, to two samples, and what is said of rows that are none."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_fixtures import CHATML, CHATML_GENERATION, LLAMA3, MISTRAL, QWEN3, QWEN_TOOLS, byte_plain, tokenizer_named
from test_encode import recipe, spelled, text_of
from test_readers import chat, choice, convert
from test_sources import hub_layout, lines, source_of

from engine.config import sources
from engine.config.compose import compose
from engine.config.schema import SourceSection
from engine.data import cache, readers, rows
from engine.data.build import ROWS_PER_BATCH, encode
from engine.data.conversation import Conversation, Dropped, Pair, RowError, Tokens, normal
from engine.data.encode import Encoded, Encoder
from engine.data.template import Template
from engine.errors import UserError
from tests.conftest import ROOT, SHARED_DATA


@pytest.fixture(scope="module", autouse=True)
def _own_folder_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def sides(made: Any) -> tuple[Any, Any]:
    """Return the messages of a pair."""
    assert isinstance(made, Pair)
    return made.chosen.messages, made.rejected.messages


def pair_of(row: dict[str, Any], **keys: Any) -> tuple[Any, Any]:
    return sides(convert(row, **keys))


def both(*turns: str) -> tuple[Any, Any]:
    """Return the messages of a pair: the last two turns are its answers."""
    return chat(*turns[:-1]), chat(*turns[:-2], turns[-1])


def refusal(row: dict[str, Any], kind: type[Exception] = RowError, **keys: Any) -> str:
    with pytest.raises(kind) as caught:
        convert(row, **keys)
    return str(caught.value)


def ranked(context: Any, *completions: tuple[Any, Any]) -> dict[str, Any]:
    return {"context": context, "completions": [{"rank": r, "completion": c} for r, c in completions]}


# --- the sets that have a choice of their own ------------------------------------------------------------------------


def helpsteer(preference: int | None, one: str = "Four.", two: str = "Five.") -> dict[str, Any]:
    opinion = {"score": preference, "reasoning": "r", "feedback1": "f", "feedback2": "g"}
    return {
        "domain": "stem",
        "language": "english",
        "context": chat("u:2+2?", "a:In words?", "u:Yes."),
        "response1": one,
        "response2": two,
        "overall_preference": preference,
        "individual_preference": [opinion, opinion],
    }


def ultrafeedback(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    better = chat(f"u:{prompt}", f"a:{chosen}")
    return {
        "prompt": prompt,
        "prompt_id": "f0e37e9f",
        "chosen": better,
        "rejected": chat(f"u:{prompt}", f"a:{rejected}"),
        "messages": better,
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    }


def tulu(*turns: str) -> dict[str, Any]:
    chosen, rejected = both(*turns)
    return {"id": "p1", "source": "wildchat", "prompt": turns[0][2:], "chosen": chosen, "rejected": rejected}


def hh(shared: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": f"\n\n{shared}\n\nAssistant:{chosen}", "rejected": f"\n\n{shared}\n\nAssistant:{rejected}"}


BUILTIN: dict[str, tuple[dict[str, list[dict[str, Any]]], list[Any], str]] = {
    # name: (rows by split, what is made of the training rows: a pair's messages, or why it is dropped; the format recognised)
    "helpsteer3": (
        {
            "train": [helpsteer(-3), helpsteer(1), helpsteer(0), helpsteer(2, two=" \n")],
            "validation": [helpsteer(-1)],
        },
        [
            both("u:2+2?", "a:In words?", "u:Yes.", "a:Four.", "a:Five."),
            both("u:2+2?", "a:In words?", "u:Yes.", "a:Five.", "a:Four."),
            "a tie",
            "empty completion",
        ],
        "helpsteer3",
    ),
    "tulu3_preference": (
        {"train": [tulu("u:Hi", "a:Hello", "a:Go"), tulu("s:Be kind.", "u:Hi", "a:Yes?", "u:Why?", "a:So.", "a:No.")]},
        [both("u:Hi", "a:Hello", "a:Go"), both("s:Be kind.", "u:Hi", "a:Yes?", "u:Why?", "a:So.", "a:No.")],
        "binary_preference: prompt → chosen and rejected",
    ),
    "ultrafeedback": (
        {
            "train_prefs": [ultrafeedback("2+2?", "4", "5"), ultrafeedback("Hi", "Hello", "")],
            "test_prefs": [ultrafeedback("1+1?", "2", "3")],
            "train_sft": [],
        },
        [both("u:2+2?", "a:4", "a:5"), "empty completion"],
        "binary_preference: prompt → chosen and rejected",
    ),
    "hh_rlhf": (
        {
            "train": [
                hh("Human: Hi", " Hello", " Go"),
                hh("Human: Hi\n\nAssistant: Yes?\n\nHuman: List:\n\n- a\n- b", " So.\n\nOr so.", ""),
                hh("Human: Hi\n\nAssistant: Yes?\n\nHuman: List:\n\n- a\n- b", " So.\n\nOr so.", " No."),
            ],
            "test": [hh("Human: Hi", " Hello", " Go")],
        },
        [
            both("u:Hi", "a:Hello", "a:Go"),
            "empty completion",
            both("u:Hi", "a:Yes?", "u:List:\n\n- a\n- b", "a:So.\n\nOr so.", "a:No."),
        ],
        "binary_preference: chosen and rejected",
    ),
}


def convert_all(source: SourceSection) -> tuple[str, list[Any]]:
    """Return the name of the format, and what is made of every row."""
    found = [row for _, row in rows.read(source)]
    name, spec = readers.find(source, found[0], source.path)
    made: list[Any] = []
    for row in found:
        assert not isinstance(row, RowError)
        try:
            made.append(sides(readers.convert(pickle.loads(pickle.dumps(spec)), row, source)))
        except Dropped as dropped:
            made.append(str(dropped))
    return name, made


@pytest.mark.parametrize("name", BUILTIN)
def test_the_sets_with_a_choice_of_their_own(name: str, tmp_path: Path) -> None:
    splits, expected, recognised = BUILTIN[name]
    keys = choice(name)
    train = keys.get("train_split", "train")
    folder = hub_layout(
        tmp_path / "hub", {k: v or splits[train] for k, v in splits.items()}, keys.get("subset", "default")
    )
    own = {k: v for k, v in keys.items() if k in SourceSection.model_fields}
    assert keys["train_path"].count("/") == 1
    assert convert_all(source_of(folder, split=train, **own)) == (keys["reader"], expected)
    if "val_path" in keys:
        assert keys["val_path"] == keys["train_path"]
        _, made = convert_all(source_of(folder, split=keys["val_split"], **own))
        assert len(made) == len(splits[keys["val_split"]]) and not any(isinstance(one, str) for one in made)
    if name == "tulu3_preference":  # the prompt of its second row is no turn of the user
        splits["train"].pop()
        folder, expected = hub_layout(tmp_path / "other", splits), expected[:1]
    bare = source_of(folder, split=train, **{k: v for k, v in own.items() if k == "subset"})
    assert convert_all(bare) == (recognised, expected)


def test_default_choice_is_ultrafeedback() -> None:
    assert choice("default_dpo") == {"defaults": ["ultrafeedback"]}
    data = compose(["algorithm=dpo", "model=tiny"]).config.data
    assert (data.reader, data.train_path) == ("binary_preference", "HuggingFaceH4/ultrafeedback_binarized")
    assert (data.train_split, data.val_split, data.ties) == ("train_prefs", "test_prefs", "drop")
    assert (data.chosen_key, data.rejected_key) == ("chosen", "rejected")


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "keys", "name"),
    [
        ({"context": "Hi", "completions": []}, {}, "preference"),
        (helpsteer(1), {}, "helpsteer3"),
        ({"chosen": [], "rejected": []}, {}, "binary_preference: chosen and rejected"),
        ({"prompt": "", "chosen": "", "rejected": ""}, {}, "binary_preference: prompt → chosen and rejected"),
        (
            {"messages": chat("u:Hi"), "chosen": "", "rejected": ""},
            {"reader": "binary_preference"},
            "binary_preference",
        ),
        (
            {"q": "", "good": "", "bad": "", "conversations": []},
            {"input_key": "q", "chosen_key": "good", "rejected_key": "bad"},
            "binary_preference: q → good and bad",
        ),
        ({"conversations": [], "chosen": {}, "rejected": {}}, {}, "sharegpt pairs"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, {"reader": "sharegpt"}, "sharegpt pairs"),
        ({"talk": [], "chosen": {}, "rejected": {}}, {"reader": "sharegpt", "chat_key": "talk"}, "sharegpt pairs"),
        # what is asked for by name is no pair
        ({"messages": chat("u:Hi", "a:Yes"), "chosen": "", "rejected": ""}, {"reader": "messages"}, "messages"),
        ({"chosen": chat("u:Hi", "a:Yes"), "rejected": []}, {"chat_key": "chosen"}, "messages: chosen"),
        (
            {"prompt": "", "chosen": "", "rejected": ""},
            {"input_key": "prompt", "output_key": "chosen"},
            "response: prompt → chosen",
        ),
    ],
)
def test_formats_are_recognised(row: dict[str, Any], keys: dict[str, Any], name: str) -> None:
    found, _ = readers.find(source_of("x.jsonl", **keys), row, "x.jsonl")
    assert found == name


def test_preference() -> None:
    expected = both("u:Hi", "a:Hello", "a:Go")
    assert pair_of(ranked("Hi", (0, "Hello"), (1, "Go"))) == expected
    assert pair_of(ranked(chat("u:Hi"), (2, chat("a:Go")), (1, chat("a:Hello")))) == expected
    assert pair_of({**ranked("Hi", (0, "Hello"), (1, "Go")), "system": "Be brief."}) == both(
        "s:Be brief.", "u:Hi", "a:Hello", "a:Go"
    )
    assert refusal(ranked("Hi", (0, "Hello"))) == "'completions' must hold two of them, got 1"
    assert refusal(ranked("Hi", (0, "a"), (1, "b"), (2, "c"))) == "'completions' must hold two of them, got 3"
    assert refusal(ranked("Hi")) == "'completions' must hold two of them, got 0"
    assert refusal({"context": "Hi"}, reader="preference") == "no list 'completions' (the columns are 'context')"
    assert refusal(ranked("Hi", (0, "a"), (True, "b"))) == "completions[1].rank must be a whole number, got True"
    assert refusal({"context": "Hi", "completions": [{"rank": 0}, {"rank": 1}]}) == (
        "completions[0] must be an object with 'rank' and 'completion', got {'rank': 0}"
    )
    assert refusal(ranked("Hi", (0, "a"), (1, 3))) == (
        "field 'completions[1].completion' must be a string or a list of messages, got 3"
    )
    assert refusal(ranked("", (0, "a"), (1, "b"))) == "'context' is empty"
    assert refusal(ranked(None, (0, "a"), (1, "b"))) == (
        "field 'context' must be a string or a list of messages, got None"
    )
    for empty in ("", " \n", [], chat("a:")):
        assert refusal(ranked("Hi", (0, "a"), (1, empty)), Dropped) == "empty completion"


def test_ties() -> None:
    tie = ranked("Hi", (1, "Hello"), (1, "Go"))
    assert refusal(tie, Dropped) == "a tie"
    assert refusal(tie, ties="error") == "a tie, both completions have rank 1; set data.ties=drop"
    assert refusal(helpsteer(0), ties="error") == "a tie, overall_preference is 0; set data.ties=drop"
    for wrong in (4, None, True, 1.0):
        assert refusal(helpsteer(wrong), reader="helpsteer3") == (  # type: ignore[arg-type]
            f"field 'overall_preference' must be a whole number from -3 to 3, got {wrong!r}"
        )


def test_binary_preference() -> None:
    expected = both("u:Hi", "a:Hello", "a:Go")
    assert pair_of({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}) == expected
    assert pair_of({"q": "Hi", "w": "Hello", "l": "Go"}, input_key="q", chosen_key="w", rejected_key="l") == expected
    assert pair_of({"prompt": chat("u:Hi"), "chosen": chat("a:Hello"), "rejected": chat("a:Go")}) == expected
    assert pair_of({"prompt": chat("u:Hi"), "chosen": "Hello", "rejected": "Go"}) == expected
    assert pair_of({"prompt": "Hi", "chosen": chat("a:Hello"), "rejected": chat("a:Go")}) == expected
    assert pair_of({"prompt": "Hi", "chosen": chat("a:Hello")[0], "rejected": chat("a:Go")[0]}) == expected
    long = both("s:Be kind.", "u:Hi", "a:Yes?", "u:Why?", "a:So.", "a:No.")
    whole = {"chosen": long[0], "rejected": long[1]}
    assert pair_of(whole) == pair_of({"prompt": None, **whole}) == pair_of({"prompt": "", **whole}) == long
    assert pair_of({"prompt": "Hi ", **whole}) == pair_of({"prompt": long[0][:-1], **whole}) == long
    nulls = [{**turn, "name": None} for turn in long[0][:2]]
    assert pair_of({"prompt": nulls, **whole}, system_prompt="Not this one.") == long
    assert (
        pair_of({"chosen": "Human: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}) == expected
    )


def test_system_prompt_and_tools_reach_both_sides() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"x": 1}}]}
    row = {
        "prompt": "Hi",
        "chosen": [call],
        "rejected": "No.",
        "tools": '[{"name": "add", "parameters": {"default": null}}]',
        "system": "Be brief.",
    }
    made = convert(row)
    assert isinstance(made, Pair)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"default": None}}}]
    assert made.chosen.tools == made.rejected.tools == tools
    assert made.chosen.messages[:-1] == made.rejected.messages[:-1] == chat("s:Be brief.", "u:Hi")
    assert made.chosen.messages[-1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"x": 1}}
    bare = convert({k: v for k, v in row.items() if k not in ("system", "tools")}, system_prompt="All.")
    assert isinstance(bare, Pair) and bare.chosen.tools is None
    assert bare.rejected.messages == chat("s:All.", "u:Hi", "a:No.")


def test_sharegpt() -> None:
    row = {
        "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "Go"},
    }
    assert pair_of(row) == pair_of(row, reader="sharegpt") == both("s:Be kind.", "u:Hi", "a:Hello", "a:Go")
    assert pair_of({**row, "chosen": "Hello"}) == pair_of(row)
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x" : 1}}'}
    made = pair_of({**row, "chosen": call})[0][-1]
    assert str(made["tool_calls"][0]["function"]["arguments"]) == '{"x" : 1}'
    assert refusal({**row, "rejected": None}) == ("field 'rejected' must be a string or a list of messages, got None")
    assert refusal({**row, "rejected": {"from": "me", "value": ""}}).startswith("rejected[0].from is 'me'; known are")
    assert refusal({**row, "rejected": {"from": "human", "value": "Go"}}) == (
        "field 'rejected' must begin with an assistant turn, or with the messages of 'conversations'"
    )
    assert refusal({**row, "conversations": []}) == "'conversations' is empty"


def test_a_reader_of_ones_own() -> None:
    spec = readers.ReaderSpec(lambda row, source: row["made"], own=True)
    source = source_of("x.jsonl", system_prompt="All.")
    expected = both("s:All.", "u:Hi", "a:Hello", "a:Go")
    two = {"chosen": chat("u:Hi", "a:Hello"), "rejected": chat("u:Hi", "a:Go"), "tools": [{"name": "f"}]}
    made = readers.convert(spec, {"made": two}, source)
    assert sides(made) == expected and isinstance(made, Pair)
    assert made.chosen.tools == made.rejected.tools == [{"type": "function", "function": {"name": "f"}}]
    pair = Pair(Conversation(two["chosen"]), Conversation(two["rejected"]))
    assert sides(readers.convert(spec, {"made": pair, "tools": [{"name": "f"}]}, source)) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "Hi", "chosen": "Hello"},
            "no column 'rejected' (the columns are 'prompt', 'chosen')",
        ),
        (
            {"prompt": "", "chosen": "Hello", "rejected": "Go"},
            "'prompt' is empty, and field 'chosen' is no transcript that begins with '\\n\\nHuman:'",
        ),
        (
            {"chosen": chat("u:Hi", "a:Hello"), "rejected": chat("u:Ho", "a:Go")},
            "no common prompt: chosen and rejected part at messages[0], and all but their last turn must be the same",
        ),
        (
            {"chosen": chat("u:Hi", "a:Hello"), "rejected": chat("u:Hi", "a:Hello", "u:Why?", "a:So.")},
            "no common prompt: chosen and rejected part at messages[1], and all but their last turn must be the same",
        ),
        (
            {"prompt": "Hi", "chosen": chat("u:Hi", "a:Hello", "u:Why?"), "rejected": chat("u:Hi", "a:So.")},
            "chosen must end with an assistant turn, and its last one's role is 'user'",
        ),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi"},
            "rejected must end with an assistant turn, and its last one's role is 'user'",
        ),
        ({"chosen": chat("a:Hello"), "rejected": chat("a:Go")}, "no prompt before chosen and rejected; name its"),
        ({"chosen": "Hello", "rejected": "Go"}, "field 'chosen' is a text without a prompt; name the prompt's column"),
        (
            {"prompt": "Ho", "chosen": chat("u:Hi", "a:Hello"), "rejected": chat("u:Hi", "a:Go")},
            "field 'chosen' is a whole conversation, and 'prompt' is none of its user's turns; set data.input_key=none",
        ),
        (
            {"prompt": chat("u:Ho"), "chosen": chat("u:Hi", "a:Hello"), "rejected": chat("u:Hi", "a:Go")},
            "field 'chosen' must begin with an assistant turn, or with the messages of 'prompt'",
        ),
        (
            {"prompt": "Hi", "chosen": [*chat("a:"), "Hello"], "rejected": "Go"},
            "field 'chosen' is a whole conversation, and 'prompt' is none of its user's turns; set data.input_key=none",
        ),
        (
            {"prompt": [{"role": "me", "content": "Hi"}], "chosen": "Hello", "rejected": "Go"},
            "chosen: messages[0].role is 'me'; known roles are",
        ),
        (
            {"prompt": "Hi", "chosen": "Hello", "rejected": [{"role": "assistant", "content": 3}]},
            "rejected: messages[1].content must be a string, got 3",
        ),
    ],
)
def test_rows_that_are_no_pairs(row: dict[str, Any], reason: str) -> None:
    assert refusal(row, reader="binary_preference").startswith(reason)


def test_the_examples_of_the_guide_are_what_they_are_said_to_be() -> None:
    """docs/data.md: two rows a form, the same two pairs in all of them."""
    section = (ROOT / "docs" / "data.md").read_text().partition("### Preference pairs")[2].partition("\n### ")[0]
    blocks = re.findall(r"```json\n(.*?)```", section, re.S)
    formats = []
    for block in blocks:
        items = [json.loads(line) for line in block.splitlines()]
        source = source_of("x.jsonl")
        name, spec = readers.find(source, items[0], "x.jsonl")
        formats.append(re.split("[: ]", name)[0])
        made = [sides(readers.convert(spec, row, source)) for row in items]
        assert [[turns[-1]["content"] for turns in two] for two in made] == [["4", "5"], ["Lima", "Quito"]]
        assert [two[0][-2]["content"] for two in made] == ["2 + 2?", "Capital of Peru?"]
    assert formats == ["preference", *["binary_preference"] * 3, "sharegpt", "helpsteer3"]
    assert set(re.findall(r"^\| `(\w+)`", section, re.M)) == set(BUILTIN)


# --- samples ---------------------------------------------------------------------------------------------------------


def encoder(template: str | None = CHATML, tokenizer: Any = "byte_plain", **data: Any) -> Encoder:
    """Make an encoder of a recipe for dpo."""
    config = recipe()
    defaults = {"max_length": 4096, "overlong": "drop"}
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={**defaults, **data}),
            "algorithm": config.algorithm.model_copy(update={"name": "dpo"}),
        }
    )
    made = tokenizer_named(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return Encoder(made, template, config)


def pair(*turns: str, tools: Any = None) -> Pair:
    chosen, rejected = both(*turns)
    return Pair(normal(chosen, tools), normal(rejected, tools))


@pytest.mark.parametrize("train_on", ["all_assistant", "last_assistant", "all"])
@pytest.mark.parametrize(("template", "close"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL, "</s>")])
def test_only_the_final_answers_are_trained(template: str, close: str, train_on: str) -> None:
    made = encoder(template, train_on=train_on)(
        pair("s:Be kind.", "u:Hi", "a:Yes?", "u:Why?", "a:So.", "a:No, not so.")
    )
    assert made == Encoded(made.samples)
    chosen, rejected = made.samples
    assert (spelled(chosen), spelled(rejected)) == ([(f"So.{close}", 1.0)], [(f"No, not so.{close}", 1.0)])
    assert (chosen.weights, rejected.weights) == (None, None)
    (start, _), (other, _) = chosen.trained[0], rejected.trained[0]
    assert start == other and np.array_equal(chosen.input_ids[:start], rejected.input_ids[:start])


def test_pairs_with_tools() -> None:
    tools = [{"name": "add", "parameters": {"type": "object"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"x": 1}}]}
    prompt = [*chat("s:Be kind.", "u:1+1?"), call, *chat("t:2")]
    two = Pair(normal([*prompt, *chat("a:Two.")], tools), normal([*prompt, call], tools))
    chosen, rejected = encoder(QWEN_TOOLS)(two).samples
    assert "# Tools" in text_of(chosen) and "<tool_response>\n2" in text_of(rejected)
    ((answer, _),), ((called, _),) = spelled(chosen), spelled(rejected)
    assert answer.endswith("Two.<|im_end|>") and "<tool_call>" not in answer
    assert called.endswith('<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>')
    assert called.count("<tool_call>") == 1
    tokenizer = byte_plain()
    tokenizer.chat_template = {"default": "#" + CHATML, "tool_use": QWEN_TOOLS}
    own = encoder("default", tokenizer)
    assert "# Tools" in text_of(own(pair("u:Hi", "a:Hello", "a:Go", tools=tools)).samples[1])
    assert text_of(own(pair("u:Hi", "a:Hello", "a:Go")).samples[1])[0] == "#"
    with pytest.raises(RowError, match="^chosen: the chat template does not show the tool add"):
        encoder(CHATML)(pair("u:Hi", "a:Hello", "a:Go", tools=tools))


def test_a_template_that_rewrites_earlier_turns() -> None:
    """Earlier reasoning is not trained, so the pair is one document a side; reasoning on one side alone is trained there."""
    made = encoder(QWEN3)(pair("u:Q", "a:<think>a</think>A", "u:R", "a:<think>b</think>B", "a:C"))
    assert [spelled(sample) for sample in made.samples] == [
        [("<think>\nb\n</think>\n\nB<|im_end|>", 1.0)],
        [("C<|im_end|>", 1.0)],
    ]
    assert not made.split and "think" not in text_of(made.samples[1])


def test_a_template_that_shows_the_prompts_differently() -> None:
    shows_length = "{{- messages[-1].content | length -}}"
    with pytest.raises(RowError) as error:
        encoder(shows_length + CHATML)(pair("u:Hi", "a:Hello", "a:Go"))
    assert str(error.value) == (
        "chosen: the chat template does not show where messages[1] begins (it does not begin with the generation prompt), so it "
        "cannot be masked exactly; give another by model.chat_template"
    )
    with pytest.raises(RowError) as error:
        encoder(shows_length + CHATML_GENERATION)(pair("u:Hi", "a:Hello", "a:Go"))
    assert str(error.value) == (
        "no common prompt after the template: it shows chosen and rejected differently before their answers; give another by "
        "model.chat_template"
    )


def test_pairs_that_are_of_no_use() -> None:
    with pytest.raises(Dropped, match="^chosen and rejected are the same$"):
        encoder()(pair("u:Hi", "a:Hello", "a:Hello"))
    with pytest.raises(Dropped, match="^chosen and rejected are the same$"):  # after the template's trim
        encoder(LLAMA3)(pair("u:Hi", "a:Hello", "a:Hello\n"))
    assert len(encoder()(pair("u:Hi", "a:Hello", "a:Hello\n")).samples) == 2


def test_overlong_pairs() -> None:
    short, long = "Hello", "x" * 100
    for turns in (("u:Hi", f"a:{short}", f"a:{long}"), ("u:Hi", f"a:{long}", f"a:{short}")):
        with pytest.raises(Dropped, match="^longer than 60 tokens$"):
            encoder(max_length=60)(pair(*turns))
        side = "rejected" if turns[1] == f"a:{short}" else "chosen"
        with pytest.raises(RowError, match=rf"^{side}: \d+ tokens, more than data\.max_length=60; raise it, or set"):
            encoder(max_length=60, overlong="error")(pair(*turns))
        made = encoder(max_length=60, overlong="truncate")(pair(*turns))
        assert made == Encoded(made.samples, cut=True)
        lengths = [len(sample.input_ids) for sample in made.samples]
        assert max(lengths) == 60 and min(lengths) < 60
        texts = sorted(text for sample in made.samples for text, _ in spelled(sample))
        assert texts[0] == "Hello<|im_end|>" and set(texts[1]) == {"x"}
    prompt = len(encoder()(pair("u:Hi", "a:a", "a:b")).samples[0].input_ids) - 3
    with pytest.raises(Dropped, match="^nothing to train after the cut$"):
        encoder(max_length=prompt, overlong="truncate")(pair("u:Hi", "a:Hello", "a:Go"))
    with pytest.raises(Dropped, match="^chosen and rejected are the same$"):
        encoder(max_length=prompt + 1, overlong="truncate")(pair("u:Hi", "a:Good day", "a:Go"))


def test_tokens_that_begin_and_end_a_pair() -> None:
    made = encoder(None, add_bos=True, add_eos=True)(pair("u:Hi", "a:Hello", "a:Go"))
    assert [text_of(sample) for sample in made.samples] == [
        "<|begin_of_text|>HiHello<|im_end|>",
        "<|begin_of_text|>HiGo<|im_end|>",
    ]
    assert [spelled(sample) for sample in made.samples] == [[("Hello<|im_end|>", 1.0)], [("Go<|im_end|>", 1.0)]]


@pytest.mark.parametrize("key", ["train", "weight"])
def test_loss_keys_of_messages_have_no_meaning(key: str) -> None:
    two = copy.deepcopy(pair("u:Hi", "a:Yes?", "u:Why?", "a:So.", "a:No."))
    two.rejected.messages[1][key] = 1.0 if key == "weight" else True
    with pytest.raises(RowError) as error:
        encoder()(two)
    assert str(error.value) == (
        f"rejected: messages[1].{key} has no meaning in a pair, whose final answers alone are trained; leave it out"
    )


def test_pairs_and_conversations_do_not_take_each_others_place() -> None:
    for item in (normal(chat("u:Hi", "a:Hello")), Tokens([5, 6], [False, True])):
        with pytest.raises(
            RowError, match="^algorithm=dpo needs pairs of a chosen and a rejected answer, and this row is"
        ):
            encoder()(item)
    with pytest.raises(
        RowError, match="^this row is a pair of a chosen and a rejected answer; choose algorithm=dpo, or"
    ):
        Encoder(tokenizer_named("byte_plain"), CHATML, recipe())(pair("u:Hi", "a:Hello", "a:Go"))
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}  # the remedies that the sentence names
    alone = convert(row, reader="response", input_key="prompt", output_key="chosen")
    assert isinstance(alone, Conversation) and alone.messages == chat("u:Hi", "a:Hello")
    alone = convert({**row, "chosen": chat("u:Hi", "a:Hello")}, reader="messages", chat_key="chosen")
    assert isinstance(alone, Conversation) and alone.messages == chat("u:Hi", "a:Hello")


def test_a_pair_is_two_documents_of_one_row() -> None:
    source = source_of("x.jsonl")
    items: list[dict[str, Any]] = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"},
        {"prompt": "Hi", "chosen": "Go", "rejected": "Hello"},
        {"prompt": "Hi", "chosen": "Hello"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "id": 3},
    ]
    _, spec = readers.find(source, items[0], "x.jsonl")
    made = encode(spec, encoder(), source, [(f"row {i}", item) for i, item in enumerate(items)])
    assert (made.used, made.split, made.cut, dict(made.dropped)) == (3, 0, 0, {"chosen and rejected are the same": 1})
    assert [place for place, _ in made.bad] == ["row 3"]
    assert made.table["turn"].to_pylist() == [0, 1, 0, 1, 0, 1]
    shared = made.table["shared"].to_pylist()
    ids = made.table["input_ids"].to_pylist()
    assert shared[0::2] == [0, 0, 0]  # a chosen answer stands behind its own prompt
    for chosen, rejected, common in zip(ids[0::2], ids[1::2], shared[1::2], strict=True):
        assert chosen[:common] == rejected[:common] and common > 5
    assert shared[1::2] == [start for start, _ in made.table["trained"].to_pylist()[1::2]]
    hashes = made.table["row"].to_pylist()
    assert len(set(hashes)) == 1  # all pairs of a prompt are held out together


def test_the_cache_keeps_pairs_and_conversations_apart(tmp_path: Path) -> None:
    """The same rows under the same template, which one algorithm reads as pairs and another one refuses."""
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(lines({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}))
    keys = ["model=tiny", "data=binary_preference", f"data.train_path={file}", f"data.cache_dir={tmp_path}"]
    dpo, sft = (compose([f"algorithm={name}", *keys]).config for name in ("dpo", "sft"))
    (source,) = sources.of(dpo.data, "train")
    assert len(cache.prepare(dpo, source, tmp_path, fresh=set())) == 2
    with pytest.raises(UserError, match="line 1: this row is a pair of a chosen and a rejected answer"):
        cache.prepare(sft, source, tmp_path, fresh=set())


@pytest.mark.skipif(not (SHARED_DATA / "dpo_en_demo.json").is_file(), reason="needs ../shared/data")
def test_the_demo_pairs_have_exact_masks() -> None:
    file = SHARED_DATA / "dpo_en_demo.json"
    raw = json.loads(file.read_text())
    source = source_of(file)
    found = list(rows.read(source))
    name, spec = readers.find(source, raw[0], "x")
    assert name == "sharegpt pairs" and len(found) == len(raw) <= ROWS_PER_BATCH
    made = encoder(max_length=1 << 20)
    template = Template(tokenizer_named("byte_plain"), CHATML)
    for (_, row), item in zip(found, raw, strict=True):
        assert not isinstance(row, RowError)
        two = readers.convert(spec, row, source)
        assert isinstance(two, Pair)
        encoded = made(two)
        assert encoded == Encoded(encoded.samples) and len(encoded.samples) == 2
        prompt = template.render(two.chosen.messages[:-1], generation_prompt=True)
        for sample, side in zip(encoded.samples, ("chosen", "rejected"), strict=True):
            answer = item[side]["value"] + "<|im_end|>"
            assert spelled(sample) == [(answer, 1.0)]
            assert text_of(sample) == f"{prompt}{answer}\n"
            assert [turn["value"] for turn in item["conversations"]] == [t["content"] for t in two.chosen.messages[:-1]]


def test_formats_that_are_not_recognised() -> None:
    with pytest.raises(UserError, match="'chosen' and 'rejected', or set data.reader"):
        readers.find(source_of("x.jsonl"), {"prompt": "Hi", "chosen": "Hello"}, "x.jsonl")
