"""From the command line's values to a run: checks, defaults, run directory, the state to resume from."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dnnlib.atomic import append_text, locked, write_text
from dnnlib.cli import COMMAND_LINE_ONLY, UsageError, UserError, printable
from dnnlib.util import count, read_json
from formats import state
from formats.network_files import NetworkFile, check_storable, load_network
from torch_utils import distributed as dist
from torch_utils.environment import describe_environment
from training.config import (
    ARCHITECTURES,
    AUGMENTATION,
    AUTO,
    PRECONDS,
    Kwargs,
    check_run_dir,
    describe_run,
    next_run_number,
)
from training.dataset import ImageFolderDataset, PackedFiles
from training.distillation import EDMDistillationLoss, Stage, plan_stage
from training.recipe import Options, TrainConfig, entries, flag
from training.samplers import grid_sampler
from training.training_loop import Trainer, matching

from .costs import (
    Cost,
    check_disk,
    describe_absurdity,
    describe_memory,
    disk_need,
    divisors,
    largest_batch,
    meta_network,
    network_cost,
    training_calls,
)
from .loop import Log, Loop, check_same_options, other_options
from .options import check_options, given

STRANGE_KIMG = 5_000_000  # twice EDM's longest run
FEW_IMAGES = 1000
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
    def meta(self) -> torch.nn.Module:
        """The network, without memory for its weights."""
        return meta_network(self.config, self.dataset, self.stage)

    @cached_property
    def cost(self) -> Cost:
        """Of one network call."""
        return network_cost(self.config, self.dataset, self.stage)

    @property
    def calls(self) -> float:
        """What training on an image costs, in network calls forward."""
        stage = self.stage
        return training_calls(stage.solver, stage.ratio, stage.self_teacher) if stage else training_calls(None)

    @property
    def flops_per_image(self) -> float:
        """Of training, teacher included."""
        return self.calls * self.cost.flops

    def announce(self, say: Callable[[str], None] = dist.print0) -> None:
        """What will happen, in a few lines."""
        config, dataset = self.config, self.dataset
        say(f"Output directory:        {config.run_dir}")
        images = count(len(dataset), "image")
        say(f"Dataset:                 {config.dataset_kwargs['path']}, {images} {dataset.image_shape}")
        say(f"Class-conditional:       {dataset.has_labels}")
        say(f"Network architecture:    {self.arch}, preconditioning {config.network_kwargs['class_name']}")
        if self.stage is not None:
            teacher = self.stage.teacher
            say(f"Teacher:                 {teacher.source} (sha256 {teacher.sha256[:16]})")
            say(f"                         {teacher.describe()}")
            say(f"Distillation:            {self.stage.describe()}")
            dropout = "as in the teacher" if teacher.own_code else f"{config.dropout:g}"
            say(
                f"Distillation's settings: weighting {config.weighting}, intervals "
                f"{config.intervals}, lr {config.lr:g}, decay {config.lr_decay}, dropout {dropout}, "
                f"augmentation {config.augment:g}"
            )
            if dataset.has_label_vectors and not teacher.has_label_vectors:
                say(
                    "Note: the data have label vectors; the teacher's file does not record that it was trained with any"
                )
            if teacher.own_code:
                say(
                    "Note: the student is a copy of this teacher and carries its source text on, so all that load it "
                    "need --trust-network-code"
                )
        elif self.transfer is not None:
            say(f"Weights from:            {self.transfer.source} (sha256 {self.transfer.sha256[:16]})")
            say(f"                         {self.transfer.describe()}")
            fit, total = len(matching(self.transfer.net, self.meta)), len(self.meta.state_dict())
            say(f"                         {fit} of its tensors fit this network, which has {total}")
            if fit < total:
                start = f"{count(total - fit, 'tensor')} start{'s' * (total - fit == 1)}"
                say(
                    f"Warning: {start} at random. Is the network meant to be another than that of "
                    "the file? (--arch, --cbase, --cres, --blocks, --cond; --precond=edm_distillation takes the file's)"
                )
        say(f"Processes:               {dist.get_world_size()} on {dist.device().type}")
        say(f"Batch size:              {config.batch}, for {config.total_nimg / 1000:g} kimg")
        say(
            f"Work:                    {self.flops_per_image * config.total_nimg:.3g} FLOP, "
            f"{self.flops_per_image / 1e9:.4g} GFLOP an image ({self.calls:g} network calls' worth)"
        )
        teachers = f", teacher {config.teacher_precision}" if self.stage is not None else ""
        say(f"Precision:               {config.precision}{teachers}")
        say(f"Memory per process:      {describe_memory(self)}")
        say(f"Disk:                    {disk_need(config, dataset, self.stage).describe(config.run_dir)}")
        if abs(config.duration * 1000 - config.total_kimg) > 1e-6:
            say(f"Note: --duration={config.duration:g}, in whole thousands of images, is {config.total_kimg} kimg")
        if config.total_kimg >= STRANGE_KIMG:
            say(f"Note: that is {config.total_nimg:.3g} images: --duration is in millions (EDM's longest run: 2500)")
        for note in dataset.notes:
            say(f"Note: {printable(note)}")
        if len(dataset) < FEW_IMAGES:
            say(f"Note: {count(len(dataset), 'image')} are few, and easily memorised (docs/your-own-data.md)")
        if (absurd := describe_absurdity(self)) is not None:
            say(absurd)
        if config.precision == "fp16" and dist.device().type != "cuda":
            say(f"Note: fp16 is for CUDA; on {dist.device().type} the network computes in fp32")
        if config.tick * 1000 >= config.total_nimg > config.batch:
            tick = f"{config.tick:g}"
            say(f"Note: the run is no longer than a tick of {tick} kimg (--tick), so nothing is printed before its end")
        if config.batch > config.total_nimg:
            say(f"Note: the run is a single step: --batch={config.batch} is more than its images")
        if config.lr_rampup_kimg >= config.total_nimg / 1000:
            say(f"Note: the run ends within its --warmup ({config.warmup:g} Mimg), far below --lr")
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
        if teacher.own_code:
            _check_foreign(options, stage)
    elif teacher is not None and teacher.sampling is not None:
        raise UsageError(
            f"--transfer={teacher.source} is a distilled network; only --precond=edm_distillation takes those"
        )
    _check_apart(options)
    cond = bool(options.cond) if options.cond is not None or stage is None else stage.teacher.net.label_dim > 0
    dataset = ImageFolderDataset(options.data, use_labels=cond, xflip=options.xflip, cache=options.cache)
    if stage is not None and options.cond is False and stage.teacher.net.label_dim > 0:
        classes = count(stage.teacher.net.label_dim, "class")
        raise UserError(f"--cond=0, but {stage.teacher.source} has {classes}, and so has its student; leave it out")
    asked_for = stage is None or stage.teacher.net.label_dim == 0  # otherwise it is the teacher that wants labels
    if cond and not dataset.has_labels and asked_for:
        raise UserError(
            f"--cond=1, but {options.data} has no labels: use --cond=0, or make it again from labelled images"
        )
    if stage is not None:
        check_compatible(
            stage.teacher.net, dataset.resolution, dataset.num_channels, dataset.label_dim, stage.teacher.source
        )
        if stage.teacher.has_label_vectors and not dataset.has_label_vectors:
            raise UserError(
                f"{stage.teacher.source} was trained with label vectors, and {options.data} has classes; use the "
                "teacher's own data set"
            )
        if not stage.teacher.own_code:
            _check_architecture(options, stage.teacher.net)
    config = _config(options, dataset, stage, teacher)
    arch = "foreign" if stage is not None and stage.teacher.own_code else _arch_name(config.network_kwargs)
    name = describe_run(
        dataset.name, cond, arch, options.precond, dist.get_world_size(), config.batch, config.precision
    )
    config.run_dir = options.outdir if options.nosubdir else _numbered(options.outdir, name, options.desc)
    check_run_dir(config.run_dir, make=False)
    net = meta_network(config, dataset, stage)  # refuses what can't be made
    if stage is None and teacher is not None and not matching(teacher.net, net):
        raise UserError(
            "--transfer: no tensor of that network fits this one in name and shape; check --arch and --cbase"
        )
    config.seed = _seed(options, config.run_dir)
    dist.check_agreement({"the run's directory": config.run_dir, **_named(config.identity())})
    return Run(config, dataset, stage, teacher, arch, options.precond)


def _named(identity: Kwargs) -> Kwargs:
    """An identity, for comparing processes."""
    return {f"'{name}' of the run (training_options.json)": value for name, value in identity.items()}


def _check_apart(options: Options) -> None:
    """A run's pictures must not become part of its data."""
    if Path(options.data).is_dir() and Path(options.outdir).resolve().is_relative_to(Path(options.data).resolve()):
        raise UsageError(
            f"--outdir={options.outdir} lies in --data={options.data}: the run's pictures would become part of the "
            "data; use a folder elsewhere, or make a zip of the images (dataset_tool.py)"
        )


def load_everywhere(source: str, trust: bool = False) -> NetworkFile:
    """`load_network` on every process, with one download."""
    return dist.rank0_first(lambda: load_network(source, trust_network_code=trust))


def _config(
    options: Options, dataset: ImageFolderDataset, stage: Stage | None, transfer: NetworkFile | None
) -> TrainConfig:
    filled = options.filled()
    network_kwargs, loss_kwargs = _fresh_kwargs(filled) if stage is None else _student_kwargs(stage, filled)
    if stage is not None and filled.augment and not network_kwargs.get("augment_dim"):
        raise UsageError(
            "--augment: this teacher takes no augmentation labels, so its student can't be told what was done"
        )
    return TrainConfig(
        **{**vars(filled), "cond": dataset.has_labels, "transfer": transfer and transfer.source},
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
        augment_kwargs={"p": filled.augment, **AUGMENTATION} if filled.augment else None,
        ema_rampup_ratio=None if options.transfer and stage is None else 0.05,
        transfer_sha256=transfer.sha256 if transfer else None,
        distillation=describe_distillation(stage) if stage else None,
        data_fingerprint=fingerprint(options.data),
        command_line={k: v for k, v in given(options).items() if k not in COMMAND_LINE_ONLY},
    )


def _check_foreign(options: Options, stage: Stage) -> None:
    """Tries out a teacher of foreign code: training its copy, an image, a snapshot. Raises UsageError or UserError."""
    net, name = stage.teacher.net, printable(type(stage.teacher.net).__name__, 100)
    fixed = [each.name for each in entries(Options) if each.place.startswith(("network_kwargs.", "augment_kwargs."))]
    fixed += ["arch", "precision", "teacher_precision", "recompute"]
    if wrong := [flag(each) for each in fixed if getattr(options, each) not in (getattr(Options, each), 0, "fp32")]:
        raise UsageError(f"{', '.join(wrong)}: a network of foreign code ({name}) is trained as it is; leave it out")
    try:
        student, images = copy.deepcopy(net), torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution)
        student.train().requires_grad_(True)
        labels = torch.zeros(1, net.label_dim) if net.label_dim else None
        loss = EDMDistillationLoss(net, stage.grid, stage.ratio, stage.solver)(student, images, labels)
        loss.sum().backward()
        with torch.no_grad():
            grid_sampler(net, images, (stage.grid.levels[0], 0.0), class_labels=labels)
        check_storable(stage.teacher)
    except (Exception, SystemExit) as exc:  # foreign code can raise anything
        reason = f"{type(exc).__name__}: {printable(exc, 300)}"
        raise UserError(f"{stage.teacher.source}: its network of class {name} can't be distilled: {reason}") from exc


def check_compatible(net: Any, resolution: int, channels: int, label_dim: int, source: str) -> None:
    """Refuses a data set that a teacher was not made for. Raises UserError."""
    if net.img_resolution != resolution or net.img_channels != channels:
        raise UserError(
            f"{source} makes images of {net.img_resolution}x{net.img_resolution} with "
            f"{count(net.img_channels, 'channel')}, the data set has {resolution}x{resolution} with {channels}; "
            "use the teacher's own data set"
        )
    if net.label_dim != label_dim:
        if net.label_dim == 0:
            raise UserError(f"{source} knows no classes; use --cond=0")
        if label_dim == 0:
            raise UserError(f"{source} has {count(net.label_dim, 'class')}, and the data set has no labels")
        raise UserError(
            f"{source} has {count(net.label_dim, 'class')}, the data set has {label_dim}; use the teacher's own"
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


def _fresh_kwargs(options: Options) -> tuple[Kwargs, Kwargs]:
    """Settings of network and loss for training from scratch."""
    precond, loss = PRECONDS[options.precond]
    network = {**ARCHITECTURES[options.arch or "ddpmpp"], "class_name": f"training.networks.{precond}"}
    network |= options.within("network_kwargs") | {"use_fp16": options.precision == "fp16"}
    loss_kwargs = {"class_name": f"training.loss.{loss}", **options.within("loss_kwargs")}
    if options.augment:
        network["augment_dim"] = 9
    if options.sigma_data is not None:
        network["sigma_data"] = options.sigma_data
    return network, loss_kwargs


def _student_kwargs(stage: Stage, options: Options) -> tuple[Kwargs, Kwargs]:
    """Settings of network and loss of a student: its teacher's network, which may be of foreign code."""
    net = stage.teacher.net
    network: Kwargs = {"class_name": printable(type(net).__name__, 100)}
    if not stage.teacher.own_code:
        network = {name: value for name, value in dict(net.init_kwargs).items() if name not in INTERFACE}
        network |= {
            "class_name": f"training.networks.{type(net).__name__}",
            "dropout": options.dropout,
            "use_fp16": options.precision == "fp16",
        }
    loss_kwargs = {
        "class_name": "training.loss.EDMDistillationLoss",
        "num_steps": stage.grid.steps,
        "ratio": stage.ratio,
        "teacher_solver": stage.solver,
        **options.within("loss_kwargs"),
    }
    return network, loss_kwargs


def _arch_name(network_kwargs: Kwargs) -> str:
    kind = network_kwargs.get("model_type", "SongUNet")
    if kind == "SongUNet":
        return "ncsnpp" if network_kwargs.get("embedding_type") == "fourier" else "ddpmpp"
    return next(name for name, usual in ARCHITECTURES.items() if usual["model_type"] == kind)


def _check_architecture(options: Options, net: Any) -> None:
    """The student has its teacher's architecture. Raises UsageError for options that ask for another."""
    kwargs = dict(net.init_kwargs)
    arch = _arch_name(kwargs)
    teachers = {
        "arch": arch,
        "cbase": kwargs.get("model_channels", ARCHITECTURES[arch]["model_channels"]),
        "cres": list(kwargs.get("channel_mult", [1, 2, 3, 4] if arch == "adm" else [1, 2, 2, 2])),
        "blocks": kwargs.get("num_blocks", 3 if arch == "adm" else 4),
    }
    wrong = [
        f"{flag(name)}={_listed(getattr(options, name))} (the teacher's is {_listed(value)})"
        for name, value in teachers.items()
        if getattr(options, name) not in (None, value)
    ]
    if wrong:
        raise UsageError(
            f"a student has its teacher's architecture, which contradicts {', '.join(wrong)}; leave it out"
        )


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def fingerprint(path: str) -> str:
    """SHA-256 over the names, sizes and (in a zip) checksums of a data set's files: tells data sets apart, quickly."""
    digest = hashlib.sha256()
    if Path(path).is_dir():
        files = PackedFiles(path)  # those that are read: links are followed, hidden ones left out
        names = sorted((files.root + name for name in files.names), key=lambda name: Path(name).parts)
        rows = [(name, file.stat().st_size, 0) for name in names if (file := Path(path, name)).is_file()]
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
        earlier = read_json(Path(run_dir, "training_options.json")).get("seed")  # of a run to go on with
        seed = earlier if isinstance(earlier, int) and earlier >= 0 else seed
    return int(dist.broadcast_object(seed))


def find_state(options: Options, run: Run) -> tuple[Path, Kwargs] | None:
    """The state to go on from, by `--resume` and `--nosubdir`; None for a fresh start.

    `--resume=latest` without `--nosubdir` looks for the newest numbered run of the same options, and takes its place.
    Raises UserError, naming the options, where going on, or starting afresh, would spoil a run of other options.
    """
    found = _find_state(options, run)
    position = found and {name: value for name, value in found[1]["position"].items() if name != "elapsed_sec"}
    dist.check_agreement({f"the state to resume from in {run.config.run_dir}": position})
    if found is not None:
        check_same_options(found[0], found[1]["options"], run.config)
    elif options.nosubdir and Path(run.config.run_dir, "log.txt").is_file():
        dist.print0(
            f"{run.config.run_dir} has no training state to resume from yet: this run starts from the beginning"
        )
    if found is None or found[0].resolve().parent != Path(run.config.run_dir).resolve():
        dist.from_rank0(lambda: _check_unused(run.config))
    return found


def _check_unused(config: TrainConfig) -> None:
    """Raises UserError where a fresh start would write over the snapshots of a run that had other options."""
    snapshots = {path.name for path in Path(config.run_dir).glob("network-snapshot-*.pkl")}
    if snapshots <= {"network-snapshot-000000.pkl"}:  # of a run that had hardly begun
        return
    earlier = _identity_of(Path(config.run_dir))
    if not earlier:
        raise UserError(f"{config.run_dir} holds snapshots of a run that can't be gone on with; use another --outdir")
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
    title = _without_processes(config.run_dir)
    folder = Path(options.outdir)
    runs = [path for path in folder.iterdir() if re.fullmatch(r"\d+-.*", path.name)] if folder.is_dir() else []
    nearest = ""
    runs.sort(key=lambda path: int(path.name.partition("-")[0]), reverse=True)
    for path in runs:
        found = state.load_newest(path, dist.print0) if _without_processes(path) == title else None
        if found is None:
            continue
        seed = config.seed
        config.seed = found[1]["options"]["seed"] if options.seed is None else seed
        wrong = other_options(found[1]["options"], config)
        if not wrong:
            config.run_dir = str(path)
            return found
        config.seed = seed
        nearest = nearest or f"; the newest with one, {path.name}, has other options: {'; '.join(wrong)}"
    newest = next((path for path in runs if state.list_states(path)), None)
    if newest is not None and not nearest:
        identity = _identity_of(newest)
        if options.seed is None:
            config.seed = identity.get("seed", config.seed)
        wrong = other_options(identity, config) if identity else []
        nearest = f"; the newest with one, {newest.name}, has other options: {'; '.join(wrong) or '--desc or the like'}"
    raise UserError(
        f"--resume=latest: {options.outdir} has no run of these options with a state{nearest}. "
        f"{'Use those' if nearest else 'Name a state'}, or leave --resume out, which begins another run"
    )


def _identity_of(run_dir: Path) -> Kwargs:
    """What an earlier run says of itself; empty where it can't be read."""
    identity = read_json(run_dir / "training_options.json").get("identity")
    return identity if isinstance(identity, dict) else {}


def _without_processes(run_dir: str | Path) -> str:
    """A numbered run directory's name, but for number and processes: a run may go on with more or fewer of them."""
    return re.sub(r"-gpus\d+-", "-", Path(run_dir).name.partition("-")[2])


def train(options: Options, run: Run, tell: Callable[[], None] | None = None) -> Path:
    """Runs what `prepare` returned, going on where there is a state, and returns the path of the final snapshot.

    tell: called once it is certain where the run goes on, and so which directory is its own; nothing is written yet.
    """
    found = find_state(options, run)
    if tell is not None:
        tell()
    dist.from_rank0(lambda: check_disk(run))
    with contextlib.ExitStack() as stack:
        dist.from_rank0(lambda: stack.enter_context(locked(run.config.run_dir)))
        loop = _loop(run, found)
        del found  # as large as all that the trainer holds, which has copied it
        return loop.run()


def _loop(run: Run, found: tuple[Path, Kwargs] | None) -> Loop:
    """The loop of a run, at the state to resume from, with its directory made and its options written."""
    config = run.config
    if config.batch_gpu == AUTO:
        config.batch_gpu = _batch_gpu(run, found and found[1])
    if dist.is_main():
        check_run_dir(config.run_dir)
        if found is None:
            Path(config.run_dir, "stats.jsonl").unlink(missing_ok=True)
        written = {**config.to_options(), "identity": config.identity(), "environment": describe_environment()}
        write_text(Path(config.run_dir, "training_options.json"), json.dumps(written, indent=2) + "\n")
        if found is None:
            run.announce(lambda line: append_text(Path(config.run_dir, "log.txt"), line + "\n"))
    dist.barrier()
    log = Log(Path(config.run_dir, "log.txt"))
    loop = Loop(Trainer(config, run.dataset, run.stage, run.transfer, log), log)
    if found is not None:
        loop.load_state(*found)
    return loop


def _batch_gpu(run: Run, saved: Kwargs | None) -> int:
    """--batch-gpu=auto: what a run that goes on had, so that its sums round as before, or what fits."""
    here = {"world_size": dist.get_world_size(), "device": dist.device().type}
    if saved is not None and all(saved[name] == value for name, value in here.items()):
        size = saved.get("batch_gpu", 0)
        if size in divisors(run):
            return int(size)
    size = largest_batch(run)
    dist.print0(f"--batch-gpu=auto: {count(size, 'image')} at once in each process")
    return size
