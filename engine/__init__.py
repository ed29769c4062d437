"""Anneal's engine: one loop that trains language models by supervised fine-tuning."""

from __future__ import annotations

__version__ = "0.1.0"


def run(overrides: list[str] | None = None) -> int:
    """Run what ``python -m engine OVERRIDES`` runs, in this process, and return its exit code.

    Args:
        overrides: ``group=choice`` and ``key=value`` words; none runs the quickstart.

    Raises:
        UserError: If the recipe cannot run; the message says why.
    """
    from engine.__main__ import run_one

    return run_one(list(overrides or []))
