"""From the command line's values to a run: checks, defaults, run directory, the state to resume from."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import os
import platform
import re
import shlex
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dnnlib.atomic import locked, write_text
from dnnlib.cli import COMMAND_LINE_ONLY, UsageError, UserError, printable, public_url
from dnnlib.util import count, read_json
from dnnlib.version import git_revision
from formats import state
from formats.network_files import NetworkFile, check_storable, load_network
from torch_utils import distributed as dist
from training.config import AUGMENTATION, AUTO, Kwargs, check_run_dir, next_run_number
from training.dataset import ImageFolderDataset, PackedFiles
from training.distillation import EDMDistillationLoss, Stage, plan_stage
from training.grids import NoiseGrid
from training.measured_grid import IMAGES, fine_grid, listed_grid, made_by
from training.networks import UNETS
from training.recipe import Options, TrainConfig, entries, flag
from training.samplers import grid_sampler
from training.sampling import measure_grid
from training.steps import check_steps, steps_down
from training.training_loop import Trainer, matching

from . import costs
from .loop import Log, Loop, check_same_options
from .options import check_options, given, named_differences

FEW_IMAGES = 1000
GRID_FILE = "noise-grid.json"  # the levels of a measured grid, and how they were measured
INTERFACE = ("img_resolution", "img_channels", "label_dim")  # network arguments that the data dictates


@dataclass
class Run:
    """Everything that a Trainer needs, and the lines that describe it."""

    config: TrainConfig
    dataset: ImageFolderDataset
    stage: Stage | None
    transfer: NetworkFile | None
    arch: str

    @cached_property
    def cost(self) -> costs.Cost:
        """Of one network call."""
        return costs.network_cost(self)

    @cached_property
    def meta(self) -> torch.nn.Module:
        """The network, without memory for its weights."""
        return costs.meta_network(self)

    @property
    def calls(self) -> float:
        """What training on an image costs, in network calls forward."""
        stage = self.stage
        return costs.training_calls(*((stage.solver, stage.ratio, stage.self_teacher) if stage else (None,)))

    @property
    def flops_per_image(self) -> float:
        """Of training, teacher included."""
        return self.calls * self.cost.flops

    def announce(self, log: Callable[[str], None] = dist.print0) -> None:
        """What will happen, in a few lines; one without a heading belongs to the one above."""
        config, dataset, stage, transfer = self.config, self.dataset, self.stage, self.transfer
        rows: dict[str, object] = {
            "Output directory:": config.run_dir,
            "Dataset:": f"{config.dataset_kwargs['path']}, {count(len(dataset), 'image')} {dataset.image_shape}",
            "Class-conditional:": dataset.has_labels,
            "Network architecture:": f"{self.arch}, preconditioning {config.network_kwargs['class_name']}",
        }
        if transfer is not None:
            heading = "Teacher:" if stage else "Weights from:"
            rows |= {heading: f"{transfer.source} (sha256 {transfer.sha256[:16]})", "": transfer.describe()}
        if stage is not None:
            dropout = "as in the teacher" if stage.teacher.foreign_code else f"{config.dropout:g}"
            rows["Distillation:"] = stage.describe()
            rows["Distillation's settings:"] = (
                f"weighting {config.weighting}, intervals {config.intervals}, lr {config.lr:g}, decay "
                f"{config.lr_decay}, dropout {dropout}, augmentation {config.augment:g}"
            )
        elif transfer is not None:
            fit = len(matching(transfer.net, self.meta))
            rows["Fit:"] = f"{fit} of its tensors fit this network, which has {len(self.meta.state_dict())}"
        flops = f"{self.flops_per_image * config.total_nimg:.3g} FLOP, {self.flops_per_image / 1e9:.4g} GFLOP an image"
        rows |= {
            "Processes:": f"{dist.get_world_size()} on {dist.device().type}",
            "Batch size:": f"{config.batch}, for {config.total_nimg / 1000:g} kimg",
            "Work:": f"{flops} ({self.calls:g} network calls' worth)",
            "Precision:": f"{config.precision}{f', teacher {config.teacher_precision}' if stage else ''}",
            "Memory per process:": costs.describe_memory(self),
            "Disk:": costs.describe_disk(self),
        }
        for heading, text in rows.items():
            log(f"{heading:<24} {text}")
        for note in self.notes():
            log(f"Note: {note}")
        log("")

    def notes(self) -> list[str]:
        """Remarks on what a user may not expect."""
        config, images, device = self.config, len(self.dataset), dist.device().type
        notes = [printable(note) for note in self.dataset.notes]
        if self.stage is not None and self.stage.teacher.foreign_code:
            carries = "the student is a copy of this teacher and carries its source text on, so all that load it need "
            notes.append(f"{carries}--trust-network-code")
        if images < FEW_IMAGES:
            notes.append(f"{count(images, 'image')} are few, and easily memorised (docs/your-own-data.md)")
        if config.precision == "fp16" and device != "cuda":
            notes.append(f"fp16 is for CUDA; on {device} the network computes in fp32")
        if config.lr_rampup_kimg >= config.total_kimg:
            notes.append(f"the run ends within its --warmup ({config.warmup:g} Mimg), far below --lr")
        return notes + costs.describe_absurdity(self)


def prepare(options: Options, grid: NoiseGrid | None = None) -> Run:
    """Checks the options against each other, the data and the teacher, and works out every default. Writes nothing.
    Raises UsageError or UserError with one helpful line. grid: of the teacher, where `teacher_grid` was called before.
    """
    check_options(options, dist.get_world_size())
    stage = None
    transfer = load_everywhere(options.transfer, options.trust_network_code) if options.transfer is not None else None
    if transfer is not None and not all(p.isfinite().all() for p in transfer.net.parameters()):
        raise UserError(f"{transfer.source}: some of its weights are NaN or infinite; take an earlier snapshot")
    if transfer is not None and options.distils:
        grid = grid or teacher_grid(options, transfer)
        stage = plan_stage(
            transfer, options.num_steps, options.ratio, options.teacher_solver, options.self_teacher, grid
        )
        check = _check_foreign if transfer.foreign_code else _check_architecture
        check(options, stage)
    elif transfer is not None and transfer.sampling is not None:
        raise UsageError(
            f"--transfer={transfer.source} is a distilled network; only --precond=edm_distillation takes those"
        )
    dataset = _open_data(options, stage)
    config = _config(options, dataset, stage, transfer)
    arch = "foreign" if stage is not None and stage.teacher.foreign_code else _arch_name(config.network_kwargs)
    if not options.nosubdir:  # EDM's description of a run
        name = f"{dist.broadcast_object(next_run_number(options.outdir)):05d}-{dataset.name}-"
        name += f"{'cond' if dataset.has_labels else 'uncond'}-{arch}-{options.precond}-gpus{dist.get_world_size()}-"
        name += f"batch{config.batch}-{config.precision}{f'-{options.desc}' if options.desc else ''}"
        config.run_dir = str(Path(options.outdir, name))
    check_run_dir(config.run_dir, make=False)
    run = Run(config, dataset, stage, transfer, arch)
    net = run.meta  # refuses what can't be made
    if stage is None and transfer is not None and not matching(transfer.net, net):
        raise UserError(
            "--transfer: no tensor of that network fits this one in name and shape; check --arch and --cbase"
        )
    config.seed = _seed(options, config.run_dir)
    facts = {f"'{name}' of the run (training_options.json)": value for name, value in config.identity().items()}
    dist.check_agreement({"the run's directory": config.run_dir, **facts})
    return run


def teacher_grid(options: Options, teacher: NetworkFile, chain: Sequence[int] = ()) -> NoiseGrid | None:
    """The noise grid that --grid names; None for EDM's. Raises UsageError or UserError.

    chain: the ladder's numbers of steps, default down to where --ratio no longer divides. A measured grid is read from
    the `noise-grid.json` of the run's own directory, if it was measured in the same way.
    """
    if options.grid == "edm":
        return None
    try:
        if options.grid != "measured":
            return listed_grid(teacher.net, options.grid)
        if options.num_steps is None or teacher.sampling is not None:
            wanted = "needs --num_steps" if teacher.sampling is None else "is for an undistilled teacher"
            raise ValueError(f"it {wanted}")
        check_steps(options.num_steps, options.ratio)
        how = made_by(chain or steps_down(options.num_steps, options.ratio), options.teacher_solver or "heun")
        known = read_json(Path(options.outdir, GRID_FILE)) if options.nosubdir and dist.is_main() else {}
        known = dist.broadcast_object(known)
        if (known.get("teacher"), known.get("measured")) == (teacher.sha256, how):
            levels, fine = known.get("levels"), fine_grid(teacher.net, options.num_steps).levels
            is_whole = isinstance(levels, list) and len(levels) == options.num_steps + 1
            if is_whole and all(level in fine for level in levels):
                return NoiseGrid(tuple(levels), how)
        dist.print0(f"Measuring the path of {teacher.source} for {IMAGES} latents (--grid=measured) ...")
        return dist.from_rank0(lambda: measure_grid(teacher, how["chain"], how["solver"], options.data))
    except ValueError as exc:
        raise UsageError(f"--grid={options.grid}: {exc}") from exc


def load_everywhere(source: str, trust: bool = False) -> NetworkFile:
    """`load_network` on every process, with one download."""
    return dist.rank0_first(lambda: load_network(source, trust_network_code=trust))


def _open_data(options: Options, stage: Stage | None) -> ImageFolderDataset:
    """The data set of a run. Raises UsageError or UserError for one that does not fit the options or the teacher."""
    if Path(options.data).is_dir() and Path(options.outdir).resolve().is_relative_to(Path(options.data).resolve()):
        raise UsageError(
            f"--outdir={options.outdir} lies in --data={options.data}: the run's pictures would become part of the "
            "data; use a folder elsewhere, or make a zip of the images (dataset_tool.py)"
        )
    classes = stage.teacher.net.label_dim if stage is not None else 0
    cond = classes > 0 if options.cond is None else options.cond
    if stage is not None and classes and not cond:
        has = count(classes, "class")
        raise UserError(f"--cond=0, but {stage.teacher.source} has {has}, and so has its student; leave it out")
    dataset = ImageFolderDataset(options.data, use_labels=cond, xflip=options.xflip, cache=options.cache)
    if cond and not dataset.has_labels and not classes:  # otherwise it is the teacher that wants labels
        raise UserError(f"--cond=1, but {options.data} has no labels: use --cond=0, or a data set with labels")
    if stage is not None:
        check_compatible(stage.teacher, dataset)
    return dataset


def check_compatible(teacher: NetworkFile, dataset: Any) -> None:
    """Refuses a data set that a teacher was not made for. Raises UserError."""
    net, source, own = teacher.net, teacher.source, "use the teacher's own data set"
    size, label_dim = dataset.resolution, dataset.label_dim
    if (net.img_resolution, net.img_channels) != (size, dataset.num_channels):
        raise UserError(
            f"{source} makes images of {net.img_resolution}x{net.img_resolution} with "
            f"{count(net.img_channels, 'channel')}, the data set has {size}x{size} with {dataset.num_channels}; {own}"
        )
    if net.label_dim == 0 < label_dim:
        raise UserError(f"{source} knows no classes; use --cond=0")
    if net.label_dim != label_dim:
        has = f"{label_dim}; {own}" if label_dim else "no labels"
        raise UserError(f"{source} has {count(net.label_dim, 'class')}, the data set has {has}")
    if teacher.has_label_vectors and not dataset.has_label_vectors:
        raise UserError(f"{source} was trained with label vectors, and the data set has classes; {own}")


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


def _check_architecture(options: Options, stage: Stage) -> None:
    """The student has its teacher's architecture. Raises UsageError for options that ask for another."""
    net = stage.teacher.net
    model = UNETS[net.init_kwargs.get("model_type", "SongUNet")]
    kwargs = {name: each.default for name, each in inspect.signature(model).parameters.items()} | net.init_kwargs
    names = {"arch": "arch", "cbase": "model_channels", "cres": "channel_mult", "blocks": "num_blocks"}
    for option, name in names.items():
        asked, value = getattr(options, option), _arch_name(kwargs) if name == "arch" else kwargs[name]
        value = list(value) if isinstance(value, tuple) else value
        if asked not in (None, value):
            asked, value = (",".join(map(str, each)) if isinstance(each, list) else each for each in (asked, value))
            raise UsageError(f"--{option}={asked}: a student has its teacher's architecture ({value}); leave it out")


def _arch_name(network_kwargs: Kwargs) -> str:
    if network_kwargs.get("model_type") == "DhariwalUNet":
        return "adm"
    return "ncsnpp" if network_kwargs.get("embedding_type") == "fourier" else "ddpmpp"


def _config(
    options: Options, dataset: ImageFolderDataset, stage: Stage | None, transfer: NetworkFile | None
) -> TrainConfig:
    filled = options.filled()
    network_kwargs, loss_kwargs = filled.fresh_kwargs() if stage is None else _student_kwargs(stage, filled)
    if stage is not None and filled.augment and not network_kwargs.get("augment_dim"):
        raise UsageError("--augment: this teacher takes no augmentation labels, so neither does its student")
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


def describe_distillation(stage: Stage) -> Kwargs:
    """A stage as `training_options.json` and a state describe it."""
    return {
        "num_steps": stage.grid.steps,
        "ratio": stage.ratio,
        "teacher_solver": stage.solver,
        "self_teacher": stage.self_teacher,
        "teacher_levels": list(stage.grid.levels),
        "lineage": [dict(entry) for entry in stage.sampling.lineage],
    }


def _student_kwargs(stage: Stage, options: Options) -> tuple[Kwargs, Kwargs]:
    """Settings of network and loss of a student: its teacher's network, which may be of foreign code."""
    net = stage.teacher.net
    network: Kwargs = {"class_name": printable(type(net).__name__, 100)}
    if not stage.teacher.foreign_code:
        network = {name: value for name, value in dict(net.init_kwargs).items() if name not in INTERFACE}
        network["class_name"] = f"training.networks.{type(net).__name__}"
        network |= {"dropout": options.dropout, "use_fp16": options.precision == "fp16"}
    loss = {"class_name": "training.loss.EDMDistillationLoss", "num_steps": stage.grid.steps, "ratio": stage.ratio}
    return network, loss | {"teacher_solver": stage.solver, **options.within("loss_kwargs")}


def fingerprint(path: str) -> str:
    """SHA-256 over the names, sizes and (in a zip) checksums of a data set's files: distinguishes data sets quickly."""
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


def _seed(options: Options, run_dir: str) -> int:
    """The seed asked for, or that of the run to resume, or a random one (the same on every process)."""
    seed = options.seed
    if seed is None and options.nosubdir:
        earlier = read_json(Path(run_dir, "training_options.json")).get("seed")
        seed = earlier if isinstance(earlier, int) and earlier >= 0 else None
    return int(dist.broadcast_object(torch.seed() % 2**31 if seed is None else seed))


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def find_state(options: Options, run: Run) -> tuple[Path, Kwargs] | None:
    """The state to resume from, by `--resume` and `--nosubdir`; None for a fresh start. `--resume=latest` without
    `--nosubdir` takes the place of the newest numbered run of the same options.

    Raises UserError, naming the options, where resuming, or starting afresh, would spoil a run of other options.
    """
    config, found = run.config, None
    if options.resume is not None and options.resume != "latest":
        path = Path(options.resume)
        found = path, state.load_state(path)
        if options.seed is None:
            config.seed = found[1]["options"]["seed"]
    elif options.nosubdir or options.resume is not None:
        if not options.nosubdir:
            _take_newest_run(options, config)
        found = state.load_newest(config.run_dir, dist.print0)
    position = found and {name: value for name, value in found[1]["position"].items() if name != "elapsed_sec"}
    dist.check_agreement({f"the state to resume from in {config.run_dir}": position})
    if found is not None:
        check_same_options(found[0], found[1]["options"], config)
    elif options.nosubdir and Path(config.run_dir, "log.txt").is_file():
        dist.print0(f"{config.run_dir} has no training state to resume from yet: this run starts from the beginning")
    if found is None or found[0].resolve().parent != Path(config.run_dir).resolve():
        dist.from_rank0(lambda: _check_unused(config))
    return found


def _check_unused(config: TrainConfig) -> None:
    """Raises UserError where a fresh start would write over the snapshots of a run that had other options."""
    snapshots = {path.name for path in Path(config.run_dir).glob("network-snapshot-*.pkl")}
    if snapshots <= {"network-snapshot-000000.pkl"}:  # of a run that had hardly begun
        return
    earlier = _identity_of(Path(config.run_dir))
    if not earlier:
        raise UserError(f"{config.run_dir} has snapshots of a run that can't be resumed; use another --outdir")
    check_same_options(config.run_dir, earlier, config)


def _take_newest_run(options: Options, config: TrainConfig) -> None:
    """Gives `config` the directory (and the seed, unless one was given) of the newest numbered run of its options that
    has a state. Raises UserError, naming what the newest run of all has else, where there is none."""

    def title(name: str) -> str:  # without number and processes: a run may resume with more or fewer of them
        return re.sub(r"-gpus\d+-", "-", Path(name).name.partition("-")[2])

    remedy = ". Name a state"
    runs = [path for path in Path(options.outdir).glob("*-*") if re.match(r"\d+-", path.name)]
    for path in sorted(runs, key=lambda path: int(path.name.partition("-")[0]), reverse=True):
        identity = _identity_of(path)
        seed = identity.get("seed") if options.seed is None else config.seed
        if not identity or not isinstance(seed, int) or not state.list_states(path):
            continue
        wrong = named_differences(identity, replace(config, seed=seed).identity())
        if not wrong and title(path.name) == title(config.run_dir):
            config.run_dir, config.seed = str(path), seed
            return
        if remedy == ". Name a state":
            others = "; ".join(wrong or ["--desc or the like"])
            remedy = f"; the newest with one, {path.name}, has other options: {others}. Use those"
    raise UserError(
        f"--resume=latest: {options.outdir} has no run of these options with a state{remedy}, or leave --resume out, "
        "which begins another run"
    )


def _identity_of(run_dir: Path) -> Kwargs:
    """What an earlier run says of itself; empty where it can't be read."""
    identity = read_json(run_dir / "training_options.json").get("identity")
    return identity if isinstance(identity, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(options: Options, run: Run, announce: Callable[[], None] = lambda: None) -> Path:
    """Runs what `prepare` returned, resuming where there is a state, and returns the path of the final snapshot.
    `announce` is called once the state is found, and so the run's own directory, before anything is written."""
    found = find_state(options, run)
    announce()
    with contextlib.ExitStack() as stack:
        dist.from_rank0(lambda: stack.enter_context(locked(run.config.run_dir)))
        loop = _loop(run, found)
        del found  # as large as all that the trainer has, which has copied it
        return loop.run()


def _loop(run: Run, found: tuple[Path, Kwargs] | None) -> Loop:
    """The loop of a run, at the state to resume from, with its directory made and its options written."""
    config = run.config
    if config.batch_gpu == AUTO:
        config.batch_gpu = _batch_gpu(run, found[1] if found else {})
    log = Log(Path(config.run_dir, "log.txt"))
    if dist.is_main():
        check_run_dir(config.run_dir)
        written = {**config.to_options(), "identity": config.identity(), "environment": _environment()}
        write_text(Path(config.run_dir, "training_options.json"), json.dumps(written, indent=2) + "\n")
        if run.stage is not None and run.stage.grid.origin is not None:
            grid = run.stage.grid
            content = {"teacher": run.stage.teacher.sha256, "measured": grid.origin, "levels": list(grid.levels)}
            write_text(Path(config.run_dir, GRID_FILE), json.dumps(content, indent=2) + "\n")
        if found is None:
            Path(config.run_dir, "stats.jsonl").unlink(missing_ok=True)
            run.announce(log.note)
    dist.barrier()
    loop = Loop(Trainer(config, run.dataset, run.stage, run.transfer, log), log)
    if found is not None:
        loop.load_state(*found)
    return loop


def _environment() -> Kwargs:
    """What a run stands on, for those who read its files later. None of it alters a result that is to be resumed."""
    device, gpu = dist.device(), dist.device().type == "cuda"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *map(public_url, sys.argv[1:])]),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {os.cpu_count()} cores",
        "cuda": torch.version.cuda if gpu else None,
        "processes": dist.get_world_size(),
        "threads": torch.get_num_threads(),
    }


def _batch_gpu(run: Run, saved: Kwargs) -> int:
    """--batch-gpu=auto: what a resumed run had, so that its sums round as before, or what fits."""
    here = (dist.get_world_size(), dist.device().type, True)
    if (saved.get("world_size"), saved.get("device"), saved.get("batch_gpu") in costs.divisors(run)) == here:
        return int(saved["batch_gpu"])
    size = costs.largest_batch(run)
    dist.print0(f"--batch-gpu=auto: {count(size, 'image')} at once in each process")
    return size
