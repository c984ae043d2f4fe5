"""Ladders side by side: a table in Markdown, and a figure of what each leaves on every rung.

    python -m bench.compare "this recipe=runs/recipe/finalists/geomean/seed*" "earlier attempt=runs/earlier/seed*" \\
        --figure=comparison.png

Each argument is NAME=PATTERN: the folders of the same ladder with several seeds. The Fréchet distance is given as a
multiple of the same run's teacher; means over the seeds, with their sample standard deviation.
"""

from __future__ import annotations

import glob
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.recipe import spread
from dnnlib import cli
from dnnlib.atomic import atomic_write, check_target
from ladders.results import Rung

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Group:
    """One kind of ladder: by a student's number of steps, one value for every seed."""

    name: str
    seeds: int
    distances: dict[int, list[float]]  # fd over the teacher's; none where it was not measured
    errors: dict[int, list[float]]  # end-point RMSE


def read_group(text: str) -> Group:
    """NAME=PATTERN. Raises UsageError where no finished ladder answers to it."""
    name, equals, pattern = text.partition("=")
    if not equals or not name or not pattern:
        raise cli.UsageError(f"'{text}' is not NAME=PATTERN")
    files = [file for folder in sorted(glob.glob(pattern)) if (file := Path(folder, "ladder.json")).is_file()]
    if not files:
        raise cli.UserError(f"{pattern}: no folder of that name holds a ladder.json")
    distances: dict[int, list[float]] = {}
    errors: dict[int, list[float]] = {}
    for file in files:
        try:
            teacher, *students = [Rung(**line) for line in json.loads(file.read_text(encoding="utf-8"))]
        except (ValueError, TypeError) as exc:
            raise cli.UserError(f"{file}: not a ladder as distill.py writes it") from exc
        for rung in students:
            errors.setdefault(rung.steps, []).append(rung.endpoint_rmse)
            if rung.fd is not None and teacher.fd:
                distances.setdefault(rung.steps, []).append(rung.fd / teacher.fd)
    return Group(name, len(files), distances, errors)


def to_markdown(groups: Sequence[Group]) -> str:
    """A row for every group, a column for every number of steps: distance over the teacher's, then end-point RMSE."""
    steps = sorted({count for group in groups for count in group.errors}, reverse=True)
    lines = [
        "| | seeds | " + " | ".join(f"{count} step{'s' * (count > 1)}" for count in steps) + " |",
        "| --- | --- |" + " --- |" * len(steps),
    ]
    for group in groups:
        cells = []
        for count in steps:
            parts = []
            if count in group.distances:
                parts.append(f"{spread(group.distances[count], 3)}x")
            if count in group.errors:
                parts.append(spread(group.errors[count], 4))
            cells.append("<br>".join(parts).replace("+-", "±"))
        lines.append(f"| {group.name} | {group.seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(groups: Sequence[Group]) -> Any:
    """Distance and error against the number of steps, a line per group, bars of one standard deviation."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = [("Fréchet distance over the teacher's", [group.distances for group in groups])]
    panels.append(("end-point RMSE (pixel values in [-1, 1])", [group.errors for group in groups]))
    panels = [panel for panel in panels if any(panel[1])]
    figure = Figure(figsize=(3.9 * max(len(panels), 1.2), 3.6 + 0.1 * len(groups)), dpi=200)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, tables) in zip(axes, panels, strict=True):
        highest = lowest = None
        for index, (group, table) in enumerate(zip(groups, tables, strict=True)):
            steps = sorted(table)
            means = [statistics.mean(table[count]) for count in steps]
            bars = [statistics.stdev(table[count]) if len(table[count]) > 1 else 0.0 for count in steps]
            seeds = f" ({group.seeds} seeds)" if group.seeds > 1 else ""
            axis.errorbar(
                steps,
                means,
                yerr=bars if any(bars) else None,
                label=group.name + seeds,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4.5,
                linewidth=1.4,
                capsize=2.5,
                elinewidth=1,
            )
            highest = max([*means, highest or means[0]]) if means else highest
            lowest = min([*means, lowest or means[0]]) if means else lowest
        everything = sorted({count for table in tables for count in table})
        axis.set_xscale("log", base=2)
        axis.set_xticks(everything, [str(count) for count in everything])
        axis.minorticks_off()
        if highest is not None and lowest is not None and highest > 4 * lowest:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("steps (network calls per image)", fontsize=9)
        axis.set_ylabel(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(panels), frameon=False, fontsize=8)
    return figure


@cli.command(name="compare")
@click.argument("groups", nargs=-1, required=True, metavar="NAME=PATTERN...")
@click.option("--figure", help="Draw them there too", metavar="PNG")
def command(groups: tuple[str, ...], figure: str | None) -> None:
    """Print ladders side by side as a table in Markdown."""
    if figure is not None:
        check_target(figure)
    read = [read_group(text) for text in groups]
    print(to_markdown(read))
    if figure is not None:
        with atomic_write(figure) as file:
            draw(read).savefig(file, format="png")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
