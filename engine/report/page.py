"""Runs as one HTML page that needs nothing else: no file, no network, no script."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine import html
from engine.report import chart, compare
from engine.report.chart import Axis, Chart, Dot, Line
from engine.report.runs import LAST_STEPS, Group, Run

MOST_SWEPT = 6
"""Keys that a folder of runs may vary to be shown as a sweep."""
ROOM = 0.08
"""Share of the axes of a sweep that is free beyond its dots."""
MOST_CAPTIONED = 8
"""Runs up to which every chart tells their last values."""


@dataclass(frozen=True)
class Kind:
    """A chart over the steps.

    Attributes:
        title: Its name.
        unit: Unit of its values.
        train: Metric of its lines.
        validation: Metric of its marks; empty: it has none.
        base: Values that its axis always holds.
        noisy: Whether a moving mean helps.
    """

    title: str
    unit: str
    train: str
    validation: str = ""
    base: tuple[float, ...] = ()
    noisy: bool = True


KINDS = (
    Kind("Loss", "nats", "train/loss", "validation/loss"),
    Kind("Accuracy", "share of pairs", "train/accuracy", "validation/accuracy", (0.0, 1.0)),
    Kind("Margin", "reward of chosen − rejected", "train/margin", "validation/margin"),
    Kind(
        "Reward of chosen answers", "log π − log π_ref", "train/rewards_chosen_mean", "validation/rewards_chosen_mean"
    ),
    Kind(
        "Reward of rejected answers",
        "log π − log π_ref",
        "train/rewards_rejected_mean",
        "validation/rewards_rejected_mean",
    ),
    Kind("Gradient norm", "before clipping", "train/grad_norm", "", (0.0,)),
    Kind("Learning rate", "", "train/lr", "", (0.0,), noisy=False),
    Kind("Throughput", "tokens/s", "perf/tokens_per_second", "", (0.0,)),
    Kind("Model FLOPs utilisation", "of the peak", "perf/mfu", "", (0.0,)),
    Kind("Memory", "GB, peak since the start", "perf/memory_gb", "", (0.0,), noisy=False),
)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A folder of runs that differ in a few values.

    Attributes:
        title: The folder.
        metric: What its runs are ranked by.
        charts: Of that metric over each swept value, with what else changes with the value.
        caution: Why the figures may not compare; empty: they do.
    """

    title: str
    metric: str
    charts: list[tuple[Chart, list[Dot], list[str]]]
    caution: str


def page(groups: Sequence[Group]) -> str:
    """Return runs as a page."""
    environment = html.environment()
    environment.filters["figure"] = chart.figure
    environment.globals |= {"C": chart, "zip": zip}
    runs = [run for group in groups for run in group.runs]
    numbers = {run.folder: i for i, run in enumerate(runs)}
    measure = compare.measure(runs)
    ranked = runs if measure is None else measure.ranked(runs)
    return environment.get_template("report.html").render(
        title=_title(groups, runs),
        runs=runs,
        labels=labels(groups, keys=True),
        short=labels(groups, keys=False),
        numbers=numbers,
        ranked=ranked,
        measure=measure,
        best=ranked[0] if measure is not None and len(runs) > 1 and measure.score(ranked[0]) is not None else None,
        caution=compare.caution(runs, measure) if measure is not None else "",
        charts=[made for kind in KINDS if (made := over_steps(kind, runs)) is not None],
        captioned=len(runs) <= MOST_CAPTIONED,
        sweeps=[found for group in groups if group.many and (found := _sweep(group, numbers)) is not None],
        differences=compare.differences(runs),
        last_steps=LAST_STEPS,
        made=time.strftime("%-d %B %Y, %H:%M"),
    )


def _title(groups: Sequence[Group], runs: Sequence[Run]) -> str:
    names = [group.folder.resolve().name for group in groups]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown}: {len(runs)} run{'s' * (len(runs) > 1)}"


def labels(groups: Sequence[Group], *, keys: bool) -> list[str]:
    """Return what each run is called: its name, and of up to two values that its folder sweeps the values, with or without keys."""
    found = []
    for group in groups:
        swept = [same[0] for same in compare.swept(group.runs)] if group.many else []
        for run in group.runs:
            shown = swept if len(swept) <= 2 and (run.recipe or run.swept) else []
            values = [keys * f"{key.rpartition('.')[2]} " + _shown(run, key) for key in shown]
            found.append(" · ".join([run.name, *values]))
    return found


def _shown(run: Run, key: str) -> str:
    value = run.setting(key)
    return chart.number(value) if chart.is_number(value) else str(value)


def over_steps(kind: Kind, runs: Sequence[Run]) -> Chart | None:
    """Return a metric of all runs over the steps; None: no run has it."""
    drawn = [run for run in runs if run.finite(kind.train) or run.finite(kind.validation)]
    if not drawn:
        return None
    points = [p for run in drawn for name in (kind.train, kind.validation) for p in run.finite(name)]
    x = chart.axis([step for step, _ in points], chart.LEFT, chart.RIGHT, base=(0.0, max(s for s, _ in points)))
    y = chart.axis([value for _, value in points], chart.BOTTOM, chart.TOP, base=kind.base)
    longest = max(len(run.finite(kind.train)) for run in drawn)
    window = 2 * (longest // 100) + 1 if kind.noisy and longest >= chart.SMOOTHED else 0
    lines = [_line(kind, i, run, x, y, window) for i, run in enumerate(runs) if run in drawn]
    return Chart(title=kind.title, unit=kind.unit, x=x, y=y, lines=lines, window=window)


def _line(kind: Kind, i: int, run: Run, x: Axis, y: Axis, window: int) -> Line:
    points: list[chart.Point] = list(run.series.get(kind.train, {}).items())
    marks = run.finite(kind.validation)
    last = [value for name in (kind.train, kind.validation) if (value := run.last(name)) is not None]
    return Line(
        run=i,
        path=chart.path(chart.thin(points), x, y),
        mean=chart.path(chart.thin(chart.moving_mean(points, window)), x, y) if window else "",
        marks=[(x.at(step), y.at(value), f"step {step:,}: {chart.figure(value)}") for step, value in marks],
        caption=" / ".join(map(chart.figure, last)),
    )


def _sweep(group: Group, numbers: dict[Any, int]) -> Sweep | None:
    """Return a folder's runs by the values that they differ in; None: it is no sweep, or there is nothing to compare."""
    keys, measure = compare.swept(group.runs), compare.measure(group.runs)
    if not keys or len(keys) > MOST_SWEPT or measure is None:
        return None
    scored = [run for run in group.runs if measure.score(run) is not None]
    return Sweep(
        title=group.folder.resolve().name,
        metric=measure.title,
        charts=[(*over_values(scored, same[0], measure, numbers), same[1:]) for same in keys],
        caution=compare.caution(group.runs, measure),
    )


def over_values(
    runs: Sequence[Run], key: str, measure: compare.Measure, numbers: dict[Any, int]
) -> tuple[Chart, list[Dot]]:
    """Return a sweep's metric over one of its values; numbers far apart on a logarithmic axis, others side by side."""
    values = [run.setting(key) for run in runs]
    scores = [found[1] for run in runs if (found := measure.score(run)) is not None]
    best = measure.ranked(runs)[0]
    if all(map(chart.is_number, values)):
        x = chart.axis(values, chart.LEFT, chart.RIGHT, log=chart.spans_decades(values), room=ROOM)
        places = [x.at(value) for value in values]
    else:
        choices = list(dict.fromkeys(_shown(run, key) for run in runs))
        x = chart.choices_axis(choices, chart.LEFT, chart.RIGHT)
        places = [x.at(choices.index(_shown(run, key))) for run in runs]
    y = chart.axis(scores, chart.BOTTOM, chart.TOP, room=2 * ROOM)
    dots = [
        Dot(
            run=numbers[run.folder],
            x=place,
            y=y.at(score),
            label=chart.figure(score),
            title=f"{run.name}, {key.rpartition('.')[2]} {_shown(run, key)}: {chart.figure(score)}",
            best=run is best,
        )
        for run, place, score in zip(runs, places, scores, strict=True)
    ]
    dots = chart.apart(dots)
    return Chart(title=key, unit="", x=x, y=y, lines=[]), dots
