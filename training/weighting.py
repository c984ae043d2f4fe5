"""How much an error in a student's answer counts, by the noise levels of its jump: the loss weightings of distillation.

A weighting maps (t, s, sigma_data) to a factor: t and s are float64 tensors [N, 1, 1, 1], the levels where the jump
starts and ends; sigma_data is the network's own, None under VP, VE and iDDPM preconditioning. To add one, write a
function and give it a name in `WEIGHTINGS`; `--weighting` offers it from then on. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def edm(t: Tensor, s: Tensor, sigma_data: float | None) -> Tensor:
    """1 / c_out^2 (Karras et al. 2022, Table 1): an unweighted loss in the network's own output space.

    (t^2 + sigma_data^2) / (t sigma_data)^2 under EDM preconditioning, 1 / t^2 under VP, VE and iDDPM.
    """
    return 1 / t**2 if sigma_data is None else (t**2 + sigma_data**2) / (t * sigma_data) ** 2


def snr_trunc(t: Tensor, s: Tensor, sigma_data: float | None) -> Tensor:
    """max(1 / t^2, 1): truncated SNR (Salimans & Ho 2022)."""
    return (1 / t**2).clamp(min=1)


def snr_plus_one(t: Tensor, s: Tensor, sigma_data: float | None) -> Tensor:
    """1 / t^2 + 1: SNR + 1 (Salimans & Ho 2022)."""
    return 1 / t**2 + 1


def landing(t: Tensor, s: Tensor, sigma_data: float | None) -> Tensor:
    """(1 - s/t)^2: counts the error in the image on which the jump lands, in pixel values."""
    return (1 - s / t) ** 2


def jump(t: Tensor, s: Tensor, sigma_data: float | None) -> Tensor:
    """`landing` in units of c_out(t)."""
    return edm(t, s, sigma_data) * (1 - s / t) ** 2


def geomean(t: Tensor, s: Tensor, sigma_data: float | None) -> Tensor:
    """(1 - s/t)^2 / c_out: the geometric mean of `jump` and `landing`. The default (docs/results.md)."""
    return edm(t, s, sigma_data).sqrt() * (1 - s / t) ** 2


def endpoint(t: Tensor, s: Tensor, sigma_data: float | None) -> Tensor:
    """`landing`, less what the rest of the way down shrinks it for Gaussian data of deviation 4 sigma_data.

    sigma_data counts as 0.5 where the network has none.
    """
    return (1 - s / t) ** 2 / (1 + (s / (4 * (sigma_data or 0.5))) ** 2)


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, float | None], Tensor]] = {
    "edm": edm,
    "snr-trunc": snr_trunc,
    "snr+1": snr_plus_one,
    "jump": jump,
    "geomean": geomean,
    "landing": landing,
    "endpoint": endpoint,
}
