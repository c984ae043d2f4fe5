"""The method against exact answers: for Gaussian data every solver step shrinks x - mean by a known factor."""

import pytest
import torch

from helpers import gaussian, small_network
from torch_utils.training_stats import Collector
from training.distillation import EDMDistillationLoss, SelfTeacherLoss
from training.draws import StepDraws
from training.grids import NoiseGrid, network_grid
from training.intervals import Intervals
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


@pytest.mark.parametrize("self_teacher", [False, True])
def test_mixed_intervals_in_one_batch_equal_single_ones(self_teacher):
    teacher, grid = gaussian(), network_grid(gaussian(), 8)
    if self_teacher:
        loss = SelfTeacherLoss(teacher, gaussian(seed=2), grid, 4, "heun")
    else:
        loss = EDMDistillationLoss(teacher, grid, 2, "heun")
    count = len(loss.starts)
    clean, noise = torch.zeros(count, 2, 4, 4), torch.randn(count, 2, 4, 4)
    together = loss.jumps(clean, torch.arange(count), noise).target
    assert together.isfinite().all()
    for i in range(count):
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
        mine = grid_sampler(net, latents, grid.levels)
        assert net.calls == grid.steps
        assert (mine - ends).abs().max() < 1e-9
    assert grid.levels == (80.0, 0.0)


def test_target_inverts_the_jump():
    x, landing = torch.randn(2, 1, 3, 3).double(), torch.randn(2, 1, 3, 3).double()
    t, s = torch.tensor([5.0, 2.0]).double().reshape(2, 1, 1, 1), torch.tensor([3.0, 0.0]).double().reshape(2, 1, 1, 1)
    assert (euler_jump(x, jump_target(x, landing, t, s), t, s) - landing).abs().max() < 1e-12
    assert torch.equal(jump_target(x, landing, t, s)[1], landing[1])


def test_edm_weighting_is_a_plain_loss_in_the_networks_own_output():
    """1 / c_out^2 undoes EDM's output scaling, with the network's own sigma_data."""

    net = small_network(sigma_data=0.7).eval()
    teacher = small_network(sigma_data=0.7).eval().requires_grad_(False)
    loss = EDMDistillationLoss(teacher, network_grid(teacher, 4), 2, "heun", "edm", "uniform")
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    draws = lambda: StepDraws(0, 0, 4, "cpu").part(0, 4)  # noqa: E731
    value = loss(net, images, draws=draws())
    source = draws()
    interval = source.randint(2, 4)
    jump = loss.jumps(images, interval, source.randn(*images.shape))
    c_out = jump.t * 0.7 / (jump.t**2 + 0.49).sqrt()
    expected = ((net(jump.x, jump.t.flatten()) - jump.target) / c_out) ** 2
    assert torch.allclose(value.double(), expected, rtol=1e-4, atol=1e-7)


def test_unknown_settings_are_refused():
    grid = NoiseGrid((2.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="rule"):
        EDMDistillationLoss(gaussian(), grid, intervals="often")
    with pytest.raises(ValueError, match="weighting"):
        EDMDistillationLoss(gaussian(), grid, weighting="best")
    with pytest.raises(ValueError, match="solver"):
        EDMDistillationLoss(gaussian(), grid, solver="rk4")
    with pytest.raises(ValueError, match="3 at a time"):
        EDMDistillationLoss(gaussian(), grid, ratio=3)


def test_teacher_and_student_are_told_the_same(monkeypatch):
    """Class and augmentation labels reach every call of the teacher and the student's one, unchanged."""
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


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize(("steps", "ratio"), [(8, 4), (9, 3), (6, 6), (4, 2), (3, 1)])
def test_self_teachers_target_is_the_exact_solution_for_every_start(solver, steps, ratio):
    """One step of the teacher, then one jump of another network to the end of the segment, and no more."""
    teacher, other = gaussian(), gaussian(seed=7)
    loss = SelfTeacherLoss(teacher, other, network_grid(teacher, steps), ratio, solver)
    assert loss.starts == loss.grid.levels[:-1]
    clean = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.5
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for j, t in enumerate(loss.starts):
        u, s = loss.grid.levels[j + 1], loss.student_grid.levels[j // ratio + 1]
        jump = loss.jumps(clean, torch.full([3], j), noise)
        x = clean + t * noise
        landing = exact_landing(teacher, x, [t, u], solver)
        if u > s:
            landing = exact_landing(other, landing, [u, s], "euler")
        assert (jump.x - x).abs().max() < 1e-12 and (jump.t == t).all() and (jump.s == s).all()
        assert (jump.target - (landing - s / t * x) / (1 - s / t)).abs().max() < 1e-10


class PerfectSelf(torch.nn.Module):
    """Jumps from every teacher level to where the teacher's remaining steps of the segment lead."""

    def __init__(self, teacher, grid, ratio, solver):
        super().__init__()
        self.teacher, self.grid, self.ratio, self.solver = teacher, grid, ratio, solver

    def forward(self, x, sigma, class_labels=None, **_):
        rows = []
        for image, level in zip(x, sigma, strict=True):
            j = self.grid.levels.index(float(level))
            end = (j // self.ratio + 1) * self.ratio
            landing = exact_landing(self.teacher, image, self.grid.levels[j : end + 1], self.solver)
            rows.append(jump_target(image, landing, level, torch.tensor(self.grid.levels[end], dtype=torch.float64)))
        return torch.stack(rows)


@pytest.mark.parametrize(("steps", "ratio"), [(8, 4), (8, 8)])
def test_a_self_teacher_that_has_learnt_it_gives_the_targets_of_all_the_teachers_steps(steps, ratio):
    """The fixed point of the self-teacher is the student of progressive distillation at the same ratio."""
    teacher = gaussian()
    grid = network_grid(teacher, steps)
    perfect = PerfectSelf(teacher, grid, ratio, "heun")
    mine = SelfTeacherLoss(teacher, perfect, grid, ratio, "heun")
    plain = EDMDistillationLoss(teacher, grid, ratio, "heun")
    clean, noise = torch.rand(2, 2, 4, 4).double(), torch.randn(2, 2, 4, 4).double()
    for i in range(steps // ratio):
        own = mine.jumps(clean, torch.full([2], i * ratio), noise)
        assert (own.target - plain.jumps(clean, torch.full([2], i), noise).target).abs().max() < 1e-9


def test_self_teaching_starts_from_every_level():
    loss = SelfTeacherLoss(gaussian(), gaussian(seed=2), network_grid(gaussian(), 8), 4, "heun")
    seen = []
    original = loss.jumps
    loss.jumps = lambda clean, interval, *rest: seen.append(interval) or original(clean, interval, *rest)
    for step in range(20):
        loss(gaussian(seed=3), torch.rand(64, 2, 4, 4), draws=StepDraws(1, step, 64, "cpu").part(0, 64))
    counts = torch.bincount(torch.cat(seen), minlength=8)
    assert (counts / counts.sum() - 1 / 8).abs().max() < 0.03


def taught(losses, rule="loss", images=64, steps=3):
    """Intervals that have seen `images` of each interval, with these losses, in each of some steps."""
    intervals = Intervals(len(losses), rule)
    for _ in range(steps):
        which = torch.arange(len(losses)).repeat_interleave(images)
        intervals.note(which, torch.tensor(losses)[which])
        intervals.end_step()
    return intervals


def test_intervals_are_drawn_by_their_loss_and_a_tenth_uniformly():
    p = taught([4.0, 1.0, 0.0, 9.0]).probabilities()
    want = torch.tensor([4 / 14, 1 / 14, 0, 9 / 14], dtype=torch.float64) * 0.9 + 0.1 / 4
    assert (p - want).abs().max() < 1e-12 and abs(float(p.sum()) - 1) < 1e-12
    draws = torch.cat(
        [taught([4.0, 1.0, 0.0, 9.0]).draw(StepDraws(3, k, 500, "cpu").part(0, 500), 500)[0] for k in range(40)]
    )
    assert (torch.bincount(draws, minlength=4) / len(draws) - want).abs().max() < 0.012


def test_the_expected_loss_is_that_of_uniform_intervals():
    """Sum over intervals of probability x correction x loss = mean loss, for any probabilities."""
    intervals = taught([4.0, 1.0, 0.01, 9.0])
    p = intervals.probabilities()
    interval, correction = intervals.draw(StepDraws(0, 0, 4000, "cpu").part(0, 4000), 4000)
    assert torch.equal(correction, 1 / (4 * p[interval]))
    values = torch.tensor([3.0, 5.0, 7.0, 11.0], dtype=torch.float64)
    assert float((p / (4 * p) * values).sum()) == pytest.approx(float(values.mean()))
    drawn = correction * values[interval]
    assert abs(float(drawn.mean() - values.mean())) < 4 * float(drawn.std()) / 4000**0.5
    assert 4.0 < float(correction.max()) <= 10.0


def test_intervals_are_uniform_until_all_are_known_and_when_asked_for():
    fresh = Intervals(3, "loss")
    assert torch.equal(fresh.probabilities(), torch.full([3], 1 / 3, dtype=torch.float64))
    fresh.note(torch.tensor([0] * 50 + [1] * 50), torch.ones(100))
    fresh.end_step()
    assert torch.equal(fresh.probabilities(), torch.full([3], 1 / 3, dtype=torch.float64)), "2 was never seen"
    assert torch.equal(taught([1.0, 9.0], "uniform").probabilities(), torch.full([2], 0.5, dtype=torch.float64))
    assert torch.equal(taught([0.0, 0.0]).probabilities(), torch.full([2], 0.5, dtype=torch.float64))


def test_intervals_forget_and_survive_bad_numbers_and_a_state():
    intervals = taught([4.0, 1.0])
    before = intervals.probabilities()
    intervals.note(torch.tensor([0, 1]), torch.tensor([float("nan"), 1.0]))
    intervals.end_step()
    assert torch.allclose(intervals.probabilities(), before) and intervals.seen.isfinite().all()
    for _ in range(600):
        intervals.note(torch.tensor([0, 1]).repeat(32), torch.tensor([1.0, 4.0]).repeat(32))
        intervals.end_step()
    after = intervals.probabilities()
    assert torch.allclose(after, before.flip(0), atol=1e-4)
    other = Intervals(2, "loss")
    other.load_state_dict(intervals.state_dict())
    assert torch.equal(other.probabilities(), after)
    with pytest.raises(ValueError, match="expected"):
        Intervals(3, "loss").load_state_dict(intervals.state_dict())


def test_losses_by_interval_are_reported_and_weighed():
    """What `Loss/interval` says is each interval's mean loss, before the correction of its rarity."""
    teacher, net = gaussian(), gaussian(seed=3)
    loss = EDMDistillationLoss(teacher, network_grid(teacher, 8), 2, intervals="loss")
    loss.intervals = taught([4.0, 1.0, 0.5, 9.0])
    images = torch.rand(64, 2, 4, 4)
    source = lambda: StepDraws(1, 0, 64, "cpu").part(0, 64)  # noqa: E731
    value = loss(net, images, draws=source())
    collector = Collector()
    drawn_with = Intervals(4, "loss")
    drawn_with.load_state_dict(loss.intervals.state_dict())
    collector.report_moments("Loss/interval", loss.intervals.end_step())
    collector.update()
    interval, correction = drawn_with.draw(source(), 64)
    each = (value.double() / correction.reshape(-1, 1, 1, 1)).flatten(1).mean(1)
    for i in range(4):
        found = collector.as_dict()[f"Loss/interval/{i}"]
        assert found["num"] == int((interval == i).sum()) > 0
        assert found["mean"] == pytest.approx(float(each[interval == i].mean()), rel=1e-6)
        assert found["std"] == pytest.approx(float(each[interval == i].std(correction=0)), rel=1e-5)
