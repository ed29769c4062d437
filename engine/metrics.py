"""Where figures and lines go: metrics.jsonl, log.txt, and the console."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from engine.config.schema import LoggerSection


class Logger(Protocol):
    """Takes one step's figures."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the figures of a step."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class JsonLines:
    """metrics.jsonl: one object a line."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: TextIO | None = None  # opened with the first line: a resumed run cuts the file before

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line; what is not finite becomes null, as JSON wants."""
        self._stream = self._stream or self._file.open("a", buffering=1)
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._stream.write(json.dumps({"step": step, **row}) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()


class Console:
    """Takes lines and figures, and shows none: what every rank but the first has."""

    def note(self, text: str) -> None:
        """Take a line for log.txt alone."""

    def say(self, text: str) -> None:
        """Take a line."""

    def start(self, step: int, total_steps: int) -> None:
        """Take it that training begins."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step's figures."""

    def close(self) -> None:
        """End."""


SHOWN = ("loss", "accuracy", "margin")
"""Figures of a step or a validation that the console shows, where there are any."""
STEP_LINE = re.compile(r"step (?P<step>\d+)/(?P<total>\d+)  loss ")
"""How a line of log.txt begins in whose place a terminal shows the bar."""


def figures(metrics: Mapping[str, float]) -> str:
    """Return what is shown of a training step's figures."""
    more = "".join(f"  {k} {metrics[f'train/{k}']:.3f}" for k in SHOWN[1:] if f"train/{k}" in metrics)
    return f"loss {metrics['train/loss']:.4f}{more}  {metrics.get('perf/tokens_per_second', 0.0):,.0f} tokens/s"


class Bar:
    """The progress of a run on a terminal: step, figures, time left.

    Args:
        rich: Rich's console, a terminal.
        step: That the run goes on from.
        total_steps: Of the run.
    """

    def __init__(self, rich: Any, step: int, total_steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            console=rich, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("train", total=total_steps, completed=step, figures="")
        self._progress.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a training step's figures."""
        self._progress.update(self._task, completed=step, figures=figures(metrics))

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()


class TerminalConsole(Console):
    """A progress bar on a terminal; a plain line now and then elsewhere."""

    def __init__(self, log: Path, *, enabled: bool = True) -> None:
        from rich.console import Console as RichConsole

        self._log = log.open("a", buffering=1)
        self._rich = RichConsole(highlight=False, soft_wrap=True, quiet=not enabled)
        self._bar: Bar | None = None
        self._last_line = 0.0
        self._total_steps = 0

    def note(self, text: str) -> None:
        """Write a line to log.txt alone."""
        with suppress(OSError):  # on a full disk the console still says it
            self._log.write(text + "\n")

    def say(self, text: str) -> None:
        """Write a line, above the bar."""
        self._log.write(text + "\n")
        self._rich.print(text, markup=False)

    def start(self, step: int, total_steps: int) -> None:
        """Show the bar."""
        self._total_steps = total_steps
        if self._bar is not None:  # of ranks that were lost
            self._bar.close()
        if self._rich.is_terminal and not self._rich.quiet:
            self._bar = Bar(self._rich, step, total_steps)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step's figures."""
        if "train/loss" in metrics:
            if self._bar is not None:
                self._bar.show(step, metrics)
            now = time.monotonic()
            if now - self._last_line >= 10.0 or step == self._total_steps:
                self._last_line = now
                left = (self._total_steps - step) * metrics.get("perf/step_s", 0.0)
                line = f"step {step}/{self._total_steps}  {figures(metrics)}"
                line += f"  lr {metrics['train/lr']:.2e}  {_duration(left)} left"
                self._log.write(line + "\n")
                if self._bar is None:
                    self._rich.print(line, markup=False)
        shown = {k: v for k, v in metrics.items() if k.startswith("validation/") and k.rpartition("/")[2] in SHOWN}
        if shown:
            self.say(f"step {step}/{self._total_steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))

    def close(self) -> None:
        """Take the bar away and close log.txt."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._log.close()


def console(section: LoggerSection, run_dir: Path, *, main: bool) -> Console:
    """Return the console of a run: silent on all ranks but the first."""
    return TerminalConsole(run_dir / "log.txt", enabled="console" in section.backends) if main else Console()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
