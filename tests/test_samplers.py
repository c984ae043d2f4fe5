"""Samplers against the public EDM code's numbers, closed forms, and each other."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import generate
from helpers import gaussian, golden, load_recipe
from training import networks, samplers
from training.grids import network_grid
from training.sampler_table import SOLVERS
from training.samplers import (
    StackedRandomGenerator,
    ablation_sampler,
    dpmpp2m_sampler,
    edm_sampler,
    grid_sampler,
    nfe,
    noise_levels,
)


class Recorder:
    """A network that remembers the noise level of each call. Its noise range can be narrowed."""

    def __init__(self, net: Any, **noise_range: float) -> None:
        self.net, self.sigmas, self.inputs = net, [], []
        self.sigma_min = noise_range.get("sigma_min", net.sigma_min)
        self.sigma_max = noise_range.get("sigma_max", net.sigma_max)
        self.round_sigma = net.round_sigma

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.sigmas.append(float(sigma))
        self.inputs.append(x)
        return self.net(x, sigma, class_labels)


class TwoGaussians:
    """The ideal denoiser, in float64, of pixels drawn from N(a, s^2) or N(-a, s^2) at equal odds."""

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, a: float, s: float) -> None:
        self.a, self.s = a, s

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return torch.as_tensor(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        variance = self.s**2 + sigma**2
        return (self.s**2 * x + sigma**2 * self.a * torch.tanh(self.a * x / variance)) / variance


def tags(data: dict[str, np.ndarray]) -> list[str]:
    return sorted(key.removesuffix("/kwargs_json") for key in data if key.endswith("/kwargs_json"))


EDM = golden("edm_sampler.npz")
ABLATION = golden("ablation_sampler.npz")
ANALYTIC = golden("sampler_analytic.npz")
GRIDS = golden("sigma_grids.npz")


@pytest.fixture(scope="module")
def nets() -> dict[str, Any]:
    """The golden network under each of the four preconditioners."""
    config = json.loads(str(EDM["config_json"]))
    weights = {key[3:]: torch.from_numpy(value) for key, value in EDM.items() if key.startswith("sd/")}
    made = {}
    for name in ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"):
        net = getattr(networks, name)(**config["interface"], **config["network_kwargs"])
        if name == "iDDPMPrecond":  # twice the output channels: its weights come from the recipe
            load_recipe(net, config["weight_seed"])
        else:
            net.load_state_dict(weights)
        made[name] = net.eval().requires_grad_(False)
    return made


def sample(sampler: Any, net: Any, seeds: np.ndarray, tag_kwargs: dict[str, Any]) -> Tensor:
    """Draws in EDM's order: latents, classes, then the sampler's noise."""
    kwargs = dict(tag_kwargs)
    seeds = seeds[: kwargs.pop("nseeds", len(seeds))]
    random = StackedRandomGenerator("cpu", seeds)
    latents = random.randn([len(seeds), 3, 16, 16])
    labels = torch.eye(10)[random.randint(10, size=[len(seeds)])]
    if not kwargs.pop("use_labels", True):
        labels = None
    return sampler(net, latents, labels, randn_like=random.randn_like, **kwargs)


def precond_of(tag: str) -> str:
    return next((name for name in ("iDDPM", "VP", "VE") if tag.startswith(name)), "EDM") + "Precond"


def check_golden(sampler: Any, data: dict[str, np.ndarray], tag: str, nets: dict[str, Any]) -> None:
    net = Recorder(nets[precond_of(tag)])
    images = sample(sampler, net, data["seeds"], json.loads(str(data[f"{tag}/kwargs_json"])))
    assert images.dtype == torch.float64
    # How far apart two correct float32 networks land is stored with each case: measured 1.8 of it at worst, and 4.7
    # for iDDPM, whose float32 table of levels may differ in its last place (2.3e-7).
    slack = 8 if "iDDPM" in tag else 4
    np.testing.assert_allclose(images.numpy(), data[f"{tag}/x"], rtol=0, atol=slack * float(data[f"{tag}/noise_abs"]))
    np.testing.assert_allclose(net.sigmas, data[f"{tag}/net_sigmas"], rtol=1e-6 if "iDDPM" in tag else 1e-10)


@pytest.mark.parametrize("tag", tags(EDM))
def test_edm_sampler_golden(tag: str, nets: dict[str, Any]) -> None:
    check_golden(edm_sampler, EDM, tag, nets)


@pytest.mark.parametrize("tag", tags(ABLATION))
def test_ablation_sampler_golden(tag: str, nets: dict[str, Any]) -> None:
    check_golden(ablation_sampler, ABLATION, tag, nets)


def test_ablation_golden_covers_all_48() -> None:
    names = itertools.product(("euler", "heun"), ("vp", "ve", "iddpm", "edm"), ("vp", "ve", "linear"), ("vp", "none"))
    assert {"-".join(name) for name in names} <= set(tags(ABLATION))


@pytest.mark.parametrize("tag", tags(ANALYTIC))
def test_samplers_analytic(tag: str) -> None:
    """All in float64: the algorithms, to rounding."""
    kwargs = json.loads(str(ANALYTIC[f"{tag}/kwargs_json"]))
    clamp = {"sigma_min": 0.01, "sigma_max": 50.0} if tag == "edm_clamped" else {}
    net = Recorder(TwoGaussians(float(ANALYTIC["a"]), float(ANALYTIC["s"])), **clamp)
    random = StackedRandomGenerator("cpu", ANALYTIC["seeds"])
    latents = random.randn([len(ANALYTIC["seeds"]), 3, 8, 8])
    sampler = ablation_sampler if tag.startswith("abl") else edm_sampler
    images = sampler(net, latents, None, randn_like=random.randn_like, **kwargs)
    np.testing.assert_allclose(images.numpy(), ANALYTIC[f"{tag}/x"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(net.sigmas, ANALYTIC[f"{tag}/net_sigmas"], rtol=1e-10)


@pytest.mark.parametrize("key", sorted(GRIDS))
def test_noise_levels_golden(key: str) -> None:
    kind, name = key.split("/")
    steps, rho = name[1:].split("_rho") if "_rho" in name else (name[1:], "7")
    low, high = (0.01, 20.0) if "0.01_20" in kind else (None, None)
    epsilon_s = 1e-2 if "eps1e-2" in kind else 1e-3
    net = TwoGaussians(1, 1)
    if "netclamp" in kind:
        net.sigma_min, net.sigma_max = 0.02, 100.0
    discretization = "edm" if kind.startswith("edm") else kind.split("_")[1]
    table = {"M": 500, "C_1": 0.002, "C_2": 0.01} if "M500" in kind else {}
    levels = noise_levels(net, discretization, int(steps), low, high, float(rho), epsilon_s, **table)
    np.testing.assert_allclose(levels, GRIDS[key], rtol=1e-12)


@pytest.mark.parametrize("discretization", ["vp", "ve", "iddpm", "edm"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_one_step_is_one_jump(discretization: str, solver: str) -> None:
    """From the highest noise level straight to the denoised image. (EDM divided 0 by 0 here.)"""
    net = Recorder(gaussian())
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = ablation_sampler(net, latents, num_steps=1, solver=solver, discretization=discretization)
    [sigma] = net.sigmas
    assert sigma == pytest.approx({"vp": 152.167, "ve": 100, "iddpm": 80.204, "edm": 80}[discretization], rel=1e-5)
    torch.testing.assert_close(images, net.net(latents * sigma, sigma), rtol=0, atol=1e-11)


@pytest.mark.parametrize("scaling", ["vp", "none"])
@pytest.mark.parametrize("discretization", ["vp", "ve", "iddpm", "edm"])
def test_one_step_on_curved_schedules(discretization: str, scaling: str) -> None:
    """VE's time is sigma^2: along it a straight step to 0 goes half way to the denoised image, plain or scaled by s."""
    net = Recorder(gaussian())
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = ablation_sampler(net, latents, num_steps=1, discretization=discretization, schedule="ve", scaling=scaling)
    [sigma] = net.sigmas
    x, s = latents * sigma, 1 / math.sqrt(1 + sigma**2)
    half_way = (x + net.net(x, sigma)) / 2
    # s(t) = (1 + t)^(-1/2): the step adds -t s'/s times the scaled state, and t s'/s = -t / (2 (1 + t)).
    expected = s * (half_way + x * sigma**2 / (2 * (1 + sigma**2))) if scaling == "vp" else half_way
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_grid_sampler_closed_form(solver: str, steps: int) -> None:
    """On Gaussian data each step shrinks the distance to the mean by a factor that can be written down."""
    net = gaussian()
    grid = network_grid(net, steps)
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = grid_sampler(net, latents, grid.levels, solver)
    offset = latents * grid.levels[0] - net.mean
    for t, s in itertools.pairwise(grid.levels):
        offset = offset * net.decay(t, s, solver)
    torch.testing.assert_close(images, net.mean + offset, rtol=0, atol=1e-11)
    assert net.calls == nfe(steps, solver) == (steps if solver == "euler" else 2 * steps - 1)


@pytest.mark.parametrize("precond", ["EDMPrecond", "iDDPMPrecond"])
def test_samplers_agree(precond: str, nets: dict[str, Any]) -> None:
    """EDM's sampler without churn is Heun on the network's grid, to the bit; the ablation sampler's Euler is Euler."""
    net = nets[precond]
    latents = StackedRandomGenerator("cpu", [3, 4]).randn([2, 3, 16, 16])
    labels = torch.eye(10)[[1, 2]]
    grid = network_grid(net, 6)
    assert torch.equal(
        edm_sampler(net, latents, labels, num_steps=6), grid_sampler(net, latents, grid.levels, "heun", labels)
    )
    euler = ablation_sampler(net, latents, labels, num_steps=6, solver="euler")
    if precond == "EDMPrecond":
        torch.testing.assert_close(euler, grid_sampler(net, latents, grid.levels, "euler", labels), rtol=0, atol=1e-5)


def test_grid_sampler_ends_on_the_denoiser() -> None:
    """The last jump lands on the denoised image itself, bit for bit."""
    net = Recorder(gaussian())
    latents = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    images = grid_sampler(net, latents, (5.0, 0.5, 0.0))
    assert torch.equal(images, net.net(net.inputs[-1], torch.tensor(0.5)))


def test_heun_converges_in_second_order() -> None:
    """Halving the steps of a fine grid quarters the error against the exact solution of the Gaussian's ODE."""
    net = gaussian()
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start, end = 10.0, 0.1

    def error(solver: str, steps: int) -> float:
        levels = np.geomspace(start, end, steps + 1).tolist()
        images = grid_sampler(net, latents, (*levels, 0.0), solver)
        exact = (latents * start - net.mean) * ((net.var + end**2) / (net.var + start**2)).sqrt()
        return float(((images - net.mean) / net.decay(end, 0, "euler") - exact).abs().max())

    assert error("heun", 64) / error("heun", 128) == pytest.approx(4, rel=0.15)
    assert error("euler", 64) / error("euler", 128) == pytest.approx(2, rel=0.15)


def test_dpmpp2m_converges_in_second_order() -> None:
    """Twice the steps, a quarter of the error: the exact solution down to sigma_min, and the jump from there to 0."""
    net = gaussian()
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    high, low = 10.0, 0.1

    def error(steps: int) -> float:
        net.calls = 0
        images = dpmpp2m_sampler(net, latents, num_steps=steps + 1, sigma_min=low, sigma_max=high)
        assert net.calls == nfe(steps + 1, "dpmpp2m") == steps + 1
        exact = (latents * high - net.mean) * ((net.var + low**2) / (net.var + high**2)).sqrt()
        return float((images - net.mean - exact * net.decay(low, 0, "euler")).abs().max())

    assert error(128) / error(256) == pytest.approx(4, rel=0.15)
    assert error(256) < 1e-3


def test_dpmpp2m_written_out() -> None:
    """Three steps, in the variables of Lu et al. 2022: lambda = -ln sigma, r = last step / this step."""
    net = TwoGaussians(0.6, 0.2)
    x = latents = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c = noise_levels(net, "edm", 3)
    first = net(x * a, a)
    x = b / a * x * a - (b / a - 1) * first
    second = net(x, b)
    r = math.log(a / b) / math.log(b / c)
    x = c / b * x - (c / b - 1) * ((1 + 1 / (2 * r)) * second - 1 / (2 * r) * first)
    images = dpmpp2m_sampler(net, latents, num_steps=3)
    torch.testing.assert_close(images, net(x, c), rtol=0, atol=1e-12)


def test_dpmpp2m_beats_heun_at_eight_calls() -> None:
    """On a mixture of two Gaussians, against Heun with seven calls and with nine."""
    net = TwoGaussians(0.5, 0.25)
    latents = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = edm_sampler(net, latents, num_steps=1000)

    def error(images: Tensor) -> float:
        return float((images - exact).square().mean().sqrt())

    ours = error(dpmpp2m_sampler(net, latents, num_steps=8))
    for steps, calls in ((4, 7), (5, 9)):
        assert nfe(steps, "heun") == calls
        assert ours < 0.2 * error(edm_sampler(net, latents, num_steps=steps))


def test_every_solver_of_the_table() -> None:
    """Each is a sampler that makes as many network calls as the table gives, and generate.py offers it."""
    net = gaussian()
    for solver, method in SOLVERS.items():
        sampler = getattr(samplers, method.sampler)
        more = {"solver": solver} if "solver" in inspect.signature(sampler).parameters else {}
        for steps in (1, 2, 5):
            net.calls = 0
            images = sampler(net, torch.randn(2, 2, 4, 4, dtype=torch.float64), num_steps=steps, **more)
            assert images.shape == (2, 2, 4, 4) and net.calls == method.nfe(steps)
    option = next(each for each in generate.command.params if each.name == "solver")
    assert list(option.type.choices) == list(SOLVERS) and all(name in option.help for name in SOLVERS)


def test_stacked_random_generator_golden() -> None:
    data = golden("latents.npz")
    random = StackedRandomGenerator("cpu", data["seeds"])
    latents = random.randn([4, 3, 16, 16])
    assert np.array_equal(latents, data["latents"])
    assert np.array_equal(random.randint(10, size=[4]), data["label_idx_after_latents"])
    assert np.array_equal(random.randn_like(latents.double()), data["randn_like_f64_draw0"])
    assert np.array_equal(random.randn_like(latents.double()), data["randn_like_f64_draw1"])
    assert torch.equal(StackedRandomGenerator("cpu", data["seeds"] + 2**32).randn([4, 3, 16, 16]), latents)
    assert np.array_equal(StackedRandomGenerator("cpu", [-1, -5]).randn([2, 1, 4, 4]), data["latents_seeds_neg1_neg5"])
    assert np.array_equal(StackedRandomGenerator("cpu", [0]).randn([1, 3, 32, 32]), data["latent_seed0_3x32x32"])


def test_stacked_random_generator_refuses_other_sizes() -> None:
    random = StackedRandomGenerator("cpu", [1, 2])
    for size in ([3, 1], []):
        with pytest.raises(ValueError, match="2 seeds cannot fill"):
            random.randn(size)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"solver": "rk4"}, "unknown solver 'rk4'"),
        ({"discretization": "cosine"}, "unknown discretization"),
        ({"schedule": "cosine"}, "unknown schedule"),
        ({"scaling": "ve"}, "unknown scaling"),
        ({"num_steps": 0}, "at least one step"),
        ({"sigma_min": 90.0}, "leave nothing to sample"),
        ({"sigma_max": 2.0, "sigma_min": 2.0}, "leave nothing to sample"),
        ({"discretization": "iddpm", "sigma_min": 0.0070, "sigma_max": 0.0071}, "no noise level between"),
    ],
)
def test_bad_settings(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablation_sampler(gaussian(), torch.zeros(1, 2, 4, 4), **kwargs)
    if kwargs == {"solver": "rk4"}:
        with pytest.raises(ValueError, match=message):
            grid_sampler(gaussian(), torch.zeros(1, 2, 4, 4), (1.0, 0.0), "rk4")
