"""Training losses. Each maps (net, clean images) to a loss for every pixel, which the training loop sums.

The constructor arguments of VPLoss, VELoss and EDMLoss are EDM's. All losses share one calling convention:

    loss(net, images, labels=None, augment_pipe=None, draws=None) -> float32 [N, C, H, W]

images in [-1, 1], labels one-hot [N, label_dim] or None. Random numbers come from `draws` (training.draws), or from
torch's default generator in EDM's order: noise level or interval, augmentation, noise. `training.distillation` has the
losses of distillation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import weighting
from .augment import augment_batch, call_network
from .distillation import EDMDistillationLoss as EDMDistillationLoss  # the place that EDM and its forks have it in
from .draws import RandomSource


class _DenoisingLoss(ABC):
    """weight(sigma) * (D(y + sigma n; sigma) - y)^2 with a noise level of the subclass's own distribution."""

    intervals = None  # a loss of distillation has training.intervals.Intervals here

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
        augment_pipe: Callable[..., tuple[Tensor, Tensor]] | None = None,
        draws: RandomSource | None = None,
    ) -> Tensor:
        draws = draws or RandomSource(images.device)
        sigma = self.noise_level(draws, len(images))
        clean, augment_labels = augment_batch(net, images, augment_pipe, draws)
        noisy = clean + sigma * draws.randn(*clean.shape)
        return self.weight(sigma) * (call_network(net, noisy, sigma, labels, augment_labels) - clean) ** 2


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
        return weighting.edm(sigma, sigma, self.sigma_data)
