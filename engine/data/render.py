"""What a chat template sees and how it prints: transformers' sandbox, with JSON that stays as it was written."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engine.data.conversation import Conversation, RawJson
from engine.errors import UserError

GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
OPEN, CLOSE = "\ue0a2", "\ue0a3"
DATE = "strftime_now"
"""Transformers' function for today's date, which the templates do not get: the same rows would be other data every day."""


def chosen(tokenizer: Any, text: str | None, *, tools: bool = False) -> str | None:
    """Return a template's text: that of the tokenizer for "default", its own for ``tools`` where it has several."""
    if text != "default":
        return text
    own = tokenizer.chat_template
    if not own:
        raise UserError(
            f"model.chat_template=default: the tokenizer in {tokenizer.name_or_path} has no chat template; "
            "give a file, or null to concatenate contents."
        )
    if isinstance(own, dict) and "default" not in own:
        raise UserError(
            f"model.chat_template=default: the tokenizer in {tokenizer.name_or_path} has several chat templates "
            f"({', '.join(sorted(own))}) and none of them is called default; give one as a file."
        )
    return str(tokenizer.get_chat_template(tools=[] if tools else None))


def compiled(text: str | None) -> Any:
    """Compile a template in transformers' sandbox, with a ``tojson`` that prints RawJson as it was written."""
    if text is None:
        return None
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template("").environment.overlay()  # transformers' own is shared by all that use it
    environment.filters = {**environment.filters, "tojson": _tojson(environment.filters["tojson"])}
    environment.globals = {name: value for name, value in environment.globals.items() if name != DATE}
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as error:
        raise UserError(f"model.chat_template: not a Jinja template (line {error.lineno}: {error}).") from error


def signed(text: str) -> str:
    """Return a template with OPEN and CLOSE printed at both ends of each ``{% generation %}`` block.

    Transformers' own positions of the blocks are wrong inside macros, set blocks and filters.
    """
    # Two ifs, so that white space around the tags is treated as before.
    text = GENERATION.sub(rf"{{%\1 if true %}}{{{{ '{OPEN}' }}}}{{% if true \2%}}", text)
    return END_GENERATION.sub(rf"{{%\1 endif %}}{{{{ '{CLOSE}' }}}}{{% endif \2%}}", text)


def _tojson(plain: Callable[..., str]) -> Callable[..., str]:
    """Return a ``tojson`` filter that differs from ``plain`` on RawJson alone, wherever in a value it is."""
    name = f"raw-{secrets.token_hex(16)}"
    pattern = re.compile(f'"{name}-([0-9]+)"')

    def tojson(value: Any, *args: Any, **kwargs: Any) -> str:
        texts: list[str] = []

        def hide(part: Any) -> Any:
            if isinstance(part, RawJson):
                texts.append(part.text)
                return f"{name}-{len(texts) - 1}"
            if isinstance(part, dict):
                return {key: hide(item) for key, item in part.items()}
            return [hide(item) for item in part] if isinstance(part, list | tuple) else part

        hidden = hide(value)
        return pattern.sub(lambda m: texts[int(m[1])], plain(hidden if texts else value, *args, **kwargs))

    return tojson


def visible(conversation: Conversation) -> Conversation:
    """Return what a template sees of a conversation: plain JSON and RawJson, without the keys that are for the mask alone."""
    from transformers.utils import chat_template_utils

    messages = [
        {k: v if type(v) is str else _plain(v) for k, v in m.items() if k not in ("train", "weight")}
        for m in conversation.messages
    ]
    # Recent versions let a template find reasoning under any of its names; what is trained is what will be asked for later.
    alias = getattr(chat_template_utils, "_alias_reasoning_fields", None)
    return Conversation(alias(messages) if alias else messages, _plain(conversation.tools))


def _plain(value: Any) -> Any:
    """Return a value without what is not JSON; a template is foreign code, and an object's methods are not for it to call."""
    if value is None or type(value) in (str, int, float, bool, RawJson):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, str):
        return "".join(value)
    return f"<{type(value).__name__}>"


def upto(conversation: Conversation, stop: int) -> Conversation:
    """Return the first messages of a conversation."""
    return Conversation(conversation.messages[:stop], conversation.tools)


def held(conversation: Conversation, turns: Sequence[int]) -> Conversation:
    """Return a conversation with placeholders for some contents, and nothing beside in the assistant's turns among these."""
    messages = list(conversation.messages)
    for i in turns:
        kept = {"role": "assistant"} if messages[i]["role"] == "assistant" else messages[i]
        messages[i] = {**kept, "content": placeholder(i)}
    return Conversation(messages, conversation.tools)


def placeholder(i: int) -> str:
    """Return a string that no conversation holds and no template treats specially."""
    return f"\ue0a0turn{i}\ue0a1"
