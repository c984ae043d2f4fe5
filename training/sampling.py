"""From a network file and seeds to images: which sampler a network needs, how seeds are batched, who does what.

`sample` is the whole of it in one call, for notebooks and programs:

    from training.sampling import load_network, sample
    student = load_network("assets/digits-student.pkl")
    images = sample(student, seeds=range(16))  # uint8 [16, 8, 8, 1]

A distilled network knows its own noise grid and solver; here is the one place that decides what may be asked of it.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UsageError, UserError
from dnnlib.util import count
from torch_utils import distributed as dist

from .grids import Sampling, network_grid
from .network_files import NetworkFile
from .network_files import load_network as load_network  # for notebooks: one import for all they need
from .pictures import to_uint8
from .samplers import (
    RandnLike,
    StackedRandomGenerator,
    ablation_sampler,
    edm_sampler,
    grid_sampler,
    nfe,
    noise_levels,
)
from .steps import ratios_that_work

__all__ = ["Batch", "Plan", "iterate_images", "load_network", "plan_sampling", "sample", "sample_batch"]

DEFAULT_STEPS = 18
ABLATION_OPTIONS = ("solver", "discretization", "schedule", "scaling")
NOT_SETTINGS = ("net", "latents", "class_labels", "randn_like", "num_steps")  # a sampler's other arguments are settings
SETTINGS = {name for sampler in (edm_sampler, ablation_sampler) for name in inspect.signature(sampler).parameters} - {
    *NOT_SETTINGS
}

# ----------------------------------------------------------------------------------------------------------------------
# Which sampler


@dataclass(frozen=True)
class Plan:
    """A sampler with all its settings fixed.

    sample     (net, latents [N, C, H, W], class_labels, randn_like) -> images, float64 [N, C, H, W]
    steps      number of steps, `nfe` network calls per image
    text       one line for people
    options    all that the images depend on besides network and seeds: finite numbers, strings and lists of numbers
    """

    sample: Callable[[Any, Tensor, Tensor | None, RandnLike], Tensor]
    steps: int
    nfe: int
    text: str
    options: dict[str, Any]


def plan_sampling(
    network: NetworkFile,
    *,
    steps: int | None = None,
    solver: str | None = None,
    grid: tuple[int, int] | None = None,
    **options: Any,
) -> Plan:
    """Decides how `network` is sampled.

    steps    number of steps: 18 for an undistilled network; a distilled one takes its own number or its teacher's
    solver   'heun' or 'euler' of the ablation sampler, for an undistilled network
    grid     (levels, ratio) of the teacher's grid, for a student whose file does not say
    options  keyword arguments of `edm_sampler` or `ablation_sampler`; None stands for "not given"

    As in EDM, the ablation sampler runs if any of solver, discretization, schedule, scaling is given. Raises UsageError
    for what contradicts a distilled network's grid, and for settings that no sampler can follow.
    """
    given = {name: value for name, value in {"solver": solver, **options}.items() if value is not None}
    for name in given.keys() - SETTINGS:
        near = difflib.get_close_matches(name, {"steps", "grid", *SETTINGS}, n=1)
        raise UsageError(f"no sampler has a setting '{name}'{f'; did you mean {near[0]}?' if near else ''}")
    for name, value in given.items():
        if value != value:
            raise UsageError(f"{option_name(name)}={value} is not a number")
    sampling = network.sampling
    if grid is not None and sampling is None:
        shape: dict[str, Any] = {name: given.pop(name) for name in ("sigma_min", "sigma_max", "rho") if name in given}
        sampling = _named_grid(network.net, grid, shape)
    elif grid is not None and sampling is not None and grid != (sampling.teacher_steps, sampling.ratio):
        own = f"{sampling.teacher_steps}/{sampling.ratio}"
        raise UsageError(f"--grid={grid[0]}/{grid[1]}: this network's file says {own}; use that, or leave it out")
    if sampling is None:
        return _undistilled_plan(network.net, DEFAULT_STEPS if steps is None else steps, given)
    _check_agrees(sampling, steps, given)
    return _student_plan(sampling, is_own=network.sampling is not None)


def _undistilled_plan(net: Any, steps: int, given: Mapping[str, Any]) -> Plan:
    is_ablation = any(name in given for name in ABLATION_OPTIONS)
    sampler = ablation_sampler if is_ablation else edm_sampler
    defaults = {name: parameter.default for name, parameter in inspect.signature(sampler).parameters.items()}
    settings = {name: value for name, value in {**defaults, **given}.items() if name not in NOT_SETTINGS}
    try:
        shape = {name: settings[name] for name in ("sigma_min", "sigma_max", "rho")}
        levels = noise_levels(net, settings.get("discretization", "edm"), steps, **shape)
    except ValueError as exc:
        raise UsageError(f"{exc} (--steps, --sigma_min, --sigma_max)") from exc
    calls = nfe(steps, settings.get("solver", "heun"))
    changed = "".join(f", {option_name(name)[2:]} {value}" for name, value in given.items())
    return Plan(
        sample=lambda net, latents, labels, randn_like: sampler(
            net, latents, labels, randn_like, num_steps=steps, **given
        ),
        steps=steps,
        nfe=calls,
        text=(
            f"{'ablation' if is_ablation else 'EDM'} sampler{changed}: {count(steps, 'step')} "
            f"from noise level {levels[0]:g}, {count(calls, 'network call')} (NFE) per image"
        ),
        options={
            "sampler": "ablation" if is_ablation else "edm",
            "num_steps": steps,
            **{name: str(value) if value in (math.inf, -math.inf) else value for name, value in settings.items()},
        },
    )


def _student_plan(sampling: Sampling, is_own: bool) -> Plan:
    grid, solver = sampling.grid, sampling.solver
    calls = nfe(grid.steps, solver)
    shown = ", ".join(f"{level:.4g}" for level in grid.levels[:8]) + (", ..., 0" if grid.steps > 7 else "")
    whose = "the network's own" if is_own else "the given"
    return Plan(
        sample=lambda net, latents, labels, randn_like: grid_sampler(net, latents, grid, solver, labels),
        steps=grid.steps,
        nfe=calls,
        text=(
            f"{whose} noise grid ({shown}): {count(grid.steps, 'step')} of {solver}, "
            f"distilled from {sampling.teacher_steps}, {count(calls, 'network call')} (NFE) per image"
        ),
        options={"sampler": "grid", "num_steps": grid.steps, "solver": solver, "levels": list(grid.levels)},
    )


def _named_grid(net: Any, grid: tuple[int, int], shape: Mapping[str, float]) -> Sampling:
    """The grid of a student whose file does not say: every ratio-th level, of the range given or EDM's."""
    steps, ratio = grid
    if steps < 1 or ratio < 1 or steps % ratio:
        works = ", ".join(f"{steps}/{value}" for value in ratios_that_work(steps)[:8]) or "32/2"
        raise UsageError(f"--grid={steps}/{ratio}: {steps} steps cannot be taken {ratio} at a time; use {works}")
    try:
        return Sampling(network_grid(net, steps, **shape).every(ratio), "euler", ratio)
    except ValueError as exc:
        raise UsageError(f"--grid={steps}/{ratio}: {exc}") from exc


def _check_agrees(sampling: Sampling, steps: int | None, given: Mapping[str, Any]) -> None:
    """Raises UsageError for anything that a distilled network can't follow."""
    own, teachers = sampling.grid.steps, sampling.teacher_steps
    if steps not in (None, own, teachers):
        choices = f"--steps={own} (its own)" + (f" or --steps={teachers} (its teacher's)" if teachers != own else "")
        raise UsageError(f"--steps={steps}: this network was distilled for {own}; use {choices}, or leave it out")
    agreeing: dict[str, Any] = {
        "solver": sampling.solver,
        "sigma_max": sampling.grid.levels[0],
        "schedule": "linear",
        "scaling": "none",
        "S_churn": 0,
        "S_min": 0,
        "S_max": math.inf,
        "S_noise": 1,
    }
    for name, value in given.items():
        wanted = agreeing.get(name)
        if value != wanted and not (name == "sigma_max" and math.isclose(value, sampling.grid.levels[0], rel_tol=1e-6)):
            valid = "leave it out" if wanted is None else f"use {option_name(name)}={wanted}, or leave it out"
            raise UsageError(
                f"{option_name(name)}={value} contradicts the noise grid that this network was distilled for; {valid}"
            )


def option_name(argument: str) -> str:
    """How an argument of a sampler is written on the command line."""
    return "--" + {"discretization": "disc", "num_steps": "steps"}.get(argument, argument)


# ----------------------------------------------------------------------------------------------------------------------
# Which seeds together


def count_batches(num_seeds: int, max_batch: int, world_size: int = 1) -> int:
    """The number of batches that EDM makes: none larger than `max_batch`, a multiple of the number of processes."""
    return -(-num_seeds // (max_batch * world_size)) * world_size


def split_seeds(seeds: Sequence[int], num_batches: int) -> list[list[int]]:
    """`seeds` in consecutive batches of near-equal size, larger ones first; some are empty if seeds are few."""
    size, larger = divmod(len(seeds), max(num_batches, 1))
    ends = [(i + 1) * size + min(i + 1, larger) for i in range(num_batches)]
    return [list(seeds[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def own_share(batches: Sequence[list[int]]) -> list[list[int]]:
    """The batches of this process: every world_size-th, without the empty ones."""
    return [batch for batch in batches[dist.get_rank() :: dist.get_world_size()] if batch]


# ----------------------------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class Batch:
    """Images as they leave the sampler.

    seeds      one per image
    images     float32 [N, C, H, W] on the network's device, in [-1, 1] as far as the network keeps to it
    labels     one-hot float32 [N, label_dim], or None for a network without classes
    """

    seeds: list[int]
    images: Tensor
    labels: Tensor | None


@torch.no_grad()
def sample_batch(
    net: Any, seeds: Sequence[int], plan: Plan, device: torch.device | str, class_idx: int | None = None
) -> Batch:
    """One image per seed, in one batch. Draws in EDM's order: latent, class (even where one is imposed), churn."""
    random = StackedRandomGenerator(device, seeds)
    latents = random.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution], device=device)
    labels = None
    if net.label_dim:
        classes = random.randint(net.label_dim, size=[len(seeds)], device=device)
        if class_idx is not None:
            classes = torch.full_like(classes, class_idx)
        labels = torch.eye(net.label_dim, device=device)[classes]
    images = plan.sample(net, latents, labels, random.randn_like)
    return Batch(list(seeds), images.to(torch.float32), labels)


def iterate_images(
    network: NetworkFile,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    solver: str | None = None,
    max_batch: int = 64,
    device: torch.device | str,
    class_idx: int | None = None,
) -> Iterator[Batch]:
    """Images of `network` for `seeds`, in batches of at most `max_batch`; each process gets its own share of them.

    Moves the network to `device`. `steps` and `solver` as in `plan_sampling`. Raises UsageError, at once, for steps or
    a solver that contradict a distilled network's grid, and for a class that the network doesn't have.
    """
    plan = plan_sampling(network, steps=steps, solver=solver)
    check_class(network.net, class_idx)
    net = network.net.to(device)
    batches = split_seeds(seeds, count_batches(len(seeds), max_batch, dist.get_world_size()))
    return (sample_batch(net, batch, plan, device, class_idx) for batch in own_share(batches))


@overload
def sample(
    network: NetworkFile,
    seeds: Sequence[int],
    *,
    class_idx: int | None = None,
    device: torch.device | str | None = None,
    batch: int = 64,
    raw: Literal[False] = False,
    **options: Any,
) -> np.ndarray: ...


@overload
def sample(
    network: NetworkFile,
    seeds: Sequence[int],
    *,
    class_idx: int | None = None,
    device: torch.device | str | None = None,
    batch: int = 64,
    raw: Literal[True],
    **options: Any,
) -> Tensor: ...


def sample(
    network: NetworkFile,
    seeds: Sequence[int],
    *,
    class_idx: int | None = None,
    device: torch.device | str | None = None,
    batch: int = 64,
    raw: bool = False,
    **options: Any,
) -> np.ndarray | Tensor:
    """One image per seed, in the order of `seeds`: uint8 [N, H, W, C], the pixels that `generate.py` writes.

    network    what `load_network` returns; moved to the device
    class_idx  class of all images; None: each seed draws its own, for a network with classes
    device     None: CUDA where there is a GPU, else the CPU
    batch      images at a time
    raw        return float32 [N, C, H, W] on the CPU instead, in [-1, 1] as far as the network keeps to it
    options    steps, solver, S_churn, ... of `plan_sampling`: a student needs none

    Raises UsageError for what contradicts a distilled network's grid or its classes, UserError for images that are NaN.
    """
    if not isinstance(network, NetworkFile):
        raise UsageError(f"the first argument is what load_network(path) returns, not a {type(network).__name__}")
    if not isinstance(seeds, Sequence | np.ndarray):
        raise UsageError(f"seeds are a list or a range, such as range(16), not a {type(seeds).__name__}")
    if len(seeds) == 0 or batch < 1:
        raise UsageError(f"seeds are {len(seeds)}, batch is {batch}: both must be at least 1")
    plan = plan_sampling(network, **options)
    check_class(network.net, class_idx)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net = network.net.to(where)
    parts = []
    for chosen in split_seeds(seeds, count_batches(len(seeds), batch)):
        images = sample_batch(net, chosen, plan, where, class_idx).images
        if not images.isfinite().all():
            raise UserError(
                f"{network.source}: some images of seeds {chosen[0]} to {chosen[-1]} hold NaN or infinities"
            )
        parts.append(images.cpu() if raw else to_uint8(images.double()).permute(0, 2, 3, 1).cpu())
    together = torch.cat(parts)
    return together if raw else together.numpy()


def check_class(net: Any, class_idx: int | None) -> None:
    """Raises UsageError unless `class_idx` is None or one of the network's classes."""
    if class_idx is None:
        return
    if not net.label_dim:
        raise UsageError(f"class {class_idx}: this network has no classes; leave --class (class_idx) out")
    if not 0 <= class_idx < net.label_dim:
        raise UsageError(f"class {class_idx}: this network's classes are 0 to {net.label_dim - 1}")
