"""The output layer with its loss, forward and backward, on the CPU: with all logits, and chunk by chunk.

    python benchmarks/linear_objective_cpu.py --out linear_objective_cpu

Cross-entropy of 2,048 tokens, hidden size 512, float32. Naive is torch's linear layer and ``F.cross_entropy``; ours is
``linear_objective`` with the workspace of the torch backend. Each figure is of a fresh process; sides take turns. Memory is the
highest that the process reaches less what it holds before; the gradient of the output matrix, which both have, is in it. Time is
the process's own, of all its threads: what else the machine does matters least to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve()
SIDES = ("naive", "ours")
TOKENS, HIDDEN, VOCABULARY = 2048, 512, 128_256
SWEEP = (16_032, 32_064, 64_128)
"""Vocabularies of which memory is measured beside the large one."""
MEMORY_GOAL, TIME_GOAL = 0.25, 1.0
"""Of naive's, at most."""


def work(side: str, vocabulary: int) -> dict[str, float]:
    """Do it once in this process, and return seconds, MiB and the loss."""
    import torch
    import torch.nn.functional as F

    from engine.backends.common import WORKSPACE_MB
    from kernels.linear_objective import linear_objective

    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = torch.randn(vocabulary, HIDDEN).mul_(HIDDEN**-0.5).requires_grad_()
    labels = torch.randint(vocabulary, (TOKENS,))
    (hidden[:64] @ weight[:64].t()).sum().backward()  # whatever the first product of a process sets up
    hidden.grad = weight.grad = None
    before = _memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    started = time.process_time()
    if side == "naive":
        loss = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    else:
        loss, _ = linear_objective(
            hidden, weight, labels, lambda logprobs_C, *_: (-logprobs_C.sum(), {}), workspace_mb=WORKSPACE_MB["cpu"]
        )
    loss.backward()
    seconds = time.process_time() - started
    assert weight.grad is not None and hidden.grad is not None
    return {"seconds": seconds, "mb": _memory_mb("VmHWM") - before, "loss": float(loss.detach())}


def _memory_mb(name: str) -> float:
    """Return a figure of this process's memory, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure(side: str, vocabulary: int, threads: int) -> dict[str, float]:
    """Return what a fresh process finds."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent.parent)}
    command = [sys.executable, str(HERE), "--work", side, str(vocabulary)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{side} {vocabulary:,}: {found['seconds']:.2f} s, {found['mb']:,.0f} MiB", flush=True)
    return found


def figure(memory: dict[str, dict[int, float]]) -> str:
    """Return memory against the vocabulary as SVG."""
    width, height, left, bottom = 560, 320, 70, 40
    right, top = width - 90, 20
    most_v, most_mb = max(memory["naive"]), 1.05 * max(memory["naive"].values())

    def at(v: float, mb: float) -> tuple[float, float]:
        return left + (right - left) * v / most_v, height - bottom - (height - bottom - top) * mb / most_mb

    axes = f'<path d="M{left} {top}V{height - bottom}H{right}" fill="none" stroke="#888"/>'
    parts = [axes, _text(left - 50, top - 6, "MiB added"), _text(right - 40, height - 6, "vocabulary")]
    for v in memory["naive"]:
        parts.append(_text(at(v, 0)[0] - 22, height - bottom + 16, f"{v:,}"))
    for mb in range(0, int(most_mb), 500):
        parts.append(_text(left - 44, at(0, mb)[1] + 4, f"{mb:,}"))
    for side, colour in zip(SIDES, ("#c0392b", "#2471a3"), strict=True):
        points = [at(v, mb) for v, mb in memory[side].items()]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(_text(points[-1][0] + 8, points[-1][1] + 4, side))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" '
        f'fill="#555">\n<rect width="{width}" height="{height}" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{words}</text>'


def main() -> int:
    """Measure, print and write table and figure; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="name of the Markdown file and the figure in benchmarks/results")
    args = parser.parse_args()
    loads, rounds = [], []
    for _ in range(args.rounds):
        loads.append(os.getloadavg()[0])
        rounds.append({side: measure(side, VOCABULARY, args.threads) for side in SIDES})
    memory = {side: {v: measure(side, v, args.threads)["mb"] for v in SWEEP} for side in SIDES}
    for side in SIDES:
        memory[side][VOCABULARY] = median(r[side]["mb"] for r in rounds)
    times = [r["ours"]["seconds"] / r["naive"]["seconds"] for r in rounds]
    share, off = (
        memory["ours"][VOCABULARY] / memory["naive"][VOCABULARY],
        abs(rounds[0]["ours"]["loss"] / rounds[0]["naive"]["loss"] - 1),
    )
    reached = share <= MEMORY_GOAL and median(times) <= TIME_GOAL and off < 1e-5
    seconds = {side: median(r[side]["seconds"] for r in rounds) for side in SIDES}
    lines = [
        "# Output layer on the CPU",
        "",
        f"{date.today()} · {os.cpu_count()} cores, threads {args.threads} · load before each round {min(loads):.1f} to "
        f"{max(loads):.1f} · Python {platform.python_version()}, torch {metadata.version('torch')} · {TOKENS:,} tokens, hidden "
        f"size {HIDDEN}, float32 · medians of {args.rounds} rounds",
        "",
        "| vocabulary | naive, MiB added | ours, MiB added | ours / naive |",
        "|---|---|---|---|",
        *(f"| {v:,} | {mb:,.0f} | {memory['ours'][v]:,.0f} | {memory['ours'][v] / mb:.2f} |" for v, mb in memory["naive"].items()),
        "",
        f"CPU time, vocabulary {VOCABULARY:,}: naive {seconds['naive']:.2f} s, ours {seconds['ours']:.2f} s; ratio "
        f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f}). The losses differ by {off:.1e}.",
        "",
        f"Goal: memory at most {MEMORY_GOAL:.2f} of naive's, time at most {TIME_GOAL:.2f}: {'reached' if reached else 'missed'}.",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if args.out:
        results = HERE.parent / "results"
        (results / f"{args.out}.md").write_text(text)
        (results / f"{args.out}.svg").write_text(figure(memory))
    return 0 if reached else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(sys.argv[2], int(sys.argv[3]))))
        sys.exit()
    sys.exit(main())
