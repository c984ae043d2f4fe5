"""Training, distillation and sampling against the plain way to do it (bench.plain), by turns, in one process.

    python -m bench.run                                  # all cases at the size of the demo
    python -m bench.run --cases=train,sample --size=cifar10 --precision=bf16 --compile=1      # on a GPU

Each case runs both ways once, to warm up and to check that they agree, then by turns for `--seconds`. Printed are the
medians and the median of the pairs' ratios.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

import generate
from bench import plain
from dnnlib import cli
from engine import setup
from formats.network_files import load_network, save_network
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset
from training.grids import Sampling, network_grid
from training.loader import Loader
from training.recipe import Options
from training.sampling import iterate_images
from training.training_loop import Trainer, build_network

SIZES: dict[str, dict[str, Any]] = {  # of the network, of a step, and of the data: number, side, channels
    "demo": {"cbase": 32, "cres": [1, 2], "blocks": 1, "batch": 64, "images": (1797, 8, 1)},
    "cifar10-cpu": {"cbase": 32, "cres": [1, 2, 2], "blocks": 1, "batch": 32, "images": (512, 32, 3)},
    "cifar10": {"cbase": 128, "cres": [2, 2, 2], "blocks": 4, "batch": 512, "images": (4096, 32, 3)},
}
COMMON: dict[str, Any] = {"seed": 0, "nosubdir": True, "cond": False, "lr": 5e-4, "warmup": 0.0, "lr_decay": "none"}
COMMON |= {"dropout": 0.0, "augment": 0.0, "duration": 100.0}


@dataclass
class Pair:
    """What a case compares. `check` gets both results and describes their distance, or raises AssertionError."""

    plain: Callable[[], Any]
    fast: Callable[[], Any]
    check: Callable[[Any, Any], str]
    amount: int  # images of one run


class Setting:
    """What cases share: data, a teacher of random weights, and a student of 4 steps of the same weights."""

    def __init__(self, size: str, device: torch.device, precision: str, compile: bool, folder: Path) -> None:
        self.device, self.precision, self.compile, self.folder = device, precision, compile, folder
        self.batch, self.data = SIZES[size]["batch"], folder / "data.zip"
        self.network = {name: SIZES[size][name] for name in ("cbase", "cres", "blocks")}
        self.images, side, channels = SIZES[size]["images"]
        write_images(self.data, self.images, side, channels)
        run = self.prepare(None)
        torch.manual_seed(0)
        net = build_network(run.config.network_kwargs, run.dataset.resolution, run.dataset.num_channels, 0)
        with torch.no_grad():  # initial zeros make half of a network idle
            for parameter in net.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.teacher, self.student = folder / "teacher.pkl", folder / "student.pkl"
        save_network(self.teacher, net)
        save_network(self.student, net, sampling=Sampling(network_grid(net, 16).every(4), "euler", 4))

    def prepare(self, solver: str | None) -> setup.Run:
        """A run of training from scratch, or of distillation with a teacher that is run by `solver`."""
        options: dict[str, Any] = {**COMMON, "batch": self.batch, "precision": self.precision, "compile": self.compile}
        if solver is None:
            options |= self.network
        else:
            options |= {"precond": "edm_distillation", "transfer": str(self.teacher), "num_steps": 16}
            options |= {"teacher_solver": solver, "intervals": "uniform"}
        return setup.prepare(Options(outdir=str(self.folder / f"run-{solver}"), data=str(self.data), **options))


def write_images(path: Path, count: int, side: int, channels: int) -> None:
    """A zip of smooth random pictures, so that PNGs are of a usual size."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, [4, 4, 3], dtype=np.uint8))
            picture = small.resize((side, side), Image.Resampling.BICUBIC).convert("L" if channels == 1 else "RGB")
            with archive.open(f"{number:05d}.png", "w") as file:
                picture.save(file, "PNG", compress_level=0)


def within(limit: float) -> Callable[[Any, Any], str]:
    """A check that numbers or tensors differ by less than `limit`, relative to the largest."""

    def check(a: Any, b: Any) -> str:
        a, b = (torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (a, b))
        difference = float((a - b).abs().max() / a.abs().max())
        assert difference < limit, f"{a} and {b} differ by {difference}"
        return f"{difference:.1e}"

    return check


def training(setting: Setting, solver: str | None = None) -> Pair:
    """Training steps from scratch, or of distillation from 16 steps of `solver`."""
    run = setting.prepare(solver)
    trainer = Trainer(run.config, run.dataset, run.stage)
    nets = copy.deepcopy(trainer.net), copy.deepcopy(trainer.ema)
    nets[0].compute_dtype = None
    stage: dict[str, Any] = {}
    if run.stage is not None:
        teacher = load_network(setting.teacher).net.to(setting.device)
        stage = {"teacher": teacher, "grid": run.stage.grid, "solver": solver}
    reference = plain.PlainTraining(*nets, setting.batch, run.config.lr, **stage)
    loaders = [Loader(run.dataset, seed=0, batch_size=setting.batch) for _ in range(2)]

    def plainly() -> float:
        with plain.plain_layers():
            return reference.step(next(loaders[0]).images)

    def quickly() -> float:
        trainer.step(loaders[1])
        loss = float(trainer.stats.mean("Loss/loss"))
        trainer.stats.reset()
        return loss

    return Pair(plainly, quickly, within(1e-4 if setting.precision == "fp32" else 0.1), setting.batch)


def sampling(setting: Setting) -> Pair:
    """Network calls of a student, without files."""
    student = load_network(setting.student)
    assert student.sampling is not None
    net, grid = copy.deepcopy(student.net).to(setting.device), student.sampling.grid
    count = 256 if setting.device.type == "cpu" else 2048

    def plainly() -> Any:
        with plain.plain_layers():
            return torch.cat(
                [plain.sample(net, range(i, i + 64), grid, setting.device).cpu() for i in range(0, count, 64)]
            )

    def quickly() -> Any:
        return torch.cat([batch.images.cpu() for batch in iterate_images(student, range(count), device=setting.device)])

    return Pair(plainly, quickly, within(1e-3), count)


def generating(setting: Setting, name: str) -> Pair:
    """Images of a student, from its file to PNGs in a folder or zip."""
    folder, out, count = setting.folder / "plain", setting.folder / name, min(1024, setting.images)
    words = [f"--network={setting.student}", f"--outdir={out}", f"--seeds=0-{count - 1}"]
    words += [
        f"--device={setting.device.type}",
        f"--precision={setting.precision}",
        f"--compile={int(setting.compile)}",
    ]

    def plainly() -> Path:
        with plain.plain_layers():
            plain.generate(setting.student, folder, count, setting.device)
        return folder

    def quickly() -> Path:
        shutil.rmtree(out, ignore_errors=True) if out.suffix != ".zip" else out.unlink(missing_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            assert generate.main(words) == 0
        return out

    def check(a: Path, b: Path) -> str:
        one, other = (ImageFolderDataset(str(path)).images(range(count)).astype(int) for path in (a, b))
        difference = abs(one - other)
        assert difference.max() <= (1 if setting.precision == "fp32" else 16), difference.max()
        return f"{(difference > 0).mean():.1e} of values differ"

    return Pair(plainly, quickly, check, count)


CASES: dict[str, Callable[[Setting], Pair]] = {
    "train": training,
    "distil-heun": partial(training, solver="heun"),
    "distil-euler": partial(training, solver="euler"),
    "sample": sampling,
    "generate-folder": partial(generating, name="folder"),
    "generate-zip": partial(generating, name="images.zip"),
}


def measure(name: str, pair: Pair, seconds: float) -> None:
    """Warms up, checks, then alternates for as long as `seconds` allow, three times at least; prints a row."""
    agreement = pair.check(pair.plain(), pair.fast())
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        pair.plain()
        middle = time.perf_counter()
        pair.fast()
        times.append((middle - start, time.perf_counter() - middle))
    slow, quick = (pair.amount / statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"{name:15s} {slow:10.4g} {quick:10.4g} {ratio:6.2f}  {agreement}", flush=True)


@cli.command(name="run")
@click.option("--cases", help="Comma-separated", metavar="LIST", default=",".join(CASES))
@click.option("--size", help="Network and data", type=cli.Choice(list(SIZES)), default="demo")
@click.option("--seconds", help="To spend on every case", type=cli.Number(min=0), default=10)
@click.option("--precision", help="Of the fast path", type=cli.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32")
@click.option("--compile", help="torch.compile in the fast path", type=cli.Bool(), default=False)
@cli.device_option
def command(cases: str, size: str, seconds: float, precision: str, compile: bool, device: str) -> None:
    """Time training, distillation, sampling and the writing of images against the plain way to do it."""
    names = cases.split(",")
    for name in names:
        if name not in CASES:
            raise cli.UsageError(f"--cases: there is no case '{name}'; there are {', '.join(CASES)}")
    where = dist.init(device)
    print(
        f"torch {torch.__version__}, {where.type}, {torch.get_num_threads()} threads, size {size}, here in {precision}"
        f"{', compiled' * compile}; images a second"
    )
    print(f"{'case':15s} {'plain':>10s} {'here':>10s} {'ratio':>6s}  difference")
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(size, where, precision, compile, Path(folder))
        for name in names:
            measure(name, CASES[name](setting), seconds)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
