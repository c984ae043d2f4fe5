"""The ladder command: its files, its numbers against independent ones, and that nothing is lost or done twice."""

import csv
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import distill
import fid
import train
from dnnlib import atomic, util
from dnnlib.cli import UserError
from helpers import load_recipe, make_dataset, small_network
from metrics import detectors
from metrics.classifier import train_detector
from metrics.statistics import Stats
from training import ladder as ladder_module
from training import pictures, setup
from training.ladder import FirstImages, Ladder, Rung, Timing, checked, plot_ladder, show_progress
from training.network_files import load_network, save_network
from training.sampling import Batch
from training.stage import plan_stage
from training.training_loop import Trainer

ROOT = Path(__file__).parent.parent
NUM, BATCH = 50, 20  # images of a measurement, at a time
COMMON = ["--batch=96", "--tick=0.5", "--seed=5", f"--eval-num={NUM}", f"--eval-batch={BATCH}"]
STAGES = ["--num_steps=4", "--duration=0.001,0.002", "--lr=5e-4,1e-4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set, a hurriedly trained detector and a class-conditional teacher."""
    folder = tmp_path_factory.mktemp("place")
    make_dataset(folder / "data.zip", count=200)
    train_detector(folder / "data.zip", folder / "detector.pt", kimg=1)
    for name, classes in (("teacher", 4), ("plain", 0)):
        net = tiny_network(label_dim=classes)
        load_recipe(net, 3)
        save_network(folder / f"{name}.pkl", net)
    return folder


def tiny_network(**kwargs):
    return small_network(**{"model_channels": 8, "channel_mult": [1], "attn_resolutions": [], **kwargs})


def options(place, *more, teacher="teacher.pkl", detector="detector.pt"):
    files = [f"--data={place / 'data.zip'}", f"--transfer={place / teacher}"]
    return [*files, *COMMON, *([f"--detector={place / detector}"] if detector else []), *map(str, more)]


@pytest.fixture(scope="module")
def climbed(place, tmp_path_factory):
    """The folder of a whole ladder, 4 -> 2 -> 1, of the class-conditional teacher."""
    folder = tmp_path_factory.mktemp("climbed") / "ladder"
    assert distill.main([*options(place, *STAGES), f"--outdir={folder}"]) == 0
    return folder


def rungs(folder):
    return json.loads((folder / "ladder.json").read_text())


def timeless(folder):
    """The rungs without the time they took, and with files told by their place in the folder."""
    found = [{**rung, "network": Path(rung["network"]).name} for rung in rungs(folder)]
    assert all(rung.pop("sec_per_kimg") > 0 for rung in found)
    return found


def refused(capsys, status, message, *args):
    """One line on standard error that holds `message`, and the exit status."""
    assert distill.main([str(arg) for arg in args]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("distill.py: error: ") and message in error, error


def forbid_work(monkeypatch):
    """From here on, training and sampling are failures."""

    def fail(*args, **kwargs):
        raise AssertionError("this was done before")

    monkeypatch.setattr(Trainer, "__init__", fail)
    monkeypatch.setattr(ladder_module, "iterate_images", fail)


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_files(climbed):
    table = rungs(climbed)
    assert [list(rung) for rung in table] == [
        ["steps", "nfe", "fd", "endpoint_rmse", "sec_per_kimg", "kimg", "network"]
    ] * 3
    assert [(rung["steps"], rung["nfe"], rung["kimg"]) for rung in table] == [(4, 7, 0), (2, 2, 1), (1, 1, 2)]
    assert table[0]["endpoint_rmse"] == 0 and all(0 < rung["endpoint_rmse"] < 10 for rung in table[1:])
    assert all(rung["fd"] > 0 and rung["sec_per_kimg"] > 0 for rung in table)
    with open(climbed / "ladder.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in rung.items()} for rung in table]

    last = load_network(table[2]["network"])
    assert Path(table[2]["network"]) == climbed / "stage-2-2to1" / "network-snapshot-000002.pkl"
    assert [(e["steps"], e["solver"], e["network"]) for e in last.sampling.lineage] == [
        (4, "heun", table[0]["network"]),
        (2, "euler", table[1]["network"]),
    ]
    assert last.net.label_dim == 4, "conditional, as the teacher"

    with Image.open(climbed / "ladder.png") as plot, Image.open(climbed / "samples.png") as sheet:
        assert plot.width > 2 * plot.height, "two panels"
        pixels = np.asarray(sheet)
    tops = []
    for rung in table:
        steps = rung["steps"]
        with np.load(climbed / "rungs" / f"steps-{steps}.npz") as measured:
            images = torch.from_numpy(measured["images"][:16])
        final = images_of(rung["network"], steps, 16, heun=steps == 4)
        assert rms(images - final) < 1e-5 * rms(final)
        row = np.asarray(pictures.tile(pictures.to_uint8(images), columns=16, gap=2))
        top = next(y for y in range(len(pixels)) if row[0].tobytes() in pixels[y].tobytes())
        left = pixels[top].tobytes().index(row[0].tobytes()) // 3
        assert (pixels[top : top + len(row), left : left + row.shape[1]] == row).all()
        tops.append(top)
    assert tops == sorted(tops), "the same seeds for every rung, the teacher above"


def test_a_stage_is_what_train_does(place, climbed, tmp_path):
    """The same numbers, bit for bit, as train.py's own runs one after the other."""
    teacher = place / "teacher.pkl"
    for index, (duration, lr) in enumerate((("0.001", "5e-4"), ("0.002", "1e-4"))):
        args = [f"--data={place / 'data.zip'}", f"--transfer={teacher}", *COMMON[:3], "--precond=edm_distillation"]
        steps = ["--num_steps=4"] if index == 0 else []
        folder = tmp_path / str(index)
        assert (
            train.main([*args, *steps, f"--duration={duration}", f"--lr={lr}", f"--outdir={folder}", "--nosubdir"]) == 0
        )
        theirs, ours = (
            path / f"network-snapshot-00000{index + 1}.pkl"
            for path in (folder, next(climbed.glob(f"stage-{index + 1}-*")))
        )
        a, b = load_network(theirs), load_network(ours)
        assert a.sampling.grid == b.sampling.grid and a.net.init_kwargs == b.net.init_kwargs
        for (name, x), (_, y) in zip(a.net.state_dict().items(), b.net.state_dict().items(), strict=True):
            assert torch.equal(x, y), name
        assert a.extra["loss_fn"] == b.extra["loss_fn"]
        teacher = ours


def test_defaults_are_those_of_train(place, tmp_path, capsys, monkeypatch):
    """With nothing but what must be given, a stage has the very options that train.py gives a distillation."""
    seen = []

    def look(options):
        seen.append(setup.prepare(options).config.to_options())
        raise UserError("seen enough")

    monkeypatch.setattr(ladder_module, "prepare", look)
    args = [f"--data={place / 'data.zip'}", f"--transfer={place / 'teacher.pkl'}", "--num_steps=4"]
    assert distill.main([*args, f"--outdir={tmp_path}"]) == 1
    capsys.readouterr()
    args += ["--precond=edm_distillation", "--seed=0", "--nosubdir", f"--outdir={tmp_path / 'stage-1-4to2'}", "-n"]
    assert train.main(args) == 0
    theirs, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out.partition("Training options:\n")[2])
    assert json.loads(json.dumps(seen[0])) == theirs


# -- numbers -----------------------------------------------------------------------------------------------------------


def images_of(path, steps, count, heun=False):
    """Final images in float64, by the samplers' equations written out again, one image after the other."""
    network = load_network(path)
    levels = (network.sampling or plan_stage(network, steps)).grid.levels
    assert len(levels) == steps + 1
    images = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn([1, 1, 8, 8], generator=generator).double() * levels[0]
        labels = None
        if network.net.label_dim:
            chosen = int(torch.randint(network.net.label_dim, [], generator=generator))
            labels = torch.nn.functional.one_hot(torch.tensor([chosen]), network.net.label_dim)
        for t, s in pairwise(levels):
            d = (x - network.net(x, torch.tensor(t), labels).double()) / t
            guess = x + (s - t) * d
            if heun and s > 0:
                d = (d + (guess - network.net(guess, torch.tensor(s), labels).double()) / s) / 2
            x = x + (s - t) * d
        images.append(x[0])
    return torch.stack(images)


def rms(x):
    return float(x.square().mean().sqrt())


def test_end_point_errors_are_those_of_independent_sampling(climbed):
    table = rungs(climbed)
    teacher = images_of(table[0]["network"], 4, NUM, heun=True)
    for rung in table[1:]:
        student = images_of(rung["network"], rung["steps"], NUM)
        assert rung["endpoint_rmse"] == pytest.approx(rms(student - teacher), rel=1e-5)


def test_end_point_error_in_closed_form(place, tmp_path, monkeypatch):
    """A network of zeros is the ideal denoiser of N(0, sigma_data^2): every sampler just shrinks the latent, by a known
    factor. At a vanishing learning rate the student stays that network, and takes its own coarser steps."""
    net = tiny_network(sigma_data=0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    save_network(tmp_path / "zero.pkl", net)
    monkeypatch.setattr(ladder_module, "try_inception", lambda: "not here")
    args = [f"--data={place / 'data.zip'}", *COMMON, "--num_steps=6", "--ratio=2,3", "--duration=0.001", "--lr=1e-30"]
    assert distill.main([*args, f"--transfer={tmp_path / 'zero.pkl'}", f"--outdir={tmp_path / 'out'}"]) == 0

    levels = plan_stage(load_network(tmp_path / "zero.pkl"), 6).grid.levels
    shrink = {}
    for ratio, heun in ((1, True), (2, False), (6, False)):
        factor = levels[0]
        for t, s in pairwise(levels[::ratio]):
            slope = t / (0.25 + t**2)  # dx/dsigma = sigma x / (var + sigma^2)
            euler = 1 + (s - t) * slope
            factor *= 1 + (s - t) / 2 * (slope + s / (0.25 + s**2) * euler) if heun and s > 0 else euler
        shrink[6 // ratio] = factor
    latents = [torch.randn([1, 8, 8], generator=torch.Generator().manual_seed(seed)) for seed in range(NUM)]
    scale = rms(torch.stack(latents).double())
    table = rungs(tmp_path / "out")
    assert [(rung["steps"], rung["nfe"], rung["fd"]) for rung in table] == [(6, 11, None), (3, 3, None), (1, 1, None)]
    assert table[0]["endpoint_rmse"] == 0
    for rung in table[1:]:
        expected = abs(shrink[rung["steps"]] - shrink[6]) * scale
        assert expected > 0.01 and rung["endpoint_rmse"] == pytest.approx(expected, rel=1e-5)


def test_distances_are_those_of_fid_gen(place, climbed, tmp_path, capsys):
    """Teacher and students, against a reference that fid.py makes itself."""
    files = [f"--detector={place / 'detector.pt'}", f"--ref={tmp_path / 'ref.npz'}"]
    assert fid.main(["ref", f"--data={place / 'data.zip'}", f"--dest={tmp_path / 'ref.npz'}", files[0]]) == 0
    for rung in rungs(climbed):
        steps = ["--steps=4"] if rung["steps"] == 4 else []
        capsys.readouterr()
        args = [f"--network={rung['network']}", *steps, f"--num={NUM}", f"--batch={BATCH}", *files]
        assert fid.main(["gen", *args]) == 0
        assert float(capsys.readouterr().out) == pytest.approx(rung["fd"], rel=2e-5)


def test_network_calls_and_a_part_of_the_images(place, climbed, tmp_path, monkeypatch):
    """With other options of measuring, the ladder is measured again and not trained again. One batch makes the calls
    countable; and of more images than are compared, the first count."""
    shutil.copytree(climbed, tmp_path / "out")
    calls = []
    network_class = type(load_network(place / "teacher.pkl").net)
    forward = network_class.forward

    def counting(self, x, sigma, *args, **kwargs):
        calls.append(len(x))
        return forward(self, x, sigma, *args, **kwargs)

    monkeypatch.setattr(network_class, "forward", counting)
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(ladder_module, "END_POINT_IMAGES", 8)
    args = [*options(place, *STAGES), f"--outdir={tmp_path / 'out'}", "--eval-num=30", "--eval-batch=30"]
    assert distill.main(args) == 0
    table = rungs(tmp_path / "out")
    assert calls == [30] * (7 + 2 + 1) and [rung["nfe"] for rung in table] == [7, 2, 1]
    teacher = images_of(table[0]["network"], 4, 8, heun=True)
    for rung in table[1:]:
        student = images_of(rung["network"], rung["steps"], 8)
        assert rung["endpoint_rmse"] == pytest.approx(rms(student - teacher), rel=1e-5)
    with np.load(tmp_path / "out/rungs/steps-4.npz") as measured:
        assert len(measured["images"]) == 8, "no more images are kept than are compared"


def test_an_euler_teacher_and_a_student_as_first_teacher(place, climbed, tmp_path, monkeypatch):
    """A student brings its own grid and solver: no --num_steps, one call a step, and its lineage goes on."""
    student = climbed / "stage-1-4to2" / "network-snapshot-000001.pkl"
    args = options(place, "--duration=0.001", "--lr=1e-4", f"--outdir={tmp_path / 'on'}")
    assert distill.main([*args, f"--transfer={student}"]) == 0
    assert [(rung["steps"], rung["nfe"]) for rung in rungs(tmp_path / "on")] == [(2, 2), (1, 1)]
    lineage = load_network(rungs(tmp_path / "on")[1]["network"]).sampling.lineage
    assert [(entry["steps"], entry["solver"]) for entry in lineage] == [(4, "heun"), (2, "euler")]

    args = options(place, "--num_steps=2", "--teacher-solver=euler", "--duration=0.001", teacher="plain.pkl")
    assert distill.main([*args, f"--outdir={tmp_path / 'euler'}"]) == 0
    table = rungs(tmp_path / "euler")
    assert [(rung["steps"], rung["nfe"]) for rung in table] == [(2, 2), (1, 1)]
    teacher = images_of(table[0]["network"], 2, NUM)
    assert table[1]["endpoint_rmse"] == pytest.approx(rms(images_of(table[1]["network"], 1, NUM) - teacher), rel=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num_steps=18"], "--ratio=2,3,3 does"),
        (["--num_steps=32", "--until=3"], "32 is no multiple of 3; --num_steps="),
        (["--num_steps=12", "--ratio=2,2"], "--ratio=2,2,3 does"),
        (["--num_steps=4", "--until=4"], "--until must be below"),
        (["--num_steps=4", "--duration=1,2,3"], "--duration has 3 values for 2 stages"),
        (["--num_steps=4", "--lr=1,2,3"], "--lr has 3 values for 2 stages"),
        (["--num_steps=4", "--lr=0"], "not a list of positive numbers"),
        (["--num_steps=4", "--ratio=two"], "not a list of whole numbers"),
        (["--num_steps=4", "--ratio=3-2"], "does not lead from 4 steps to 1; --ratio=2,2 does"),
        ([], "--num_steps is needed"),
        (["--num_steps=4", "--eval-num=1"], "--eval-num"),
        (["--num_steps=4", "--batch-gpu=5"], "--batch-gpu=5 does not divide"),
        (["--num_steps=4", "--cond=0"], "has 4 classes"),
        (["--num_steps=4", "--augment=0.5"], "--augment"),
        (["--num_steps=8", "--transfer={student}"], "use --num_steps=2 or leave it out"),
        (["--teacher-solver=heun", "--transfer={student}"], "its output is a jump and not a slope"),
        (["--num_steps=4", "--transfer=nowhere.pkl"], "nowhere.pkl: no such file"),
        (["--num_steps=4", "--data=nowhere.zip"], "nowhere.zip"),
        (["--num_steps=4", "--detector=nowhere.pt"], "nowhere.pt: no such file"),
        (["--num_steps=4", "--ref=nowhere.npz"], "nowhere.npz: no such file"),
        (["--num_steps=4", "--outdir={student}"], "cannot be made (Not a directory); choose another --outdir"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_done(
    place, climbed, tmp_path, capsys, monkeypatch, args, message
):
    forbid_work(monkeypatch)
    student = climbed / "stage-1-4to2" / "network-snapshot-000001.pkl"
    args = [arg.replace("{student}", str(student)) for arg in args]
    status = 1 if any(word in message for word in ("nowhere", "classes", "directory")) else 2
    refused(capsys, status, message, *options(place), f"--outdir={tmp_path / 'out'}", *args)
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_detector_is_refused(place, tmp_path, capsys, monkeypatch):
    forbid_work(monkeypatch)
    monkeypatch.setattr(ladder_module, "try_inception", lambda: pytest.fail("a download before the refusal"))
    other, inception = tmp_path / "other.npz", tmp_path / "edm.npz"
    Stats(np.zeros(128), np.eye(128), 10, "classifier:somebody-elses").save(other)
    np.savez(inception, mu=np.zeros(2048), sigma=np.eye(2048))  # EDM's: not marked
    out = f"--outdir={tmp_path / 'out'}"
    for detector, ref in (("detector.pt", other), ("detector.pt", inception), (None, other)):
        args = options(place, "--num_steps=4", f"--ref={ref}", detector=detector)
        refused(capsys, 1, "statistics of two detectors can't be compared", *args, out)
    assert not (tmp_path / "out").exists()


def test_a_given_reference_is_used(place, climbed, tmp_path):
    """Statistics of other data than the ladder's: other distances, the same end-point errors."""
    shutil.copytree(climbed, tmp_path / "out")
    make_dataset(tmp_path / "other.zip", count=150, seed=1)
    detector = f"--detector={place / 'detector.pt'}"
    assert fid.main(["ref", f"--data={tmp_path / 'other.zip'}", f"--dest={tmp_path / 'ref.npz'}", detector]) == 0
    assert (
        distill.main([*options(place, *STAGES), f"--outdir={tmp_path / 'out'}", f"--ref={tmp_path / 'ref.npz'}"]) == 0
    )
    for ours, theirs in zip(rungs(tmp_path / "out"), rungs(climbed), strict=True):
        assert ours["fd"] != theirs["fd"] and ours["endpoint_rmse"] == theirs["endpoint_rmse"]


# -- without a detector ------------------------------------------------------------------------------------------------


def test_a_download_that_cannot_be_had_is_given_up_soon(monkeypatch):
    """A host that accepts and then says nothing is the slowest way of having no network."""
    assert util.MAX_SILENT * ladder_module.PATIENCE + 0.5 + 1 < 15, "seconds of silence, and the pauses between"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(detectors, "INCEPTION_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/inception.pth")
        monkeypatch.setattr(ladder_module, "PATIENCE", 0.1)
        start = time.monotonic()
        assert "the Inception weights can't be had (http://127.0.0.1" in ladder_module.try_inception()
        assert 0.3 + 0.5 + 1 < time.monotonic() - start < 5


def test_without_inception_the_end_point_error_judges(place, climbed, tmp_path, capsys, monkeypatch):
    """The distances come later, with a detector and without training; until then, what was measured stands."""
    shutil.copytree(climbed, tmp_path / "out")
    args = [*options(place, *STAGES, detector=None), f"--outdir={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr(detectors, "INCEPTION_URL", "http://127.0.0.1:1/refused")
        assert distill.main(args) == 0
        printed = capsys.readouterr()
        assert printed.out.count("fd will be null") == 1 and printed.err == ""
        table = rungs(tmp_path / "out")
        assert [rung["fd"] for rung in table] == [None] * 3
        assert [rung["endpoint_rmse"] for rung in table] == [rung["endpoint_rmse"] for rung in rungs(climbed)]
        assert (tmp_path / "out/ladder.csv").read_text().splitlines()[1].startswith("4,7,,0.0,")
        forbid_work(patch)
        assert distill.main(args) == 0
        assert rungs(tmp_path / "out") == table
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("trained again"))
    assert distill.main([*options(place, *STAGES), f"--outdir={tmp_path / 'out'}"]) == 0
    assert timeless(tmp_path / "out") == timeless(climbed)


# -- going on ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a machine that goes away."""


def test_killed_at_any_file_it_ends_with_the_same_numbers(place, climbed, tmp_path, monkeypatch):
    """Dies again and again, a few files further each time, before or after the file is in place; no measurement and no
    stage that came to its end is done again."""
    real_replace, real_measure, real_train = os.replace, Ladder.measure, setup.train
    budget, lives = 0, 0
    measured, trained = [], []

    def dying_replace(source, target):
        nonlocal budget
        budget -= 1
        if budget == 0 and lives % 2:
            raise Killed
        real_replace(source, target)
        if budget <= 0:
            raise Killed

    def watched_measure(self, network, kimg):
        result = real_measure(self, network, kimg)
        measured.append(result.rung.steps)
        return result

    def watched_train(options, run):
        path = real_train(options, run)
        trained.append(Path(options.outdir).name)
        return path

    monkeypatch.setattr(atomic.os, "replace", dying_replace)
    monkeypatch.setattr(Ladder, "measure", watched_measure)
    monkeypatch.setattr(ladder_module, "train", watched_train)
    args = [*options(place, *STAGES), f"--outdir={tmp_path / 'out'}", "--save-every=0"]
    while True:
        lives += 1
        budget = 4 + lives % 7  # enough for one new file: a life rewrites up to three
        assert lives < 60
        try:
            assert distill.main(args) == 0
            break
        except Killed:
            pass
    assert lives > 10
    assert timeless(tmp_path / "out") == timeless(climbed)
    assert (tmp_path / "out/samples.png").read_bytes() == (climbed / "samples.png").read_bytes()
    for a, b in zip(rungs(tmp_path / "out")[1:], rungs(climbed)[1:], strict=True):
        ours, theirs = load_network(a["network"]).net, load_network(b["network"]).net
        assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))
    # Once each, and once more only where the machine went away before the result was in its file.
    assert all(1 <= measured.count(steps) <= 2 for steps in (4, 2, 1)) and len(measured) < 6
    assert all(1 <= trained.count(name) <= 2 for name in ("stage-1-4to2", "stage-2-2to1"))

    assert not list((tmp_path / "out").rglob(".*.tmp"))


def test_a_finished_ladder_is_only_read(place, climbed, capsys, monkeypatch):
    forbid_work(monkeypatch)
    before = {path: path.read_bytes() for path in climbed.rglob("*") if path.is_file()}
    assert distill.main([*options(place, *STAGES), f"--outdir={climbed}"]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert {path: path.read_bytes() for path in climbed.rglob("*") if path.is_file()} == before


def test_a_ladder_may_be_moved_and_grow_downwards(place, climbed, tmp_path, monkeypatch):
    """A shorter ladder, moved elsewhere and asked for the rest, trains the rest alone and ends like the whole."""
    shutil.copytree(climbed, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "stage-2-2to1")
    (tmp_path / "out/rungs/steps-1.npz").unlink()
    out = f"--outdir={tmp_path / 'out'}"
    with monkeypatch.context() as patch:
        forbid_work(patch)
        short = ["--num_steps=4", "--until=2", "--duration=0.001", "--lr=5e-4"]
        assert distill.main([*options(place, *short), out]) == 0
    assert len(rungs(tmp_path / "out")) == 2
    trained = []
    monkeypatch.setattr(ladder_module, "train", lambda o, run: trained.append(o.outdir) or setup.train(o, run))
    assert distill.main([*options(place, *STAGES), out]) == 0
    assert trained == [str(tmp_path / "out" / "stage-2-2to1")]
    assert timeless(tmp_path / "out") == timeless(climbed)
    assert all(Path(rung["network"]).is_relative_to(tmp_path) for rung in rungs(tmp_path / "out")[1:])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--lr=5e-4,2e-4"], "stage-2-2to1 was made with other options: --lr (was 0.0001, now 0.0002)"),
        (["--duration=0.001"], "stage-2-2to1 was made with other options: --duration (was 0.002, now 0.001)"),
        (
            ["--num_steps=8", "--duration=0.001", "--lr=5e-4"],
            "stage-1-4to2 was made with other options: --num_steps (was 4",
        ),
        (
            ["--ratio=4", "--duration=0.001", "--lr=5e-4"],
            "stage-1-4to2 was made with other options: --ratio (was [2], now [4])",
        ),
        (["--seed=6"], "--seed (was 5, now 6)"),
        (["--ema=0.1", "--xflip=1"], "--ema (was 0.5, now 0.1), --xflip (was False, now True)"),
        (["--teacher-solver=euler"], "--teacher-solver (was heun, now euler)"),
        (["--data={other}"], "--data (was"),
        (["--transfer={teacher}"], "--transfer (was"),
    ],
)
def test_an_option_that_a_finished_stage_contradicts_is_named(
    place, climbed, tmp_path, capsys, monkeypatch, changed, named
):
    forbid_work(monkeypatch)
    make_dataset(tmp_path / "other.zip", count=150, seed=1)
    net = tiny_network(label_dim=4)
    save_network(tmp_path / "other.pkl", net)
    words = {"{other}": str(tmp_path / "other.zip"), "{teacher}": str(tmp_path / "other.pkl")}
    changed = [
        arg.replace(word, path) for arg in changed for word, path in words.items() if word in arg or "{" not in arg
    ]
    before = (climbed / "ladder.json").read_bytes()
    refused(capsys, 1, named, *options(place, *STAGES), f"--outdir={climbed}", *changed)
    assert (climbed / "ladder.json").read_bytes() == before


def test_a_student_that_was_replaced_is_noticed(place, climbed, tmp_path, capsys):
    shutil.copytree(climbed, tmp_path / "out")
    first = tmp_path / "out/stage-1-4to2/network-snapshot-000001.pkl"
    found = load_network(first)
    save_network(first, found.net, sampling=found.sampling)
    assert distill.main([*options(place, *STAGES), f"--outdir={tmp_path / 'out'}"]) == 1
    assert "stage-2-2to1" in (error := capsys.readouterr().err.splitlines()[-1]) and "transfer (was" in error


def test_two_processes_killed_and_started_again_find_the_same(place, climbed, tmp_path):
    """Sums round differently: end-point errors come out off by 2e-8 of themselves."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = [*options(place, *STAGES), "--device=cpu", f"--outdir={tmp_path / 'out'}", "--save-every=0"]
    command = [*launcher, str(ROOT / "distill.py"), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, end = tmp_path / "out" / "stage-2-2to1", time.monotonic() + 200
    while len(list(folder.glob("training-state-rolling-*.pt"))) < 2:
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    launcher = psutil.Process(job.pid)
    family = [launcher, *launcher.children(recursive=True)]  # each worker has a session of its own
    for process in family:
        process.kill()
    psutil.wait_procs(family)
    assert len(rungs(tmp_path / "out")) == 2, "killed in the second stage"
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 1 and "Going on from" in again.stdout
    assert again.stdout.count("endpoint_rmse") == 1, "one process speaks"
    for ours, theirs in zip(timeless(tmp_path / "out"), timeless(climbed), strict=True):
        for name in ("fd", "endpoint_rmse"):
            assert ours.pop(name) == pytest.approx(theirs.pop(name), rel=1e-6)
        assert ours == theirs


# -- parts -------------------------------------------------------------------------------------------------------------


def batches(sizes, value=0.0):
    seeds = iter(range(sum(sizes)))
    for size in sizes:
        own = [next(seeds) for _ in range(size)]
        yield Batch(own, torch.tensor(own).float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2) + value, None)


def test_only_the_first_images_are_kept():
    keeper = FirstImages(5)
    assert sum(len(batch.seeds) for batch in keeper.watch(batches([4, 4, 4]))) == 12
    assert keeper.collected()[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and len(keeper.kept) == 5


def test_images_that_are_no_numbers_end_the_ladder(place):
    network = load_network(place / "plain.pkl")
    with pytest.raises(UserError, match=r"plain.pkl: some images of seeds 0 to 3 hold NaN"):
        list(checked(batches([4, 4], math.nan), network))


def test_time_is_that_of_sampling_without_the_first_batch(monkeypatch):
    clock = iter([0, 100, 200, 203, 300, 305, 400])  # before and after each batch, and before the end
    monkeypatch.setattr(ladder_module.time, "perf_counter", lambda: next(clock))
    timing = Timing()
    assert len(list(timing.watch(batches([4, 4, 2])))) == 3
    assert timing.seconds_per_kimg() == pytest.approx((3 + 5) / 6 * 1000)
    clock = iter([0, 7, 8])
    timing = Timing()
    list(timing.watch(batches([14])))
    assert timing.seconds_per_kimg() == pytest.approx(500), "a single batch has to do"


def test_progress_is_said_now_and_then(monkeypatch):
    now = iter([0, 4, 11, 15, 22])
    monkeypatch.setattr(ladder_module.time, "monotonic", lambda: next(now))
    lines = []
    assert len(list(show_progress(batches([10] * 4), lambda batch: len(batch.seeds), 40, lines.append))) == 4
    assert lines == ["  20 of 40 images, 11s to go"]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_any_ladder_can_be_drawn(tmp_path, count):
    for distances in (True, False):
        table = [Rung(64, 127, 2.0 if distances else None, 0.0, 1.0, 0, "teacher.pkl")]
        table += [
            Rung(64 >> i, 64 >> i, 2.0 + i if distances else None, 0.1 * i, 1.0, 1, "s.pkl") for i in range(1, count)
        ]
        plot_ladder(table, tmp_path / f"{distances}.png")
        with Image.open(tmp_path / f"{distances}.png") as plot:
            assert plot.width > 600
