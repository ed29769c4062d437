"""Log-probabilities of the reference, computed once: before training, from the weights it starts from, for every document it sees.

They are kept beside the tokenised samples, a record a document, under a key of all that can change them: weights, tokens and
masks, the kind of arithmetic. A record holds its own check, so that an interrupted pass goes on where it was, a damaged file is
mended, and runs of a sweep share one pass.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config.schema import RunConfig
from engine.data.batch import collate_packed
from engine.data.cache import cache_root
from engine.data.loader import Loader
from engine.data.plan import assign
from engine.data.samples import Part, Samples
from engine.errors import RunError
from engine.ranks import Ranks
from engine.types import Backend

FORMAT = 1
"""Raised whenever the meaning of a record changes."""
CHUNK = 256
"""Documents a rank between two writings."""
RECORD = np.dtype([("sum", "<f4"), ("check", "<u4")])

Say = Callable[[str], None]


class Wanted(NamedTuple):
    """What a run needs of one source.

    Attributes:
        loader: Where its documents are, and how long a micro-batch may be.
        part: Number of the source in the loader's data.
        documents: Counted within the source, in order, each once.
    """

    loader: Loader
    part: int
    documents: NDArray[np.int64]


class Store:
    """The records of one source on disk.

    Args:
        file: Made if there is none.
        size: Number of documents.
        key: What they are of; a record of anything else does not pass its check.
    """

    def __init__(self, file: Path, size: int, key: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            stream.truncate(size * RECORD.itemsize)
        self._records = np.memmap(file, RECORD, "r+", shape=(size,))
        self._salt = np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))

    def read(self, documents: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the sums of some documents; NaN where there is none, or a damaged one."""
        records = self._records[documents]
        sums = np.where(records["check"] == self._check(documents, records["sum"]), records["sum"], np.float32(np.nan))
        return sums.astype(np.float32)

    def write(self, documents: NDArray[np.int64], sums: NDArray[np.float32]) -> None:
        """Keep the sums of some documents, and see them to the disk."""
        self._records[documents] = np.rec.fromarrays([sums, self._check(documents, sums)], dtype=RECORD)
        self._records.flush()

    def _check(self, documents: NDArray[np.int64], sums: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Mix key, document and bits of the sum; never 0, which is what a file begins with."""
        bits = np.ascontiguousarray(sums, np.float32).view(np.uint32).astype(np.uint64)
        x = (bits << np.uint64(32)) ^ documents.astype(np.uint64) ^ self._salt
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return (x >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def attach(
    config: RunConfig,
    weights: str,
    backend: Callable[[], Backend],
    loaders: Sequence[tuple[Loader, Iterable[int]]],
    scratch: Path,
    ranks: Ranks,
    say: Say,
) -> None:
    """Give each loader's data the reference's log-probabilities of the documents of some steps; all ranks call.

    Args:
        config: The recipe.
        weights: Fingerprint of the reference's weights.
        backend: Holds them; asked for only if something is to be computed.
        loaders: Each with the steps that the run will see.
        scratch: Folder of the records with ``data.cache=off``.
        ranks: Who takes part.
        say: Told what is computed and what is there.

    Raises:
        RunError: If a log-probability is not finite.
    """
    root = scratch if config.data.cache == "off" else cache_root(config.data.cache_dir)
    for loader, steps in loaders:
        data = loader.data
        data.reference = np.full(len(data), np.nan, np.float32)
        seen = np.unique(np.concatenate([loader.documents(step) for step in steps] or [np.zeros(0, np.int64)]))
        start = 0
        for number, (part, documents) in enumerate(zip(data.parts, data.split_documents(seen), strict=True)):
            key = _key(config, weights, part.samples, ranks.device.type)
            found = _sums(Wanted(loader, number, documents), root / "reference" / key, key, backend, ranks, say)
            data.reference[start + documents] = found
            start += len(part.samples)


def _sums(
    wanted: Wanted, folder: Path, key: str, backend: Callable[[], Backend], ranks: Ranks, say: Say
) -> NDArray[np.float32]:
    """Return the sums of the wanted documents, from the store or computed now."""
    part = wanted.loader.data.parts[wanted.part]
    with _locked(folder, ranks, say):
        store = Store(folder / "sums.bin", len(part.samples), key) if ranks.main else None
        known = ranks.first(lambda: store.read(wanted.documents) if store else None)
        assert known is not None
        todo = wanted.documents[np.isnan(known)]
        if not len(todo):
            say(f"reference: all {len(known):,} log-probabilities of {part.name} are there")
            return known
        say(f"reference: computing {len(todo):,} of {len(known):,} log-probabilities of {part.name}")
        model = backend()
        for first in range(0, len(todo), CHUNK * ranks.size):
            chunk = todo[first : first + CHUNK * ranks.size]
            sums = _compute(model, wanted.loader, part, chunk, ranks)
            if store is not None:
                store.write(chunk, sums)
        found = ranks.first(lambda: store.read(wanted.documents) if store else None)
        assert found is not None
        return found


def _compute(
    backend: Backend, loader: Loader, part: Part, documents: NDArray[np.int64], ranks: Ranks
) -> NDArray[np.float32]:
    """Return the sums of some documents, each rank having computed its share."""
    lengths = part.samples.lengths[documents]
    capacity = loader.capacity or int(lengths.max()) * loader.micro_batch_size * loader.together
    groups = assign(lengths, capacity=capacity, ranks=ranks.size, attention_length=loader.attention_length)[ranks.rank]
    mine = [
        backend.sequence_logprobs(
            collate_packed([part.samples[int(documents[i])]._replace(shared=0) for i in group])
        ).tolist()
        for group in groups
    ]
    sums = np.full(len(documents), np.nan, np.float32)
    for of_rank in ranks.gather([(group, own[: len(group)]) for group, own in zip(groups, mine, strict=True)]):
        for group, own in of_rank:
            sums[group] = own
    if not np.isfinite(sums).all():
        worst = int(documents[~np.isfinite(sums)][0])
        raise RunError(
            f"reference: the log-probability of answer {worst} of {part.name} is not finite; look at the weights."
        )
    return sums


@contextmanager
def _locked(folder: Path, ranks: Ranks, say: Say) -> Iterator[None]:
    """Keep other runs from computing the same."""

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        held.append((folder / ".lock").open("a"))
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another run that computes the same reference")
            fcntl.flock(held[0], fcntl.LOCK_EX)

    held: list = []  # type: ignore[type-arg]
    try:
        ranks.first(take)
        yield
    finally:
        for lock in held:
            lock.close()


def _key(config: RunConfig, weights: str, samples: Samples, device: str) -> str:
    """Return the hash of all that can change a log-probability."""
    model = config.model
    parts = [FORMAT, weights, samples.fingerprint, len(samples), device, model.dtype, model.config_overrides]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
