"""A noise grid chosen by measurement: its levels stand where the teacher's path is curved.

A jump from level t to level s is straight, and the teacher's path is not. What a jump misses,

    cost(t, s) = E |euler_jump(x_t, D(x_t; t), t, s) - x_s|^2 / (1 + (s / sigma_data)^2),

is measured along the teacher's own fine path from some latents. The divisor is what the rest of the way down makes of
an error at level s, for Gaussian data of deviation sigma_data. `nested_levels` then chooses the grids of all rungs of a
ladder at once, each among the levels of the next finer one, so that the costs of all their jumps are least.
docs/derivation.md derives it, docs/results.md compares the choices.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.util import parse_json, read_file

from .grids import NoiseGrid, check_count, network_grid, rounded
from .solvers import Denoiser, euler_jump, heun_step

FINE = 64  # steps of the reference path, at least; FINE_PER_STEP for each step of the teacher
FINE_PER_STEP = 4
MOST_STEPS = 128  # of a measured grid: time and memory grow with the third power of the fine ones
INNER = 8  # pieces of a student's jump, at least, between which the teacher's own levels are chosen
IMAGES = 128
COARSE_FIRST = 100.0  # how much more the jumps of a rung count than those of the next finer one


@dataclass(frozen=True)
class FinePath:
    """The teacher's fine path for a batch of latents.

    levels    float64 [M + 1], decreasing, the last one 0
    states    float64 [M + 1, N, C, H, W]
    denoised  float64 [M, N, C, H, W]: D(states[i]; levels[i])
    """

    levels: Tensor
    states: Tensor
    denoised: Tensor


@torch.no_grad()
def fine_path(denoise: Denoiser, latents: Tensor, grid: NoiseGrid) -> FinePath:
    """`grid.steps` Heun steps from standard normal latents [N, C, H, W]; 2 M - 1 network calls."""
    levels = torch.tensor(grid.levels, dtype=torch.float64, device=latents.device)
    answers: list[Tensor] = []

    def recorded(x: Tensor, sigma: Tensor) -> Tensor:
        answers.append(denoise(x, sigma))
        return answers[-1]

    states = [latents.to(torch.float64) * levels[0]]
    for t, s in pairwise(levels[:-1]):
        states.append(heun_step(recorded, states[-1], t, s))
    last = levels[-2]
    states.append(euler_jump(states[-1], recorded(states[-1], last), last, levels[-1]))
    return FinePath(levels, torch.stack(states), torch.stack(answers[::2]))  # a Heun step's first call is at its start


def euler_costs(path: FinePath) -> np.ndarray:
    """Mean square of what each Euler jump along the path misses: float64 [M + 1, M + 1], inf unless row < column."""
    levels, states = path.levels, path.states
    costs = np.full((len(levels), len(levels)), np.inf)
    for i, denoised in enumerate(path.denoised):
        s = levels[i + 1 :].reshape(-1, 1, 1, 1, 1)
        missed = euler_jump(states[i], denoised, levels[i], s) - states[i + 1 :]
        costs[i, i + 1 :] = missed.square().mean(dim=(1, 2, 3, 4)).cpu().numpy()
    return costs


@torch.no_grad()
def heun_costs(denoise: Denoiser, path: FinePath, jumps: Sequence[tuple[int, int]]) -> np.ndarray:
    """The same for Heun steps between the given levels only (one network call each); inf for all others."""
    levels, states = path.levels, path.states
    costs = np.full((len(levels), len(levels)), np.inf)
    for i, j in jumps:
        x, denoised, t, level = states[i], path.denoised[i], levels[i], levels[j]

        def answer(at: Tensor, sigma: Tensor, x: Tensor = x, denoised: Tensor = denoised) -> Tensor:
            return denoised if at is x else denoise(at, sigma)  # the path has the step's first call

        is_last = j == len(path.denoised)
        landing = euler_jump(x, denoised, t, level) if is_last else heun_step(answer, x, t, level)
        costs[i, j] = (landing - states[j]).square().mean().item()
    return costs


def shrinkage(levels: np.ndarray, sigma_data: float) -> np.ndarray:
    """What the flow from each level to 0 leaves of a squared error, for Gaussian data of deviation sigma_data."""
    return np.asarray(1 / (1 + (levels / sigma_data) ** 2))


# ---------------------------------------------------------------------------------------------------------------------
# Choice


def nested_levels(costs: np.ndarray, pieces: Sequence[int], weights: Sequence[float], finest: int = 1) -> list[int]:
    """Indices of the levels of the finest grid, from 0 to the last, with the least weighted costs of all rungs.

    costs    [M + 1, M + 1]: of a jump from level i to level j > i
    pieces   into how many jumps the whole range is cut, then each of these, and so on: the coarsest rung first
    weights  of each rung's costs
    finest   into how many steps each jump of the finest rung is cut later: it spans so many levels at least

    Dynamic programming over all nested grids: best(i, j) of a rung is the least cost of the rungs below between levels
    i and j, a shortest path of so many pieces. Raises ValueError where there are too few levels.
    """
    size = len(costs)
    span = np.subtract.outer(np.arange(size), np.arange(size)).T  # [i, j]: j - i
    best = np.where(span >= finest, 0.0, np.inf)
    chosen: list[list[np.ndarray]] = []  # of each rung, for each piece but the first: the last cut before j
    for number, weight in zip(reversed(pieces), reversed(list(weights)), strict=True):
        with np.errstate(invalid="ignore"):
            single = np.where(np.isfinite(best), weight * costs + best, np.inf)
        best, cuts = single, []
        for _ in range(number - 1):
            through = best[:, :, None] + single[None, :, :]
            cuts.append(through.argmin(axis=1))
            best = through.min(axis=1)
        chosen.insert(0, cuts)
    if not np.isfinite(best[0, -1]):
        raise ValueError(f"{size - 1} fine steps are too few for so many levels")

    def cut(rung: int, start: int, end: int) -> list[int]:
        """The levels after `start` up to `end`."""
        if rung == len(chosen):
            return [end]
        ends = [end]
        for cuts in reversed(chosen[rung]):
            ends.insert(0, int(cuts[start, ends[0]]))
        return [level for a, b in pairwise([start, *ends]) for level in cut(rung + 1, a, b)]

    return [0, *cut(0, 0, size - 1)]


def measured_grid(
    net: Any,
    draw: Callable[[range], tuple[Tensor, Tensor | None]],
    chain: Sequence[int],
    solver: str = "heun",
    images: int = IMAGES,
    batch: int = 32,
    coarse_first: float = COARSE_FIRST,
) -> NoiseGrid:
    """The grid of a teacher of chain[0] steps, students of chain[1], chain[2], ...; some 250 network calls a latent.

    net        undistilled network in eval mode, on the device it is to run on
    draw       latents [N, C, H, W] and labels (or None) of a range of seeds, on that device
    chain      numbers of steps, each a multiple of the next
    solver     of the teacher: its own levels between those of its first student are chosen by its own error
    images     latents, `batch` of them at a time; all their paths are kept: 2 M states in float64

    Raises ValueError for more than MOST_STEPS steps, for NaN on the path, and where the network distinguishes too few
    levels.
    """
    grid, origin = fine_grid(net, chain[0]), made_by(chain, solver, images)
    euler, refined = np.zeros(()), np.zeros(())
    batches = [range(start, min(start + batch, images)) for start in range(0, images, batch)]
    paths = []
    for seeds in batches:
        latents, labels = draw(seeds)

        def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = labels) -> Tensor:
            return net(x, sigma, labels).to(torch.float64)

        path = fine_path(denoise, latents, grid)
        euler = euler + euler_costs(path) * (len(seeds) / images)
        paths.append((denoise, path, len(seeds) / images))
    factor = shrinkage(np.array(grid.levels), data_deviation([path for _, path, _ in paths]))
    costs = euler * factor
    if not np.isfinite(costs[np.triu_indices(len(costs), 1)]).all():
        raise ValueError("the network's path holds NaN or infinities")
    ratios = [a // b for a, b in pairwise(chain)]
    pieces = [chain[-1], *reversed(ratios)]
    weights = [coarse_first**rung for rung in reversed(range(len(pieces)))]
    if solver == "euler":
        return take(grid, nested_levels(costs, pieces, weights), origin)
    if ratios:
        student = nested_levels(costs, pieces[:-1], weights[:-1], finest=ratios[0])
    else:  # no student: the teacher alone
        student, ratios = [0, grid.steps], list(chain)
    jumps = [jump for a, b in pairwise(student) for jump in _steps_within(a, b, ratios[0])]
    for denoise, path, share in paths:
        refined = refined + heun_costs(denoise, path, jumps) * share
    fine_costs = refined * factor
    levels = [0]
    for a, b in pairwise(student):
        inner = nested_levels(fine_costs[a : b + 1, a : b + 1], [ratios[0]], [1.0])
        levels += [a + index for index in inner[1:]]
    return take(grid, levels, origin)


def _steps_within(start: int, end: int, ratio: int) -> list[tuple[int, int]]:
    """The teacher's steps to be measured between two levels of its student: among INNER pieces at most; of two only
    those that begin or end there."""
    among = np.unique(np.linspace(start, end, min(end - start, max(INNER, 2 * ratio)) + 1).round().astype(int)).tolist()
    pairs = [(i, j) for i in among for j in among if i < j]
    return [(i, j) for i, j in pairs if ratio > 2 or (i == start) != (j == end)]


def made_by(chain: Sequence[int], solver: str, images: int = IMAGES) -> dict[str, Any]:
    """How a grid was measured, as files record it."""
    return {"chain": list(chain), "solver": solver, "images": images}


def listed_grid(net: Any, spec: str) -> NoiseGrid:
    """The grid of the levels in `spec`, such as 80,5,1,0, or in a JSON file of that name: a list, or under `levels`.

    Clamped to the network's range and rounded to levels it knows. Raises ValueError for what is no grid.
    """
    if "," in spec and re.fullmatch(r"[\d.,eE+\- ]+", spec):
        found: Any = spec.split(",")
    elif not os.path.isfile(spec):
        raise ValueError("neither edm nor measured, no list of noise levels such as 80,5,1,0, and no file")
    else:
        found = parse_json(read_file(spec, "a run's JSON"))
        found = found.get("levels") if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(level, (str, int, float)) for level in found):
        raise ValueError("it has no list of noise levels")
    levels = NoiseGrid(tuple(map(float, found))).levels
    known = rounded(net.round_sigma, np.clip(levels[:-1], float(net.sigma_min), float(net.sigma_max)))
    try:
        return NoiseGrid((*known, 0.0))
    except ValueError as exc:
        raise ValueError(
            "within the network's range, and rounded to levels it knows, some of them are the same"
        ) from exc


def fine_grid(net: Any, steps: int) -> NoiseGrid:
    """Eq. 5 with so many levels that those of a teacher of `steps` steps can be chosen among them."""
    check_count(steps)
    if steps > MOST_STEPS:
        raise ValueError(f"a measured grid has {MOST_STEPS} steps at most")
    wanted = min(max(FINE, FINE_PER_STEP * steps), 2 * MOST_STEPS)
    while True:
        try:
            return network_grid(net, wanted)
        except ValueError:
            if wanted <= steps:
                raise
            wanted = max(steps, wanted * 3 // 4)  # the network distinguishes fewer


def take(grid: NoiseGrid, indices: Sequence[int], origin: Mapping[str, Any]) -> NoiseGrid:
    """The grid of some of the levels."""
    return NoiseGrid(tuple(grid.levels[index] for index in indices), origin)


def data_deviation(paths: Sequence[FinePath]) -> float:
    """Root mean square deviation of the final images from their mean, over all pixels."""
    images = torch.cat([path.states[-1] for path in paths])
    return max(float((images - images.mean(dim=0)).square().mean().sqrt()), 1e-3)
