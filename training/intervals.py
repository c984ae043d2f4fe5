"""Which jump of a student an image trains: all alike, or more often those with a large loss. An interval is the index
of a jump.

A stage starts from a copy of its teacher and most of its jumps are nearly right at once; the others have nearly all of
the loss. Drawing interval i with probability p_i and dividing its loss by n p_i leaves the expected gradient as it is:
only its noise changes, and how many images are spent on jumps that have nothing to learn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_utils import distributed as dist

from .config import INTERVALS
from .draws import RandomSource

MEMORY = 0.98  # of the running means per step: they look back some 50 steps
UNIFORM_PART = 0.1  # of all draws, whatever the losses: nothing is forgotten, and 1 / (n p) is at most 10
ENOUGH = 16.0  # images, counted like the means, that every interval needs before `loss` leaves the uniform start


class Intervals:
    """Draws the interval of every image, of n, by a rule: `uniform`, p_i = 1 / n, or `loss`, where a tenth of p_i is
    uniform and the rest in proportion to the interval's mean loss. (Least noise would be its square root, roughly; the
    more eager rule measured better, see docs/results.md.)
    """

    def __init__(self, count: int, rule: str = "uniform", device: torch.device | str = "cpu") -> None:
        if rule not in INTERVALS:
            raise ValueError(f"unknown rule {rule!r}; there are {', '.join(INTERVALS)}")
        self.count, self.rule = count, rule
        self.seen = torch.zeros(2, count, dtype=torch.float64, device=device)  # fading: images, sum of their losses
        self.new = torch.zeros(count, 3, dtype=torch.float64, device=device)  # of this process, since `end_step`

    def probabilities(self) -> Tensor:
        """p, float64 [count]."""
        uniform = torch.full_like(self.seen[0], 1 / self.count)
        if self.rule == "uniform":
            return uniform
        images, total = self.seen
        need = total / images.clamp(min=1e-12)
        known = (images >= ENOUGH).all() & (need.sum() > 0)
        mixed = UNIFORM_PART * uniform + (1 - UNIFORM_PART) * need / need.sum().clamp(min=1e-300)
        return torch.where(known, mixed, uniform)

    def draw(self, draws: RandomSource, images: int) -> tuple[Tensor, Tensor]:
        """The interval of each image, int64 [images], and 1 / (n p) of each, float64 [images]."""
        if self.rule == "uniform":
            interval = draws.randint(self.count, images)
            return interval, torch.ones_like(interval, dtype=torch.float64)
        p = self.probabilities()
        place = draws.rand(images).to(torch.float64)
        interval = torch.searchsorted(p.cumsum(0), place, right=True).clamp(max=self.count - 1)
        return interval, 1 / (self.count * p[interval])

    def note(self, interval: Tensor, losses: Tensor) -> None:
        """Takes note of the loss [images] of each image, before the factor 1 / (n p)."""
        values = losses.detach().to(torch.float64)
        self.new.index_add_(0, interval, torch.stack([torch.ones_like(values), values, values.square()], dim=1))

    def end_step(self) -> Tensor:
        """Once a step: learns from what all processes have noted, and starts afresh.

        Returns what this process has noted: count, sum and sum of squares of each interval's losses, float64 [n, 3].
        A step with a loss that is not finite adds nothing to the means.
        """
        noted = self.new.clone()
        self.new.zero_()
        if self.rule == "loss":
            total = noted[:, :2].T.contiguous()
            dist.all_reduce_sum([total])
            self.seen.mul_(MEMORY).add_(torch.where(total.isfinite().all(), total, torch.zeros_like(total)))
        return noted

    def state_dict(self) -> dict[str, Any]:
        """For a training state: what has been learnt."""
        return {"seen": self.seen.cpu()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Raises ValueError for those of another number of intervals."""
        seen = values["seen"]
        if seen.shape != self.seen.shape or seen.dtype != self.seen.dtype:
            raise ValueError(f"losses of {tuple(seen.shape)} intervals, expected {tuple(self.seen.shape)}")
        self.seen.copy_(seen)
