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

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
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

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """Return the conversation as the model reads it; with a generation prompt, the assistant's header at its end.

        Raises:
            RowError: If the template refuses the conversation.
        """
        return self._render(messages, generation_prompt=generation_prompt)[0]

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
            text, marked = self._render(messages)
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
        return text, [(a, self._end_of(text, b)) for a, b in spans]

    @cached_property
    def end_of_turn(self) -> str:
        """What closes an assistant's turn: whitespace, if any, and a special token; empty where there is none."""
        mark = _placeholder(0)
        try:
            tail = self.render([{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]).partition(
                mark
            )[2]
        except RowError:
            return ""
        space = len(tail) - len(tail.lstrip())
        special = {
            *self.tokenizer.all_special_tokens,
            *(t.content for t in self.tokenizer.added_tokens_decoder.values()),
        }
        token = max((t for t in special if t and tail.startswith(t, space)), key=len, default=None)
        return "" if token is None else tail[: space + len(token)]

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Render, with the spans of ``{% generation %}`` blocks where the template has any."""
        if self.text is None:
            return "".join(m["content"] for m in messages), []
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.text,
                return_assistant_tokens_mask=self.marks_turns,
                add_generation_prompt=generation_prompt,
                **{**self.tokenizer.special_tokens_map, **self.variables},
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses this conversation ({error})") from error
        return texts[0], [tuple(s) for s in spans[0]] if self.marks_turns else []

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
        turn = upto[len(prompt) :].rstrip()
        return len(prompt), len(prompt) + len(turn.removesuffix(self.end_of_turn.strip()).rstrip())

    def _end_of(self, text: str, stop: int) -> int:
        """Return the end of a span that takes in the end-of-turn token behind it."""
        return stop + len(self.end_of_turn) if self.end_of_turn and text.startswith(self.end_of_turn, stop) else stop

    def _rewritten(self, turn: int) -> RowError:
        return RowError(
            f"the chat template does not show messages[{turn}] as it was written (it rewrites earlier turns, say), so it cannot be "
            "masked exactly; set data.train_on=last_assistant, or give another template by model.chat_template"
        )


class TokenMask:
    """Which tokens of a text hold characters of given spans.

    Byte-level tokenizers are mapped through the byte length of each token, which is exact where the tokenizer's own offsets
    leave out spaces; other tokenizers through their offsets, a skipped character counting to the token after it.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{tokenizer.name_or_path}: not a fast tokenizer; exact masks need one with a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self._bytes: NDArray[np.int64] | None = None
        if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
            vocabulary = tokenizer.get_vocab()
            self._bytes = np.zeros(max(vocabulary.values()) + 1, np.int64)
            for token, i in vocabulary.items():
                self._bytes[i] = len(token)
            for i, token in tokenizer.added_tokens_decoder.items():
                self._bytes[i] = len(token.content.encode())

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokenise a rendering.

        Args:
            text: The rendering, special tokens written out.
            spans: Ranges of characters.

        Returns:
            Token ids [T] and, for each, whether it holds a character of a span [T].
        """
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoding["input_ids"], np.int32)
        starts, stops, unit = self._edges(text, ids, encoding["offset_mapping"])
        mask = np.zeros(len(ids), np.bool_)
        for a, b in spans:
            mask |= (starts < unit(b)) & (stops > unit(a))
        return ids, mask

    def _edges(self, text: str, ids: NDArray[np.int32], offsets: Any) -> Any:
        """Return where each token starts and stops, and the map from characters to the same unit."""
        if self._bytes is not None:
            stops = np.cumsum(self._bytes[ids])
            if (int(stops[-1]) if len(stops) else 0) == len(text.encode()):
                return stops - self._bytes[ids], stops, lambda char: len(text[:char].encode())
        pairs = np.asarray(offsets, np.int64).reshape(-1, 2)
        stops = np.maximum.accumulate(pairs[:, 1]) if len(pairs) else pairs[:, 1]
        starts = np.minimum(pairs[:, 0], np.concatenate([[0], stops[:-1]])[: len(pairs)])
        return starts, stops, lambda char: char


def _placeholder(i: int) -> str:
    """Return a string that no conversation holds and no template treats specially."""
    return f"\ue0a0turn{i}\ue0a1"
