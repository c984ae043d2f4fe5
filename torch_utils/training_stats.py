"""Running statistics of a training run: count, mean and deviation of whatever is reported, over all processes.

Moments are summed in float64 on the device where the values are, and over processes at every `Collector.update`, so
that every process holds the same totals and a run that is stopped and resumed goes on with the very same numbers.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from . import distributed

_pending: dict[str, torch.Tensor] = {}  # name -> float64 [3]: count, sum, sum of squares since the last update


def report(name: str, value: Any) -> Any:
    """Adds every element of `value` (tensor, number or list) to the statistic `name`; returns `value`.

    Nothing waits for the device. All processes must report the same names between two updates.
    """
    values = torch.as_tensor(value).detach().flatten().to(torch.float64)
    moments = torch.stack([torch.full_like(values.sum(), values.numel()), values.sum(), values.square().sum()])
    _pending[name] = _pending[name] + moments if name in _pending else moments
    return value


def report0(name: str, value: Any) -> Any:
    """Like `report`, with the value of rank 0 alone (every rank still has to call)."""
    report(name, value if distributed.is_main() else [])
    return value


class Collector:
    """Totals since the last `reset`, the same on every process, as plain numbers once read."""

    def __init__(self, regex: str = ".*") -> None:
        self._regex = re.compile(regex)
        self._totals: dict[str, torch.Tensor] = {}

    def update(self) -> None:
        """Takes in everything reported since the last update, summed over processes in one exchange."""
        names = sorted(name for name in _pending if self._regex.fullmatch(name))
        if not names:
            return
        target = distributed.device()
        moments = torch.stack([_pending.pop(name).to(target) for name in names])
        distributed.all_reduce_sum([moments])
        for name, row in zip(names, moments, strict=True):
            self._totals[name] = self._totals[name] + row if name in self._totals else row

    def reset(self) -> None:
        """Starts all totals afresh."""
        self._totals.clear()

    def names(self) -> list[str]:
        """Names that have totals, sorted."""
        return sorted(self._totals)

    def num(self, name: str) -> int:
        """How many values were reported; 0 for an unknown name."""
        return int(self._totals[name][0]) if name in self._totals else 0

    def mean(self, name: str) -> float:
        """Mean of the reported values, NaN when there are none."""
        if not self.num(name):
            return float("nan")
        count, total, _ = self._totals[name].tolist()
        return total / count

    def std(self, name: str) -> float:
        """Deviation (over N) of the reported values, NaN when there are none."""
        if not self.num(name):
            return float("nan")
        count, total, squares = self._totals[name].tolist()
        mean = total / count
        return math.sqrt(max(squares / count - mean * mean, 0.0)) if math.isfinite(mean) else float("nan")

    def __getitem__(self, name: str) -> float:
        return self.mean(name)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """name -> {num, mean, std}, as one line of `stats.jsonl` holds them."""
        return {name: {"num": self.num(name), "mean": self.mean(name), "std": self.std(name)} for name in self.names()}

    def state_dict(self) -> dict[str, list[float]]:
        """Totals as plain numbers, for a training state."""
        return {name: row.tolist() for name, row in self._totals.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Puts totals back as they were."""
        self._totals = {
            name: torch.tensor(row, dtype=torch.float64, device=distributed.device()) for name, row in state.items()
        }


def init_multiprocessing(rank: int, sync_device: torch.device | None) -> None:
    """Kept for programs written against EDM: `torch_utils.distributed.init` has set everything up."""


def clear() -> None:
    """Forgets what was reported and not yet taken in (a new run in the same process)."""
    _pending.clear()


default_collector = Collector()
