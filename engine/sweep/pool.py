"""The runs of a sweep on one machine: a process each, as many at a time as there are devices for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from engine.config.schema import ClusterSection
from engine.errors import EXIT_DONE, EXIT_STOPPED, UserError
from engine.sweep import status
from engine.sweep.points import Point

CONSOLE = "console.txt"
"""What a run's process has printed, in its folder."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
"""They end a sweep."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
"""What its runs get of it, the first time, the second, the third."""
LOOK_PERIOD_S, SHOW_PERIOD_S = 0.2, 1.0
QUIET_PERIOD_S = 30.0
"""Time between two lines of progress where there is no terminal."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A run that has a process."""

    point: Point
    process: subprocess.Popen[bytes]
    devices: list[str]
    printed: int
    """Size of its console's file before it began, in bytes."""
    logged: int
    """Lines of its log before it began."""
    started: float


@dataclass(kw_only=True)
class Pool:
    """Runs points, and counts how they end."""

    devices: list[str]
    """Those of this machine, as CUDA_VISIBLE_DEVICES names them."""
    most: int
    """Runs at a time."""
    asked: int = 0
    """How many signals asked to stop."""
    done: int = 0
    failed: int = 0
    running: list[Running] = field(default_factory=list)

    def run(self, points: Sequence[Point]) -> None:
        """Run points to their end, or until a signal asks to stop; then those that run end with their checkpoints saved."""
        waiting, told = deque(points), 0
        line = Line(sys.stdout.isatty())
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            while self.running or (waiting and not self.asked):
                while waiting and not self.asked and self._fits(waiting[0]):
                    self._start(waiting.popleft(), line)
                while told < self.asked:
                    self._pass_on(told, line)
                    told += 1
                for run in [run for run in self.running if run.process.poll() is not None]:
                    self.running.remove(run)
                    self._ended(run, line)
                line.show(self._progress, len(waiting))
                time.sleep(LOOK_PERIOD_S)
        finally:
            line.clear()
            for run in self.running:  # only where this process fails
                run.process.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1

    def _fits(self, point: Point) -> bool:
        free = len(self.devices) - sum(len(run.devices) for run in self.running)
        return len(self.running) < self.most and needs(point.config.cluster, len(self.devices)) <= free

    def _start(self, point: Point, line: Line) -> None:
        taken = {device for run in self.running for device in run.devices}
        free = [device for device in self.devices if device not in taken]
        devices = free[: needs(point.config.cluster, len(self.devices))]
        command, logged = [sys.executable, "-m", "engine", *point.words()], len(status.log(point.folder))
        with (point.folder / CONSOLE).open("ab") as console:
            printed = console.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment(point, devices)},
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        self.running.append(
            Running(
                point=point,
                process=process,
                devices=devices,
                printed=printed,
                logged=logged,
                started=time.monotonic(),
            )
        )
        where = f" on GPU {','.join(devices)}" if devices else ""
        line.say(f"{point}: started{where}")

    def _environment(self, point: Point, devices: list[str]) -> dict[str, str]:
        """Return what a run's environment has of its own: its devices, or its share of the cores."""
        if devices:
            return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
        if self.most == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        ranks = self.most * (point.config.cluster.num_workers or 1)
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}

    def _pass_on(self, told: int, line: Line) -> None:
        number = PASSED_ON[min(told, len(PASSED_ON) - 1)]
        for run in self.running:
            run.process.send_signal(number)
        how = (
            "their checkpoints are saved (once more: end them without)"
            if number == signal.SIGTERM
            else "without checkpoints"
        )
        line.say(f"stopping the runs that are under way; {how}")

    def _ended(self, run: Running, line: Line) -> None:
        settle(run, asked=bool(self.asked))
        section = run.point.config.checkpoint
        found = status.read(run.point.folder, section.metric, section.mode)
        self.done += found.kind == "done"
        self.failed += found.kind == "failed"
        minutes, seconds = divmod(round(time.monotonic() - run.started), 60)
        measured = "" if found.best is None else f", {section.metric} {found.best:.6g}"
        line.say(f"{run.point}: {found}{measured} ({minutes}:{seconds:02d})")

    def _progress(self, waiting: int) -> str:
        running = ", ".join(f"{run.point.folder.name} ({status.progress(run.point.folder)})" for run in self.running)
        counts = [f"{self.done} done", *([f"{self.failed} failed"] if self.failed else []), f"{waiting} to come"]
        return f"{', '.join(counts)}; running: {running}"


@dataclass
class Line:
    """Lines on standard output, and below them, on a terminal, one that changes."""

    terminal: bool
    _shown: bool = False
    _next: float = 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(text, flush=True)

    def show(self, progress: Any, *args: Any) -> None:
        """Show how far all is, now and then.

        Args:
            progress: Returns the text.
            args: What it is called with.
        """
        now = time.monotonic()
        if now < self._next:
            return
        first, self._next = self._next == 0.0, now + (SHOW_PERIOD_S if self.terminal else QUIET_PERIOD_S)
        if self.terminal:
            self.clear()
            width = os.get_terminal_size(sys.stdout.fileno()).columns
            print(progress(*args)[: width - 1], end="", flush=True)
            self._shown = True
        elif not first:
            print(progress(*args), flush=True)

    def clear(self) -> None:
        """Take the line that changes away."""
        if self._shown:
            print("\r\x1b[2K", end="", flush=True)
        self._shown = False


def settle(run: Running, *, asked: bool) -> None:
    """Have log.txt say how a run has ended, where the run itself could not.

    Args:
        run: Its process has ended.
        asked: Whether the sweep was asked to stop.
    """
    folder, code = run.point.folder, run.process.returncode
    if code == EXIT_DONE or status.ending(status.log(folder)[run.logged :]) is not None:
        return
    killed = signal.Signals(-code).name if code < 0 else None
    if code == EXIT_STOPPED or (asked and killed in ("SIGTERM", "SIGINT")):
        said = "stopped by a signal before training began; the same command starts again."
    elif killed is not None:
        said = f"error: killed by {killed}" + (" (out of the host's memory?)" if killed == "SIGKILL" else "")
    else:
        said = f"error: {_reason((folder / CONSOLE).read_bytes()[run.printed :].decode(errors='replace'))}"
    with (folder / "log.txt").open("a") as log:
        log.write(said + "\n")


def _reason(text: str) -> str:
    """Return the first sentence with which a process has ended, or the last line of its traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (sentences or lines[-1:] or ["it printed nothing"])[0]


def needs(cluster: ClusterSection, here: int) -> int:
    """Return how many GPUs of a machine a run takes.

    Args:
        cluster: Where its ranks are.
        here: GPUs of this machine.
    """
    if not here or cluster.num_workers is not None or cluster.name == "ray":
        return 0
    return 1 if cluster.name == "local" else cluster.gpus_per_node or here


def devices() -> list[str]:
    """Return the GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    with suppress(ImportError):  # no Linux
        import pynvml

        with suppress(pynvml.NVMLError):  # no driver
            pynvml.nvmlInit()
            return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
    return []


def build(points: Sequence[Point]) -> Pool:
    """Return the pool of a sweep.

    Raises:
        UserError: If a point takes more devices than there are.
    """
    here, cluster = devices(), points[0].config.cluster
    most_needed = max(needs(point.config.cluster, len(here)) for point in points)
    if most_needed > len(here):
        raise UserError(
            f"cluster.gpus_per_node={most_needed}: this machine has {len(here)} GPUs; lower it, or choose another cluster."
        )
    return Pool(devices=here, most=cluster.max_parallel or (len(points) if most_needed else 1))
