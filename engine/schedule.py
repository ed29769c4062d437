"""How many steps a run does, and the learning rate as a function of the step alone, so that a resumed run follows its curve."""

from __future__ import annotations

import math

from engine.config.schema import AlgorithmSection, SchedulerSection
from engine.data.plan import Plan
from engine.errors import UserError

WARMUP_RATIO = 0.03
"""Where a recipe sets neither warmup_ratio nor warmup_steps."""


def total_steps(algorithm: AlgorithmSection, plan: Plan) -> int:
    """Return how many steps a run does: the steps or the epochs, whichever come first.

    Raises:
        UserError: If the epochs are less than one step.
    """
    steps, epochs = algorithm.max_num_steps, algorithm.max_num_epochs
    if epochs is None:
        assert steps is not None  # the recipe's check has seen to it
        return steps
    from_epochs = math.floor(epochs * plan.steps_per_epoch + 1e-9)  # 0.29 · 100 is 28.999…
    if not from_epochs:
        raise UserError(f"algorithm.max_num_epochs={epochs}: less than one of {plan.steps_per_epoch} steps; raise it.")
    return from_epochs if steps is None else min(steps, from_epochs)


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
