"""Charts by matplotlib: axes of one style, curves with very many points, and SVG in the colours of a page."""

from __future__ import annotations

import colorsys
import io
import math
import re
from typing import Any

import numpy as np

LOG_FROM = 8  # a y axis whose values span more than this factor is logarithmic
BINS = 400  # points of a curve that can be distinguished
SMOOTHING = 0.02  # half-life of a smoothed curve, as a part of what it spans
BLUE, GREEN, PINK, ORANGE, GREY = "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#555555"  # Okabe and Ito's
THEME = {  # colours of a figure -> the page's own, which differ in dark mode
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
    "#b0b0b0": "var(--rule)",
    **{colour: f"var(--s{i})" for i, colour in enumerate((BLUE, GREEN, PINK, ORANGE, GREY))},
}


def style(axis: Any, x_label: str) -> None:
    """Small print, a faint grid, no frame."""
    axis.tick_params(labelsize=8)
    axis.set_xlabel(x_label, fontsize=9)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def scale_y(axis: Any) -> None:
    """From 0 where values are alike, logarithmic with plain numbers where they span more than `LOG_FROM`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float).ravel() for line in axis.get_lines()])
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) == 0:
        axis.set_ylim(0, 1)
        return
    low, high = float(positive.min()), float(positive.max())
    if high <= LOG_FROM * low:
        axis.set_ylim(0, 1.12 * high)
        return
    decades = math.log10(high / low)
    axis.set_yscale("log")
    axis.set_ylim(low / 10 ** (0.06 * decades), high * 10 ** (0.06 * decades))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes side by side as an array."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=200)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04))
    return figure, np.atleast_1d(figure.subplots(1, panels))


def plot(axis: Any, x: np.ndarray, y: np.ndarray, label: str, colour: str, raw: bool = False) -> None:
    """A curve; of very many points the mean of each of `BINS` stretches. raw: faint, with all that a stretch spans."""
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    width = 0.8 if raw else 1.5
    if len(x) > 2 * BINS:
        starts = np.unique(np.searchsorted(x, np.linspace(x[0], x[-1], BINS, endpoint=False)))
        counts = np.diff(starts, append=len(x))
        if raw:
            low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
            axis.fill_between(x[starts], low, high, color=colour, alpha=0.2, linewidth=0)
        x, y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    marker = "o" if len(x) == 1 else None
    axis.plot(x, y, color=colour, alpha=0.4 if raw else 1, linewidth=width, label=label, marker=marker, markersize=4)


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


def ramp(count: int) -> list[str]:
    """`count` colours from violet over green to amber, alike in lightness: readable on white and on black."""
    hues = [(275 - 235 * index / max(count - 1, 1)) / 360 for index in range(count)]
    return ["#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue, 0.52, 0.62)) for hue in hues]


def to_svg(figure: Any, name: str, title: str) -> str:
    """The figure as an <svg> element for a page that defines `THEME`'s colours.

    name: of letters and digits, no other figure's of the page; it begins the ids. title: for screen readers.
    """
    import matplotlib
    from markupsafe import escape

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub("|".join(THEME), lambda match: THEME[match[0]], text)
    return f'<svg role="img" aria-label="{escape(title)}"{text.removeprefix("<svg")}'
