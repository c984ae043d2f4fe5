"""Running statistics of a training run: count, mean and deviation of whatever is reported, over all processes.

Moments are summed in float64 on the device where the values are, and over processes at every `Collector.update`, so
that every process holds the same totals and a run that is stopped and resumed continues with the very same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import distributed


class Collector:
    """Totals since the last `reset`, the same on every process."""

    def __init__(self) -> None:
        # name -> float64 [3]: count, sum, sum of squares; [k, 3] for a statistic of k kinds of values
        self._pending: dict[str, torch.Tensor] = {}
        self._totals: dict[str, torch.Tensor] = {}

    def report(self, name: str, value: Any) -> None:
        """Adds every element of `value` (tensor, number or list) to the statistic `name`.

        Nothing waits for the device. All processes must report the same names between two updates.
        """
        values = torch.as_tensor(value).detach().flatten().to(torch.float64)
        count = torch.full_like(values.sum(), values.numel())
        self.report_moments(name, torch.stack([count, values.sum(), values.square().sum()]))

    def report_moments(self, name: str, moments: torch.Tensor) -> None:
        """Adds counts, sums and sums of squares: float64 [3], or [k, 3] for statistics `name`/0, `name`/1, ..."""
        self._pending[name] = self._pending[name] + moments if name in self._pending else moments.clone()

    def update(self) -> None:
        """Takes in everything reported since the last update, summed over processes in one exchange."""
        if not self._pending:
            return
        names = sorted(self._pending)
        parts = [self._pending.pop(name).to(distributed.device()) for name in names]
        moments = torch.cat([part.flatten() for part in parts])
        distributed.all_reduce_sum([moments])
        split = moments.split([part.numel() for part in parts])
        for name, part, numbers in zip(names, parts, split, strict=True):
            total = numbers.reshape(part.shape)
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def reset(self) -> None:
        self._totals.clear()

    def mean(self, name: str) -> float:
        """Mean of the values reported as `name`, NaN when there are none."""
        return self.as_dict().get(name, {}).get("mean", math.nan)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """name -> {num, mean, std (over N)}, as one line of `stats.jsonl` holds them, sorted; those of
        `report_moments` as name/0, name/1, ... with leading zeros. What was never reported is left out."""
        rows: dict[str, list[float]] = {}
        for name, total in self._totals.items():
            if total.ndim == 1:
                rows[name] = total.tolist()
            else:
                digits = len(str(len(total) - 1))
                rows |= {f"{name}/{kind:0{digits}d}": row for kind, row in enumerate(total.tolist())}
        return {name: _moments(*row) for name, row in sorted(rows.items()) if row[0]}

    def state_dict(self) -> dict[str, list[Any]]:
        """Totals as plain numbers, for a training state."""
        return {name: rows.tolist() for name, rows in self._totals.items()}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """Puts totals back as they were."""
        self._totals = {
            name: torch.tensor(rows, dtype=torch.float64, device=distributed.device()) for name, rows in state.items()
        }


def _moments(count: float, total: float, squares: float) -> dict[str, float]:
    mean = total / count
    deviation = math.sqrt(max(squares / count - mean * mean, 0.0)) if math.isfinite(mean) else math.nan
    return {"num": int(count), "mean": mean, "std": deviation}
