"""From the command line's values to a run: checks, defaults, run directory, the state to go on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from dnnlib.atomic import append_text, locked, write_text
from dnnlib.cli import UsageError, UserError
from torch_utils import distributed as dist
from torch_utils.environment import describe_environment

from . import state
from .config import (
    ARCHITECTURES,
    AUGMENTATION,
    PRECONDS,
    Kwargs,
    TrainConfig,
    check_batch,
    check_run_dir,
    describe_run,
    differences,
    next_run_number,
)
from .dataset import ImageFolderDataset
from .network_files import NetworkFile, load_network
from .options import Options, check_options, given
from .stage import Stage, check_compatible, plan_stage
from .training_loop import MAX_ROWS, MAX_SAMPLES, TARGET_COLUMNS, Trainer, build_network, check_same_options

OVERHEAD = 128 << 10  # bytes of a snapshot or a state besides tensors
INTERFACE = ("img_resolution", "img_channels", "label_dim")  # network arguments that the data dictates


@dataclass
class Run:
    """Everything that a Trainer needs, and the words that announce it."""

    config: TrainConfig
    dataset: ImageFolderDataset
    stage: Stage | None
    transfer: NetworkFile | None
    arch: str
    precond: str

    @cached_property
    def cost(self) -> Cost:
        """Of one network call."""
        return network_cost(self.config, self.dataset)

    @property
    def calls(self) -> float:
        """What training on an image costs, in network calls forward."""
        calls = 3.0  # forward and backward of what is trained
        if self.stage is not None:
            step = 2 if self.stage.solver == "heun" else 1
            calls += step + 1 if self.stage.self_teacher else self.stage.ratio * step
        return calls

    @property
    def flops_per_image(self) -> float:
        """Of training, teacher included."""
        return self.calls * self.cost.flops

    def announce(self, say: Callable[[str], None] = dist.print0) -> None:
        """What will happen, in a few lines."""
        config, dataset = self.config, self.dataset
        say(f"Output directory:        {config.run_dir}")
        say(f"Dataset:                 {config.dataset_kwargs['path']}, {len(dataset)} images {dataset.image_shape}")
        say(f"Class-conditional:       {dataset.has_labels}")
        say(f"Network architecture:    {self.arch}, preconditioning {config.network_kwargs['class_name']}")
        if self.stage is not None:
            teacher = self.stage.teacher
            say(f"Teacher:                 {teacher.source} (sha256 {teacher.sha256[:16]})")
            say(f"                         {teacher.describe()}")
            say(f"Distillation:            {self.stage.describe()}")
            say(
                f"Distillation's settings: weighting {config.loss_kwargs['weighting']}, intervals "
                f"{config.loss_kwargs['intervals']}, lr {config.lr:g}, decay "
                f"{config.lr_decay}, dropout {config.network_kwargs['dropout']:g}, augmentation "
                f"{(config.augment_kwargs or {}).get('p', 0):g}"
            )
        say(f"Processes:               {dist.get_world_size()} on {dist.device().type}")
        say(f"Batch size:              {config.batch_size}, for {config.total_nimg / 1000:g} kimg")
        say(
            f"Work:                    {self.flops_per_image * config.total_nimg:.3g} FLOP, "
            f"{self.flops_per_image / 1e9:.4g} GFLOP an image ({self.calls:g} network calls' worth)"
        )
        say(f"Precision:               {config.precision}")
        say(f"Memory per process:      {describe_memory(self)}")
        say(f"Disk:                    {disk_need(config, dataset).describe(config.run_dir)}")
        if config.lr_rampup_kimg >= config.total_nimg / 1000:
            say(f"Note: the run ends within its --warmup ({config.lr_rampup_kimg / 1000:g} Mimg), far below --lr")
        say("")


def prepare(options: Options) -> Run:
    """Checks the options against each other, the data and the teacher, and works out every default.

    Raises UsageError or UserError with one helpful line; nothing has been written by then.
    """
    check_options(options, dist.get_world_size())
    teacher = load_everywhere(options.transfer, options.trust_network_code) if options.transfer is not None else None
    if teacher is not None and not all(p.isfinite().all() for p in teacher.net.parameters()):
        raise UserError(f"{teacher.source}: some of its weights are NaN or infinite; take a snapshot from before that")
    stage = None
    if options.distils:
        assert teacher is not None
        stage = plan_stage(teacher, options.num_steps, options.ratio, options.teacher_solver, options.self_teacher)
    elif teacher is not None and teacher.sampling is not None:
        raise UsageError(
            f"--transfer={options.transfer} is a distilled network; only --precond=edm_distillation takes those"
        )
    cond = bool(options.cond) if options.cond is not None or stage is None else stage.teacher.net.label_dim > 0
    dataset = ImageFolderDataset(options.data, use_labels=cond, xflip=options.xflip, cache=options.cache)
    asked_for = stage is None or stage.teacher.net.label_dim == 0  # otherwise it is the teacher that wants labels
    if cond and not dataset.has_labels and asked_for:
        raise UserError(
            f"--cond=1, but {options.data} has no labels: use --cond=0, or make it again from labelled images"
        )
    if stage is not None:
        check_compatible(
            stage.teacher.net, dataset.resolution, dataset.num_channels, dataset.label_dim, str(options.transfer)
        )
        _check_architecture(options, stage.teacher.net)
    config = _config(options, dataset, stage, teacher)
    arch = _arch_name(config.network_kwargs)
    name = describe_run(
        dataset.name, cond, arch, options.precond, dist.get_world_size(), config.batch_size, config.precision
    )
    config.run_dir = options.outdir if options.nosubdir else _numbered(options.outdir, name, options.desc)
    check_run_dir(config.run_dir, make=False)
    meta_network(config, dataset)  # refuses what can't be made
    config.seed = _seed(options, config.run_dir)
    dist.check_agreement({"the run's directory": config.run_dir, **_named(config.identity())})
    return Run(config, dataset, stage, teacher, arch, options.precond)


def _named(identity: Kwargs) -> Kwargs:
    """An identity, for comparing processes."""
    return {f"'{name}' of the run (training_options.json)": value for name, value in identity.items()}


def load_everywhere(source: str, trust: bool = False) -> NetworkFile:
    """`load_network` on every process, with one download."""
    return dist.rank0_first(lambda: load_network(source, trust_network_code=trust))


def _config(
    options: Options, dataset: ImageFolderDataset, stage: Stage | None, transfer: NetworkFile | None
) -> TrainConfig:
    distils = stage is not None
    precision = "fp16" if options.fp16 else options.precision or "fp32"
    augment = options.augment if options.augment is not None else (0.0 if distils else 0.12)
    dropout = options.dropout if options.dropout is not None else (0.0 if distils else 0.13)
    duration = options.duration if options.duration is not None else (20.0 if distils else 200.0)
    warmup = options.warmup if options.warmup is not None else (0.0 if distils else 10.0)
    if stage is not None:
        network_kwargs, loss_kwargs = _student_kwargs(stage, dropout, precision, options)
        if augment and not network_kwargs.get("augment_dim"):
            raise UsageError(
                "--augment: this teacher takes no augmentation labels, so its student can't be told what was done"
            )
    else:
        network_kwargs, loss_kwargs = _fresh_kwargs(options, dropout, augment > 0, precision)
    total_kimg = max(int(duration * 1000), 1)
    return TrainConfig(
        run_dir=options.outdir,
        dataset_kwargs={
            "path": options.data,
            "use_labels": dataset.has_labels,
            "xflip": options.xflip,
            "cache": options.cache,
            "resolution": dataset.resolution,
            "max_size": len(dataset),
        },
        network_kwargs=network_kwargs,
        loss_kwargs=loss_kwargs,
        augment_kwargs={"p": augment, **AUGMENTATION} if augment > 0 else None,
        total_kimg=total_kimg,
        batch_size=options.batch,
        batch_gpu=options.batch_gpu,
        lr=options.lr if options.lr is not None else (5e-4 if distils else 10e-4),
        lr_rampup_kimg=warmup * 1000,
        lr_decay=options.lr_decay or ("linear" if distils else "none"),
        loss_scaling=options.ls,
        ema_halflife_kimg=int(options.ema * 1000)
        if options.ema * 1000 == int(options.ema * 1000)
        else options.ema * 1000,
        ema_rampup_ratio=None if options.transfer and not distils else 0.05,
        ema_std=options.ema_std,
        clip=options.clip,
        precision=precision,
        compile=options.compile,
        cudnn_benchmark=options.bench,
        deterministic=options.deterministic,
        workers=options.workers,
        kimg_per_tick=options.tick,
        snapshot_ticks=options.snap,
        state_dump_ticks=options.dump,
        targets_ticks=options.targets,
        save_every_min=options.save_every,
        tensorboard=options.tensorboard,
        wandb=options.wandb,
        transfer=options.transfer,
        transfer_sha256=transfer.sha256 if transfer else None,
        distillation=describe_distillation(stage) if stage else None,
        trust_network_code=options.trust_network_code,
        extras={"data_fingerprint": fingerprint(options.data), "command_line": given(options)},
    )


def describe_distillation(stage: Stage) -> Kwargs:
    """A stage as `training_options.json` and a state tell it."""
    return {
        "num_steps": stage.grid.steps,
        "ratio": stage.ratio,
        "teacher_solver": stage.solver,
        "self_teacher": stage.self_teacher,
        "teacher_levels": list(stage.grid.levels),
        "lineage": [dict(entry) for entry in stage.sampling.lineage],
    }


def _fresh_kwargs(options: Options, dropout: float, augment: bool, precision: str) -> tuple[Kwargs, Kwargs]:
    precond, loss = PRECONDS[options.precond]
    network: Kwargs = dict(ARCHITECTURES[options.arch or "ddpmpp"])
    network["class_name"] = f"training.networks.{precond}"
    if options.cbase is not None:
        network["model_channels"] = options.cbase
    if options.cres is not None:
        network["channel_mult"] = list(options.cres)
    if options.blocks is not None:
        network["num_blocks"] = options.blocks
    if augment:
        network["augment_dim"] = 9
    network |= {"dropout": dropout, "use_fp16": precision == "fp16"}
    loss_kwargs: Kwargs = {"class_name": f"training.loss.{loss}"}
    if options.sigma_data is not None:
        network["sigma_data"] = loss_kwargs["sigma_data"] = options.sigma_data
    loss_kwargs |= {"P_mean": options.p_mean} if options.p_mean is not None else {}
    loss_kwargs |= {"P_std": options.p_std} if options.p_std is not None else {}
    return network, loss_kwargs


def _student_kwargs(stage: Stage, dropout: float, precision: str, options: Options) -> tuple[Kwargs, Kwargs]:
    net = stage.teacher.net
    network = {name: value for name, value in dict(net.init_kwargs).items() if name not in INTERFACE}
    network |= {
        "class_name": f"training.networks.{type(net).__name__}",
        "dropout": dropout,
        "use_fp16": precision == "fp16",
    }
    loss_kwargs = {
        "class_name": "training.loss.EDMDistillationLoss",
        "num_steps": stage.grid.steps,
        "ratio": stage.ratio,
        "teacher_solver": stage.solver,
        "weighting": options.weighting,
        "intervals": options.intervals or "loss",
    }
    return network, loss_kwargs


def _arch_name(network_kwargs: Kwargs) -> str:
    kind = network_kwargs.get("model_type", "SongUNet")
    if kind == "SongUNet":
        return "ncsnpp" if network_kwargs.get("embedding_type") == "fourier" else "ddpmpp"
    return next(name for name, usual in ARCHITECTURES.items() if usual["model_type"] == kind)


def _check_architecture(options: Options, net: Any) -> None:
    """The student has its teacher's architecture; an option that says otherwise is an error."""
    given = dict(net.init_kwargs)
    arch = _arch_name(given)
    defaults = ARCHITECTURES[arch]
    wrong = []
    if options.arch not in (None, arch):
        wrong.append(f"--arch={options.arch} (the teacher's is {arch})")
    channels = given.get("model_channels", defaults["model_channels"])
    if options.cbase not in (None, channels):
        wrong.append(f"--cbase={options.cbase} (the teacher's is {channels})")
    mult = given.get("channel_mult", [1, 2, 2, 2] if arch != "adm" else [1, 2, 3, 4])
    if options.cres is not None and list(options.cres) != list(mult):
        wrong.append(f"--cres={','.join(map(str, options.cres))} (the teacher's is {','.join(map(str, mult))})")
    blocks = given.get("num_blocks", 3 if arch == "adm" else 4)
    if options.blocks not in (None, blocks):
        wrong.append(f"--blocks={options.blocks} (the teacher's is {blocks})")
    if wrong:
        raise UsageError(
            f"a student has its teacher's architecture, which contradicts {', '.join(wrong)}; leave it out"
        )


def fingerprint(path: str) -> str:
    """SHA-256 over the names, sizes and (in a zip) checksums of a data set's files: tells data sets apart, quickly."""
    digest = hashlib.sha256()
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        rows = [(file.relative_to(path).as_posix(), file.stat().st_size, 0) for file in files]
    else:
        with zipfile.ZipFile(path) as archive:
            rows = sorted((entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist())
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Run directory, seed, going on


def _numbered(outdir: str, name: str, desc: str | None) -> str:
    name = f"{name}-{desc}" if desc else name
    return str(Path(outdir, f"{dist.broadcast_object(next_run_number(outdir)):05d}-{name}"))


def _seed(options: Options, run_dir: str) -> int:
    """The seed asked for, or the one of the run to go on with, or a random one (the same on every process)."""
    if options.seed is not None:
        return options.seed
    seed = int(torch.seed() % 2**31)
    if options.nosubdir:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no run to go on with
            seed = int(json.loads(Path(run_dir, "training_options.json").read_text(encoding="utf-8"))["seed"])
    return int(dist.broadcast_object(seed))


def find_state(options: Options, run: Run) -> tuple[Path, Kwargs] | None:
    """The state to go on from, by `--resume` and `--nosubdir`; None for a fresh start.

    `--resume=latest` without `--nosubdir` looks for the newest numbered run of the same options, and takes its place.
    Raises UserError, naming the options, where going on, or starting afresh, would spoil a run of other options.
    """
    found = _find_state(options, run)
    position = found and {name: value for name, value in found[1]["position"].items() if name != "elapsed_sec"}
    dist.check_agreement({f"the state to go on from in {run.config.run_dir}": position})
    if found is not None:
        check_same_options(found[0], found[1]["options"], run.config)
    if found is None or found[0].resolve().parent != Path(run.config.run_dir).resolve():
        dist.from_rank0(lambda: _check_unused(run.config))
    return found


def _check_unused(config: TrainConfig) -> None:
    """Raises UserError where a fresh start would write over the snapshots of a run that had other options."""
    snapshots = {path.name for path in Path(config.run_dir).glob("network-snapshot-*.pkl")}
    if snapshots <= {"network-snapshot-000000.pkl"}:  # of a run that had hardly begun
        return
    try:
        options = json.loads(Path(config.run_dir, "training_options.json").read_text(encoding="utf-8"))
        earlier = dict(options["identity"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise UserError(
            f"{config.run_dir} holds snapshots of a run that can't be gone on with; use another --outdir"
        ) from exc
    check_same_options(config.run_dir, earlier, config)


def _find_state(options: Options, run: Run) -> tuple[Path, Kwargs] | None:
    config = run.config
    if options.resume not in (None, "latest"):
        path = Path(str(options.resume))
        saved = state.load_state(path)
        if options.seed is None:
            config.seed = saved["options"]["seed"]
        return path, saved
    if options.nosubdir:
        return state.load_newest(config.run_dir, dist.print0)
    if options.resume is None:
        return None
    suffix = Path(config.run_dir).name.partition("-")[2]
    folder = Path(options.outdir)
    runs = [path for path in folder.iterdir() if re.fullmatch(r"\d+-.*", path.name)] if folder.is_dir() else []
    for path in sorted(runs, key=lambda p: int(p.name.partition("-")[0]), reverse=True):
        found = state.load_newest(path, dist.print0) if path.name.partition("-")[2] == suffix else None
        if found is None:
            continue
        seed = config.seed
        config.seed = found[1]["options"]["seed"] if options.seed is None else seed
        if not differences(found[1]["options"], json.loads(json.dumps(config.identity()))):
            config.run_dir = str(path)
            return found
        config.seed = seed
    raise UserError(f"--resume=latest: {options.outdir} has no run of these options with a state; start without it")


def train(options: Options, run: Run, trainer_class: type[Trainer] = Trainer) -> Path:
    """Runs what `prepare` returned, going on where there is a state, and returns the path of the final snapshot."""
    found = find_state(options, run)
    dist.from_rank0(lambda: check_disk(run))
    with contextlib.ExitStack() as stack:
        dist.from_rank0(lambda: stack.enter_context(locked(run.config.run_dir)))
        return _train(run, found, trainer_class)


def _train(run: Run, found: tuple[Path, Kwargs] | None, trainer_class: type[Trainer]) -> Path:
    config = run.config
    if dist.is_main():
        check_run_dir(config.run_dir)
        if found is None:
            Path(config.run_dir, "stats.jsonl").unlink(missing_ok=True)
        written = {**config.to_options(), "identity": config.identity(), "environment": describe_environment()}
        write_text(Path(config.run_dir, "training_options.json"), json.dumps(written, indent=2) + "\n")
        if found is None:
            run.announce(lambda line: append_text(Path(config.run_dir, "log.txt"), line + "\n"))
    dist.barrier()
    trainer = trainer_class(config, run.dataset, run.stage, run.transfer)
    if found is not None:
        trainer.load_state(*found)
    return trainer.run()


# ---------------------------------------------------------------------------------------------------------------------
# What a run will cost


@dataclass
class Cost:
    """Parameters; FLOPs of one network call for one image (a multiply-add is 2); bytes kept for the backward pass."""

    parameters: int
    flops: int
    activation_bytes: int


def network_cost(config: TrainConfig, dataset: ImageFolderDataset) -> Cost:
    """Counted on torch's meta device: nothing is computed or allocated."""
    from torch.utils.flop_counter import FlopCounterMode

    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() if not isinstance(tensor, torch.nn.Parameter) else 0
        return tensor

    with torch.device("meta"):
        net = meta_network(config, dataset)
        images = torch.zeros(1, *dataset.image_shape)
        labels = torch.zeros(1, dataset.label_dim) if dataset.label_dim else None
        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(images, torch.ones(1), labels)
    return Cost(sum(p.numel() for p in net.parameters()), counter.get_total_flops(), kept)


def meta_network(config: TrainConfig, dataset: ImageFolderDataset) -> Any:
    """The network of a run without its weights. Raises UserError for one that can't be made."""
    own = ("sigma_data", "sigma_min", "sigma_max", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2")
    model = {name: value for name, value in config.network_kwargs.items() if name not in own}
    model["class_name"] = "EDMPrecond"  # the others compute numbers when they are made, which the meta device can't
    with torch.device("meta"):
        return build_network(model, dataset.resolution, dataset.num_channels, dataset.label_dim)


def describe_cost(run: Run) -> list[str]:
    """Lines for `--dry-run`, beyond those of every start: parameters, FLOPs per image and of the run, memory."""
    config, cost, per_image = run.config, run.cost, run.flops_per_image
    size, _ = check_batch(config.batch_size, config.batch_gpu, dist.get_world_size())
    memory = fixed_memory(run) + cost.activation_bytes * size
    return [
        f"Parameters:              {cost.parameters / 1e6:.2f} M",
        f"FLOPs per network call:  {cost.flops / 1e9:.4g} GFLOP an image",
        f"FLOPs per image trained: {per_image / 1e9:.4g} GFLOP ({run.calls:g} calls' worth)",
        f"FLOPs of the run:        {per_image * config.total_nimg:.3g}",
        f"Memory with activations: about {gib(memory)} per process, of {size} images at fp32",
    ]


def describe_memory(run: Run) -> str:
    """What a process needs besides activations, in words."""
    need, free = fixed_memory(run), free_memory()
    parts = f"weights, gradients, Adam, EMA{', teacher' if run.stage else ''}"
    note = f": more than the {gib(free)} that are free, it will not run here" if need > free else ""
    return f"{gib(need)} for {parts}, and activations on top (see --dry-run){note}"


def fixed_memory(run: Run) -> int:
    """Bytes that do not depend on the batch: float32 weights, gradients, two averages of Adam's, EMA, teacher."""
    copies = 5 + (run.stage is not None)
    return copies * 4 * sum(p.numel() for p in meta_network(run.config, run.dataset).parameters())


def free_memory() -> int:
    """Bytes free on this process's GPU, or in the machine."""
    if dist.device().type == "cuda":
        return int(torch.cuda.mem_get_info(dist.device())[0])
    return int(psutil.virtual_memory().available)


@dataclass(frozen=True)
class DiskNeed:
    """What a run writes at most. Sizes in bytes; `pictures` are all of them together."""

    snapshots: int
    dumps: int
    snapshot_bytes: int
    state_bytes: int
    picture_bytes: int

    @property
    def total(self) -> int:
        """While the last state is written: the new one is whole before an old one goes."""
        states = self.dumps + state.KEPT_ROLLING + 1
        return self.snapshots * self.snapshot_bytes + states * self.state_bytes + self.picture_bytes

    @property
    def least(self) -> int:
        """A snapshot and two states: with less, a run can't save its first state and then a second one."""
        return self.snapshot_bytes + 2 * self.state_bytes

    def describe(self, run_dir: str) -> str:
        """In words, beside what is free there, and a warning where the run can't end."""
        text = (
            f"at most {gib(self.total)} ({self.snapshots} snapshots of {gib(self.snapshot_bytes)}; {self.dumps} dumps, "
            f"{state.KEPT_ROLLING} rolling states and one being written, of {gib(self.state_bytes)}), "
            f"{gib(free_disk(run_dir))} free"
        )
        if self.total - written_before(run_dir) > free_disk(run_dir):
            text += ". The disk may fill before the run ends: free some, or use a larger --snap or --dump"
        return text


def disk_need(config: TrainConfig, dataset: ImageFolderDataset) -> DiskNeed:
    """Counts what the rules of `Trainer` write in a run from its beginning."""
    parameters = list(meta_network(config, dataset).parameters())
    weights = 4 * sum(p.numel() for p in parameters)
    steps = math.ceil(config.total_nimg / config.batch_size)
    last_tick = math.ceil((steps - 1) / math.ceil(config.kimg_per_tick * 1000 / config.batch_size))  # the first is 0

    def times(ticks: int | None, first: int) -> int:
        """Ticks first ... last_tick that are multiples of `ticks`, and the last one; names tell thousands apart."""
        if ticks is None:
            return 0
        count = last_tick // ticks + 1 - first + (last_tick % ticks > 0 or last_tick < first)
        return min(count, config.total_kimg + 1)

    snapshots, sheets = times(config.snapshot_ticks, 0), times(config.targets_ticks, 0)
    image = math.prod(dataset.image_shape)  # of one byte a value, as a PNG has at most
    return DiskNeed(
        snapshots=snapshots,
        dumps=min(times(config.state_dump_ticks, 1), state.KEPT_DUMPS),
        snapshot_bytes=weights + OVERHEAD + 1024 * len(parameters),  # the classes' source, names and shapes
        state_bytes=4 * weights + OVERHEAD + 2048 * len(parameters),  # weights, EMA, two averages of Adam's
        picture_bytes=image * (snapshots * MAX_SAMPLES + sheets * MAX_ROWS * TARGET_COLUMNS),
    )


def check_disk(run: Run) -> None:
    """Raises UserError where a run that has nothing there yet can't even save a state and then a second one."""
    need, run_dir = disk_need(run.config, run.dataset), run.config.run_dir
    free = free_disk(run_dir)
    if need.least > free + written_before(run_dir):
        raise UserError(
            f"{run_dir}: the disk has {gib(free)} free, but a snapshot and two training states take {gib(need.least)}; "
            "free some space, or use an --outdir on another disk"
        )


def free_disk(place: str) -> int:
    """Bytes free for a user's files where a folder is, or is to be made."""
    folder = Path(place).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def written_before(run_dir: str) -> int:
    """Bytes that a run's snapshots, states and pictures take already."""
    kinds = ("network-snapshot-*.pkl", "training-state-*.pt", "samples-*.png", "targets-*.png")
    return sum(path.stat().st_size for kind in kinds for path in Path(run_dir).glob(kind))


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
