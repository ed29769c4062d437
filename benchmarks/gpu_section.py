"""One section of gpu.py in its own process: the clock, the rows it writes, and what becomes of a rival that does not work."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

T = TypeVar("T")
MODULES = {"a": "gpu_checks", "b": "gpu_linear", "c": "gpu_attention", "d": "gpu_step", "e": "gpu_tiles"}
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "flash-attn", "trl")
ROUNDS = 10
"""Times that each side is measured, taking turns."""
SPAN_MS = 5.0
"""A measurement lasts at least so long: short calls are repeated within it, so that launches do not show."""

Run = Callable[[], Any]


@dataclass
class Timing:
    """What was measured of one side."""

    state: str = ""
    """Why it was not, or not to the end: absent, failed or skipped, and the reason."""
    runs_ms: list[float] = field(default_factory=list)
    peak_gb: float | None = None
    """Allocated at most in one run beside what was there before; None without a card."""

    @property
    def ms(self) -> float | None:
        """The median; None if there is none."""
        return median(self.runs_ms) if self.runs_ms else None


@dataclass(frozen=True)
class Job:
    """What a section is given: where it computes, how long it may, and where its rows go."""

    rows: Path
    until: float
    """When its time is over, by time.monotonic."""
    smoke: bool

    @property
    def device(self) -> torch.device:
        """The card; the CPU in a smoke run."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; float32 on the CPU."""
        return torch.float32 if self.smoke else torch.bfloat16

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def sizes(self, full: T, small: T) -> T:
        """Return the sizes of this run."""
        return small if self.smoke else full

    def row(self, table: str, **figures: Any) -> None:
        """Add a row to a table; its columns are named as the figures: tokens_per_s is tokens/s, other underscores are spaces."""
        named = {name.replace("_per_", "/").replace("_", " "): value for name, value in figures.items()}
        known = {name: value for name, value in named.items() if value not in (None, "")}
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in known.items())
        self._write(kind="row", table=table, row=named)
        print(f"  {table}: {shown}", flush=True)

    def note(self, text: str, *, broken: bool = False) -> None:
        """Add a sentence; ``broken`` if the whole command is to fail for it."""
        print(f"  {text}", flush=True)
        self._write(kind="note", text=text, broken=broken)

    def goal(self, goal: str, measured: str, met: bool | None) -> None:
        """Add a goal and whether it was met; None: it was not measured."""
        print(f"  goal: {goal}; measured: {measured}", flush=True)
        self._write(kind="goal", goal=goal, measured=measured, met=met)

    def about(self) -> None:
        """Write what this machine is."""
        self._write(kind="machine", about=machine(self.smoke))

    def _write(self, **line: Any) -> None:
        with self.rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def machine(smoke: bool) -> dict[str, str]:
    """Return the card, its driver and the versions of what takes part."""
    about = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            about[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            about[name] = "absent"
    about["card"] = "none (CPU)" if smoke else torch.cuda.get_device_name()
    about["driver"] = "none" if smoke else _driver()
    return about


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # a figure for the heading, whatever NVML may raise
        return "unknown"


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """Return what work returns and "", or None and why there is nothing: what is missing, or how it failed."""
    try:
        return work(), ""
    except ImportError as error:
        reason = f"absent: {_first_line(error)}"
    except torch.OutOfMemoryError:
        reason = "failed: out of memory"
    except Exception as error:  # whatever a rival may raise
        reason = f"failed: {type(error).__name__}: {_first_line(error)}"
    clean()  # out of the except, whose traceback holds the tensors
    return None, reason


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def clean() -> None:
    """Give memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def clock_ms(job: Job, run: Run, times: int = 1) -> float:
    """Return the milliseconds of a call, the mean of some in a row; on a card those between two of its events."""
    if job.smoke:
        started = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - started) * 1e3 / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / times


def peak_gb(job: Job, run: Run) -> float | None:
    """Return what a call allocates at most beside what was there before, in GB."""
    if job.smoke:
        run()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 1e9


def compare(job: Job, sides: Mapping[str, Callable[[], Run]]) -> dict[str, Timing]:
    """Measure sides in turn, each round in the other order.

    Args:
        job: The section.
        sides: What prepares each side and returns its call, which leaves nothing behind; it may raise.
    """
    found = {name: Timing() for name in sides}
    ready: dict[str, tuple[Run, int]] = {}
    for name, prepare in sides.items():
        if job.left <= 0:
            found[name].state = "skipped: out of time"
            continue
        timing = found[name]
        warm, timing.state = attempt(lambda prepare=prepare, timing=timing: _warm(job, prepare, timing))  # type: ignore[misc]
        if warm is not None:
            ready[name] = warm
    for turn in range(job.sizes(ROUNDS, 2)):
        for name in list(ready) if turn % 2 else list(ready)[::-1]:
            run, times = ready[name]
            if job.left <= 0:
                found[name].state = f"stopped after {len(found[name].runs_ms)} runs: out of time"
                continue
            measured, reason = attempt(lambda run=run, times=times: clock_ms(job, run, times))  # type: ignore[misc]
            if measured is None:
                found[name].state = reason
                del ready[name]
            else:
                found[name].runs_ms.append(measured)
    return found


def _warm(job: Job, prepare: Callable[[], Run], timing: Timing) -> tuple[Run, int]:
    """Run a side for the first times, and return its call and how often it is repeated within a measurement."""
    run = prepare()
    clock_ms(job, run)
    timing.peak_gb = peak_gb(job, run)
    return run, job.sizes(max(1, min(50, round(SPAN_MS / max(clock_ms(job, run), 1e-3)))), 1)


def matmul_tflops(job: Job) -> float:
    """Return the rate of a large matrix product on this device, of random values, in TFLOP/s."""
    n = job.sizes(8192, 256)
    a, b = (torch.randn(n, n, device=job.device, dtype=job.dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = compare(job, {"product": lambda: lambda: torch.mm(a, b, out=out)})["product"]
    if timing.ms is None:
        raise RuntimeError(f"the matrix product of {n}³ could not be measured ({timing.state})")
    return 2 * n**3 / timing.ms / 1e9


def main() -> int:
    """Run the section that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("section", choices=MODULES)
    parser.add_argument("rows", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    job = Job(args.rows, time.monotonic() + args.seconds, args.smoke)
    if not args.smoke and not torch.cuda.is_available():
        job.note("absent: torch sees no CUDA device; --smoke shows on the CPU that the script works", broken=True)
        return 0
    torch.manual_seed(0)
    job.about()
    importlib.import_module(MODULES[args.section]).run(job)
    return 0


if __name__ == "__main__":
    # the sections import this file by its name: one module, not two
    sys.exit(importlib.import_module("gpu_section").main())
