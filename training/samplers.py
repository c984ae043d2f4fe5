"""Samplers: from latents to images. Each reads like its algorithm in Karras et al. 2022 ("the paper").

The state is kept in float64; the network casts it to its own precision and its answer is widened again. A `net` is
called as `net(x, sigma, class_labels)` with x [N, C, H, W] and a 0-d sigma, and has `sigma_min`, `sigma_max` and
`round_sigma`. Latents are standard normal [N, C, H, W]; images come back as float64 of the same shape, in [-1, 1] as
far as the network keeps to it. Noise levels and times are Python floats: no step waits for a device to know them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .grids import check_count, clamped, karras_levels, rounded
from .sampler_table import SOLVERS
from .solvers import Denoiser, euler_jump, heun_step

RandnLike = Callable[[Tensor], Tensor]

# ----------------------------------------------------------------------------------------------------------------------
# Randomness


class StackedRandomGenerator:
    """One random generator per image, so that an image depends on its own seed and not on its batch.

    Seeds count modulo 2^32. The first axis of every `size` is the number of images.
    """

    def __init__(self, device: torch.device | str, seeds: Sequence[int] | Tensor) -> None:
        self.generators = [torch.Generator(device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def randn(self, size: Sequence[int], **kwargs: Any) -> Tensor:
        """Standard normal numbers of shape `size`."""
        return self._stacked(torch.randn, size, kwargs)

    def randn_like(self, input: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of `input`."""
        return self.randn(input.shape, dtype=input.dtype, layout=input.layout, device=input.device)

    def randint(self, *args: int, size: Sequence[int], **kwargs: Any) -> Tensor:
        """Whole numbers of shape `size`, from the half-open range `*args` as in `torch.randint`."""
        return self._stacked(partial(torch.randint, *args), size, kwargs)

    def _stacked(self, draw: Callable[..., Tensor], size: Sequence[int], kwargs: dict[str, Any]) -> Tensor:
        if len(size) < 1 or size[0] != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds cannot fill a batch of shape {tuple(size)}")
        return torch.stack([draw(tuple(size[1:]), generator=each, **kwargs) for each in self.generators])


# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def nfe(steps: int, solver: str) -> int:
    """Network calls per image of `steps` steps of a solver in SOLVERS."""
    return SOLVERS[solver].nfe(steps)


def grid_sampler(
    net: Any,
    latents: Tensor,
    levels: Sequence[float],
    solver: str = "euler",
    class_labels: Tensor | None = None,
    *,
    randn_like: RandnLike = torch.randn_like,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
) -> Tensor:
    """Steps down `levels`, sigma_max first, 0 last: Alg. 2 of the paper, without churn Alg. 1.

    solver: 'euler' (a student's jumps) or 'heun'. Makes `nfe(len(levels) - 1, solver)` network calls. With S_churn > 0,
    noise is drawn at every step, used or not, so that a seed's stream does not depend on S_min and S_max. Raises
    ValueError for another solver.
    """
    _check_choice("solver", solver, ("heun", "euler"))
    denoise = _denoiser(net, class_labels)
    x = latents.to(torch.float64) * levels[0]
    for t, t_next in pairwise(levels):
        t_hat, x_hat = t, x
        if S_churn > 0:  # Fresh noise, from t up to t_hat.
            t_hat = _churned(net, t, len(levels) - 1, S_churn, S_min, S_max)
            x_hat = x + math.sqrt(max(t_hat**2 - t**2, 0)) * S_noise * randn_like(x)
        # Euler step from t_hat to t_next; for Heun with the second-order correction, unless t_next is 0.
        sigma, sigma_next = _scalar(t_hat, x), _scalar(t_next, x)
        if solver == "heun" and t_next > 0:
            x = heun_step(denoise, x_hat, sigma, sigma_next)
        else:
            x = euler_jump(x_hat, denoise(x_hat, sigma), sigma, sigma_next)
    return x


def edm_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
) -> Tensor:
    """Alg. 2 of the paper with Heun's method on the levels of eq. 5; without churn (the default) Alg. 1.

    The noise range is clamped to the network's, the levels are rounded to those it knows. One step is a single jump
    from sigma_max to 0. Raises ValueError for fewer than one step or an empty noise range.
    """
    levels = [*noise_levels(net, "edm", num_steps, sigma_min, sigma_max, rho), 0.0]
    churn: dict[str, Any] = {"S_churn": S_churn, "S_min": S_min, "S_max": S_max, "S_noise": S_noise}
    return grid_sampler(net, latents, levels, "heun", class_labels, randn_like=randn_like, **churn)


def dpmpp2m_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    levels: Sequence[float] | None = None,
) -> Tensor:
    """DPM-Solver++(2M), Alg. 2 of Lu et al. 2022 (arXiv:2211.01095), in EDM's variables: alpha = 1, lambda = -ln sigma.

    Second order for one network call per step: the denoiser is extrapolated from this step's answer and the last one's.
    Noise levels as in `edm_sampler`, or `levels`, the last one 0; no noise is drawn. Raises ValueError as it does.
    """
    sigmas = levels or [*noise_levels(net, "edm", num_steps, sigma_min, sigma_max, rho), 0.0]
    denoise = _denoiser(net, class_labels)
    x = latents.to(torch.float64) * sigmas[0]
    D_last, h_last = x, math.inf
    for sigma, sigma_next in pairwise(sigmas):
        D = denoise(x, _scalar(sigma, x))
        # Step in lambda, and the denoiser in the middle of it; the first step and the one to 0 are of first order.
        h = math.log(sigma / sigma_next) if sigma_next > 0 else 0.0
        D_middle = D + h / (2 * h_last) * (D - D_last)
        # The exact solution for a denoiser that stays as it is.
        x = euler_jump(x, D_middle, _scalar(sigma, x), _scalar(sigma_next, x))
        D_last, h_last = D, h
    return x


def ablation_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
) -> Tensor:
    """Alg. 3 of the paper, any sigma(t) and s(t), with Alg. 2's churn: the 48 samplers of its ablations.

    solver euler|heun (heun: second order, `alpha` = 1 Heun's, 1/2 the midpoint, 2/3 Ralston's method); discretization
    vp|ve|iddpm|edm; schedule vp|ve|linear; scaling vp|none. See `edm_sampler` for what is common to both. Raises
    ValueError for other names, fewer than one step or an empty noise range.
    """
    _check_choice("solver", solver, ("euler", "heun"))
    _check_choice("schedule", schedule, ("vp", "ve", "linear"))
    _check_choice("scaling", scaling, ("vp", "none"))
    levels = noise_levels(net, discretization, num_steps, sigma_min, sigma_max, rho, epsilon_s, C_1, C_2, M)
    vp = vp_schedule(*vp_betas(*noise_range(net, discretization, sigma_min, sigma_max, epsilon_s), epsilon_s))
    time = {"vp": vp, "ve": VE_SCHEDULE, "linear": LINEAR_SCHEDULE}[schedule]
    denoise = _denoiser(net, class_labels)

    def scale(t: float) -> float:
        return 1 / math.sqrt(1 + time.sigma(t) ** 2) if scaling == "vp" else 1.0

    def scale_derivative(t: float) -> float:
        return -time.sigma(t) * time.derivative(t) * scale(t) ** 3 if scaling == "vp" else 0.0

    def slope(x: Tensor, t: float) -> Tensor:  # dx/dt: eq. 4 with the score written through the denoiser
        sigma, s = time.sigma(t), scale(t)
        growth = time.derivative(t) / sigma
        denoised = denoise(x / s, _scalar(sigma, x))
        return (growth + scale_derivative(t) / s) * x - growth * s * denoised

    times = [*map(time.inverse, levels), 0.0]
    x = latents.to(torch.float64) * (time.sigma(times[0]) * scale(times[0]))
    for i, (t, t_next) in enumerate(pairwise(times)):
        # Fresh noise, from sigma(t) up to sigma(t_hat); without churn too, see `vp_schedule`.
        noise = randn_like(x)
        sigma = time.sigma(t)
        t_hat = time.inverse(_churned(net, sigma, num_steps, S_churn, S_min, S_max))
        added = math.sqrt(max(time.sigma(t_hat) ** 2 - sigma**2, 0))
        x_hat = scale(t_hat) / scale(t) * x + added * scale(t_hat) * S_noise * noise
        # Euler step.
        h = t_next - t_hat
        d = slope(x_hat, t_hat)
        x = x_hat + h * d
        # Second-order correction, with the slope at the fraction alpha of the step.
        if solver == "heun" and i < num_steps - 1:
            d_prime = slope(x_hat + alpha * h * d, t_hat + alpha * h)
            x = x_hat + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)
    return x


def _churned(net: Any, level: float, num_steps: int, S_churn: float, S_min: float, S_max: float) -> float:
    """The level to which Alg. 2 raises `level` before a step: (1 + gamma) level, as the network knows it."""
    gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= level <= S_max else 0.0
    return rounded(net.round_sigma, np.array([level + gamma * level]))[0] if gamma > 0 else level


def _denoiser(net: Any, class_labels: Tensor | None) -> Denoiser:
    """`net` as a function of image and noise level alone, answering in float64."""
    return lambda x, sigma: net(x, sigma, class_labels).to(torch.float64)


def _scalar(value: float, like: Tensor) -> Tensor:
    """A 0-d float64 tensor on the device of `like`, filled there so that nothing waits for a copy."""
    return torch.full((), value, dtype=torch.float64, device=like.device)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


# ----------------------------------------------------------------------------------------------------------------------
# Noise levels and schedules: Table 1 of the paper


@dataclass(frozen=True)
class Schedule:
    """sigma(t), its derivative and its inverse."""

    sigma: Callable[[float], float]
    derivative: Callable[[float], float]
    inverse: Callable[[float], float]


def vp_schedule(beta_d: float, beta_min: float) -> Schedule:
    """Variance preserving: sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t).

    Not exp, expm1 or log1p, on purpose: the published sampler goes sigma -> t -> sigma at every step, and the square
    root of what rounding leaves (1e-7, times the noise) is part of its images.
    """

    def sigma(t: float) -> float:
        return math.sqrt(math.e ** (0.5 * beta_d * t**2 + beta_min * t) - 1)

    def derivative(t: float) -> float:
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    def inverse(level: float) -> float:
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log(level**2 + 1)) - beta_min) / beta_d

    return Schedule(sigma, derivative, inverse)


VE_SCHEDULE = Schedule(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda level: level**2)
LINEAR_SCHEDULE = Schedule(lambda t: t, lambda t: 1.0, lambda level: level)


def vp_betas(sigma_min: float, sigma_max: float, epsilon_s: float) -> tuple[float, float]:
    """(beta_d, beta_min) for which VP's sigma(t) is sigma_min at epsilon_s and sigma_max at 1 (Appendix C.1)."""
    low, high = math.log(sigma_min**2 + 1), math.log(sigma_max**2 + 1)
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    return beta_d, high - 0.5 * beta_d


def noise_range(
    net: Any, discretization: str, sigma_min: float | None, sigma_max: float | None, epsilon_s: float = 1e-3
) -> tuple[float, float]:
    """(sigma_min, sigma_max), the discretization's own where None, clamped to what the network covers."""
    _check_choice("discretization", discretization, ("vp", "ve", "iddpm", "edm"))
    vp = vp_schedule(beta_d=19.9, beta_min=0.1)
    own = {"vp": (vp.sigma(epsilon_s), vp.sigma(1)), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}
    low, high = own[discretization]
    return clamped(net, low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)


def noise_levels(
    net: Any,
    discretization: str,
    num_steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7,
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
) -> list[float]:
    """The noise levels that the samplers visit, without 0: row "time steps" of Table 1 over what `noise_range` gives,
    rounded to levels that the network knows. A single step starts at sigma_max.

    Raises ValueError for fewer than one step and for an empty noise range.
    """
    low, high = noise_range(net, discretization, sigma_min, sigma_max, epsilon_s)
    check_count(num_steps)
    ramp = np.arange(num_steps, dtype=np.float64) / max(num_steps - 1, 1)
    if discretization == "edm":
        levels = karras_levels(num_steps, low, high, rho)
    elif discretization == "ve":
        levels = np.asarray(high * (low / high) ** ramp)
    elif discretization == "vp":
        vp = vp_schedule(*vp_betas(low, high, epsilon_s))
        levels = np.array([vp.sigma(t) for t in 1 + ramp * (epsilon_s - 1)])
    else:
        table = iddpm_table(M, C_1, C_2)
        table = table[(table >= low) & (table <= high)]
        if len(table) == 0:
            raise ValueError(f"iDDPM's table has no noise level between {low:g} and {high:g}")
        levels = table[np.rint((len(table) - 1) * ramp).astype(int)]
    return rounded(net.round_sigma, levels)


def iddpm_table(M: int, C_1: float, C_2: float) -> np.ndarray:
    """The noise levels u_0 > ... > u_M = 0 of iDDPM (Appendix C.3): float64 [M + 1].

    The ratios of alpha-bar are float32 on purpose: that is how the published samplers compute them, and it moves the
    smallest levels by up to 4.6e-4 of their value.
    """
    j = torch.arange(M + 1)
    alpha_bar = (0.5 * math.pi * j / M / (C_2 + 1)).sin() ** 2
    u = [0.0]
    for ratio in reversed((alpha_bar[:-1] / alpha_bar[1:]).clip(min=C_1).tolist()):
        u.append(math.sqrt((u[-1] ** 2 + 1) / ratio - 1))
    return np.array(u[::-1])
