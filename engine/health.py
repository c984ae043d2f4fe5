"""Numbers going wrong: steps that had to be skipped, and losses that jump.

A step leaves two numbers on the device; they are fetched together when a tick ends or a state is saved, so that no step
waits for the device. What is found is said in one line each. Which images a step was of is a function of its number.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dnnlib.errors import UserError
from training.config import TrainConfig
from training.loader import Order

WINDOW = 100  # steps; the run ends when MOST of them had to be skipped
MOST = 50
HISTORY = 256  # steps that a loss is compared with
ENOUGH = 64  # of them, before any comparison
FACTOR = 2.0  # a spike is so many times their median,
DEVIATIONS = 8.0  # and so many of their deviations away
NORMAL = 1.4826  # a normal distribution's deviation in its median absolute values
SHOWN = 16  # images named on the screen


class Health:
    """What became of a run's steps. The same on every process: losses and gradients are summed before they come here.

    skipped: how many steps were, so far. losses: of the last HISTORY steps whose loss was finite, oldest first.
    """

    def __init__(self, config: TrainConfig, dataset: Any, say: Callable[[str], None], note: Callable[[str], None]):
        self.config, self.dataset, self.say, self.note = config, dataset, say, note
        self.skipped = 0
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.window: deque[bool] = deque(maxlen=WINDOW)
        self.waiting: list[tuple[int, Tensor, Tensor]] = []

    def add(self, step: int, loss: Tensor, skipped: Tensor) -> None:
        """Step number `step`: its loss as count, sum, sum of squares (float64 [3]), and 1.0 where it was skipped."""
        self.waiting.append((step, loss, skipped))

    def check(self, tick_so_far: str) -> None:
        """Prints what is wrong with the steps since the last check.

        tick_so_far: the loss of the whole tick, in words. Raises UserError if MOST of WINDOW steps were skipped.
        """
        if not self.waiting:
            return
        steps = [step for step, _, _ in self.waiting]
        moments = torch.stack([loss for _, loss, _ in self.waiting]).tolist()
        flags = torch.stack([skipped for _, _, skipped in self.waiting]).tolist()
        self.waiting.clear()

        bad = [step for step, flag in zip(steps, flags, strict=True) if flag]
        self.skipped += len(bad)
        self.window.extend(bool(flag) for flag in flags)
        for step in bad:
            self.note(f"Step {step}, which was skipped, was of the images {', '.join(map(str, self.images(step)))}")
        if bad:
            self.say(
                f"Skipped {len(bad)} of the last {len(steps)} steps: gradients were not finite ({self.skipped} in "
                f"all); the last was {self.describe(bad[-1])}"
            )
        spikes = []
        for step, (count, total, _) in zip(steps, moments, strict=True):
            loss = total / count
            if is_spike(loss, self.losses):
                spikes.append((loss, step, statistics.fmean(self.losses)))
            if 0 < loss < math.inf:
                self.losses.append(loss)
        if spikes:
            loss, step, mean = max(spikes)
            more = f", the highest of {len(spikes)} such steps" if len(spikes) > 1 else ""
            self.say(
                f"Loss spike: {loss:.5g} at step {step}{more}, where the mean of the steps before was {mean:.5g}; "
                f"{tick_so_far}"
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
        batch, order = self.config.batch_size, Order(len(self.dataset), self.config.seed)
        return [self.dataset.get_details(i).raw_idx for i in order.indices(step * batch, (step + 1) * batch)]

    def describe(self, step: int) -> str:
        """A step and its images for people."""
        images = self.images(step)
        rest = f" and {len(images) - SHOWN} more (log.txt names them)" if len(images) > SHOWN else ""
        return f"step {step}, of the data set's images {', '.join(map(str, images[:SHOWN]))}{rest}"


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a step's loss stands out from those before: FACTOR times their median at least, and DEVIATIONS of them
    off, in the logarithm, because the losses of small batches are skewed.

    Deviations are estimated from the median difference of neighbours, which neither earlier spikes nor a falling loss
    alter much. In nine normal runs (6689 steps, batches of 8 to 64, all kinds of loss) 4.4 of them was the most. NaN is
    no spike: its step has been skipped and told.
    """
    if len(before) < ENOUGH or not loss > FACTOR * statistics.median(before):
        return False
    logs = list(map(math.log, before))
    deviation = NORMAL * statistics.median(abs(b - a) for a, b in pairwise(logs)) / math.sqrt(2)
    return math.log(loss) - statistics.median(logs) > DEVIATIONS * deviation
