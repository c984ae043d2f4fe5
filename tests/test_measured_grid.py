"""Noise grids chosen by measurement: against closed forms, and against trying out every grid."""

import json
import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

import distill
import generate
import train
from dnnlib.errors import UsageError
from engine import setup
from formats.network_files import load_network, save_network
from helpers import GaussianDenoiser, make_dataset, small_network
from training import measured_grid as module
from training.grids import NoiseGrid, network_grid
from training.measured_grid import (
    euler_costs,
    fine_grid,
    fine_path,
    heun_costs,
    made_by,
    measured_grid,
    nested_levels,
    shrinkage,
)
from training.recipe import Options
from training.sampling import plan_sampling, sample

DEVIATION = 0.5  # of the Gaussian data


def gaussian():
    return GaussianDenoiser(torch.zeros(1, 2, 2), torch.full((1, 2, 2), DEVIATION**2))


def exact_factor(t, s):
    """Of x - mean, under the exact flow of Gaussian data."""
    return math.sqrt((DEVIATION**2 + s**2) / (DEVIATION**2 + t**2))


def euler_factor(t, s):
    """Of x - mean, in an Euler jump with the ideal denoiser."""
    return s / t + (1 - s / t) * DEVIATION**2 / (DEVIATION**2 + t**2)


def test_costs_of_gaussian_data_are_those_of_the_closed_form():
    net = gaussian()
    grid = network_grid(net, 64)
    latents = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = fine_path(lambda x, sigma: net(x, sigma), latents, grid)
    costs = euler_costs(path)
    square = path.states.square().mean(dim=(1, 2, 3, 4))
    for i, j in [(0, 40), (5, 30), (20, 64), (30, 50), (63, 64)]:
        t, s = grid.levels[i], grid.levels[j]
        expected = float(square[i]) * (euler_factor(t, s) - exact_factor(t, s)) ** 2
        assert costs[i, j] == pytest.approx(expected, rel=0.05, abs=1e-7)  # the path itself is Heun's


def test_costs_of_heun_steps_are_those_of_the_closed_form_and_take_one_call_each():
    net = gaussian()
    grid = network_grid(net, 64)
    latents = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = fine_path(net, latents, grid)
    jumps, net.calls = [(0, 30), (5, 30), (20, 50), (30, 50), (40, 64)], 0
    costs = heun_costs(net, path, jumps)
    assert net.calls == 4, "the jump to 0 is Euler's"
    assert np.isinf(costs).sum() == costs.size - len(jumps)
    for i, j in jumps:
        t, s = grid.levels[i], grid.levels[j]
        factor = net.decay(t, s, "heun").mean().item() - exact_factor(t, s)
        assert costs[i, j] == pytest.approx(path.states[i].square().mean().item() * factor**2, rel=0.05, abs=1e-7)


def test_an_error_shrinks_as_the_flow_of_gaussian_data():
    levels = np.array([80.0, 3.0, 0.5, 0.01, 0.0])
    assert shrinkage(levels, DEVIATION) == pytest.approx([exact_factor(s, 0) ** 2 for s in levels])


def test_the_coarsest_rung_is_chosen_first(monkeypatch):
    fine = fine_grid(gaussian(), 8)
    for seed in range(5):
        costs = np.random.default_rng(seed).random((65, 65)) / shrinkage(np.array(fine.levels), DEVIATION)
        monkeypatch.setattr(module, "euler_costs", lambda path, costs=costs: costs)
        monkeypatch.setattr(module, "data_deviation", lambda paths: DEVIATION)
        grid = measured_grid(gaussian(), draw, [8, 4, 2, 1], "euler", images=32)
        total = costs * shrinkage(np.array(fine.levels), DEVIATION)
        assert grid.levels[4] == fine.levels[min(range(4, 61), key=lambda m: total[0, m] + total[m, 64])]


def test_errors_of_the_teachers_own_steps_shrink_too(monkeypatch):
    def costs(denoise, path, jumps):
        """Of two steps the first one costs 1 wherever it ends, the second one next to nothing, less the later."""
        found = np.full((65, 65), np.inf)
        for i, j in jumps:
            found[i, j] = 1.0 if i == 0 else 1e-12 * (64 - i)
        return found

    monkeypatch.setattr(module, "heun_costs", costs)
    grid = measured_grid(gaussian(), draw, [2, 1], "heun", images=32)
    assert grid.levels[1] == fine_grid(gaussian(), 2).levels[8], "the earliest of those tried: most of it shrinks away"


@pytest.mark.parametrize("pieces", [[1, 2, 2], [2, 2], [3, 2], [4]])
@pytest.mark.parametrize("weights", ["joint", "coarse"])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_nested_grid_costs_less(pieces, weights, seed):
    rng = np.random.default_rng(seed)
    size = 10
    costs = np.where(np.subtract.outer(np.arange(size), np.arange(size)) < 0, rng.random((size, size)), np.inf)
    factors = [1.0] * len(pieces) if weights == "joint" else [100.0**-rung for rung in range(len(pieces))]
    total = math.prod(pieces)

    def price(levels):
        steps = 1
        result = 0.0
        for number, factor in zip(pieces, factors, strict=True):
            steps *= number
            rung = levels[:: total // steps]
            result += factor * sum(costs[a, b] for a, b in pairwise(rung))
        return result

    found = nested_levels(costs, pieces, factors)
    best = min(([0, *inner, size - 1] for inner in combinations(range(1, size - 1), total - 1)), key=price)
    assert len(found) == total + 1 and found[0] == 0 and found[-1] == size - 1
    assert price(found) == pytest.approx(price(best), rel=1e-12)


def test_every_jump_of_the_finest_rung_leaves_room_for_the_teachers_steps():
    costs = np.full((9, 9), np.inf)
    costs[np.triu_indices(9, 1)] = 1.0
    costs[0, 1] = 0.0
    levels = nested_levels(costs, [2, 2], [1.0, 1.0], finest=2)
    assert levels == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="too few"):
        nested_levels(costs, [2, 2], [1.0, 1.0], finest=3)


def draw(seeds):
    return torch.randn(len(seeds), 1, 2, 2, generator=torch.Generator().manual_seed(seeds[0])), None


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_the_grid_of_gaussian_data_makes_better_jumps_than_edms(solver):
    net = gaussian()
    grid = measured_grid(net, draw, [16, 8, 4, 2, 1], solver, images=64)
    assert grid.steps == 16 and grid.levels[0] == 80.0 and grid.levels[-1] == 0.0
    fine = set(network_grid(net, 64).levels)
    assert set(grid.levels) <= fine

    def missed(grid: NoiseGrid) -> float:
        return abs(math.prod(euler_factor(t, s) for t, s in pairwise(grid.levels)) / exact_factor(80, 0) - 1)

    for ratio in (2, 4, 8):
        assert missed(grid.every(ratio)) < missed(network_grid(net, 16).every(ratio))


# -- --grid, in every script -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    save_network(folder / "teacher.pkl", small_network(resolution=8))
    make_dataset(folder / "data.zip", classes=None)
    return folder


def train_stage(files, outdir, *args):
    words = [f"--outdir={outdir}", "--nosubdir", f"--data={files / 'data.zip'}", "--precond=edm_distillation"]
    words += [f"--transfer={files / 'teacher.pkl'}", "--duration=0.001", "--batch=500", "--seed=0", *args]
    return train.main(words)


def test_a_measured_grid_travels_and_resumes(files, tmp_path, capsys):
    assert train_stage(files, tmp_path / "run", "--num_steps=8", "--grid=measured") == 0
    made = json.loads((tmp_path / "run" / "noise-grid.json").read_text())
    assert len(made["levels"]) == 9 and made["measured"] == {"chain": [8, 4, 2, 1], "solver": "heun", "images": 128}
    student = load_network(tmp_path / "run" / "network-snapshot-000001.pkl")
    assert student.sampling.grid.levels == tuple(made["levels"][::2])
    assert student.sampling.lineage[0]["grid"] == made["measured"]
    assert capsys.readouterr().out.count("Measuring the path") == 1
    assert train_stage(files, tmp_path / "run", "--num_steps=8", "--grid=measured") == 0
    assert "Measuring" not in capsys.readouterr().out  # read from the run's directory
    assert train_stage(files, tmp_path / "same", f"--grid={tmp_path / 'run' / 'noise-grid.json'}") == 0
    same = load_network(tmp_path / "same" / "network-snapshot-000001.pkl")
    assert all(torch.equal(a, b) for a, b in zip(same.net.parameters(), student.net.parameters(), strict=True))
    assert train_stage(files, tmp_path / "run", "--num_steps=8") == 1
    assert "--grid" in capsys.readouterr().err


def test_a_ladder_measures_for_its_own_chain(files, tmp_path, capsys):
    words = [f"--outdir={tmp_path / 'ladder'}", f"--data={files / 'data.zip'}", f"--transfer={files / 'teacher.pkl'}"]
    words += ["--num_steps=12", "--until=2", "--ratio=2,3", "--duration=0.001", "--batch=500", "--detector=none"]
    words += ["--eval-num=8", "--eval-sets=1", "--curve=0", "--grid=measured"]
    assert distill.main(words) == 0
    out = capsys.readouterr().out
    file = tmp_path / "ladder" / "stage-1-12to6" / "noise-grid.json"
    assert json.loads(file.read_text())["measured"]["chain"] == [12, 6, 2] and f"--grid={file}" in out
    assert out.count("Measuring the path") == 1
    levels = json.loads(file.read_text())["levels"]
    last = next((tmp_path / "ladder" / "stage-2-6to2").glob("network-snapshot-*1.pkl"))
    assert load_network(last).sampling.grid.levels == tuple(levels[::6])
    assert distill.main(words) == 0 and "Measuring" not in capsys.readouterr().out
    assert distill.main([*words, "--grid=edm"]) == 1 and "--grid" in capsys.readouterr().err


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp2m"])
def test_undistilled_networks_are_sampled_on_any_levels(files, solver):
    network, seeds = load_network(files / "teacher.pkl"), range(3)
    grid = network_grid(network.net, 6)
    spec = ",".join(map(repr, grid.levels))
    plain = sample(network, seeds, steps=6, solver=solver, raw=True)
    assert torch.allclose(sample(network, seeds, grid=spec, solver=solver, raw=True), plain, rtol=0, atol=1e-6)
    measured = plan_sampling(network, grid="measured", steps=6, solver=solver)
    assert measured.steps == 6 and measured.options["levels"] != list(grid.levels)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("80,5,1", "ends in 0"),
        ("5,80,0", "decrease"),
        ("80,5,,0", "could not convert"),
        ("nothing.json", "--grid=nothing.json: neither edm nor measured"),
        ("4/x", "no file"),
        (",".join(["80"] * 200), "ends in 0"),
        ("teacher.pkl", "can't decode"),
        ("list.json", "no list of noise levels"),
        ("80,5,0 --steps=5", "--steps=5, but --grid=80,5,0 has 2 steps"),
        ("measured --sigma_max=50", "--sigma_max and --grid=measured can't go together"),
        ("80,5,0 --schedule=vp", "--schedule and --grid=80,5,0 can't go together"),
    ],
)
def test_grids_that_cannot_be(files, tmp_path, capsys, monkeypatch, grid, message):
    monkeypatch.chdir(files)
    (files / "list.json").write_text('{"level": [1, 0]}')
    words = [f"--outdir={tmp_path / 'out'}", "--network=teacher.pkl", "--seeds=0", *f"--grid={grid}".split()]
    assert generate.main(words) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_student_keeps_its_grid(files, tmp_path, capsys):
    assert train_stage(files, tmp_path / "run", "--grid=80,3,1,0.1,0") == 0
    student = tmp_path / "run" / "network-snapshot-000001.pkl"
    words = ["--precond=edm_distillation", f"--transfer={student}", f"--data={files / 'data.zip'}", "--grid=measured"]
    assert train.main([f"--outdir={tmp_path / 'next'}", *words]) == 2
    assert "undistilled" in capsys.readouterr().err
    assert generate.main([f"--outdir={tmp_path / 'o'}", f"--network={student}", "--grid=80,1,0", "--seeds=0"]) == 2
    assert "this network's file has 4/2" in capsys.readouterr().err


def test_what_noise_grid_json_holds_is_checked(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(setup, "measure_grid", lambda *_: NoiseGrid((80.0, 1.0, 0.0)))
    teacher = load_network(files / "teacher.pkl")
    options = Options(str(tmp_path), "", precond="edm_distillation", num_steps=2, nosubdir=True, grid="measured")
    fine = fine_grid(teacher.net, 2).levels
    good = {"teacher": teacher.sha256, "measured": made_by([2, 1], "heun"), "levels": [fine[0], fine[20], 0.0]}
    for change in ({}, {"teacher": "x"}, {"levels": "210"}, {"levels": [81.0, 1.0, 0.0]}, {"levels": [fine[0], 0.0]}):
        (tmp_path / "noise-grid.json").write_text(json.dumps(good | change))
        grid = setup.teacher_grid(options, teacher)
        assert ("Measuring" in capsys.readouterr().out) == bool(change)
        assert grid.levels == ((80.0, 1.0, 0.0) if change else (fine[0], fine[20], 0.0))


def test_networks_that_cannot_be_measured(files):
    network = load_network(files / "teacher.pkl")
    for steps, message in ((0, "at least one step"), (129, "128 steps at most")):
        with pytest.raises((ValueError, UsageError), match=message):
            plan_sampling(network, grid="measured", steps=steps)
    with torch.no_grad():
        next(network.net.parameters()).fill_(math.nan)
    with pytest.raises(UsageError, match="NaN"):
        plan_sampling(network, grid="measured", steps=2)


def test_odd_numbers_of_heun_steps_use_heuns_own_costs():
    net = gaussian()
    heun, euler = (measured_grid(net, draw, [5], solver, images=32) for solver in ("heun", "euler"))
    assert heun.steps == euler.steps == 5 and heun != euler
