"""Rows that say which of two answers is the better one, as pairs of conversations that differ in their last turn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.config.schema import SourceSection
from engine.data.conversation import Conversation, Dropped, Pair, RowError
from engine.data.turns import columns, listed, spoken

PROMPT = "prompt"
"""Column of the prompt unless ``data.input_key`` names another."""
CONVERSATIONS = "conversations"
HELPSTEER3 = ("context", "response1", "response2", "overall_preference")
EMPTY = "empty completion"
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def preference(row: Mapping[str, Any], source: SourceSection) -> Pair:
    """Read ``{"context": …, "completions": [{"rank": …, "completion": …}, …]}``: the lower rank of two wins.

    Raises:
        RowError: If the row is not of this form, or both ranks are the same and ``data.ties=error``.
        Dropped: If they are the same otherwise, or a completion is empty.
    """
    completions = row.get("completions")
    if not isinstance(completions, list):
        raise RowError(f"no list 'completions' (the columns are {columns(row)})")
    if len(completions) != 2:
        raise RowError(f"'completions' must hold two of them, got {len(completions)}")
    for i, one in enumerate(completions):
        if not isinstance(one, dict) or "completion" not in one:
            raise RowError(f"completions[{i}] must be an object with 'rank' and 'completion', got {one!r:.80}")
        if type(one.get("rank")) is not int:
            raise RowError(f"completions[{i}].rank must be a whole number, got {one.get('rank')!r:.80}")
    first, second = completions
    if first["rank"] == second["rank"]:
        raise _tie(source, f"both completions have rank {first['rank']}")
    prompt = _prompt(row, "context")
    made = [_joined(prompt, "context", _value(c["completion"], f"completions[{i}].completion"), f"completions[{i}]")
            for i, c in enumerate(completions)]  # fmt: skip
    return Pair(*made) if first["rank"] < second["rank"] else Pair(*made[::-1])


def binary_preference(row: Mapping[str, Any], source: SourceSection) -> Pair:
    """Read a prompt, a chosen and a rejected answer; or two whole conversations, as messages or as Anthropic's transcripts.

    Raises:
        RowError: If the row is not of this form.
        Dropped: If an answer is empty.
    """
    key = source.input_key or PROMPT
    prompt = _prompt(row, key) if row.get(key) else None
    sides = []
    for name in (source.chosen_key, source.rejected_key):
        value = _column(row, name)
        if prompt is None and isinstance(value, str):
            value = _transcript(value, name, empty=key if key in row else None)
        sides.append(_joined(prompt, key, value, name))
    return Pair(*sides)


def sharegpt(row: Mapping[str, Any], source: SourceSection) -> Pair:
    """Read ``{"conversations": […], "chosen": {"from": …, "value": …}, "rejected": …}``.

    Raises:
        RowError: If the row is not of this form.
        Dropped: If an answer is empty.
    """
    key = source.chat_key or CONVERSATIONS
    prompt = _value(listed(row, key), key)
    names = source.chosen_key, source.rejected_key
    return Pair(*(_joined(prompt, key, _column(row, name), name) for name in names))


def helpsteer3(row: Mapping[str, Any], source: SourceSection) -> Pair:
    """Read ``{"context": […], "response1": …, "response2": …, "overall_preference": -3 … 3}``; below 0 the first is better.

    Raises:
        RowError: If the row is not of this form, or neither is better and ``data.ties=error``.
        Dropped: If neither is better otherwise, or an answer is empty.
    """
    better = row.get("overall_preference")
    if type(better) is not int or not -3 <= better <= 3:
        raise RowError(f"field 'overall_preference' must be a whole number from -3 to 3, got {better!r:.80}")
    if better == 0:
        raise _tie(source, "overall_preference is 0")
    prompt = _prompt(row, "context")
    one, two = (_joined(prompt, "context", _column(row, name), name) for name in HELPSTEER3[1:3])
    return Pair(one, two) if better < 0 else Pair(two, one)


def recognised(row: Mapping[str, Any], source: SourceSection) -> tuple[str, str] | None:
    """Return the format of a row of preferences and what to say of it; None: it is none."""
    if source.output_key:
        return None
    names = source.chosen_key, source.rejected_key
    if set(names) <= set(row):
        if is_sharegpt(row, source) and not source.input_key:
            return "sharegpt", SHAREGPT
        key = source.input_key or PROMPT
        return "binary_preference", f"binary_preference: {f'{key} → ' if key in row else ''}{' and '.join(names)}"
    if source.input_key:
        return None
    for name, own in (("preference", ("context", "completions")), ("helpsteer3", HELPSTEER3)):
        if set(own) <= set(row):
            return name, name
    return None


SHAREGPT = "sharegpt pairs"
"""What ShareGPT's format is called where its rows are pairs."""


def is_sharegpt(row: Mapping[str, Any], source: SourceSection) -> bool:
    """Tell whether a row has ShareGPT's turns and two answers to them."""
    return {source.chat_key or CONVERSATIONS, source.chosen_key, source.rejected_key} <= set(row)


def checked(pair: Pair) -> Pair:
    """Return a pair in normal form if it is one.

    Raises:
        RowError: If its sides do not end with the assistant's turn, or differ before it, or have nothing before it.
        Dropped: If an answer is empty.
    """
    for side, conversation in zip(Pair._fields, pair, strict=True):
        role = conversation.messages[-1]["role"]
        if role != "assistant":
            raise RowError(f"{side} must end with an assistant turn, and its last one's role is {role!r}")
    ours, theirs = (conversation.messages[:-1] for conversation in pair)
    if ours != theirs:
        shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        at = min(len(ours), len(theirs)) if shared is None else shared
        raise RowError(
            f"no common prompt: chosen and rejected part at messages[{at}], and all but their last turn must be the same"
        )
    if all(turn["role"] in ("system", "developer") for turn in ours):
        raise RowError("no prompt before chosen and rejected; name its column by data.input_key")
    for conversation in pair:
        turn = conversation.messages[-1]
        if not (turn["content"].strip() or turn.get("tool_calls") or str(turn.get("reasoning_content", "")).strip()):
            raise Dropped(EMPTY)
    return pair


def _tie(source: SourceSection, what: str) -> RowError | Dropped:
    return RowError(f"a tie, {what}; set data.ties=drop") if source.ties == "error" else Dropped("a tie")


def _column(row: Mapping[str, Any], name: str) -> str | list[Any]:
    """Return what a row has in a column: a text, or messages."""
    if name not in row:
        raise RowError(f"no column {name!r} (the columns are {columns(row)})")
    return _value(row[name], name)


def _value(value: Any, name: str) -> str | list[Any]:
    """Return a text, or messages."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (str, list)):
        raise RowError(f"field {name!r} must be a string or a list of messages, got {value!r:.80}")
    if isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]:
        return spoken(value, name)
    return value


def _prompt(row: Mapping[str, Any], key: str) -> str | list[Any]:
    prompt = _column(row, key)
    if not prompt:
        raise RowError(f"{key!r} is empty")
    return prompt


def _joined(prompt: str | list[Any] | None, key: str, answer: str | list[Any], name: str) -> Conversation:
    """Return a side: the prompt with its answer, or an answer that is a whole conversation which has the prompt in it."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    if isinstance(answer, str):
        return Conversation([*asked, {"role": "assistant", "content": answer}])
    if not answer:
        raise Dropped(EMPTY)
    if all(isinstance(turn, dict) and turn.get("role") in ("assistant", "tool") for turn in answer):
        return Conversation([*asked, *answer])
    if isinstance(prompt, str):
        asks = (_text(turn.get("content")) for turn in answer if isinstance(turn, dict) and turn.get("role") == "user")
        if prompt.strip() not in asks:
            raise RowError(
                f"field {name!r} is a whole conversation, and {key!r} is none of its user's turns; set data.input_key=none if "
                "the prompt is to be left out"
            )
    elif prompt and list(map(_without_nulls, answer[: len(prompt)])) != list(map(_without_nulls, prompt)):
        raise RowError(f"field {name!r} must begin with an assistant turn, or with the messages of {key!r}")
    return Conversation(answer)


def _text(content: Any) -> str:
    """Return a content without the white space around it; parts of text are joined."""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content).strip()


def _without_nulls(turn: Any) -> Any:
    return {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else turn


def _transcript(text: str, name: str, *, empty: str | None) -> list[dict[str, Any]]:
    r"""Return the turns of a text such as ``"\n\nHuman: …\n\nAssistant: …"``, without the white space around them.

    Args:
        text: Of a row without a prompt.
        name: Its column.
        empty: Column of the prompt, if the row has it.
    """
    before, *parts = _SPEAKER.split(text.lstrip("\n"))
    if (before or not parts) and empty is not None:
        raise RowError(f"{empty!r} is empty, and field {name!r} is no transcript that begins with '\\n\\nHuman:'")
    if before or not parts:
        raise RowError(
            f"field {name!r} is a text without a prompt; name the prompt's column by data.input_key, or begin the text with "
            "'\\n\\nHuman:'"
        )
    return [
        {"role": _ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
