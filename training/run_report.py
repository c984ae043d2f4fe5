"""One page about a run or a ladder: the values of `run_files` -> HTML, by run_report.html. Imports no torch.

The page escapes whatever the files say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dnnlib.util import format_time

from .ladder_report import plus_minus
from .run_charts import Curve, line_chart, ramp, smooth
from .run_files import Ladder, Run, mapping, number, show_kimg

MARK = "<!-- report.py of edm-distill -->"  # the first line of a page: what may be written over
FARTHEST = 2.0  # end-point error of images in [-1, 1]: what is greater has left them


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def loss_chart(run: Run, log_x: bool) -> Markup | None:
    kimg, loss = run.stats.kimg, run.stats.series["loss"]
    curves = [
        Curve("every tick", kimg, loss, "s0 raw"),
        Curve("smoothed", kimg, smooth(kimg, loss), "s0"),
    ]
    return line_chart(curves, "images trained, kimg", f"Loss of {run.name} against images trained", log_x)


def jump_chart(run: Run, log_x: bool) -> Markup | None:
    kimg, names = run.stats.kimg, jump_names(run)
    colours = ramp(len(run.stats.jumps))
    curves = []
    for (index, loss), colour in zip(run.stats.jumps.items(), colours, strict=True):
        known = np.isfinite(loss)
        curves.append(
            Curve(names.get(index, f"jump {index}"), kimg[known], smooth(kimg[known], loss[known]), "s0", colour)
        )
    return line_chart(curves, "images trained, kimg", f"Loss of each jump of {run.name}", log_x)


def jump_names(run: Run) -> dict[int, str]:
    """'80 → 24.4' for each jump of a student, by its noise levels."""
    distillation = mapping(run.options.get("distillation"))
    given, ratio = distillation.get("teacher_levels"), number(distillation.get("ratio"))
    if not isinstance(given, list) or not ratio or ratio < 1:
        return {}
    levels = [number(level) for level in given[:: int(ratio)]]
    pairs = enumerate(pairwise(levels))
    return {index: f"{t:.4g} → {s:.4g}" for index, (t, s) in pairs if t is not None and s is not None}


def jump_table(run: Run) -> list[dict[str, Any]]:
    """Rows: name, colour in the chart (or None), part of the last tick's images, loss, its part of the largest."""
    losses, names = run.stats.last_jumps, jump_names(run)
    colours = dict(zip(run.stats.jumps, ramp(len(run.stats.jumps)), strict=True))
    images = sum(count for count, _ in losses.values())
    largest = max((loss for _, loss in losses.values()), default=0)
    return [
        {
            "name": names.get(index, f"jump {index}"),
            "colour": colours.get(index),
            "share": count / images,
            "loss": loss,
            "part": loss / largest if largest > 0 else 0,
        }
        for index, (count, loss) in losses.items()
    ]


def side_charts(run: Run) -> list[tuple[str, Markup]]:
    """Speed, learning rate and memory, each with its caption."""
    kimg, series, x = run.stats.kimg, run.stats.series, "images trained, kimg"
    memory = [Curve("host", kimg, series["cpu_gb"], "s0")]
    memory_caption = "Memory of the first process, GiB"
    if (series["gpu_gb"] > 0).any():
        memory.append(Curve("GPU", kimg, series["gpu_gb"], "s3"))
        memory_caption += ": host (blue), GPU (orange)"
    speed = [Curve("every tick", kimg, series["sec_per_kimg"], "s0 raw")]
    speed.append(Curve("smoothed", kimg, smooth(kimg, series["sec_per_kimg"]), "s0"))
    rate = [Curve("learning rate", kimg, series["learning_rate"])]
    charts = [
        ("Speed, seconds per kimg", line_chart(speed, x, f"Speed of {run.name}")),
        ("Learning rate", line_chart(rate, x, f"Learning rate of {run.name}", log_y=False)),
        (memory_caption, line_chart(memory, x, f"Memory of {run.name}", log_y=False)),
    ]
    return [(caption, chart) for caption, chart in charts if chart is not None]


def ladder_charts(ladder: Ladder) -> list[tuple[str, Markup, list[tuple[str, str]]]]:
    """Quality against network calls: the students beside the teacher itself with fewer steps.

    A caption, the chart, and its legend: names with their styles.
    """
    charts = []
    ticks = sorted({nfe for rung in ladder.rungs if (nfe := number(rung.get("nfe")))})
    numbers = sorted({*ticks, *ladder.plan[1:]})
    for key, label in (("fd", "Fréchet distance"), ("endpoint_rmse", "End-point RMSE")):
        curves = []
        for solver in ("heun", "euler"):
            style = "s1 dots dashed" if solver == "heun" else "s2 dots dashed"
            rows = [point for point in ladder.curve if point.get("solver") == solver]
            curves.append(points(f"teacher itself, {solver.capitalize()}", rows, key, style))
        if key == "fd" and ticks:
            teacher = points("teacher, all its steps", ladder.rungs[:1], key, "s3 dots", "fd_std")
            across = np.array([min([ticks[0], *(curve.x[0] for curve in curves if len(curve.x))]), ticks[-1]])
            if len(teacher.y):
                curves += [Curve("teacher, all its steps", across, teacher.y.repeat(2), "s3 dashed"), teacher]
            if ladder.floor is not None and across[0] < across[1]:
                mean, spread, images = ladder.floor
                name = f"the data itself ({images} images drawn from it)"
                curves.append(Curve(name, across, np.full(2, mean), "s4 dotted", spread=np.full(2, spread)))
        curves.append(points("students", ladder.rungs[1:], key, "s0 dots", "fd_std" if key == "fd" else None))
        chart = line_chart(
            curves,
            "network calls per image (NFE)",
            f"{label} against network calls",
            log_x=True,
            x_ticks=numbers,
            y_limit=FARTHEST if key == "endpoint_rmse" else math.inf,
        )
        if chart is not None:
            # A line and the dots upon it are one entry of the legend, in the order of importance: from the top down.
            key_rows = {curve.name: curve.style for curve in reversed(curves) if len(curve.x)}
            charts.append((label, chart, list(key_rows.items())))
    return charts


def points(name: str, rows: Sequence[dict[str, Any]], key: str, style: str, spread: str | None = None) -> Curve:
    """One column of a table against its network calls, where both are numbers; `spread` is another column."""
    found = sorted(
        (nfe, value, number(row.get(spread)) if spread else None)
        for row in rows
        if (nfe := number(row.get("nfe"))) is not None and (value := number(row.get(key))) is not None
    )
    spreads = np.array([math.nan if each is None else each for *_, each in found])
    return Curve(
        name,
        np.array([nfe for nfe, *_ in found]),
        np.array([value for _, value, _ in found]),
        style,
        spread=spreads if np.isfinite(spreads).any() else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The page


def render(subject: Run | Ladder) -> str:
    """The whole page."""
    is_ladder = isinstance(subject, Ladder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "time": show_time,
        "num": show_number,
        "spread": show_spread,
        "duration": show_duration,
        "json": show_json,
        "place": show_place,
        "kimg": show_kimg,
    }
    functions = (loss_chart, jump_chart, jump_table, side_charts)
    page = environment.get_template("run_report.html").render(
        mark=Markup(MARK),
        subject=subject,
        is_ladder=is_ladder,
        runs=subject.stages if isinstance(subject, Ladder) else [subject],
        lineage=lineage_of(subject),
        ladder_charts=ladder_charts(subject) if isinstance(subject, Ladder) else [],
        now=datetime.now(UTC).timestamp(),
        **{function.__name__: function for function in functions},
    )
    return page.encode("utf-8", "backslashreplace").decode()  # JSON can hold halves of characters


def lineage_of(subject: Run | Ladder) -> list[dict[str, Any]]:
    """Every network from the first teacher to the last student: the longest lineage that there is, and its student."""
    runs = subject.stages if isinstance(subject, Ladder) else [subject]
    last = max(runs, key=lambda run: len(run.lineage), default=None)
    if last is None or not last.lineage:
        return []
    chain = [
        {
            "network": str(entry.get("network", "?")),
            "sha256": str(entry.get("sha256", ""))[:16],
            "text": show_steps(entry.get("steps"), entry.get("solver")),
        }
        for entry in last.lineage
    ]
    own = "this student" if last.done else "this student, in training"
    steps = show_steps(last.steps[1] if last.steps else None, "euler")
    return [*chain, {"network": str(last.folder), "sha256": "", "text": f"{steps}: {own}"}]


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
    return json.dumps(value, indent=2, ensure_ascii=False)


def show_steps(steps: Any, solver: Any) -> str:
    """'16 Heun steps'."""
    return f"{'?' if steps is None else steps} {str(solver or '').capitalize()} step{'s' * (steps != 1)}"


def show_place(path: Any) -> str:
    """A network's folder and file: enough to know it by."""
    return "/".join(str(path).split("/")[-2:])
