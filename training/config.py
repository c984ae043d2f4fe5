"""Architectures, how identities of runs differ, run directories, and how a batch is divided. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dnnlib.atomic import check_folder
from dnnlib.cli import UsageError, UserError
from dnnlib.errors import printable

Kwargs = dict[str, Any]
AUTO = "auto"  # of --batch-gpu

DDPMPP: Kwargs = {
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
}
NCSNPP: Kwargs = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
ARCHITECTURES: dict[str, Kwargs] = {
    "ddpmpp": DDPMPP,
    "ncsnpp": {**DDPMPP, **NCSNPP, "resample_filter": [1, 3, 3, 1]},
    "adm": {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4]},
}
PRECONDS = {"vp": ("VPPrecond", "VPLoss"), "ve": ("VEPrecond", "VELoss"), "edm": ("EDMPrecond", "EDMLoss")}
INTERVALS = ("uniform", "loss")  # of training.intervals
AUGMENTATION: Kwargs = {"xflip": 1e8, "yflip": 1, "scale": 1, "rotate_frac": 1, "aniso": 1, "translate_frac": 1}


def differences(old: Kwargs, new: Kwargs) -> list[str]:
    """Names (with both values) of what differs between two identities; of settings within one another, the parts."""
    found = []
    for name in new:
        before, now = plain(old.get(name)), plain(new[name])
        if isinstance(before, dict) and isinstance(now, dict):
            inner = [{f"{name}.{key}": each.get(key) for key in [*now, *before]} for each in (before, now)]
            found += differences(inner[0], inner[1])
        elif before != now:
            found.append(f"{printable(name, 80)} (was {_short(before)}, now {_short(now)})")
    return found


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: lists for tuples."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> str:
    text = "not given" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:8]}..." if re.fullmatch("[0-9a-f]{16,}", text) else printable(text, 80)  # of a hash the beginning


# ---------------------------------------------------------------------------------------------------------------------
# Run directories


def next_run_number(outdir: str) -> int:
    """EDM's rule: one more than the largest number that a folder of `outdir` begins with, or 0."""
    folder = Path(outdir)
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    numbers = [int(match[0]) for name in names if (match := re.match(r"\d+", name))]
    return max(numbers, default=-1) + 1


def check_batch(batch_size: int, batch_gpu: int | str | None, world_size: int) -> int:
    """Images per process and round. Raises UsageError for a batch that cannot be divided so."""
    if batch_size < 1 or batch_size % world_size:
        raise UsageError(
            f"--batch={batch_size} cannot be shared by {world_size} processes; use a multiple of {world_size}"
        )
    share = batch_size // world_size
    size = min(batch_gpu, share) if isinstance(batch_gpu, int) else share
    if size < 1 or share % size:
        works = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise UsageError(
            f"--batch-gpu={batch_gpu} does not divide the {share} images of each process (--batch={batch_size}, "
            f"processes: {world_size}); {works} would"
        )
    return size


def check_run_dir(run_dir: str, make: bool = True, owner: str = "run") -> None:
    """Makes a folder for what `owner` is: a run or a ladder. Raises UserError if that can't be done, or if the folder
    is one of the other kind; `make=False` only finds out."""
    signs = {"run": ("ladder.json", "ladder-options.json"), "ladder": ("training_options.json", "stats.jsonl")}[owner]
    if any(Path(run_dir, sign).is_file() for sign in signs):
        other = "a run of train.py" if owner == "ladder" else "a ladder of distill.py"
        raise UserError(f"{run_dir} holds {other}; use another --outdir")
    try:
        check_folder(run_dir)
        if make:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        where = f", {exc.filename} is a file" if isinstance(exc, NotADirectoryError) else ""
        raise UserError(f"{run_dir}: cannot be made ({exc.strerror}{where}); choose another --outdir") from exc
