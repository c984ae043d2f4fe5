"""Fréchet inception distance: `calc` measures images, `gen` a network, `ref` makes references, `detector` detectors."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from dnnlib.atomic import check_target

if TYPE_CHECKING:
    from torch import Tensor

    from metrics.detectors import Detector
    from metrics.statistics import Stats

device_option = click.option("--device", help="Where to run", type=cli.Choice(["auto", "cuda", "cpu"]), default="auto")
batch_option = click.option(
    "--batch",
    help="Largest number of images at once, per process",
    metavar="INT",
    type=cli.Whole(min=1),
    default=64,
)
ref_option = click.option("--ref", help="Statistics to compare with", metavar="NPZ|PKL|URL", required=True)


def _a_detector(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Raises UsageError for the `none` that distill.py takes."""
    if value == "none":
        raise cli.UsageError(
            "--detector=none is distill.py's; a Fréchet distance needs a detector: inception, or a file"
        )
    return value


detector_option = click.option(
    "--detector",
    "spec",
    help="inception, a copy of its weights, or a file made by fid.py detector",
    metavar="NAME|PATH|URL",
    default="inception",
    callback=_a_detector,
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
@click.option(*NUM, help="Number of images to use", metavar="INT", type=cli.Whole(2, cli.MAX_RANGE), default=50000)
@click.option("--seed", help="Which images, if there are more", metavar="INT", type=int, default=0)
@detector_option
@cli.section("Performance")
@batch_option
@device_option
def calc(images: str, ref: str, num: int, seed: int, batch: int, spec: str, device: str) -> None:
    """Measures images against a reference."""

    def measure(detector: Detector) -> Stats:
        from metrics.statistics import statistics_of_dataset

        return statistics_of_dataset(images, detector, num=num, seed=seed, batch=batch, progress=True)

    _compare(images, ref, spec, device, measure)


@command.command()
@cli.section("Main")
@click.option("--network", help="Network to measure", metavar="PATH|URL", required=True)
@ref_option
@click.option("--seeds", help="One image per seed  [default: 0 to num - 1]", metavar="LIST", type=cli.Seeds())
@click.option(*NUM, help="Number of images  [default: 50000]", metavar="INT", type=cli.Whole(2, cli.MAX_RANGE))
@click.option("--trust-network-code", help="Run the code in a --network file of unknown class or version", is_flag=True)
@click.option("--steps", help="Sampling steps  [default: as generate.py]", metavar="INT", type=cli.Whole(min=1))
@click.option(
    "--class", "class_idx", help="Classes, or a label vector  [default: random]", metavar="LIST", type=cli.Condition()
)
@click.option("--labels", help="Draw from the labels of a data set, or of a .npy file", metavar="ZIP|DIR|NPY")
@detector_option
@cli.section("Performance")
@batch_option
@device_option
def gen(
    network: str,
    ref: str,
    seeds: list[int] | None,
    num: int | None,
    steps: int | None,
    class_idx: list[Any] | None,
    labels: str | None,
    batch: int,
    spec: str,
    device: str,
    trust_network_code: bool,
) -> None:
    """Measures a network, without writing images."""
    if seeds is not None and num is not None:
        raise cli.UsageError("--seeds and --num both say how many images to make; give one of them")
    chosen = list(range(num or 50000)) if seeds is None else list(dict.fromkeys(seeds))
    if len(chosen) < 2:
        raise cli.UsageError("--seeds must name two different seeds at least; write for example --seeds=0-49999")

    def measure(detector: Detector) -> Stats:
        from metrics.statistics import statistics_of_images, with_progress

        batches = _generated(network, chosen, steps, class_idx, labels, batch, trust_network_code, detector)
        return statistics_of_images(with_progress(batches, len(chosen)), detector)

    _compare(network, ref, spec, device, measure)


@command.command()
@cli.section("Main")
@click.option("--data", "--images", "data", help="Images to summarise", metavar="DIR|ZIP|NPZ", required=True)
@click.option("--dest", help="File to write", metavar="NPZ", required=True)
@detector_option
@cli.section("Performance")
@batch_option
@device_option
def ref(data: str, dest: str, batch: int, spec: str, device: str) -> None:
    """Makes a reference from all images of a data set."""

    def work(dist: Any) -> None:
        from metrics.detectors import load_detector
        from metrics.statistics import statistics_of_dataset

        path = dest if dest.endswith(".npz") else f"{dest}.npz"
        check_target(path)
        stats = statistics_of_dataset(data, load_detector(spec, dist.device()), batch=batch, progress=True)
        if dist.is_main():
            stats.save(path)
            _say(f"wrote {path}: statistics of {stats.num} images by {stats.detector_id}")
            from engine.next_steps import FID_IMAGES, images_to_measure

            own = [] if spec == "inception" else [f"--detector={cli.public_url(spec)}"]
            own += [f"--num-images={num}"] if (num := images_to_measure()) != FID_IMAGES else []
            _propose("the Fréchet distance of a network to them", "gen", "--network=NETWORK.pkl", f"--ref={path}", *own)

    _with_processes(device, work)


@command.command()
@cli.section("Main")
@click.option("--data", help="Data set with class labels", metavar="DIR|ZIP", required=True)
@click.option("--dest", help="File to write", metavar="FILE", required=True)
@click.option("--seed", help="Random seed", metavar="INT", type=cli.Whole(0, 2**63 - 1), default=0)
@click.option(
    "--kimg",
    help="Thousands of images to train for  [default: 40 to 300 by their size]",
    metavar="FLOAT",
    type=cli.Number(min=0, min_open=True),
)
@cli.section("Performance")
@device_option
def detector(data: str, dest: str, seed: int, kimg: float | None, device: str) -> None:
    """Trains a small classifier as a detector."""

    def work(dist: Any) -> None:
        from metrics.classifier import train_detector

        check_target(dest)
        if Path(dest).is_file():
            from metrics.detectors import load_detector

            try:
                load_detector(dest, "cpu")
            except cli.UserError as exc:
                raise cli.UserError(f"{dest} is there, and is no detector; name another --dest, or remove it") from exc
        if dist.is_main():
            facts = train_detector(data, dest, seed=seed, kimg=kimg, device=dist.device())
            _say(
                f"wrote {dest}: {facts.accuracy:.1%} of {facts.held_out} held-out images recognised, {facts.classes} "
                f"classes, {facts.resolution}x{facts.resolution}, trained for {facts.kimg:g} kimg with seed {seed}"
            )
            if facts.accuracy == 1:
                _say(
                    "note: it made no mistake; so easy a task may leave it blind to much of what images can lack: "
                    "look at them too, or give it more classes to tell apart"
                )
            if facts.accuracy < min(2 / facts.classes, (1 + 1 / facts.classes) / 2):
                _say("warning: that is hardly better than guessing; use a larger --kimg")
            target = str(Path(dest).with_suffix(".npz"))
            _propose("a reference by it", "ref", f"--data={data}", f"--dest={target}", f"--detector={dest}")
        dist.barrier()

    _with_processes(device, work)


def _compare(source: str, ref: str, spec: str, device: str, measure: Callable[[Detector], Stats]) -> None:
    """Prints the Fréchet distance between the reference and what `measure` finds with the detector in `source`."""

    def work(dist: Any) -> None:
        from metrics.detectors import INCEPTION, load_detector
        from metrics.statistics import (
            check_reference,
            check_same_detector,
            frechet_between,
            load_reference,
            note_if_collapsed,
        )

        reference = load_reference(ref)
        if spec == "inception":
            check_same_detector(INCEPTION, reference.detector_id)  # a download comes after this
        network = load_detector(spec, dist.device())
        check_reference(reference, network)  # hours of work come after this
        stats = measure(network)
        note_if_collapsed(stats, reference, source)
        if dist.is_main():
            print(f"{frechet_between(stats, reference):g}", flush=True)

    _with_processes(device, work)


def _generated(
    path: str,
    seeds: list[int],
    steps: int | None,
    class_idx: list[Any] | None,
    labels: str | None,
    batch: int,
    trust_network_code: bool,
    detector: Detector,
) -> Iterator[Tensor]:
    """This process's share of the network's images for a detector, in batches uint8 [n, C, H, W]."""
    from formats.network_files import load_network
    from metrics.statistics import note_if_grey
    from torch_utils import distributed as dist
    from torch_utils.misc import allow_tf32
    from training.pictures import to_uint8
    from training.sampling import iterate_images, plan_sampling
    from training.speed import use_cpu_kernels

    network = dist.rank0_first(lambda: load_network(path, trust_network_code=trust_network_code))
    plan = plan_sampling(network, steps=steps)
    dist.check_agreement({f"the content of {network.source}": network.sha256})
    dist.print0(f"sampling {network.source} with {plan.text}\n  {network.describe()}", file=sys.stderr)
    note_if_grey(network.net.img_channels, detector)
    allow_tf32(False)
    device = dist.device()
    use_cpu_kernels(device.type == "cpu")
    for made in iterate_images(
        network, seeds, steps=steps, max_batch=batch, device=device, class_idx=class_idx, labels=labels
    ):
        if not made.images.isfinite().all():
            raise cli.UserError(
                f"{network.source}: some images of seeds {made.seeds[0]} to {made.seeds[-1]} hold NaN or infinities"
            )
        yield to_uint8(made.images)


def _with_processes(device: str, work: Callable[[Any], None]) -> None:
    """Runs `work` with the processes and the device set up, and takes them down again."""
    from torch_utils import distributed as dist

    dist.init(device, cli.options_in_use())
    work(dist)
    dist.shutdown()


def _propose(title: str, *words: str) -> None:
    """Prints the next command."""
    from engine.next_steps import launched

    command = shlex.join([*launched("fid.py"), *words])
    _say(f"Next:\n  {title}\n    {command}")


def _say(text: str) -> None:
    """Prints a line on standard error: standard output is for the number."""
    print(text, file=sys.stderr, flush=True)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
