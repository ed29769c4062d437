"""From a row of some data set to a conversation in the OpenAI chat format, to a pair of them, or to tokens.

A reader is a function from a row (a dict) to a list of messages, to ``{"messages": …, "tools": …}``, to
``{"chosen": messages, "rejected": messages, "tools": …}`` or to ``{"input_ids": …, "labels": …}``; it raises RowError, saying
what it expected, on a row it cannot use, and Dropped on one that is of no use.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine import plugins
from engine.config.schema import SourceSection
from engine.data import oasst, preferences
from engine.data.conversation import Conversation, Dropped, Message, Pair, Row, RowError, Tokens, normal
from engine.data.turns import columns, listed, spoken
from engine.errors import UserError

Made = list[Message] | Mapping[str, Any] | Pair | Tokens

UNTRAINED = -100
"""Label of a token without loss."""
MASKS = ("loss_mask", "completion_mask", "assistant_masks", "mask")
PAIRS = (
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("problem", "solution"),
    ("instruction", "response"),
)
"""Columns of a question and its answer, the first that a row has."""


@dataclass(frozen=True)
class ReaderSpec:
    """How rows of one format are read.

    Attributes:
        read: From a row to what a reader returns.
        gather: A stage before it over all rows, for formats whose rows are no conversations by themselves.
        own: Whether it is the user's own, which may raise anything.
    """

    read: Callable[[Mapping[str, Any], SourceSection], Made]
    gather: Callable[[Iterator[Row]], Iterator[Row]] | None = None
    own: bool = False


def messages(row: Mapping[str, Any], source: SourceSection, *, key: str = "messages") -> list[Message]:
    """Read ``{"messages": [{"role": …, "content": …}, …]}``."""
    return listed(row, source.chat_key or key)


def response(
    row: Mapping[str, Any], source: SourceSection, *, keys: tuple[str, str] = ("input", "output")
) -> list[Message]:
    """Read a question and its answer, each a string or a list of messages."""
    asked, answered = (source.input_key or keys[0], source.output_key or keys[1])
    question, answer = row.get(asked), row.get(answered)
    if answer is None or answer == []:
        raise Dropped(f"no {answered!r}")
    turns: list[Message] = []
    for column, value, role in ((asked, question, "user"), (answered, answer, "assistant")):
        if isinstance(value, str):
            turns.append({"role": role, "content": value})
        elif isinstance(value, list):
            turns += value
        else:
            raise RowError(f"field {column!r} must be a string or a list of messages, got {value!r:.80}")
    return turns


def alpaca(
    row: Mapping[str, Any], source: SourceSection, *, keys: tuple[str, str, str] = ("instruction", "input", "output")
) -> list[Message]:
    """Read ``{"instruction": …, "input": …, "output": …}``; a non-empty input follows the instruction on its own line."""
    asked, given, answered = keys
    for field in (asked, answered):
        if not isinstance(row.get(field), str):
            raise RowError(f"field {field!r} must be a string, got {row.get(field)!r:.80}")
    if not isinstance(row.get(given) or "", str):
        raise RowError(f"field {given!r} must be a string, got {row[given]!r:.80}")
    question = row[asked] + (f"\n{row[given]}" if row.get(given) else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row[answered]}]


def sharegpt(row: Mapping[str, Any], source: SourceSection, *, key: str = "conversations") -> list[Message]:
    """Read ``{"conversations": [{"from": …, "value": …}, …]}``, with turns that call functions and observe their results."""
    key = source.chat_key or key
    return spoken(listed(row, key), key)


def squad(row: Mapping[str, Any], source: SourceSection) -> list[Message]:
    """Read ``{"context": …, "question": …, "answers": {"text": […]}}``; the first answer counts."""
    answers = row.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else answers
    if not isinstance(texts, list):
        raise RowError(f"field 'answers' must be an object with a list 'text', got {answers!r:.80}")
    if not texts:
        raise Dropped("no answer")
    answer = texts[0].get("text") if isinstance(texts[0], dict) else texts[0]
    for field, value in (("context", row.get("context")), ("question", row.get("question")), ("answers", answer)):
        if not isinstance(value, str):
            raise RowError(f"field {field!r} must hold a string, got {value!r:.80}")
    turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": row["context"]}, *turns] if row["context"] else turns


def open_assistant(row: Mapping[str, Any], source: SourceSection) -> list[Message]:
    """Read a row that ``oasst.gather`` made."""
    if oasst.DROPPED in row:
        raise Dropped(row[oasst.DROPPED])
    return listed(row, "messages")


def pretokenized(row: Mapping[str, Any], source: SourceSection | None = None) -> Tokens:
    """Read ``{"input_ids": […]}`` with labels or a mask, or neither: then every token is trained."""
    ids = row.get("input_ids")
    if not isinstance(ids, list) or not ids:
        raise RowError(f"field 'input_ids' must be a list of token ids, got {ids!r:.80}")
    wrong = next((i for i, token in enumerate(ids) if type(token) is not int or not 0 <= token < 2**31), None)
    if wrong is not None:
        raise RowError(f"input_ids[{wrong}] must be a whole number of at least 0, got {ids[wrong]!r:.80}")
    if isinstance(row.get("attention_mask"), list) and 0 in row["attention_mask"]:
        raise RowError("'attention_mask' has zeros: leave out the padding, since samples are packed without")
    name = next((name for name in ("labels", *MASKS) if row.get(name) is not None), None)
    if name is None:
        return Tokens(ids, [True] * len(ids))
    marks = row[name]
    if not isinstance(marks, list) or len(marks) != len(ids):
        got = f"{len(marks)} entries" if isinstance(marks, list) else f"{marks!r:.80}"
        raise RowError(f"field {name!r} must be a list as long as 'input_ids' ({len(ids)}), got {got}")
    if name == "labels":
        for i, (label, token) in enumerate(zip(marks, ids, strict=True)):
            if label not in (UNTRAINED, token):
                raise RowError(
                    f"labels[{i}] must be {UNTRAINED} or input_ids[{i}], which is {token}, got {label!r:.80} (unshifted)"
                )
        return Tokens(ids, [label != UNTRAINED for label in marks])
    for i, mark in enumerate(marks):
        if mark not in (0, 1):
            raise RowError(f"{name}[{i}] must be 0 or 1, got {mark!r:.80}")
    return Tokens(ids, [bool(mark) for mark in marks])


DOLLY = ("instruction", "context", "response")
"""Databricks' names for Alpaca's columns."""
READERS: dict[str, ReaderSpec] = {
    "messages": ReaderSpec(messages),
    "response": ReaderSpec(response),
    "alpaca": ReaderSpec(alpaca),
    "dolly": ReaderSpec(partial(alpaca, keys=DOLLY)),
    "sharegpt": ReaderSpec(sharegpt),
    "pretokenized": ReaderSpec(pretokenized),
    "open_assistant": ReaderSpec(open_assistant, gather=oasst.gather),
    "squad": ReaderSpec(squad),
    "preference": ReaderSpec(preferences.preference),
    "binary_preference": ReaderSpec(preferences.binary_preference),
    "helpsteer3": ReaderSpec(preferences.helpsteer3),
}
COLUMNS: dict[str, tuple[str, ...]] = {
    "pretokenized": ("input_ids",),
    "open_assistant": oasst.COLUMNS,
    "squad": ("context", "question", "answers"),
    "alpaca": ("instruction", "output"),
    "dolly": DOLLY,
}
"""Columns that tell a format; a list of messages tells its own before, a question and its answer after them."""


def find(source: SourceSection, first_row: Mapping[str, Any], where: str) -> tuple[str, ReaderSpec]:
    """Return the reader that ``data.reader`` names, or the one whose columns the first row has.

    Args:
        source: The source.
        first_row: A row of it.
        where: What to call it.

    Returns:
        Its name, with the columns where they were guessed ("response: question → answer"), and how it reads.

    Raises:
        UserError: If no reader has that name or fits those columns.
    """
    if source.reader is None:
        return _recognised(source, first_row, where)
    if source.reader == "response" and not (source.input_key and source.output_key):
        found = _pair(source, first_row)
        if found is None:
            raise UserError(
                f"{where}: no columns of a question and its answer are known among these ({columns(first_row)}); set "
                "data.input_key and data.output_key."
            )
        return found
    if source.reader == "sharegpt" and preferences.is_sharegpt(first_row, source):
        return preferences.SHAREGPT, ReaderSpec(preferences.sharegpt)
    if source.reader in ("messages", "sharegpt") and source.chat_key is None:
        name, key = _chat(source, first_row) or ("", "")
        if name == source.reader:
            return _keyed(name, key)
    if source.reader in READERS:
        return source.reader, READERS[source.reader]
    if ":" not in source.reader:
        raise UserError(f"data.reader={source.reader}: no such reader; choose {', '.join(READERS)} or module:function.")
    return source.reader, ReaderSpec(partial(_call, plugins.load(source.reader, "data.reader")), own=True)


def convert(spec: ReaderSpec, row: Mapping[str, Any], source: SourceSection) -> Conversation | Pair | Tokens:
    """Read a row: the conversation in normal form, with the system prompt it lacks, or a pair of such, or its tokens.

    Raises:
        RowError: If the row cannot be used.
        Dropped: If it is of no use.
    """
    made = _own(spec, row, source) if spec.own else spec.read(row, source)
    if isinstance(made, Tokens):
        return made
    own_tools = None if spec.own else row.get(source.tool_key)
    prompt = _system_prompt(row, source)
    if isinstance(made, Mapping) and "input_ids" in made:
        return pretokenized(made)
    if isinstance(made, Mapping) and "chosen" in made and "rejected" in made:
        made = Pair(*(Conversation(made[side], made.get("tools")) for side in Pair._fields))
    if isinstance(made, Pair):
        sides = []
        for name, side in zip(Pair._fields, made, strict=True):
            try:
                sides.append(_normal(side.messages, own_tools if side.tools is None else side.tools))
            except RowError as error:
                raise RowError(f"{name}: {error}") from error
        return Pair(*(_after(prompt, side) for side in preferences.checked(Pair(*sides))))
    if isinstance(made, list):
        return _after(prompt, _normal(made, own_tools))
    if isinstance(made, Mapping) and "messages" in made:
        return _after(prompt, _normal(made["messages"], made.get("tools")))
    raise RowError(
        "data.reader must return a list of messages, {'messages', 'tools'}, {'chosen', 'rejected', 'tools'} or "
        f"{{'input_ids', 'labels'}}, got {made!r:.80}"
    )


def _normal(turns: Any, tools: Any) -> Conversation:
    try:
        return normal(turns, tools)
    except RecursionError as error:
        raise RowError("its tools or tool calls are nested too deeply to be read; flatten them") from error


def _system_prompt(row: Mapping[str, Any], source: SourceSection) -> str | None:
    own = row.get(source.system_key)
    return own if isinstance(own, str) and own else source.system_prompt


def _after(prompt: str | None, conversation: Conversation) -> Conversation:
    """Return a conversation with the system prompt, if it opens with none of its own."""
    turns = conversation.messages
    if not prompt or turns[0]["role"] in ("system", "developer"):
        return conversation
    return Conversation([*normal([{"role": "system", "content": prompt}]).messages, *turns], conversation.tools)


def _call(function: Callable[[Mapping[str, Any]], Made], row: Mapping[str, Any], source: SourceSection) -> Made:
    return function(row)


def _own(spec: ReaderSpec, row: Mapping[str, Any], source: SourceSection) -> Any:
    try:
        return spec.read(row, source)
    except (RowError, Dropped):
        raise
    except Exception as error:  # a reader of the user's own may raise anything
        raise RowError(
            f"data.reader failed on this row ({error!r}); it raises RowError on rows it cannot use"
        ) from error


def _recognised(source: SourceSection, row: Mapping[str, Any], where: str) -> tuple[str, ReaderSpec]:
    preferred = preferences.recognised(row, source) if source.chat_key is None else None
    if preferred is not None:
        name, said = preferred
        return said, ReaderSpec(preferences.sharegpt) if name == "sharegpt" else READERS[name]
    chat = _chat(source, row) if not (source.input_key or source.output_key) else None
    if chat is not None:
        return _keyed(*chat)
    if source.chat_key is None:
        if not (source.input_key or source.output_key):
            for name, own in COLUMNS.items():
                if set(own) <= set(row):
                    return name, READERS[name]
        found = _pair(source, row)
        if found is not None:
            return found
    pairs = ", ".join(" and ".join(map(repr, pair)) for pair in PAIRS)
    raise UserError(
        f"{where}: no known format has these columns ({columns(row)}); a row holds 'messages', 'conversations', 'input_ids', "
        f"'instruction' and 'output', {pairs}, 'chosen' and 'rejected', or set data.reader ({', '.join(READERS)}, or "
        "module:function of your own) and its keys."
    )


def _chat(source: SourceSection, row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return format and column of a row's messages, or None if it has none that tell."""
    for key in (source.chat_key,) if source.chat_key else ("messages", "conversations"):
        turns = row.get(key)
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            try:
                turns = json.loads(turns)
            except (ValueError, RecursionError):  # no list of messages, then
                continue
        if not isinstance(turns, list):
            continue
        first = turns[0] if turns and isinstance(turns[0], dict) else {}
        if "from" in first:
            return "sharegpt", key
        if "role" in first or key == "messages":
            return "messages", key
    return None


def _keyed(name: str, key: str) -> tuple[str, ReaderSpec]:
    read = partial(messages, key=key) if name == "messages" else partial(sharegpt, key=key)
    usual = {"messages": "messages", "sharegpt": "conversations"}[name]
    return name if key == usual else f"{name}: {key}", ReaderSpec(read)


def _pair(source: SourceSection, row: Mapping[str, Any]) -> tuple[str, ReaderSpec] | None:
    """Return the response format with the first columns that fit, or None."""
    for pair in PAIRS:
        keys = source.input_key or pair[0], source.output_key or pair[1]
        if set(keys) <= set(row):
            return f"response: {keys[0]} → {keys[1]}", ReaderSpec(partial(response, keys=keys))
    return None
