"""Training losses. Each maps (net, clean images) to a loss for every pixel, which the training loop sums.

The constructor arguments of VPLoss, VELoss and EDMLoss are EDM's. All losses share one calling convention:

    loss(net, images, labels=None, augment_pipe=None, draws=None) -> float32 [N, C, H, W]

images in [-1, 1], labels one-hot [N, label_dim] or None. Random numbers come from `draws` (training.draws), or from
torch's default generator in EDM's order: noise level or interval, augmentation, noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .draws import DefaultSource, RandomSource
from .grids import NoiseGrid
from .intervals import Intervals
from .solvers import Denoiser, jump_target, segment_landing, teacher_landing

AugmentPipe = Callable[..., tuple[Tensor, Tensor]]


def _augment(net: Any, images: Tensor, pipe: AugmentPipe | None, draws: RandomSource) -> tuple[Tensor, Tensor | None]:
    """Augmented images and their labels. Without a pipe, a network that expects labels gets zeros: the same function
    as none at all, and the weights that read them stay part of the graph."""
    if pipe is not None:
        return pipe(images, draws)
    reader = getattr(getattr(net, "model", None), "map_augment", None)
    return images, images.new_zeros([len(images), reader.weight.shape[1]]) if reader is not None else None


def _call(net: Any, x: Tensor, sigma: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
    extra = {} if augment_labels is None else {"augment_labels": augment_labels}
    denoised: Tensor = net(x, sigma, labels, **extra)
    return denoised


class _DenoisingLoss(ABC):
    """weight(sigma) * (D(y + sigma n; sigma) - y)^2 with a noise level of the subclass's own distribution."""

    @abstractmethod
    def noise_level(self, draws: RandomSource, count: int) -> Tensor:
        """Noise levels [count, 1, 1, 1]."""

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of each noise level, like `sigma`."""
        return 1 / sigma**2

    def __call__(
        self,
        net: Any,
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: AugmentPipe | None = None,
        draws: RandomSource | None = None,
    ) -> Tensor:
        draws = draws or DefaultSource(images.device)
        sigma = self.noise_level(draws, len(images))
        clean, augment_labels = _augment(net, images, augment_pipe, draws)
        noisy = clean + sigma * draws.randn(*clean.shape)
        return self.weight(sigma) * (_call(net, noisy, sigma, labels, augment_labels) - clean) ** 2


class VPLoss(_DenoisingLoss):
    """Variance-preserving training of Song et al. 2021, in EDM's variables (Karras et al. 2022, Table 1, column VP)."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5) -> None:
        self.beta_d, self.beta_min, self.epsilon_t = beta_d, beta_min, epsilon_t

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at time t in [0, 1]: sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def noise_level(self, draws: RandomSource, count: int) -> Tensor:
        return self.sigma(1 + draws.rand(count, 1, 1, 1) * (self.epsilon_t - 1))


class VELoss(_DenoisingLoss):
    """Variance-exploding training of Song et al. 2021 (Table 1, column VE): ln sigma uniform."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def noise_level(self, draws: RandomSource, count: int) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** draws.rand(count, 1, 1, 1)


class EDMLoss(_DenoisingLoss):
    """Karras et al. 2022, Table 1, last column: ln sigma ~ N(P_mean, P_std^2), weight 1 / c_out(sigma)^2."""

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5) -> None:
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def noise_level(self, draws: RandomSource, count: int) -> Tensor:
        return (draws.randn(count, 1, 1, 1) * self.P_std + self.P_mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        return edm_weight(sigma, self.sigma_data)


# ---------------------------------------------------------------------------------------------------------------------
# Progressive distillation


def edm_weight(t: Tensor, sigma_data: float | None) -> Tensor:
    """1 / c_out^2: (t^2 + sigma_data^2) / (t sigma_data)^2 under EDM preconditioning, 1 / t^2 under VP, VE and iDDPM
    (sigma_data None). Equals an unweighted loss in the network's own output space."""
    return 1 / t**2 if sigma_data is None else (t**2 + sigma_data**2) / (t * sigma_data) ** 2


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, float | None], Tensor]] = {
    "edm": lambda t, s, sigma_data: edm_weight(t, sigma_data),
    "snr-trunc": lambda t, s, sigma_data: (1 / t**2).clamp(min=1),
    "snr+1": lambda t, s, sigma_data: 1 / t**2 + 1,
    "jump": lambda t, s, sigma_data: edm_weight(t, sigma_data) * (1 - s / t) ** 2,
    "geomean": lambda t, s, sigma_data: edm_weight(t, sigma_data).sqrt() * (1 - s / t) ** 2,
    "landing": lambda t, s, sigma_data: (1 - s / t) ** 2,
    "endpoint": lambda t, s, sigma_data: (1 - s / t) ** 2 / (1 + (s / (4 * (sigma_data or 0.5))) ** 2),
}
"""lambda(t, s, sigma_data): how much an error in the student's answer counts on the jump from t to s.

edm        1 / c_out^2 of the network's own preconditioning
snr-trunc  max(1 / t^2, 1): truncated SNR of Salimans & Ho 2022
snr+1      1 / t^2 + 1: SNR + 1 of Salimans & Ho 2022
jump       edm times (1 - s/t)^2: the error in the image on which the jump lands, in units of c_out(t)
landing    (1 - s/t)^2: the same error, in pixel values
geomean    the geometric mean of jump and landing
endpoint   landing, less what the rest of the way down shrinks it (for Gaussian data of deviation 4 sigma_data; 2
           where the network has no sigma_data)
"""


@dataclass
class Jump:
    """A batch of jumps that a student is to learn. All noise levels are [N, 1, 1, 1], everything float64."""

    interval: Tensor  # [N] int64: which of the loss's `starts`
    x: Tensor  # noisy images at t
    t: Tensor
    s: Tensor
    target: Tensor  # the denoiser output that makes the jump land where the teacher does
    augment_labels: Tensor | None


class EDMDistillationLoss:
    """One stage of progressive distillation (Salimans & Ho 2022, Alg. 2, in EDM's variables).

    teacher       network in eval mode without gradients; it is no part of what is trained or stored
    grid          the teacher's noise grid, N steps from sigma_max to 0
    ratio         teacher steps per student step K; the student's grid is every K-th level, the last one 0
    solver        'heun' for an undistilled teacher, 'euler' for a student
    weighting     a name in WEIGHTINGS
    intervals     'loss' or 'uniform': how often each jump is trained (training.intervals)
    self_teacher  None, or the student's own moving average: then the teacher makes one step only, from any of its
                  levels, and the self-teacher jumps from there to the end of the segment of K (TRACT, Berthelot et al.
                  2023; with a single segment, consistency distillation, Song et al. 2023)

    `starts` are the levels at which jumps begin: the student's, or with a self-teacher all of the teacher's.
    """

    def __init__(
        self,
        teacher: Any,
        grid: NoiseGrid,
        ratio: int = 2,
        solver: str = "heun",
        weighting: str = "geomean",
        intervals: str = "loss",
        self_teacher: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {weighting!r}; there are {', '.join(WEIGHTINGS)}")
        if solver not in ("heun", "euler"):
            raise ValueError(f"unknown solver {solver!r}; there are heun and euler")
        self.teacher, self.grid, self.ratio, self.solver, self.weighting = teacher, grid, ratio, solver, weighting
        self.self_teacher = self_teacher
        self.student_grid = grid.every(ratio)
        self.starts = (self.student_grid if self_teacher is None else grid).levels[:-1]
        self.intervals = Intervals(len(self.starts), intervals, device)
        self._levels: Tensor | None = None

    def levels(self, interval: Tensor) -> Tensor:
        """The teacher's levels from each image's start to where its jump ends: float64 [K + 1, N, 1, 1, 1].

        With a self-teacher [3, N, 1, 1, 1]: start, end of the teacher's one step, end of the segment.
        """
        if self._levels is None or self._levels.device != interval.device:
            self._levels = torch.tensor(self.grid.levels, dtype=torch.float64, device=interval.device)
        if self.self_teacher is None:
            index = torch.arange(self.ratio + 1, device=interval.device)[:, None] + interval * self.ratio
        else:
            index = torch.stack([interval, interval + 1, (interval // self.ratio + 1) * self.ratio])
        return self._levels[index].reshape(len(index), -1, 1, 1, 1)

    @torch.no_grad()
    def jumps(
        self,
        clean: Tensor,
        interval: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Jump:
        """Where the teacher goes: noises `clean` to the start of each image's interval, runs the teacher over its K
        sub-steps, and asks for the denoiser output that gets there in one jump. float64 throughout, because an error
        in the landing grows by t / (t - s) in the target; the network itself sees what its own precision sees."""

        def denoiser(net: Any) -> Denoiser:
            return lambda x, sigma: _call(net, x, sigma.flatten(), labels, augment_labels).to(torch.float64)

        levels = self.levels(interval)
        x = clean.to(torch.float64) + levels[0] * noise.to(torch.float64)
        if self.self_teacher is None:
            landing = teacher_landing(denoiser(self.teacher), x, levels, self.solver)
        else:
            landing = segment_landing(denoiser(self.teacher), denoiser(self.self_teacher), x, levels, self.solver)
        return Jump(interval, x, levels[0], levels[-1], jump_target(x, landing, levels[0], levels[-1]), augment_labels)

    def __call__(
        self,
        net: Any,
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: AugmentPipe | None = None,
        draws: RandomSource | None = None,
    ) -> Tensor:
        """The loss of every pixel (module docstring); also notes each interval's loss for `intervals`."""
        draws = draws or DefaultSource(images.device)
        interval, correction = self.intervals.draw(draws, len(images))
        clean, augment_labels = _augment(net, images, augment_pipe, draws)
        jump = self.jumps(clean, interval, draws.randn(*clean.shape), labels, augment_labels)
        answer = _call(net, jump.x, jump.t.flatten(), labels, augment_labels)
        weight = WEIGHTINGS[self.weighting](jump.t, jump.s, getattr(net, "sigma_data", None))
        loss = weight.to(answer.dtype) * (answer - jump.target.to(answer.dtype)) ** 2
        self.intervals.note(interval, loss.flatten(1).mean(dim=1))
        return loss if self.intervals.rule == "uniform" else loss * correction.to(loss.dtype).reshape(-1, 1, 1, 1)
