"""Learning rate as a function of the step alone, so that a resumed run follows the same curve."""

from __future__ import annotations

import math

from engine.config.schema import SchedulerSection

WARMUP_RATIO = 0.03
"""Where a recipe sets neither warmup_ratio nor warmup_steps."""


def learning_rate(step: int, total_steps: int, peak: float, section: SchedulerSection) -> float:
    """Return the learning rate of a step.

    Args:
        step: From 1 to ``total_steps``.
        total_steps: Horizon of the decay.
        peak: ``optimizer.lr``.
        section: Shape, warm-up and floor.
    """
    warmup = section.warmup_steps if section.warmup_steps is not None else round(_ratio(section) * total_steps)
    if step <= warmup:
        return peak * step / warmup
    if section.name == "constant":
        return peak
    decay = total_steps - warmup
    if section.name == "wsd":
        decay = min(decay, section.decay_steps or max(1, total_steps // 10))
    done = min(1.0, max(0.0, (step - (total_steps - decay) - 1) / decay))
    share = (1 + math.cos(math.pi * done)) / 2 if section.name == "cosine" else 1 - done
    return section.min_lr + (peak - section.min_lr) * share


def _ratio(section: SchedulerSection) -> float:
    return WARMUP_RATIO if section.warmup_ratio is None else section.warmup_ratio
