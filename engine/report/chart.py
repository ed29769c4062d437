"""Charts as numbers: axes with round ticks, lines of few points that keep every extreme, marks. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 430, 12, 218
"""The chart's box, in the units of its drawing."""
COLOURS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3")
"""Of the lines of one run after another; the first is whole. 12 runs differ in both colour and dashes."""
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-5 4.6 3.4h-9.2z",
    "M0-5 5 0 0 5-5 0z",
    "M0 5 4.6-3.4h-9.2z",
)
"""Outlines of the marks of one run after another: circle, square, triangle, diamond, triangle that stands on its tip."""
BUCKETS = 150
"""Stretches of a long line; each keeps its lowest and its highest point."""
SMOOTHED = 100
"""Points from which on a line has a moving mean."""
MOST_TICKS = 6
DECADE = 10.0
MOST_LABEL = 14
LABEL = (36, 13)
"""Room that the label of a dot takes."""

Point = tuple[float, float | None]
"""Step and value; None breaks the line."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: values from ``low`` to ``high`` lie from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: list[tuple[float, str]]
    """Place and label."""

    def at(self, value: float) -> float:
        """Return the place of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.stop - self.start) * (value - low) / (high - low), 1)


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a run has in a chart.

    Attributes:
        run: Its number, which is its colour, dashes and shape.
        path: Its line in SVG's words.
        mean: A moving mean over it; empty: it has none.
        marks: Place of each mark, what it stands for.
        caption: Its last value.
    """

    run: int
    path: str = ""
    mean: str = ""
    marks: list[tuple[float, float, str]]
    caption: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A metric over the steps, or over a swept value."""

    title: str
    unit: str
    x: Axis
    y: Axis
    lines: list[Line]
    window: int = 0
    """Steps of the moving means; 0: there are none."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A run in the chart of a sweep."""

    run: int
    x: float
    y: float
    label: str
    title: str
    best: bool


def thin(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """Return at most a few points a stretch: its first, lowest, highest and last one, and breaks.

    Args:
        points: In order of their steps.
        buckets: Number of stretches; nothing is left out of a line of up to four points each.
    """
    if len(points) <= 4 * buckets:
        return list(points)
    kept: set[int] = set()
    for bucket in range(buckets):
        stretch = range(len(points) * bucket // buckets, len(points) * (bucket + 1) // buckets)
        values = [(value, i) for i in stretch if (value := points[i][1]) is not None]
        kept |= {stretch[0], stretch[-1], *(i for _, i in (min(values), max(values)))} if values else {stretch[0]}
        broken = next((i for i in stretch if points[i][1] is None), None)
        kept |= set() if broken is None else {broken}
    return [points[i] for i in sorted(kept)]


def moving_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Return the mean of ``window`` values around each point, fewer at both ends; values that are not finite are left out."""
    finite = [(step, value) for step, value in points if value is not None]
    sums = [0.0]
    for _, value in finite:
        sums.append(sums[-1] + value)
    found: list[Point] = []
    for i, (step, _) in enumerate(finite):
        half = min(window // 2, i, len(finite) - 1 - i)
        found.append((step, (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)))
    return found


def path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Return a line in SVG's words; a value alone between breaks is a dot, since line ends are round."""
    words, pen = [], "M"
    for step, value in points:
        if value is None:
            pen = "M"
            continue
        words.append(f"{pen}{x.at(step):g} {y.at(value):g}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(words)


def axis(
    values: Sequence[float],
    start: float,
    stop: float,
    *,
    base: Sequence[float] = (),
    log: bool = False,
    room: float = 0.05,
) -> Axis:
    """Return an axis that holds some values.

    Args:
        values: At least one.
        start: Place of its low end.
        stop: Place of its high end.
        base: Values that it holds as well.
        log: Equal factors are equally far.
        room: Share of the axis that is left free beyond the values on either side.
    """
    low, high = min([*values, *base]), max([*values, *base])
    if log:
        exponents = math.log10(low), math.log10(high)
        free = room * (exponents[1] - exponents[0]) or 0.5
        low, high = 10 ** (exponents[0] - free), 10 ** (exponents[1] + free)
        ticks = _log_ticks(low, high)
    else:
        free = room * ((high - low) or abs(high) or 1.0)
        base = base if low < high else ()
        low, high = (low if low in base else low - free), (high if high in base else high + free)
        ticks = _ticks(low, high)
    found = Axis(low=low, high=high, start=start, stop=stop, log=log, ticks=[])
    return Axis(**{**vars(found), "ticks": [(found.at(value), label) for value, label in ticks]})


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return round values within a range, and their labels."""
    rough = (high - low) / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, _label(number * step, step)) for number in range(first, last + 1)]


def _label(value: float, step: float) -> str:
    """Return a tick's label, as precise as the ticks are far apart."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= size / 10 and abs(value) >= size:
            return f"{value / size:g}{unit}"
    if 0 < step < 1e-4:
        return _scientific(value)
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _scientific(value: float) -> str:
    """Return a small or large number as a recipe would have it: 2e-5."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return the powers of ten within a range, their doubles and halves too where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    values = [factor * 10.0**power for power in powers for factor in factors]
    return [(value, number(value)) for value in values if low <= value <= high]


def number(value: float) -> str:
    """Return a setting as a recipe would have it: 0.1, 2e-5, 40,000."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return _scientific(value) if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def figure(value: float | None) -> str:
    """Return a measured value in four digits, zeros included; more for large ones."""
    if value is None:
        return "–"
    return f"{value:#.4g}" if 1e-3 <= abs(value) < 1000 else number(value)


def spans_decades(values: Sequence[float]) -> bool:
    """Tell whether values are so far apart that only equal factors show them all."""
    return min(values) > 0 and max(values) / min(values) >= DECADE


def is_number(value: object) -> bool:
    """Tell whether a value of a recipe is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choices_axis(labels: Sequence[str], start: float, stop: float) -> Axis:
    """Return an axis with a place for each choice, of which choice i is value i."""
    found = Axis(low=-0.5, high=len(labels) - 0.5, start=start, stop=stop, log=False, ticks=[])
    short = [label if len(label) <= MOST_LABEL else "…" + label[1 - MOST_LABEL :] for label in labels]
    return Axis(**{**vars(found), "ticks": [(found.at(i), label) for i, label in enumerate(short)]})


def apart(dots: Sequence[Dot]) -> list[Dot]:
    """Return the dots, best last, with the labels that have room: the best's first, then in their order."""
    kept: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: not dot.best):
        crowded = any(abs(dot.x - k.x) < LABEL[0] and abs(dot.y - k.y) < LABEL[1] for k in kept if k.label)
        kept.append(replace(dot, label="") if crowded else dot)
    return kept[::-1]
