"""Lists of turns in a row's columns, and ShareGPT's turns as messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.data.conversation import Message, RowError, as_written, load

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
"""Roles of ShareGPT's ``from``."""


def columns(names: Iterable[str]) -> str:
    """Return the names of columns as they stand in a sentence."""
    return ", ".join(map(repr, names)) or "none"


def listed(row: Mapping[str, Any], key: str) -> list[Any]:
    """Return a column that holds a list, or a JSON string of one.

    Raises:
        RowError: If it holds none, or an empty one.
    """
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = load(value, key)
    if not isinstance(value, list):
        raise RowError(f"no list {key!r} (the columns are {columns(row)})")
    if not value:
        raise RowError(f"{key!r} is empty")
    return value


def spoken(turns: Sequence[Any], key: str) -> list[Message]:
    """Return ShareGPT's turns, ``{"from": …, "value": …}``, as messages.

    Args:
        turns: The turns.
        key: What to call them.

    Raises:
        RowError: Naming the turn and what was expected.
    """
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn:
            raise RowError(f"{key}[{i}] must be an object with 'from' and 'value', got {turn!r:.80}")
        speaker, value = turn["from"], turn.get("value")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise RowError(f"{key}[{i}].from is {speaker!r}; known are {', '.join(SPEAKERS)}")
        made: Message = {"role": SPEAKERS[speaker], "content": value}
        if speaker == "function_call":
            calls = as_written(value, f"{key}[{i}].value") if isinstance(value, str) else value
            if not calls:
                raise RowError(f"{key}[{i}].value must be a function call or a list of them, got {value!r:.80}")
            made |= {"content": "", "tool_calls": [calls] if isinstance(calls, dict) else calls}
        elif not isinstance(value, str):
            raise RowError(f"{key}[{i}].value must be a string, got {value!r:.80}")
        messages.append({**made, **{k: turn[k] for k in ("train", "weight") if k in turn}})
    return messages
