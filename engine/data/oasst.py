"""OpenAssistant's trees of messages, as the conversations that lead from a root to each leaf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.data.conversation import Row, RowError

COLUMNS = ("message_id", "parent_id", "text", "role")
ROLES = {"prompter": "user", "assistant": "assistant"}
DROPPED = "dropped"
"""Key of a row that stands for a path that is no use; its value is the reason."""
TREE = "tree"
"""Key of a conversation's root: conversations of one tree share messages, and are held out together."""
CIRCLE = "'parent_id' leads in a circle; each tree has one message whose 'parent_id' is null"


def gather(rows: Iterator[Row]) -> Iterator[Row]:
    """Turn rows that are messages of trees into rows that are conversations, each with the place of its leaf.

    A path that ends with the prompter ends at its last assistant instead; each path is there once. Rows that cannot be read
    are passed on.
    """
    nodes: dict[str, tuple[str, dict[str, Any]]] = {}
    for place, row in rows:
        problem = row if isinstance(row, RowError) else _problem(row, nodes)
        if problem is None and not isinstance(row, RowError):
            nodes[row["message_id"]] = (place, row)
        elif problem is not None:
            yield place, problem
    parents = {row["parent_id"] for _, row in nodes.values()}
    ends: set[str] = set()
    reached: set[str] = set()
    for name, (place, _) in nodes.items():
        if name in parents:
            continue
        path, why_not = _path(name, nodes)
        reached.update(row["message_id"] for row in path)
        while path and path[-1]["role"] == "prompter":
            path.pop()
        if why_not is not None or not path:
            yield place, why_not if isinstance(why_not, RowError) else {DROPPED: why_not or "no answer"}
        elif path[-1]["message_id"] not in ends:
            ends.add(path[-1]["message_id"])
            turns = [{"role": ROLES[row["role"]], "content": row["text"]} for row in path]
            yield place, {"messages": turns, TREE: path[0]["message_id"]}
    unreached = next((place for name, (place, _) in nodes.items() if name not in reached), None)
    if unreached is not None:
        yield unreached, RowError(CIRCLE)


def _problem(row: dict[str, Any], nodes: dict[str, tuple[str, dict[str, Any]]]) -> RowError | None:
    for column in ("message_id", "text"):
        if not isinstance(row.get(column), str):
            return RowError(f"field {column!r} must be a string, got {row.get(column)!r:.80}")
    if not isinstance(row.get("parent_id"), (str, type(None))):
        return RowError(f"field 'parent_id' must be a string or null, got {row['parent_id']!r:.80}")
    if row.get("role") not in tuple(ROLES):
        return RowError(f"field 'role' must be prompter or assistant, got {row.get('role')!r:.80}")
    if row["message_id"] in nodes:
        return RowError(f"message_id {row['message_id']!r} is that of {nodes[row['message_id']][0]} too")
    return None


def _path(
    name: str, nodes: dict[str, tuple[str, dict[str, Any]]]
) -> tuple[list[dict[str, Any]], str | RowError | None]:
    """Return the messages from the root to a leaf, and the reason why they are no whole path, if they are none."""
    path: list[dict[str, Any]] = []
    following: str | None = name
    while following is not None:
        if following not in nodes:
            return path[::-1], "a parent that is not among the rows"
        if len(path) > len(nodes):
            return path[::-1], RowError(CIRCLE)
        path.append(nodes[following][1])
        following = path[-1]["parent_id"]
    return path[::-1], None
