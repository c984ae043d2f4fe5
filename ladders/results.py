"""What a ladder has found, in the forms in which people and programs read it: lines, a table, CSV, a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from dnnlib.util import count

from .charts import BLUE, GREEN, GREY, ORANGE, PINK, new_figure, scale_y, style

FARTHEST = 2.0  # end-point error of images in [-1, 1]: what is greater has left them, and stands at the edge


@dataclass(frozen=True)
class Rung:
    """What is known of one network of a ladder, as a line of `ladder.json`."""

    steps: int
    nfe: int
    fd: float | None  # Fréchet distance to the reference in the detector's features, mean over the seed sets
    endpoint_rmse: float  # against the first teacher's images from the same latents, values in [-1, 1]
    sec_per_kimg: float  # sampling time per 1000 images
    kimg: float  # thousands of images this network was distilled with; 0 for the teacher
    network: str  # file
    fd_std: float | None = None  # sample standard deviation over the seed sets; needs two
    fd_sets: list[float] = field(default_factory=list)  # the distance of each seed set
    images: int | None = None  # in a seed set
    detector: str | None = None  # whose features; None without a distance


@dataclass(frozen=True)
class CurvePoint:
    """The first teacher itself, run with fewer steps on a fresh grid of the rho schedule."""

    solver: str
    steps: int
    nfe: int
    fd: float | None  # of the first seed set
    endpoint_rmse: float


@dataclass(frozen=True)
class Floor:
    """How far images drawn from the data set are from all of it: what no sampler is expected to go below."""

    images: int  # in a draw, as many as measure a network
    distances: list[float]  # one per draw

    @property
    def mean(self) -> float:
        return math.fsum(self.distances) / len(self.distances)

    @property
    def std(self) -> float:
        """Sample standard deviation over the draws."""
        return float(np.std(self.distances, ddof=1)) if len(self.distances) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Text


def describe(result: Rung | CurvePoint) -> str:
    """One line."""
    solver, whose = "", ""
    if isinstance(result, CurvePoint):
        solver, whose = f"{result.solver.capitalize()} ", " of the teacher itself"
    steps = f"{result.steps:>4d} {solver}step{'s' * (result.steps != 1)}{whose}"
    distance = "" if result.fd is None else f"fd {spread(result)}, "
    return f"{steps}: {distance}end-point RMSE {result.endpoint_rmse:.4g}, NFE {result.nfe}"


def spread(result: Rung | CurvePoint) -> str:
    """'1.064 ± 0.012', or the mean alone of a single seed set, or '-'."""
    if result.fd is None:
        return "-"
    std = result.fd_std if isinstance(result, Rung) else None
    return f"{result.fd:.4g}" if std is None else plus_minus(result.fd, std)


def plus_minus(mean: float, std: float) -> str:
    """'1.400 ± 0.055': the deviation with two figures (three before the point), the mean as exact as that."""
    decimals = min(max(1 - math.floor(math.log10(std)), 0), 12) if 0 < std < math.inf else 4
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


COLUMNS = ("steps", "NFE", "fd", "endpoint_rmse", "s/kimg", "kimg", "network")


def table_rows(rungs: Sequence[Rung], curve: Sequence[CurvePoint], floor: Floor | None) -> list[list[str]]:
    """The ladder, the teacher itself at the students' costs, and the data itself: a row for each, by `COLUMNS`."""
    rows: list[list[Any]] = [
        [r.steps, r.nfe, spread(r), f"{r.endpoint_rmse:.4f}", f"{r.sec_per_kimg:.3g}", f"{r.kimg:g}", r.network]
        for r in rungs
    ]
    for point in curve:
        name = f"the teacher itself, {point.solver.capitalize()}"
        rows.append([point.steps, point.nfe, spread(point), f"{point.endpoint_rmse:.4f}", "", "", name])
    if floor is not None:
        name = f"the data itself: {floor.images} images drawn from it, {len(floor.distances)} times"
        rows.append(["", "", plus_minus(floor.mean, floor.std), "", "", "", name])
    return [[str(cell) for cell in row] for row in rows]


def format_table(rungs: Sequence[Rung], curve: Sequence[CurvePoint] = (), floor: Floor | None = None) -> str:
    """The same as text."""
    form = "{:>6} {:>5} {:>16} {:>14} {:>9} {:>8}  {}".format
    return "\n".join(form(*row) for row in [COLUMNS, *table_rows(rungs, curve, floor)])


def to_csv(rows: Sequence[Any]) -> str:
    """Dataclass values as CSV, a column per field; a list is joined by spaces, None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[each.name for each in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row).items()
        writer.writerow({name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in values})
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Figure

# Colours that the colour-blind can distinguish; marker and line style differ as well.
STUDENTS = {"color": BLUE, "marker": "o", "linestyle": "-", "linewidth": 1.8, "markersize": 5, "zorder": 4}
QUIET = {"linewidth": 1.0, "markersize": 5, "markerfacecolor": "white", "zorder": 3}
CURVES = {
    "heun": {"color": GREEN, "marker": "^", "linestyle": "-.", **QUIET},
    "euler": {"color": PINK, "marker": "s", "linestyle": (0, (6, 1.5, 1, 1.5, 1, 1.5)), **QUIET},
}
TEACHER = {"color": ORANGE, "linestyle": "--", "linewidth": 1.2, "zorder": 2}
FLOOR = {"color": GREY, "linestyle": ":", "linewidth": 1.4, "zorder": 2}
BAND = {"color": GREY, "alpha": 0.15, "linewidth": 0, "zorder": 1}  # one deviation up and down


def ladder_figure(rungs: Sequence[Rung], curve: Sequence[CurvePoint] = (), floor: Floor | None = None) -> Any:
    """Quality against network calls per image: Fréchet distance (if there are any) and end-point error, a panel each.

    rungs: the teacher first. curve: the teacher itself with fewer steps. floor: how far the data are from themselves.
    """
    first, measured = rungs[0], [rung for rung in rungs if rung.fd is not None]
    panels = bool(measured) + (len(rungs) > 1 or not measured)
    # Tried out: the legend, two columns of small print at most, leaves the panels nearly square.
    figure, axes = new_figure(3.9 * max(panels, 1.2), 3.8, panels)
    teacher = f"teacher, {count(first.steps, 'Heun step' if first.nfe > first.steps else 'step')} (NFE {first.nfe})"
    students = f"students ({' → '.join(str(rung.steps) for rung in rungs)} steps)"
    if measured:
        _plot_distances(axes[0], measured, first, teacher, students, floor)
        points = [(point.solver, point.nfe, point.fd) for point in curve if point.fd is not None]
        _finish(axes[0], f"Fréchet distance ({features_of(first)})", rungs, measured, points)
    if panels > 1 or not measured:
        axis, shown = axes[-1], rungs[1:] or rungs
        if len(rungs) > 1:  # the teacher's own error is 0 by definition, which is no place on a logarithmic axis
            label = None if any(rung.fd is not None for rung in shown) else students
            axis.plot([r.nfe for r in shown], [r.endpoint_rmse for r in shown], label=label, **STUDENTS)
        else:
            marks = {**TEACHER, "marker": "D", "clip_on": False}
            axis.plot([first.nfe], [0.0], label=f"{teacher}: 0 by definition", **marks)
        points = [(point.solver, point.nfe, min(point.endpoint_rmse, FARTHEST)) for point in curve]
        _finish(axis, "end-point RMSE to the teacher (in [-1, 1])", rungs, shown, points)
        for point in curve:
            if point.endpoint_rmse > FARTHEST:
                place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                colour = CURVES.get(point.solver, CURVES["euler"])["color"]
                axis.annotate(f"↑ {point.endpoint_rmse:.3g}", (point.nfe, FARTHEST), color=colour, **place)
    known = {label: mark for axis in axes for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    ranks = ("students", "teacher,", "the data", "")
    order = sorted(known, key=lambda label: next(i for i, start in enumerate(ranks) if label.startswith(start)))
    legend = {"loc": "outside lower center", "ncols": panels, "frameon": False, "fontsize": 8, "handlelength": 3.2}
    figure.legend([known[label] for label in order], order, **legend)  # below, where there are no data to cover
    return figure


def features_of(teacher: Rung) -> str:
    """Whose features the distances of a ladder are of."""
    return "Inception" if (teacher.detector or "").startswith("inception") else "own detector"


def _plot_distances(
    axis: Any, measured: Sequence[Rung], first: Rung, teacher: str, students: str, floor: Floor | None
) -> None:
    """Distances with error bars, where there are several seed sets, and the data's own."""
    if first.fd is not None:
        axis.axhline(first.fd, **TEACHER)
    if first.images is not None:
        sets = max(len(rung.fd_sets) for rung in measured)
        students += f", mean ± std of {sets} x {first.images} images" if sets > 1 else f", by {first.images} images"
    own, others = ([rung for rung in measured if (rung is first) is whose] for whose in (True, False))
    for group, name, marks in (
        (own, teacher, {**TEACHER, "marker": "D", "markersize": 5}),
        (others, students, STUDENTS),
    ):
        if group:
            spreads = None if any(rung.fd_std is None for rung in group) else [rung.fd_std for rung in group]
            place = [rung.nfe for rung in group], [rung.fd for rung in group]
            axis.errorbar(*place, yerr=spreads, capsize=2.5, elinewidth=1, label=name, **marks)
    if floor is not None:
        axis.axhspan(floor.mean - floor.std, floor.mean + floor.std, **BAND)
        axis.axhline(floor.mean, label=f"the data itself ({floor.images} images drawn from it, ± std)", **FLOOR)


def _finish(
    axis: Any, title: str, rungs: Sequence[Rung], drawn: Sequence[Rung], curve: Sequence[tuple[str, int, float]]
) -> None:
    """The teacher's own curve, and the axes: logarithmic, as wide as what is drawn, with the rungs' numbers below."""
    for solver, marks in CURVES.items():
        chosen = sorted((nfe, value) for name, nfe, value in curve if name == solver)
        if chosen:
            label = f"teacher itself with fewer {solver.capitalize()} steps"
            axis.plot(*zip(*chosen, strict=True), label=label, **marks)
    calls = {rung.nfe for rung in drawn} | {nfe for _, nfe, _ in curve}
    low, high = min(calls), max(calls)
    ticks = sorted({rung.nfe for rung in rungs if low <= rung.nfe <= high})
    axis.set_xscale("log", base=2)
    margin = 1.35 if high >= 2 * low else 2
    axis.set_xlim(low / margin, high * margin)
    axis.minorticks_off()
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    others = sorted(calls - {*ticks})  # of the teacher itself: 3, 7, 15; no room for numbers
    axis.set_xticks(others, [""] * len(others), minor=True)
    scale_y(axis)
    style(axis, "network calls per image (NFE)", title)
