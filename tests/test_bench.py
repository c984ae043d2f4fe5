"""The benchmarks: variants are what their names promise, tables are right, and what is timed agrees."""

import json
from dataclasses import asdict

import pytest

import distill
from bench import plain, recipe, run
from formats.network_files import save_network
from helpers import load_recipe, make_dataset, small_network
from ladders.results import Rung
from metrics.classifier import train_detector
from training.steps import plan_ladder


@pytest.mark.parametrize(("screen", "variant", "folder", "options"), list(recipe.plan(list(recipe.SCREENS))))
def test_every_variant_is_a_command_that_distill_takes(screen, variant, folder, options):
    """Those of `ladders` see equally many images, so that they can be compared; 'equal time' means that it sees fewer."""
    values = distill.command.make_context("distill.py", ["--outdir=x", "--data=x", "--transfer=x", *options]).params
    durations, stages = values["duration"], len(plan_ladder(values["num_steps"], values["until"], values["ratio"]))
    assert values["batch"] in (32, 64, 128) and len(durations) in (1, stages)
    if screen == "ladders":
        fewer = {"16 -> 4 -> 1, equal time": 0.098, "16 -> 1, self-teacher, equal time": 0.147}
        images = sum(durations * (stages // len(durations)))
        assert images == pytest.approx(fewer.get(variant, 0.16), rel=1e-3)


@pytest.mark.slow
def test_a_screen_runs_and_is_not_run_again(tmp_path, capsys, monkeypatch):
    make_dataset(tmp_path / "data.zip", count=60)
    train_detector(tmp_path / "data.zip", tmp_path / "detector.pt", kimg=1)
    net = small_network(model_channels=8, channel_mult=[1], attn_resolutions=[], augment_dim=9)
    load_recipe(net, 3)
    save_network(tmp_path / "teacher.pkl", net)
    monkeypatch.setattr(recipe, "SHORT", "--num_steps=4 --until=2 --duration=0.001 --batch=48")
    monkeypatch.setitem(recipe.SCREENS, "rates", (recipe.SHORT, {"one": "--lr=1e-3", "wrong": "--lr-decay=never"}))
    files = [f"--data={tmp_path}/data.zip", f"--teacher={tmp_path}/teacher.pkl", f"--detector={tmp_path}/detector.pt"]
    args = ["rates", *files, f"--outdir={tmp_path / 'out'}", "--eval-num=30", "--extra=--eval-batch=30"]
    assert recipe.main(args) == 1
    printed = capsys.readouterr()
    assert "1 of 2 runs failed" in printed.err
    (row,) = [line for line in printed.out.splitlines() if line.startswith("| one")]
    assert "| wrong | 0 |  |" in printed.out
    folder = tmp_path / "out/rates/one/seed0"
    made, log = folder / "stage-1-4to2/network-snapshot-000001.pkl", (folder / "log.txt").read_text()
    time = made.stat().st_mtime_ns
    assert "4 steps" in log and "Measuring" in log
    assert f"Measuring {tmp_path / 'teacher.pkl'}" not in log, "it was measured before"
    assert recipe.main([*args, "--only=one"]) == 0
    assert row in capsys.readouterr().out.splitlines()
    assert made.stat().st_mtime_ns == time
    assert recipe.main([*args, "--only=none such"]) == 2
    args = [arg.replace("/out", "/other").replace("--eval-batch=30", "--eval-batch=30 --lr=7e-4") for arg in args]
    assert recipe.main([*args, "--only=one"]) == 0  # what is asked for on the command line wins
    written = json.loads((tmp_path / "other/rates/one/seed0/stage-1-4to2/training_options.json").read_text())
    assert written["optimizer_kwargs"]["lr"] == 7e-4


def test_table_of_ladders(tmp_path):
    folders = {"ours": [tmp_path / "a0", tmp_path / "a1"], "theirs": [tmp_path / "b"]}
    for folder, *students in (
        (tmp_path / "a0", (16, 2.0, 0.0), (8, 3.0, 0.1), (4, 4.0, 0.2)),
        (tmp_path / "a1", (16, 2.0, 0.0), (8, 5.0, 0.3), (4, 4.0, 0.2)),
        (tmp_path / "b", (16, None, 0.0), (4, None, 0.5)),
    ):
        folder.mkdir()
        rungs = [asdict(Rung(steps, steps, fd, error, 1.0, 1.0, "x")) for steps, fd, error in students]
        (folder / "ladder.json").write_text(json.dumps(rungs))
    assert recipe.to_markdown(folders).splitlines() == [
        "| ladder | seeds | 8 steps | 4 steps |",
        "| --- | --- | --- | --- |",
        "| ours | 2 | 2.000 ± 0.707x<br>0.2000 ± 0.1414 | 2.000 ± 0.000x<br>0.2000 ± 0.0000 |",
        "| theirs | 1 |  | 0.5000 |",
    ]


def test_what_is_timed_agrees_with_the_plain_way(capsys, monkeypatch):
    """A case whose two ways differ is an error, not a row."""
    tiny = {"cbase": 16, "cres": [1, 2], "blocks": 1, "batch": 8, "images": (40, 8, 1)}
    monkeypatch.setitem(run.SIZES, "demo", tiny)
    cases = list(run.CASES)
    assert run.main([f"--cases={','.join(cases)}", "--seconds=0", "--device=cpu"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == cases and all(float(row[3]) > 0 for row in rows)
    assert run.main(["--cases=train,tea"]) == 2
    monkeypatch.setattr(plain.PlainTraining, "step", lambda *_: 7.0)
    assert run.main(["--cases=train", "--seconds=0", "--device=cpu"]) == 1
    assert "7.0 and" in capsys.readouterr().err
