"""Masks of random conversations against renderings made here, by joining strings, with every position known.

Which characters a token holds is found without the engine too (``chat_fixtures.holders``).
"""

from __future__ import annotations

from typing import Any

from chat_fixtures import MAKERS, TEMPLATES, check_mask, tokenizer_named
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.readers import RowError
from engine.data.template import Template, TokenMask

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
ROLES = st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5).filter(lambda r: "assistant" in r)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw a conversation with at least one assistant turn, in which some contents may be the same."""
    roles = (["system"] if draw(st.booleans()) else []) + draw(ROLES)
    pool = draw(st.lists(TEXTS, min_size=1, max_size=4))
    return [{"role": role, "content": draw(st.sampled_from(pool))} for role in roles]


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


def may_refuse(template: str, messages: list[dict[str, Any]], turns: list[int]) -> bool:
    """Tell whether a refusal is right: signs of the engine's own, or a trained turn that the template rewrites."""
    if template == "none":
        return False
    if any(c in m["content"] for m in messages for c in PRIVATE):
        return True
    return template in ("strips_reasoning", "qwen3") and any("</think>" in messages[i]["content"] for i in turns)


seen: dict[str, int] = {"masked": 0, "refused": 0}


@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    messages=conversations(),
    template=st.sampled_from(sorted(RENDERERS)),
    train_on=st.sampled_from(["all_assistant", "last_assistant"]),
)
def check_conversation(messages: list[dict[str, Any]], template: str, train_on: str) -> None:
    assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    turns = assistants if train_on == "all_assistant" else assistants[-1:]
    pieces = RENDERERS[template](messages)
    made = Template(tokenizer_named("byte_plain"), TEMPLATES.get(template))
    try:
        text, spans = made.trained_spans(messages, train_on)
    except RowError:
        assert pieces is None or may_refuse(template, messages, turns)
        seen["refused"] += 1
        return
    assert pieces is not None, "the template refuses this conversation"
    expected, at = [], 0
    for piece, turn in pieces:
        if turn in turns:
            expected.append((at, at + len(piece)))
        at += len(piece)
    assert text == "".join(piece for piece, _ in pieces)
    assert spans == expected
    for name in MAKERS:
        check_mask(name, text, spans, *TokenMask(tokenizer_named(name)).encode(text, spans))
    seen["masked"] += 1


def test_no_mask_is_wrong() -> None:
    seen.update(masked=0, refused=0)
    check_conversation()
    assert seen["masked"] > 120, seen
    assert seen["refused"] > 5, seen
