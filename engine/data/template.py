"""Rendering conversations, and finding exactly which characters and tokens of the rendering the assistant wrote.

A span is a range of characters. It is trusted only where it is shown to be right: either the template itself marks the turn
with ``{% generation %}``, or the rendering equals, character for character, the rendering around a placeholder with the
turn's content put in the placeholder's place, or the turn is what follows the generation prompt. Anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.schema import ModelSection
from engine.data.readers import Message, RowError
from engine.errors import UserError

Span = tuple[int, int]

GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
OPEN, CLOSE = "\ue0a2", "\ue0a3"
TRIMS = (lambda s: s, str.strip, str.lstrip, str.rstrip)


def template_text(model: ModelSection) -> str | None:
    """Return the template that the recipe names: "default", None (concatenate), or Jinja text read from a file."""
    name = model.chat_template
    if name is None or name == "default" or "{%" in name or "{{" in name:
        return name
    file = Path(name).expanduser()
    if not file.is_file():
        raise UserError(f"model.chat_template={name}: must be default, null, a Jinja string, or a file that exists.")
    return file.read_text(encoding="utf-8")


class Template:
    """A tokenizer's chat template with its variables.

    Args:
        tokenizer: A fast tokenizer of transformers.
        text: "default" for the tokenizer's own template, None to concatenate contents, or Jinja text.
        variables: Handed to the template.

    Raises:
        UserError: If the tokenizer has no template of its own, or none that parses.
    """

    def __init__(self, tokenizer: Any, text: str | None, variables: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.variables = variables or {}
        if text == "default":
            if not tokenizer.chat_template:
                raise UserError(
                    f"model.chat_template=default: the tokenizer in {tokenizer.name_or_path} has no chat template; "
                    "give a file, or null to concatenate contents."
                )
            text = tokenizer.get_chat_template()
        self.text: str | None = text
        self.marks_turns = text is not None and bool(GENERATION.search(text))
        # The same template with a sign printed at both ends of each block: transformers' own positions of the blocks are wrong
        # inside macros, set blocks and filters. Two ifs, so that white space around the tags is treated as before.
        self._signed = END_GENERATION.sub(
            rf"{{%\1 endif %}}{{{{ '{CLOSE}' }}}}{{% endif \2%}}",
            GENERATION.sub(rf"{{%\1 if true %}}{{{{ '{OPEN}' }}}}{{% if true \2%}}", text or ""),
        )
        self._closed_by: str | None = None

        self._check()

    def _check(self) -> None:
        """Raise UserError if the template is not one."""
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            if self.text is not None:
                _compile_jinja_template(self.text)
        except TemplateSyntaxError as error:
            raise UserError(f"model.chat_template: not a Jinja template (line {error.lineno}: {error}).") from error

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """Return the conversation as the model reads it; with a generation prompt, the assistant's header at its end.

        Raises:
            RowError: If the template refuses the conversation.
        """
        return self._render(self.text, messages, generation_prompt=generation_prompt)

    def trained_spans(self, messages: Sequence[Message], train_on: str) -> tuple[str, list[Span]]:
        """Render a conversation and find the characters that carry loss.

        Args:
            messages: A checked conversation.
            train_on: ``data.train_on``.

        Returns:
            The rendering, and the spans of the chosen assistant turns, each with its end-of-turn token.

        Raises:
            RowError: If a turn cannot be located exactly.
        """
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        turns = assistants[-1:] if train_on == "last_assistant" else assistants
        if train_on == "all":
            text = self.render(messages)
            return text, [(0, len(text))]
        if self.text is None:
            edges = np.cumsum([0, *(len(m["content"]) for m in messages)]).tolist()
            return self.render(messages), [(edges[i], edges[i + 1]) for i in turns]
        if self.marks_turns:
            text = self.render(messages)
            marked = self._marked(messages, text)
            if len(marked) != len(assistants):
                raise RowError(
                    f"the template marks {len(marked)} generation blocks for {len(assistants)} assistant turns, so they cannot be "
                    "masked exactly; mend the template's {% generation %} or give another by model.chat_template"
                )
            spans = [span for i, span in zip(assistants, marked, strict=True) if i in turns]
            for i, (a, b) in zip(turns, spans, strict=True):
                if i != assistants[-1] and not any(trim(messages[i]["content"]) in text[a:b] for trim in TRIMS):
                    raise self._rewritten(i)
        else:
            text = self.render(messages)
            spans = self._between_placeholders(messages, turns, text)
        return text, [self._with_end_of_turn(messages, text, span) for span in spans]

    def _closing(self, messages: Sequence[Message]) -> str:
        """Return what the template puts behind an assistant's turn that ends a conversation."""
        if self._closed_by is None:
            ask, mark = {"role": "user", "content": "x"}, {"role": "assistant", "content": _placeholder(0)}
            last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
            for probe in ([ask, mark], [{"role": "system", "content": "x"}, ask, mark], [*messages[:last], mark]):
                try:
                    pieces = self.render(probe).split(_placeholder(0))
                except RowError:
                    continue
                if len(pieces) == 2:
                    self._closed_by = pieces[1]
                    break
            else:
                raise RowError(
                    "the chat template does not show what closes an assistant's turn, so it cannot be masked exactly"
                )
        return self._closed_by

    @cached_property
    def _special(self) -> list[str]:
        """The special and added tokens, longest first."""
        added = (t.content for t in self.tokenizer.added_tokens_decoder.values())
        return sorted({*self.tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)

    def _with_end_of_turn(self, messages: Sequence[Message], text: str, span: Span) -> Span:
        """Return a span that takes in the white space, if any, and the special token that close a turn."""
        start, stop = span
        tail = self._closing(messages)
        space = len(tail) - len(tail.lstrip())
        token = next((t for t in self._special if tail.startswith(t, space)), "")
        close = tail[:space] + token if token else ""
        if text.startswith(close, stop):
            return start, stop + len(close)
        rest = text[stop:].lstrip()
        if not text[start:stop].rstrip().endswith(token) and any(map(rest.startswith, self._special)):
            raise RowError(
                f"the chat template closes its last assistant turn with {token} and an earlier one otherwise, so that one cannot "
                "be masked exactly; set data.train_on=last_assistant, or give another template by model.chat_template"
            )
        return span

    def _render(self, template: str | None, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        if template is None:
            return "".join(m["content"] for m in messages)
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template(
                [list(messages)],
                chat_template=template,
                add_generation_prompt=generation_prompt,
                **{**self.tokenizer.special_tokens_map, **self.variables},
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses this conversation ({error})") from error
        return str(texts[0])

    def _marked(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Return the spans of the ``{% generation %}`` blocks in ``text``, the rendering."""
        pieces = re.split(f"([{OPEN}{CLOSE}])", self._render(self._signed, messages))
        if "".join(pieces[::2]) != text or pieces[1::2] != [OPEN, CLOSE] * (len(pieces) // 4):
            raise RowError(
                "the template's {% generation %} blocks cannot be located exactly (they are nested or inside a filter, say); mend "
                "the template or give another by model.chat_template"
            )
        edges = np.cumsum([len(piece) for piece in pieces[::2]]).tolist()
        return list(zip(edges[0::2], edges[1::2], strict=False))

    def _between_placeholders(self, messages: Sequence[Message], turns: list[int], text: str) -> list[Span]:
        """Locate turns by rendering with placeholders: all at once, else one by one, else after the generation prompt."""
        together = self._substitute(messages, turns, text)
        if together is not None:
            return together
        spans = []
        for i in turns:
            alone = self._substitute(messages, [i], text)
            span = alone[0] if alone else self._after_prompt(messages, i, text)
            if span is None:
                raise self._rewritten(i)
            spans.append(span)
        return spans

    def _substitute(self, messages: Sequence[Message], turns: list[int], text: str) -> list[Span] | None:
        """Return the spans of ``turns`` if ``text`` is the rendering around placeholders with their contents put back."""
        marked = [{**m, "content": _placeholder(i)} if i in turns else m for i, m in enumerate(messages)]
        pieces = re.split("|".join(map(_placeholder, turns)), self.render(marked))
        if len(pieces) != len(turns) + 1:
            return None
        for trim in TRIMS:
            contents = [trim(messages[i]["content"]) for i in turns]
            spans, rebuilt = [], pieces[0]
            for content, piece in zip(contents, pieces[1:], strict=True):
                spans.append((len(rebuilt), len(rebuilt) + len(content)))
                rebuilt += content + piece
            if rebuilt == text:
                return spans
        return None

    def _after_prompt(self, messages: Sequence[Message], i: int, text: str) -> Span | None:
        """Return turn ``i`` as what follows the generation prompt, for templates that reshape a turn's content."""
        if i == 0:
            return None
        bare, upto = self.render(messages[:i]), self.render(messages[: i + 1])
        prompt = self.render(messages[:i], generation_prompt=True)
        if prompt == bare or not upto.startswith(prompt) or not text.startswith(upto):
            return None
        closing = self._closing(messages)
        if not upto[len(prompt) :].endswith(closing):
            return None
        # What the template itself puts between prompt and content (Qwen3's empty reasoning block) is no part of the turn.
        bare_turn = self.render([*messages[:i], {**messages[i], "content": _placeholder(i)}])
        lead = bare_turn.removeprefix(prompt).partition(_placeholder(i))[0]
        start = len(prompt) + (len(lead) if upto.startswith(lead, len(prompt)) else 0)
        return start, len(upto) - len(closing)

    def _rewritten(self, turn: int) -> RowError:
        return RowError(
            f"the chat template does not show messages[{turn}] as it was written (it rewrites earlier turns, say), so it cannot be "
            "masked exactly; set data.train_on=last_assistant, or give another template by model.chat_template"
        )


class TokenMask:
    """Which tokens of a text hold characters of given spans.

    Offsets come from a copy of the tokenizer without its post-processor, which shortens them (ByteLevel and Roberta leave out
    spaces); a character that the tokenizer drops belongs to no token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{tokenizer.name_or_path}: not a fast tokenizer; exact masks need one with a tokenizer.json."
            )
        backend = tokenizer.backend_tokenizer
        self._tokenizer = type(backend).from_str(backend.to_str())
        self._tokenizer.post_processor = None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = backend.encode_special_tokens

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokenise a rendering.

        Args:
            text: The rendering, special tokens written out.
            spans: Ranges of characters.

        Returns:
            Token ids [T] and, for each, whether it holds a character of a span [T].
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        starts, stops = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), np.bool_)
        for a, b in spans:
            if a < b:
                mask |= (starts < b) & (stops > a)
        return ids, mask


def _placeholder(i: int) -> str:
    """Return a string that no conversation holds and no template treats specially."""
    return f"\ue0a0turn{i}\ue0a1"
