"""TensorBoard and Weights & Biases beside stats.jsonl: the same figures, the same run when it goes on, and never in the way."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from engine import loggers
from engine.loggers import Loggers
from helpers import make_dataset

SMALL = ["--cbase=16", "--cres=1,2", "--blocks=1", "--batch=8", "--tick=0.2", "--warmup=0", "--device=cpu", "--seed=0"]


class FakeWandb(types.ModuleType):
    """As much of the package as is used; `fail` names the call that breaks."""

    def __init__(self, fail=""):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.fail = fail
        self.starts = []
        self.rows = []
        self.metrics = []
        self.finished = 0
        self.step = 0

    def init(self, **options):
        if self.fail == "init":
            raise ConnectionError("no\nnetwork")
        self.starts.append(options)
        return self

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, row, step):
        if self.fail == "log" and len(self.rows) == 1:
            raise OSError("disk full")
        self.rows.append(row)
        self.step = step

    def finish(self):
        self.finished += 1


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path / "data.zip")


def run(data, folder, duration, *more):
    """(lines of stats.jsonl, log.txt) of a run of so many kimg."""
    args = [f"--data={data}", f"--outdir={folder}", "--nosubdir", f"--duration={duration / 1000}", *SMALL, *more]
    assert train.main(args) == 0
    stats = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return stats, (folder / "log.txt").read_text()


def test_wandb_gets_the_figures_and_goes_on_under_one_number(data, tmp_path, monkeypatch):
    folder = tmp_path / "ladder" / "stage-1"
    for duration, args in ((1, "--wandb=digits"), (2, "--wandb")):
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        stats, log = run(data, folder, duration, args)
        (start,) = fake.starts
        assert start["id"] == (folder / loggers.RUN_ID).read_text().strip() and len(start["id"]) == 8
        assert (start["name"], start["group"]) == ("stage-1", "ladder")
        assert start["project"] == ("digits" if duration == 1 else "edm-distill")
        assert start["resume"] == "allow" and start["config"]["batch_size"] == 8
        assert fake.metrics == [("*", "nimg")] and fake.finished == 1 and "Warning" not in log
        for row, line in zip(fake.rows[::-1], stats[::-1], strict=False):
            wanted = {name: value["mean"] for name, value in line.items() if name != "timestamp"}
            assert row == {**wanted, "nimg": round(wanted["Progress/kimg"] * 1000)}
    assert 3 <= len(fake.rows) < len(stats)  # those after going on


def test_what_a_resumed_run_repeats_is_shown_once(data, tmp_path, monkeypatch):
    """Killed after the figures of steps that its newest state does not have."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        stats, _ = run(data, tmp_path, 1, "--tensorboard", "--wandb", "--dump=1")
        for path in tmp_path.glob("training-state-*.pt"):
            if path.name > "training-state-000000.pt":
                path.unlink()
        fake.step += 1  # where a resumed run begins there
    steps = [round(line["Progress/kimg"]["mean"] * 1000) for line in stats]
    assert steps == [row["nimg"] for row in fake.rows] and len(steps) >= 5
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == stats[0].keys() - {"timestamp"}
    for name in events.Tags()["scalars"]:
        found = events.Scalars(name)
        assert [event.step for event in found] == steps
        assert [event.value for event in found] == pytest.approx([line[name]["mean"] for line in stats])


@pytest.mark.parametrize(("fail", "words"), [("init", "ConnectionError: no network"), ("log", "OSError: disk full")])
def test_a_logger_that_fails_is_left_out_with_one_line(fail, words, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail))
    stats, log = run(data, tmp_path / "run", 1, "--wandb")
    assert log.count("Warning") == 1
    assert f"Warning: --wandb is left out from here on ({words}); stats.jsonl has every figure\n" in log
    assert stats[-1]["Progress/kimg"]["mean"] == 1


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_told_before_anything_is_written(name, data, tmp_path, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == name else find(each))
    assert train.main([f"--data={data}", f"--outdir={tmp_path / 'run'}", f"--{name}", *SMALL]) == 1
    assert capsys.readouterr().err == f"train.py: error: --{name} needs the package {name}: pip install {name}\n"
    assert not (tmp_path / "run").exists()


def test_nothing_is_started_before_the_first_figures(monkeypatch):
    def make(config, begin):
        raise AssertionError("too early")

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", make)
    lines = []
    each = Loggers(types.SimpleNamespace(tensorboard=True, wandb=None), lines.append, begin=0)
    each.close()
    assert not lines
    each.write({"loss": 1.0}, 1)
    assert len(lines) == 1 and "too early" in lines[0]
    each.write({"loss": 1.0}, 2)
    assert len(lines) == 1
