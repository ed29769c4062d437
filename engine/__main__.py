"""``python -m engine``: compose, check, run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from engine import executors
from engine.config import compose
from engine.errors import EXIT_DONE, EXIT_STOPPED, UserError, command

MULTIRUN, HELP, SHOW = {"-m", "--multirun"}, {"-h", "--help"}, {"--cfg"}


@command
def main(words: list[str]) -> int:
    """Run the command line and return its exit code."""
    flags = [w for w in words if w.startswith("-")]
    overrides = [w for w in words if not w.startswith("-")]
    unknown = [f for f in flags if f not in MULTIRUN | HELP | SHOW]
    if unknown:
        raise UserError(*(f"{f}: no such flag; there are -m, --cfg and --help." for f in unknown))
    if HELP & set(flags):
        from engine.config.help import text

        print(text())
        return EXIT_DONE
    if SHOW & set(flags):
        print(compose.compose(compose.with_quickstart(overrides)).recipe, end="")
        return EXIT_DONE
    return sweep(overrides) if MULTIRUN & set(flags) else run_one(overrides)


def run_one(overrides: list[str]) -> int:
    """Compose one recipe and run it; the quickstart of DPO begins with that of SFT, if there are no weights of it."""
    try:
        words = compose.with_quickstart(overrides)
        if compose.needs_quickstart(words):
            if {"RANK", "SLURM_PROCID"} & set(os.environ):
                raise UserError(
                    "DPO's quickstart starts from the quickstart's weights, and there are none here; run python -m engine first."
                )
            print("no quickstart has been run here, whose weights DPO starts from: running it first\n", flush=True)
            code = run_one([])
            if code != EXIT_DONE:
                return code
            print("\nnow DPO, from these weights\n", flush=True)
            words = compose.with_quickstart(overrides)
        composed = compose.compose(words)
    except UserError as error:  # every rank that a launcher has started sees it; the first one says it
        first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        if first:
            raise
        raise UserError() from error
    if composed.config.cluster.name == "slurm":
        from launchers import submit

        return submit.run(composed.config, composed.recipe)
    return executors.choose(composed.config.cluster).run(composed.config, composed.recipe)


def sweep(overrides: list[str]) -> int:
    """Run every combination of the swept values, one after another, each in a process and folder of its own.

    The folder of the sweep is ``run.dir``, or a fresh one; its points are ``000``, ``001``, ….
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    points = BasicSweeper.split_arguments(compose.parse(compose.swept(overrides)), max_batch_size=None)[0]
    points = [compose.with_quickstart(list(point)) for point in points]
    recipes = [compose.compose(point) for point in points]
    if any(recipe.config.cluster.name == "env" for recipe in recipes):
        raise UserError("-m: cluster=env runs one recipe on the ranks that are there; start a command for each point.")
    root = recipes[0].config.run.dir
    worst = EXIT_DONE
    for number, point in enumerate(points):
        folder = f"{root}/{number:03d}"
        words = [w for w in point if not w.startswith("run.dir=")]
        varying = [w for w in words if any(w not in other for other in points)]
        print(f"{folder}: {' '.join(varying)}", flush=True)
        code = _run_child([sys.executable, "-m", "engine", *words, f"run.dir={folder}"])
        if code == EXIT_STOPPED:
            return code
        worst = worst or code
    return worst


def _run_child(command: list[str]) -> int:
    """Run one point of a sweep; signals that ask to stop are its to answer."""
    child = subprocess.Popen(command)
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = {n: signal.signal(n, lambda number, frame: child.send_signal(number)) for n in asked}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
