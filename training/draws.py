"""Where random numbers come from.

In training, what is drawn for an image depends only on the seed and on the image's position in the run. So the numbers
of one step are drawn for the whole batch, from a generator keyed by (seed, step), and every process and every round of
gradient accumulation takes its own slice: world size, accumulation and resumption change nothing. (Dropout masks, which
networks draw for themselves, are the exception: they are repeatable, but depend on how a batch is divided.)

Losses and augmentation ask a `RandomSource`: torch's default generator, unless they are given a part of a step's draws.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


class RandomSource:
    """torch's default generator of `device`, one draw after another: EDM's order of consumption."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def randn(self, *shape: int, batch_dim: int = 0) -> Tensor:
        """Standard normal, float32. Axis `batch_dim` counts images, here and below."""
        return self._draw("randn", shape, batch_dim)

    def rand(self, *shape: int, batch_dim: int = 0) -> Tensor:
        """Uniform in [0, 1), float32."""
        return self._draw("rand", shape, batch_dim)

    def randint(self, high: int, *shape: int, batch_dim: int = 0) -> Tensor:
        """Whole numbers in [0, high), int64."""
        return self._draw("randint", shape, batch_dim, high)

    def _draw(self, kind: str, shape: tuple[int, ...], batch_dim: int, *high: int) -> Tensor:
        return draw(kind, shape, high, device=self.device)


def draw(kind: str, shape: tuple[int, ...], high: tuple[int, ...], **where: Any) -> Tensor:
    """torch.randn, rand or randint."""
    values: Tensor = getattr(torch, kind)(*high, shape, **where)
    return values


class StepDraws:
    """The random numbers of one training step, drawn for the whole batch at the first request and then sliced.

    Every slice must ask for the same things in the same order (they run the same code), which is checked.
    """

    def __init__(self, seed: int, step: int, batch_size: int, device: torch.device | str) -> None:
        self.batch_size, self.device = batch_size, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(key(seed, step, "draws"))
        self.drawn: list[tuple[tuple[Any, ...], Tensor]] = []

    def part(self, start: int, stop: int) -> BatchPart:
        """The source for images start ... stop - 1 of the batch."""
        return BatchPart(self, start, stop)

    def get(self, index: int, *wanted: Any) -> Tensor:
        """Draw number `index` of the step, of the whole batch's shape. wanted: kind, shape, upper ends."""
        if index == len(self.drawn):
            self.drawn.append((wanted, draw(*wanted, generator=self.generator, device=self.device)))
        known, values = self.drawn[index]
        if known != wanted:
            raise RuntimeError(f"draw {index} was {known}, now {wanted} is asked for")
        return values


class BatchPart(RandomSource):
    """The random numbers of consecutive images of a batch, see StepDraws."""

    def __init__(self, draws: StepDraws, start: int, stop: int) -> None:
        super().__init__(draws.device)
        self.draws, self.start, self.stop, self.count = draws, start, stop, 0

    def _draw(self, kind: str, shape: tuple[int, ...], batch_dim: int, *high: int) -> Tensor:
        if shape[batch_dim] != self.stop - self.start:
            raise ValueError(f"axis {batch_dim} of {shape} does not count the {self.stop - self.start} images")
        whole = (*shape[:batch_dim], self.draws.batch_size, *shape[batch_dim + 1 :])
        values = self.draws.get(self.count, kind, whole, high)
        self.count += 1
        return values.narrow(batch_dim, self.start, self.stop - self.start)


def key(seed: int, step: int, purpose: str, rank: int = 0) -> int:
    """A 63-bit seed for one purpose at one step. Hashed: neighbouring seeds and steps share nothing."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
