"""From a network file and seeds to images: which sampler a network needs, how seeds are batched, who does what.

`sample` is the whole of it in one call, for notebooks and programs:

    from training.network_files import load_network
    from training.sampling import sample
    student = load_network("assets/digits-student.pkl")
    images = sample(student, seeds=range(16))  # uint8 [16, 8, 8, 1]

A distilled network knows its own noise grid and solver; here is the one place that decides what may be asked of it.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UsageError, UserError, printable
from dnnlib.util import count
from torch_utils import distributed as dist
from torch_utils import persistence
from torch_utils.misc import allow_tf32

from . import samplers
from .grids import NoiseGrid, Sampling, network_grid
from .labels import Condition, Labels, LabelSource, choose_labels
from .measured_grid import listed_grid, measured_grid
from .pictures import to_uint8
from .sampler_table import SOLVERS
from .samplers import RandnLike, StackedRandomGenerator, grid_sampler, nfe, noise_levels
from .steps import steps_down

if TYPE_CHECKING:
    from formats.network_files import NetworkFile

DEFAULT_STEPS = 18
ABLATION_OPTIONS = {"solver", "discretization", "schedule", "scaling"}
SHAPE = ("sigma_min", "sigma_max", "rho")
GRID_SOLVERS = ("heun", "euler", "dpmpp2m")  # that step down any levels
CHURN = {"S_churn", "S_min", "S_max", "S_noise"}
NOT_SETTINGS = (
    "net",
    "latents",
    "class_labels",
    "randn_like",
    "num_steps",
    "levels",
)  # a sampler's other arguments are settings


def _settings(sampler: str) -> dict[str, Any]:
    """The settings of a function in training.samplers, with their defaults."""
    parameters = inspect.signature(getattr(samplers, sampler)).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in NOT_SETTINGS}


SAMPLERS = ("edm_sampler", "ablation_sampler", *(method.sampler for method in SOLVERS.values()))
SETTINGS = {name for sampler in SAMPLERS for name in _settings(sampler)}

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
    grid: str | tuple[int, int] | None = None,
    **options: Any,
) -> Plan:
    """Decides how `network` is sampled.

    steps    number of steps: 18 for an undistilled network; a distilled one takes its own number or its teacher's
    solver   one of SOLVERS, for an undistilled network
    grid     noise levels of an undistilled network: 'edm' (eq. 5), 'measured', a list such as '80,5,1,0', or the
             name of a JSON file of one; for a student whose file has none 'N/K': distilled from N steps, K at a time
    options  keyword arguments of the sampler; None stands for "not given"

    As in EDM, the ablation sampler runs if any of solver, discretization, schedule, scaling is given (but for a solver
    that has a sampler of its own). Raises UsageError for what contradicts a distilled network's grid, and for settings
    that the sampler can't follow.
    """
    given: dict[str, Any] = {name: value for name, value in {"solver": solver, **options}.items() if value is not None}
    for name in given.keys() - SETTINGS:
        near = difflib.get_close_matches(name, {"steps", "grid", *SETTINGS}, n=1)
        raise UsageError(f"no sampler has a setting '{name}'{f'; did you mean {near[0]}?' if near else ''}")
    for name, value in given.items():
        if value != value:
            raise UsageError(f"{option_name(name)}={value} is not a number")
    sampling = network.sampling
    grid = "/".join(map(str, grid)) if isinstance(grid, tuple) else grid
    if sampling is None:
        if grid in (None, "edm"):
            return _undistilled_plan(network.net, DEFAULT_STEPS if steps is None else steps, given)
        try:
            stage = re.fullmatch(r"(\d+)/(\d+)", grid)
            if stage is None:
                return _grid_plan(network, grid, steps, given)
            teacher_steps, ratio = int(stage[1]), int(stage[2])
            shape: dict[str, Any] = {name: given.pop(name) for name in SHAPE if name in given}
            sampling = Sampling(network_grid(network.net, teacher_steps, **shape).every(ratio), "euler", ratio)
        except ValueError as exc:
            raise UsageError(f"--grid={grid}: {exc}") from exc
    elif grid not in (None, own := f"{sampling.teacher_steps}/{sampling.ratio}"):
        raise UsageError(f"--grid={grid}: this network's file has {own}; use that, or leave it out")
    _check_agrees(sampling, steps, given)
    return _student_plan(sampling, steps, is_own=network.sampling is not None)


def _undistilled_plan(net: Any, steps: int, given: Mapping[str, Any]) -> Plan:
    solver = given.get("solver")
    if solver is not None and solver not in SOLVERS:
        raise UsageError(f"--solver={solver} is not one of {', '.join(SOLVERS)}")
    method = "ablation_sampler" if given.keys() & ABLATION_OPTIONS else "edm_sampler"
    name = SOLVERS[solver].sampler if solver else method
    defaults = _settings(name)
    changes = {name: value for name, value in given.items() if name != "solver" or name in defaults}
    for other in changes.keys() - defaults.keys():
        raise UsageError(f"{option_name(other)}={given[other]}: --solver={solver} has no such setting; leave it out")
    settings = {**defaults, **changes}
    shape = {name: settings[name] for name in SHAPE}
    try:
        levels = noise_levels(net, settings.get("discretization", "edm"), steps, **shape)
    except ValueError as exc:
        raise UsageError(f"{exc} (--steps, --sigma_min, --sigma_max)") from exc
    calls, title = nfe(steps, solver or "heun"), name.removesuffix("_sampler")
    changed = "".join(f", {option_name(name)[2:]} {value}" for name, value in changes.items())
    numbers = {name: str(value) if value in (math.inf, -math.inf) else value for name, value in settings.items()}
    return Plan(
        sample=partial(getattr(samplers, name), num_steps=steps, **changes),
        steps=steps,
        nfe=calls,
        text=(
            f"{'EDM' if title == 'edm' else title} sampler{changed}: {count(steps, 'step')} "
            f"from noise level {levels[0]:g}, {count(calls, 'network call')} (NFE) per image"
        ),
        options={"sampler": title, "num_steps": steps, **numbers},
    )


def _grid_plan(network: NetworkFile, spec: str, steps: int | None, given: Mapping[str, Any]) -> Plan:
    """An undistilled network on the levels that --grid names. Raises ValueError or UsageError."""
    solver, churn = given.get("solver", "heun"), {name: value for name, value in given.items() if name != "solver"}
    if solver not in GRID_SOLVERS:
        raise UsageError(f"--grid={spec} goes with --solver={', '.join(GRID_SOLVERS)}, not with {solver}")
    if other := sorted(churn.keys() - (CHURN if solver != "dpmpp2m" else set())):
        raise UsageError(f"{option_name(other[0])} and --grid={spec} can't go together; leave one of them out")
    if spec == "measured":
        chain = steps_down(DEFAULT_STEPS if steps is None else steps)
        grid = measure_grid(network, chain, "heun" if solver == "heun" else "euler")
    else:
        grid = listed_grid(network.net, spec)
    if steps not in (None, grid.steps):
        raise UsageError(f"--steps={steps}, but --grid={spec} has {count(grid.steps, 'step')}; leave one of them out")
    calls, levels = nfe(grid.steps, solver), grid.levels
    sampler: Callable[..., Tensor] = partial(grid_sampler, levels=levels, solver=solver, **churn)
    if solver == "dpmpp2m":
        sampler = partial(samplers.dpmpp2m_sampler, levels=levels)
    numbers = {name: str(value) if value == math.inf else value for name, value in churn.items()}
    return Plan(
        sample=lambda net, latents, labels, randn_like: sampler(
            net, latents, class_labels=labels, randn_like=randn_like
        ),
        steps=grid.steps,
        nfe=calls,
        text=f"noise grid {grid}: {count(grid.steps, 'step')} of {solver}, {count(calls, 'call')} (NFE) per image",
        options={"sampler": "grid", "num_steps": grid.steps, "solver": solver, "levels": list(levels), **numbers},
    )


def _student_plan(sampling: Sampling, steps: int | None, is_own: bool) -> Plan:
    grid, solver = sampling.grid, sampling.solver
    calls = nfe(grid.steps, solver)
    whose = "the network's own" if is_own else "the given"
    note = f"; {steps} is its teacher's number of steps, it makes its own {grid.steps}"
    return Plan(
        sample=lambda net, latents, labels, randn_like: grid_sampler(net, latents, grid.levels, solver, labels),
        steps=grid.steps,
        nfe=calls,
        text=(
            f"{whose} noise grid ({grid}): {count(grid.steps, 'step')} of {solver}, "
            f"distilled from {sampling.teacher_steps}, {count(calls, 'network call')} (NFE) per image"
            f"{'' if steps in (None, grid.steps) else note}"
        ),
        options={"sampler": "grid", "num_steps": grid.steps, "solver": solver, "levels": list(grid.levels)},
    )


def _check_agrees(sampling: Sampling, steps: int | None, given: Mapping[str, Any]) -> None:
    """Raises UsageError for anything that a distilled network can't follow."""
    own, teachers = sampling.grid.steps, sampling.teacher_steps
    if steps not in (None, own, teachers):
        choices = f"--steps={own} (its own)" + (f" or --steps={teachers} (its teacher's)" if teachers != own else "")
        raise UsageError(f"--steps={steps}: this network was distilled for {own}; use {choices}, or leave it out")
    sigma_max = sampling.grid.levels[0]
    agreeing: dict[str, Any] = {"solver": sampling.solver, "sigma_max": sigma_max}
    agreeing |= {"schedule": "linear", "scaling": "none", "S_churn": 0, "S_min": 0, "S_max": math.inf, "S_noise": 1}
    for name, value in given.items():
        wanted = agreeing.get(name)
        if value != wanted and not (name == "sigma_max" and math.isclose(value, sigma_max, rel_tol=1e-6)):
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
    return [part.tolist() for part in np.array_split(np.asarray(seeds), num_batches)] if num_batches else []


def own_share(batches: Sequence[list[int]]) -> list[list[int]]:
    """The batches of this process: every world_size-th, without the empty ones."""
    return [batch for batch in batches[dist.get_rank() :: dist.get_world_size()] if batch]


def own_batches(seeds: Sequence[int], max_batch: int) -> list[list[int]]:
    """This process's share of `seeds`, in EDM's partition."""
    return own_share(split_seeds(seeds, count_batches(len(seeds), max_batch, dist.get_world_size())))


# ----------------------------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class Batch:
    """Images as they leave the sampler.

    seeds      one per image
    images     float32 [N, C, H, W] on the network's device, in [-1, 1] as far as the network keeps to it
    labels     float32 [N, label_dim], one-hot for classes, or None for a network without labels
    """

    seeds: list[int]
    images: Tensor
    labels: Tensor | None

    def checked(self, source: object) -> Tensor:
        """The images. Raises UserError for NaN and infinities, with the network's `source`."""
        if not self.images.isfinite().all():
            seeds = f"{self.seeds[0]} to {self.seeds[-1]}"
            raise UserError(f"{source}: some images of seeds {seeds} hold NaN or infinities")
        return self.images


def draw_inputs(
    net: Any, seeds: Sequence[int], labels: Labels | None, device: torch.device | str
) -> tuple[StackedRandomGenerator, Tensor, Tensor | None]:
    """Generators, latents float32 [N, C, H, W] and labels float32 [N, label_dim] (or None), drawn in EDM's order.

    labels: what labels are drawn from, where not from all classes.
    """
    random = StackedRandomGenerator(device, seeds)
    latents = random.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution], device=device)
    if not net.label_dim:
        return random, latents, None
    labels = labels or Labels(torch.arange(net.label_dim))
    return random, latents, labels.draw(random, len(seeds), net.label_dim, device)


def measure_grid(network: NetworkFile, chain: Sequence[int], solver: str, data: LabelSource = None) -> NoiseGrid:
    """`measured_grid` of an undistilled network, on this process's device; latents and labels are drawn as for images.

    In full fp32, which stays set. data: where label vectors come from. Raises what `measured_grid` raises.
    """
    labels = choose_labels(network, None, data if network.has_label_vectors else None)
    allow_tf32(False)
    before, device = next(network.net.parameters()).device, dist.device()
    net = network.net.to(device)

    def draw(seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        _, latents, drawn = draw_inputs(net, seeds, labels, "cpu")  # the same numbers on every device
        return latents.to(device), None if drawn is None else drawn.to(device)

    try:
        return measured_grid(net, draw, chain, solver)
    finally:
        network.net.to(before)


@torch.no_grad()
def sample_batch(
    net: Any, seeds: Sequence[int], plan: Plan, device: torch.device | str, labels: Labels | None = None
) -> Batch:
    """One image per seed, in one batch. Draws in EDM's order: latent, class (even where one is imposed), churn."""
    random, latents, drawn = draw_inputs(net, seeds, labels, device)
    try:
        images = plan.sample(net, latents, drawn, random.randn_like)
    except (TypeError, AttributeError, ValueError, LookupError) as exc:
        if persistence.is_own(getattr(net, "_orig_mod", net)):
            raise
        name, reason = type(net).__name__, f"{type(exc).__name__}: {exc}"
        raise UserError(printable(f"the network, of foreign code ({name}), can't be sampled: {reason}")) from exc
    return Batch(list(seeds), images.to(torch.float32), drawn)


def iterate_images(
    network: NetworkFile,
    seeds: Sequence[int],
    *,
    max_batch: int = 64,
    device: torch.device | str,
    class_idx: Condition = None,
    labels: LabelSource = None,
    is_shared: bool = True,
    plan: Plan | None = None,
    **options: Any,
) -> Iterator[Batch]:
    """Images of `network` for `seeds`, in batches of at most `max_batch`; if `is_shared`, this process's share of them.

    Moves the network to `device`. Options are those of `plan_sampling` where no `plan` is given, `class_idx` and
    `labels` those of `choose_labels`, whose errors are raised at once.
    """
    plan = plan or plan_sampling(network, **options)
    chosen = choose_labels(network, class_idx, labels)
    net = network.net.to(device)
    batches = own_batches(seeds, max_batch) if is_shared else split_seeds(seeds, count_batches(len(seeds), max_batch))
    return (sample_batch(net, batch, plan, device, chosen) for batch in batches)


def sample(
    network: NetworkFile,
    seeds: Sequence[int],
    *,
    class_idx: Condition = None,
    labels: LabelSource = None,
    device: torch.device | str | None = None,
    batch: int = 64,
    raw: bool = False,
    **options: Any,
) -> Any:
    """One image per seed, in the order of `seeds`: numpy uint8 [N, H, W, C], the pixels that `generate.py` writes.

    network    what `load_network` returns; moved to the device
    class_idx  a class, a list of classes of which each seed draws one, or a label vector; None: any class
    labels     draw from these instead: path of a data set or .npy file, or an array (see `choose_labels`)
    device     None: CUDA where there is a GPU, else the CPU
    batch      images at a time
    raw        return a tensor float32 [N, C, H, W] on the CPU instead, in [-1, 1] as far as the network keeps to it
    options    steps, solver, S_churn, ... of `plan_sampling`: a student needs none

    Raises UsageError for what contradicts a distilled network's grid or its classes, UserError for images that are NaN.
    """
    if len(seeds) == 0 or batch < 1:
        raise UsageError(f"seeds are {len(seeds)}, batch is {batch}: both must be at least 1")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options |= {"max_batch": batch, "device": where, "class_idx": class_idx, "labels": labels}
    parts = []
    for made in iterate_images(network, seeds, is_shared=False, **options):
        images = made.checked(network.source)
        parts.append(images.cpu() if raw else to_uint8(images.double()).permute(0, 2, 3, 1).cpu())
    together = torch.cat(parts)
    return together if raw else together.numpy()
