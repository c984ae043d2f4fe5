"""What a run is made of: one typed value from the command line to the training loop, and its two written forms."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.atomic import check_folder
from dnnlib.cli import UsageError, UserError

Kwargs = dict[str, Any]
AUTO = "auto"  # of --batch-gpu
STAGE_MIMG = 20.0  # default length of a distillation, in millions of images

ARCHITECTURES: dict[str, Kwargs] = {
    "ddpmpp": {
        "model_type": "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
    },
    "ncsnpp": {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
    },
    "adm": {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4]},
}
PRECONDS = {"vp": ("VPPrecond", "VPLoss"), "ve": ("VEPrecond", "VELoss"), "edm": ("EDMPrecond", "EDMLoss")}
INTERVALS = ("uniform", "loss")  # of training.intervals
AUGMENTATION: Kwargs = {"xflip": 1e8, "yflip": 1, "scale": 1, "rotate_frac": 1, "aniso": 1, "translate_frac": 1}


@dataclass
class TrainConfig:
    """All that a training run needs. Units: kimg = 1000 images; rates per step; sizes in images."""

    run_dir: str
    dataset_kwargs: Kwargs  # path, use_labels, xflip, cache, resolution, max_size
    network_kwargs: Kwargs  # class_name and constructor arguments, without the interface that the data dictates
    loss_kwargs: Kwargs  # class_name and constructor arguments (a distillation's grid comes from the teacher)
    augment_kwargs: Kwargs | None = None
    seed: int = 0
    total_kimg: int = 200000
    batch_size: int = 512
    batch_gpu: int | str | None = None  # or AUTO
    lr: float = 10e-4
    lr_rampup_kimg: float = 10000
    lr_decay: str = "none"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    loss_scaling: float = 1.0
    ema_halflife_kimg: float = 500
    ema_rampup_ratio: float | None = 0.05
    ema_std: float | None = None  # a power-function average of this relative width instead
    clip: float | None = None  # largest length of the gradient
    precision: str = "fp32"
    teacher_precision: str = "fp32"
    recompute: bool = False
    compile: bool = False
    cudnn_benchmark: bool = True
    deterministic: bool = False
    workers: int = 1
    kimg_per_tick: float = 50
    snapshot_ticks: int | None = 50
    state_dump_ticks: int | None = 500
    targets_ticks: int | None = None
    save_every_min: float = 10
    tensorboard: bool = False
    wandb: str | None = None  # project
    transfer: str | None = None
    transfer_sha256: str | None = None
    distillation: Kwargs | None = None  # num_steps, ratio, teacher_solver, self_teacher, teacher_levels, lineage
    trust_network_code: bool = False
    extras: Kwargs = field(default_factory=dict)  # written to training_options.json as they are

    @property
    def total_nimg(self) -> int:
        """Images after which the run is done."""
        return self.total_kimg * 1000

    def to_options(self) -> Kwargs:
        """The run as `training_options.json` tells it: EDM's keys, then this program's own."""
        options: Kwargs = {
            "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset", **self.dataset_kwargs},
            "data_loader_kwargs": {"pin_memory": True, "num_workers": self.workers, "prefetch_factor": 2},
            "network_kwargs": self.network_kwargs,
            "loss_kwargs": self.loss_kwargs,
            "optimizer_kwargs": {
                "class_name": "torch.optim.Adam",
                "lr": self.lr,
                "betas": list(self.betas),
                "eps": self.eps,
            },
        }
        if self.augment_kwargs is not None:
            options["augment_kwargs"] = {"class_name": "training.augment.AugmentPipe", **self.augment_kwargs}
        options |= {
            "total_kimg": self.total_kimg,
            "ema_halflife_kimg": self.ema_halflife_kimg,
            "batch_size": self.batch_size,
            "batch_gpu": self.batch_gpu,
            "loss_scaling": self.loss_scaling,
            "cudnn_benchmark": self.cudnn_benchmark,
            "kimg_per_tick": self.kimg_per_tick,
            "snapshot_ticks": self.snapshot_ticks,
            "state_dump_ticks": self.state_dump_ticks,
            "seed": self.seed,
        }
        if self.transfer is not None:
            options |= {"resume_pkl": self.transfer}
        if self.transfer is not None or self.distillation is not None:
            options |= {"ema_rampup_ratio": self.ema_rampup_ratio}
        options["run_dir"] = self.run_dir
        known = {"total_kimg", "batch_size", "batch_gpu", "seed", "run_dir", "ema_rampup_ratio", "transfer", "extras"}
        known |= set(options) | {"lr", "betas", "eps", "workers"}
        options |= {name: value for name, value in asdict(self).items() if name not in known}
        return options | self.extras

    def to_file(self, nimg: int) -> Kwargs:
        """How a network came about, for its file: `identity` without what the file says elsewhere, and images seen."""
        elsewhere = ("network", "loss", "augment", "distillation")
        return {
            "kimg": nimg / 1000,
            **{name: value for name, value in self.identity().items() if name not in elsewhere},
        }

    def identity(self) -> Kwargs:
        """Everything that alters the result, for going on with a run: what differs here is a different run.

        Left out: paths, the partition of a batch (batch_gpu), workers, ticks, and what only saves or shows. The length
        of a run belongs here when the learning rate decays towards its end, and only then.
        """
        length = self.total_nimg if self.lr_decay != "none" else None
        return {
            "data": [self.extras.get("data_fingerprint")]
            + [self.dataset_kwargs.get(name) for name in ("use_labels", "xflip", "resolution", "max_size")],
            "network": self.network_kwargs,
            "loss": self.loss_kwargs,
            "augment": self.augment_kwargs,
            "seed": self.seed,
            "batch": self.batch_size,
            "lr": [self.lr, list(self.betas), self.eps],
            "warmup": self.lr_rampup_kimg,
            "lr-decay": self.lr_decay,
            "duration": length,
            "ls": self.loss_scaling,
            "ema": [self.ema_halflife_kimg, self.ema_rampup_ratio] if self.ema_std is None else ["std", self.ema_std],
            "clip": self.clip,
            "precision": self.precision,
            "teacher-precision": self.teacher_precision if self.teacher_precision != "fp32" else None,
            "transfer": self.transfer_sha256,
            "distillation": self.distillation and {k: v for k, v in self.distillation.items() if k != "lineage"},
        }


def differences(old: Kwargs, new: Kwargs) -> list[str]:
    """Names (with both values) of what differs between two identities, in words a user can act on."""
    found = [told for name in new for told in _told(name, plain(old.get(name)), plain(new.get(name)))]
    twice = {told.removeprefix("distillation.") for told in found if told.startswith("distillation.")}
    return [told for told in found if told.removeprefix("loss.") not in twice or not told.startswith("loss.")]


def _told(name: str, old: Any, new: Any) -> list[str]:
    """`differences` of one entry: of settings and of rows of values, the part alone that is another."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*new, *(each for each in old if each not in new)]
        return [told for each in names for told in _told(f"{name}.{each}", old.get(each), new.get(each))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 1:
        differing = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        if len(differing) == 1:
            ((old, new),) = differing
    return [f"{name} (was {_short(old)}, now {_short(new)})"] if old != new else []


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: lists for tuples."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    if re.fullmatch("[0-9a-f]{16,}", text):  # a hash, of which the beginning tells enough
        return f"{text[:8]}..."
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Run directories


def next_run_number(outdir: str) -> int:
    """EDM's rule: one more than the largest number that a folder of `outdir` begins with, or 0."""
    folder = Path(outdir)
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    numbers = [int(match[0]) for name in names if (match := re.match(r"\d+", name))]
    return max(numbers, default=-1) + 1


def describe_run(dataset_name: str, cond: bool, arch: str, precond: str, gpus: int, batch: int, precision: str) -> str:
    """EDM's description of a run: data, conditioning, architecture, preconditioning, processes, batch, precision."""
    labels = "cond" if cond else "uncond"
    return f"{dataset_name}-{labels}-{arch}-{precond}-gpus{gpus}-batch{batch}-{precision}"


def check_batch(batch_size: int, batch_gpu: int | str | None, world_size: int) -> tuple[int, int]:
    """(images per process and round, rounds). Raises UsageError for a batch that cannot be divided so."""
    if batch_size < 1 or batch_size % world_size:
        raise UsageError(
            f"--batch={batch_size} cannot be shared by {world_size} processes; use a multiple of {world_size}"
        )
    share = batch_size // world_size
    size = min(batch_gpu, share) if isinstance(batch_gpu, int) else share
    if size < 1 or share % size:
        works = [n for n in range(1, share + 1) if share % n == 0]
        near = sorted(sorted(works, key=lambda n: abs(n - size))[:4])
        more = " for example" if len(near) < len(works) else ""
        raise UsageError(
            f"--batch-gpu={batch_gpu} does not divide the {share} images of each process "
            f"(--batch={batch_size}, {world_size} process{'es' * (world_size > 1)}); "
            f"{', '.join(map(str, near))} would{more}"
        )
    return size, share // size


def check_run_dir(run_dir: str, make: bool = True, owner: str = "run") -> None:
    """Makes a folder for what `owner` is: a run or a ladder. Raises UserError if that can't be done, or if the folder
    is one of the other kind; `make=False` only finds out."""
    signs = {"run": ("ladder.json", "ladder-options.json"), "ladder": ("training_options.json", "stats.jsonl")}[owner]
    if any(Path(run_dir, sign).is_file() for sign in signs):
        other = "a run of train.py" if owner == "ladder" else "a ladder of distill.py"
        raise UserError(f"{run_dir} holds {other}; use another --outdir")
    if os.path.isfile(run_dir):
        raise UserError(f"{run_dir} is a file; name a folder with --outdir")
    try:
        check_folder(run_dir)
        if make:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        where = f", {exc.filename} is a file" if isinstance(exc, NotADirectoryError) else ""
        raise UserError(f"{run_dir}: cannot be made ({exc.strerror}{where}); choose another --outdir") from exc
