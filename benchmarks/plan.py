"""The plan: milliseconds to know a step's samples and to pack them, and how full the micro-batches are.

    python benchmarks/plan.py

Lengths are log-normal like Alpaca's (median about 130 tokens), 512 conversations a step, micro-batches of 4,096 tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from engine.data.plan import Plan, pack

BATCH, CAPACITY, ROUNDS = 512, 4096, 50


def milliseconds(work: Callable[[int], object]) -> float:
    """Return the median time of a call over some rounds."""
    taken = []
    for i in range(ROUNDS):
        started = time.perf_counter()
        work(i)
        taken.append(1e3 * (time.perf_counter() - started))
    return median(taken)


def main() -> None:
    """Print the figures."""
    print("| conversations | samples of a step, ms |\n|---|---|")
    for size in (10_000, 1_000_000, 10_000_000):
        plan = Plan(num_samples=size, batch_size=BATCH)
        steps = plan.steps_per_epoch
        print(f"| {size:,} | {milliseconds(lambda i, p=plan, n=steps: p.members(i * 977 % n)):.2f} |")
    draw = np.random.default_rng(0)
    batches = [np.clip(draw.lognormal(4.85, 0.75, BATCH), 12, 2048).astype(int) for _ in range(ROUNDS)]
    packing_ms = milliseconds(lambda i: pack(batches[i], CAPACITY))
    full = [lengths.sum() / (len(pack(lengths, CAPACITY)) * CAPACITY) for lengths in batches]
    fewest = sum(len(pack(b, CAPACITY)) == -(-int(b.sum()) // CAPACITY) for b in batches)
    print(f"\npacking {BATCH} conversations: {packing_ms:.2f} ms; micro-batches {np.mean(full):.1%} full on average")
    print(
        f"({np.min(full):.1%} at the least, where the last one is nearly empty), the fewest possible in {fewest} of {ROUNDS} steps"
    )


if __name__ == "__main__":
    main()
