"""Exact training state: what a run needs to go on as if it had never stopped, as plain tensors and numbers.

A state is a dict for `torch.save`, read back with `weights_only=True`, so that it can hold no code:

    format      1
    position    nimg, step, tick, tick_start_nimg, tick_start_step, skipped, stats_lines (whole numbers), elapsed_sec
    net, ema    name -> tensor (parameters and buffers)
    optimizer   exp_avg, exp_avg_sq, step: name of the parameter -> tensor
    scaler      loss scale and growth count under fp16
    stats       name -> [count, sum, sum of squares] since the last tick, or a list of such
    intervals   of a distillation: `seen`, fading numbers of images and sums of losses of every interval
    options     what the run was started with, as far as it alters the result
    world_size, device

Random numbers need no state: they are keyed by seed and step (training.draws), as is the order of the data.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from dnnlib.atomic import atomic_write
from dnnlib.cli import UserError
from torch_utils.misc import load_tensors, save_tensors

FORMAT = 1
POSITION = (  # whole numbers
    "nimg",
    "step",
    "tick",
    "tick_start_nimg",
    "tick_start_step",
    "skipped",
    "skipped_before_tick",
    "stats_lines",
)
_NAME = re.compile(r"training-state-(rolling-)?(\d+)\.pt")


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes a state in one piece: the file is whole or it isn't there."""
    with atomic_write(path) as file:
        save_tensors({"format": FORMAT, **state}, file)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a state (tensors on the CPU) without running anything from it. Raises UserError for what isn't one."""
    try:
        state = load_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such training state") from None
    except MemoryError:
        raise
    except Exception as exc:  # torch.load has a different exception for every way in which a file can be wrong
        raise UserError(
            f"{path}: not a training state of this program, or a damaged one ({type(exc).__name__}); states of "
            "EDM's own train.py hold whole objects and cannot be read safely: use --transfer with its .pkl"
        ) from exc
    if not isinstance(state, dict) or not {"format", "position", "optimizer"} <= state.keys():
        raise UserError(f"{path}: not a training state of this program")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: training state of format {state['format']}; this program reads format {FORMAT}")
    if not _is_complete(state):
        raise UserError(f"{path}: a training state that lacks something, or a damaged one; use the one before it")
    return state


def _is_complete(state: dict[str, Any]) -> bool:
    """Whether everything is there and of its kind. Whether the tensors fit is for the network to say."""
    match state:
        case {
            "position": dict(position),
            "net": dict(net),
            "ema": dict(ema),
            "optimizer": {"exp_avg": dict(first), "exp_avg_sq": dict(second), "step": dict(steps)},
            "scaler": {"scale": int() | float(), "growth": int()},
            "stats": dict(stats),
            "options": {"seed": int()},
            "world_size": int(),
            "device": str(),
        }:
            numbers = [position.get(name) for name in POSITION]
            tensors = [tensor for table in (net, ema, first, second, steps) for tensor in table.values()]
            return (
                all(isinstance(number, int) and number >= 0 for number in numbers)
                and isinstance(position.get("elapsed_sec"), float)
                and all(isinstance(tensor, Tensor) for tensor in tensors)
                and all(
                    _is_moments(rows) or (isinstance(rows, list) and all(map(_is_moments, rows)))
                    for rows in stats.values()
                )
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

    def images_seen(path: Path) -> tuple[int, bool]:
        match = _NAME.fullmatch(path.name)
        assert match is not None
        return (int(match[2]) if match[1] else int(match[2]) * 1000, bool(match[1]))

    folder = Path(run_dir)
    states = (
        [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()] if folder.is_dir() else []
    )
    return sorted(states, key=images_seen, reverse=True)


def load_newest(run_dir: str | os.PathLike[str], say: Any = print) -> tuple[Path, dict[str, Any]] | None:
    """The state with most images seen that can be read, or None where there is no state at all.

    A damaged newest one is named, and the one before is taken. Raises UserError when none of them can be read.
    """
    found = list_states(run_dir)
    readable: list[tuple[Path, dict[str, Any]]] = []
    for path in found:
        try:
            readable.append((path, load_state(path)))
        except UserError as exc:
            say(f"Passing over a training state that cannot be read: {exc}")
        if len(readable) == 2:  # a dump's name is less exact than a rolling state's: look inside the two newest
            break
    if found and not readable:
        raise UserError(f"{run_dir}: none of its {len(found)} training states can be read; remove them to begin again")
    return max(readable, key=lambda item: item[1]["position"]["nimg"]) if readable else None


def remove_old_rolling(run_dir: str | os.PathLike[str], keep: int = 2) -> None:
    """Leaves the `keep` newest rolling states."""
    for path in [path for path in list_states(run_dir) if "rolling" in path.name][keep:]:
        path.unlink(missing_ok=True)
