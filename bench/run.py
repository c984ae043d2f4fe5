"""Training, distillation and sampling against the plain way to do it (bench.plain), by turns, in one process.

    python -m bench.run                                  # all cases at the size of the demo
    python -m bench.run --cases=train,sample --size=cifar10 --precision=bf16 --compile=1      # on a GPU

Each case runs both ways once, to warm up and to check that they agree, then by turns for `--seconds`. Printed are the
medians and the median of the pairs' ratios.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from bench import plain
from dnnlib import cli
from engine import setup
from formats.network_files import load_network, save_network
from torch_utils import distributed as dist
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


# Two functions that return numbers, the limit of their difference relative to the largest, and the images of one run.
Pair = tuple[Callable[[], Any], Callable[[], Any], float, int]


@dataclass
class Setting:
    """What cases share: data, a teacher of random weights, and a student of 4 steps of the same weights."""

    size: str
    device: torch.device
    precision: str
    compile: bool
    folder: Path

    def __post_init__(self) -> None:
        self.network = dict(SIZES[self.size])
        self.batch, (number, side, channels) = self.network.pop("batch"), self.network.pop("images")
        self.data, self.teacher, self.student = (self.folder / name for name in ("data.zip", "teacher.pkl", "net.pkl"))
        shape = [number, side, side, 3] if channels == 3 else [number, side, side]
        with zipfile.ZipFile(self.data, "w", zipfile.ZIP_STORED) as archive:
            for index, image in enumerate(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)):
                with archive.open(f"{index:05d}.png", "w") as file:
                    Image.fromarray(image).save(file, "PNG", compress_level=0)
        run = self.prepare(None)
        torch.manual_seed(0)
        net = build_network(run.config.network_kwargs, side, channels, 0)
        with torch.no_grad():  # initial zeros make half of a network idle
            for parameter in net.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        save_network(self.teacher, net)
        save_network(self.student, net, sampling=Sampling(network_grid(net, 16).every(4), "euler", 4))

    def prepare(self, solver: str | None) -> setup.Run:
        """A run of training from scratch, or of distillation with a teacher that is run by `solver`."""
        options = self.network
        if solver is not None:
            options = {"precond": "edm_distillation", "transfer": str(self.teacher), "num_steps": 16}
            options |= {"teacher_solver": solver, "intervals": "uniform"}
        options = {**COMMON, **options, "batch": self.batch, "precision": self.precision, "compile": self.compile}
        return setup.prepare(Options(outdir=str(self.folder / f"run-{solver}"), data=str(self.data), **options))


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
        return reference.step(next(loaders[0]).images)

    def quickly() -> float:
        trainer.step(loaders[1])
        loss = float(trainer.stats.mean("Loss/loss"))
        trainer.stats.reset()
        return loss

    return plainly, quickly, 1e-4 if setting.precision == "fp32" else 0.1, setting.batch


def sampling(setting: Setting) -> Pair:
    """Network calls of a student, without files."""
    student = load_network(setting.student)
    assert student.sampling is not None
    net, grid = copy.deepcopy(student.net).to(setting.device), student.sampling.grid
    count = 256 if setting.device.type == "cpu" else 2048

    def plainly() -> Any:
        batches = [plain.sample(net, range(i, i + 64), grid, setting.device) for i in range(0, count, 64)]
        return torch.cat(batches).cpu()

    def quickly() -> Any:
        return torch.cat([batch.images.cpu() for batch in iterate_images(student, range(count), device=setting.device)])

    return plainly, quickly, 1e-3, count


CASES: dict[str, Callable[[Setting], Pair]] = {
    "train": training,
    "distil-heun": partial(training, solver="heun"),
    "distil-euler": partial(training, solver="euler"),
    "sample": sampling,
}


def measure(name: str, pair: Pair, seconds: float) -> None:
    """Warms up, checks, then alternates for as long as `seconds` allow, three times at least; prints a row."""
    plainly, quickly, limit, amount = pair
    plainly = plain.plain_layers()(plainly)
    a, b = (torch.as_tensor(each(), dtype=torch.float64, device="cpu") for each in (plainly, quickly))
    difference = float((a - b).abs().max() / a.abs().max())
    assert difference < limit, f"{a} and {b} differ by {difference}"
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        plainly()
        middle = time.perf_counter()
        quickly()
        times.append((middle - start, time.perf_counter() - middle))
    slow, fast = (amount / statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"{name:15s} {slow:10.4g} {fast:10.4g} {ratio:6.2f}  {difference:.1e}", flush=True)


@cli.command(name="run")
@click.option("--cases", help="Comma-separated", metavar="LIST", default=",".join(CASES))
@click.option("--size", help="Network and data", type=cli.Choice(list(SIZES)), default="demo")
@click.option("--seconds", help="To spend on every case", type=cli.Number(min=0), default=10)
@click.option("--precision", help="Of the fast path", type=cli.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32")
@click.option("--compile", help="torch.compile in the fast path", type=cli.Bool(), default=False)
@cli.device_option
def command(cases: str, size: str, seconds: float, precision: str, compile: bool, device: str) -> None:
    """Time training, distillation and sampling against the plain way to do it."""
    names = cases.split(",")
    if unknown := set(names) - CASES.keys():
        raise cli.UsageError(f"--cases: there is no case '{unknown.pop()}'; there are {', '.join(CASES)}")
    where = dist.init(device)
    how = f"here in {precision}{', compiled' * compile}; images a second"
    print(f"torch {torch.__version__}, {where.type}, {torch.get_num_threads()} threads, size {size}, {how}")
    print(f"{'case':15s} {'plain':>10s} {'here':>10s} {'ratio':>6s}  difference")
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(size, where, precision, compile, Path(folder))
        for name in names:
            measure(name, CASES[name](setting), seconds)


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
