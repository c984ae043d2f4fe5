"""Exact training state: what a run needs to resume as if it had never stopped, as plain tensors and numbers.

A state is a dict for `torch.save` (docs/formats.md lists its entries), read back with `weights_only=True`, so that it
can hold no code. Random numbers need no state: they are keyed by seed and step (training.draws), as is the data order.

The file is a zip archive, in which `torch.save` keeps a CRC-32 of every part; `torch.load` ignores them. A new state is
read back and compared with them before it gets its name, and only then may an older one go. A state that a disk has
altered since is noticed when it is read, and the one before is taken: that is why there is more than one.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Callable
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


def check_archive(file: IO[bytes], limit: float = math.inf) -> None:
    """Reads all of a file of `torch.save` and compares each part with its CRC-32. Raises BadZipFile.

    limit: bytes that all parts together may have.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(part.file_size for part in archive.infolist()) > limit:
                raise zipfile.BadZipFile("its parts are larger than itself")
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
        reason = printable(exc, 200) if isinstance(exc, zipfile.BadZipFile) else type(exc).__name__
        raise UserError(
            f"{path}: not a training state of this program, or a damaged one ({reason}); states of "
            "EDM's own train.py hold whole objects and cannot be read safely: use --transfer with its .pkl"
        ) from exc
    if not isinstance(state, dict) or not {"format", "position", "optimizer"} <= state.keys():
        raise UserError(f"{path}: not a training state of this program")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path}: training state of format {printable(state['format'], 40)}; this program reads format {FORMAT}"
        )
    try:
        if not _is(CONTENT, {"batch_gpu": 1, "intervals": {}, **state}):
            raise ValueError("not complete")
        at = state["position"]
        if at["tick_start_nimg"] > at["nimg"] or max(at["tick_start_step"], at["skipped"]) > at["step"]:
            raise ValueError("contradictory")
        state["options"] = parse_json(json.dumps(state["options"]))
    except (ValueError, TypeError, RecursionError) as exc:
        text = "a training state that lacks something, or a damaged one; use the one before it"
        raise UserError(f"{path}: {text}") from exc
    return state


def _is_moments(value: Any) -> bool:
    """[count, sum, sum of squares], or a list of such."""
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    return all(isinstance(row, list) and [type(number) for number in row] == [float] * 3 for row in rows)


_COUNT = (int, 0, MOST)
POSITION = ("nimg", "step", "tick", "tick_start_nimg", "tick_start_step", "skipped", "stats_lines")
_TENSORS = {...: Tensor}
CONTENT: dict[Any, Any] = {  # the kind of each entry: a type, (type, least, bound), a function; `...`: of all in a dict
    "position": {**dict.fromkeys(POSITION, _COUNT), "elapsed_sec": (float, 0, MOST)},
    "net": _TENSORS,
    "ema": _TENSORS,
    "optimizer": {"exp_avg": _TENSORS, "exp_avg_sq": _TENSORS, "step": _TENSORS},
    "scaler": {"scale": (int | float, 1e-45, 3e38), "growth": _COUNT},  # a float32
    "stats": {...: _is_moments},
    "options": {"seed": (int, 0, 1 << 63)},
    "world_size": (int, 1, MOST),
    "batch_gpu": (int, 1, MOST),
    "device": str,
    "intervals": {},
}


def _is(kind: Any, value: Any) -> bool:
    """Whether everything is there and of its kind. Whether the tensors fit is checked by the network."""
    if isinstance(kind, dict):
        names = value if ... in kind and isinstance(value, dict) else kind
        return isinstance(value, dict) and all(
            name in value and _is(kind.get(name, kind.get(...)), value[name]) for name in names
        )
    if isinstance(kind, tuple):
        return isinstance(value, kind[0]) and kind[1] <= value < kind[2]
    return isinstance(value, kind) if isinstance(kind, type) else bool(kind(value))


def rolling_name(nimg: int) -> str:
    """File name of the rolling state after `nimg` images."""
    return f"training-state-rolling-{nimg:010d}.pt"


def images_seen(path: Path) -> int:
    """Images seen, by a state's name; a dump's is cut to thousands."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2]) if match[1] else int(match[2]) * 1000


def list_states(run_dir: str | os.PathLike[str]) -> list[Path]:
    """All states of a run, newest first (by images seen; a rolling state is exact, a dump's name is cut to kimg)."""
    states = [path for path in Path(run_dir).glob("training-state-*") if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(states, key=lambda path: (images_seen(path), _is_rolling(path)), reverse=True)


def _is_rolling(path: Path) -> bool:
    return path.name.startswith("training-state-rolling-")


def load_newest(
    run_dir: str | os.PathLike[str], log: Callable[[str], Any] = print
) -> tuple[Path, dict[str, Any]] | None:
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
    for path in rolling[KEPT_ROLLING:] + [path for path in states if path not in rolling][KEPT_DUMPS:]:
        path.unlink(missing_ok=True)
