"""Conversations in the form that chat templates take: OpenAI's messages and tools, checked and made uniform."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

_scan = json.JSONDecoder().raw_decode
_WHITE = re.compile(r"[ \t\r\n]*")


class RowError(Exception):
    """A row that cannot be used; the message says which field and what was expected."""


class Dropped(Exception):
    """A row that is right and of no use (an answer that is empty, say); the message is the reason that is counted."""


Row = tuple[str, dict[str, Any] | RowError]
"""A place, such as "FILE line 12", and the row there, or why it cannot be read."""


class RawJson(dict[str, Any]):
    """A JSON object that is printed as it was written.

    Attributes:
        text: Its text; ``str`` and the template's ``tojson`` give it back.
    """

    def __init__(self, value: dict[str, Any], text: str) -> None:
        super().__init__(value)
        self.text = text

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Conversation:
    """What a template renders.

    Attributes:
        messages: In normal form: ``role``, ``content`` (a string), ``tool_calls`` where there are any as
            ``[{"type": "function", "function": {"name": …, "arguments": RawJson | dict | str}}]``, and whatever else the row
            had (``reasoning_content``, ``name``), none of it None; ``train`` and ``weight`` are for the mask alone.
        tools: In normal form, ``[{"type": "function", "function": {"name": …, …}}]``; None: none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class Pair(NamedTuple):
    """Two conversations that differ in their last turn alone."""

    chosen: Conversation
    rejected: Conversation


class Tokens(NamedTuple):
    """A sample that comes tokenised."""

    input_ids: list[int]
    """Token ids [T]."""
    trained: list[bool]
    """Whether each carries loss [T]."""


def normal(messages: Any, tools: Any = None) -> Conversation:
    """Return a conversation in normal form.

    Args:
        messages: A list of messages in OpenAI's form or near it.
        tools: A list of tools, a JSON string of one, or None.

    Raises:
        RowError: Naming the message or tool and what was expected.
    """
    if not isinstance(messages, list):
        raise RowError(f"'messages' must be a list, got {messages!r:.80}")
    if not messages:
        raise RowError("'messages' is empty")
    return Conversation([_message(turn, i) for i, turn in enumerate(messages)], _tools(tools))


def check(conversation: Conversation, train_on: str) -> None:
    """Check that there is something to train.

    Raises:
        RowError: If no turn is the assistant's, unless ``train_on`` is "all".
    """
    if train_on != "all" and not any(turn["role"] == "assistant" for turn in conversation.messages):
        raise RowError("no assistant turn, so nothing to train; set data.train_on=all to train on every token")


def turn_weights(messages: Sequence[Message], train_on: str) -> dict[int, float]:
    """Return the loss weight of each message that is trained.

    Args:
        messages: In normal form; ``train`` of a message takes precedence over ``train_on``, ``weight`` scales what is trained.
        train_on: ``data.train_on``.
    """
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    weights = {}
    for i, m in enumerate(messages):
        chosen = train_on == "all"
        if m["role"] == "assistant":
            chosen = chosen or train_on == "all_assistant" or i == last
        if m["role"] == "assistant" or train_on == "all":
            chosen = m.get("train", chosen)
        if chosen and m.get("weight", 1.0) > 0:
            weights[i] = float(m.get("weight", 1.0))
    return weights


def _message(turn: Any, i: int) -> Message:
    if not isinstance(turn, dict) or "role" not in turn:
        raise RowError(f"messages[{i}] must be an object with 'role' and 'content', got {turn!r:.80}")
    role = "tool" if turn["role"] == "function" else turn["role"]
    if role not in ROLES:
        raise RowError(f"messages[{i}].role is {role!r}; known roles are {', '.join(ROLES)}")
    made = {key: value for key, value in turn.items() if value is not None}
    made["role"] = role
    calls = made.pop("tool_calls", None)
    if "function_call" in made:  # what OpenAI's messages had before tool_calls
        single = made.pop("function_call")
        calls = calls or [single]
    if calls:
        if role != "assistant":
            raise RowError(f"messages[{i}].tool_calls belongs to an assistant turn, and this one's role is {role!r}")
        made["tool_calls"] = _calls(calls, f"messages[{i}].tool_calls")
    made["content"] = _content(turn.get("content"), i, bool(calls))
    if "train" in made or "weight" in made:
        _check_loss(made, i)
    for key, value in made.items():
        if not _is_text(value):
            raise RowError(
                f"messages[{i}].{key} holds half a surrogate pair (a \\ud83d, say, without its other half), which no text has"
            )
    return made


def _content(value: Any, i: int, has_calls: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None and has_calls:
        return ""
    if not isinstance(value, list):
        raise RowError(f"messages[{i}].content must be a string, got {value!r:.80}")
    for j, part in enumerate(value):
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            raise RowError(
                f"messages[{i}].content[{j}] must be a part of type 'text' with a string 'text', got {part!r:.80}"
            )
    return "".join(part["text"] for part in value)


def _check_loss(turn: Message, i: int) -> None:
    """Check ``train`` and ``weight`` of a message."""
    train, weight = turn.get("train", False), turn.get("weight", 0)
    if not isinstance(train, bool):
        raise RowError(f"messages[{i}].train must be true or false, got {train!r:.80}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise RowError(f"messages[{i}].weight must be a number of at least 0, got {weight!r:.80}")
    if turn["role"] != "assistant" and (train or "weight" in turn):
        key = "train" if train else "weight"
        raise RowError(f"messages[{i}].{key} is for assistant turns, and this one's role is {turn['role']!r}")


def _is_text(value: Any) -> bool:
    """Tell whether every string in a value can be encoded."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    elif isinstance(value, dict):
        return all(_is_text(part) for item in value.items() for part in item)
    elif isinstance(value, list):
        return all(map(_is_text, value))
    return True


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = as_written(value, where)
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list, got {value!r:.80}")
    return [_call(call, f"{where}[{j}]") for j, call in enumerate(value)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(
            f"{where} must be an object with 'name' and 'arguments', or one with these two in 'function', got {call!r:.80}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    elif arguments is None:
        arguments = {}
    elif not isinstance(arguments, dict):
        raise RowError(f"{where}: 'arguments' must be an object or a string, got {arguments!r:.80}")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made if call.get("id") is None else {"id": call["id"], **made}


def _parsed(arguments: str) -> RawJson | str:
    """Return what a string of arguments holds: an object that keeps its text, or the string itself."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):  # free text is allowed here
        return arguments
    return RawJson(value, arguments) if isinstance(value, dict) else arguments


def as_written(text: str, where: str) -> list[Any]:
    """Read one tool call or a list of them from JSON; arguments that are objects keep their text.

    Raises:
        RowError: If it is not JSON.
    """
    value = load(text, where)
    if isinstance(value, list):
        return [
            _keep_arguments(item, text, start)
            for item, (_, start, _) in zip(value, _members(text, _skip(text, 0)), strict=True)
        ]
    return [_keep_arguments(value, text, _skip(text, 0))]


def load(text: str, where: str) -> Any:
    """Parse the JSON that a field holds as a string.

    Raises:
        RowError: If it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where} is not JSON ({error}), got {text!r:.80}") from error


def _keep_arguments(value: Any, text: str, start: int) -> Any:
    """Return the object that begins at ``start`` of ``text``, its arguments as RawJson."""
    if not isinstance(value, dict):
        return value
    made = dict(value)
    for key, a, b in _members(text, start):
        if key == "function":
            made[key] = _keep_arguments(value[key], text, a)
        elif key == "arguments" and isinstance(value[key], dict):
            made[key] = RawJson(value[key], text[a:b])
    return made


def _members(text: str, start: int) -> Iterator[tuple[str | None, int, int]]:
    """Yield key (None in an array), start and end of each value of the object or array at ``start``, which is right JSON."""
    is_object = text[start] == "{"
    at = _skip(text, start + 1)
    while text[at] not in "]}":
        key = None
        if is_object:
            key, at = _scan(text, at)
            at = _skip(text, _skip(text, at) + 1)
        _, end = _scan(text, at)
        yield key, at, end
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    found = _WHITE.match(text, at)
    assert found is not None
    return found.end()


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = load(value, "tools") if value.strip() else None
    if not value and (value is None or isinstance(value, list)):
        return None
    if not isinstance(value, list):
        raise RowError(f"tools must be a list, or a JSON string of one, got {value!r:.80}")
    return [_tool(tool, f"tools[{j}]") for j, tool in enumerate(value)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = load(tool, where)
    wrapped = isinstance(tool, Mapping) and "function" in tool
    function = tool["function"] if wrapped else tool
    if isinstance(function, str):
        function = load(function, f"{where}.function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{where} must be an object with a 'name', or one with such a 'function', got {tool!r:.80}")
    if isinstance(function.get("parameters"), str):
        function = {**function, "parameters": load(function["parameters"], f"{where}.parameters")}
    if not _is_text(function):
        raise RowError(
            f"{where} holds half a surrogate pair (a \\ud83d, say, without its other half), which no text has"
        )
    return {**tool, "function": function} if wrapped else {"type": "function", "function": function}
