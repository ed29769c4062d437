"""``python -m engine``: compose, check, run."""

from __future__ import annotations

import os
import sys

from engine import executors
from engine.config import compose
from engine.errors import EXIT_DONE, UserError, command

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
    return run_sweep(overrides) if MULTIRUN & set(flags) else run_one(overrides)


def run_one(overrides: list[str]) -> int:
    """Compose one recipe and run it; the quickstart of DPO begins with that of SFT, if there are no weights of it."""
    try:
        words = compose.with_quickstart(overrides)
        code = _quickstart_first(words)
        if code != EXIT_DONE:
            return code
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


def run_sweep(overrides: list[str]) -> int:
    """Run, or submit, every combination of the swept values."""
    from engine.sweep.start import start

    code = _quickstart_first(compose.with_quickstart(overrides))
    return start(overrides) if code == EXIT_DONE else code


def _quickstart_first(words: list[str]) -> int:
    """Run the quickstart where words that ``with_quickstart`` returned lack its weights, and return its exit code.

    Raises:
        UserError: On ranks that a launcher has started, which would all run it.
    """
    if not compose.needs_quickstart(words):
        return EXIT_DONE
    if {"RANK", "SLURM_PROCID"} & set(os.environ):
        raise UserError(
            "DPO's quickstart starts from the quickstart's weights, and there are none here; run python -m engine first."
        )
    print("no quickstart has been run here, whose weights DPO starts from: running it first\n", flush=True)
    code = run_one([])
    if code == EXIT_DONE:
        print("\nnow DPO, from these weights\n", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
