"""The method against exact answers: for Gaussian data every solver step shrinks x - mean by a known factor."""

import pytest
import torch

from helpers import gaussian
from training.draws import StepDraws
from training.grids import NoiseGrid, network_grid
from training.loss import WEIGHTINGS, EDMDistillationLoss, edm_weight
from training.samplers import edm_sampler, grid_sampler
from training.solvers import euler_jump, jump_target


def exact_landing(teacher, x, levels, solver):
    for t, s in zip(levels, levels[1:], strict=False):
        x = teacher.mean + teacher.decay(t, s, solver) * (x - teacher.mean)
    return x


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize(("steps", "ratio"), [(8, 2), (9, 3), (16, 4), (6, 6), (32, 2)])
def test_target_is_the_exact_solution_for_every_interval(solver, steps, ratio):
    teacher = gaussian()
    loss = EDMDistillationLoss(teacher, network_grid(teacher, steps), ratio, solver)
    clean = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.5
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for i in range(steps // ratio):
        levels = loss.grid.levels[i * ratio : (i + 1) * ratio + 1]
        jump = loss.jumps(clean, torch.full([3], i), noise)
        x = clean + levels[0] * noise
        landing = exact_landing(teacher, x, levels, solver)
        expected = (landing - levels[-1] / levels[0] * x) / (1 - levels[-1] / levels[0])
        assert jump.target.dtype == torch.float64
        assert (jump.target - expected).abs().max() < 1e-10
        assert (jump.x - x).abs().max() < 1e-12
        if i == steps // ratio - 1:
            assert (jump.s == 0).all() and (jump.target - landing).abs().max() < 1e-12


def test_mixed_intervals_in_one_batch_equal_single_ones():
    teacher = gaussian()
    loss = EDMDistillationLoss(teacher, network_grid(teacher, 8), 2, "heun")
    clean, noise = torch.zeros(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    together = loss.jumps(clean, torch.arange(4), noise).target
    for i in range(4):
        alone = loss.jumps(clean[i : i + 1], torch.tensor([i]), noise[i : i + 1]).target
        assert torch.equal(together[i : i + 1], alone)


class PerfectStudent(torch.nn.Module):
    """Answers every input with the exact target for the interval that starts at its noise level."""

    def __init__(self, teacher, loss):
        super().__init__()
        self.teacher, self.loss, self.calls = teacher, loss, 0
        self.sigma_min, self.sigma_max, self.label_dim = 0.0, float("inf"), 0
        self.img_channels, self.img_resolution = teacher.img_channels, teacher.img_resolution

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, **_):
        self.calls += 1
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        starts = torch.tensor(self.loss.student_grid.levels[:-1], dtype=torch.float64)
        interval = (sigma[:, None] - starts).abs().argmin(dim=1)
        assert torch.equal(starts[interval], sigma), "a student was asked about a level that is not on its grid"
        return self.loss.jumps(torch.zeros_like(x), interval, x.double() / sigma.reshape(-1, 1, 1, 1)).target


def test_a_ladder_of_perfect_students_keeps_the_teachers_end_points():
    """16 Heun steps -> 8 -> 4 -> 2 -> 1: every student through the sampler lands where the first teacher lands."""
    net = gaussian()
    latents = torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grid, solver = network_grid(net, 16), "heun"
    ends = edm_sampler(net, latents, num_steps=16)
    closed_form = exact_landing(net, latents * 80, grid.levels, "heun")
    assert (ends - closed_form).abs().max() < 1e-10
    for _ in range(4):
        loss = EDMDistillationLoss(net, grid, 2, solver)
        net, grid, solver = PerfectStudent(net, loss), loss.student_grid, "euler"
        mine = grid_sampler(net, latents, grid)
        assert net.calls == grid.steps
        assert (mine - ends).abs().max() < 1e-9
    assert grid.levels == (80.0, 0.0)


def test_target_inverts_the_jump():
    x, landing = torch.randn(2, 1, 3, 3).double(), torch.randn(2, 1, 3, 3).double()
    t, s = torch.tensor([5.0, 2.0]).double().reshape(2, 1, 1, 1), torch.tensor([3.0, 0.0]).double().reshape(2, 1, 1, 1)
    assert (euler_jump(x, jump_target(x, landing, t, s), t, s) - landing).abs().max() < 1e-12
    assert torch.equal(jump_target(x, landing, t, s)[1], landing[1])


def test_weightings():
    t, s = torch.tensor([0.1, 2.0]), torch.tensor([0.05, 0.0])
    close = lambda name, values: torch.allclose(WEIGHTINGS[name](t, s, 0.5), torch.tensor(values))  # noqa: E731
    assert close("edm", [(0.01 + 0.25) / 0.0025, (4 + 0.25) / 1])
    assert close("snr-trunc", [100.0, 1.0])
    assert close("snr+1", [101.0, 1.25])
    assert close("jump", [104 * 0.25, 4.25])
    assert torch.allclose(edm_weight(t, None), torch.tensor([100.0, 0.25]))


def test_edm_weighting_is_a_plain_loss_in_the_networks_own_output():
    """1 / c_out^2 undoes EDM's output scaling, with the network's own sigma_data."""
    from helpers import small_network

    net = small_network(sigma_data=0.7).eval()
    teacher = small_network(sigma_data=0.7).eval().requires_grad_(False)
    loss = EDMDistillationLoss(teacher, network_grid(teacher, 4), 2, "heun", "edm")
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    draws = lambda: StepDraws(0, 0, 4, "cpu").part(0, 4)  # noqa: E731
    value = loss(net, images, draws=draws())
    source = draws()
    interval = source.randint(2, 4)
    jump = loss.jumps(images, interval, source.randn(*images.shape))
    c_out = jump.t * 0.7 / (jump.t**2 + 0.49).sqrt()
    expected = ((net(jump.x, jump.t.flatten()) - jump.target) / c_out) ** 2
    assert torch.allclose(value.double(), expected, rtol=1e-4, atol=1e-7)


def test_intervals_are_uniform_and_drawn_per_image():
    teacher = gaussian()
    loss = EDMDistillationLoss(teacher, network_grid(teacher, 8), 2)
    counts = torch.zeros(4)
    for step in range(50):
        interval = StepDraws(1, step, 64, "cpu").part(0, 64).randint(loss.student_grid.steps, 64)
        counts += torch.bincount(interval, minlength=4)
    assert (counts / counts.sum() - 0.25).abs().max() < 0.02


def test_unknown_settings_are_refused():
    grid = NoiseGrid((2.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="weighting"):
        EDMDistillationLoss(gaussian(), grid, weighting="best")
    with pytest.raises(ValueError, match="solver"):
        EDMDistillationLoss(gaussian(), grid, solver="rk4")
    with pytest.raises(ValueError, match="3 at a time"):
        EDMDistillationLoss(gaussian(), grid, ratio=3)


def test_teacher_and_student_are_told_the_same(monkeypatch):
    """Class and augmentation labels reach every call of the teacher and the student's one, unchanged."""
    from helpers import small_network
    from training.augment import AugmentPipe

    teacher, net = small_network(label_dim=4, augment_dim=9).eval(), small_network(label_dim=4, augment_dim=9).eval()
    told = []
    for module in (teacher, net):
        monkeypatch.setattr(
            module, "forward", lambda x, t, labels, augment_labels: told.append((labels, augment_labels)) or x / 2
        )
    labels = torch.eye(4)
    loss = EDMDistillationLoss(teacher, network_grid(teacher, 4), 2, "heun")
    loss(net, torch.rand(4, 1, 8, 8), labels, None, StepDraws(0, 0, 4, "cpu").part(0, 4))
    assert len(told) == 5 and all(a is labels and not b.any() and b.shape == (4, 9) for a, b in told)
    told.clear()
    pipe = AugmentPipe(p=1, scale=1, xflip=1e8, yflip=1, rotate_frac=1, aniso=1, translate_frac=1)
    loss(net, torch.rand(4, 1, 8, 8), labels, pipe, StepDraws(0, 0, 4, "cpu").part(0, 4))
    assert len(told) == 5 and all(a is labels and b is told[0][1] and b.any() for a, b in told)
