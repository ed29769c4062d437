"""Objectives: losses as functions of the log-probabilities of the trained tokens."""

from __future__ import annotations

from engine.config.schema import AlgorithmSection
from engine.objectives.sft import SFT
from engine.types import Objective

OBJECTIVES: dict[str, type[Objective]] = {"sft": SFT}


def build(algorithm: AlgorithmSection) -> Objective:
    """Return the objective that ``algorithm.name`` chooses."""
    return OBJECTIVES[algorithm.name]()
