"""What a ladder has found, in the forms in which people and programs read it: lines, a table, CSV, a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
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
    kimg: float  # images this network was distilled with; 0 for the teacher
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


def describe_rung(rung: Rung) -> str:
    """One line."""
    distance = "" if rung.fd is None else f"fd {spread(rung)}, "
    steps = f"{rung.steps:>4d} step{'s' * (rung.steps != 1)}"
    return f"{steps}: {distance}end-point RMSE {rung.endpoint_rmse:.4g}, NFE {rung.nfe}"


def describe_point(point: CurvePoint) -> str:
    """One line."""
    distance = "" if point.fd is None else f"fd {point.fd:.4g}, "
    steps = f"{point.steps:>4d} {point.solver.capitalize()} step{'s' * (point.steps != 1)}"
    return f"{steps} of the teacher itself: {distance}end-point RMSE {point.endpoint_rmse:.4g}, NFE {point.nfe}"


def spread(rung: Rung) -> str:
    """'1.064 ± 0.012', or the mean alone of a single seed set, or '-'."""
    if rung.fd is None:
        return "-"
    return f"{rung.fd:.4g}" if rung.fd_std is None else plus_minus(rung.fd, rung.fd_std)


def plus_minus(mean: float, std: float) -> str:
    """'1.400 ± 0.055': the deviation with two figures (three before the point), the mean as exact as that."""
    decimals = min(max(1 - math.floor(math.log10(std)), 0), 12) if 0 < std < math.inf else 4
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def format_table(rungs: Sequence[Rung], curve: Sequence[CurvePoint] = (), floor: Floor | None = None) -> str:
    """The ladder as text; below it the teacher itself at the students' costs, and the data itself."""
    lines = [f"{'steps':>6} {'NFE':>5} {'fd':>16} {'endpoint_rmse':>14} {'s/kimg':>9} {'kimg':>8}  network"]
    for rung in rungs:
        lines.append(
            f"{rung.steps:>6} {rung.nfe:>5} {spread(rung):>16} {rung.endpoint_rmse:>14.4f} {rung.sec_per_kimg:>9.3g} "
            f"{rung.kimg:>8g}  {rung.network}"
        )
    for point in curve:
        distance = "-" if point.fd is None else f"{point.fd:.4g}"
        lines.append(
            f"{point.steps:>6} {point.nfe:>5} {distance:>16} {point.endpoint_rmse:>14.4f} {'':>9} {'':>8}  "
            f"the teacher itself, {point.solver.capitalize()}"
        )
    if floor is not None:
        lines.append(
            f"{'':>6} {'':>5} {plus_minus(floor.mean, floor.std):>16} {'':>14} {'':>9} {'':>8}  the data itself: "
            f"{floor.images} images drawn from it, {len(floor.distances)} times"
        )
    return "\n".join(lines)


def to_csv(kind: type, rows: Sequence[Any]) -> str:
    """Dataclass values as CSV, a column per field; a list is joined by spaces, None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[each.name for each in fields(kind)], lineterminator="\n")
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
HEUN = {"color": GREEN, "marker": "^", "linestyle": "-.", **QUIET}
EULER = {"color": PINK, "marker": "s", "linestyle": (0, (6, 1.5, 1, 1.5, 1, 1.5)), **QUIET}
TEACHER = {"color": ORANGE, "linestyle": "--", "linewidth": 1.2, "zorder": 2}
FLOOR = {"color": GREY, "linestyle": ":", "linewidth": 1.4, "zorder": 2}
BAND = {"color": GREY, "alpha": 0.15, "linewidth": 0, "zorder": 1}  # one deviation up and down


def plot_ladder(rungs: Sequence[Rung], file: Any, curve: Sequence[CurvePoint] = (), floor: Floor | None = None) -> None:
    """Writes `ladder_figure` as a PNG."""
    ladder_figure(rungs, curve, floor).savefig(file, format="png")


def ladder_figure(rungs: Sequence[Rung], curve: Sequence[CurvePoint] = (), floor: Floor | None = None) -> Any:
    """Quality against network calls per image: Fréchet distance (if there are any) and end-point error, a panel each.

    rungs: the teacher first. curve: the teacher itself with fewer steps. floor: how far the data are from themselves.
    """
    panels: list[Callable[..., list[int]]] = []
    if any(rung.fd is not None for rung in rungs):
        panels.append(_plot_distances)
    if len(rungs) > 1 or not panels:
        panels.append(_plot_errors)
    # Tried out: the legend, two columns of small print at most, leaves the panels nearly square.
    figure, axes = new_figure(3.9 * max(len(panels), 1.2), 3.8, len(panels))
    known: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        drawn = panel(axis, rungs, curve, floor)
        _scale_x(axis, drawn, [rung.nfe for rung in rungs])
        scale_y(axis)
        style(axis, "network calls per image (NFE)")
        known |= dict(reversed(pair) for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    ranks = ("students", "teacher,", "the data", "")
    order = sorted(known, key=lambda label: next(i for i, start in enumerate(ranks) if label.startswith(start)))
    figure.legend(  # below the panels, where there are no data to cover
        [known[label] for label in order],
        order,
        loc="outside lower center",
        ncols=len(panels),
        frameon=False,
        fontsize=8,
        handlelength=3.2,
    )
    return figure


def _plot_distances(axis: Any, rungs: Sequence[Rung], curve: Sequence[CurvePoint], floor: Floor | None) -> list[int]:
    """Returns the numbers of network calls that it has drawn something at."""
    teacher, students = rungs[0], [rung for rung in rungs[1:] if rung.fd is not None]
    _plot_curve(axis, [(p.solver, p.nfe, p.fd) for p in curve if p.fd is not None])
    if teacher.fd is not None:
        axis.axhline(teacher.fd, **TEACHER)
        _plot_spread(axis, [teacher], _name_teacher(teacher), {**TEACHER, "marker": "D", "markersize": 5})
    if students:
        sets = max(len(rung.fd_sets) for rung in students)
        of_sets = f", mean ± std of {sets} x {teacher.images} images" if sets > 1 else f", by {teacher.images} images"
        of_sets *= teacher.images is not None
        _plot_spread(axis, students, _name_students(rungs) + of_sets, STUDENTS)
    if floor is not None:
        axis.axhspan(floor.mean - floor.std, floor.mean + floor.std, **BAND)
        axis.axhline(floor.mean, label=f"the data itself ({floor.images} images drawn from it, ± std)", **FLOOR)
    features = "Inception" if (teacher.detector or "").startswith("inception") else "own detector"
    axis.set_ylabel(f"Fréchet distance ({features})", fontsize=9)
    return [rung.nfe for rung in rungs if rung.fd is not None] + [p.nfe for p in curve if p.fd is not None]


def _plot_spread(axis: Any, rungs: Sequence[Rung], label: str, look: dict[str, Any]) -> None:
    """Distances with error bars, where there are several seed sets."""
    spreads = None if any(rung.fd_std is None for rung in rungs) else [rung.fd_std for rung in rungs]
    axis.errorbar(
        [rung.nfe for rung in rungs],
        [rung.fd for rung in rungs],
        yerr=spreads,
        capsize=2.5,
        elinewidth=1,
        label=label,
        **look,
    )


def _plot_errors(axis: Any, rungs: Sequence[Rung], curve: Sequence[CurvePoint], floor: Floor | None) -> list[int]:
    """The same of end-point errors. The teacher's own is 0 by definition, which is no place on a logarithmic axis: it
    is left out."""
    students = rungs[1:]
    _plot_curve(axis, [(point.solver, point.nfe, min(point.endpoint_rmse, FARTHEST)) for point in curve])
    for point in curve:
        if point.endpoint_rmse > FARTHEST:
            colour = (HEUN if point.solver == "heun" else EULER)["color"]
            text = f"↑ {point.endpoint_rmse:.3g}"
            place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axis.annotate(text, (point.nfe, FARTHEST), color=colour, **place)
    if students:
        label = _name_students(rungs) if all(rung.fd is None for rung in students) else None
        axis.plot([r.nfe for r in students], [r.endpoint_rmse for r in students], label=label, **STUDENTS)
    else:
        label = f"{_name_teacher(rungs[0])}: 0 by definition"
        axis.plot([rungs[0].nfe], [0.0], label=label, clip_on=False, **{**TEACHER, "marker": "D"})
    axis.set_ylabel("end-point RMSE to the teacher (in [-1, 1])", fontsize=9)
    return [rung.nfe for rung in students or rungs] + [point.nfe for point in curve]


def _plot_curve(axis: Any, points: Sequence[tuple[str, int, float]]) -> None:
    for solver, look in (("heun", HEUN), ("euler", EULER)):
        chosen = [(nfe, value) for name, nfe, value in points if name == solver]
        if chosen:
            label = f"teacher itself with fewer {solver.capitalize()} steps"
            axis.plot(*zip(*sorted(chosen), strict=True), label=label, **look)


def _scale_x(axis: Any, drawn: Sequence[int], ticks: Sequence[int]) -> None:
    """Logarithmic, as wide as what is drawn, with the rungs' numbers below."""
    low, high = min(drawn), max(drawn)
    ticks = sorted({tick for tick in ticks if low <= tick <= high})
    axis.set_xscale("log", base=2)
    margin = 1.35 if high >= 2 * low else 2
    axis.set_xlim(low / margin, high * margin)
    axis.minorticks_off()
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    others = sorted({*drawn} - {*ticks})  # of the teacher itself: 3, 7, 15; no room for numbers
    axis.set_xticks(others, [""] * len(others), minor=True)


def _name_teacher(rung: Rung) -> str:
    solver = "Heun step" if rung.nfe > rung.steps else "step"
    return f"teacher, {count(rung.steps, solver)} (NFE {rung.nfe})"


def _name_students(rungs: Sequence[Rung]) -> str:
    return f"students ({' → '.join(str(rung.steps) for rung in rungs)} steps)"
