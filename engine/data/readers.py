"""From a row of some data set to a conversation in the OpenAI chat format.

A reader is a function from a row (a dict) to a list of messages; it raises RowError, saying what it expected, on any other row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine import plugins
from engine.errors import UserError

Message = dict[str, Any]
Reader = Callable[[Mapping[str, Any]], list[Message]]

ROLES = ("system", "developer", "user", "assistant", "tool")


class RowError(Exception):
    """A row that cannot be used; the message says which field and what was expected."""


def messages(row: Mapping[str, Any]) -> list[Message]:
    """Read ``{"messages": [{"role": …, "content": …}, …]}``."""
    turns = row.get("messages")
    if not isinstance(turns, list):
        raise RowError(f"no list 'messages' (the columns are {', '.join(map(repr, row)) or 'none'})")
    return turns


def alpaca(row: Mapping[str, Any]) -> list[Message]:
    """Read ``{"instruction": …, "input": …, "output": …}``; a non-empty input follows the instruction on its own line."""
    for field in ("instruction", "output"):
        if not isinstance(row.get(field), str):
            raise RowError(f"field {field!r} must be a string, got {row.get(field)!r:.80}")
    if not isinstance(row.get("input") or "", str):
        raise RowError(f"field 'input' must be a string, got {row['input']!r:.80}")
    question = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    return [{"role": "system", "content": row["system"]}, *turns] if row.get("system") else turns


READERS: dict[str, Reader] = {"messages": messages, "alpaca": alpaca}
COLUMNS = {"messages": {"messages"}, "alpaca": {"instruction", "output"}}


def find(name: str | None, first_row: Mapping[str, Any], where: str) -> tuple[str, Reader]:
    """Return the reader that ``data.reader`` names, or the one whose columns the first row has.

    Raises:
        UserError: If no reader has that name or fits those columns.
    """
    if name is None:
        name = next((n for n, columns in COLUMNS.items() if columns <= set(first_row)), None)
        if name is None:
            columns = ", ".join(map(repr, first_row)) or "none"
            raise UserError(
                f"{where}: no known format has these columns ({columns}); a row holds 'messages', or 'instruction' and "
                f"'output', or set data.reader=module:function."
            )
    if name in READERS:
        return name, READERS[name]
    if ":" not in name:
        raise UserError(f"data.reader={name}: no such reader; choose {', '.join(READERS)} or module:function.")
    return name, plugins.load(name, "data.reader")


def check_messages(turns: list[Message], train_on: str) -> None:
    """Check the shape of a conversation.

    Raises:
        RowError: Naming the turn and what was expected.
    """
    if not turns:
        raise RowError("'messages' is empty")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "role" not in turn:
            raise RowError(f"messages[{i}] must be an object with 'role' and 'content', got {turn!r:.80}")
        if turn["role"] not in ROLES:
            raise RowError(f"messages[{i}].role is {turn['role']!r}; known roles are {', '.join(ROLES)}")
        if not isinstance(turn.get("content"), str):
            raise RowError(f"messages[{i}].content must be a string, got {turn.get('content')!r:.80}")
        try:
            turn["content"].encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"messages[{i}].content holds half a surrogate pair (a \\ud83d, say, without its other half), which no text has"
            ) from error
    if train_on != "all" and not any(turn["role"] == "assistant" for turn in turns):
        raise RowError("no assistant turn, so nothing to train; set data.train_on=all to train on every token")
