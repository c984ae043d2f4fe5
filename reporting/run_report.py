"""One page about a run or a ladder: the values of `run_files` -> HTML, by run_report.html. Imports no torch.

The page escapes whatever the files hold, and bounds it. It runs no script.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dnnlib.errors import printable
from dnnlib.util import count, format_time
from ladders import charts
from ladders.results import CurvePoint, Rung, ladder_figure, plus_minus

from .run_files import Ladder, Run, mapping, number, numbers, show_kimg

MARK = "<!-- report.py of edm-distill -->"  # the first line of a page: what may be written over
MAX_OPTIONS = 20_000  # pieces of training_options.json that are shown: names, values, signs


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def draw(run: Run, title: str, curves: Sequence[tuple[np.ndarray, str, str]], axis_from_zero: bool = False) -> Markup:
    """Curves (values of every tick, colour, label or '') against the images trained; empty where there are none."""
    figure, (axis,) = charts.new_figure(5.2, 2.9)
    for y, colour, label in curves:
        charts.plot(axis, run.stats.kimg, y, label, colour, raw=label == "every tick")
    if not any(np.isfinite(line.get_ydata()).any() for line in axis.get_lines()):
        return Markup("")
    charts.style(axis, "images trained, kimg")
    axis.xaxis.set_major_formatter("{x:,.6g}")
    if axis_from_zero:
        axis.set_ylim(0, max(float(np.nanmax(line.get_ydata())) for line in axis.get_lines()) * 1.1 or 1)
    else:
        charts.scale_y(axis)
    if any(label for *_, label in curves):
        axis.legend(frameon=False, fontsize=8)
    name = re.sub(r"[^0-9A-Za-z]", "-", f"{title}-{run.folder.name}")
    return Markup(charts.to_svg(figure, name, f"{title} of {run.name}"))


def loss_chart(run: Run) -> Markup:
    return draw(run, "Loss", with_average(run, "loss"))


def jump_chart(run: Run) -> Markup:
    kimg, curves = run.stats.kimg, []
    for loss, colour in zip(run.stats.jumps.values(), charts.ramp(len(run.stats.jumps)), strict=True):
        known = np.isfinite(loss)
        average = np.full_like(loss, np.nan)
        average[known] = charts.smooth(kimg[known], loss[known])
        curves.append((average, colour, ""))
    return draw(run, "Loss of each jump", curves)


def side_charts(run: Run) -> list[tuple[str, Markup]]:
    """Speed, learning rate and memory, each with its caption; without those that show nothing."""
    series = run.stats.series
    memory = [(series["cpu_gb"], charts.BLUE, "host")]
    if (series["gpu_gb"] > 0).any():
        memory.append((series["gpu_gb"], charts.ORANGE, "GPU"))
    drawn = [
        ("Speed, seconds per kimg", draw(run, "Speed", with_average(run, "sec_per_kimg"))),
        ("Learning rate", draw(run, "Learning rate", [(series["learning_rate"], charts.BLUE, "")], True)),
        ("Memory of the first process, GiB", draw(run, "Memory", memory, True)),
    ]
    return [(caption, chart) for caption, chart in drawn if chart]


def with_average(run: Run, name: str) -> list[tuple[np.ndarray, str, str]]:
    values = run.stats.series[name]
    smoothed = charts.smooth(run.stats.kimg, values)
    return [(values, charts.BLUE, "every tick"), (smoothed, charts.BLUE, "smoothed (half-life: 2% of the run)")]


def ladder_chart(ladder: Ladder) -> Markup:
    """The figure of ladder.png; empty where the teacher's row is not complete."""
    rungs = [rung for row in ladder.rungs if (rung := rung_of(row)) is not None]
    if not rungs or rung_of(ladder.rungs[0]) is None:
        return Markup("")
    curve = [point for row in ladder.curve if (point := point_of(row)) is not None]
    figure = ladder_figure(rungs, curve, ladder.floor)
    return Markup(charts.to_svg(figure, "ladder", "Quality against network calls per image"))


def rung_of(row: dict[str, Any]) -> Rung | None:
    """A row of ladder.json as what the figure takes; None where it lacks a number."""
    steps, nfe, error = (number(row[name]) for name in ("steps", "nfe", "endpoint_rmse"))
    if steps is None or nfe is None or error is None or steps < 1 or nfe < 1 or error < 0:
        return None
    images, detector, std = number(row["images"]), row["detector"], number(row["fd_std"])
    return Rung(
        int(steps),
        int(nfe),
        number(row["fd"]),
        error,
        number(row["sec_per_kimg"]) or 0.0,
        number(row["kimg"]) or 0.0,
        network=printable(row["network"]),
        fd_std=std if std is not None and std >= 0 else None,
        fd_sets=numbers(row["fd_sets"]),
        images=None if images is None else int(images),
        detector=detector if isinstance(detector, str) else None,
    )


def point_of(row: dict[str, Any]) -> CurvePoint | None:
    """The same for a row of teacher-curve.json."""
    steps, nfe, error = (number(row[name]) for name in ("steps", "nfe", "endpoint_rmse"))
    if steps is None or nfe is None or error is None or nfe < 1:
        return None
    return CurvePoint(str(row["solver"]), int(steps), int(nfe), number(row["fd"]), error)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def jump_names(run: Run) -> dict[int, str]:
    """'80 → 24.4' for each jump of a student, by its noise levels."""
    distillation = mapping(run.options.get("distillation"))
    given, ratio = distillation.get("teacher_levels"), number(distillation.get("ratio"))
    if not isinstance(given, list) or not ratio or ratio < 1:
        return {}
    pairs = enumerate(pairwise(number(level) for level in given[:: int(ratio)]))
    return {index: f"{t:.4g} → {s:.4g}" for index, (t, s) in pairs if t is not None and s is not None}


def jump_table(run: Run) -> list[dict[str, Any]]:
    """Rows: name, colour in the chart (or None), part of the last tick's images, loss, its part of the largest."""
    losses, names = run.stats.last_jumps, jump_names(run)
    colours = dict(zip(run.stats.jumps, charts.ramp(len(run.stats.jumps)), strict=True))
    images = sum(taken for taken, _ in losses.values())
    largest = max((loss for _, loss in losses.values()), default=0)
    return [
        {
            "name": names.get(index, f"jump {index}"),
            "colour": colours.get(index),
            "share": taken / images,
            "loss": loss,
            "part": max(loss / largest, 0) if largest > 0 else 0,
        }
        for index, (taken, loss) in losses.items()
    ]


def lineage_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every network from the first teacher to the last student: the longest lineage that there is, and its student."""
    last = max(runs, key=lambda run: len(run.lineage), default=None)
    if last is None or not last.lineage:
        return []
    chain = [
        {
            "network": printable(entry.get("network", "?")),
            "sha256": printable(entry.get("sha256", ""))[:16],
            "text": show_steps(entry.get("steps"), entry.get("solver")),
        }
        for entry in last.lineage
    ]
    own = "this student" if last.done else "this student, in training"
    steps = show_steps(last.steps[1] if last.steps else None, "euler")
    return [*chain, {"network": printable(last.folder), "sha256": "", "text": f"{steps}: {own}"}]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def render(subject: Run | Ladder) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (show_time, show_number, show_spread, show_duration, show_json, show_place, show_kimg)
    environment.filters |= {function.__name__.removeprefix("show_"): function for function in filters}
    environment.filters["printable"] = printable
    functions = (loss_chart, jump_chart, jump_table, side_charts)
    runs = subject.stages if isinstance(subject, Ladder) else [subject]
    page = environment.get_template("run_report.html").render(
        mark=Markup(MARK),
        subject=subject,
        is_ladder=isinstance(subject, Ladder),
        runs=runs,
        lineage=lineage_of(runs),
        ladder_chart=ladder_chart(subject) if isinstance(subject, Ladder) else "",
        now=datetime.now(UTC).timestamp(),
        **{function.__name__: function for function in functions},
    )
    return page.encode("utf-8", "backslashreplace").decode()  # JSON can hold halves of characters


def show_time(seconds: float | None) -> str:
    try:
        return "?" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "?"


def show_number(value: Any, digits: int = 4) -> str:
    shown = number(value)
    return "–" if shown is None else f"{shown:.{digits}g}"


def show_spread(value: Any, spread: Any) -> str:
    """1.400 ± 0.055, or the value alone where nothing is known of its deviation."""
    mean, std = number(value), number(spread)
    return show_number(value) if mean is None or std is None else plus_minus(mean, std)


def show_duration(seconds: float | None) -> str:
    return "–" if seconds is None else format_time(seconds)


def show_json(value: Any) -> str:
    pieces = list(islice(json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(value), MAX_OPTIONS + 1))
    text = "".join(piece[:1000] for piece in pieces[:MAX_OPTIONS])
    return text if len(pieces) <= MAX_OPTIONS else f"{text}\n... (too long to be shown)"


def show_steps(steps: Any, solver: Any) -> str:
    """'16 Heun steps'."""
    noun = f"{printable(solver or '', 40).capitalize()} step"
    return count(steps, noun) if isinstance(steps, int) and number(steps) is not None else f"? {noun}s"


def show_place(path: Any) -> str:
    """A network's folder and file: enough to know it by."""
    return "/".join(printable(path).split("/")[-2:])
