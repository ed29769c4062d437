"""What a preview shows: the data, its first conversations in pieces that can be read, the micro-batches of the first steps."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from engine import hub
from engine.config import sources
from engine.config.compose import Composed
from engine.config.layout import Layout, named_ranks
from engine.config.schema import DataSection, RunConfig
from engine.data.assemble import Data, assemble
from engine.data.build import BAD_ROWS
from engine.data.cache import Say
from engine.data.loader import Loader, train_loader
from engine.data.samples import Samples, trained_positions, trained_weights
from engine.errors import UserError
from engine.types import Sample

ROWS = 1_000
"""Rows of each source that are looked at unless all are asked for."""
PACKED_STEPS, MOST_BINS = 2, 16
"""Steps whose micro-batches are shown, and how many of each."""
MOST_BAD_SHOWN = 5
MOST_TOKENS_A_PIECE = 16
LINE_END = "↵"
JOINERS = ("\u200c", "\u200d")
BLANKS = re.compile(r"\A[ \t]+|[ \t]+(?=\r?\n|\Z)")

Signed = list[tuple[str, bool]]
"""Stretches of a text, and whether each is a sign for what cannot be seen."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of tokens that decodes to whole characters: mostly one.

    Attributes:
        ids: The tokens.
        text: What they decode to, behind the tokens before them.
        weight: Loss weight; None: not trained.
        special: Whether it is one of the tokenizer's added tokens, or an id that the tokenizer does not have.
    """

    ids: tuple[int, ...]
    text: str
    weight: float | None
    special: bool = False


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document to be shown: which one it is, how many tokens it has and trains, and its tokens."""

    title: str
    num_tokens: int
    num_trained: int
    pieces: list[Piece]

    @property
    def counts(self) -> str:
        """How many tokens it has, and how many are trained."""
        share = self.num_trained / max(1, self.num_tokens)
        return f"{self.num_tokens:,} tokens, {self.num_trained:,} trained ({share:.1%})"


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A micro-batch.

    Attributes:
        title: Which one it is.
        capacity: Tokens that it has room for; with padding, its places.
        lengths: Tokens of each document.
        parts: Number of each document's source.
    """

    title: str
    capacity: int
    lengths: list[int]
    parts: list[int]

    @property
    def figures(self) -> str:
        """How full it is, and of what."""
        count = len(self.lengths)
        return f"{sum(self.lengths):,} of {self.capacity:,} places, {count} document{'s' * (count != 1)}"


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is shown.

    Attributes:
        composed: The recipe.
        all_rows: Whether every row was read.
        data: The tokenised data.
        train: The training data's loader; on rank 0 of as many ranks as the recipe names.
        documents: Of the first conversations.
        steps: Number of micro-batches of each of the first steps, and the first of them.
    """

    composed: Composed
    all_rows: bool
    data: Data
    train: Loader
    documents: list[Document]
    steps: list[tuple[int, list[Bin]]]

    @property
    def origin(self) -> str:
        """Say which rows this is from."""
        if self.all_rows:
            return "all rows of each source"
        return f"the first {ROWS:,} rows of each source, or all where there are fewer; --all reads every row"


def look(composed: Composed, scratch: Path, *, num: int = 3, all_rows: bool = False, say: Say = print) -> Look:
    """Tokenise a recipe's data, or the beginning of it, and take out what is shown.

    Args:
        composed: The recipe.
        scratch: Folder of the samples; the recipe's own cache has them with ``all_rows``, unless it is off.
        num: Conversations to show.
        all_rows: Read every row, not only the first of each source.
        say: Told what the report does not tell.

    Raises:
        UserError: For a row that cannot be used, or if nothing is left to train.
    """

    def tell(text: str) -> None:
        if "(format " not in text:  # a source's sentence, which the report has
            say(text)

    data, train = (_all_rows if all_rows else _first_rows)(composed.config, scratch, tell)
    tokenizer = hub.load_tokenizer(composed.config.model)
    documents = []
    for i, conversation in enumerate(islice(_in_turn(train), num)):
        numbers = train.data.documents(np.array([conversation])).tolist()
        part = train.data.parts[int(train.data.part_of(np.array([conversation]))[0])]
        for turn, number in enumerate(numbers):
            title = f"conversation {i + 1}" + (f", turn {turn + 1} of {len(numbers)}" if len(numbers) > 1 else "")
            title += f" from {part.name}" if len(train.data.parts) > 1 else ""
            sample = train.data[number]
            documents.append(
                Document(
                    title=title,
                    num_tokens=len(sample.input_ids),
                    num_trained=len(trained_positions(sample)),
                    pieces=pieces(tokenizer, sample),
                )
            )
    steps = [bins(train, step) for step in range(min(PACKED_STEPS, train.plan.steps_per_epoch))]
    shown = [(len(found), found[:MOST_BINS]) for found in steps]
    return Look(composed=composed, all_rows=all_rows, data=data, train=train, documents=documents, steps=shown)


def _all_rows(config: RunConfig, scratch: Path, say: Say) -> tuple[Data, Loader]:
    """Return a recipe's data, and the loader of what is trained on for as many ranks as the recipe names."""
    data = assemble(config, scratch, say)
    layout = Layout.of(config.backend, named_ranks(config.cluster) or 1)
    return data, train_loader(
        data.train,
        config.data,
        batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
        ranks=layout.data,
        attention_length=hub.attention_length(config.model),
        together=config.algorithm.together,
    )


def _first_rows(config: RunConfig, scratch: Path, say: Say) -> tuple[Data, Loader]:
    """Return the same of the first rows of each source."""
    first = config.model_copy(update={"data": _limited(config.data)})
    try:
        return _all_rows(first, scratch, say)
    except UserError:  # perhaps since so few rows leave nothing to hold out, or fill no batch
        lenient = first.data.model_copy(update={"val_fraction": 0.0, "drop_last": False})
        found = _all_rows(first.model_copy(update={"data": lenient}), scratch, say)
        if all(part.samples.summary.read < ROWS for part in found[0].train.parts):
            raise  # all rows were read
        return found


def _limited(data: DataSection) -> DataSection:
    """Return a recipe's data with the first rows of each source alone, tokenised here and now."""

    def least(limit: int | None) -> int:
        return min(limit or ROWS, ROWS)

    listed = {
        split: [source.model_copy(update={"limit": least(source.limit)}) for source in getattr(data, split)]
        for split in sources.LISTS
    }
    return data.model_copy(update={"limit": least(data.limit), "cache": "off", "num_workers": 1, **listed})


def _in_turn(train: Loader) -> Iterator[int]:
    """Yield the conversations of the first epoch step by step; those of several sources take turns within a step."""
    for step in range(train.plan.steps_per_epoch):
        members = train.plan.members(step)
        parts = train.data.part_of(members)  # in ascending order
        turns = np.arange(len(parts)) - np.searchsorted(parts, parts)
        yield from members[np.argsort(turns, kind="stable")].tolist()


def bins(train: Loader, step: int) -> list[Bin]:
    """Return the micro-batches of all ranks in a step, counted from 0; reads lengths alone."""
    documents = train.documents(step)
    ends = np.cumsum([len(part.samples) for part in train.data.parts])
    parts = np.searchsorted(ends, documents, "right")
    lengths = train.lengths[documents]
    found = []
    for rank, groups in enumerate(train.assign(documents)):
        for number, group in enumerate(groups):
            own = lengths[group].tolist()
            found.append(
                Bin(
                    title=(f"rank {rank}, " if train.ranks > 1 else "") + f"micro-batch {number + 1}",
                    capacity=train.capacity or len(own) * max(own, default=0),
                    lengths=own,
                    parts=parts[group].tolist(),
                )
            )
    return found


def bad_rows(samples: Samples) -> list[dict[str, str]]:
    """Return place and reason of the first rows of a source that were skipped."""
    if samples.folder is None or not samples.summary.bad:
        return []
    with (samples.folder / BAD_ROWS).open(encoding="utf-8") as stream:
        return [json.loads(line) for line in islice(stream, MOST_BAD_SHOWN)]


def pieces(tokenizer: Any, sample: Sample) -> list[Piece]:
    """Decode a document piece by piece; put together, the texts are what the tokenizer makes of the whole.

    A piece is the difference that its tokens make to the text before them, so a SentencePiece token has its leading space
    where the text has one. Tokens go together until they make whole characters and no sign that belongs to the one before.

    Args:
        tokenizer: The tokenizer that made the ids.
        sample: The document.
    """
    ids, size = sample.input_ids.tolist(), len(tokenizer)
    weights: list[float | None] = [None] * len(ids)
    for i, weight in zip(trained_positions(sample).tolist(), trained_weights(sample).tolist(), strict=True):
        weights[i] = round(weight, 6)
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    special |= {number: f"⟨{number}⟩" for number in ids if number >= size}
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    out: list[Piece] = []
    before, start = 0, 0  # what is decoded begins one piece earlier than what is new
    while start < len(ids):
        stop, text = start + 1, special.get(ids[start])
        known = decode(ids[before:start])
        while text is None:
            whole = decode(ids[before:stop])
            text = whole[len(known) :] if whole.startswith(known) else decode(ids[start:stop])
            more = stop < min(len(ids), start + MOST_TOKENS_A_PIECE) and weights[stop] == weights[start]
            if (not text or text.endswith("\ufffd")) and more and ids[stop] not in special:
                stop, text = stop + 1, None
        piece = Piece(
            ids=tuple(ids[start:stop]),
            text=text or decode(ids[start:stop]),  # the second half of no character, say
            weight=weights[start],
            special=ids[start] in special,
        )
        if out and _joins(out[-1], piece):
            out[-1] = replace(out[-1], ids=out[-1].ids + piece.ids, text=out[-1].text + piece.text)
        else:
            out.append(piece)
            before = start
        start = stop
    return out


def _joins(last: Piece, piece: Piece) -> bool:
    """Tell whether a piece begins with what belongs to the character before it (an accent, the next part of an emoji)."""
    if last.special or piece.special or last.weight != piece.weight or not piece.text:
        return False
    first = piece.text[0]
    joined = first in JOINERS or last.text.endswith("\u200d")
    return joined or unicodedata.category(first).startswith("M") or "\U0001f3fb" <= first <= "\U0001f3ff"


def runs(document: Sequence[Piece]) -> list[tuple[float | None, list[tuple[Piece, Signed]]]]:
    """Return the runs of one mask: the loss weight of each, and its pieces with their signed texts."""
    pairs = zip(document, signed(document), strict=True)
    return [(weight, list(run)) for weight, run in groupby(pairs, key=lambda pair: pair[0].weight)]


def signed(document: Sequence[Piece]) -> list[Signed]:
    """Return the text of each piece with signs for what cannot be seen.

    Each line's end has a ↵ before it. Blanks at a line's end, and at both ends of a run of one mask between special tokens,
    are · and ⇥; other control and format characters are shown by symbol or number, so that none reaches a terminal.
    """
    found: list[Signed] = []
    for _, run in groupby(document, key=lambda p: (p.weight, p.special)):
        texts = [piece.text for piece in run]
        joined = "".join(texts)
        blanks = {i for match in BLANKS.finditer(joined) for i in range(*match.span())}
        chars = iter([_signed(char, i in blanks) for i, char in enumerate(joined)])
        for text in texts:
            parts = [part for char in islice(chars, len(text)) for part in char]
            same = groupby(parts, key=itemgetter(1))
            found.append([("".join(part for part, _ in stretch), is_sign) for is_sign, stretch in same])
    return found


def _signed(char: str, unseen: bool) -> Signed:
    """Return what is shown for a character."""
    code = ord(char)
    if char == "\n":
        return [(LINE_END, True), (char, False)]
    if unseen:
        return [("·" if char == " " else "⇥", True)]
    if char == "\t" or char in JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp", "Cs"):
        return [(char, False)]
    return [(chr(0x2400 + code) if code < 32 else "␡" if code == 127 else f"⟨U+{code:04X}⟩", True)]
