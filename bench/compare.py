"""Ladders side by side: a table in Markdown.

    python -m bench.compare "this recipe=runs/recipe/finalists/geomean/seed*" "another=runs/another/seed*"

Each argument is NAME=PATTERN: the folders of the same ladder with several seeds. The Fréchet distance is given as a
multiple of the same run's teacher; means over the seeds, with their sample standard deviation.
"""

from __future__ import annotations

import glob
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from dnnlib import cli
from ladders.results import Rung


@dataclass
class Group:
    """Ladders of one kind: by a student's number of steps, one value for every seed."""

    name: str
    seeds: int = 0
    distances: dict[int, list[float]] = field(default_factory=dict)  # over the teacher's; none where not measured
    errors: dict[int, list[float]] = field(default_factory=dict)  # end-point RMSE


def read_group(name: str, folders: Iterable[str | Path]) -> Group:
    """The finished ladders among `folders`. Raises UserError for a file that distill.py did not write."""
    group = Group(name)
    for file in (Path(folder, "ladder.json") for folder in sorted(folders)):
        if not file.is_file():
            continue
        try:
            teacher, *students = [Rung(**line) for line in json.loads(file.read_text(encoding="utf-8"))]
        except (ValueError, TypeError) as exc:
            raise cli.UserError(f"{file}: not a ladder as distill.py writes it") from exc
        group.seeds += 1
        for rung in students:
            group.errors.setdefault(rung.steps, []).append(rung.endpoint_rmse)
            if rung.fd is not None and teacher.fd:
                group.distances.setdefault(rung.steps, []).append(rung.fd / teacher.fd)
    return group


def to_markdown(groups: Sequence[Group]) -> str:
    """A row for every group, a column for every number of steps: distance over the teacher's, then end-point RMSE."""
    steps = sorted({count for group in groups for count in group.errors}, reverse=True)
    rows = [["ladder", "seeds", *(f"{count} step{'s' * (count > 1)}" for count in steps)], ["---"] * (2 + len(steps))]
    for group in groups:
        cells = [group.name, str(group.seeds)]
        for count in steps:
            distance = [f"{spread(group.distances[count], 3)}x"] if count in group.distances else []
            error = [spread(group.errors[count], 4)] if count in group.errors else []
            cells.append("<br>".join(distance + error))
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: Sequence[float], digits: int) -> str:
    """'0.0743 ± 0.0012'; a single value has no deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


@cli.command(name="compare")
@click.argument("groups", nargs=-1, required=True, metavar="NAME=PATTERN...")
def command(groups: tuple[str, ...]) -> None:
    """Print ladders side by side as a table in Markdown."""
    read = []
    for text in groups:
        name, _, pattern = text.partition("=")
        if not name or not pattern:
            raise cli.UsageError(f"'{text}' is not NAME=PATTERN")
        read.append(read_group(name, glob.glob(pattern)))
        if not read[-1].seeds:
            raise cli.UserError(f"{pattern}: no folder of that name holds a ladder.json")
    print(to_markdown(read))


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
