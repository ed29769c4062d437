"""Tokenised samples: of one source, as its cache folder holds them, and of a whole run.

A sample is a document: a conversation, or one turn of a conversation that its template rewrites as it goes on. Plans count
conversations; micro-batches hold documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.errors import UserError
from engine.types import Sample

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.int32()),
        "weights": pa.list_(pa.float32()),
        "length": pa.int32(),
        "shared": pa.int32(),
        "turn": pa.int32(),
        "row": pa.uint64(),
    }
)
"""A document a row: its tokens, ranges of trained ones, a weight for each range (none: all one), number of tokens, how many of
them are the prompt that it shares with the document before it, place among the documents of its conversation from 0, and a hash of
the conversation (or of the tree that it is a path of)."""


@dataclass(kw_only=True)
class Summary:
    """What became of the rows of a source."""

    format: str = ""
    read: int = 0
    used: int = 0
    documents: int = 0
    cut: int = 0
    split: int = 0
    bad: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0

    def sentence(self, name: str) -> str:
        """Return the figures as one line."""
        lost = "".join(f", {n:,} dropped ({reason})" for reason, n in self.dropped.items())
        bad = f", {self.bad:,} bad ones skipped" if self.bad else ""
        cut = f", {self.cut:,} cut" if self.cut else ""
        split = f", {self.split:,} made one sample a turn" if self.split else ""
        share = self.trained_tokens / max(1, self.tokens)
        return (
            f"{name}: {self.used:,} of {self.read:,} rows used{lost}{bad}{cut}{split}; {self.tokens:,} tokens, "
            f"{share:.1%} trained, longest {self.longest:,} (format {self.format})"
        )


class Samples:
    """The documents of one source, read from disk as they are asked for.

    Args:
        folder: A folder that ``cache.prepare`` made.

    Raises:
        UserError: If it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text())
            table = pa.ipc.open_file(pa.memory_map(str(folder / "samples.arrow"))).read_all()
            self.summary = Summary(**meta["summary"])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{folder}: not a whole cache of tokenised data ({error}); set data.cache=rebuild."
            ) from error
        self.folder: Path | None = folder
        self.fingerprint: str = meta["fingerprint"]
        """Hash of the tokens and of what is trained."""
        self.revision: str | None = meta["source"]["revision"]
        self.path: str = meta["source"]["path"]
        """Of its source, as the recipe has it."""
        self.lengths: NDArray[np.int32] = _column(table, "length", np.int32)
        self.shared: NDArray[np.int32] = _column(table, "shared", np.int32)
        self._columns = {
            name: [(view(chunk.offsets), view(chunk.values, dtype)) for chunk in table[name].chunks]
            for name, dtype in (("input_ids", np.int32), ("trained", np.int32), ("weights", np.float32))
        }
        self._starts = np.cumsum([0, *(len(chunk) for chunk in table["length"].chunks)])
        self._table = table

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Sample:
        chunk = int(np.searchsorted(self._starts, i, "right")) - 1
        row = i - int(self._starts[chunk])

        def cell(name: str) -> NDArray[Any]:
            offsets, values = self._columns[name][chunk]
            found: NDArray[Any] = values[offsets[row] : offsets[row + 1]]
            return found

        weights = cell("weights")
        return Sample(
            input_ids=cell("input_ids"),
            trained=cell("trained").reshape(-1, 2),
            weights=weights if len(weights) else None,
            shared=int(self.shared[i]),
        )

    @cached_property
    def firsts(self) -> NDArray[np.int64] | None:
        """The first document of each conversation, and the number of documents; None: each conversation is one document."""
        if self.summary.documents == self.summary.used:
            return None
        turns = _column(self._table, "turn", np.int32)
        return np.append(np.flatnonzero(turns == 0), len(turns))

    @cached_property
    def row_hashes(self) -> NDArray[np.uint64]:
        """A hash of each conversation [C], or of the tree of messages that it is a path of."""
        hashes: NDArray[np.uint64] = _column(self._table, "row", np.uint64)
        return hashes if self.firsts is None else hashes[self.firsts[:-1]]

    @property
    def num_conversations(self) -> int:
        """Number of conversations, C."""
        return len(self) if self.firsts is None else len(self.firsts) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One source of a data set.

    Attributes:
        name: In metrics.
        samples: Its documents.
        weight: Its share of the samples, relative to the other parts'; None: its size.
        kept: Its conversations that belong to this data set; None: all.
    """

    name: str
    samples: Samples
    weight: float | None = None
    kept: NDArray[np.int64] | None = None

    @property
    def num_conversations(self) -> int:
        """Number of conversations."""
        return self.samples.num_conversations if self.kept is None else len(self.kept)

    def documents(self, conversations: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the documents of some conversations, counted within this part."""
        own = conversations if self.kept is None else self.kept[conversations]
        firsts = self.samples.firsts
        if firsts is None:
            return own
        return np.concatenate([np.arange(firsts[c], firsts[c + 1]) for c in own.tolist()] or [own])


class DataSet:
    """What a run trains on, or validates on: sources one behind the other.

    Args:
        parts: At least one.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        lengths = [part.samples.lengths for part in parts]
        self.lengths = _joined(lengths)
        """Tokens of each document."""
        self.shared = _joined([part.samples.shared for part in parts])
        """Those of them that are the prompt of the document before it too."""
        self.reference: NDArray[np.float32] | None = None
        """Log-probability of each document's trained tokens under the reference, summed; NaN where it is not known."""
        self._documents = np.cumsum([0, *map(len, lengths)])
        self._conversations = np.cumsum([0, *(part.num_conversations for part in parts)])

    @classmethod
    def of(cls, samples: Samples) -> DataSet:
        """Return a data set of one source."""
        return cls([Part(name="", samples=samples)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> Sample:
        part = int(np.searchsorted(self._documents, document, "right")) - 1
        return self.parts[part].samples[document - int(self._documents[part])]

    @property
    def sizes(self) -> list[int]:
        """Conversations of each part."""
        return [part.num_conversations for part in self.parts]

    @property
    def weights(self) -> list[float] | None:
        """Weight of each part; None: as their sizes."""
        weights = [part.weight for part in self.parts]
        return [w for w in weights if w is not None] if None not in weights else None

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the data consists of."""
        if len(self.parts) == 1 and self.parts[0].kept is None:
            return self.parts[0].samples.fingerprint
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f"{part.name} {part.weight} {part.samples.fingerprint} ".encode())
            digest.update(b"all" if part.kept is None else part.kept.tobytes())
        return digest.hexdigest()[:24]

    def documents(self, conversations: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the documents of some conversations."""
        if len(self.parts) == 1:
            return self.parts[0].documents(conversations)
        part_of = self.part_of(conversations)
        return np.concatenate(
            [
                self._documents[p] + part.documents(conversations[part_of == p] - self._conversations[p])
                for p, part in enumerate(self.parts)
            ]
        )

    def split_documents(self, documents: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return some documents by part, counted within it."""
        part_of = self.part_of_document(documents)
        return [documents[part_of == p] - self._documents[p] for p in range(len(self.parts))]

    def part_of_document(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the part that each document belongs to."""
        return np.searchsorted(self._documents, documents, "right") - 1

    def part_of(self, conversations: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the part that each conversation belongs to."""
        return np.searchsorted(self._conversations, conversations, "right") - 1


def hold_out(part: Part, fraction: float) -> tuple[Part, Part]:
    """Divide a part into what is trained on and what is held out to validate on.

    A conversation's side follows from a hash of itself alone: it stays where it is when rows are added, conversations that are
    the same are on the same side, and so are all paths of a tree of messages.

    Args:
        part: All of a source.
        fraction: Share to be held out, about.
    """
    held = part.samples.row_hashes < np.uint64(fraction * 2.0**64)
    kept, out = np.flatnonzero(~held), np.flatnonzero(held)
    return (
        Part(name=part.name, samples=part.samples, weight=part.weight, kept=kept),
        Part(name=part.name, samples=part.samples, kept=out),
    )


def trained_positions(sample: Sample) -> NDArray[np.int64]:
    """Return the positions of the trained tokens; the first token of a document is never predicted."""
    ranges = [np.arange(max(a, 1), b) for a, b in sample.trained.tolist()]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def trained_weights(sample: Sample) -> NDArray[np.float32]:
    """Return the loss weights of the trained tokens."""
    starts, stops = sample.trained.T
    weights = np.ones(len(starts), np.float32) if sample.weights is None else sample.weights
    return np.repeat(weights, np.maximum(stops - np.maximum(starts, 1), 0))


def view(array: pa.Array, dtype: type = np.int32) -> NDArray[Any]:
    """Return an array of numbers as a view of the mapped file (``to_numpy`` would import pandas)."""
    buffer = array.buffers()[1]
    if buffer is None:
        return np.zeros(0, dtype)
    found: NDArray[Any] = np.frombuffer(buffer, dtype)[array.offset : array.offset + len(array)]
    return found


def _joined(arrays: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _column(table: pa.Table, name: str, dtype: type) -> NDArray[Any]:
    return np.concatenate([view(chunk, dtype) for chunk in table[name].chunks])
