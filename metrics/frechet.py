"""The Fréchet distance between two normal distributions."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from dnnlib.cli import UserError

Array = NDArray[np.float64]

_ASYMMETRY = 1e-5  # of the largest entry: what storing a covariance in float32 may do, with room to spare
_NEGATIVITY = 1e-4  # of the largest eigenvalue, likewise
_SUMMING = 1000  # times the rounding error of one product: what sums over a million images may add up to
_ROOT_ERROR = 1e-9  # of the root's trace: the most that its faster computation may add if all roundings had one sign


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Eq. 6 of Heusel et al. 2017 (arXiv:1706.08500).

    mu: [D], sigma: [D, D] symmetric positive semi-definite, possibly singular; computed in float64.
    Returns a number >= 0. Raises UserError for shapes that don't fit, values that aren't finite and matrices that are
    no covariances.

    With sigma = A A^T the trace of the root is the sum of the singular values of A1^T A2. Unlike the eigenvalues of
    the product, whose roots turn rounding errors of 1e-16 into 1e-8, these are good to the last digits even for
    singular matrices, and no complex or negative number can come up.
    """
    mu1, sigma1 = checked_moments(mu1, sigma1, "the first distribution")
    mu2, sigma2 = checked_moments(mu2, sigma2, "the second distribution")
    if mu1.shape != mu2.shape:
        raise UserError(f"statistics of {len(mu1)} and of {len(mu2)} features can't be compared: two detectors?")
    a1, a2 = _factor(mu1, sigma1, "the first distribution"), _factor(mu2, sigma2, "the second distribution")
    root_trace = _sum_of_singular_values(a1.T @ a2)
    traces = sum(float(np.trace(sigma)) for sigma, a in ((sigma1, a1), (sigma2, a2)) if a.size)
    with np.errstate(over="ignore", invalid="ignore"):
        distance = float(np.square(mu1 - mu2).sum() + traces - 2 * root_trace)
    if not np.isfinite(distance):
        raise UserError("the Fréchet distance is not a finite number: the features are too large for float64")
    return max(distance, 0.0)  # equal distributions may come out at -1e-14


def _sum_of_singular_values(matrix: Array) -> float:
    """By the eigenvalues of matrix^T matrix, more than twice as fast as by the singular values, where that is exact
    enough: the rounding of the largest eigenvalue is an error of all, and of their roots the more, the smaller they
    are."""
    small_side = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    with np.errstate(over="ignore", invalid="ignore"):
        gram = small_side.T @ small_side
    if len(gram) and np.isfinite(gram).all():
        values = np.linalg.eigvalsh(gram)
        rounding = values[-1] * np.sqrt(len(values)) * np.finfo(np.float64).eps
        if values[0] > 0:
            roots = np.sqrt(values)
            if (rounding / (2 * roots)).sum() < _ROOT_ERROR * roots.sum():
                return float(roots.sum())
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def checked_moments(mu: ArrayLike, sigma: ArrayLike, where: str) -> tuple[Array, Array]:
    """(mu [D], sigma [D, D]) as float64, sigma exactly symmetric. Raises UserError, which calls bad ones `where`."""
    try:
        if not {np.asarray(mu).dtype.kind, np.asarray(sigma).dtype.kind} <= set("fiub"):
            raise TypeError("complex numbers, times or texts")
        mu, sigma = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    except (TypeError, ValueError) as exc:
        raise UserError(f"{where}: mu and sigma are not arrays of numbers") from exc
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        shapes = f"mu has shape {mu.shape}, sigma {sigma.shape}"
        raise UserError(f"{where}: {shapes}; expected [D] and [D, D] with the same D")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{where}: mu or sigma holds NaN or infinite values; make these statistics again")
    if np.abs(sigma - sigma.T).max() > max(_ASYMMETRY * np.abs(sigma).max(), _SUMMING * _rounding(mu, sigma)):
        raise UserError(f"{where}: sigma is not symmetric, so it is no covariance; make these statistics again")
    return mu, sigma / 2 + sigma.T / 2


def _rounding(mu: Array, sigma: Array) -> float:
    """The size of eigenvalues that may be rounding errors: eps D times the scale of the second moments, of which a
    covariance is a difference. That of images that are all equal consists of nothing else."""
    with np.errstate(over="ignore"):
        scale = max(np.diagonal(sigma).max(), mu @ mu)
    return float(scale * len(sigma) * np.finfo(np.float64).eps)


def _factor(mu: Array, sigma: Array, where: str) -> Array:
    """A [D, rank] with A A^T = sigma. Directions that can't be distinguished from rounding errors are left out.

    By Cholesky, which is several times cheaper than eigenvectors: plain where all directions count, else with pivots,
    which stops where rounding errors begin. What neither can factor is left to the eigenvalues.
    """
    rounding = _rounding(mu, sigma)
    with np.errstate(over="ignore"):
        if np.linalg.norm(sigma) <= rounding:
            return np.empty([len(sigma), 0])
    try:
        factor: Array = scipy.linalg.cholesky(sigma, lower=True, check_finite=False)
        if np.square(np.diagonal(factor)).min() > rounding:
            return factor
    except scipy.linalg.LinAlgError:
        pass
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, tol=rounding, lower=1)
    factor = np.empty([len(sigma), rank])
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    if np.abs(factor @ factor.T - sigma).max() <= 2 * rounding:
        return factor
    return _eigen_factor(sigma, rounding, where)


def _eigen_factor(sigma: Array, rounding: float, where: str) -> Array:
    """The same by eigenvectors. Raises UserError for a matrix with negative eigenvalues that are no rounding errors."""
    try:
        values, vectors = np.linalg.eigh(sigma)
    except np.linalg.LinAlgError as exc:
        raise UserError(f"{where}: the eigenvalues of sigma can't be computed ({exc})") from exc
    if values[0] < -max(_NEGATIVITY * np.abs(values).max(), _SUMMING * rounding):
        raise UserError(f"{where}: sigma has the negative eigenvalue {values[0]:.3g}, so it is no covariance")
    kept = values > rounding
    return vectors[:, kept] * np.sqrt(values[kept])
