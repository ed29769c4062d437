"""Log-probabilities of the reference, computed once: before training, from the weights it starts from, for every document it sees.

They are kept beside the tokenised samples, a record a document, under a key of all that can change them: weights, tokens and
masks, the code and the kind of arithmetic. An interrupted pass goes on where it was, runs of a sweep share one, and what is there
is held against a few documents computed again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine import fingerprint, hub
from engine.config.schema import RunConfig
from engine.data import cache
from engine.data.loader import Loader
from engine.data.samples import Part, Samples
from engine.errors import RunError
from engine.ranks import Ranks
from engine.reference.store import FOLDER, Store, describe
from engine.types import Scorer

FORMAT = 2
"""Raised whenever the meaning of a record changes."""
CHUNK = 256
"""Documents a data-parallel rank between two writings."""
CHECKED = 3
"""Conversations whose log-probabilities are computed again where they are there."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference, in units of max(1, |sum|), that another grouping of the same documents explains.

bfloat16 keeps eight bits, 0.4 %: the log-probability of a token moves by some hundredths with the shape of its batch. Of an answer
of a few tokens that is up to some percent; over many tokens it cancels for the most part.
"""
PERIOD_S = 30.0
"""Time between two lines of progress."""
LIBRARIES = ("torch", "transformers", "flash-attn", "flash-attn-3", "triton", "liger-kernel", "megatron-core")
COMPUTED_BY = (fingerprint.ROOT / "engine" / "backends", fingerprint.ROOT / "kernels")
"""The code that a log-probability is a matter of."""

Say = Callable[[str], None]


class Wanted(NamedTuple):
    """What a run needs of one source.

    Attributes:
        loader: Makes micro-batches of its documents.
        part: The source in the loader's data.
        first: Number of its first document there.
        documents: Whole conversations, counted within the source, in order, each document once, [D].
    """

    loader: Loader
    part: Part
    first: int
    documents: NDArray[np.int64]


def attach(
    config: RunConfig,
    weights: str,
    scorer: Callable[[], Scorer],
    loaders: Sequence[tuple[Loader, Iterable[int]]],
    scratch: Path,
    ranks: Ranks,
    say: Say,
) -> None:
    """Give each loader's data the reference's log-probabilities of the documents of some steps; all ranks call.

    Args:
        config: The recipe of the reference: its model, and how the run computes and keeps.
        weights: Fingerprint of its weights.
        scorer: Returns the model that has them, the same each time.
        loaders: Each with the steps that the run will see.
        scratch: Folder of the records with ``data.cache=off``.
        ranks: Who takes part.
        say: Told what is computed and what is there.

    Raises:
        RunError: If a log-probability is not finite, or the disk is full.
        UserError: If records cannot be read or written.
    """
    root = scratch if config.data.cache == "off" else cache.cache_root(config.data.cache_dir)
    held = _Pass(config=config, weights=weights, scorer=scorer, root=root, ranks=ranks, say=say)
    for loader, steps in loaders:
        data = loader.data
        sums = np.full(len(data), np.nan, np.float32)
        seen = np.unique(np.concatenate([loader.documents(step) for step in steps] or [np.zeros(0, np.int64)]))
        first = 0
        for part, documents in zip(data.parts, data.split_documents(seen), strict=True):
            if len(documents):
                sums[first + documents] = held.sums(Wanted(loader, part, first, documents))
            first += len(part.samples)
        data.reference = sums


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """The reference of one run, and where its log-probabilities are kept."""

    config: RunConfig
    weights: str
    scorer: Callable[[], Scorer]
    root: Path
    ranks: Ranks
    say: Say
    fresh: set[Path] = field(default_factory=set)
    """Folders that this run has made anew, because its recipe says so."""

    def sums(self, wanted: Wanted) -> NDArray[np.float32]:
        """Return the sums of the wanted documents: what is there, if it is this model's, and the rest computed now."""
        samples = wanted.part.samples
        key = self._key(samples)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        store = Store(self.root / FOLDER / name, len(samples))
        anew = self.config.data.cache == "rebuild" and store.folder not in self.fresh
        if not anew:
            known = self._read(store, wanted)
            if np.isfinite(known).all() and self._fault(wanted, known) is None:
                return self._taken(store, wanted, known)
        with ExitStack() as lock:
            self.ranks.first(lambda: lock.enter_context(self._locked(store)))
            known = self._read(store, wanted)
            fault = None if anew else self._fault(wanted, known)
            if np.isfinite(known).all() and not anew and fault is None:  # computed by another run in the meantime
                return self._taken(store, wanted, known)
            if fault is not None:
                self.say(f"reference: {store.file} is stale ({fault}); all that is needed of it is computed again")
            meta = describe(self.config.model.path, samples.path, int(samples.lengths.sum()), len(samples), key)
            self.ranks.first(lambda: self._begin(store, meta, clear=anew or fault is not None))
            self.fresh.add(store.folder)
            self._complete(store, wanted)
            known = self._read(store, wanted)
        if not np.isfinite(known).all():
            raise RunError(f"{store.file}: does not keep what is written to it; choose another data.cache_dir.")
        return known

    def _begin(self, store: Store, meta: dict[str, Any], *, clear: bool) -> None:
        """Make the records ready to be written, by the first rank."""
        store.begin(meta)
        if clear:
            store.clear()
        _, damaged = store.count()
        if damaged:
            records = f"{damaged:,} record{'s' * (damaged > 1)}"
            self.say(f"reference: {records} in {store.file} that are damaged or another model's do not count")

    def _complete(self, store: Store, wanted: Wanted) -> None:
        """Compute the conversations of which a record is missing, and keep them as they come."""
        together, name = wanted.loader.together, wanted.part.name
        missing = ~np.isfinite(self._read(store, wanted))
        groups = np.flatnonzero(missing.reshape(-1, together).any(1))
        total, started = len(groups) * together, time.monotonic()
        self.say(f"reference: computing {total:,} of {len(missing):,} log-probabilities of {name}")
        said, size = started, max(1, CHUNK // together) * wanted.loader.ranks
        for first in range(0, len(groups), size):
            documents = wanted.documents.reshape(-1, together)[groups[first : first + size]].ravel()
            sums = self._compute(wanted, documents)
            self.ranks.first(partial(store.write, documents, sums))
            now, done = time.monotonic(), first * together + len(documents)
            if now - said >= PERIOD_S and done < total:
                said, rate = now, done / (now - started)
                self.say(f"reference: {done:,} of {total:,} ({done / total:.0%}), {rate:,.0f} a second")
        self.ranks.first(store.sync)
        self.say(f"reference: {total:,} log-probabilities of {name} computed in {time.monotonic() - started:.1f} s")

    def _fault(self, wanted: Wanted, known: NDArray[np.float32]) -> str | None:
        """Compute a few of the known sums again, and say what differs; None: nothing, or none is known."""
        together = wanted.loader.together
        groups = np.flatnonzero(np.isfinite(known).reshape(-1, together).all(1))
        if not len(groups):
            return None
        chosen = groups[np.unique(np.linspace(0, len(groups) - 1, CHECKED).astype(np.int64))]
        at = (chosen[:, None] * together + np.arange(together)).ravel()
        now = self._compute(wanted, wanted.documents[at])
        gaps = np.abs(known[at] - now) / np.maximum(1.0, np.abs(now))
        worst = int(gaps.argmax())
        if gaps[worst] <= TOLERANCE[self.scorer().dtype]:
            return None
        return f"answer {wanted.documents[at[worst]]} of {wanted.part.name}: {known[at[worst]]:.4f}, and now {now[worst]:.4f}"

    def _compute(self, wanted: Wanted, documents: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the sums of whole conversations, each data-parallel rank having computed its share."""
        scorer = self.scorer()
        batches = wanted.loader.batches(wanted.first + documents, apart=self.config.run.deterministic)
        found = scorer.score([batch for _, batch in batches])
        own = np.zeros(len(documents))
        for (at, _), sums_S in zip(batches, found, strict=True):
            own[at] = sums_S.tolist()
        sums = np.array(self.ranks.sum(own.tolist(), self.ranks.size // wanted.loader.ranks), np.float32)
        if not np.isfinite(sums).all():
            worst = int(documents[~np.isfinite(sums)][0])
            raise RunError(
                f"reference: the log-probability of answer {worst} of {wanted.part.name} is not finite; look at the weights."
            )
        return sums

    def _read(self, store: Store, wanted: Wanted) -> NDArray[np.float32]:
        return self.ranks.first(lambda: store.read(wanted.documents))

    def _taken(self, store: Store, wanted: Wanted, known: NDArray[np.float32]) -> NDArray[np.float32]:
        """Say that all is there."""
        self.ranks.first(store.used)
        self.say(f"reference: all {len(known):,} log-probabilities of {wanted.part.name} are there")
        return known

    @contextmanager
    def _locked(self, store: Store) -> Iterator[None]:
        """Keep other runs from computing the same."""
        with ExitStack() as held:
            with cache.writable(self.root):
                held.enter_context(cache.locked(store.folder, "computes the same reference", self.say))
            yield

    def _key(self, samples: Samples) -> dict[str, Any]:
        """Return all that can change a log-probability."""
        config, model = self.config, self.config.model
        return {
            "format": FORMAT,
            "weights": self.weights,
            "data": [samples.fingerprint, len(samples)],
            "model": [model.dtype, model.attention, model.liger, model.compile, model.config_overrides],
            "remote_code": self._remote_code() if model.trust_remote_code else None,
            "backend": [config.backend.name, config.backend.transformer_config],
            "device": self.ranks.device.type,
            "code": fingerprint.code(COMPUTED_BY),
            "libraries": fingerprint.versions(LIBRARIES),
            "apart": config.run.deterministic and ("packed" if config.data.packing.enabled else "padded"),
        }

    def _remote_code(self) -> list[tuple[str, str]]:
        """Return the files of code that the model brings, each with its hash."""
        folder = hub.folder(self.config.model.path, self.config.model.revision, weights=False)
        return sorted((f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in folder.glob("*.py"))
