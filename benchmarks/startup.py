"""From the command to the end of the first optimizer step: where the seconds go.

    python benchmarks/startup.py --out startup

Runs the engine on its tiny model with a warm cache of tokenised data, each time in a fresh process, and notes when each phase
ends. The phases are consecutive and add up to the whole. Nothing is left out of the run; imports that the engine would do a
moment later are done at the end of the phase before, so that they can be told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve()
GOAL_S = 8.0
OVERRIDES = [
    "model=tiny",
    "data=tasks",
    "data.val_path=null",
    "algorithm.max_num_steps=1",
    "algorithm.val_at_end=false",
]


class Marks:
    """Ends of phases, in seconds since the command was started."""

    def __init__(self, started: float) -> None:
        self.started, self.last = started, started
        self.phases: dict[str, float] = {}

    def __call__(self, phase: str) -> None:
        """End a phase."""
        now = time.time()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now


def drive(started: float, result: Path, overrides: list[str]) -> int:
    """Run the engine in this process with marks between its phases."""
    mark = Marks(started)
    mark("start Python")
    from engine import __main__ as command
    from engine.config import compose

    mark("import compose")
    _around(compose, "compose", mark, after="compose and check the recipe", then=lambda: _imports(mark))
    code = command.main(overrides)
    mark("checkpoint, export, end")
    result.write_text(json.dumps(mark.phases))
    return code


def _imports(mark: Marks) -> None:
    """Do, one by one, the imports that come next; then put marks into the modules they bring."""
    import numpy  # noqa: F401

    mark("import numpy")
    import torch  # noqa: F401

    mark("import torch")
    import pyarrow  # noqa: F401

    mark("import pyarrow")
    from engine import backends, train, worker

    mark("import the engine")
    _around(worker, "assemble", mark, before="run folder", after="open the data cache")
    _around(worker, "receipt", mark, before="plan", after="receipt")
    _around(backends, "build", mark, before="write recipe and lock", first=lambda: _model(mark))
    _around(train.Trainer, "_step", mark, before="rest of the set-up", after="first step")


def _model(mark: Marks) -> None:
    """Import what the backend builds on, and mark its parts."""
    import transformers  # noqa: F401

    mark("import transformers")
    from engine.backends import torch_backend

    mark("import the backend")
    from transformers.models.llama import modeling_llama  # noqa: F401

    mark("import the model's class")
    _around(torch_backend.hf_model, "load", mark, before="register attention", after="build the model")
    _around(torch_backend.TorchBackend, "probe", mark, before="optimizer", after="probe")


def _around(
    owner: Any,
    name: str,
    mark: Marks,
    *,
    before: str | None = None,
    after: str | None = None,
    then: Callable[[], None] = lambda: None,
    first: Callable[[], None] = lambda: None,
) -> None:
    """Replace a function by itself between marks."""
    function = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        if before:
            mark(before)
        first()
        out = function(*args, **kwargs)
        if after:
            mark(after)
        then()
        return out

    setattr(owner, name, marked)


def main() -> int:
    """Measure, print and write the table; 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="name of the Markdown file in benchmarks/results")
    args = parser.parse_args()
    runs: list[dict[str, float]] = []
    loads = []
    with tempfile.TemporaryDirectory(prefix="startup-") as work:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(args.threads),
            "ANNEAL_CACHE": f"{work}/cache",
            "HF_HUB_OFFLINE": "1",
        }
        for number in range(args.rounds + 1):  # the first fills the cache and is not counted
            result = Path(work, f"{number}.json")
            words = [f"run.dir={work}/run{number}", "logger.backends=[]", *OVERRIDES]
            loads.append(os.getloadavg()[0])
            command = [sys.executable, str(HERE), "--drive", repr(time.time()), str(result), *words]
            subprocess.run(command, env=env, check=True)
            if number:
                runs.append(json.loads(result.read_text()))
    names = list(runs[0])
    last = names.index("first step")
    to_step = [sum(run[n] for n in names[: last + 1]) for run in runs]
    lines = [
        "# Start-up",
        "",
        f"{date.today().isoformat()} · {os.cpu_count()} cores, threads {args.threads} · load before each run {min(loads):.1f} to "
        f"{max(loads):.1f} · Python {platform.python_version()}, torch {metadata.version('torch')}, transformers "
        f"{metadata.version('transformers')} · medians of {args.rounds} runs, tiny model, data cache warm",
        "",
        "| phase | seconds |",
        "|---|---|",
        *(f"| {n} | {median(run[n] for run in runs):.3f} |" for n in names[: last + 1]),
        f"| **command to the end of the first step** | **{median(to_step):.2f}** ({min(to_step):.2f} to {max(to_step):.2f}) |",
        *(f"| after it: {n} | {median(run[n] for run in runs):.3f} |" for n in names[last + 1 :]),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        (HERE.parent / "results").mkdir(exist_ok=True)
        (HERE.parent / "results" / f"{args.out}.md").write_text(text, encoding="utf-8")
    return 0 if median(to_step) < GOAL_S else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        sys.exit(drive(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
    sys.exit(main())
