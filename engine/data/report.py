"""What the data of a run is like, told before it trains: rows by fate, lengths, trained share, packing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.data.assemble import Data
from engine.data.build import BAD_ROWS
from engine.data.loader import Loader
from engine.data.samples import Samples

QUANTILES = (0.05, 0.5, 0.95, 0.99)
BINS, WIDTH = 20, 50
PADDED = 8
"""Samples of the padded batches that packing is compared with."""
STEPS = 16
"""Steps whose packing is looked at."""


class Packing(NamedTuple):
    """How full the micro-batches of the first steps are."""

    steps: int
    micro_batches: int
    filled: float
    """Share of the room in packed micro-batches that is used; 0 for padded ones."""
    padding: float
    """Share of padding in these micro-batches; 0 for packed ones."""
    padded: float
    """Share of padding in padded batches of PADDED samples, taken in the same order."""
    shared: float
    """Share of the tokens that are the prompt of another answer too, and do not go through the model again."""


def write(folder: Path, data: Data, train: Loader) -> None:
    """Write data.txt, and the rows that were skipped, to the run folder."""
    (folder / "data.txt").write_text(text(data, train), encoding="utf-8")
    skipped = [s for s in data.sources.values() if s.summary.bad and s.folder is not None]
    if skipped:
        with (folder / BAD_ROWS).open("wb") as out:
            for samples in skipped:
                assert samples.folder is not None
                with (samples.folder / BAD_ROWS).open("rb") as listed:
                    shutil.copyfileobj(listed, out)


def text(data: Data, train: Loader) -> str:
    """Return the report as plain text."""
    blocks = [f"{samples.summary.sentence(name)}\n{_lengths(samples)}" for name, samples in data.sources.items()]
    found = packing(train)
    if train.capacity is None:
        how = f"{found.micro_batches} padded micro-batches, {found.padding:.1%} padding"
    else:
        saved = f", {found.shared:.1%} of the tokens left out as prompts that pairs share" if found.shared else ""
        how = (
            f"{found.micro_batches} packed micro-batches without padding, {found.filled:.1%} of {train.capacity:,} tokens "
            f"filled{saved}; padded batches of {PADDED} in the same order would be {found.padded:.1%} padding"
        )
    blocks.append(f"first {found.steps} of {train.plan.steps_per_epoch:,} steps an epoch: {how}\n")
    return "\n".join(blocks)


def packing(train: Loader) -> Packing:
    """Measure the micro-batches of the first steps; reads lengths alone."""
    steps = min(STEPS, train.plan.steps_per_epoch)
    tokens, needed, places, padded, count = 0, 0, 0, 0, 0
    for step in range(steps):
        documents = train.documents(step)
        lengths, whole = train.lengths[documents], train.data.lengths[documents]
        tokens, needed = tokens + int(lengths.sum()), needed + int(whole.sum())
        groups = [whole[a : a + PADDED] for a in range(0, len(whole), PADDED)]
        padded += sum(len(group) * int(group.max()) for group in groups)
        bins = [lengths[group] for rank in train.assign(documents) for group in rank if group]
        count += len(bins)
        places += sum(len(b) * int(b.max()) for b in bins)
    packed = train.capacity is not None
    return Packing(
        steps=steps,
        micro_batches=count,
        filled=tokens / (count * train.capacity) if train.capacity is not None else 0.0,
        padding=0.0 if packed else 1 - tokens / places,
        padded=1 - needed / padded,
        shared=1 - tokens / needed,
    )


def histogram(lengths: NDArray[np.integer]) -> list[tuple[int, int, int]]:
    """Return first and last length and number of documents of each bar, from the first that has any."""
    longest = int(lengths.max())
    width = max(1, -(-longest // BINS))
    counts = np.bincount((lengths.astype(np.int64) - 1) // width, minlength=-(-longest // width))
    first = int(np.flatnonzero(counts)[0])
    return [(b * width + 1, (b + 1) * width, int(n)) for b, n in enumerate(counts)][first:]


def quantiles(lengths: NDArray[np.integer]) -> list[int]:
    """Return the QUANTILES of the lengths."""
    return [int(q) for q in np.quantile(lengths, QUANTILES, method="lower")]


def _lengths(samples: Samples) -> str:
    """Return the lengths of a source's documents: quantiles and a histogram."""
    lengths = np.asarray(samples.lengths)
    names = ", ".join(f"{q:.0%} up to {n:,}" for q, n in zip(QUANTILES, quantiles(lengths), strict=True))
    bars = histogram(lengths)
    most = max(n for _, _, n in bars)
    lines = [f"tokens a document: {names}, all up to {int(lengths.max()):,}"]
    lines += [f"{a:>8,} – {b:>8,} {n:>10,} {'█' * round(WIDTH * n / most)}".rstrip() for a, b, n in bars]
    return "\n".join(lines) + "\n"
