"""Callbacks that every run has, or that a key of the recipe turns on: load of host and device, profiler, memory snapshot."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config.schema import RunConfig
from engine.errors import UserError
from engine.types import Callback, Control

LOOK_PERIOD_S = 1.0
"""Seconds between two looks at the load: over less, its averages say little; lines between two looks repeat the last."""
MEMORY_EVENTS = 100_000
"""Latest allocations and frees that a memory snapshot shows; older ones are forgotten, so that the record stays bounded."""


def builtin(config: RunConfig) -> list[Callback]:
    """Return the callbacks that the recipe asks for; the user's own come after them.

    Raises:
        UserError: If the recipe asks to record the memory of a device that is none.
    """
    run = config.run
    callbacks: list[Callback] = [Monitor()]
    if run.profile_steps is not None:
        callbacks.append(Profiler(*run.profile_steps, Path("profile")))
    if run.record_memory:
        import torch

        if config.cluster.num_workers is not None or not torch.cuda.is_available():
            raise UserError(
                "run.record_memory: recording allocations needs CUDA, and this run is on CPUs; set it to false."
            )
        callbacks.append(MemoryRecorder(Path("memory")))
    return callbacks


class Monitor(Callback):
    """Adds the load of this process, and of its CUDA device, to the figures of a training step."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the count
        self._load: dict[str, float] = {}
        self._next_look = 0.0
        self._device = True

    def on_log(self, control: Control, metrics: dict[str, float]) -> None:
        """Add ``host/…`` and ``device/…``."""
        if "train/loss" not in metrics:
            return
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_PERIOD_S
            self._load = {
                "host/rss_gb": self._process.memory_info().rss / 1e9,
                "host/cpu_percent": self._process.cpu_percent(),
                **self._device_load(control),
            }
        metrics.update(self._load)

    def _device_load(self, control: Control) -> dict[str, float]:
        import torch

        device = control.backend.device
        if device.type != "cuda" or not self._device:
            return {}
        try:  # torch finds the device among those that CUDA_VISIBLE_DEVICES leaves, and asks pynvml
            return {
                "device/utilization_percent": float(torch.cuda.utilization(device)),
                "device/memory_gb": torch.cuda.device_memory_used(device) / 1e9,
            }
        except Exception as error:  # pynvml has a class of its own for everything that a driver may lack
            self._device = False
            control.say(f"device/… figures are off: the driver does not give them ({error}).")
            return {}


class Profiler(Callback):
    """Traces a window of steps with torch.profiler, one Chrome trace a rank.

    Args:
        first: First step of the window, counted from 1; a run that resumes within it traces the rest.
        last: Last step of the window; a run that ends before it traces what there was.
        folder: Where the traces go, relative to the run folder.
    """

    def __init__(self, first: int, last: int, folder: Path) -> None:
        self.first, self.last, self.folder = first, last, folder
        self._profile: Any = None
        self._step: Any = None
        self._write: Callable[[], None] | None = None

    def on_step_begin(self, control: Control) -> None:
        """Start with the window, and mark the step in the trace."""
        step = control.step + 1
        if not self.first <= step <= self.last:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to the terminal, across the progress bar
        from torch.profiler import ProfilerActivity, profile, record_function

        if self._profile is None:
            on_cuda = control.backend.device.type == "cuda"
            self._profile = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda])
            self._write = lambda: self._export(control)
            self._profile.start()
        self._step = record_function(f"step {step}")
        self._step.__enter__()

    def on_step_end(self, control: Control) -> None:
        """End the step's mark; write the trace with the window's end."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        if control.step >= min(self.last, control.total_steps):
            self.close()

    def on_train_end(self, control: Control) -> None:
        """Write the trace of a run that a callback ended within the window."""
        self.close()

    def close(self) -> None:
        """Stop, and write the trace if there is one that is not written."""
        if self._write is not None:
            write, self._write = self._write, None
            write()

    def _export(self, control: Control) -> None:
        profiled, self._profile = self._profile, None
        profiled.stop()
        file = control.run_dir / self.folder / f"rank_{control.rank}.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(file))
        control.say(f"profile: {file}")


class MemoryRecorder(Callback):
    """Records the device's allocations; torch's memory snapshot is written at the end, or when memory runs out.

    Args:
        folder: Where the snapshots go, relative to the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Path | None = None
        self._ran_out = False

    def on_train_begin(self, control: Control) -> None:
        """Start recording; what is allocated already is seen, but not where it came from."""
        import torch

        self._file = control.run_dir / self.folder / f"rank_{control.rank}.pickle"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")

        def out_of_memory(device: int, size: int, device_total: int, device_free: int) -> None:
            self._dump()
            self._ran_out = True

        # Called before the error is raised, while what filled the memory is still there; torch documents it for this use.
        torch._C._cuda_attach_out_of_memory_observer(out_of_memory)  # type: ignore[attr-defined]

    def on_train_end(self, control: Control) -> None:
        """Write the snapshot of a run that came through."""
        self._ran_out = False
        self.close()

    def close(self) -> None:
        """Write the snapshot, unless that of a failed step is written, and stop recording."""
        if self._file is None:
            return
        import torch

        if not self._ran_out:
            self._dump()
        self._file = None
        torch.cuda.memory._record_memory_history(enabled=None)

    def _dump(self) -> None:
        import torch

        if self._file is not None:
            torch.cuda.memory._dump_snapshot(str(self._file))  # type: ignore[no-untyped-call]
