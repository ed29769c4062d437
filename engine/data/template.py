"""Rendering conversations, and finding exactly which characters of the rendering the assistant wrote (docs/masks.md).

A span is a range of characters. It is trusted only where it is shown to be right: the template itself marks the turn with
``{% generation %}``; or the rendering equals, character for character, the rendering around a placeholder with the turn's
content in the placeholder's place; or the turn stands between what the template writes before and after a placeholder, or
behind the generation prompt, and is shown the same where it ends the conversation. Anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.config.schema import ModelSection
from engine.data.conversation import Conversation, Dropped, Message, RowError, turn_weights
from engine.data.render import CLOSE, DATE, GENERATION, OPEN, chosen, compiled, held, placeholder, signed, upto, visible
from engine.data.shown import check_calls, check_messages, check_tools
from engine.errors import UserError

TRIMS = (lambda s: s, str.strip, str.lstrip, str.rstrip)
_DATED = (
    "the chat template prints today's date (strftime_now), which would make the data another every day; set the date by "
    "model.template_args={date_string: 26 Jul 2024} if the template reads it there, or give another by model.chat_template"
)
FILLED = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of a template that the conversation fills."""

Range = tuple[int, int]


class Span(NamedTuple):
    """Characters start:stop of a rendering, which carry loss."""

    start: int
    stop: int
    weight: float = 1.0


class Document(NamedTuple):
    """A rendering that becomes one sample."""

    text: str
    """The rendering, special tokens written out."""
    spans: list[Span]
    """What carries loss, in order."""
    last_weight: float
    """Loss weight of the turn that ends it; 0: not trained."""


class _Unlocated(RowError):
    """A turn that cannot be masked exactly in this rendering; it may be in another."""


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
        tools: Take the tokenizer's template for conversations with tools, where it has one.

    Raises:
        UserError: If the tokenizer has no template of its own, or none that parses.
    """

    def __init__(
        self, tokenizer: Any, text: str | None, variables: dict[str, Any] | None = None, *, tools: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        for name in variables or {}:
            if name in FILLED:
                raise UserError(
                    f"model.template_args.{name}: is filled from the data; leave it out, or give it another name."
                )
        self.variables = {**tokenizer.special_tokens_map, **(variables or {})}
        self.text = text = chosen(tokenizer, text, tools=tools)
        self.marks_turns = text is not None and bool(GENERATION.search(text))
        self._compiled = compiled(text)
        self._signed = compiled(signed(text)) if text is not None and self.marks_turns else None
        self._words = set(re.findall(r"\w+", text or ""))
        self._closed_by: str | None = None
        self._spelled_by: str | None = None

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """Return a conversation as the model reads it.

        Args:
            messages: In normal form.
            tools: In normal form.
            generation_prompt: Put the assistant's header at the end.

        Raises:
            RowError: If the template refuses the conversation.
        """
        return self._render(visible(Conversation(list(messages), tools)), generation_prompt=generation_prompt)

    def trained_spans(self, conversation: Conversation, train_on: str) -> tuple[str, list[Span]]:
        """Render a conversation whole and find the characters that carry loss.

        Args:
            conversation: In normal form.
            train_on: ``data.train_on``.

        Returns:
            The rendering, and the spans of the chosen turns, each with its end-of-turn token.

        Raises:
            RowError: If a turn cannot be located exactly in this rendering.
        """
        weights = turn_weights(conversation.messages, train_on)
        document, missed = self._document(visible(conversation), weights, everything=train_on == "all")
        for error in missed.values():
            raise error
        return document.text, document.spans

    def documents(self, conversation: Conversation, train_on: str) -> list[Document]:
        """Render a conversation as few times as show each chosen turn exactly, with the characters that carry loss.

        That is once, unless the template rewrites turns as the conversation goes on. A turn that the whole conversation does
        not show as it was written is trained in the rendering of the conversation up to that turn, and nowhere else.

        Args:
            conversation: In normal form.
            train_on: ``data.train_on``.

        Returns:
            The renderings, shortest first; the last one may end before the conversation does.

        Raises:
            RowError: If a turn cannot be located exactly even where it is the last.
            Dropped: If no turn is to be trained, or nothing is in those of the assistant that are.
        """
        weights = turn_weights(conversation.messages, train_on)
        if not weights:
            raise Dropped("no turn to train")
        shown, everything = visible(conversation), train_on == "all"
        answers = [m for m in (shown.messages[i] for i in weights) if m["role"] == "assistant"]
        if answers and all(map(self._is_empty, answers)):
            raise Dropped("empty answer")
        documents: list[Document] = []
        while weights:
            document, missed = self._document(shown, weights, everything=everything)
            if missed and (everything or max(missed) == len(shown.messages) - 1):
                raise missed[max(missed)]
            if document.spans or not missed:
                documents.append(document)
            if not missed:
                break
            weights = {i: w for i, w in weights.items() if i in missed}
            shown = upto(shown, max(missed) + 1)
        return documents[::-1]

    # --- one rendering -----------------------------------------------------------------------------------------------

    def _document(
        self, shown: Conversation, weights: Mapping[int, float], *, everything: bool
    ) -> tuple[Document, dict[int, _Unlocated]]:
        """Return a conversation's rendering with the turns that can be located in it, and why the others cannot."""
        text = self._render(shown)
        check_tools(shown, text, self._render)
        check_messages(shown, text, self._render)
        last = weights.get(len(shown.messages) - 1, 0.0)
        if everything:
            others = {i: weights.get(i, 0.0) for i in range(len(shown.messages)) if weights.get(i, 0.0) != 1.0}
            inside = sorted(Span(*self._in_all(shown, i, text), w) for i, w in others.items())
            return Document(text, _around(inside, len(text)), last), {}
        located, missed = self._locate(shown, list(weights), text)
        for i, (start, stop) in located.items():
            check_calls(shown.messages[i], i, text[start:stop])
        return Document(text, [Span(*span, weights[i]) for i, span in sorted(located.items())], last), missed

    def _locate(
        self, shown: Conversation, turns: list[int], text: str
    ) -> tuple[dict[int, Range], dict[int, _Unlocated]]:
        """Return the spans of assistant turns in ``text``, the rendering, and why the others cannot be located."""
        if self.text is None:
            edges = np.cumsum([0, *(len(m["content"]) for m in shown.messages)]).tolist()
            return {i: (edges[i], edges[i + 1]) for i in turns}, {}
        marked = self._marked(shown, text) if self.marks_turns else {}
        plain = [] if marked else [i for i in turns if not self._may_show_more(shown.messages[i])]
        contents = self._substitute(shown, plain, text)
        found, missed = {}, {}
        for i in turns:
            try:
                if marked:
                    self._check_marked(shown, i, text[slice(*marked[i])])
                    found[i] = self._closed(shown, i, text, marked[i])
                else:
                    if i in plain and i not in contents:
                        contents |= self._substitute(shown, [i], text)
                    found[i] = self._content_or_turn(shown, i, text, contents.get(i))
            except _Unlocated as error:
                missed[i] = error
        return found, missed

    def _content_or_turn(self, shown: Conversation, i: int, text: str, content: Range | None) -> Range:
        """Return the span of a turn, whose content may have been found."""
        if content is not None:
            try:
                return self._closed(shown, i, text, content)
            except _Unlocated:
                pass
        return self._turn(shown, i, text)

    def _in_all(self, shown: Conversation, i: int, text: str) -> Range:
        """Return the span of any message in ``text``, where all that is not excepted is trained."""
        is_turn = shown.messages[i]["role"] == "assistant"
        if self.text is None:
            start = sum(len(m["content"]) for m in shown.messages[:i])
            return start, start + len(shown.messages[i]["content"])
        if self.marks_turns and is_turn:
            return self._closed(shown, i, text, self._marked(shown, text)[i])
        content = self._substitute(shown, [i], text).get(i)
        if is_turn:
            return self._content_or_turn(shown, i, text, content)
        if content is not None:
            return content
        raise _Unlocated(
            f"the chat template does not show messages[{i}] as it was written, so it cannot be left out of the loss exactly; "
            "take 'train' off that message, or give another template by model.chat_template"
        )

    # --- a turn whose content is all that is shown of it -------------------------------------------------------------

    def _may_show_more(self, turn: Message) -> bool:
        """Tell whether the template names anything that a turn has beside its role and content."""
        return not self._words.isdisjoint(turn.keys() - {"role", "content"})

    def _is_empty(self, turn: Message) -> bool:
        """Tell whether a turn says nothing: no content, no calls, and nothing else that the template names."""
        more = (v for k, v in turn.items() if k in self._words and k not in ("role", "content"))
        return not (turn["content"].strip() or turn.get("tool_calls") or any(str(v).strip() for v in more))

    def _substitute(self, shown: Conversation, turns: list[int], text: str) -> dict[int, Range]:
        """Return the contents' spans if ``text`` is the rendering around placeholders with the contents put back; else none."""
        if not turns:
            return {}
        try:
            pieces = re.split("|".join(map(placeholder, turns)), self._render(held(shown, turns)))
        except RowError:
            return {}
        if len(pieces) != len(turns) + 1:
            return {}
        for trim in TRIMS:
            contents = [trim(shown.messages[i]["content"]) for i in turns]
            spans, rebuilt, at = {}, [pieces[0]], len(pieces[0])
            for i, content, piece in zip(turns, contents, pieces[1:], strict=True):
                spans[i] = (at, at + len(content))
                rebuilt += [content, piece]
                at += len(content) + len(piece)
            if at == len(text) and "".join(rebuilt) == text:
                return spans
        return {}

    def _closing(self, shown: Conversation) -> str:
        """Return what the template puts behind an assistant's turn that ends a conversation; sets ``_spelled_by`` as well."""
        if self._closed_by is None:
            ask, mark = {"role": "user", "content": "x"}, {"role": "assistant", "content": placeholder(0)}
            last = max(i for i, m in enumerate(shown.messages) if m["role"] == "assistant")
            for probe in ([ask, mark], [{"role": "system", "content": "x"}, ask, mark], [*shown.messages[:last], mark]):
                try:
                    pieces = self._render(Conversation(probe)).split(placeholder(0))
                except RowError:
                    continue
                if len(pieces) == 2:
                    self._closed_by = pieces[1]
                    self._spelled_by = self._spelled(pieces[1], [*probe, ask, {**mark, "content": placeholder(1)}])
                    break
            else:
                raise RowError(
                    "the chat template does not show what closes an assistant's turn, so it cannot be masked exactly; "
                    "give another by model.chat_template"
                )
        return self._closed_by

    @cached_property
    def special(self) -> list[str]:
        """The special and added tokens, longest first."""
        added = (t.content for t in self.tokenizer.added_tokens_decoder.values())
        return sorted({*self.tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)

    def _spelled(self, closing: str, longer: list[Message]) -> str:
        """Return the end of a turn that no special token begins (ChatML's, where it is none); "" if there is no such text.

        Args:
            closing: What is behind a turn that ends a conversation.
            longer: A conversation whose turn before the last must be closed alike: what is there once is no end of a turn.
        """
        first = re.search("|".join(map(re.escape, self.special)) or "(?!)", closing)
        if first is not None and not closing[: first.start()].strip():
            return ""
        try:
            behind = self._render(Conversation(longer)).partition(placeholder(0))[2]
        except RowError:  # a template for a single answer
            behind = closing
        ends = [closing[: first.end()], closing[: first.start()].rstrip()] if first else [closing.rstrip()]
        return next((end for end in ends if behind.startswith(end)), "")

    def _end_of_turn(self, shown: Conversation, tail: str) -> str:
        """Return the end of a turn that ``tail`` begins with: white space, if any, and a special token or what stands for it."""
        space = len(tail) - len(tail.lstrip())
        token = next((t for t in self.special if tail.startswith(t, space)), "")
        if token:
            return tail[:space] + token
        try:
            self._closing(shown)
        except RowError:
            return ""
        return self._spelled_by if self._spelled_by and tail.startswith(self._spelled_by) else ""

    def _closed(self, shown: Conversation, i: int, text: str, content: Range) -> Range:
        """Return a content's span with the end of the turn."""
        start, stop = content
        close = self._end_of_turn(shown, self._closing(shown))
        if text.startswith(close, stop):
            return start, stop + len(close)
        rest = text[stop : stop + 256].lstrip()
        other = close == self._spelled_by or any(map(rest.startswith, self.special))
        if other and not text[start:stop].rstrip().endswith(close.lstrip()):
            raise _Unlocated(
                f"the chat template closes its last assistant turn with {close.lstrip()} and messages[{i}] otherwise, so that one "
                "cannot be masked exactly; set data.train_on=last_assistant, or give another template by model.chat_template"
            )
        return content

    # --- a turn of which more is shown -------------------------------------------------------------------------------

    def _turn(self, shown: Conversation, i: int, text: str) -> Range:
        """Return the span of all that the template shows of a turn, if that is what it shows where the turn is the last."""
        ends = upto(shown, i + 1)
        try:
            alone = text if i == len(shown.messages) - 1 else self._render(ends)
        except RowError as error:
            raise _Unlocated(str(error)) from error
        start, stop = self._last_turn(ends, alone)
        if text.startswith(alone[:stop]):
            return start, stop
        frame = self._frame(shown, i)
        if frame is not None and text.startswith(frame[0]) and text.endswith(frame[1]):
            a, b = len(frame[0]), len(text) - len(frame[1]) + len(self._end_of_turn(shown, frame[1]))
            if text[a:b] == alone[start:stop]:
                return a, b
        raise _rewritten(i)

    def _last_turn(self, shown: Conversation, text: str) -> Range:
        """Return the span of the turn that ends a conversation.

        It begins where a placeholder in the place of its content would, so that what the template itself puts before every
        content (Qwen3's empty reasoning block) is no part of it; or else behind the generation prompt.
        """
        i = len(shown.messages) - 1
        frame = self._frame(shown, i)
        if frame is not None and text.startswith(frame[0]):
            start = len(frame[0])
        else:
            start = self._behind_prompt(shown, frame, text)
        if frame is not None and text.endswith(frame[1]) and len(text) - len(frame[1]) >= start:
            return start, len(text) - len(frame[1]) + len(self._end_of_turn(shown, frame[1]))
        stop = len(text.rstrip())
        if stop > start and any(text.endswith(token, start, stop) for token in self.special):
            return start, stop
        raise _Unlocated(
            f"the chat template does not show where messages[{i}] ends (no special token of the tokenizer closes it), so it cannot "
            "be masked exactly; give another by model.chat_template, or set train: false on that message"
        )

    def _behind_prompt(self, shown: Conversation, frame: tuple[str, str] | None, text: str) -> int:
        """Return where the turn that ends a conversation begins: behind the generation prompt, which opens it."""
        i = len(shown.messages) - 1
        before = upto(shown, i)
        try:
            bare, prompt = self._render(before), self._render(before, generation_prompt=True)
        except RowError:
            bare = prompt = ""
        # Without a prompt (Mistral), all that follows the question is the turn, if plain turns have no header either.
        headless = frame is not None and frame[0].startswith(bare) and not frame[0][len(bare) :].strip()
        if prompt and text.startswith(prompt) and (prompt != bare or headless):
            return len(prompt)
        if frame is None:
            raise _Unlocated(
                f"the chat template does not show messages[{i}] as it was written (it leaves it out, or changes it), so it "
                "cannot be masked exactly; give another by model.chat_template"
            )
        raise _Unlocated(
            f"the chat template does not show where messages[{i}] begins (it does not begin with the generation prompt), so it "
            "cannot be masked exactly; give another by model.chat_template, or set train: false on that message"
        )

    def _frame(self, shown: Conversation, i: int) -> tuple[str, str] | None:
        """Return what the template writes before and after the content of a turn that has content alone; None: it does not."""
        try:
            pieces = self._render(held(shown, [i])).split(placeholder(i))
        except RowError:
            return None
        return (pieces[0], pieces[1]) if len(pieces) == 2 else None

    # --- templates that mark turns themselves ------------------------------------------------------------------------

    def _marked(self, shown: Conversation, text: str) -> dict[int, Range]:
        """Return the ``{% generation %}`` blocks in ``text``, the rendering, by assistant turn."""
        pieces = re.split(f"([{OPEN}{CLOSE}])", self._render(shown, self._signed))
        if "".join(pieces[::2]) != text or pieces[1::2] != [OPEN, CLOSE] * (len(pieces) // 4):
            raise RowError(
                "the template's {% generation %} blocks cannot be located exactly (they are nested or inside a filter, say); mend "
                "the template or give another by model.chat_template"
            )
        edges = np.cumsum([len(piece) for piece in pieces[::2]]).tolist()
        spans = list(zip(edges[0::2], edges[1::2], strict=False))
        assistants = [i for i, m in enumerate(shown.messages) if m["role"] == "assistant"]
        if len(spans) != len(assistants):
            raise RowError(
                f"the template marks {len(spans)} generation blocks for {len(assistants)} assistant turns, so they cannot be "
                "masked exactly; mend the template's {% generation %} or give another by model.chat_template"
            )
        return dict(zip(assistants, spans, strict=True))

    def _block(self, shown: Conversation, i: int) -> str:
        """Return the text of a turn's ``{% generation %}`` block."""
        text = self._render(shown)
        return text[slice(*self._marked(shown, text)[i])]

    def _check_marked(self, shown: Conversation, i: int, block: str) -> None:
        """Raise if a turn that the template marks is not shown as it is where it ends the conversation."""
        turn = shown.messages[i]
        if i == len(shown.messages) - 1:
            return
        same = any(trim(turn["content"]) in block for trim in TRIMS)
        if same and self._may_show_more(turn):
            ends = upto(shown, i + 1)
            alone = self._block(ends, i)
            # What the template itself puts before every content (Qwen3's empty reasoning block) may be missing.
            lead = "" if alone == block else self._block(held(ends, [i]), i).partition(placeholder(i))[0]
            same = alone in (block, lead + block)
        if not same:
            raise _rewritten(i)

    def _render(self, shown: Conversation, template: Any = None, *, generation_prompt: bool = False) -> str:
        """Render what ``visible`` made."""
        if self._compiled is None:
            return "".join(m["content"] for m in shown.messages)
        from jinja2.exceptions import TemplateError, UndefinedError

        values = {
            **self.variables,
            "messages": shown.messages,
            "tools": shown.tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        try:
            return str((template or self._compiled).render(values))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            if isinstance(error, UndefinedError) and f"'{DATE}' is undefined" in str(error):
                raise RowError(_DATED) from error
            raise RowError(f"the chat template refuses this conversation ({error})") from error


def _rewritten(i: int) -> _Unlocated:
    return _Unlocated(
        f"the chat template does not show messages[{i}] as it was written (it rewrites earlier turns, say), so it cannot be "
        "masked exactly; set data.train_on=last_assistant, or give another template by model.chat_template"
    )


def _around(inside: Sequence[Span], length: int) -> list[Span]:
    """Return spans that cover a text: given ones, those of weight 0 left out, and what is between them at weight 1."""

    def pieces() -> Iterator[Span]:
        at = 0
        for span in inside:
            yield Span(at, span.start)
            yield span
            at = span.stop
        yield Span(at, length)

    return [span for span in pieces() if span.weight and (span.start < span.stop or not inside)]
