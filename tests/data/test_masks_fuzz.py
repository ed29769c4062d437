"""Masks of random conversations against renderings made here, by joining strings, with every position known.

Which characters a token holds is found without the engine too (``chat_fixtures.holders``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from chat_fixtures import (
    LLAMA_TOOLS,
    MAKERS,
    QWEN_TOOLS,
    QWEN_TOOLS_GENERATION,
    TEMPLATES,
    check_mask,
    mask_of,
    tokenizer_named,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.conversation import Conversation, Dropped, RawJson, RowError, normal
from engine.data.template import Template

FRAGMENTS = (
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "\u200b", "\u3000", "\x00", "\x07", "\\", "'", '"'),
    *("a", "the", "answer", " the answer", "The capital of France is", "assistant", "user", "42", "?"),
    *("é", "e\u0301", "\u0301", "e\u0301\u0323", "\u0344", "\u0958", "\u1112\u1161\u11ab", "한", "İ", "ß", "\u2126"),
    *("中", "日本", "😀", "👩‍👩‍👧", "🇫🇷", "▁", "Ġ", "\ufeff"),
    *("<think>", "</think>", "<think>\nreason\n</think>\n\n"),
    *("<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\n"),
    *(
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s>",
        "</s>",
        "[INST] ",
        " [/INST]",
        " [/INST] ",
    ),
    *("Answer: ", "\nAnswer: ", "\nQuestion: ", "Context: ", "{{ m.content }}", "{% generation %}", "{%- endfor -%}"),
    *("\ue0a0turn0\ue0a1", "\ue0a0turn1\ue0a1", "\ue0a0", "\ue0a2", "\ue0a3"),
)
PRIVATE = "\ue0a0\ue0a1\ue0a2\ue0a3"
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join)
ROLES = st.one_of(
    st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5).filter(lambda r: "assistant" in r),
    st.sampled_from([["user", "assistant"] * 2, ["user", "assistant"] * 3, ["user", "assistant", "user"]]),
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw a conversation with at least one assistant turn, in which some contents may be the same."""
    roles = (["system"] if draw(st.booleans()) else []) + draw(ROLES)
    pool = draw(st.lists(TEXTS, min_size=1, max_size=4))
    reasoning = draw(st.sampled_from(["", "", "<think>why</think>", "<think>\nwhy\n</think>\n\n"]))
    messages = [{"role": role, "content": draw(st.sampled_from(pool))} for role in roles]
    for m in messages:
        if m["role"] == "assistant" and draw(st.booleans()):
            m["content"] = reasoning + m["content"]
    return draw(with_weights(messages))


@st.composite
def with_weights(draw: st.DrawFn, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Draw what a few answers say of their own loss."""
    own = st.sampled_from(
        [*[{}] * 6, {"train": False}, {"train": True}, {"weight": 0}, {"weight": 0.5}, {"weight": 2.0}]
    )
    return [m | (draw(own) if m["role"] == "assistant" else {}) for m in messages]


# A rendering in pieces: (text, number of the turn that wrote it, or None).
Pieces = list[tuple[str, int | None]]


def chatml(messages: list[dict[str, Any]], contents: list[str] | None = None) -> Pieces:
    out: Pieces = []
    for i, m in enumerate(messages):
        content = m["content"] if contents is None else contents[i]
        out += [(f"<|im_start|>{m['role']}\n", None), (content + "<|im_end|>", i), ("\n", None)]
    return out


def llama3(messages: list[dict[str, Any]]) -> Pieces:
    out: Pieces = [("<|begin_of_text|>", None)]
    for i, m in enumerate(messages):
        out += [
            (f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", None),
            (m["content"].strip() + "<|eot_id|>", i),
        ]
    return out


def mistral(messages: list[dict[str, Any]]) -> Pieces | None:
    out: Pieces = [("<s>", None)]
    system = ""
    for i, m in enumerate(messages):
        if m["role"] == "system":
            system = m["content"] + "\n\n"
        elif m["role"] == "user":
            out += [("[INST] " + system, None), (m["content"], i), (" [/INST]", None)]
            system = ""
        elif i == 0:
            return None
        else:
            out += [(" ", None), (m["content"] + "</s>", i)]
    return out


def strips_reasoning(messages: list[dict[str, Any]]) -> Pieces:
    last = len(messages) - 1
    return chatml(
        messages,
        [
            m["content"].rpartition("</think>")[2] if m["role"] == "assistant" and i != last else m["content"]
            for i, m in enumerate(messages)
        ],
    )


def qwen3(messages: list[dict[str, Any]]) -> Pieces:
    contents = []
    for i, m in enumerate(messages):
        content, reasoning = m["content"], ""
        if m["role"] == "assistant" and "</think>" in content:
            before = content.partition("</think>")[0].rstrip("\n")
            reasoning = before.rpartition("<think>")[2].lstrip("\n")
            content = content.rpartition("</think>")[2].lstrip("\n")
        if m["role"] == "assistant" and i == len(messages) - 1 and reasoning:
            content = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + content
        contents.append(content)
    return chatml(messages, contents)


def plain(messages: list[dict[str, Any]]) -> Pieces:
    names = {"system": "Context: ", "user": "Question: ", "assistant": "Answer: "}
    out: Pieces = []
    for i, m in enumerate(messages):
        out += [(names[m["role"]], None), (m["content"].strip(), i), ("\n", None)]
    return out


def concatenated(messages: list[dict[str, Any]]) -> Pieces:
    return [(m["content"], i) for i, m in enumerate(messages)]


RENDERERS: dict[str, Any] = {
    "chatml": chatml,
    "chatml_generation": chatml,
    "llama3": llama3,
    "mistral": mistral,
    "strips_reasoning": strips_reasoning,
    "qwen3": qwen3,
    "plain": plain,
    "none": concatenated,
}


# --- the check -------------------------------------------------------------------------------------------------------


def expected_weights(messages: list[dict[str, Any]], train_on: str) -> dict[int, float]:
    """Return the weight of each turn that is to be trained."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    chosen = answers if train_on == "all_assistant" else answers[-1:]
    chosen = [i for i in answers if messages[i].get("train", i in chosen)]
    return {i: messages[i].get("weight", 1.0) for i in chosen if messages[i].get("weight", 1.0)}


def spans_in(pieces: Pieces) -> dict[int, tuple[int, int]]:
    """Return where each turn's own text is; a turn's pieces follow one another."""
    spans: dict[int, tuple[int, int]] = {}
    at = 0
    for text, turn in pieces:
        if turn is not None:
            spans[turn] = (spans.get(turn, (at, at))[0], at + len(text))
        at += len(text)
    return spans


EMPTY = "<think>\n\n</think>\n\n"


def is_shown(shown: str, alone: str) -> bool:
    """Tell whether a turn is shown as where it is the last; the empty block is the template's own, wherever it is."""
    return alone in (shown, EMPTY + shown)


def own_text(pieces: Pieces, turn: int) -> str:
    return "".join(text for text, writer in pieces if writer == turn)


def check_documents(
    renderer: Callable[[list[dict[str, Any]]], Pieces | None],
    made: Template,
    conversation: Conversation,
    train_on: str,
    tokenizers: Sequence[str],
) -> str:
    """Check that a conversation's documents are beginnings of it that train each chosen turn once, exactly; or refused."""
    messages = conversation.messages
    weights = expected_weights(messages, train_on)
    whole = renderer(messages)
    try:
        documents = made.documents(conversation, train_on)
    except Dropped as reason:
        for m in (messages[i] for i in weights):
            thought = m.get("reasoning_content", "") if "reasoning_content" in (made.text or "") else ""
            assert not (m["content"].strip() or m.get("tool_calls") or thought.strip())
        assert str(reason) == ("empty answer" if weights else "no turn to train")
        return "dropped"
    except RowError:
        assert whole is None or any(c in m["content"] for m in messages for c in PRIVATE)
        return "refused"
    assert weights
    assert whole is not None, "the template refuses this conversation"
    alone = {i: own_text(renderer(messages[: i + 1]) or [], i) for i in weights}
    trained: list[int] = []
    at = 0
    for text, spans, _ in documents:
        starts = {k: renderer(messages[:k]) or [] for k in range(at + 1, len(messages) + 1)}
        at = max((k for k in starts if "".join(t for t, _ in starts[k]) == text), default=-1)
        assert at > 0, f"a document is no beginning of the conversation: {text!r}"
        places = spans_in(starts[at])
        for start, stop, weight in spans:
            found = [i for i in weights if places.get(i) == (start, stop) and i not in trained]
            assert found, f"{text[start:stop]!r} at {start}:{stop} is no turn that is still to be trained: {text!r}"
            assert is_shown(text[start:stop], alone[found[0]]), "a turn is trained on other than it would write"
            assert weight == weights[found[0]]
            trained.append(found[0])
        for name in tokenizers:
            pairs = [(a, b) for a, b, _ in spans]
            check_mask(name, text, pairs, *mask_of(tokenizer_named(name), text, pairs))
    assert sorted(trained) == sorted(weights)
    if all(is_shown(own_text(whole, i), alone[i]) for i in weights):
        assert len(documents) == 1 and at == len(messages), "split without need"
    return "split" if len(documents) > 1 else "masked"


seen: dict[str, int] = {}
SETTINGS = settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TRAIN_ON = st.sampled_from(["all_assistant", "all_assistant", "last_assistant"])


@SETTINGS
@given(
    messages=conversations(),
    template=st.sampled_from([*sorted(RENDERERS), "qwen3", "strips_reasoning"]),
    train_on=TRAIN_ON,
)
def check_conversation(messages: list[dict[str, Any]], template: str, train_on: str) -> None:
    made = Template(tokenizer_named("byte_plain"), TEMPLATES.get(template))
    fate = check_documents(RENDERERS[template], made, Conversation(messages), train_on, list(MAKERS))
    seen[fate] = seen.get(fate, 0) + 1


def test_no_mask_is_wrong() -> None:
    seen.update(dict.fromkeys(("masked", "split", "refused", "dropped"), 0))
    check_conversation()
    assert seen["masked"] > 150 and min(seen[fate] for fate in ("split", "refused", "dropped")) > 1, seen


# --- tools -----------------------------------------------------------------------------------------------------------

ARGUMENTS = (
    *("{}", '{"a":1,  "b" : 1e3}', ' {"x": [1,2 , 3]}', '{"q": "\\u00e9 é 😀 </tool_call>"}', '{"a": {"b": {}}}\n'),
    *("plain text", "[1, 2]", '"x"', "", {"a": 1, "b": [True, None]}, {"é": "<&>'"}),
)
TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}, {"name": "get_x"}]


@st.composite
def tool_conversations(draw: st.DrawFn) -> Conversation:
    """Draw questions, each with some calls and their results before its answer."""
    one = st.fixed_dictionaries({"name": st.sampled_from(["add", "get_x"]), "arguments": st.sampled_from(ARGUMENTS)})
    texts = TEXTS.filter(lambda text: not any(c in text for c in PRIVATE))
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(st.lists(one, min_size=1, max_size=draw(st.sampled_from([1, 1, 3]))))
            content = draw(st.sampled_from(["", None, "So:\n", " ", draw(texts)]))
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            messages += [{"role": "tool", "content": draw(texts)} for _ in calls]
        messages += [{"role": "assistant", "content": draw(texts)}] * draw(st.integers(0, 2))
    for m in messages:
        if m["role"] == "assistant" and draw(st.booleans()):
            m["reasoning_content"] = draw(st.sampled_from(["", "hm", "\nhm\n", draw(texts)]))
    return normal(draw(with_weights(messages)), draw(st.sampled_from([None, TOOLS])))


def as_json(value: Any) -> str:
    return value.text if isinstance(value, RawJson) else json.dumps(value, ensure_ascii=False)


def qwen_tools(messages: list[dict[str, Any]], tools: Any, *, marks: bool = False) -> Pieces:
    out: Pieces = []
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools:
        listed = "".join("\n" + as_json(tool) for tool in tools)
        first = "" if system is None else system + "\n\n"
        out.append((f"<|im_start|>system\n{first}# Tools{listed}<|im_end|>\n", None))
    elif system is not None:
        out.append((f"<|im_start|>system\n{system}<|im_end|>\n", None))
    last = len(messages) - 1
    query = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, m in enumerate(messages):
        if m["role"] == "user":
            out.append((f"<|im_start|>user\n{m['content']}<|im_end|>\n", None))
        elif m["role"] == "tool":
            opens = "<|im_start|>user" if messages[i - 1]["role"] != "tool" else ""
            closes = "<|im_end|>\n" if i == last or messages[i + 1]["role"] != "tool" else ""
            out.append((f"{opens}\n<tool_response>\n{m['content']}\n</tool_response>{closes}", None))
        elif m["role"] == "assistant":
            out.append(("<|im_start|>assistant\n", None))
            reasoning = m.get("reasoning_content", "")
            if i > query and (i == last or reasoning):
                # The empty block is what the template puts before every answer; only a template's own marks make it a turn's.
                block = f"<think>\n{reasoning.strip(chr(10))}\n</think>\n\n"
                out.append((block, i if marks or block != EMPTY else None))
            text = m["content"]
            for call in m.get("tool_calls", []):
                arguments = call["function"]["arguments"]
                shown = arguments if isinstance(arguments, str) else as_json(arguments)
                text += "\n" if text else ""
                text += f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {shown}}}\n</tool_call>'
            out += [(text + "<|im_end|>", i), ("\n", None)]
    return out


def llama_tools(messages: list[dict[str, Any]], tools: Any) -> Pieces | None:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    out: Pieces = [("<|begin_of_text|>", None)]
    if tools:
        listed = "".join(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tools)
        out.append((head.format("system") + listed + "<|eot_id|>", None))
    for i, m in enumerate(messages):
        if m["role"] == "tool":
            out.append((head.format("ipython") + as_json(m["content"]) + "<|eot_id|>", None))
        elif len(m.get("tool_calls", [])) > 1:
            return None
        elif "tool_calls" in m:
            function = m["tool_calls"][0]["function"]
            shown = f'{{"name": "{function["name"]}", "parameters": {as_json(function["arguments"])}}}</s>'
            out += [(head.format("assistant"), None), (shown, i)]
        else:
            writer = i if m["role"] == "assistant" else None
            out += [(head.format(m["role"]), None), (m["content"].strip() + "<|eot_id|>", writer)]
    return out


TOOL_RENDERERS: dict[str, tuple[str, Any]] = {
    "qwen": (QWEN_TOOLS, qwen_tools),
    "qwen_generation": (QWEN_TOOLS_GENERATION, lambda m, t: qwen_tools(m, t, marks=True)),
    "llama": (LLAMA_TOOLS, llama_tools),
}


@SETTINGS
@given(conversation=tool_conversations(), template=st.sampled_from(sorted(TOOL_RENDERERS)), train_on=TRAIN_ON)
def check_tool_conversation(conversation: Conversation, template: str, train_on: str) -> None:
    text, renderer = TOOL_RENDERERS[template]
    made = Template(tokenizer_named("byte_plain"), text)
    bound = lambda messages: renderer(messages, conversation.tools)  # noqa: E731
    if not any(m["role"] == "assistant" for m in conversation.messages):
        return
    fate = check_documents(bound, made, conversation, train_on, ("byte_bpe", "unigram", "wordpiece"))
    seen[fate] = seen.get(fate, 0) + 1


def test_no_mask_of_a_tool_conversation_is_wrong() -> None:
    seen.update(dict.fromkeys(("masked", "split", "refused", "dropped"), 0))
    check_tool_conversation()
    assert seen["masked"] > 80, seen
    assert seen["split"] > 20, seen
    assert seen["refused"] > 3, seen
