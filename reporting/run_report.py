"""One page about a run or a ladder: the values of `run_files` -> HTML, by run_report.html. Imports no torch.

The page escapes whatever the files hold, and bounds it. It runs no script.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dnnlib.errors import printable
from dnnlib.util import count, format_time
from ladders import charts
from ladders.results import COLUMNS, ladder_figure, table_rows

from . import run_files
from .run_files import Picture, Run, Subject, number, show_kimg

MARK = "<!-- report.py of edm-distill -->"  # the first line of a page: what may be written over
MAX_TEXT = 100_000  # characters of training_options.json
LINES = 24  # jumps in a chart


@dataclass
class Part:
    """A piece of a section: words, pictures, a table and a text as it is, as far as there are any."""

    heading: str = ""
    words: str = ""
    pictures: Sequence[Picture] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""
    folded: bool = False  # away, under its heading


def render(subject: Subject) -> str:
    """The whole page."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    samples = [Part(pictures=[subject.samples])] if subject.samples else []
    drawn = "The same latents in every picture of a run; drawn from the EMA of the weights."
    shown = "What each jump starts from, what it is asked for, and what the student answers."
    sections = {
        "Results": results(subject),
        "Samples": samples + film(subject, "samples", drawn),
        "Loss": [part for run in subject.runs for part in losses(run)],
        "Targets": film(subject, "targets", shown),
        "Speed and memory": speed(subject),
        "Lineage": lineage(subject),
        "Settings and environment": [part for run in subject.runs for part in settings(run, subject.is_ladder)],
    }
    page = environment.get_template("run_report.html").render(
        mark=Markup(MARK),
        subject=subject,
        kind=f"a ladder of {count(max(len(chain_of(subject)) - 1, 0), 'stage')}" if subject.is_ladder else "a run",
        facts=facts(subject),
        sections={title: parts for title, parts in sections.items() if parts},
        footer=f"{show_time(datetime.now(UTC).timestamp())} from {printable(subject.folder)}",
    )
    return page.encode("utf-8", "backslashreplace").decode()  # JSON can hold halves of characters


# ---------------------------------------------------------------------------------------------------------------------
# Words


def show_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if 0 < seconds < 1e11 else "?"


def show(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def name_of(run: Run) -> str:
    return f"{run.name}, {run.steps[0]} → {run.steps[1]} steps" if run.steps else run.name


def chain_of(subject: Subject) -> list[Any]:
    """Steps of the teacher and of every student, '?' where unknown: as planned, or as far as begun."""
    begun = [run.steps or ("?", "?") for run in subject.runs]
    return subject.plan or [before for before, _ in begun[:1]] + [after for _, after in begun]


def facts(subject: Subject) -> list[tuple[str, str]]:
    """What stands at the head of the page."""
    if not subject.runs:
        return []
    last, of = subject.runs[-1], f" of {len(subject.plan) - 1}" if subject.plan else ""
    found = {
        "steps": " → ".join(map(str, chain_of(subject))) if subject.is_ladder or last.steps else "",
        "state": f"stage {len(subject.runs)}{of}: {last.state}" if subject.is_ladder else last.state,
        "loss, last tick": show(last.last(run_files.LOSS)),
        "seconds per kimg": show(last.rate),
        "training time, to the last tick": format_time(sum(run.last(run_files.TIME) or 0.0 for run in subject.runs)),
        "last tick": show_time(max(run.written for run in subject.runs)),
    }
    return [(name, value) for name, value in found.items() if value]


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def picture_of(figure: Any, caption: str) -> Picture:
    """A figure as an SVG picture."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edm-distill"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return run_files.picture_of(caption, buffer.getvalue(), "svg+xml", (width, height))


def chart(run: Run, caption: str, curves: Sequence[tuple[str, Any, str]]) -> list[Picture]:
    """Curves (name of a series, colour, label or '') against the images trained; none where there are no values."""
    figure, (axis,) = charts.new_figure(5.2, 2.9)
    for name, colour, label in curves:
        charts.plot(axis, run.series(run_files.KIMG), run.series(name), label, colour, band=len(curves) == 1)
    if not any(np.isfinite(line.get_ydata()).any() for line in axis.get_lines()):
        return []
    charts.style(axis, "images trained, kimg")
    axis.xaxis.set_major_formatter("{x:,.6g}")
    charts.scale_y(axis)
    if any(label for *_, label in curves):
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return [picture_of(figure, f"{caption} of {name_of(run)}")]


def results(subject: Subject) -> list[Part]:
    """The ladder's figure, and a row for every network."""
    if not subject.rungs:
        return []
    teacher, shown = subject.rungs[0], (subject.rungs, subject.curve, subject.floor)
    words = "Every network is measured in the same way, the teacher first; ± and bars are one standard deviation"
    if teacher.detector:
        words += f". fd: Fréchet distance in the features of {teacher.detector}, by {teacher.images} images"
    rows = [[name, *numbers] for *numbers, name in table_rows(*shown)]
    picture = picture_of(ladder_figure(*shown), "Quality against network calls per image")
    return [Part(words=f"{words}.", pictures=[picture], columns=[COLUMNS[-1], *COLUMNS[:-1]], rows=rows)]


def film(subject: Subject, kind: str, words: str) -> list[Part]:
    """The newest pictures of a kind, and folded away the earlier ones of each run, the newest first."""
    newest: list[Picture] = []
    parts = []
    for run in subject.runs:
        for picture in run.pictures[kind]:
            picture.caption = f"{kind.capitalize()} of {name_of(run)}, after {picture.caption}"
        taken = run.pictures[kind][::-1]
        newest += taken[:1]
        if taken[1:]:
            heading = f"{run.name}: {len(taken) - 1} earlier, the newest first"
            parts.append(Part(heading, pictures=taken[1:], folded=True))
    return [Part(words=words, pictures=newest), *parts] if newest else []


def losses(run: Run) -> list[Part]:
    """Charts of the loss and of each jump's."""
    from matplotlib import colormaps

    pictures = chart(run, "Loss", [(run_files.LOSS, charts.BLUE, "")])
    drawn = run_files.every(list(run.jumps), LINES)
    if len(run.jumps) > 1:
        levels = run.distillation.get("teacher_levels")  # '80 → 24.4': a jump by its noise levels
        ends = map(number, levels[:: run.ratio]) if isinstance(levels, list) and run.ratio else []
        names = [None if None in pair else "{:.4g} → {:.4g}".format(*pair) for pair in pairwise(ends)]
        named = drawn if len(drawn) <= 8 else [drawn[0], drawn[-1]]
        labels = [(names[jump : jump + 1] or [None])[0] or f"jump {jump}" if jump in named else "" for jump in drawn]
        colours = colormaps["viridis"](np.linspace(0, 0.85, len(drawn)))
        part = f" ({len(drawn)} of {len(run.jumps)})" if len(run.jumps) > len(drawn) else ""
        series = [run.jumps[jump] for jump in drawn]
        pictures += chart(run, f"Loss of each jump{part}", list(zip(series, colours, labels, strict=True)))
    return [Part(name_of(run), pictures=pictures)] if pictures else []


def speed(subject: Subject) -> list[Part]:
    """A row for every run, and a chart of its speed."""
    runs, parts = [run for run in subject.runs if run.ticks], []
    for run in runs:
        pictures = chart(run, "Speed, seconds per kimg,", [(run_files.SPEED, charts.BLUE, "")])
        parts.append(Part(f"{run.name}, over the course of training", pictures=pictures, folded=subject.is_ladder))
    columns: dict[str, Callable[[Run], str]] = {
        "run": lambda run: run.name,
        "kimg": lambda run: show_kimg(run.last(run_files.KIMG) or 0.0),
        "seconds per kimg (median)": lambda run: show(run.rate),
        "training time": lambda run: format_time(run.last(run_files.TIME) or 0.0),
        "host memory, GiB": lambda run: show(run.last(run_files.HOST), 3),
        "GPU memory, GiB": lambda run: show(run.last(run_files.GPU) or None, 3),
        "steps skipped": lambda run: show(run.last(run_files.SKIPPED)),
    }
    rows = [[cell(run) for cell in columns.values()] for run in runs]
    return [Part(columns=list(columns), rows=rows), *parts] if runs else []


def lineage(subject: Subject) -> list[Part]:
    """Every network from the first teacher to the last student: the longest lineage that there is, and its student."""
    last = max(subject.runs, key=lambda run: len(run.lineage), default=None)
    if last is None or not last.lineage:
        return []
    rows = [[printable(entry.get(name)) for name in ("steps", "solver", "network")] for entry in last.lineage]
    rows.append([str(last.steps[1]) if last.steps else "?", "euler", printable(last.folder)])
    return [Part(words="Each network was taught by the one above.", columns=["steps", "solver", "file"], rows=rows)]


def settings(run: Run, folded: bool) -> list[Part]:
    """A table of settings, and the file itself, which has the environment too."""
    text, rows = json.dumps(run.options, indent=2), run_files.settings_of(run.options)
    if len(text) > MAX_TEXT:
        text = f"{text[:MAX_TEXT]}\n... (too long to be shown)"
    words = "" if rows else "They can't be read from training_options.json."
    return [
        Part(f"Settings of {run.name}", words, rows=rows, folded=folded),
        Part(f"Settings and environment of {run.name}: training_options.json", text=text, folded=True),
    ]
