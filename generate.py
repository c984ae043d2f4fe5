"""Generates images with an EDM network, or with a network distilled from one.

    python generate.py --outdir=out --seeds=0-63 --batch=64 --network=NETWORK
    torchrun --standalone --nproc_per_node=2 generate.py --outdir=out --seeds=0-49999 --subdirs --network=NETWORK

Programs written against EDM find `edm_sampler`, `ablation_sampler` and `StackedRandomGenerator` here.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from dnnlib.util import count
from training.sampler_table import SOLVERS

if TYPE_CHECKING:
    import torch

    from formats.image_files import ImageFolder, ImageZip, Work
    from formats.network_files import NetworkFile
    from training.labels import Labels
    from training.samplers import StackedRandomGenerator as StackedRandomGenerator
    from training.samplers import ablation_sampler as ablation_sampler
    from training.samplers import edm_sampler as edm_sampler
    from training.sampling import Plan

POSITIVE = cli.Number(min=0, min_open=True)
NOT_NEGATIVE = cli.Number(min=0)
LIMIT = cli.Number(min=0, also=math.inf)
SOLVER_HELP = ", ".join(f"{name} ({method.text})" for name, method in SOLVERS.items())


def __getattr__(name: str) -> Any:
    """EDM's names, imported on demand: torch takes seconds, and `--help` must not."""
    if name in ("edm_sampler", "ablation_sampler", "StackedRandomGenerator"):
        from training import samplers

        return getattr(samplers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cli.command(name="generate")
@cli.section("Main")
@click.option("--network", help="Network file, .pkl or .safetensors", metavar="PATH|URL", required=True)
@click.option("--outdir", help="Where to save the images: a folder, or a .zip", metavar="DIR|ZIP", required=True)
@click.option(
    "--seeds",
    help="Random seeds, one per image (e.g. 1,2,5-10), below 2^32; CUDA and CPU draw different images",
    type=cli.Seeds(),
    default="0-63",
)
@cli.class_option
@cli.labels_option
@cli.trust_option
@cli.section("Sampling")
@click.option("--steps", help="Sampling steps  [default: 18, or a student's own]", type=cli.Whole(min=1))
@click.option("--sigma_min", help="Lowest noise level  [default: varies]", type=POSITIVE)
@click.option("--sigma_max", help="Highest noise level  [default: varies]", type=POSITIVE)
@click.option("--rho", help="Time step exponent  [default: 7]", type=POSITIVE)
@click.option("--S_churn", "S_churn", help="Stochasticity strength  [default: 0]", type=NOT_NEGATIVE)
@click.option("--S_min", "S_min", help="Stochasticity from this noise level  [default: 0]", type=LIMIT)
@click.option("--S_max", "S_max", help="Stochasticity up to this noise level  [default: inf]", type=LIMIT)
@click.option("--S_noise", "S_noise", help="Inflation of the noise added  [default: 1]", type=NOT_NEGATIVE)
@click.option("--solver", help=f"ODE solver: {SOLVER_HELP}  [default: Heun, Alg. 2]", type=cli.Choice(list(SOLVERS)))
@click.option("--disc", "discretization", help="Ablate the time steps", type=cli.Choice(["vp", "ve", "iddpm", "edm"]))
@click.option("--schedule", help="Ablate the noise schedule sigma(t)", type=cli.Choice(["vp", "ve", "linear"]))
@click.option("--scaling", help="Ablate the signal scaling s(t)", type=cli.Choice(["vp", "none"]))
@click.option(
    "--grid",
    help="Noise levels of an undistilled network; N/K: of a student whose file has none, distilled from N steps, "
    "K at a time  [default: edm]",
    metavar="edm|measured|LEVELS|FILE|N/K",
)
@cli.section("Output and resuming")
@click.option("--subdirs", help="A subfolder for every 1000 seeds", is_flag=True)
@click.option("--skip-existing", help="Continue an interrupted run in a folder", is_flag=True)
@cli.section("Performance")
@click.option("--batch", "max_batch", help="Maximum batch size per process", type=cli.Whole(min=1), default=64)
@click.option(
    "--precision",
    help="Arithmetic of the network; auto: fp16 on CUDA if its file says so, otherwise fp32",
    type=cli.Choice(["auto", "fp32", "tf32", "bf16", "fp16"]),
    default="auto",
)
@click.option(
    "--compile", "use_compile", help="torch.compile the network", metavar="BOOL", type=cli.Bool(), default=False
)
@cli.device_option
def command(
    network: str,
    outdir: str,
    seeds: list[int],
    subdirs: bool,
    class_idx: list[Any] | None,
    labels: str | None,
    max_batch: int,
    skip_existing: bool,
    precision: str,
    use_compile: bool,
    device: str,
    trust_network_code: bool,
    **sampler_options: Any,
) -> None:
    """Generate images with an EDM network, or with one distilled from it.

    The same network, seed and options give the same image, whatever the other seeds are. A distilled network knows its
    own noise grid: it needs no --steps, and accepts its own number or its teacher's. Any of --solver, --disc,
    --schedule and --scaling selects the ablation sampler of the paper.

    \b
    Make 64 images in out/:
      python generate.py --outdir=out --seeds=0-63 --batch=64 --network=student.pkl

    \b
    Make 50,000 images for FID on 4 GPUs, with 18 steps of an undistilled network:
      torchrun --standalone --nproc_per_node=4 generate.py --outdir=fid-tmp --seeds=0-49999 --subdirs \\
          --network=teacher.pkl --steps=18
    """
    if outdir.lower().endswith((".png", ".jpg", ".jpeg")) and not Path(outdir).is_dir():
        raise cli.UsageError(
            f"--outdir={outdir}: many images go into a folder or a .zip; one picture of all: example.py --out"
        )
    from engine.stopping import stopping_at_once
    from formats.image_files import MAX_IMAGES, ImageZip, Manifest, open_output, prepare
    from formats.network_files import load_network
    from torch_utils import distributed as dist
    from training.labels import choose_labels
    from training.sampling import plan_sampling

    if len(seeds) > MAX_IMAGES:
        raise cli.UsageError(f"--seeds names {len(seeds)} images; {MAX_IMAGES} are the most of a folder or zip")
    seeds = list(dict.fromkeys(seeds))  # an image that is asked for twice is made once
    where = dist.init(device, cli.options_in_use())

    def load() -> tuple[NetworkFile, Plan, Labels | None]:
        loaded = load_network(network, trust_network_code=trust_network_code)
        if (channels := loaded.net.img_channels) not in (1, 3):
            raise cli.UserError(f"{loaded.source} makes {channels} channels; a PNG has 1 (grey) or 3 (RGB)")
        drawn_from = choose_labels(loaded, class_idx, labels)
        return loaded, plan_sampling(loaded, **sampler_options), drawn_from

    dist.print0(f"Loading network from {cli.public_url(network)} ...")
    loaded, plan, drawn_from = dist.rank0_first(load)
    dist.check_agreement(
        {f"the content of {loaded.source}": loaded.sha256, "the noise levels": plan.options.get("levels")}
    )

    options = {"class": class_idx[0] if class_idx is not None and len(class_idx) == 1 else class_idx}
    options |= {"subdirs": subdirs, "precision": precision, "compile": use_compile}
    if labels is not None and drawn_from is not None:
        options["labels"] = drawn_from.digest()
    options |= {"device": where.type}  # each kind of device draws its own random numbers
    made_by = Manifest({"source": str(loaded.source), "sha256": loaded.sha256}, {**plan.options, **options})
    output, processes = open_output(outdir), dist.get_world_size()

    def lock_and_prepare() -> Work:
        click.get_current_context().with_resource(output.lock())  # for as long as the command runs
        labelled = drawn_from is not None
        return prepare(output, made_by, seeds, max_batch, processes, skip_existing=skip_existing, labelled=labelled)

    work = dist.from_rank0(lock_and_prepare)
    dist.print0(f"Found {loaded.describe()}")
    dist.print0(f"Using {plan.text}")
    if work.note:
        dist.print0(f"Note: {work.note}")
    if work.is_done:
        dist.print0(f"Nothing to do: {outdir} has {count(len(seeds), 'image')} of these seeds already")
    else:
        total = sum(map(len, work.batches))
        size = f"{loaded.net.img_resolution}x{loaded.net.img_resolution}"
        images = count(total, "image")
        dist.print0(f"Making {images} of {size} pixels in {outdir}, on {processes} x {where.type} ...")
        loaded = _make_ready(loaded, where, precision, use_compile)
        start = time.monotonic()
        resume = "run the same command with --skip-existing to resume"
        with stopping_at_once("a zip is made in one go" if isinstance(output, ImageZip) else resume):
            _make_images(loaded, plan, work, output, where, drawn_from)
        seconds = time.monotonic() - start
        dist.print0(f"Done: {images} in {outdir} after {seconds:.1f} s, {total / seconds:.1f} a second")
    dist.shutdown()


def _make_ready(network: NetworkFile, where: torch.device, precision: str, use_compile: bool) -> NetworkFile:
    """Puts the network on its device, in the arithmetic asked for; fp32 is full fp32, also on CUDA."""
    from torch_utils import distributed as dist
    from torch_utils.misc import allow_tf32
    from training.speed import compute_dtype, maybe_compile

    allow_tf32(where.type == "cuda" and precision not in ("auto", "fp32"))
    net = network.net.to(where)
    net.compute_dtype = None if precision == "auto" else compute_dtype(precision, where)
    return replace(network, net=maybe_compile(net, use_compile, dist.print0))


def _make_images(
    network: NetworkFile,
    plan: Plan,
    work: Work,
    output: ImageFolder | ImageZip,
    where: torch.device,
    labels: Labels | None,
) -> None:
    """Makes this process's share of the images; the network works while threads write what it made before."""
    from formats.image_files import writing
    from torch_utils import distributed as dist
    from torch_utils.progress import show_progress
    from training.pictures import to_uint8
    from training.sampling import draw_inputs, own_share, sample_batch

    total = sum(map(len, work.batches))
    with writing(output, work.manifest.name) as submit:
        for seeds in show_progress(own_share(work.batches), len, total, dist.print0, title=f"NFE {plan.nfe}"):
            images = sample_batch(network.net, seeds, plan, where, labels).checked(network.source)
            submit(seeds, to_uint8(images.double()).permute(0, 2, 3, 1).cpu().numpy())
    dist.barrier()
    if dist.is_main():
        found: dict[str, Any] = {}  # labels of all images: seeds decide them, also those of images from before
        names = list(work.manifest.names().items()) if labels is not None else []
        for start in range(0, len(names), 256):
            part = dict(names[start : start + 256])
            _, _, drawn = draw_inputs(network.net, list(part.values()), labels, where)
            assert labels is not None and drawn is not None
            found.update(zip(part, labels.plain(drawn), strict=True))
        output.finish(work.manifest, found)


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
