"""Two ranks against one, executors against none, checkpoints against none: what each gains or costs on the CPU.

    python benchmarks/scaling.py --write

Every run is the command that a user gives, in processes of its own, one thread a rank: a Llama of 50 million fresh weights on
made-up data (``data=dummy``). Sides take turns within a round, in the opposite order in the next; ratios are taken round by
round. Times are ``perf/step_s`` of metrics.jsonl. Sides that are compared must train the same tokens to the same losses.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil

from engine.types import Callback, Control

HERE = Path(__file__).resolve()
WARMUP, PERIOD = 2, 2  # steps that are not timed, and steps between checkpoints
LOSS_STEPS, LOSS_TOLERANCE = 5, 1e-3  # steps whose losses must agree, and their largest relative gap
LONGEST_S, GRACE_S = 3600, 20.0  # how long a run may take, and how long what it has started may outlive it
PR_SET_CHILD_SUBREAPER = 36
MODEL = (
    "vocab_size: 32768, hidden_size: 512, intermediate_size: 2048, num_hidden_layers: 8, num_attention_heads: 8, "
    "num_key_value_heads: 8, tie_word_embeddings: true"
)
SMOKE_MODEL = "hidden_size: 64, intermediate_size: 128, num_attention_heads: 1, num_key_value_heads: 1"


@dataclass(frozen=True)
class Side:
    """One way to run a recipe: copies at once, each with a share of the batch; the sides after a base are held against it."""

    launch: str = "local"
    ranks: int = 1
    words: tuple[str, ...] = ()
    share: int = 1
    copies: int = 1
    base: bool = False


@dataclass(frozen=True)
class Group:
    """A recipe and the sides that run it."""

    title: str
    batch: int
    length: int
    max_tokens: int
    steps: int
    sides: dict[str, Side]


CLOCK, SAVE, ASIDE = "run.callbacks=[scaling:Clock]", f"checkpoint.period={PERIOD}", "checkpoint.async_save=true"
GROUPS = {
    "scaling": Group("Two ranks against one", 16, 256, 2048, 6, {
        "one rank": Side(base=True),
        "two ranks, sharded (FSDP2)": Side("torchrun", 2, ("backend.torch.shard_size=null",)),
        "two ranks, replicated": Side("torchrun", 2, ("backend.torch.shard_size=1",)),
        "one rank, half the batch": Side(share=2, base=True),
        "two such runs at once, independent": Side(share=2, copies=2),
    }),
    "executors": Group("Executors", 2, 128, 256, 14, {
        "one rank, in-process": Side(base=True),
        "one rank, torchrun": Side("torchrun"),
        "one rank, Ray": Side("ray"),
        "two ranks, torchrun": Side("torchrun", 2, base=True),
        "two ranks, Ray": Side("ray", 2),
    }),
    "checkpoints": Group("Checkpoints", 4, 128, 256, 14, {
        f"{ranks}, {kind}": Side(*start, words=(CLOCK, *words), base=not words)
        for ranks, start in (("one rank", ()), ("two ranks", ("torchrun", 2)))
        for kind, words in (("none", ()), ("sync", (SAVE,)), ("async", (SAVE, ASIDE)))
    }),
}  # fmt: skip
HEADS = {
    "scaling": "side | step, s | samples/s | speed-up",
    "executors": "side | step, s | step, ratio",
    "checkpoints": "side | stall, s | writing, s | lost a checkpoint, s | mean step, s | mean step, ratio | MB on disk",
}
FIGURES = {
    "scaling": (("step_s", ".3f"), ("samples_s", ".2f"), ("samples_s", "ratio")),
    "executors": (("step_s", ".4f"), ("step_s", "ratio")),
    "checkpoints": (
        ("timing/checkpoint_s", ".3f"), ("timing/checkpoint_write_s", ".3f"), ("wall_s", "lost"), ("mean_step_s", ".3f"),
        ("mean_step_s", "ratio"), ("disk_mb", ",.0f"),
    ),
}  # fmt: skip
NOTES = {
    "scaling": "Goal: two ranks 1.8 times one rank. The last row is this machine's ceiling, what two ranks that exchange nothing "
    "would reach",
    "executors": "Goal: a ratio below 1.02; one rank to in-process, two ranks to torchrun.",
    "checkpoints": f"A checkpoint every {PERIOD} steps. Stall and writing: timing/checkpoint_s and timing/checkpoint_write_s. "
    "Lost: seconds from one step's end to the next, less the same without checkpoints, for each checkpoint: slower steps and all "
    "that is done between steps are in it.",
}
Run = dict[str, Any]


class Clock(Callback):
    """Notes when steps end: what is done between steps is no part of perf/step_s."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, control: Control) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def on_train_end(self, control: Control) -> None:
        """Write the times."""
        if control.rank == 0:
            (control.run_dir / "clock.json").write_text(json.dumps(self.ends))


def command(side: Side, group: Group, run_dir: Path, *, smoke: bool) -> list[str]:
    """Return the command of one run."""
    start, cluster, small = [sys.executable], ["cluster=local"], 16 if smoke else 1
    if side.launch == "torchrun":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(side.ranks), "--master-port", port]
        cluster = ["cluster=env"]
    elif side.launch == "ray":
        cluster = ["cluster=ray_local", f"cluster.num_workers={side.ranks}"]
    return [
        *start, "-m", "engine", *cluster, "model=tiny", f"model.config_overrides={{{SMOKE_MODEL if smoke else MODEL}}}",
        "data=dummy", f"data.max_length={group.length // small}", f"data.packing.max_tokens={group.max_tokens // small}",
        f"train.global_batch_size={group.batch // side.share}", f"algorithm.max_num_steps={8 if smoke else group.steps}",
        "checkpoint.period=0", "logger.backends=[]", f"run.dir={run_dir}", *side.words,
    ]  # fmt: skip


def measure(side: Side, group: Group, work: Path, *, smoke: bool) -> Run:
    """Run one side to its end, wait until all that it has started is gone, and read what it has written."""
    own = {"ANNEAL_CACHE": str(work / "cache"), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **own}
    folders, processes = [work / f"run{i}" for i in range(side.copies)], []
    for folder in folders:
        folder.mkdir()
        with (folder / "output.txt").open("w") as out:
            words = command(side, group, folder, smoke=smoke)
            processes.append(subprocess.Popen(words, env=env, cwd=HERE.parent, stdout=out, stderr=out))
    codes = [process.wait(LONGEST_S) for process in processes]
    if any(codes):
        outputs = "\n".join((folder / "output.txt").read_text()[-4000:] for folder in folders)
        raise SystemExit(f"{' '.join(processes[0].args)} failed ({codes}):\n{outputs}")
    if end_processes(GRACE_S):
        print(f"killed what was still running {GRACE_S:.0f} s after the end of the run", flush=True)
    found = read(folders, group.batch // side.share)
    for folder in folders:
        shutil.rmtree(folder)
    return found


def read(folders: Sequence[Path], batch: int) -> Run:
    """Read the run folders of a side; step and samples are those of all copies, the rest is the first one's."""
    copies = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    timed, first = copies[0][WARMUP:], folders[0]
    medians = [median(line["perf/step_s"] for line in copy[WARMUP:]) for copy in copies]
    with (first / "hf" / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    newest = max((first / "checkpoints").glob("step_*"))
    found = {
        "step_s": mean(medians),
        "mean_step_s": mean(line["perf/step_s"] for line in timed[PERIOD:]),
        "samples_s": sum(batch / m for m in medians),
        "losses": [(line["train/tokens"], line["train/loss"]) for line in copies[0][:LOSS_STEPS]],
        "parameters": sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__"),
        "disk_mb": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / 1e6,
    }
    for name in ("timing/checkpoint_s", "timing/checkpoint_write_s"):
        if values := [line[name] for line in timed if name in line]:
            found[name] = median(values)
    if (clock := first / "clock.json").is_file():
        ends = json.loads(clock.read_text())[WARMUP + PERIOD - 1 :]  # as many checkpoints come to an end as begin
        found["wall_s"] = (ends[-1] - ends[0]) / (len(ends) - 1)
    return found


def end_processes(grace_s: float) -> bool:
    """Wait for all descendants of this process to end; kill those left after so many seconds, and say whether any were."""
    deadline, killed = time.monotonic() + grace_s, False
    while time.monotonic() < deadline + GRACE_S:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = psutil.Process().children(recursive=True)
        if not left:
            break
        for process in left if time.monotonic() >= deadline else []:
            killed = True
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.1)
    return killed


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Return a median, and the smallest and largest value."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def section(name: str, group: Group, found: dict[str, list[Run]]) -> tuple[list[str], bool]:
    """Return the table of a group, and whether its sides did the same computation."""
    rows, gaps, base = [HEADS[name].split(" | ")], [0.0], next(iter(found.values()))
    for side, runs in found.items():
        base = runs if group.sides[side].base else base
        pairs = list(zip(runs, base, strict=True))
        row = [side]
        for figure, how in FIGURES[name]:
            values = [run[figure] for run in runs if figure in run]
            if how == "ratio":
                row.append("1" if runs is base else spread([a[figure] / b[figure] for a, b in pairs]))
            elif how == "lost":
                row.append("" if runs is base else spread([PERIOD * (a[figure] - b[figure]) for a, b in pairs]))
            else:
                row.append(f"{median(values):{how}}" if values else "")
        rows.append(row)
        for (tokens, x), (others, y) in (two for a, b in pairs for two in zip(a["losses"], b["losses"], strict=True)):
            gaps.append(abs(x / y - 1) if tokens == others else math.inf)
    sound, note = max(gaps) < LOSS_TOLERANCE, NOTES[name]
    if name == "scaling":
        one, sharded, replicated, half, pair = ([run["samples_s"] for run in runs] for runs in found.values())
        reached = [
            spread([100 * y / x / (p / h) for x, y, h, p in zip(one, two, half, pair, strict=True)], ".0f")
            for two in (sharded, replicated)
        ]
        note += f"; sharded ranks reach {reached[0]} % of it, replicated ones {reached[1]} %."
    size = f"{group.batch} samples of {group.length} tokens a step, {group.steps} steps"
    agree = f"first {LOSS_STEPS} losses within {max(gaps):.0e}{'' if sound else ' **not the same computation**'}"
    table = [f"| {' | '.join(row)} |" for row in rows]
    table.insert(1, "|---" * len(rows[0]) + "|")
    return ["", f"## {group.title}", "", f"{size}; {agree}.", "", *table, "", note], sound


def main() -> int:
    """Measure, print and write the tables; 1 if sides that are compared did not do the same computation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=GROUPS)
    parser.add_argument(
        "--write", action="store_true", help="write results/scaling.md (--only: results/scaling_NAME.md)"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and one round: does the script work?")
    args = parser.parse_args()
    if args.smoke and args.write:
        parser.error("--smoke measures nothing worth writing")
    rounds, load = 1 if args.smoke else args.rounds, os.getloadavg()[0]
    groups = {args.only: GROUPS[args.only]} if args.only else GROUPS
    found: dict[str, dict[str, list[Run]]] = {name: {side: [] for side in g.sides} for name, g in groups.items()}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if sys.platform == "linux":  # ranks whose launcher died become children of this process, which ends them
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(prefix="scaling-", ignore_cleanup_errors=True) as work:
        try:
            for number in range(rounds):
                for name, group in groups.items():
                    for side in list(group.sides)[:: -1 if number % 2 else 1]:
                        run = measure(group.sides[side], group, Path(work), smoke=args.smoke)
                        found[name][side].append(run)
                        print(f"round {number + 1} {name}: {side}, {run['step_s']:.4f} s a step", flush=True)
        finally:
            end_processes(0.0)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    cpu = next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), platform.machine())
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("anneal", "torch", "transformers", "ray"))
    text = [
        "# Scaling",
        "",
        f"{date.today().isoformat()} · {cpu}, {os.cpu_count()} cores, one thread a rank · load before {load:.1f} · Python "
        f"{platform.python_version()}, {versions}",
        "",
        f"{'Smoke test, sizes below do not hold. ' * args.smoke}Llama of {run['parameters'] / 1e6:.1f}M parameters, float32; "
        f"sides taking turns, a fresh process each, rounds: {rounds}. The first {WARMUP} steps of a run are not timed. Medians, in "
        "brackets the smallest and largest of the rounds.",
    ]
    sound = True
    for name, group in groups.items():
        more, same = section(name, group, found[name])
        text, sound = text + more, sound and same
    print("\n" + "\n".join(text))
    if args.write:
        file = HERE.parent / "results" / (f"scaling_{args.only}.md" if args.only else "scaling.md")
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
