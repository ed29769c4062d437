"""What differs between runs, and which is best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.loggers import flat
from engine.report.runs import LAST_STEPS, Run

ABSENT = "–"
HASH = 10
"""Characters of a fingerprint that are shown."""
PARTS = {
    "data": "Data",
    "weights": "Weights",
    "reference": "Reference",
    "code": "Code",
    "versions": "Version",
    "hardware": "Hardware",
}
"""What a lock holds, and what the table calls it."""
LOSS_KEYS = (
    "algorithm.preference_loss",
    "algorithm.reference_policy_kl_penalty",
    "algorithm.preference_average_log_probs",
    "algorithm.sft_average_log_probs",
    "algorithm.preference_loss_weight",
    "algorithm.sft_loss_weight",
    "algorithm.label_smoothing",
    "algorithm.preference_margin",
    "data.train_on",
)
"""Keys that make the loss another figure."""


@dataclass(frozen=True)
class Difference:
    """A key that differs.

    Attributes:
        part: Where it is from: Recipe, Data, Weights, Code, Version, Hardware.
        key: Its dotted name.
        values: Of each run, as text.
    """

    part: str
    key: str
    values: list[str]


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Return every value that is not the same in all runs: of the recipes first, then of the locks."""
    found = [Difference("Recipe", key, values) for key, values in _differing([flat(run.recipe) for run in runs])]
    for name, part in PARTS.items():
        values = [flat({name: run.lock[name]}) if run.lock.get(name) is not None else {} for run in runs]
        found += [
            Difference(part, key.removeprefix("versions."), list(map(_short, own))) for key, own in _differing(values)
        ]
    return found


def _differing(values: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for own in values for key in own)
    rows = [(key, [own.get(key, ABSENT) for own in values]) for key in keys]
    return [(key, row) for key, row in rows if len(set(row)) > 1]


def _short(value: str) -> str:
    """Return a fingerprint's beginning, and other values as they are."""
    is_hash = len(value) > 2 * HASH and set(value) <= set("0123456789abcdef")
    return value[:HASH] + "…" if is_hash else value


def swept(runs: Sequence[Run]) -> list[list[str]]:
    """Return the keys that a folder of runs varies; keys that always change together are one list.

    They are what its sweep.json says, else what its recipes differ in but for ``run.name``.
    """
    values = [flat(run.swept) for run in runs if run.swept] or [flat(run.recipe) for run in runs if run.recipe]
    together: dict[tuple[int, ...], list[str]] = {}
    for key, row in _differing(values):
        if key != "run.name":
            seen = {value: number for number, value in enumerate(dict.fromkeys(row))}
            together.setdefault(tuple(seen[value] for value in row), []).append(key)
    return list(together.values())


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What runs are ranked by.

    Attributes:
        metric: Its name.
        highest: Whether a higher value is better.
        closing: Whether it is the mean of the last steps, since no run has its ``checkpoint.metric``, instead of the best value.
    """

    metric: str
    highest: bool
    closing: bool

    @property
    def title(self) -> str:
        """What the page calls it."""
        return f"{self.metric}, mean of the last {LAST_STEPS} steps" if self.closing else self.metric

    def score(self, run: Run) -> tuple[int, float] | None:
        """Return step and value of a run's best; None: it has none."""
        if self.closing:
            value = run.closing(self.metric)
            return None if value is None else (run.step, value)
        choose = max if self.highest else min
        return choose(run.finite(self.metric), key=lambda point: point[1], default=None)

    def ranked(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs best first, those without a value last."""
        scored = [(run, score[1]) for run in runs if (score := self.score(run)) is not None]
        order = sorted(scored, key=lambda item: item[1], reverse=self.highest)
        return [run for run, _ in order] + [run for run in runs if self.score(run) is None]


def measure(runs: Sequence[Run]) -> Measure | None:
    """Return what the runs are ranked by: the ``checkpoint.metric`` that all have in common; None: they have other objectives."""
    keys = ("algorithm.name", "checkpoint.metric", "checkpoint.mode")
    found = {tuple(run.setting(key) for key in keys) for run in runs if run.series}
    if len(found) != 1:
        return None
    _, metric, mode = found.pop()
    if any(run.finite(str(metric)) for run in runs):
        return Measure(metric=str(metric), highest=mode == "max", closing=False)
    return Measure(metric="train/loss", highest=False, closing=True)


def caution(runs: Sequence[Run], measured: Measure) -> str:
    """Say why the losses of runs are not the same figure; empty: they are, as far as recipes and locks tell."""
    recipes = [flat(run.recipe) for run in runs if run.recipe]
    keys = [key for key, _ in _differing(recipes) if key in LOSS_KEYS]
    held = [
        flat({k: v for k, v in data.items() if k != "train"})
        for run in runs
        if isinstance(data := run.lock.get("data"), dict)
    ]
    if _differing(held):
        keys.append("validation data")
    if not keys or not measured.metric.endswith("loss"):
        return ""
    return f"These losses are not the same figure in all runs, since they differ in {', '.join(keys)}: look at accuracy as well."
