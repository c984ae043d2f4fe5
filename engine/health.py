"""Steps that had to be skipped because a gradient was not finite.

A step leaves a number on the device; these are fetched together when a tick ends or a state is saved, so that no step
waits for the device. The images of a step follow from its number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dnnlib.errors import UserError
from dnnlib.util import count
from training.loader import Order
from training.recipe import TrainConfig

WINDOW = 100  # steps; the run ends when MOST of them had to be skipped
MOST = 50


class Health:
    """Counts skipped steps (`skipped`). The counts are equal on all processes, because gradients are summed first. A
    resumed run counts its WINDOW afresh."""

    def __init__(self, config: TrainConfig, dataset: Any, log: Callable[[str], None]) -> None:
        self.config, self.dataset, self.log = config, dataset, log
        self.skipped = 0
        self.window: deque[float] = deque(maxlen=WINDOW)
        self.waiting: dict[int, Tensor] = {}

    def add(self, step: int, skipped: Tensor) -> None:
        """Step number `step`, and 1.0 on the device where it was skipped."""
        self.waiting[step] = skipped

    def check(self) -> None:
        """Prints the steps skipped since the last check. Raises UserError if MOST of WINDOW steps were."""
        flags = torch.stack([*self.waiting.values()]).tolist() if self.waiting else []
        bad = [step for step, flag in zip(self.waiting, flags, strict=True) if flag]
        self.waiting.clear()
        self.skipped += len(bad)
        self.window.extend(flags)
        if not bad:
            return
        batch, order = self.config.batch, Order(len(self.dataset), self.config.seed)
        images = [self.dataset.get_details(i).raw_idx for i in order.indices(bad[-1] * batch, (bad[-1] + 1) * batch)]
        last = f"step {bad[-1]}, of the data set's images {', '.join(map(str, images))}"
        self.log(
            f"Skipped {len(bad)} of the last {count(len(flags), 'step')}: gradients were not finite "
            f"({self.skipped} in all); the last was {last}"
        )
        if sum(self.window) >= MOST:
            precision = ", --precision=fp32" if self.config.precision != "fp32" else ""
            raise UserError(
                f"{MOST} of the last {WINDOW} steps had no finite gradients, the last of them {last}; what was saved "
                f"before is intact. Try a lower --lr{precision}, or look at the data"
            )
