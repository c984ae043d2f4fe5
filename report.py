"""One page about a run or a ladder: settings, curves, pictures, results, in a single file that opens anywhere.

python report.py training-runs/00000-cifar10-32x32-uncond-ddpmpp-edm-gpus8-batch512-fp32
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from dnnlib.atomic import check_target, write_text
from dnnlib.errors import printable
from dnnlib.util import open_file


@cli.command(name="report")
@click.argument("run_dir", metavar="RUN_DIR")
@click.option("--out", help="Page to write  [default: RUN_DIR/report.html]", metavar="HTML")
@click.option(
    "--max-mb",
    help="Size limit for pictures; beyond it some are left out",
    metavar="MB",
    type=cli.Number(min=0, min_open=True),
    default=20,
)
@click.option("--overwrite", help="Replace a file that is no report", is_flag=True)
def command(run_dir: str, out: str | None, max_mb: float, overwrite: bool) -> None:
    """Make report.html about RUN_DIR, a run of train.py or a ladder of distill.py.

    \b
    The page is one file: it needs no network and no other file. It has settings and environment, the lineage of
    teachers, loss curves (also per jump), samples and target sheets over the course of training, speed, and what was
    measured of a ladder's rungs. Runs that are not finished, or were killed, are welcome: what is missing is named.

    A report that is there already is made anew; another file is left alone without --overwrite.
    """
    target = out if out is not None else os.path.join(run_dir, "report.html")
    if not target.lower().endswith((".html", ".htm")):
        raise cli.UsageError(f"--out={target}: the page is HTML; use a name that ends in .html")

    from reporting import run_files, run_report

    subject = run_files.read(Path(run_dir), max_mb)
    check_target(target)
    if os.path.lexists(target) and not overwrite and not is_report(target, run_report.MARK):
        raise cli.UserError(f"{target} exists already and is no report; choose another name, or --overwrite")
    for problem in subject.problems:
        print(f"Note: {problem}")
    write_text(target, run_report.render(subject))
    print(f"Wrote {printable(target)}, {os.path.getsize(target) / 1e6:.2f} MB: open it in a browser")


def is_report(path: str, mark: str) -> bool:
    """Whether this program has made the file."""
    try:
        with open_file(path) as file:
            return mark.encode() in file.read(len(mark) + 200)
    except (OSError, cli.UserError):
        return False


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
