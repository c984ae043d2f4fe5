"""docs/derivation.md against the code: every name in it exists, every printed digit is computed again."""

import ast
import math
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from helpers import GaussianDenoiser, gaussian
from training.grids import NoiseGrid, karras_levels, network_grid
from training.intervals import UNIFORM_PART, Intervals
from training.networks import EDMPrecond
from training.optimizer import ema_exponent
from training.samplers import grid_sampler, nfe
from training.solvers import euler_jump, heun_step, jump_target, teacher_landing
from training.weighting import WEIGHTINGS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())  # so that a sentence may be wrapped anywhere
NAME = re.compile(r"`([\w/]+\.py): ([\w.]+)`")
VAR, DEVIATION = 0.25, 0.5  # the Gaussian data of the document


def number(value):
    return torch.tensor(float(value), dtype=torch.float64).reshape(1, 1, 1, 1)


def scalar_gaussian():
    return GaussianDenoiser(torch.zeros(1, 1, 1), torch.full((1, 1, 1), VAR))


def flow(t, s):
    """Factor of x - mean under the exact flow."""
    return math.sqrt((VAR + s**2) / (VAR + t**2))


def secant(t, s, landing=None):
    """Factor of x - mean in the jump target that lands where the flow does, by the code's own inverse."""
    return jump_target(number(1), number(flow(t, s) if landing is None else landing), number(t), number(s)).item()


def denoised(t):
    return scalar_gaussian()(number(1), number(t)).item()


def spread(t):
    """Deviation of x at t."""
    return math.sqrt(VAR + t**2)


def grid(steps, ratio=1):
    return network_grid(gaussian(), steps).every(ratio)


def table(header):
    """Cells of the rows below the table line that starts with `header`."""
    lines = TEXT.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(header)]
    assert len(starts) == 1, header
    assert re.fullmatch(r"\|( --- \|)+", lines[starts[0] + 1])
    rows = []
    for line in lines[starts[0] + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
        assert len(rows[-1]) == lines[starts[0]].count("|") - 1
    return rows


def says(sentence):
    assert WORDS.count(sentence) == 1, f"docs/derivation.md does not say: {sentence}"


@cache
def defined(path):
    """Dotted names of the functions, classes, methods and constants that a file defines."""

    def walk(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(walk(ast.parse((ROOT / path).read_text(encoding="utf-8")).body, ""))


def test_every_name_in_the_document_exists():
    names = set(NAME.findall(TEXT))
    assert len(names) > 25
    assert [f"{path}: {name}" for path, name in names if name not in defined(path)] == []
    assert len(re.findall(r"\.py: ", TEXT)) == len(NAME.findall(TEXT)), "a name in another form is not checked"


def test_nested_and_fresh_grids():
    rows = table("| i | 0 |")
    nested, fresh = grid(32, 2).levels, grid(16).levels
    index = [0, 1, 2, 4, 8, 12, 14, 15]
    assert rows[0][1:] == [f"{nested[i]:.4g}" for i in index]
    assert rows[1][1:] == [f"{fresh[i]:.4g}" for i in index]
    assert rows[2][1:] == [f"{fresh[i] / nested[i]:.3f}" for i in index]
    assert nested == grid(32).levels[::2] and fresh[15] == pytest.approx(0.002)
    says(f"The 16-step student was taught to answer at {nested[1]:.4g} with the jump that ends at {nested[2]:.4g}.")
    says(f"It is then asked at {fresh[1]:.4g}, where it was never trained,")
    says(f"and its answer is used for a jump to {fresh[2]:.4g}.")
    ramp = [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)]
    assert karras_levels(10) == pytest.approx(ramp, rel=1e-12)


def test_cost():
    assert nfe(16, "heun") == 31 and nfe(16, "euler") == 16
    says("16 Heun steps are 31 calls; a 16-step student makes 16.")


def test_clamped_last_interval():
    low = 0.002

    def wrong(t):
        return abs(secant(t, low) - flow(t, 0)) * spread(t)

    a, b = grid(32).levels[-3], grid(32).levels[24]
    says(
        f"an error of {wrong(a):.1e} (root mean square) at $`t`$ = {a:.4g}, {wrong(b):.1e} at $`t`$ = {b:.4g} and "
        f"{wrong(80):.1e}, about $`\\sigma_{{min}}`$, at $`t`$ = 80."
    )


def test_targets_are_weighted_means_of_the_teachers_outputs():
    net, x = gaussian(), torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9
    t, u, s = number(9), number(5), number(2)
    mid = euler_jump(x, net(x, t), t, u)
    target = jump_target(x, teacher_landing(net, x, torch.stack([t, u, s]), "euler"), t, s)
    first, second = s / u * (1 - u / t) / (1 - s / t), (1 - s / u) / (1 - s / t)
    assert (first * net(x, t) + second * net(mid, u) - target).abs().max() < 1e-12
    assert first + second == pytest.approx(1) and min(first, second) > 0
    target = jump_target(x, heun_step(net, x, t, s), t, s)
    expected = (1 - t / (2 * s)) * net(x, t) + t / (2 * s) * net(euler_jump(x, net(x, t), t, s), s)
    assert (expected - target).abs().max() < 1e-12
    extreme = {n: max(t / (2 * s) for t, s in pairwise(grid(n).levels[:-1])) for n in (32, 16)}
    says(
        f"On 32 levels the extreme pair is −{extreme[32] - 1:.2f} and {extreme[32]:.2f}, on 16 levels "
        f"−{extreme[16] - 1:.2f} and {extreme[16]:.2f}, at the lowest levels."
    )


def test_one_error_in_three_spaces():
    random = torch.Generator().manual_seed(0)
    x, raw, wanted = (torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=random) for _ in range(3))
    t, s = number(3), number(0.7)
    net = EDMPrecond.__new__(EDMPrecond)
    torch.nn.Module.__init__(net)
    net.sigma_data = DEVIATION
    c_skip, c_out, _, _ = net.scalings(t)
    assert c_skip.item() == pytest.approx(VAR / (9 + VAR)) and c_out.item() == pytest.approx(1.5 / math.sqrt(9 + VAR))
    answer, target = c_skip * x + c_out * raw, c_skip * x + c_out * wanted
    error = (answer - target).square().sum()
    landing = (euler_jump(x, answer, t, s) - euler_jump(x, target, t, s)).square().sum()
    assert error == pytest.approx((c_out**2 * (raw - wanted).square().sum()).item())
    assert error == pytest.approx(((1 - s / t) ** -2 * landing).item())
    assert WEIGHTINGS["edm"](t, s, DEVIATION).item() == pytest.approx((1 / c_out**2).item())
    assert WEIGHTINGS["landing"](t, s, DEVIATION) * error == pytest.approx(landing.item())


@pytest.mark.parametrize(("t", "s"), [(40.0, 20.0), (2.0, 0.5), (0.3, 0.0)])
def test_weightings_are_the_formulas(t, s):
    value = {name: weight(number(t), number(s), DEVIATION).item() for name, weight in WEIGHTINGS.items()}
    edm, square = 1 / t**2 + 1 / VAR, (1 - s / t) ** 2
    c_out = t * DEVIATION / math.sqrt(t**2 + VAR)
    assert value == pytest.approx(
        {
            "edm": edm,
            "snr-trunc": max(1 / t**2, 1),
            "snr+1": 1 / t**2 + 1,
            "jump": edm * square,
            "geomean": square / c_out,
            "landing": square,
            "endpoint": square / (1 + (s / (4 * DEVIATION)) ** 2),
        }
    )
    assert value["geomean"] == pytest.approx(math.sqrt(value["jump"] * value["landing"]))
    assert value["endpoint"] == pytest.approx(square * amplification(s, 4 * DEVIATION) ** 2)
    assert value["snr+1"] == pytest.approx(WEIGHTINGS["edm"](number(t), number(s), 1.0).item())
    assert WEIGHTINGS["edm"](number(t), number(s), None).item() == pytest.approx(1 / t**2)
    says("At $`\\sigma_{data} = 0.5`$ `edm` tends to 4 at high noise where the other two tend to 1;")
    assert 1 / VAR == 4


def test_salimans_and_hos_variables():
    """DDIM's step and their target, divided by alpha_s, are the Euler jump and its inverse; v counts SNR + 1."""
    random = torch.Generator().manual_seed(0)
    z, clean, landing = (torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=random) for _ in range(3))
    (alpha_t, beta_t), (alpha_s, beta_s) = ((math.cos(a), math.sin(a)) for a in (1.2, 0.5))
    t, s = number(beta_t / alpha_t), number(beta_s / alpha_s)
    ddim = alpha_s * clean + beta_s / beta_t * (z - alpha_t * clean)
    assert (ddim / alpha_s - euler_jump(z / alpha_t, clean, t, s)).abs().max() < 1e-12
    theirs = (landing - beta_s / beta_t * z) / (alpha_s - beta_s / beta_t * alpha_t)
    assert (theirs - jump_target(z / alpha_t, landing / alpha_s, t, s)).abs().max() < 1e-12
    noise = (z - alpha_t * clean) / beta_t
    v, other = alpha_t * noise - beta_t * clean, clean + 1
    v_other = alpha_t * (z - alpha_t * other) / beta_t - beta_t * other
    assert (v - v_other).square() == pytest.approx((1 / t**2 + 1).expand_as(v))


def amplification(s, deviation=DEVIATION):
    return deviation / math.sqrt(deviation**2 + s**2)


def modes(x, sigma, place=0.5, width=0.2):
    """Ideal denoiser of two Gaussians at -place and +place, and the posterior variance."""
    total = width**2 + sigma**2
    side = torch.tanh(place * x / total)
    mean = (width**2 * x + sigma**2 * place * side) / total
    return mean, width**2 * sigma**2 / total + (sigma**2 * place / total) ** 2 * (1 - side**2)


def carried(denoise, s, x=0.0, step=1e-5):
    """Numerical Jacobian of the flow from s to 0 by many of the code's own Heun steps, two starts side by side."""
    levels = torch.tensor([*torch.linspace(s, 0.005, 400).tolist(), 0.0], dtype=torch.float64)
    starts = torch.tensor([x - step, x + step], dtype=torch.float64).reshape(2, 1, 1, 1)
    ends = teacher_landing(denoise, starts, levels[:, None, None, None, None].expand(-1, 2, 1, 1, 1), "heun")
    return float(ends[1] - ends[0]) / (2 * step)


def integrated(variance, s):
    """Formula (16) for a trajectory that stays at x = 0: exp of the integral of (C / sigma^2 - 1) / sigma from 0 to s."""
    levels = torch.logspace(math.log10(s), -4, 4000, dtype=torch.float64)
    rate = (1 - variance(levels) / levels**2) / levels
    return math.exp(torch.trapezoid(rate, levels).item())


def test_a_landing_error_is_carried_by_the_jacobian():
    zero = torch.zeros(1, dtype=torch.float64)
    for s in (0.1, 0.5, 2.0):
        assert carried(scalar_gaussian(), s) == pytest.approx(amplification(s), rel=2e-3)
        gaussian_variance = lambda sigma: VAR * sigma**2 / (VAR + sigma**2)  # noqa: E731
        assert integrated(gaussian_variance, s) == pytest.approx(amplification(s), rel=1e-4)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    mean, variance = modes(x, 0.4)
    assert torch.autograd.grad(mean.sum(), x)[0] == pytest.approx((variance / 0.4**2).detach())
    found = carried(lambda x, sigma: modes(x, sigma)[0], 0.5)
    density = lambda var: math.exp(-0.125 / var) / math.sqrt(var)  # noqa: E731  # at 0; the flow keeps quantiles
    assert found == pytest.approx(density(0.04 + 0.25) / density(0.04), rel=2e-3)
    assert integrated(lambda sigma: modes(zero, sigma)[1], 0.5) == pytest.approx(found, rel=2e-3)
    says(
        "for one pixel with values ±0.5, each spread by 0.2, an error midway at $`s`$ = 0.5 grows "
        f"{found:.1f}-fold, because it decides on which side the sample ends."
    )


def test_illustration_of_an_8_step_student():
    rows = table("| interval | share |")
    levels = [80.0, *(float(f"{level:.2g}" if level < 1 else f"{level:.3g}") for level in grid(16, 2).levels[1:])]
    assert [row[0] for row in rows] == [f"{t:g} → {s:g}" for t, s in pairwise(levels)]
    assert [row[1] for row in rows] == ["0.000", "0.000", "0.002", "0.14", "0.57", "0.063", "0.002", "0.000"]
    assert [row[2] for row in rows] == ["0.04", "0.11", "0.45", "1.71", "1.14", "0.80", "0.85", "1.0"]
    assert [row[3] for row in rows] == [f"{amplification(s):.3f}" for s in grid(16, 2).levels[1:]]
    shares = [float(row[1]) for row in rows]
    says(f"The shares sum to {sum(shares):.2f}:")
    says(f"Two intervals of eight carry {sum(sorted(shares)[-2:]):.2f};")
    fitted = [s * a / math.sqrt(1 - a**2) for s, a in zip(grid(16, 2).levels[1:4], (0.04, 0.11, 0.45), strict=True)]
    says(
        f"gives {fitted[0]:.1f}, {fitted[1]:.1f} and {fitted[2]:.1f}, on either side of the 2 in (18) at "
        "$`\\sigma_{data} = 0.5`$."
    )
    says("with $`\\sigma_d = 4\\,\\sigma_{data}`$, is the weighting `endpoint`:")


def test_second_moments_of_the_interval_rules():
    losses = torch.tensor([1.0] + [0.01] * 7, dtype=torch.float64)
    intervals = Intervals(8, "loss")
    intervals.note(torch.arange(8).repeat(100), losses.repeat(100))
    intervals.end_step()
    rule = intervals.probabilities()
    assert rule == pytest.approx(0.1 / 8 + 0.9 * losses / losses.sum())
    assert UNIFORM_PART == 0.1 and 1 / (8 * rule.min()) < 1 / UNIFORM_PART

    def moment(p):
        assert float(p.sum()) == pytest.approx(1)
        return float((losses / p).sum()) / 64

    best = losses.sqrt() / losses.sqrt().sum()
    uniform, eager = moment(torch.full_like(losses, 1 / 8)), moment(losses / losses.sum())
    assert uniform == pytest.approx(eager) and moment(best) == pytest.approx(float(losses.sqrt().mean()) ** 2)
    random = torch.rand(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert min(moment(p / p.sum()) for p in random) > moment(best)
    says(
        f"For eight intervals, one with mean loss 1 and seven with 0.01: uniform {uniform:.4f}, square root "
        f"{moment(best):.4f}, pure loss {eager:.4f}, rule (22) {moment(rule):.4f}."
    )
    says("The uniform tenth bounds the correction by 10.")


def test_amplification_table():
    rows = table("| stage | t / (t − s) |")
    assert len(rows) == 5
    for row, ratio in zip(rows, (2, 4, 8, 16, 32), strict=True):
        assert row[0] == f"{64 // ratio} → {32 // ratio}"
        factors = []
        for t, s in pairwise(grid(32, ratio).levels):
            moved = jump_target(number(1), number(2), number(t), number(s))
            factors.append((moved - jump_target(number(1), number(1), number(t), number(s))).item())
            assert factors[-1] == pytest.approx(t / (t - s))
        assert row[1] == ", ".join(f"{factor:.2f}" for factor in factors)
    worst = 80 / (80 - grid(32, 2).levels[1])
    says(f"costs the target up to {80 * 2**-24 * worst:.1e} in fp32 and {80 * 2**-8 * worst:.2f} in bf16.")
    assert torch.finfo(torch.float32).eps / 2 == 2**-24 and torch.finfo(torch.bfloat16).eps / 2 == 2**-8
    says("(relative error up to $`2^{-24}`$ in fp32, $`2^{-8}`$ in bf16)")
    says(f"At 64 → 32 the factor reaches {80 / (80 - grid(64, 2).levels[1]):.2f}.")


def test_how_little_there_is_to_learn():
    differ = [abs(secant(t, s) - denoised(t)) * spread(t) for t, s in pairwise(grid(32, 2).levels)]
    says(
        f"differ by at most {max(differ):.4f} and in {sum(d < 0.01 for d in differ)} of {len(differ)} intervals by less "
        "than 0.01 (Gaussian flow, root mean square)."
    )


def test_denoiser_and_target_table():
    rows = table("| t → s | $`D`$: deviation |")
    levels = grid(32, 4).levels
    assert len(rows) == 8
    for row, (t, s) in zip(rows, pairwise(levels), strict=True):
        d, target, f = denoised(t), secant(t, s), flow(t, s)
        assert d == pytest.approx(VAR / (VAR + t**2)) and target == pytest.approx((f - s / t) / (1 - s / t))
        assert row == [
            f"{t:.4g} → {s:.4g}",
            f"{d * spread(t):.4f}",
            f"{target * spread(t):.4f}",
            f"{target / d:.3f}",
        ]
    says(f"At $`t = 80`$ the factor is {secant(80, 0) / denoised(80):.0f}.")
    assert secant(80, 0) / denoised(80) == pytest.approx(spread(80) / DEVIATION)
    assert denoised(80) * spread(80) == pytest.approx(VAR / spread(80))


class PerfectStudent:
    """Exact jumps of the flow on its own grid; raises elsewhere."""

    def __init__(self, levels):
        self.answers = {t: secant(t, s) for t, s in pairwise(levels)}

    def __call__(self, x, sigma, class_labels=None):
        return self.answers[float(sigma)] * x


def test_a_student_is_sampled_by_its_own_jumps_only():
    own = grid(32, 4)
    student, latent = PerfectStudent(own.levels), number(1)

    def end(levels, solver):
        return grid_sampler(student, latent, levels.levels, solver).item() / (80 * flow(80, 0))

    says(
        "The perfect student of the table, sampled by Euler jumps on its grid, ends with the data's deviation times "
        f"{end(own, 'euler'):.3f}; with Heun on the same grid, times {end(own, 'heun'):.3f}."
    )
    says(f"on every second of its own levels ends with {end(own.every(2), 'euler'):.3f} of the deviation.")
    with pytest.raises(KeyError):
        end(NoiseGrid((80.0, 1.0, 0.0)), "euler")


def test_solver_factors_and_their_products():
    net = scalar_gaussian()
    for t, s in [(3.0, 1.0), (0.2, 0.05), (2.0, 0.0)]:
        euler = (VAR + t * s) / (VAR + t**2)
        assert net.decay(t, s, "euler").item() == pytest.approx(euler)
        assert euler_jump(number(1), net(number(1), number(t)), number(t), number(s)).item() == pytest.approx(euler)
        if s > 0:
            heun = 1 + (s - t) / 2 * (t / (VAR + t**2) + s / (VAR + s**2) * euler)
            assert net.decay(t, s, "heun").item() == pytest.approx(heun)
            assert heun_step(net, number(1), number(t), number(s)).item() == pytest.approx(heun)
    rows = table("| steps | 4 | 8 | 16 | 32 |")
    found = {}
    for row, solver in zip(rows, ("euler", "heun"), strict=True):
        ends = [
            grid_sampler(net, number(1), grid(n).levels, solver).item() / (80 * flow(80, 0)) for n in (4, 8, 16, 32)
        ]
        assert row == [solver.capitalize(), *(f"{end:.3f}" for end in ends)]
        found[solver] = ends
    says(f"a student of 8 Heun steps inherits the {found['heun'][1]:.3f}.")


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_power_function_average(std):
    gamma = ema_exponent(std)
    assert math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) == pytest.approx(std)


def test_constants_in_the_text():
    says(f"standard deviation $`\\sigma_d = {DEVIATION}`$ in every pixel.")
    says("with $`\\rho = 7`$, $`\\sigma_{min} = 0.002`$, $`\\sigma_{max} = 80`$.")
    assert karras_levels(3).tolist() == karras_levels(3, 0.002, 80, 7).tolist()
    says("(A network without $`\\sigma_{data}`$ counts as 0.5.)")
    endpoint = WEIGHTINGS["endpoint"]
    assert endpoint(number(3), number(2), None) == endpoint(number(3), number(2), 0.5)
    says("The row with 1.71 is no Gaussian's.")
    says("has $`i/15`$ where nesting has $`2i/31`$,")
