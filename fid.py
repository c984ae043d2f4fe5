"""Fréchet inception distance: `calc` measures images, `gen` a network, `ref` makes references, `detector` detectors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from dnnlib.atomic import check_target

if TYPE_CHECKING:
    from metrics.detectors import Detector
    from metrics.statistics import Stats

batch_option = click.option(
    "--batch", help="Largest number of images at once, per process", type=cli.Whole(min=1), default=64
)
ref_option = click.option("--ref", help="Statistics to compare with", metavar="NPZ|PKL|URL", required=True)
detector_option = click.option(
    "--detector",
    "spec",
    help="inception, a copy of its weights, or a file made by fid.py detector",
    metavar="NAME|PATH|URL",
    default="inception",
)
# torchrun may take a `--num` anywhere on its line for short of its own --numa-binding: hence a second name.
NUM = ("--num", "--num-images", "num")


@cli.group(name="fid")
def command() -> None:
    """Fréchet distance between sets of images (FID, if the detector is Inception).

    \b
    Typical use:
      python fid.py calc --images=fid-tmp --ref=https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz
      python fid.py ref --data=datasets/my-dataset.zip --dest=fid-refs/my-dataset.npz
      python fid.py gen --network=student.pkl --ref=fid-refs/my-dataset.npz

    \b
    With a detector of your own, where Inception does not fit or can't be had:
      python fid.py detector --data=datasets/my-dataset.zip --dest=detector.pt
      python fid.py ref --data=datasets/my-dataset.zip --dest=ref.npz --detector=detector.pt
      python fid.py calc --images=fid-tmp --ref=ref.npz --detector=detector.pt

    The number alone goes to standard output. All but `detector` share their work under torchrun.
    """


@command.command()
@cli.section("Main")
@click.option("--images", help="Images to measure", metavar="DIR|ZIP|NPZ", required=True)
@ref_option
@click.option(*NUM, help="Number of images to use", type=cli.Whole(2, cli.MAX_RANGE), default=50000)
@click.option("--seed", help="Seed that chooses images, if there are more", metavar="INT", type=int, default=0)
@detector_option
@cli.section("Performance")
@batch_option
@cli.device_option
def calc(images: str, ref: str, num: int, seed: int, batch: int, spec: str, device: str) -> None:
    """Measures images against a reference."""
    with _processes(device):
        from metrics.statistics import statistics_of_dataset

        reference, network = _reference(ref, spec)
        stats = statistics_of_dataset(images, network, num=num, seed=seed, batch=batch)
        _print_distance(stats, reference, images)


@command.command()
@cli.section("Main")
@click.option("--network", help="Network to measure", metavar="PATH|URL", required=True)
@ref_option
@click.option("--seeds", help="One image per seed  [default: 0 to num - 1]", type=cli.Seeds())
@click.option(*NUM, help="Number of images  [default: 50000]", type=cli.Whole(2, cli.MAX_RANGE))
@cli.trust_option
@click.option("--steps", help="Sampling steps  [default: as generate.py]", type=cli.Whole(min=1))
@click.option("--grid", help="Noise levels  [default: as generate.py]", metavar="edm|measured|LEVELS|FILE|N/K")
@cli.class_option
@cli.labels_option
@detector_option
@cli.section("Performance")
@batch_option
@cli.device_option
def gen(
    network: str,
    ref: str,
    seeds: list[int] | None,
    num: int | None,
    steps: int | None,
    grid: str | None,
    batch: int,
    spec: str,
    device: str,
    trust_network_code: bool,
    **condition: Any,
) -> None:
    """Measures a network, without writing images."""
    if seeds is not None and num is not None:
        raise cli.UsageError("--seeds and --num both say how many images to make; give one of them")
    chosen = list(range(num or 50000)) if seeds is None else list(dict.fromkeys(seeds))
    if len(chosen) < 2:
        raise cli.UsageError("--seeds must name two different seeds at least; write for example --seeds=0-49999")

    with _processes(device) as dist:
        from formats.network_files import load_network
        from metrics.statistics import statistics_of_images, with_progress
        from torch_utils.misc import allow_tf32
        from training.pictures import to_uint8
        from training.sampling import iterate_images, plan_sampling

        reference, features = _reference(ref, spec)
        loaded = dist.rank0_first(partial(load_network, network, trust_network_code=trust_network_code))
        plan = plan_sampling(loaded, steps=steps, grid=grid)
        dist.check_agreement({f"the content of {loaded.source}": loaded.sha256})
        dist.print0(f"sampling {loaded.source} with {plan.text}\n  {loaded.describe()}", file=sys.stderr)
        allow_tf32(False)
        made = iterate_images(loaded, chosen, plan=plan, max_batch=batch, device=dist.device(), **condition)
        pixels = (to_uint8(each.checked(loaded.source)) for each in made)
        stats = statistics_of_images(with_progress(pixels, len(chosen)), features)
        _print_distance(stats, reference, network)


@command.command()
@cli.section("Main")
@click.option("--data", "--images", "data", help="Images to summarise", metavar="DIR|ZIP|NPZ", required=True)
@click.option("--dest", help="File to write", metavar="NPZ", required=True)
@detector_option
@cli.section("Performance")
@batch_option
@cli.device_option
def ref(data: str, dest: str, batch: int, spec: str, device: str) -> None:
    """Makes a reference from all images of a data set."""
    with _processes(device) as dist:
        from metrics.detectors import load_detector
        from metrics.statistics import statistics_of_dataset

        path = dest if dest.endswith(".npz") else f"{dest}.npz"
        check_target(path)
        stats = statistics_of_dataset(data, load_detector(spec, dist.device()), batch=batch)
        if dist.is_main():
            stats.save(path)
            _log(f"wrote {path}: statistics of {stats.num} images by {stats.detector_id}")


@command.command()
@cli.section("Main")
@click.option("--data", help="Data set with class labels", metavar="DIR|ZIP", required=True)
@click.option("--dest", help="File to write", metavar="FILE", required=True)
@click.option("--seed", help="Random seed", type=cli.Whole(0, 2**63 - 1), default=0)
@click.option(
    "--kimg",
    help="Thousands of images to train for  [default: 40 to 300 by their size]",
    type=cli.Number(min=0, min_open=True),
)
@cli.section("Performance")
@cli.device_option
def detector(data: str, dest: str, seed: int, kimg: float | None, device: str) -> None:
    """Trains a small classifier as a detector."""
    with _processes(device) as dist:
        from metrics.classifier import train_detector
        from metrics.detectors import load_detector

        check_target(dest)
        try:
            if Path(dest).is_file():
                load_detector(dest, "cpu")
        except cli.UserError as exc:
            raise cli.UserError(f"{dest} exists and is not a detector file; name another --dest, or remove it") from exc
        if dist.is_main():
            facts = train_detector(data, dest, seed=seed, kimg=kimg, device=dist.device())
            _log(
                f"wrote {dest}: {facts.accuracy:.1%} of {facts.held_out} held-out images recognised, {facts.classes} "
                f"classes, {facts.resolution}x{facts.resolution}, trained for {facts.kimg:g} kimg with seed {seed}"
            )
            if facts.accuracy < min(2 / facts.classes, (1 + 1 / facts.classes) / 2):
                _log("warning: that is hardly better than guessing; use a larger --kimg")
        dist.barrier()


@contextmanager
def _processes(device: str) -> Iterator[Any]:
    """Sets up processes and device, and takes them down again."""
    from torch_utils import distributed as dist

    dist.init(device, cli.options_in_use())
    yield dist
    dist.shutdown()


def _reference(ref: str, spec: str) -> tuple[Stats, Detector]:
    """The reference, and the detector that it was made by: checked against each other before hours of work."""
    from metrics.detectors import INCEPTION, load_detector
    from metrics.statistics import check_reference, check_same_detector, load_reference
    from torch_utils import distributed as dist

    reference = load_reference(ref)
    if spec == "inception":
        check_same_detector(INCEPTION, reference.detector_id)  # a download comes after this
    detector = load_detector(spec, dist.device())
    check_reference(reference, detector)
    return reference, detector


def _print_distance(stats: Stats, reference: Stats, source: str) -> None:
    """Prints the Fréchet distance between the reference and what was measured of `source`."""
    from metrics.statistics import frechet_between, note_if_collapsed
    from torch_utils import distributed as dist

    note_if_collapsed(stats, reference, source)
    if dist.is_main():
        print(f"{frechet_between(stats, reference):g}", flush=True)


def _log(text: str) -> None:
    """Prints a line on standard error: standard output is for the number."""
    print(text, file=sys.stderr, flush=True)


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
