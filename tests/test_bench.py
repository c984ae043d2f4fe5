"""The benchmarks: that what they compare is what they say."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

import distill
from bench import compare, earlier_attempt, load, plain, recipe, run
from formats.network_files import load_network, save_network
from helpers import load_recipe, make_dataset, small_network
from ladders.results import Rung
from metrics.classifier import train_detector
from training.grids import network_grid


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set, a hurriedly trained detector and a teacher."""
    folder = tmp_path_factory.mktemp("bench")
    make_dataset(folder / "data.zip", count=60)
    train_detector(folder / "data.zip", folder / "detector.pt", kimg=1)
    net = small_network(model_channels=8, channel_mult=[1], attn_resolutions=[], augment_dim=9)
    load_recipe(net, 3)
    save_network(folder / "teacher.pkl", net)
    return folder


def files(place):
    return [f"--data={place / 'data.zip'}", f"--teacher={place / 'teacher.pkl'}", f"--detector={place / 'detector.pt'}"]


@pytest.mark.parametrize("task", recipe.plan(list(recipe.SCREENS), [3], "", Path("out")), ids=lambda task: task.variant)
def test_every_variant_is_a_command_that_distill_takes(task):
    words = ["--outdir=x", "--data=x", "--transfer=x", *task.options]
    values = distill.command.make_context("distill.py", words).params
    assert values["seed"] == 3 and values["batch"] in (32, 64, 128)
    from training.steps import plan_ladder

    stages = plan_ladder(values["num_steps"], values["until"], values["ratio"])
    assert len(values["duration"]) in (1, len(stages))


def test_ladders_see_equally_many_images():
    """So that variants of `ladders` can be compared; 'equal time' says that it sees fewer."""
    from training.steps import plan_ladder

    for task in recipe.plan(["ladders"], [0], "", Path("out")):
        values = distill.command.make_context("x", ["--outdir=x", "--data=x", "--transfer=x", *task.options]).params
        stages = len(plan_ladder(values["num_steps"], values["until"], values["ratio"]))
        images = sum(values["duration"] * (stages if len(values["duration"]) == 1 else 1))
        fewer = {"16 -> 4 -> 1, equal time": 0.098, "16 -> 1, self-teacher, equal time": 0.147}
        assert images == pytest.approx(fewer.get(task.variant, 0.16), rel=1e-3), task.variant


def test_summary_is_of_students_and_over_their_own_teacher():
    runs = [
        [
            {"steps": 4, "fd": fd, "endpoint_rmse": 0.0},
            {"steps": 2, "fd": 3.0, "endpoint_rmse": error},
            {"steps": 1, "fd": None, "endpoint_rmse": 0.5},
        ]
        for fd, error in ((2.0, 0.1), (1.0, 0.3))
    ]
    assert recipe.summary(runs) == "2: 0.2000 +- 0.1414 fd x2.250 +- 1.061   1: 0.5000 +- 0.0000"
    assert recipe.summary(runs[:1]) == "2: 0.1000 fd x1.500   1: 0.5000"


@pytest.mark.slow
def test_a_screen_runs_and_is_not_run_again(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "SHORT", "--num_steps=4 --until=2 --duration=0.001 --batch=48")
    monkeypatch.setitem(recipe.SCREENS, "rates", (recipe.SHORT, {"one": "--lr=1e-3", "wrong": "--lr-decay=never"}))
    args = ["rates", *files(place), f"--outdir={tmp_path / 'out'}", "--eval-num=30", "--extra=--eval-batch=30"]
    assert recipe.main(args) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert "1 of 2 runs failed" in said.err
    assert lines[0].split()[:3] == ["rates", "one", "2:"] and "1 failed" in lines[1]
    folder = tmp_path / "out/rates/one/seed0"
    made = (folder / "stage-1-4to2/network-snapshot-000001.pkl").stat().st_mtime_ns
    assert "4 steps" in (folder / "log.txt").read_text() and "Measuring" in (folder / "log.txt").read_text()
    assert f"Measuring {place / 'teacher.pkl'}" not in (folder / "log.txt").read_text(), "it was measured before"
    assert recipe.main([*args, "--only=one"]) == 0
    assert capsys.readouterr().out.splitlines() == lines[:1]
    assert (folder / "stage-1-4to2/network-snapshot-000001.pkl").stat().st_mtime_ns == made
    assert recipe.main([*args, "--only=none such"]) == 2
    args = [arg.replace("/out", "/other").replace("--eval-batch=30", "--eval-batch=30 --lr=7e-4") for arg in args]
    assert recipe.main([*args, "--only=one"]) == 0  # what is asked for on the command line wins
    other = tmp_path / "other/rates/one/seed0/stage-1-4to2"
    assert options_of(other)["optimizer_kwargs"]["lr"] == 7e-4


def options_of(folder):
    return json.loads((folder / "training_options.json").read_text())


def test_an_earlier_attempt_has_all_its_habits(place, tmp_path):
    args = [*files(place), "--num_steps=8", "--duration=0.001", "--batch=48", "--eval-num=30"]
    assert earlier_attempt.main([*args, f"--outdir={tmp_path / 'all'}"]) == 0
    second = options_of(tmp_path / "all/stage-2-4to2")
    student = load_network(tmp_path / "all/stage-1-8to4/network-snapshot-000001.pkl")
    fresh, nested = list(network_grid(student.net, 4).levels), list(student.sampling.grid.levels)
    assert second["distillation"]["teacher_levels"] == fresh != nested
    assert second["loss_kwargs"]["teacher_solver"] == "heun"
    assert second["network_kwargs"]["dropout"] == 0.13 and second["augment_kwargs"]["p"] == 0.12
    assert second["lr_decay"] == "none" and second["optimizer_kwargs"]["lr"] == 1e-3
    assert second["lr_rampup_kimg"] == pytest.approx(0.5)


@pytest.mark.slow
def test_without_its_habits_it_is_distill(place, tmp_path, capsys):
    common = ["--num_steps=4", "--duration=0.001", "--batch=48", "--eval-num=30", "--seed=2"]
    assert earlier_attempt.main([*files(place), *common, "--habits=none", f"--outdir={tmp_path / 'none'}"]) == 0
    mine = [word.replace("--teacher", "--transfer") for word in files(place)]
    more = ["--eval-sets=1", "--curve=0", "--eval-batch=125", "--tick=10", "--lr=5e-4"]
    assert distill.main([*mine, *common, *more, f"--outdir={tmp_path / 'ours'}"]) == 0
    tables = [json.loads((tmp_path / name / "ladder.json").read_text()) for name in ("none", "ours")]
    for a, b in zip(*tables, strict=True):
        assert (a["fd"], a["endpoint_rmse"]) == (b["fd"], b["endpoint_rmse"])
    capsys.readouterr()
    assert earlier_attempt.main([*files(place), *common, "--habits=rate", f"--outdir={tmp_path / 'none'}"]) == 1
    assert "habits" in capsys.readouterr().err


def test_clamped_levels_end_above_zero(place):
    net = load_network(place / "teacher.pkl").net
    import torch

    loss = earlier_attempt.ClampedLoss(net, network_grid(net, 8), 2, "heun")
    plain = earlier_attempt.EDMDistillationLoss(net, network_grid(net, 8), 2, "heun")
    interval = torch.arange(4)
    assert torch.equal(loss.levels(interval[:3]), plain.levels(interval[:3]))
    last = loss.levels(interval[3:]).flatten().tolist()
    assert last == pytest.approx([*network_grid(net, 8).levels[6:8], network_grid(net, 8).levels[7]])
    assert loss.jumps(torch.zeros(1, 1, 8, 8), interval[3:], torch.ones(1, 1, 8, 8)).target.isfinite().all()


def test_unknown_habits_are_refused(place, tmp_path, capsys):
    assert earlier_attempt.main([*files(place), "--habits=clamp,heum", f"--outdir={tmp_path}"]) == 2
    assert "heum" in capsys.readouterr().err
    shutil.rmtree(tmp_path)


def write_ladder(folder, *students, teacher=2.0):
    """students: (steps, fd, end-point error)."""
    rows = [(16, teacher, 0.0), *students]
    rungs = [Rung(steps, steps, fd, error, 1.0, 1.0, "x") for steps, fd, error in rows]
    folder.mkdir(parents=True)
    (folder / "ladder.json").write_text(json.dumps([asdict(rung) for rung in rungs]))


def test_ladders_side_by_side(tmp_path, capsys):
    write_ladder(tmp_path / "a/seed0", (8, 3.0, 0.1), (4, 4.0, 0.2))
    write_ladder(tmp_path / "a/seed1", (8, 5.0, 0.3), (4, 4.0, 0.2))
    write_ladder(tmp_path / "b", (4, None, 0.5), teacher=None)
    (tmp_path / "a/seed2").mkdir()  # not finished
    args = [f"ours={tmp_path}/a/seed*", f"theirs={tmp_path}/b", f"--figure={tmp_path / 'figure.png'}"]
    assert compare.main(args) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| | seeds | 8 steps | 4 steps |",
        "| --- | --- | --- | --- |",
        "| ours | 2 | 2.000 ± 0.707x<br>0.2000 ± 0.1414 | 2.000 ± 0.000x<br>0.2000 ± 0.0000 |",
        "| theirs | 1 |  | 0.5000 |",
    ]
    figure = compare.draw([compare.read_group(text) for text in args[:2]])
    lines = [[list(line.get_xdata()) for line in axis.get_lines() if len(line.get_xdata())] for axis in figure.axes]
    assert [4, 8] in lines[0] and [4] in lines[1]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_no_ladders_no_comparison(tmp_path, capsys):
    (tmp_path / "ladder.json").write_text('[{"steps": 3}]')
    for argument, status, words in (
        (str(tmp_path), 2, "NAME=PATTERN"),
        (f"x={tmp_path}/none*", 1, "none*"),
        (f"x={tmp_path}", 1, "ladder.json"),
    ):
        assert compare.main([argument]) == status
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error


def test_what_is_measured_agrees_with_the_plain_way(tmp_path, capsys, monkeypatch):
    """A case whose two ways differ is an error, not a row; the rows say what a reader needs."""
    tiny = run.Size(cbase=16, cres=[1, 2], blocks=1, resolution=8, channels=1, images=40, batch=8)
    monkeypatch.setitem(run.SIZES, "demo", tiny)
    cases = "train,distil-heun,distil-euler,sample,generate-zip"
    assert run.main([f"--cases={cases}", "--seconds=0", f"--json={tmp_path / 'rows.json'}", "--device=cpu"]) == 0
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in content["rows"]] == cases.split(",") and content["reachable_gflops"] > 0
    assert all(row["ratio"] > 0 and row["gflops"] > 0 and row["agreement"] for row in content["rows"])
    assert run.main(["--cases=train,tea"]) == 2
    monkeypatch.setattr(plain.PlainTraining, "step", lambda *_: 7.0)
    assert run.main(["--cases=train", "--seconds=0", "--device=cpu"]) == 1
    assert "losses 7.0 and" in capsys.readouterr().err


def test_loading_is_measured_for_every_format(capsys):
    assert load.main(["--repeats=1", "--cbase=32", "--blocks=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == [".pt", ".pkl", ".safetensors"]
    assert all(float(line.split()[-1]) > 0 for line in lines[2:5]), "every process grows"
