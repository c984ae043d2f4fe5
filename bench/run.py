"""Every stage of the work against the plain way to do it (bench.plain), alternately, in one process.

    python -m bench.run                                  # all cases at the size of the demo
    python -m bench.run --cases=train,sample --size=cifar10 --precision=bf16 --compile=1      # on a GPU

Each case runs both once to warm up and to check that they agree, then by turns; it reports the medians, the median of
the pairs' ratios, the arithmetic reached and its share of what float32 reaches on this machine at best (measured
first). Times of start-ups are those of processes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from dnnlib import cli
from dnnlib.atomic import check_target, write_text

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Size:
    """A network, the images of its data set, and the batch of a step."""

    cbase: int
    cres: list[int]
    blocks: int
    resolution: int
    channels: int
    images: int
    batch: int


SIZES = {
    "demo": Size(cbase=32, cres=[1, 2], blocks=1, resolution=8, channels=1, images=1797, batch=64),
    "cifar10-cpu": Size(cbase=32, cres=[1, 2, 2], blocks=1, resolution=32, channels=3, images=512, batch=32),
    "cifar10": Size(cbase=128, cres=[2, 2, 2], blocks=4, resolution=32, channels=3, images=4096, batch=512),
}


@dataclass
class Pair:
    """What a case compares. `check` gets both results and describes their distance, or raises AssertionError."""

    plain: Callable[[], Any]
    fast: Callable[[], Any]
    check: Callable[[Any, Any], str]
    amount: float = 1  # images, or files, of one run
    unit: str = "images"
    flops: float = 0  # of one run


@dataclass
class Row:
    """A measured case."""

    case: str
    unit: str
    plain_per_sec: float
    fast_per_sec: float
    ratio: float
    gflops: float  # of the fast path
    share: float  # of what float32 reaches on this machine
    peak_mb: float  # of the whole process so far
    agreement: str


@dataclass
class Setting:
    """What cases share."""

    size: Size
    device: Any
    precision: str
    compile: bool
    folder: Path
    seconds: float
    stack: ExitStack

    def data(self) -> Path:
        """A zip of random images of this size (the demo's are as many as the digits)."""
        path = self.folder / "data.zip"
        if not path.exists():
            write_images(path, self.size.images, self.size.resolution, self.size.channels)
        return path


def write_images(path: Path, count: int, resolution: int, channels: int) -> None:
    """Smooth random pictures, so that PNGs are of a usual size."""
    import zipfile

    from PIL import Image

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in range(count):
            small = rng.integers(0, 256, [4, 4, 3], dtype=np.uint8)
            picture = Image.fromarray(small).resize((resolution, resolution), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            picture.convert("L" if channels == 1 else "RGB").save(buffer, "PNG", compress_level=0)
            archive.writestr(f"{number:05d}.png", buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": None}))


def trainer_and_plain(setting: Setting, solver: str | None) -> tuple[Any, Any, Any, float]:
    """(Trainer with its loader, PlainTraining with its own, FLOPs of a step): training from scratch, or distillation
    (solver) of a network of random weights on 16 levels."""
    import torch

    from bench.plain import PlainTraining
    from engine import setup
    from engine.costs import network_cost
    from formats.network_files import load_network, save_network
    from training.loader import Loader
    from training.recipe import Options
    from training.training_loop import Trainer, build_network

    size, teacher_file = setting.size, setting.folder / "teacher.pkl"
    network: dict[str, Any] = {"cbase": size.cbase, "cres": size.cres, "blocks": size.blocks}
    common: dict[str, Any] = {"data": str(setting.data()), "batch": size.batch, "seed": 0, "nosubdir": True}
    common |= {"precision": setting.precision, "compile": setting.compile, "lr": 5e-4, "warmup": 0.0, "cond": False}
    common |= {"dropout": 0.0, "augment": 0.0, "duration": 100.0, "lr_decay": "none"}
    if solver is not None:
        if not teacher_file.exists():
            run = setup.prepare(Options(outdir=str(setting.folder / "t"), **common, **network))
            torch.manual_seed(0)
            net = build_network(run.config.network_kwargs, run.dataset.resolution, run.dataset.num_channels, 0)
            with torch.no_grad():  # initial zeros make half of a network idle
                for parameter in net.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            save_network(teacher_file, net)
        common |= {"precond": "edm_distillation", "transfer": str(teacher_file), "num_steps": 16}
        common |= {"teacher_solver": solver, "intervals": "uniform"}
        network = {}
    run = setup.prepare(Options(outdir=str(setting.folder / f"run-{solver}"), **common, **network))
    trainer = Trainer(run.config, run.dataset, run.stage)
    kwargs: dict[str, Any] = {"seed": 0, "batch_size": size.batch}
    teacher = load_network(teacher_file).net.to(setting.device) if solver is not None else None
    plain = PlainTraining(
        copy.deepcopy(trainer.net),
        copy.deepcopy(trainer.ema),
        seed=0,
        batch=size.batch,
        lr=5e-4,
        ema_halflife=500e3,
        teacher=teacher,
        grid=run.stage.grid if run.stage else None,
        solver=solver or "heun",
    )
    plain.net.compute_dtype = None
    loaders = Loader(run.dataset, **kwargs), Loader(run.dataset, **kwargs)
    for loader in loaders:
        setting.stack.callback(loader.close)
    calls = 3 + (0 if solver is None else 2 * (2 if solver == "heun" else 1))
    return trainer, plain, loaders, calls * network_cost(run.config, run.dataset).flops * size.batch


def training(solver: str | None) -> Callable[[Setting], Pair]:
    """A case of training steps."""

    def case(setting: Setting) -> Pair:
        import torch

        from bench.plain import plain_layers

        trainer, plain, loaders, flops = trainer_and_plain(setting, solver)
        sync = torch.cuda.synchronize if setting.device.type == "cuda" else lambda: None

        def plainly() -> float:
            with plain_layers():
                batch = next(loaders[0])
                return plain.step(batch.images, None)

        def quickly() -> float:
            trainer.step(loaders[1])
            sync()
            loss = float(trainer.stats["Loss/loss"])
            trainer.stats.reset()
            return loss

        def check(a: float, b: float) -> str:
            difference = abs(a - b) / abs(a)
            limit = 1e-4 if setting.precision == "fp32" else 0.1
            assert difference < limit, f"losses {a} and {b}"
            return f"loss {difference:.1e}"

        return Pair(plainly, quickly, check, setting.size.batch, flops=flops)

    return case


def sampling(setting: Setting) -> Pair:
    """Network calls of a student of 4 steps, without files."""
    from bench import plain
    from formats.network_files import load_network
    from training.grids import Sampling, network_grid
    from training.sampling import iterate_images

    _, _, _, _ = trainer_and_plain(setting, "heun")
    file = load_network(setting.folder / "teacher.pkl")
    grid = network_grid(file.net, 16).every(4)
    from dataclasses import replace

    student = replace(file, sampling=Sampling(grid, "euler", 4))
    net = copy.deepcopy(file.net).to(setting.device)
    count = 256 if setting.device.type == "cpu" else 2048

    def plainly() -> Any:
        import torch

        with plain.plain_layers(), torch.no_grad():
            starts = range(0, count, 64)
            return torch.cat([plain.sample(net, range(i, i + 64), grid, "euler", setting.device) for i in starts])

    def quickly() -> Any:
        import torch

        return torch.cat([batch.images for batch in iterate_images(student, range(count), device=setting.device)])

    def check(a: Any, b: Any) -> str:
        difference = float((a - b).abs().max())
        assert difference < 1e-3, difference
        return f"pixels {difference:.1e}"

    flops = count * grid.steps * call_flops(setting)
    return Pair(plainly, quickly, check, count, flops=flops)


def call_flops(setting: Setting) -> float:
    """Of one network call for one image."""
    from engine import setup
    from engine.costs import network_cost
    from training.recipe import Options

    size = setting.size
    options = Options(outdir=str(setting.folder / "t"), data=str(setting.data()), cond=False, nosubdir=True, seed=0)
    options.cbase, options.cres, options.blocks = size.cbase, size.cres, size.blocks
    run = setup.prepare(options)
    return float(network_cost(run.config, run.dataset).flops)


def generating(name: str) -> Callable[[Setting], Pair]:
    """A case of images of a student of 4 steps, from its file to PNGs in a folder or zip."""

    def case(setting: Setting) -> Pair:
        import generate
        from bench import plain
        from formats.network_files import load_network, save_network
        from training.dataset import ImageFolderDataset
        from training.grids import Sampling, network_grid

        trainer_and_plain(setting, "heun")
        teacher = load_network(setting.folder / "teacher.pkl")
        grid = network_grid(teacher.net, 16).every(4)
        file, folder, out = (setting.folder / part for part in ("student.pkl", "plain", name))
        save_network(file, teacher.net, sampling=Sampling(grid, "euler", 4))
        count = 1024

        def plainly() -> Any:
            with plain.plain_layers():
                plain.generate(file, folder, count, setting.device)
            return folder

        def quickly() -> Any:
            shutil.rmtree(out, ignore_errors=True) if out.suffix != ".zip" else out.unlink(missing_ok=True)
            words = [
                f"--network={file}",
                f"--outdir={out}",
                f"--seeds=0-{count - 1}",
                f"--device={setting.device.type}",
            ]
            words += [f"--precision={setting.precision}", f"--compile={int(setting.compile)}"]
            with contextlib.redirect_stdout(io.StringIO()):
                assert generate.main(words) == 0
            return out

        def check(a: Any, b: Any) -> str:
            one, other = (ImageFolderDataset(str(path)).images(range(count)).astype(int) for path in (a, b))
            difference = abs(one - other)
            assert difference.max() <= (1 if setting.precision == "fp32" else 16), difference.max()
            return f"{(difference > 0).mean():.1e} of values differ by 1 of 255"

        return Pair(plainly, quickly, check, count, flops=count * grid.steps * call_flops(setting))

    return case


def measuring(setting: Setting) -> Pair:
    """What fid.py calc does, from PNGs in a zip to the distance, with Inception of random weights."""
    import torch

    from bench import plain
    from metrics.detectors import INCEPTION, Detector
    from metrics.inception import FEATURES, InceptionV3
    from metrics.statistics import Stats, frechet_between, statistics_of_dataset

    torch.manual_seed(0)
    net = InceptionV3().eval().requires_grad_(False).to(setting.device)
    plain_net = copy.deepcopy(net)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    detector = Detector(INCEPTION, net, FEATURES, channels=3, resolution=None, device=setting.device)
    count = 64 if setting.device.type == "cpu" else 10_000
    path = setting.folder / "fid.zip"
    write_images(path, count, 32, 3)
    features = np.random.default_rng(0).standard_normal([2 * FEATURES, FEATURES])
    reference = Stats(features.mean(axis=0), np.cov(features, rowvar=False), len(features), INCEPTION)

    def quickly() -> float:
        with contextlib.redirect_stderr(io.StringIO()):  # it warns of too few images for a covariance
            return frechet_between(statistics_of_dataset(path, detector), reference)

    def check(a: float, b: float) -> str:
        difference = abs(a - b) / abs(a)
        assert difference < 1e-4, (a, b)
        return f"{difference:.1e}"

    def plainly() -> float:
        return plain.measure(path, plain_net, reference.mu, reference.sigma, setting.device)

    return Pair(plainly, quickly, check, count)


def distance(rank: int) -> Callable[[Setting], Pair]:
    """A case of Fréchet distances between statistics of 2,048 features, of full rank or less."""

    def case(setting: Setting) -> Pair:
        from bench import plain
        from metrics.frechet import frechet_distance

        rng = np.random.default_rng(0)
        moments = []
        for shift in (0.0, 0.2):
            features = rng.standard_normal([rank + 1, 2048]) * np.geomspace(1, 0.01, 2048) + shift
            moments += [features.mean(axis=0), np.cov(features, rowvar=False)]

        def check(a: float, b: float) -> str:
            difference = abs(a - b) / abs(a)
            assert difference < (1e-6 if rank >= 2048 else 1e-3), (a, b)  # sqrtm is no better where rank lacks
            return f"{difference:.1e}"

        return Pair(
            lambda: plain.frechet_distance(*moments), lambda: frechet_distance(*moments), check, unit="distances"
        )

    return case


def start_up(words: Sequence[str]) -> Callable[[Setting], Pair]:
    """A case of starting a script: beside `python -c 'import torch'`, which is where such a script spends its time
    unless it takes care."""

    def case(setting: Setting) -> Pair:
        def run(*command: str) -> None:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)

        return Pair(lambda: run("-c", "import torch"), lambda: run(*words), lambda a, b: "", unit="starts")

    return case


CASES: dict[str, Callable[[Setting], Pair]] = {
    "train": training(None),
    "distil-heun": training("heun"),
    "distil-euler": training("euler"),
    "sample": sampling,
    "generate-folder": generating("folder"),
    "generate-zip": generating("images.zip"),
    "fid": measuring,
    "frechet-full": distance(4000),
    "frechet-1000": distance(1000),
    "help": start_up(["train.py", "--help"]),
    "example": start_up(["example.py", "--seeds=0", "--out=/dev/null.png"]),
}


def arithmetic_rate(device: Any, seconds: float = 2.0) -> float:
    """FLOP/s of float32: the best of many matrix products (1024 x 1024, on CUDA 8192) and of many 3x3 convolutions of
    128 channels. Two libraries do these, and on some processors one of them is twice as good as the other."""
    import torch
    import torch.nn.functional as F

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    x = torch.randn(16, 128, 32, 32, device=device).to(memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, device=device).to(memory_format=torch.channels_last)
    rate = 0.0
    for flops, action in ((2 * size**3, lambda: a @ b), (2 * 9 * 128 * x.numel(), lambda: F.conv2d(x, w, padding=1))):
        end = time.perf_counter() + seconds / 2
        while time.perf_counter() < end:
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rate = max(rate, flops / (time.perf_counter() - start))
    return rate


def measure(name: str, pair: Pair, setting: Setting, rate: float) -> Row:
    """Warms up, checks, then alternates for as long as `setting.seconds` allow, three times at least."""
    agreement = pair.check(pair.plain(), pair.fast())
    plain: list[float] = []
    fast: list[float] = []
    end = time.perf_counter() + setting.seconds
    while len(plain) < 3 or time.perf_counter() < end:
        for action, times in ((pair.plain, plain), (pair.fast, fast)):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
    slow, quick = statistics.median(plain), statistics.median(fast)
    return Row(
        case=name,
        unit=pair.unit,
        plain_per_sec=pair.amount / slow,
        fast_per_sec=pair.amount / quick,
        ratio=statistics.median(a / b for a, b in zip(plain, fast, strict=True)),
        gflops=pair.flops / quick / 1e9,
        share=pair.flops / quick / rate,
        peak_mb=peak_mb(setting.device),
        agreement=agreement,
    )


def peak_mb(device: Any) -> float:
    """Of device memory on CUDA, of the process elsewhere."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def report(rows: Iterator[Row]) -> Iterator[Row]:
    """Prints rows as they come."""
    heading = (
        f"{'case':13s} {'plain/s':>10s} {'here/s':>10s} {'ratio':>6s} {'GFLOP/s':>9s} {'share':>6s} {'peak MB':>8s}"
    )
    print(f"{heading}  agreement")
    for row in rows:
        work = f"{row.gflops:9.1f} {row.share:6.1%}" if row.gflops else f"{'':9s} {'':6s}"
        print(
            f"{row.case:13s} {row.plain_per_sec:10.4g} {row.fast_per_sec:10.4g} {row.ratio:6.2f} {work} "
            f"{row.peak_mb:8.0f}  {row.agreement} ({row.unit})",
            flush=True,
        )
        yield row


@cli.command(name="run")
@click.option("--cases", help="Comma-separated  [default: all]", metavar="LIST")
@click.option("--size", help="Network and data", type=cli.Choice(list(SIZES)), default="demo")
@click.option("--seconds", help="To spend on every case", type=cli.Number(min=0), default=10)
@click.option("--precision", help="Of the fast path", type=cli.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32")
@click.option("--compile", help="torch.compile in the fast path", type=cli.Bool(), default=False)
@cli.device_option
@click.option("--json", "json_file", help="Write the figures there too", metavar="FILE")
def command(
    cases: str | None, size: str, seconds: float, precision: str, compile: bool, device: str, json_file: str | None
) -> None:
    """Measure every stage of the work against the plain way to do it."""
    names = list(CASES) if cases is None else cases.split(",")
    for name in names:
        if name not in CASES:
            raise cli.UsageError(f"--cases: there is no case '{name}'; there are {', '.join(CASES)}")
    if json_file is not None:
        check_target(json_file)
    import torch

    from torch_utils import distributed as dist

    where = dist.init(device)
    rate = arithmetic_rate(where)
    print(
        f"torch {torch.__version__}, {where.type}, {torch.get_num_threads()} threads, size {size}, here in {precision}"
        f"{', compiled' * compile}; float32 reaches {rate / 1e9:.0f} GFLOP/s"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        setting = Setting(SIZES[size], where, precision, compile, Path(folder), seconds, stack)
        rows = list(report(measure(name, CASES[name](setting), setting, rate) for name in names))
    if json_file is not None:
        content: dict[str, Any] = {
            "torch": torch.__version__,
            "device": where.type,
            "size": size,
            "precision": precision,
        }
        content |= {"compile": compile, "reachable_gflops": rate / 1e9, "threads": torch.get_num_threads()}
        write_text(json_file, json.dumps({**content, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
