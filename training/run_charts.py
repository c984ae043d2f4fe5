"""Line charts as SVG text, for a page that stands alone. Colours are the page's: classes s0 to s5, or a curve's own.

Curves may have any number of points: more than `BINS` are drawn as a band from the least to the greatest value of each
bin. What is not finite, or not positive on a logarithmic axis, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 460, 260  # of a chart, in the units of its own coordinates
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 10, 44  # room for the words around it
BINS = 400  # as many as there are pixels to tell apart
SMOOTHING = 0.02  # half-life of a smoothed curve, as a part of what it spans


@dataclass(frozen=True)
class Curve:
    """One line. x increases; `style` is a class of the page, `colour` one of its own instead.

    style: s0 ... s5; with ' raw' what is faint behind, with ' dots' a marker at each point.
    spread: how far up and down a value may be: bars at dots, a band about a line. NaN where that isn't known.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: str = "s0"
    colour: str | None = None
    spread: np.ndarray | None = None


def smooth(x: np.ndarray, y: np.ndarray, part: float = SMOOTHING) -> np.ndarray:
    """Exponential average of what came before, with a half-life of `part` of x's whole range, unbiased at its start.

    A point counts for the stretch of x that it stands for. Of few points, nothing is averaged away.
    """
    if len(x) < 3 or x[-1] <= x[0]:
        return y
    stretch = np.diff(x, prepend=x[0] - (x[1] - x[0]))
    keep = 0.5 ** (stretch / (part * (x[-1] - x[0])))
    total = weight = 0.0
    result = np.empty_like(y, dtype=np.float64)
    for index, (factor, value) in enumerate(zip(keep.tolist(), y.tolist(), strict=True)):
        if math.isfinite(value):
            total, weight = factor * total + (1 - factor) * value, factor * weight + (1 - factor)
        result[index] = total / weight if weight else math.nan
    return result


def line_chart(
    curves: Sequence[Curve],
    x_label: str,
    title: str,
    log_x: bool = False,
    log_y: bool = True,
    x_ticks: Sequence[float] | None = None,
    y_limit: float = math.inf,
) -> Markup | None:
    """The SVG, or None where there is nothing to draw. title: what a screen reader says; the page says what y is.

    The last curve lies on top. y_limit: what is greater is drawn at the upper edge, dots with their number beside.
    """
    shown = [clean(curve, log_x, log_y) for curve in curves]
    shown = [curve for curve in shown if len(curve.x)]
    if not shown:
        return None
    x = Scale.around([curve.x for curve in shown], log_x, LEFT, WIDTH - RIGHT, margin=0.04 if log_x else 0.0)
    reach = [np.minimum(end, y_limit) for curve in shown for end in ends(curve, log_y)]
    y = Scale.around(reach, log_y, HEIGHT - BOTTOM, TOP, margin=0.05, from_zero=not log_y)
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)]
    y_ticks = y.ticks()
    for value, label in zip(y_ticks, labels(y_ticks), strict=True):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, WIDTH - RIGHT, y=y(value))
        )
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 7, y(value) + 4.5, label))
    for value in x.ticks() if x_ticks is None else [tick for tick in x_ticks if x.low <= tick <= x.high]:
        parts.append(
            Markup('<line class="grid" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(TOP, HEIGHT - BOTTOM, x=x(value))
        )
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                x(value), HEIGHT - BOTTOM + 17, short(value)
            )
        )
    parts += [draw(curve, x, y, y_limit) for curve in shown]
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 7, x_label
        )
    )
    return Markup("").join([*parts, Markup("</svg>")])


def clean(curve: Curve, log_x: bool, log_y: bool) -> Curve:
    """Without the points that have no place."""
    good = np.isfinite(curve.x) & np.isfinite(curve.y)
    if log_x:
        good &= curve.x > 0
    if log_y:
        good &= curve.y > 0
    spread = None if curve.spread is None else curve.spread[good]
    return Curve(curve.name, curve.x[good], curve.y[good], curve.style, curve.colour, spread)


def ends(curve: Curve, log_y: bool) -> list[np.ndarray]:
    """The values of a clean curve, and how far down and up its spread goes, where that has a place."""
    if curve.spread is None:
        return [curve.y]
    spread = np.nan_to_num(curve.spread)
    low = curve.y - spread
    return [np.where(low > 0, low, curve.y) if log_y else low, curve.y, curve.y + spread]


def draw(curve: Curve, x: Scale, y: Scale, y_limit: float = math.inf) -> Markup:
    """A line, a single point, or of very many points a band; about it the spread, if it has one."""
    own = Markup(' style="--c:{}"').format(curve.colour) if curve.colour else ""
    name = Markup("<title>{}</title>").format(curve.name)
    across = np.array([x(value) for value in curve.x.tolist()])
    bins = ((across - across[0]) / max(across[-1] - across[0], 1e-9) * (BINS - 1)).astype(int)
    if len(across) > 2 * BINS:
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        centres = np.add.reduceat(across, starts) / np.diff(starts, append=len(across))
        if "raw" in curve.style:
            low, high = np.minimum.reduceat(curve.y, starts), np.maximum.reduceat(curve.y, starts)
            outline = [*zip(centres, high, strict=True), *zip(centres[::-1], low[::-1], strict=True)]
            return Markup('<path class="band {}"{} d="{}Z">{}</path>').format(curve.style, own, path(outline, y), name)
        values = np.add.reduceat(curve.y, starts) / np.diff(starts, append=len(across))
    else:
        centres, values = across, curve.y
    points = list(zip(centres, np.minimum(values, y_limit), strict=True))
    line = Markup('<path class="line {}"{} d="{}">{}</path>').format(curve.style, own, path(points, y), name)
    has_dots = len(points) == 1 or "dots" in curve.style
    parts = []
    if curve.spread is not None and len(values) == len(curve.spread):
        low, *_, high = ends(curve, y.log)
        if has_dots:
            for centre, bottom, top in zip(centres.tolist(), low.tolist(), high.tolist(), strict=True):
                bar = f"M{centre - 3:.1f} {y(top)}h6m-3 0V{y(bottom)}m-3 0h6"
                parts.append(Markup('<path class="bar {}"{} d="{}"/>').format(curve.style, own, bar))
        else:
            outline = [*zip(centres, high, strict=True), *zip(centres[::-1], low[::-1], strict=True)]
            parts.append(Markup('<path class="band {}"{} d="{}Z"/>').format(curve.style, own, path(outline, y)))
    parts.append(line)
    if has_dots:
        for centre, x_value, value, drawn in zip(centres, curve.x, values, np.minimum(values, y_limit), strict=True):
            words = f"{curve.name}: {value:.4g} at {x_value:.4g}"
            height = y(float(drawn))
            dot = Markup('<circle class="dot {}"{} cx="{:.1f}" cy="{}" r="3.5"><title>{}</title></circle>')
            parts.append(dot.format(curve.style, own, centre, height, words))
            if value > y_limit:
                told = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
                parts.append(told.format(centre, height - 7, f"↑ {value:.3g}"))
    return Markup("").join(parts)


def path(points: Iterable[tuple[float, float]], y: Scale) -> str:
    """Points (x in the chart's units, y as a value) as SVG's path data."""
    return "M" + "L".join(f"{x:.1f} {y(float(value)):.1f}" for x, value in points)


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on a way from `start` to `stop`."""

    low: float
    high: float
    log: bool
    start: float
    stop: float

    @classmethod
    def around(
        cls, values: Sequence[np.ndarray], log: bool, start: float, stop: float, margin: float, from_zero: bool = False
    ) -> Scale:
        """Wide enough for all of them, with a margin as a part of it."""
        low = min(float(each.min()) for each in values)
        high = max(float(each.max()) for each in values)
        if from_zero:
            low = min(low, 0.0)
        if log:
            if high < 2 * low:  # nearly constant: what is noise shall not look like a change
                low, high = low / 1.5, high * 1.5
            room = (math.log(high) - math.log(low)) * margin
            return cls(math.exp(math.log(low) - room), math.exp(math.log(high) + room), log, start, stop)
        if high <= low == 0 and from_zero:
            high = 1.0
        if high <= low:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        room = (high - low) * margin
        return cls(low if from_zero and low == 0 else low - room, high + room, log, start, stop)

    def __call__(self, value: float) -> float:
        change: Callable[[float], float] = math.log if self.log else float
        part = (change(value) - change(self.low)) / (change(self.high) - change(self.low))
        return round(self.start + part * (self.stop - self.start), 2)

    def ticks(self) -> list[float]:
        """Some four to eight round numbers."""
        span = math.log10(self.high / self.low) if self.log else 0.0
        if span < 0.5:  # so little that a logarithmic axis looks like any other
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
            step *= next((factor for factor in (5, 2) if (self.high - self.low) / (step * factor) >= 3), 1)
            first = math.ceil(self.low / step)
            return [index * step for index in range(first, math.floor(self.high / step * (1 + 1e-9)) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 3, 5, 7) if span < 0.7 else (1, 2, 5) if span < 2.5 else (1,)
        every = max(1, math.ceil(span / 8))
        marks = [factor * 10.0**decade for decade in decades if decade % every == 0 for factor in factors]
        return [mark for mark in marks if self.low <= mark <= self.high]


def labels(ticks: Sequence[float]) -> list[str]:
    """Numbers on an axis, all of one form. Evenly spaced ones have equally many decimals: 0, 0.0005, 0.0010."""
    steps = np.diff(ticks)
    if len(ticks) < 3 or not np.allclose(steps, steps[0], atol=0) or max(map(abs, ticks)) >= 1e4:
        if min(abs(tick) for tick in ticks) < 1e-4:
            return [power(tick) if 0 < abs(tick) < 1 else short(tick) for tick in ticks]
        return [f"{tick:.4g}" if abs(tick) < 1 else short(tick) for tick in ticks]
    decimals = next((n for n in range(5) if np.allclose(np.round(ticks, n), ticks, rtol=1e-6, atol=0)), None)
    return [short(tick) if decimals is None else f"{tick:.{decimals}f}" for tick in ticks]


def short(value: float) -> str:
    """A number on an axis: 0.002, 50, 20k, 1e-5."""
    if value and abs(value) < 1e-3:
        return power(value)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.4g}"


def power(value: float) -> str:
    """2e-5."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def ramp(count: int) -> list[str]:
    """`count` colours from violet over green to amber, alike in lightness: readable on white and on black."""
    return [f"hsl({275 - 235 * index / max(count - 1, 1):.0f} 62% 52%)" for index in range(count)]
