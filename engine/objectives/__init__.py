"""Objectives: losses as functions of the log-probabilities of the trained tokens."""

from __future__ import annotations

from collections.abc import Callable

from engine.config.schema import AlgorithmSection
from engine.objectives.dpo import DPO
from engine.objectives.sft import SFT
from engine.types import Objective

OBJECTIVES: dict[str, Callable[[AlgorithmSection], Objective]] = {"sft": lambda _: SFT(), "dpo": DPO}


def build(algorithm: AlgorithmSection) -> Objective:
    """Return the objective that ``algorithm.name`` chooses.

    Raises:
        UserError: If the recipe names code of the user's own that cannot serve.
    """
    return OBJECTIVES[algorithm.name](algorithm)
