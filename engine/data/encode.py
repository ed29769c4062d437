"""From a conversation to samples: render, mask, tokenise, cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config.schema import RunConfig
from engine.data.conversation import Conversation, Dropped, Pair, RowError, Tokens, check
from engine.data.render import placeholder
from engine.data.template import Document, Span, Template
from engine.errors import UserError
from engine.types import Sample

COMPARED = 16
"""Texts whose tokens are compared with the tokenizer's own before its offsets are trusted."""


class Encoded(NamedTuple):
    """What became of a row."""

    samples: list[Sample]
    """Its documents in order, at least one; of a pair chosen and rejected."""
    cut: bool = False
    """Whether a document was cut to data.max_length."""
    split: bool = False
    """Whether the conversation became one sample a turn, as far as its template asks for that."""
    dropped: tuple[str, ...] = ()
    """Why documents of a split conversation are missing."""


class Tokenised(NamedTuple):
    """A text as tokens, T of them."""

    ids: NDArray[np.int32]
    """Token ids [T]."""
    weights: NDArray[np.float32]
    """Loss weight of each [T]; 0: not trained."""
    starts: NDArray[np.int64]
    """Its first character [T]."""
    stops: NDArray[np.int64]
    """The character behind its last [T]."""


class TokenMask:
    """Which tokens of a text hold characters of given spans.

    Offsets come from a copy of the tokenizer without its post-processor, which shortens them (ByteLevel and Roberta leave out
    spaces); a character that the tokenizer drops belongs to no token.

    Args:
        tokenizer: A fast tokenizer of transformers.

    Raises:
        UserError: If it is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{tokenizer.name_or_path}: not a fast tokenizer; exact masks need one with a tokenizer.json."
            )
        backend = tokenizer.backend_tokenizer
        self._own = tokenizer
        self._to_compare = COMPARED
        self._tokenizer = type(backend).from_str(backend.to_str())
        self._tokenizer.post_processor = None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = backend.encode_special_tokens

    def encode(self, text: str, spans: Sequence[Span]) -> Tokenised:
        """Tokenise a rendering.

        Args:
            text: The rendering, special tokens written out.
            spans: What carries loss; a token that holds characters of several takes the largest of their weights.

        Raises:
            UserError: If the tokenizer does not say which characters its tokens hold.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        places = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids))
        starts, stops = places[0::2].copy(), places[1::2].copy()
        if len(ids) and ((starts[1:] < starts[:-1]).any() or (stops < starts).any() or stops.max() > len(text)):
            raise self._not_exact("the places that it gives for its tokens are not in order")
        _part_bytes(text, encoding, starts, stops)
        if self._to_compare:
            self._to_compare -= 1
            if self._own(text, add_special_tokens=False, verbose=False)["input_ids"] != encoding.ids:
                raise self._not_exact("its tokenizer.json gives other tokens than itself")
        weights = np.zeros(len(ids), np.float32)
        for start, stop, weight in spans:
            if start < stop:
                first = int(starts.searchsorted(stop))  # of the tokens behind the span
                touched = weights[:first]
                touched[(stops[:first] > start) & (touched < weight)] = weight
        return Tokenised(ids, weights, starts, stops)

    def _not_exact(self, reason: str) -> UserError:
        return UserError(
            f"{self._own.name_or_path}: masks cannot be exact with this tokenizer ({reason}); set model.tokenizer to another."
        )


class Encoder:
    """Turns conversations, and pairs of them, into samples.

    Args:
        tokenizer: A fast tokenizer of transformers.
        template: "default" for the tokenizer's own, None to concatenate contents, or Jinja text.
        config: Its ``data``, ``algorithm.name`` and ``model.template_args``.

    Raises:
        UserError: If the tokenizer lacks what the recipe asks for.
    """

    def __init__(self, tokenizer: Any, template: str | None, config: RunConfig) -> None:
        variables = config.model.template_args
        self.template = self.tool_template = Template(tokenizer, template, variables)
        if template == "default" and isinstance(tokenizer.chat_template, dict):
            self.tool_template = Template(tokenizer, template, variables, tools=True)
        self.mask = TokenMask(tokenizer)
        self.data = config.data
        self.takes_pairs = config.algorithm.together == 2
        self.num_ids = len(tokenizer)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        for key, token in (("add_bos", self.bos), ("add_eos", self.eos)):
            if getattr(self.data, key) and token is None:
                raise UserError(f"data.{key}=true: the tokenizer in {tokenizer.name_or_path} has no such token.")

    def __call__(self, item: Conversation | Pair | Tokens) -> Encoded:
        """Encode a row.

        Raises:
            RowError: If it cannot be used, or its turns not masked exactly.
            Dropped: If nothing of it is left to train on; the reason is what is counted.
        """
        if isinstance(item, Pair) != self.takes_pairs:
            raise RowError(_NO_PAIR if self.takes_pairs else _PAIR)
        if isinstance(item, Pair):
            return self._pair(item)
        if isinstance(item, Tokens):
            sample, cut = self._tokens(item)
            return Encoded([sample], cut)
        check(item, self.data.train_on)
        documents = self._template(item).documents(item, self.data.train_on)
        samples: list[Sample] = []
        lost: list[Dropped | _NothingToTrain] = []
        cut = False
        for document in documents:
            try:
                tokens = self.mask.encode(document.text, document.spans)
                sample, was_cut = self._finish(
                    tokens.ids, tokens.weights, document.last_weight, (document.text, tokens)
                )
            except (Dropped, _NothingToTrain) as reason:
                lost.append(reason)
            else:
                samples.append(sample)
                cut |= was_cut
        if not samples:
            raise next((reason for reason in reversed(lost) if isinstance(reason, Dropped)), lost[-1])
        reasons = ("nothing to train" if isinstance(reason, _NothingToTrain) else str(reason) for reason in lost)
        return Encoded(samples, cut, len(documents) > 1, tuple(reasons))

    def _template(self, item: Conversation) -> Template:
        return self.template if item.tools is None else self.tool_template

    def _pair(self, pair: Pair) -> Encoded:
        """Encode a pair: of each side the final answer alone is trained, behind a prompt that both have."""
        documents = [self._side(side, name) for name, side in zip(Pair._fields, pair, strict=True)]
        prompts = [text[: spans[0].start if spans else len(text)] for text, spans, _ in documents]
        shorter, longer = sorted(prompts, key=len)  # Qwen3 puts an empty block before an answer without reasoning
        if not longer.startswith(shorter):
            raise RowError(
                "no common prompt after the template: it shows chosen and rejected differently before their answers; give another "
                "by model.chat_template"
            )
        samples, cuts = [], []
        for name, document in zip(Pair._fields, documents, strict=True):
            tokens = self.mask.encode(document.text, document.spans)
            try:
                sample, cut = self._finish(tokens.ids, tokens.weights, document.last_weight, (document.text, tokens))
            except RowError as error:
                raise RowError(f"{name}: {error}") from error
            samples.append(sample)
            cuts.append(cut)
        chosen, rejected = samples
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            raise Dropped("chosen and rejected are the same")
        return Encoded([chosen, rejected._replace(shared=_common_prompt(chosen, rejected))], any(cuts))

    def _side(self, side: Conversation, name: str) -> Document:
        """Return the rendering of one side of a pair."""
        for i, turn in enumerate(side.messages):
            for key in ("train", "weight"):
                if key in turn:
                    raise RowError(
                        f"{name}: messages[{i}].{key} has no meaning in a pair, whose final answers alone are trained; leave it out"
                    )
        if side.messages[-1]["role"] != "assistant":
            raise RowError(f"{name} must end with an assistant turn")
        try:
            (document,) = self._template(side).documents(side, "last_assistant")
        except RowError as error:
            reason = str(error).replace(_NOT_IN_PAIRS, "")
            raise RowError(f"{name}: {reason}") from error
        return document

    def _tokens(self, item: Tokens) -> tuple[Sample, bool]:
        """Return the sample of a row that came tokenised, and whether it was cut."""
        ids = np.asarray(item.input_ids, np.int64)
        weights = np.asarray(item.trained, np.float32)
        if len(ids) != len(weights):
            raise RowError(f"{len(ids)} tokens and a mask of {len(weights)}; both must have the same length")
        wrong = np.flatnonzero((ids < 0) | (ids >= self.num_ids))
        if len(wrong):
            raise RowError(
                f"token {wrong[0]} is {ids[wrong[0]]}, and the tokenizer has the ids 0 to {self.num_ids - 1}; tokenise with the "
                "model's own, or set model.tokenizer to the one that was used"
            )
        try:
            return self._finish(ids.astype(np.int32), weights, float(weights[-1:].sum()))
        except _NothingToTrain as error:
            raise Dropped("nothing to train") from error

    def _finish(
        self,
        ids: NDArray[np.int32],
        weights: NDArray[np.float32],
        last_weight: float,
        source: tuple[str, Tokenised] | None = None,
    ) -> tuple[Sample, bool]:
        """Add the tokens that begin and end a sample, and see to its length; returns it and whether it was cut.

        Args:
            ids: [T]
            weights: [T]
            last_weight: Of the token that ``data.add_eos`` adds.
            source: The text and its tokens, where there is one.
        """
        limit = self.data.max_length
        before = [self.bos] if self.data.add_bos and (not len(ids) or ids[0] != self.bos) else []
        after = [self.eos] if self.data.add_eos and (not len(ids) or ids[-1] != self.eos) else []
        length = len(before) + len(ids) + len(after)
        if not weights[0 if before else 1 :].any() and not (after and last_weight and length > 1):
            raise _NothingToTrain("nothing to train: no token of a trained turn is left after the template")
        cut = length > limit
        if cut:
            if self.data.overlong == "error":
                raise RowError(
                    f"{length} tokens, more than data.max_length={limit}; raise it, or set data.overlong=drop"
                )
            if self.data.overlong == "drop":
                raise Dropped(f"longer than {limit} tokens")
            keep = min(len(ids), limit - len(before))
            if source is not None:
                keep = self._whole(*source, keep)
            ids, weights, after = ids[:keep], weights[:keep], []
        if before or after:
            ids = np.concatenate([before, ids, after]).astype(np.int32)
            weights = np.concatenate([np.zeros(len(before)), weights, [last_weight] * len(after)]).astype(np.float32)
        if cut and not weights[1:].any():
            raise Dropped("nothing to train after the cut")
        return _sample(ids, weights), cut

    def _whole(self, text: str, tokens: Tokenised, keep: int) -> int:
        """Return how many tokens to keep so that the cut is inside neither a character nor a marker of the template."""
        while 0 < keep < len(tokens.ids):
            at = int(tokens.starts[keep])
            at = min((_begin(text, marker, at) for marker in self._markers), default=at)
            whole = keep
            while whole and tokens.stops[whole - 1] > at:
                whole -= 1
            if whole == keep:
                break
            keep = whole
        return keep

    @cached_property
    def _markers(self) -> list[str]:
        """What the templates write around contents and the tokenizer has no one token for."""
        marks = [placeholder(i) for i in range(4)]
        roles = ("user", "assistant") * 2
        text = ""
        for template in {self.template, self.tool_template}:
            with suppress(RowError):
                text += template.render([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]) + "\n"
        found = re.split("|".join([*marks, *map(re.escape, self.template.special), r"\s+"]), text)
        return sorted({word for word in found if len(word) > 1 and not word.isalnum()})


_NOT_IN_PAIRS = ", or set train: false on that message"
"""The end of sentences about a turn that cannot be masked."""
_NO_PAIR = (
    "algorithm=dpo needs pairs of a chosen and a rejected answer, and this row is none; give a data set of pairs (data=preference, "
    "binary_preference, …), or choose algorithm=sft"
)
_PAIR = (
    "this row is a pair of a chosen and a rejected answer; choose algorithm=dpo, or train on the chosen ones alone: "
    "data.reader=response data.input_key=prompt data.output_key=chosen, or, where they are whole conversations, "
    "data.reader=messages data.chat_key=chosen"
)


class _NothingToTrain(RowError):
    """A document without a trained token; others of its conversation may have some."""


def _sample(ids: NDArray[np.int32], weights: NDArray[np.float32]) -> Sample:
    """Return a sample from the weight of each token: ranges of equal weight."""
    changes = np.flatnonzero(weights[1:] != weights[:-1]) + 1
    edges = np.concatenate([[0], changes, [len(ids)]]).astype(np.int32)
    of_range = weights[edges[:-1]]
    trained = np.stack([edges[:-1], edges[1:]], 1)[of_range > 0]
    of_range = of_range[of_range > 0]
    return Sample(ids, trained, None if (of_range == 1).all() else of_range)


def _common_prompt(chosen: Sample, rejected: Sample) -> int:
    """Return how many leading tokens two documents have in common, none of them trained in either."""
    most = int(min(chosen.trained[0, 0], rejected.trained[0, 0]))
    different = chosen.input_ids[:most] != rejected.input_ids[:most]
    return int(different.argmax()) if different.any() else most


def _part_bytes(text: str, encoding: Any, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
    """Give each byte token of unknown characters in a row its own character; Unigram gives all of them the whole row."""
    same = starts[1:] == starts[:-1]
    if not same.any():
        return
    alike = np.flatnonzero(same & (stops[1:] == stops[:-1]) & (stops[1:] - starts[1:] > 1))
    tokens, done = encoding.tokens, 0
    for first in alike.tolist():
        start, stop = int(starts[first]), int(stops[first])
        sizes = [len(c.encode()) for c in text[start:stop]]
        last = first + sum(sizes)
        named = "".join(tokens[first:last]) == "".join(f"<0x{byte:02X}>" for byte in text[start:stop].encode())
        if first < done or not named:
            continue
        starts[first:last] = np.repeat(np.arange(start, stop), sizes)
        stops[first:last] = starts[first:last] + 1
        done = last


def _begin(text: str, marker: str, at: int) -> int:
    """Return where the marker begins that goes over position ``at``, or ``at``."""
    found = text.find(marker, max(0, at - len(marker) + 1), at + len(marker) - 1)
    return found if 0 <= found < at else at
