"""Charts by matplotlib: axes of one style, and curves with very many points."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LOG_FROM = 8  # a y axis whose values span more than this factor is logarithmic
BINS = 100  # points of a curve with very many values
BLUE, GREEN, PINK, ORANGE, GREY = "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#555555"  # Okabe and Ito's


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes side by side as an array."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=200)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04))
    return figure, np.atleast_1d(figure.subplots(1, panels))


def style(axis: Any, x_label: str, y_label: str = "") -> None:
    """Small print, a faint grid, no frame."""
    axis.tick_params(labelsize=8)
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(y_label, fontsize=9)
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


def plot(axis: Any, x: np.ndarray, y: np.ndarray, label: str, colour: Any, band: bool = False) -> None:
    """A curve of the finite values; of very many the mean of each of `BINS` stretches, over a band of all of them."""
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) > 2 * BINS:
        starts = np.unique(np.searchsorted(x, np.linspace(x[0], x[-1], BINS, endpoint=False)))
        counts = np.diff(starts, append=len(x))
        if band:
            low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
            axis.fill_between(x[starts], low, high, color=colour, alpha=0.2, linewidth=0)
        x, y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    axis.plot(x, y, color=colour, label=label, marker="o" if len(x) == 1 else None, markersize=4)
