"""Exact training state: what a run needs to resume as if it had never stopped, as plain tensors and numbers.

A state is a dict for `torch.save`, read back with `weights_only=True`, so that it can hold no code:

    format      1
    position    nimg, step, tick, tick_start_nimg, tick_start_step, skipped, stats_lines (whole numbers), elapsed_sec
    net, ema    name -> tensor (parameters and buffers)
    optimizer   exp_avg, exp_avg_sq, step: name of the parameter -> tensor
    scaler      loss scale and growth count under fp16
    stats       name -> [count, sum, sum of squares] since the last tick, or a list of such
    intervals   of a distillation: `seen`, fading numbers of images and sums of losses of every interval
    options     what the run was started with, as far as it alters the result
    batch_gpu   images that a process took at once: with another number the same sums may round differently
    world_size, device

Random numbers need no state: they are keyed by seed and step (training.draws), as is the order of the data.

What is verified, and when. The file is a zip archive, in which `torch.save` keeps a CRC-32 of every part. A new state
is read back and compared with those before it gets its name, and its size after that; only then may an older one go.
That reading is from the system's memory (a fifth of a second for 0.9 GB, a fraction of the writing): it finds what was
cut short or altered on the way to the system, while fsync answers for the way to the disk. What a disk gives back weeks
later is verified when a state is read, to the last bit, which `torch.load` doesn't do, and the one before is taken
where it fails: that is why there is more than one.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from dnnlib.atomic import atomic_write
from dnnlib.errors import UserError, printable
from dnnlib.util import open_file, parse_json
from torch_utils.misc import load_tensors, save_tensors

FORMAT = 1
KEPT_ROLLING = 2
KEPT_DUMPS = 10  # of --dump: more than a run of EDM's default length makes
POSITION = (  # whole numbers
    "nimg",
    "step",
    "tick",
    "tick_start_nimg",
    "tick_start_step",
    "skipped",
    "stats_lines",
)
MOST = 1 << 53  # no counter of a run is as great
_NAME = re.compile(r"training-state-(rolling-)?(\d+)\.pt")


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes a state in one piece, verified: the file is whole or it isn't there. Raises UserError where what can be
    read back is not what was written."""
    try:
        with atomic_write(path) as file:
            save_tensors({"format": FORMAT, **state}, file)
            size = file.tell()
            check_archive(file)
            file.seek(size)
        if os.path.getsize(path) != size:
            raise zipfile.BadZipFile(f"{os.path.getsize(path)} bytes instead of {size}")
    except zipfile.BadZipFile as exc:
        raise UserError(
            f"{os.fspath(path)}: what was written can't be read back ({exc}): is the disk or its file system failing? "
            "The states before it are intact"
        ) from exc


def check_archive(file: IO[bytes]) -> None:
    """Reads all of a file of `torch.save` and compares each part with its CRC-32. Raises BadZipFile."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (OSError, MemoryError, zipfile.BadZipFile):
        raise
    except Exception as exc:  # a damaged archive can look like one of any other kind
        raise zipfile.BadZipFile(f"its parts can't be read: {exc}") from exc
    if broken is not None:
        raise zipfile.BadZipFile(f"{broken} doesn't have its checksum")


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a state (tensors on the CPU) without running anything from it. Raises UserError for what isn't one, or
    isn't what was written."""
    try:
        with open_file(path, "a training state") as file:
            check_archive(file)
            file.seek(0)
            state = load_tensors(file)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such training state") from None
    except (MemoryError, UserError):
        raise
    except Exception as exc:  # torch.load has a different exception for every way in which a file can be wrong
        raise UserError(
            f"{path}: not a training state of this program, or a damaged one ({_shortly(exc)}); states of "
            "EDM's own train.py hold whole objects and cannot be read safely: use --transfer with its .pkl"
        ) from exc
    if not isinstance(state, dict) or not {"format", "position", "optimizer"} <= state.keys():
        raise UserError(f"{path}: not a training state of this program")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path}: training state of format {printable(state['format'], 40)}; this program reads format {FORMAT}"
        )
    try:
        if not _is_complete(state):
            raise ValueError("not complete")
        state["options"] = parse_json(json.dumps(state["options"]))
    except (ValueError, TypeError, RecursionError) as exc:
        raise UserError(
            f"{path}: a training state that lacks something, or a damaged one; use the one before it"
        ) from exc
    return state


def _shortly(exc: Exception) -> str:
    """The checksum's words are worth reading; torch's fill pages."""
    return printable(exc, 200) if isinstance(exc, zipfile.BadZipFile) else type(exc).__name__


def _is_complete(state: dict[str, Any]) -> bool:
    """Whether everything is there and of its kind. Whether the tensors fit is checked by the network."""
    match state:
        case {
            "position": dict(position),
            "net": dict(net),
            "ema": dict(ema),
            "optimizer": {"exp_avg": dict(first), "exp_avg_sq": dict(second), "step": dict(steps)},
            "scaler": {"scale": int() | float() as scale, "growth": int(growth)},
            "stats": dict(stats),
            "options": {"seed": int(seed)},
            "world_size": int(world_size),
            "device": str(),
        }:
            numbers = [position.get(name) for name in POSITION]
            tensors = [tensor for table in (net, ema, first, second, steps) for tensor in table.values()]
            seconds, batch_gpu = position.get("elapsed_sec"), state.get("batch_gpu", 1)
            return (
                all(isinstance(number, int) and 0 <= number < MOST for number in [*numbers, growth])
                and 0 <= seed < 1 << 63
                and position["tick_start_nimg"] <= position["nimg"]
                and max(position["tick_start_step"], position["skipped"]) <= position["step"]
                and isinstance(seconds, float)
                and 0 <= seconds < MOST
                and 0 < scale < 3e38  # of float32
                and 0 < world_size < MOST
                and all(isinstance(tensor, Tensor) for tensor in tensors)
                and all(
                    _is_moments(rows) or (isinstance(rows, list) and all(map(_is_moments, rows)))
                    for rows in stats.values()
                )
                and isinstance(batch_gpu, int)
                and 0 < batch_gpu < MOST
                and isinstance(state.get("intervals", {}), dict)
            )
    return False


def _is_moments(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(isinstance(number, float) for number in row)


def rolling_name(nimg: int) -> str:
    """File name of the rolling state after `nimg` images."""
    return f"training-state-rolling-{nimg:010d}.pt"


def list_states(run_dir: str | os.PathLike[str]) -> list[Path]:
    """All states of a run, newest first (by images seen; a rolling state is exact, a dump's name is cut to kimg)."""
    folder = Path(run_dir)
    states = (
        [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()] if folder.is_dir() else []
    )
    return sorted(states, key=lambda path: (images_seen(path), _is_rolling(path)), reverse=True)


def _is_rolling(path: Path) -> bool:
    return path.name.startswith("training-state-rolling-")


def images_seen(path: Path) -> int:
    """Images seen, by a state's name; a dump's is cut to thousands."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2]) if match[1] else int(match[2]) * 1000


def load_newest(run_dir: str | os.PathLike[str], log: Any = print) -> tuple[Path, dict[str, Any]] | None:
    """The state with most images seen that can be read, or None where there is no state at all.

    A damaged newest one is named, and the one before is taken. Raises UserError when none of them can be read.
    """
    found = list_states(run_dir)
    newest: tuple[Path, dict[str, Any]] | None = None
    for path in found:
        if newest is not None and images_seen(path) // 1000 < newest[1]["position"]["nimg"] // 1000:
            break  # within the same thousand, a dump's name doesn't show which is newer
        try:
            saved = load_state(path)
        except UserError as exc:
            log(f"Passing over a training state that cannot be read: {printable(exc)}")
            continue
        if newest is None or saved["position"]["nimg"] > newest[1]["position"]["nimg"]:
            newest = path, saved
    if found and newest is None:
        raise UserError(f"{run_dir}: none of its {len(found)} training states can be read; remove them to begin again")
    return newest


def remove_old(run_dir: str | os.PathLike[str]) -> None:
    """Leaves the newest KEPT_ROLLING rolling states, and KEPT_DUMPS of the others."""
    states = list_states(run_dir)
    rolling = [path for path in states if _is_rolling(path)]
    dumps = [path for path in states if not _is_rolling(path)]
    for path in rolling[KEPT_ROLLING:] + dumps[KEPT_DUMPS:]:
        path.unlink(missing_ok=True)
