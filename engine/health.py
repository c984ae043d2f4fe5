"""Steps that had to be skipped because a gradient was not finite.

A step leaves a number on the device; these are fetched together when a tick ends or a state is saved, so that no step
waits for the device. Which images a step was of is a function of its number.
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
SHOWN = 16  # images named on the screen


class Health:
    """Counts the steps that were skipped. The same on every process: gradients are summed before they come here.

    log prints a line, note writes one into log.txt alone. skipped: number of steps, so far.
    """

    def __init__(self, config: TrainConfig, dataset: Any, log: Callable[[str], None], note: Callable[[str], None]):
        self.config, self.dataset, self.log, self.note = config, dataset, log, note
        self.skipped = 0
        self.window: deque[bool] = deque(maxlen=WINDOW)
        self.waiting: list[tuple[int, Tensor]] = []

    def add(self, step: int, skipped: Tensor) -> None:
        """Step number `step`, and 1.0 on the device where it was skipped."""
        self.waiting.append((step, skipped))

    def check(self) -> None:
        """Prints the steps skipped since the last check. Raises UserError if MOST of WINDOW steps were."""
        if not self.waiting:
            return
        flags = torch.stack([skipped for _, skipped in self.waiting]).tolist()
        bad = [step for (step, _), flag in zip(self.waiting, flags, strict=True) if flag]
        self.waiting.clear()
        self.skipped += len(bad)
        self.window.extend(bool(flag) for flag in flags)
        for step in bad:
            self.note(f"Step {step}, which was skipped, was of the images {', '.join(map(str, self.images(step)))}")
        if bad:
            self.log(
                f"Skipped {len(bad)} of the last {count(len(flags), 'step')}: gradients were not finite "
                f"({self.skipped} in all); the last was {self.describe(bad[-1])}"
            )
        if bad and sum(self.window) >= MOST:
            precision = ", --precision=fp32" if self.config.precision != "fp32" else ""
            raise UserError(
                f"{MOST} of the last {WINDOW} steps had no finite gradients, the last of them "
                f"{self.describe(bad[-1])}; what was saved before is intact. Try a lower --lr{precision}, "
                "or look at the data"
            )

    def images(self, step: int) -> list[int]:
        """Which images of the data set a step was of, as numbers in the order of its files."""
        batch, order = self.config.batch, Order(len(self.dataset), self.config.seed)
        return [self.dataset.get_details(i).raw_idx for i in order.indices(step * batch, (step + 1) * batch)]

    def describe(self, step: int) -> str:
        """A step and its images for people."""
        images = self.images(step)
        rest = f" and {len(images) - SHOWN} more (log.txt names them)" if len(images) > SHOWN else ""
        return f"step {step}, of the data set's images {', '.join(map(str, images[:SHOWN]))}{rest}"
