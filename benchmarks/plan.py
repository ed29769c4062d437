"""The plan: milliseconds to know a step's samples and to assign them to ranks, how full micro-batches are, and who waits.

    python benchmarks/plan.py

Lengths are log-normal like Alpaca's (median about 130 tokens), 512 conversations a step, micro-batches of 4,096 tokens; the
cost of attention is that of a model of hidden size 4,096.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
from numpy.typing import NDArray

from engine.data.plan import Assignment, Plan, assign, bin_costs, imbalance, pack

BATCH, CAPACITY, ROUNDS = 512, 4096, 50
ATTENTION_LENGTH = 12.0 * 4096


def milliseconds(work: Callable[[int], object]) -> float:
    """Return the median time of a call over some rounds."""
    taken = []
    for i in range(ROUNDS):
        started = time.perf_counter()
        work(i)
        taken.append(1e3 * (time.perf_counter() - started))
    return median(taken)


def draw_batches(size: int) -> list[NDArray[np.int64]]:
    """Return the lengths of some batches."""
    draw = np.random.default_rng(0)
    return [np.clip(draw.lognormal(4.85, 0.75, size), 12, 2048).astype(int) for _ in range(ROUNDS)]


def balanced(lengths: NDArray[np.int64], ranks: int) -> Assignment:
    """Return the engine's assignment."""
    return assign(lengths, capacity=CAPACITY, ranks=ranks, attention_length=ATTENTION_LENGTH)


def round_robin(lengths: NDArray[np.int64], ranks: int) -> Assignment:
    """Return the fewest bins, dealt out one by one."""
    bins = pack(lengths, CAPACITY)
    bins += [[] for _ in range(-len(bins) % ranks)]
    return [bins[r::ranks] for r in range(ranks)]


def unavoidable(lengths: NDArray[np.int64], ranks: int) -> float:
    """Return the share lost where nothing but the longest sample, which is not divided, sets the time of a step."""
    costs = bin_costs(lengths, [[[i] for i in range(len(lengths))]], ATTENTION_LENGTH)
    return max(0.0, 1 - float(costs.sum() / ranks / costs.max()))


def main() -> None:
    """Print the figures."""
    print("| conversations | samples of a step, ms |\n|---|---|")
    for size in (10_000, 1_000_000, 10_000_000):
        plan = Plan(sizes=[size], batch_size=BATCH)
        steps = plan.steps_per_epoch
        print(f"| {size:,} | {milliseconds(lambda i, p=plan, n=steps: p.members(i * 977 % n)):.2f} |")
    batches = draw_batches(BATCH)
    packing_ms = milliseconds(lambda i: pack(batches[i], CAPACITY))
    full = [lengths.sum() / (len(pack(lengths, CAPACITY)) * CAPACITY) for lengths in batches]
    fewest = sum(len(pack(b, CAPACITY)) == -(-int(b.sum()) // CAPACITY) for b in batches)
    print(f"\npacking {BATCH} conversations: {packing_ms:.2f} ms; micro-batches {np.mean(full):.1%} full on average")
    print(
        f"({np.min(full):.1%} at the least, where the last one is nearly empty), the fewest possible in {fewest} of {ROUNDS} steps"
    )
    print(f"\nshare of a step lost to the slowest rank, mean (worst) of {ROUNDS} steps\n")
    print("| conversations | ranks | micro-steps | assigned | bins dealt out in turn | no way around | to assign, ms |")
    print("|---|---|---|---|---|---|---|")
    for size, ranks in ((512, 8), (512, 64), (1024, 64), (4096, 64), (4096, 512)):
        batches = draw_batches(size)
        row = [f"{size:,}", str(ranks), f"{np.mean([len(balanced(b, ranks)[0]) for b in batches]):.1f}"]
        for way in (balanced, round_robin):
            lost = [imbalance(bin_costs(b, way(b, ranks), ATTENTION_LENGTH)) for b in batches]
            row.append(f"{np.mean(lost):.1%} ({np.max(lost):.1%})")
        least = [unavoidable(b, ranks) for b in batches]
        row.append(f"{np.mean(least):.1%} ({np.max(least):.1%})")
        row.append(f"{milliseconds(lambda i, b=batches, r=ranks: balanced(b[i], r)):.2f}")
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
