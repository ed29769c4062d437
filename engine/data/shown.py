"""What a rendering must show of a conversation: its tools, its calls and every message that is not the assistant's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator

from engine.data.conversation import Conversation, Message, RowError
from engine.data.render import held

Render = Callable[[Conversation], str]


def check_calls(turn: Message, i: int, shown: str) -> None:
    """Raise RowError if a trained turn calls tools and the template does not show it."""
    names = Counter(call["function"]["name"] for call in turn.get("tool_calls", ()))
    for name, count in names.items():
        if _count(name, shown) < count:
            raise RowError(
                f"the chat template does not show that messages[{i}] calls {name}, so it would be trained on something else; give "
                "another by model.chat_template, or set train: false on that message"
            )


def check_tools(shown: Conversation, text: str, render: Render) -> None:
    """Raise RowError if the rendering is as silent about a tool as without tools, and no system turn names it."""
    if not shown.tools:
        return
    try:
        bare = render(Conversation(shown.messages))
    except RowError:  # a template for tools alone
        bare = ""
    prompts = [m["content"] for m in shown.messages if m["role"] in ("system", "developer")]
    for tool in shown.tools:
        name = tool["function"]["name"]
        if _count(name, text) <= _count(name, bare) and not any(name in prompt for prompt in prompts):
            raise RowError(
                f"the chat template does not show the tool {name}, so the model would learn to call what it was not told of; give "
                "another by model.chat_template, or leave the tools of the rows out by data.tool_key=none"
            )


def check_messages(shown: Conversation, text: str, render: Render) -> None:
    """Raise RowError if the template leaves a message out: the rendering is the same with another content in its place."""
    at = 0
    for i, m in enumerate(shown.messages):
        content = m["content"].strip()
        if m["role"] == "assistant" or not content:
            continue
        for form in _forms(content):
            found = text.find(form, at)
            if found >= 0:
                at = found + len(form)
                break
        else:
            try:
                left_out = render(held(shown, [i])) == text
            except RowError:  # it asks for a content that it can read, so it reads it
                left_out = False
            if left_out:
                raise RowError(
                    f"the chat template leaves out messages[{i}], whose role is {m['role']!r}; take it out of the row, or give "
                    "another template by model.chat_template"
                )


def _forms(part: str) -> Iterator[str]:
    """Yield a string as it is and as JSON writes it."""
    yield part
    yield json.dumps(part, ensure_ascii=False)[1:-1]
    yield json.dumps(part)[1:-1]


def _count(part: str, text: str) -> int:
    """Return how often a text holds a string, as it is or as JSON writes it."""
    return max(text.count(form) for form in _forms(part))
