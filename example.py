"""Samples at a glance, from a small distilled network that comes with the repository, or from any other.

python example.py
"""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from dnnlib.atomic import check_target
from dnnlib.util import count

BUNDLED = Path(__file__).parent / "assets" / "digits-student.pkl"


@cli.command(name="example")
@click.option(
    "--network", help="Network file  [default: the bundled student of handwritten digits]", metavar="PATH|URL"
)
@click.option("--steps", help="Sampling steps  [default: a student's own, or 18]", type=cli.Whole(min=1))
@click.option("--seeds", help="Random seeds, one per image (e.g. 1,2,5-10)", type=cli.Seeds(), default="0-63")
@cli.class_option
@cli.labels_option
@click.option("--out", help="Picture to write", metavar="PNG", default="example.png")
@cli.device_option
@cli.trust_option
def command(
    network: str | None,
    steps: int | None,
    seeds: list[int],
    class_idx: list[Any] | None,
    labels: str | None,
    out: str,
    device: str,
    trust_network_code: bool,
) -> None:
    """Make a grid of samples.

    \b
    With the network that comes with the repository, and with another:
      python example.py
      python example.py --network=student.pkl --seeds=0-15 --out=grid.png
    """
    if not out.lower().endswith(".png"):
        raise cli.UsageError(f"--out={out}: the picture is a PNG; use a name that ends in .png")

    from torch import from_numpy

    from formats.network_files import load_network
    from torch_utils import distributed as dist
    from training import pictures
    from training.sampling import plan_sampling, sample

    where = dist.init(device)
    check_target(out)
    loaded = load_network(network or BUNDLED, trust_network_code=trust_network_code)
    if loaded.net.img_channels not in (1, 3):
        raise cli.UserError(f"{loaded.source} makes {loaded.net.img_channels} channels; a PNG has 1 (grey) or 3 (RGB)")
    dist.print0(f"Found {loaded.describe()}")
    plan = plan_sampling(loaded, steps=steps)
    dist.print0(f"Sampling {loaded.source if network else BUNDLED.name} with {plan.text} ...")
    start = time.monotonic()
    images = sample(loaded, seeds, steps=steps, class_idx=class_idx, labels=labels, device=where).transpose(0, 3, 1, 2)
    if dist.is_main():
        columns = math.ceil(math.sqrt(len(seeds)))
        pictures.save_png(out, pictures.tile(from_numpy(images), columns, gap=2))
    dist.print0(f"{count(len(seeds), 'image')} in {out}, made in {time.monotonic() - start:.1f} s on {where.type}")
    dist.shutdown()


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
