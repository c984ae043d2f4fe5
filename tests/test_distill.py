"""The ladder command: its files, its numbers against independent ones, and that nothing is lost or done twice."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import distill
import fid
import generate
import train
from dnnlib import atomic
from dnnlib.cli import UserError
from engine import setup
from formats.network_files import load_network, save_network
from helpers import load_recipe, make_dataset, small_network
from ladders import ladder as ladder_module
from ladders import measuring
from ladders.measuring import Measuring, Watch
from ladders.results import CurvePoint, Floor, Rung, format_table, ladder_figure, plus_minus
from metrics import detectors
from metrics.classifier import train_detector
from metrics.statistics import (
    Stats,
    dataset_against_itself,
    frechet_between,
    statistics_of_dataset,
    statistics_of_images,
)
from torch_utils import progress
from torch_utils.progress import show_progress
from training import pictures
from training.dataset import ImageFolderDataset
from training.distillation import plan_stage
from training.recipe import Options
from training.samplers import StackedRandomGenerator, ablation_sampler, edm_sampler
from training.sampling import Batch
from training.training_loop import Trainer

ROOT = Path(__file__).parent.parent
NUM, BATCH = 50, 20  # images of a measurement, at a time
COMMON = ["--batch=96", "--tick=0.5", "--seed=5", f"--eval-num={NUM}", f"--eval-batch={BATCH}"]
KILLS = int(os.environ.get("EDM_TEST_KILLS", "10"))  # of the slow test; as many as it is asked for, up to fifty
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


@pytest.fixture
def out(tmp_path):
    """Where a ladder of one test goes."""
    return tmp_path / "out"


@pytest.fixture
def again(place, climbed, out):
    """The options of the ladder once more, for a copy of its folder in `out`."""
    shutil.copytree(climbed, out)
    return [*options(place, *STAGES), f"--outdir={out}"]


def rungs(folder):
    return json.loads((folder / "ladder.json").read_text())


def timeless(folder):
    """The rungs without the time they took, and with files named by their place in the folder."""
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
    monkeypatch.setattr(measuring, "iterate_images", fail)


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_files(climbed):
    table = rungs(climbed)
    names = "steps nfe fd endpoint_rmse sec_per_kimg kimg network fd_std fd_sets images detector"
    assert [" ".join(rung) for rung in table] == [names] * 3
    assert all(rung["images"] == NUM and rung["detector"].startswith("classifier:") for rung in table)
    assert [(rung["steps"], rung["nfe"], rung["kimg"]) for rung in table] == [(4, 7, 0), (2, 2, 1), (1, 1, 2)]
    assert table[0]["endpoint_rmse"] == 0 and all(0 < rung["endpoint_rmse"] < 10 for rung in table[1:])
    assert all(rung["fd"] > 0 and rung["sec_per_kimg"] > 0 for rung in table)
    for rung in table:
        assert len({*rung["fd_sets"]}) == 3, "other seeds, other images"
        assert rung["fd"] == pytest.approx(np.mean(rung["fd_sets"]), rel=1e-12)
        assert rung["fd_std"] == pytest.approx(np.std(rung["fd_sets"], ddof=1), rel=1e-9)
        rung["fd_sets"] = " ".join(map(str, rung["fd_sets"]))
    with open(climbed / "ladder.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in rung.items()} for rung in table]

    last = load_network(table[2]["network"])
    assert Path(table[2]["network"]) == climbed / "stage-2-2to1" / "network-snapshot-000002.pkl"
    files = [(entry["steps"], entry["solver"], entry["network"]) for entry in last.sampling.lineage]
    assert files == [(4, "heun", table[0]["network"]), (2, "euler", table[1]["network"])]
    assert last.net.label_dim == 4, "conditional, as the teacher"

    with Image.open(climbed / "ladder.png") as plot, Image.open(climbed / "samples.png") as sheet:
        assert plot.width > 2 * plot.height, "two panels"
        pixels = np.asarray(sheet)
    tops = []
    for path, steps in ((rung["network"], rung["steps"]) for rung in table):
        with np.load(climbed / "rungs" / f"steps-{steps}.npz") as measured:
            images = torch.from_numpy(measured["images"][:16])
        final = images_of(path, steps, 16, heun=steps == 4)
        assert rms(images - final) < 1e-5 * rms(final)
        row = np.asarray(pictures.tile(pictures.to_uint8(images), columns=16, gap=2))
        tops.append(next(y for y in range(len(pixels)) if row[0].tobytes() in pixels[y].tobytes()))
        left = pixels[tops[-1]].tobytes().index(row[0].tobytes()) // 3
        assert (pixels[tops[-1] :][: len(row), left : left + row.shape[1]] == row).all()
    assert tops == sorted(tops), "the same seeds for every rung, the teacher above"


def test_a_stage_is_what_train_does(place, climbed, tmp_path):
    """The same numbers, bit for bit, as train.py's own runs one after the other."""
    teacher = place / "teacher.pkl"
    own = ("--num_steps=4 --duration=0.001 --lr=5e-4", "--duration=0.002 --lr=1e-4")
    for index, stage in enumerate(climbed / name for name in ("stage-1-4to2", "stage-2-2to1")):
        args = [f"--data={place / 'data.zip'}", f"--transfer={teacher}", *COMMON[:3], "--precond=edm_distillation"]
        assert train.main([*args, *own[index].split(), f"--outdir={tmp_path / stage.name}", "--nosubdir"]) == 0
        name = f"network-snapshot-00000{index + 1}.pkl"
        theirs, ours = tmp_path / stage.name / name, stage / name
        a, b = load_network(theirs), load_network(ours)
        assert a.sampling.grid == b.sampling.grid and a.net.init_kwargs == b.net.init_kwargs
        assert same_network(theirs, ours)
        assert a.extra["loss_fn"] == b.extra["loss_fn"]
        teacher = ours


@pytest.fixture
def seen(monkeypatch):
    """The options of stages, each of which ends the ladder before it is prepared."""
    found = []

    def look(options, *_):
        found.append(options)
        raise UserError("seen enough")

    monkeypatch.setattr(ladder_module, "prepare", look)
    return found


def test_defaults_are_those_of_train(place, tmp_path, capsys, seen):
    """With nothing but what must be given, a stage has the very options that train.py gives a distillation."""
    args = [f"--data={place / 'data.zip'}", f"--transfer={place / 'teacher.pkl'}", "--num_steps=4"]
    assert distill.main([*args, f"--outdir={tmp_path}"]) == 1
    capsys.readouterr()
    args += ["--precond=edm_distillation", "--seed=0", "--nosubdir", f"--outdir={tmp_path / 'stage-1-4to2'}", "-n"]
    assert train.main(args) == 0
    theirs, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out.partition("Training options:\n")[2])
    ours = json.loads(json.dumps(setup.prepare(seen[0]).config.to_options()))
    assert ours.pop("command_line")["lr"] == 5e-4 and "lr" not in theirs.pop("command_line")  # it has to say so
    assert ours == theirs


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
    check_errors(rungs(climbed), NUM)


def check_errors(table, count, heun=True):
    teacher = images_of(table[0]["network"], table[0]["steps"], count, heun=heun)
    for rung in table[1:]:
        student = images_of(rung["network"], rung["steps"], count)
        assert rung["endpoint_rmse"] == pytest.approx(rms(student - teacher), rel=1e-5)


def test_end_point_error_in_closed_form(place, tmp_path, out, monkeypatch):
    """A network of zeros is the ideal denoiser of N(0, sigma_data^2): every sampler just shrinks the latent, by a known
    factor. At a vanishing learning rate the student stays that network, and takes its own coarser steps."""
    net = tiny_network(sigma_data=0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    save_network(tmp_path / "zero.pkl", net)
    monkeypatch.setattr(measuring, "try_inception", lambda: "not here")
    args = [f"--data={place / 'data.zip'}", *COMMON, "--num_steps=6", "--ratio=2,3", "--duration=0.001", "--lr=1e-30"]
    assert distill.main([*args, f"--transfer={tmp_path / 'zero.pkl'}", f"--outdir={out}"]) == 0

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
    table = rungs(out)
    assert [(rung["steps"], rung["nfe"], rung["fd"]) for rung in table] == [(6, 11, None), (3, 3, None), (1, 1, None)]
    assert table[0]["endpoint_rmse"] == 0
    for rung in table[1:]:
        expected = abs(shrink[rung["steps"]] - shrink[6]) * scale
        assert expected > 0.01 and rung["endpoint_rmse"] == pytest.approx(expected, rel=1e-5)


def test_distances_are_those_of_fid_gen(place, climbed, tmp_path, capsys):
    """Teacher and students, every seed set, against a reference that fid.py makes itself."""
    files = [f"--detector={place / 'detector.pt'}", f"--ref={tmp_path / 'ref.npz'}"]
    assert fid.main(["ref", f"--data={place / 'data.zip'}", f"--dest={tmp_path / 'ref.npz'}", files[0]]) == 0
    for rung in rungs(climbed):
        steps = ["--steps=4"] if rung["steps"] == 4 else []
        for number, distance in enumerate(rung["fd_sets"]):
            capsys.readouterr()
            seeds = f"--seeds={number * NUM}-{(number + 1) * NUM - 1}"
            args = [f"--network={rung['network']}", *steps, seeds, f"--batch={BATCH}", *files]
            assert fid.main(["gen", *args]) == 0
            assert float(capsys.readouterr().out) == pytest.approx(distance, rel=2e-5)


def test_the_teachers_own_curve_is_what_edms_samplers_give(place, tmp_path):
    """At the cost of a 4-step student: four Euler steps, or two of Heun's (three calls), on fresh grids."""
    args = options(place, "--num_steps=8", "--until=4", "--duration=0.001", f"--outdir={tmp_path}")
    assert distill.main(args) == 0
    curve = json.loads((tmp_path / "teacher-curve.json").read_text())
    assert [list(point) for point in curve] == [["solver", "steps", "nfe", "fd", "endpoint_rmse"]] * 2
    assert [(p["solver"], p["steps"], p["nfe"]) for p in curve] == [("euler", 4, 4), ("heun", 2, 3)]
    with open(tmp_path / "teacher-curve.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in point.items()} for point in curve]

    net = load_network(place / "teacher.pkl").net
    detector = detectors.load_detector(str(place / "detector.pt"), "cpu")
    reference = statistics_of_dataset(place / "data.zip", detector)
    random = StackedRandomGenerator("cpu", range(NUM))
    latents = random.randn([NUM, 1, 8, 8])
    labels = torch.eye(4)[random.randint(4, size=[NUM])]
    end = edm_sampler(net, latents, labels, num_steps=8)
    euler = ablation_sampler(net, latents, labels, num_steps=4, solver="euler", discretization="edm")
    for point, images in zip(curve, (euler, edm_sampler(net, latents, labels, num_steps=2)), strict=True):
        assert point["endpoint_rmse"] == pytest.approx(rms(images - end), rel=1e-5)
        stats = statistics_of_images([pictures.to_uint8(images)], detector)
        assert point["fd"] == pytest.approx(frechet_between(stats, reference), rel=1e-4)


def test_which_curve_points_there_are():
    """As many Euler steps, and the most Heun steps that cost no more."""
    for students, heun in (([32, 16, 8, 4, 2, 1], [16, 8, 4, 2]), ([9, 3, 1], [5, 2]), ([7], [4])):
        expected = [*(("euler", steps) for steps in students), *(("heun", steps) for steps in heun)]
        assert measuring.curve_plan(students) == expected


def test_the_data_itself(place, climbed, capsys, monkeypatch):
    """By numpy's own mean and covariance of the features, drawn as documented; and said in the table."""
    detector = detectors.load_detector(str(place / "detector.pt"), "cpu")
    dataset = ImageFolderDataset(place / "data.zip")
    features = detector(torch.from_numpy(np.stack([dataset[i][0] for i in range(200)]))).double().numpy()
    chosen = [features[np.random.default_rng([0, draw]).integers(200, size=NUM)] for draw in range(10)]
    own, *drawn = (Stats(x.mean(0), np.cov(x, rowvar=False), len(x), detector.id) for x in (features, *chosen))
    expected = [frechet_between(each, own) for each in drawn]
    record = json.loads(next((climbed / "rungs").glob("floor-*.json")).read_text())
    assert record["images"] == NUM and record["distances"] == pytest.approx(expected, rel=1e-6)
    forbid_work(monkeypatch)
    assert distill.main([*options(place, *STAGES), f"--outdir={climbed}"]) == 0
    words = capsys.readouterr().out
    figures = plus_minus(float(np.mean(expected)), float(np.std(expected, ddof=1)))
    assert f"{figures}" in words and "the data itself: 50 images drawn from it, 10 times" in words
    table = rungs(climbed)
    assert all(words.count(plus_minus(rung["fd"], rung["fd_std"])) >= 2 for rung in table), "in a line and the table"


def test_more_draws_than_images_and_the_reference(tmp_path, place):
    """More images drawn than there are come nearer to all of them, by about one over their number; the reference is
    bit for bit the one that fid.py makes; three images are enough."""
    detector = detectors.load_detector(str(place / "detector.pt"), "cpu")
    stats, distances = dataset_against_itself(place / "data.zip", detector, draws=3, images=5000, batch=64)
    _, few = dataset_against_itself(place / "data.zip", detector, draws=3, images=500, batch=64)
    assert 5 < np.mean(few) / np.mean(distances) < 20
    plain = statistics_of_dataset(place / "data.zip", detector, batch=64)
    assert np.array_equal(stats.mu, plain.mu) and np.array_equal(stats.sigma, plain.sigma) and stats.num == 200
    assert len(set(distances)) == 3 and min(distances) > 0
    make_dataset(tmp_path / "three.zip", count=3)
    assert len(dataset_against_itself(tmp_path / "three.zip", detector, draws=3, images=10)[1]) == 3


def test_network_calls_and_a_part_of_the_images(again, place, out, monkeypatch, capsys):
    """With other options of measuring, the ladder is measured again and not trained again, and it is said why. One
    batch makes the calls countable; and of more images than are compared, the first count."""
    args, calls = [*again, "--eval-num=30", "--eval-batch=30"], []
    network_class = type(load_network(place / "teacher.pkl").net)
    forward = network_class.forward

    def counting(self, x, sigma, *args, **kwargs):
        calls.append(len(x))
        return forward(self, x, sigma, *args, **kwargs)

    monkeypatch.setattr(network_class, "forward", counting)
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(measuring, "END_POINT_IMAGES", 8)
    assert distill.main(args) == 0
    words = capsys.readouterr().out
    assert words.count("Measured before in another way") == 1 and f"images (was {NUM}, now 30)" in words
    table = rungs(out)
    assert calls == [30] * (3 * (7 + 2 + 1) + (2 + 1)), "and one set of the teacher's Euler 2 and 1; Heun 1 is Euler 1"
    assert [rung["nfe"] for rung in table] == [7, 2, 1]
    check_errors(table, 8)
    with np.load(out / "rungs/steps-4.npz") as measured:
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
    check_errors(table, NUM, heun=False)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--num_steps=18", "--ratio=2,3,3 does"),
        ("--num_steps=4 --duration=1,2,3", "--duration has 3 values for 2 stages"),
        ("--num_steps=4 --lr=1,2,3", "--lr has 3 values for 2 stages (4 -> 2 -> 1 steps); give one, or one for"),
        ("--num_steps=4 --duration=2000000", "--duration: 2e+06 million images are too many"),
        ("--num_steps=4 --eval-sets=100000000", "--eval-sets=100000000 of --eval-num=50 images need more seeds"),
        ("--num_steps=4 --stop-if-worse=nan", "--stop-if-worse"),
        ("--num_steps=4 --lr=0", "not a list of positive numbers"),
        ("--num_steps=4 --ratio=two", "not a list of whole numbers"),
        ("--num_steps=7 --until=2 --ratio=3-2", "7 is no multiple of 2; --num_steps=8"),
        ("--num_steps=4 --outdir=", "--outdir is empty"),
        ("", "--num_steps is needed"),
        ("--num_steps=4 --batch-gpu=5", "--batch-gpu=5 does not divide"),
        ("--num_steps=4 --cond=0", "has 4 classes"),
        ("--num_steps=4 --augment=0.5", "--augment"),
        ("--num_steps=8 --transfer={student}", "use --num_steps=2 or leave it out"),
        ("--teacher-solver=heun --transfer={student}", "its output is a jump and not a slope"),
        ("--num_steps=4 --transfer=nowhere.pkl", "nowhere.pkl: no such file"),
        ("--num_steps=4 --data=nowhere.zip", "nowhere.zip"),
        ("--num_steps=4 --detector=nowhere.pt", "nowhere.pt: no such file"),
        ("--num_steps=4 --ref=nowhere.npz", "nowhere.npz: no such file"),
        ("--num_steps=4 --outdir={student}", "is a file); choose another --outdir"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_done(place, climbed, out, capsys, monkeypatch, args, message):
    forbid_work(monkeypatch)
    args = args.format(student=climbed / "stage-1-4to2" / "network-snapshot-000001.pkl").split()
    status = 1 if any(word in message for word in ("nowhere", "classes", "is a file")) else 2
    refused(capsys, status, message, *options(place), f"--outdir={out}", *args)
    assert not out.exists()


def test_a_reference_of_another_detector_is_refused(place, tmp_path, out, capsys, monkeypatch):
    forbid_work(monkeypatch)
    monkeypatch.setattr(measuring, "try_inception", lambda: pytest.fail("a download before the refusal"))
    other, inception = tmp_path / "other.npz", tmp_path / "edm.npz"
    Stats(np.zeros(128), np.eye(128), 10, "classifier:somebody-elses").save(other)
    np.savez(inception, mu=np.zeros(2048), sigma=np.eye(2048))  # EDM's: not marked
    for detector, ref in (("detector.pt", other), ("detector.pt", inception), (None, other)):
        args = options(place, "--num_steps=4", f"--ref={ref}", detector=detector)
        refused(capsys, 1, "statistics of two detectors can't be compared", *args, f"--outdir={out}")
    assert not out.exists()


def test_a_given_reference_is_used(again, place, climbed, tmp_path, out, capsys):
    """Statistics of other data than the ladder's: other distances, the same end-point errors."""
    ref = tmp_path / "ref.npz"
    data, detector = make_dataset(tmp_path / "other.zip", count=150, seed=1), f"--detector={place / 'detector.pt'}"
    assert fid.main(["ref", f"--data={data}", f"--dest={ref}", detector]) == 0
    assert distill.main([*again, f"--ref={ref}"]) == 0
    assert "the data itself" not in capsys.readouterr().out, "which data?"
    for ours, theirs in zip(rungs(out), rungs(climbed), strict=True):
        assert ours["fd"] != theirs["fd"] and ours["endpoint_rmse"] == theirs["endpoint_rmse"]


def test_secrets_of_addresses_open_files_and_are_kept_nowhere(server, place, tmp_path, capfd):
    """In no file of a ladder, of one of its stages or of images; nor in the commands that are proposed."""

    def answer(handler, count):
        known = handler.headers["Authorization"] == "Basic bWU6U0VDUkVU"  # me:SECRET
        whole = known and handler.path.endswith("?token=SECRET")
        handler.reply(200 if whole else 403, (place / handler.path.split("?")[0][1:]).read_bytes())

    server.answer = answer
    teacher, detector = (f"{server.url}/{name}?token=SECRET" for name in ("teacher.pkl", "detector.pt"))
    teacher, detector = (each.replace("http://", "http://me:SECRET@") for each in (teacher, detector))
    args = [f"--data={place / 'data.zip'}", *COMMON, "--num_steps=2", "--duration=0.001", "--curve=0", "--eval-sets=1"]
    args += [f"--outdir={tmp_path / 'ladder'}"]
    assert distill.main([*args, f"--transfer={teacher}", f"--detector={detector}"]) == 0
    images = f"--outdir={tmp_path / 'images'}"
    assert generate.main([f"--network={teacher}", "--seeds=0-1", "--steps=1", images]) == 0
    out, err = capfd.readouterr()
    assert "SECRET" not in out + err and err.count("Note: --transfer=http://127") == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]
    assert not [path for path in files if b"SECRET" in path.read_bytes()]
    shown = f"{server.url}/teacher.pkl"
    for path in ("ladder/ladder-options.json", "ladder/stage-1-2to1/training_options.json", "images/manifest.json"):
        assert shown in (tmp_path / path).read_text()
    student = load_network(tmp_path / "ladder/stage-1-2to1/network-snapshot-000001.pkl")
    assert student.sampling.lineage[0]["network"] == shown

    again = [f"--config={tmp_path / 'ladder/ladder-options.json'}", "--dry-run"]
    assert distill.main(again) == 1
    assert f"error: {shown}: the server answered HTTP 403 Forbidden; where it needs a user" in capfd.readouterr().err
    assert distill.main([*again, f"--transfer={teacher}", f"--detector={detector}"]) == 0


# -- without a detector ------------------------------------------------------------------------------------------------


def test_a_download_that_cannot_be_had_is_given_up_soon(monkeypatch):
    """A host that accepts and then says nothing is the slowest way of having no network."""
    assert 3 * measuring.PATIENCE + 0.5 + 1 < 15, "seconds of silence, and the pauses between"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(detectors, "INCEPTION_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/inception.pth")
        monkeypatch.setattr(measuring, "PATIENCE", 0.1)
        start = time.monotonic()
        assert "the Inception weights can't be had (http://127.0.0.1" in measuring.try_inception()
        assert 0.3 + 0.5 + 1 < time.monotonic() - start < 5


def test_without_inception_the_end_point_error_judges(place, climbed, out, capsys, monkeypatch):
    """The distances come later, with a detector and without training; until then, what was measured stands."""
    shutil.copytree(climbed, out)
    args = [*options(place, *STAGES, detector=None), f"--outdir={out}"]
    with monkeypatch.context() as patch:
        patch.setattr(detectors, "INCEPTION_URL", "http://127.0.0.1:1/refused")
        refused(capsys, 1, "out was measured with a --detector (classifier:", *args)
        assert timeless(out) == timeless(climbed), "numbers are not replaced by none"
        shutil.rmtree(out / "rungs")
        assert distill.main(args) == 0
        printed = capsys.readouterr()
        assert printed.out.count("fd will be null") == 1 and printed.err == ""
        (proposed,) = re.findall(r"a detector .*, then the same .*\n    .*(fid.py detector .*)", printed.out)
        assert proposed == f"fid.py detector --data={place / 'data.zip'} --dest={out / 'detector.pt'}"
        table = rungs(out)
        assert [rung["fd"] for rung in table] == [None] * 3
        assert [rung["endpoint_rmse"] for rung in table] == [rung["endpoint_rmse"] for rung in rungs(climbed)]
        assert (out / "ladder.csv").read_text().splitlines()[1].startswith("4,7,,0.0,")
        assert all(rung["fd_std"] is None and rung["fd_sets"] == [] for rung in table)
        forbid_work(patch)
        assert distill.main(args) == 0
        assert rungs(out) == table
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("trained again"))
    assert distill.main([*options(place, *STAGES), f"--outdir={out}"]) == 0
    assert timeless(out) == timeless(climbed)


def test_without_a_detector_the_end_point_error_judges(place, climbed, out, capsys, monkeypatch):
    """By --detector=none nothing is fetched."""
    monkeypatch.setattr(measuring, "try_inception", lambda: pytest.fail("fetched"))
    args = [*options(place, *STAGES, detector=None), "--detector=none", f"--outdir={out}"]
    refused(capsys, 2, "--ref is for Fréchet distances, --detector=none measures none", *args, "--ref=x.npz")
    assert distill.main(args) == 0
    table = rungs(out)
    assert [rung["fd"] for rung in table] == [None] * 3
    assert [rung["endpoint_rmse"] for rung in table] == [rung["endpoint_rmse"] for rung in rungs(climbed)]
    refused(capsys, 1, "was measured with a --detector", *args[:-1], f"--outdir={climbed}")


# -- going on ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a machine that goes away."""


def watch_measuring(monkeypatch, die_before=None):
    """The (steps, set, whether for the curve) that are measured from here on; goes away before measuring one."""
    real, seen = Measuring.measure_set, []

    def watched(self, path, network, number=0, kept=0, is_curve=False):
        what = (network.sampling.grid.steps, number, is_curve)
        if what == die_before:
            raise Killed
        seen.append(what)
        return real(self, path, network, number, kept, is_curve)

    monkeypatch.setattr(Measuring, "measure_set", watched)
    return seen


def watch_training(monkeypatch):
    """The names of the stages that are trained to their end from here on."""
    trained = []

    def watched(options, run):
        path = setup.train(options, run)
        trained.append(Path(options.outdir).name)
        return path

    monkeypatch.setattr(ladder_module, "train", watched)
    return trained


def same_network(a, b):
    ours, theirs = (load_network(path).net.state_dict() for path in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_killed_at_any_file_it_ends_with_the_same_numbers(place, climbed, out, monkeypatch):
    """Dies again and again, a few files further each time, before or after the file is in place; no measurement and no
    stage that came to its end is done again."""
    real_replace, budget, lives = os.replace, 0, 0

    def dying_replace(source, target):
        nonlocal budget
        budget -= 1
        if budget == 0 and lives % 2:
            raise Killed
        real_replace(source, target)
        if budget <= 0:
            raise Killed

    monkeypatch.setattr(atomic.os, "replace", dying_replace)
    measured, trained = watch_measuring(monkeypatch), watch_training(monkeypatch)
    args = [*options(place, *STAGES), f"--outdir={out}", "--save-every=0"]
    while True:
        lives += 1
        budget = 8 + lives % 7  # enough for some new files: a life rewrites up to three
        assert lives < 30
        try:
            assert distill.main(args) == 0
            break
        except Killed:
            pass
    assert lives > 5
    assert timeless(out) == timeless(climbed)
    assert all(same_network(a["network"], b["network"]) for a, b in zip(rungs(out), rungs(climbed), strict=True))
    # Once each, and once more only where the machine went away before the result was in its file.
    expected = [(steps, number, False) for steps in (4, 2, 1) for number in range(3)] + [(2, 0, True), (1, 0, True)]
    assert sorted(set(measured)) == sorted(expected) and all(measured.count(each) <= 2 for each in expected)
    assert len(measured) < 1.5 * len(expected)
    for name in ("teacher-curve.json", "teacher-curve.csv", "ladder.png", "samples.png"):
        assert (out / name).read_bytes() == (climbed / name).read_bytes()
    assert all(1 <= trained.count(name) <= 2 for name in ("stage-1-4to2", "stage-2-2to1"))
    assert not list(out.rglob(".*.tmp"))


def events(lines):
    """What a ladder says that it does, each once: 'Stage 2 of 3: tick 4', 'Measuring ...'."""
    stage = ""
    for line in lines:
        if line.startswith("Stage "):
            stage = line.partition(":")[0]
        if line.startswith("tick "):
            yield f"{stage}: {' '.join(line.split()[:2])}"
        elif line.startswith("Measuring "):
            yield line.strip()


@pytest.mark.slow
@pytest.mark.timeout(200 + 100 * KILLS)
def test_killed_many_times_at_random_moments_it_ends_with_the_same_numbers(place, tmp_path):
    """SIGKILL from outside, in training, between stages, in evaluations; started again each time."""
    files = ["--data=data.zip", "--transfer=plain.pkl", "--detector=detector.pt", "--outdir=ladder"]
    more = ["--num_steps=8", "--duration=0.008", "--batch=48", "--eval-num=400", "--tick=0.2", "--save-every=0.002"]
    command = [sys.executable, str(ROOT / "distill.py"), *files, *more, "--seed=3", "--device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    folders = straight, broken = [shutil.copytree(place, tmp_path / name) for name in ("straight", "broken")]
    done = subprocess.run(command, cwd=straight, env=environment, check=True, capture_output=True, text=True)
    order = list(events(done.stdout.splitlines()))

    random = np.random.default_rng(5)
    targets = sorted(random.choice(len(order) - 1, size=KILLS, replace=False))
    for target in targets:  # until a life has come so far, or further, and a random moment longer
        with subprocess.Popen(command, cwd=broken, env=environment, stdout=subprocess.PIPE, text=True) as job:
            assert job.stdout is not None
            reached = next((event for event in events(job.stdout) if order.index(event) >= target), None)
            assert reached is not None, f"ended before {order[target]}"
            time.sleep(random.uniform(0, 0.4))
            assert job.poll() is None
            job.kill()
    print(f"killed within: {', '.join(order[target] for target in targets)}")
    last = subprocess.run(command, cwd=broken, env=environment, capture_output=True, text=True)
    assert last.returncode == 0 and last.stderr == "", last.stderr
    assert timeless(straight / "ladder") == timeless(broken / "ladder")
    for rung in rungs(straight / "ladder")[1:]:
        assert same_network(*(folder / rung["network"] for folder in folders))
    for name in ("teacher-curve.json", "samples.png", "ladder.png"):
        assert (straight / "ladder" / name).read_bytes() == (broken / "ladder" / name).read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_measuring_says_how_to_go_on(place, out, monkeypatch, capsys, number):
    """What goes wrong with a point of the curve is a result of it, but an interruption is none."""
    args = [*options(place, *STAGES), f"--outdir={out}"]
    real, before, calls = measuring.statistics.statistics_of_images, signal.getsignal(number), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:  # three sets of three rungs
            signal.raise_signal(number)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(measuring.statistics, "statistics_of_images", interrupted)
        assert distill.main(args) == 128 + number
    words = f"interrupted by {number.name}; what is finished is kept: run the same command to resume"
    assert capsys.readouterr().err.endswith(f"\ndistill.py: {words}\n") and signal.getsignal(number) == before
    seen = watch_measuring(monkeypatch, die_before=(1, 0, True))
    with pytest.raises(Killed):
        distill.main(args)
    assert seen == [(2, 0, True)]


def test_more_or_fewer_seed_sets(again, climbed, out, monkeypatch):
    """What is there is used: a fourth set is measured alone, and for one set there is nothing to do."""
    seen = watch_measuring(monkeypatch)
    assert distill.main([*again, "--eval-sets=4"]) == 0
    assert seen == [(4, 3, False), (2, 3, False), (1, 3, False)]
    for ours, theirs in zip(rungs(out), rungs(climbed), strict=True):
        assert ours["fd_sets"][:3] == theirs["fd_sets"] and len(set(ours["fd_sets"])) == 4
        assert ours["fd"] == pytest.approx(np.mean(ours["fd_sets"]), rel=1e-12)
    forbid_work(monkeypatch)
    assert distill.main([*again, "--eval-sets=1", "--curve=0"]) == 0
    for ours, theirs in zip(rungs(out), rungs(climbed), strict=True):
        assert ours["fd_sets"] == theirs["fd_sets"][:1] == [ours["fd"]] and ours["fd_std"] is None
    assert ",," not in (climbed / "ladder.csv").read_text() and (out / "ladder.csv").read_text().count(",,") == 3


def spoil(monkeypatch, factor):
    """Multiplies the images of networks of so many steps."""
    real = measuring.iterate_images

    def spoilt(network, *rest, **named):
        for batch in real(network, *rest, **named):
            yield replace(batch, images=batch.images * factor(network.sampling.grid.steps))

    monkeypatch.setattr(measuring, "iterate_images", spoilt)


def test_curve_points_that_make_no_sense_are_left_out(again, climbed, out, capsys, monkeypatch):
    """NaN, absurd numbers, and a grid that can't be: a line for each, and the ladder continues; the next start prints the
    same without measuring again. With --curve=0 nothing of the kind is done."""
    curve = out / "teacher-curve.json"
    for path in (out / "rungs").glob("curve-*"):
        path.unlink()
    with monkeypatch.context() as patch:
        forbid_work(patch)
        assert distill.main([*again, "--curve=0"]) == 0
    assert not list(out.glob("teacher-curve.*"))

    def no_grid(net, steps):
        raise ValueError(f"{steps} steps need more noise levels than this network distinguishes")

    with monkeypatch.context() as patch:
        spoil(patch, {2: 1e6, 1: math.nan}.get)
        for again_measured in (True, False):
            capsys.readouterr()
            assert distill.main(again) == 0
            words = capsys.readouterr().out
            nan = "some images of seeds 0 to 16 hold NaN or infinities"
            assert "The teacher itself with 2 euler steps is left out: its images are absurd (end-point RMSE " in words
            assert f"The teacher itself with 1 euler step is left out: {nan}" in words
            assert ("Measuring the teacher itself" in words) is again_measured
            assert not curve.exists() and timeless(out) == timeless(climbed)
        patch.setattr(measuring, "network_grid", no_grid)
        assert distill.main(again) == 0
        assert "2 euler steps is left out: 2 steps need more noise levels" in capsys.readouterr().out


def test_a_collapsed_student_has_a_distance(place, out, capsys, monkeypatch):
    """All its images are equal: the ladder records how far away they are, prints that, and is finished."""
    spoil(monkeypatch, lambda steps: 0.0 if steps == 2 else 1.0)
    args = ["--num_steps=4", "--until=2", "--duration=0.001", "--eval-sets=1", "--eval-num=500", "--curve=0"]
    assert distill.main([*options(place, *args), f"--outdir={out}"]) == 0
    teacher, student = rungs(out)
    assert student["fd"] > 0 and student["network"] != teacher["network"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "has collapsed" in line]
    assert student["network"] in line and teacher["network"] not in line


def test_a_student_that_is_worse_ends_the_ladder(place, out, capsys, monkeypatch):
    """The second student at the earliest; all files are whole; without the option the rest is done."""
    stages = ["--num_steps=8", "--duration=0.001", "--lr=5e-4", "--eval-sets=1"]
    args = [*options(place, *stages), f"--outdir={out}"]
    assert distill.main([*args, "--stop-if-worse=0.001"]) == 0
    table = rungs(out)
    assert [rung["steps"] for rung in table] == [8, 4, 2]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Stopped")]
    errors = table[2]["endpoint_rmse"], table[1]["endpoint_rmse"]
    for words in (
        f"RMSE of 2 steps is {errors[0]:.4g}, that of 4 steps {errors[1]:.4g};",
        "give stage 2 a longer --duration (0.001 now; remove ",
        "leave out --stop-if-worse to go on",
    ):
        assert words in line
    curve = json.loads((out / "teacher-curve.json").read_text())
    assert [(point["solver"], point["steps"]) for point in curve] == [("euler", 4), ("euler", 2), ("heun", 2)]

    trained = watch_training(monkeypatch)
    assert distill.main(args) == 0
    assert trained == ["stage-3-2to1"] and "Stopped" not in capsys.readouterr().out
    table = rungs(out)
    largest = max(table[i + 1]["endpoint_rmse"] / table[i]["endpoint_rmse"] for i in (1, 2))
    for factor, stops in ((1.01, 0), (0.99, 1)):
        assert distill.main([*args, f"--stop-if-worse={largest * factor}"]) == 0
        assert capsys.readouterr().out.count("Stopped") == stops


def test_the_train_command_of_a_stage(place, climbed, out, monkeypatch):
    """Interrupted in its second stage, a ladder is gone on with by the command that it has written down, word for word;
    what comes out is the uninterrupted ladder's to the last bit, and distill.py takes it from there."""
    args = [*options(place, *STAGES), f"--outdir={out}", "--save-every=0"]
    real_step = Trainer.step
    with monkeypatch.context() as patch:

        def dying_step(self, loader):
            if self.step_count == 15 and "stage-2" in self.config.run_dir:
                raise Killed
            real_step(self, loader)

        patch.setattr(Trainer, "step", dying_step)
        with pytest.raises(Killed):
            distill.main(args)
    folder = out / "stage-2-2to1"
    assert not list(folder.glob("network-snapshot-000002.pkl")) and list(folder.glob("training-state-rolling-*.pt"))
    words = shlex.split(json.loads((folder / "stage.json").read_text())["train_command"])
    assert words[0].endswith("python") and Path(words[1]).resolve() == ROOT / "train.py" and "--nosubdir" in words
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, loader: steps.append(self.step_count) or real_step(self, loader))
        assert train.main(words[2:]) == 0
        assert steps == list(range(15, 21)), "it went on where the ladder was"
    assert same_network(*(path / "stage-2-2to1/network-snapshot-000002.pkl" for path in (out, climbed)))
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("trained again"))
    assert distill.main(args) == 0
    assert timeless(out) == timeless(climbed)


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--batch-gpu=12 --warmup=0.001 --dropout=0.1 --xflip=1 --cond=1 --precision=bf16 --bench=0",
        "--lr-decay=cosine --ema=0.1 --deterministic --targets=2 --workers=2 --weighting=snr+1",
        "--self-teacher --intervals=uniform --clip=2 --ema-std=0.1 --weighting=edm",
        "--teacher-solver=euler --snap=3 --dump=4 --cache=0 --seed=123 --trust-network-code",
    ],
)
def test_a_train_command_says_all_options_of_its_stage(place, tmp_path, seen, more):
    """Read back by train.py's own parser, it gives the very options that the stage runs with."""
    assert distill.main([*options(place, *STAGES, *more.split()), f"--outdir={tmp_path / 'a b'}"]) == 1
    words = shlex.split(ladder_module.train_command(seen[0], "cpu"))
    with train.command.make_context("train.py", words[2:]) as context:
        values = dict(context.params)
    assert values.pop("device") == "cpu" and values.pop("dry_run") is False
    assert Options(**values) == seen[0]


def test_the_costs_in_advance(place, tmp_path, capsys):
    """FLOPs of each stage and of its measurement, by what stages and samplers do; nothing is written."""
    args = [*options(place, "--num_steps=8", "--duration=0.001,0.002,0.003", "--ratio=2"), f"--outdir={tmp_path / 'x'}"]
    assert distill.main([*args, "--dry-run"]) == 0
    words = capsys.readouterr().out
    flops = float(re.search(r"call:  ([\d.e-]+) GFLOP", words)[1]) * 1e9
    rows = [line.split() for line in words.splitlines() if re.match(r"\d+ -> \d+ ", line)]
    for row, kimg, calls, steps in zip(rows, (1, 2, 3), (7, 5, 5), (4, 2, 1), strict=True):
        assert row[3:5] == [str(kimg), str(calls)] and row[6:9] == ["3", "x", str(NUM)] and row[10:] == ["-"]
        assert float(row[5]) == pytest.approx(kimg * 1000 * calls * flops, rel=1e-2)
        assert float(row[9]) == pytest.approx(NUM * 3 * steps * flops, rel=1e-2)
    curve = (4 + 2 + 1) + 3  # Euler, and two steps of Heun
    total = ((7 + 2 * 5 + 3 * 5) * 1000 + NUM * 3 * (15 + 4 + 2 + 1) + NUM * curve) * flops
    assert float(re.search(r"All together: +([\d.e+]+)", words)[1]) == pytest.approx(total, rel=1e-2)
    assert distill.main([*args, "--dry-run", "--self-teacher"]) == 0
    rows = re.findall(r"^\d+ -> \d+ +\d+ +(\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["6", "5", "5"], "3, one step of the teacher (2 calls by Heun, 1 by Euler), 1 of the average"
    assert not (tmp_path / "x").exists()


def test_the_costs_of_what_is_left(again, out, capsys):
    """A dry run names what is trained already, and leaves everything as it is."""
    args = [*again, "--dry-run"]
    for gone, left in (
        ("nothing", ["1 kimg", "2 kimg"]),
        ("stage-2-2to1/network-*", ["1 kimg", "2 kimg"]),  # by its state
        ("stage-1-4to2/*0*.p*", ["0 kimg", "-"]),
    ):
        for path in out.glob(gone):
            path.unlink()
        before = sorted(path.name for path in out.rglob("*"))
        capsys.readouterr()
        assert distill.main(args) == 0
        rows = [re.split(r" {3,}", line) for line in capsys.readouterr().out.splitlines()]
        assert [row[-1] for row in rows if re.match(r"\d -> \d", row[0])] == left
        assert sorted(path.name for path in out.rglob("*")) == before


def test_a_finished_ladder_is_only_read(place, climbed, capsys, monkeypatch):
    forbid_work(monkeypatch)
    before = {path: path.read_bytes() for path in climbed.rglob("*") if path.is_file()}
    assert distill.main([*options(place, *STAGES), f"--outdir={climbed}"]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert {path: path.read_bytes() for path in climbed.rglob("*") if path.is_file()} == before


def test_a_ladder_may_be_moved_and_grow_downwards(again, place, climbed, tmp_path, out, monkeypatch):
    """A shorter ladder, moved elsewhere and asked for the rest, trains the rest alone and ends like the whole."""
    shutil.rmtree(out / "stage-2-2to1")
    (out / "rungs/steps-1.npz").unlink()
    with monkeypatch.context() as patch:
        forbid_work(patch)
        short = ["--num_steps=4", "--until=2", "--duration=0.001", "--lr=5e-4"]
        assert distill.main([*options(place, *short), f"--outdir={out}"]) == 0
    assert len(rungs(out)) == 2
    trained = watch_training(monkeypatch)
    assert distill.main(again) == 0
    assert trained == ["stage-2-2to1"]
    assert timeless(out) == timeless(climbed)
    assert all(Path(rung["network"]).is_relative_to(tmp_path) for rung in rungs(out)[1:])


def test_a_seed_set_that_is_none_is_measured_again(again, climbed, out, monkeypatch):
    path = out / "rungs" / "steps-2.npz"
    with np.load(path) as content:
        record, images = json.loads(str(content["record"])), content["images"]

    def write(change, images=images):
        np.savez(path, record=np.str_(json.dumps({**record, **change})), images=images)

    for name, values in {
        "fd": ("1", [], -1.0, math.inf, {"a": 1}),
        "seconds": ("x",),
        "timed": (0.5,),
        "key": ([1], {}),
        "problem": ([1],),
        "more": (1,),
    }.items():
        for value in values:
            write({name: value})
            assert measuring.load_set(path) is None
    for wrong in (np.zeros((16, 1, 8, 8), np.float64), np.array(["x"])):
        write({}, wrong)
        assert measuring.load_set(path) is None
    seen = watch_measuring(monkeypatch)
    for change, others in (({"endpoint_rmse": None}, images), ({}, np.zeros((2, 2), np.float32))):
        write(change, others)
        assert distill.main(again) == 0 and timeless(out) == timeless(climbed)
    assert seen == [(2, 0, False)] * 2


@pytest.mark.parametrize("compressed", [True, False])
def test_a_seed_set_takes_no_more_memory_than_its_file(tmp_path, compressed):
    path = tmp_path / "set.npz"
    save = np.savez_compressed if compressed else np.savez
    save(path, record=np.str_("{}"), images=np.zeros([1 << 24], np.uint8))
    tracemalloc.start()
    assert measuring.load_set(path) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 20 if compressed else 1 << 26)


def test_a_stage_names_no_file_elsewhere(again, climbed, tmp_path, out):
    """A file that is not what the stage left is renamed: never one that lies outside."""
    precious = tmp_path / "precious.pkl"
    precious.write_bytes(b"x")
    path = out / "stage-1-4to2" / "stage.json"
    record = json.loads(path.read_text())
    for student in ("../../precious.pkl", [], {"a": 1}, 5, ".", str(precious)):
        path.write_text(json.dumps({**record, "student": student}))
        assert ladder_module.read_record(path) is None
    assert distill.main(again) == 0
    assert precious.read_bytes() == b"x" and timeless(out) == timeless(climbed)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--lr=5e-4,2e-4", "stage-2-2to1 was made with other options: --lr (was 0.0001, now 0.0002)"),
        ("--duration=0.001", "stage-2-2to1 was made with other options: --duration (was 0.002, now 0.001)"),
        ("--num_steps=8 --duration=0.001 --lr=5e-4", "stage-1-4to2 was made with other options: --num_steps (was 4"),
        ("--ratio=4 --duration=0.001 --lr=5e-4", "stage-1-4to2 was made with other options: --ratio (was 2, now 4)"),
        ("--seed=6", "--seed (was 5, now 6)"),
        ("--ema=0.1 --xflip=1", "--ema (was 0.5, now 0.1), --xflip (was False, now True)"),
        ("--teacher-solver=euler", "--teacher-solver (was heun, now euler)"),
        ("--teacher-precision=bf16", "--teacher-precision (was fp32, now bf16)"),
        ("--data=other.zip", "--data (was"),
        ("--transfer=other.pkl", "--transfer (was"),
    ],
)
def test_an_option_that_a_finished_stage_contradicts_is_named(
    place, climbed, tmp_path, capsys, monkeypatch, changed, named
):
    forbid_work(monkeypatch)
    monkeypatch.chdir(tmp_path)
    make_dataset(Path("other.zip"), count=150, seed=1)
    save_network("other.pkl", tiny_network(label_dim=4))
    before = (climbed / "ladder.json").read_bytes()
    refused(capsys, 1, named, *options(place, *STAGES), f"--outdir={climbed}", *changed.split())
    assert (climbed / "ladder.json").read_bytes() == before


def test_a_stage_whose_record_lacks_an_option_is_known_by_its_own_file(again, out, capsys, monkeypatch):
    """As an earlier version left them: without the teacher's precision."""
    forbid_work(monkeypatch)
    for path in out.glob("stage-*/stage.json"):
        record = json.loads(path.read_text())
        for name in ("--teacher-precision", "--ls", "--precond"):
            del record["options"][name]
        path.write_text(json.dumps(record))
    assert distill.main(again) == 0
    refused(capsys, 1, "--teacher-precision (was fp32, now bf16)", *again, "--teacher-precision=bf16")
    file = out / "stage-1-4to2" / "training_options.json"
    content = json.loads(file.read_text())
    content["command_line"]["teacher_precision"] = "bf16"
    file.write_text(json.dumps(content))
    refused(capsys, 1, "--teacher-precision (was bf16, now fp32)", *again)


@pytest.mark.parametrize("how", ["another network", "cut off"])
def test_a_student_that_was_replaced_or_damaged_is_made_again(again, climbed, out, capsys, how):
    first = out / "stage-1-4to2/network-snapshot-000001.pkl"
    found = load_network(first)
    if how == "cut off":
        first.write_bytes(first.read_bytes()[:5000])
    else:
        save_network(first, found.net, sampling=found.sampling)
    (reference,) = (out / "rungs").glob("reference-*.npz")
    reference.write_bytes(reference.read_bytes()[:1000])
    assert distill.main(again) == 0
    assert f"{first.name}.damaged; this stage is trained again" in capsys.readouterr().out
    assert load_network(first).sha256 == found.sha256 and first.with_name(f"{first.name}.damaged").is_file()
    assert timeless(out) == timeless(climbed)


def test_two_at_once_in_one_folder_are_noticed(again, out, capsys, monkeypatch):
    forbid_work(monkeypatch)
    monkeypatch.setattr(ladder_module, "locked", partial(atomic.locked, patience=0.1))
    with atomic.locked(out):
        refused(capsys, 1, "another process is at work there", *again)


def test_two_processes_killed_and_started_again_find_the_same(place, climbed, out):
    """Sums round differently: end-point errors come out off by 2e-8 of themselves."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = [*options(place, *STAGES), "--device=cpu", f"--outdir={out}", "--save-every=0"]
    command, env = [*launcher, str(ROOT / "distill.py"), *args], {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, end = out / "stage-2-2to1", time.monotonic() + 200
    while len(list(folder.glob("training-state-rolling-*.pt"))) < 2:
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]  # with sessions of their own
    for process in family:
        process.kill()
    psutil.wait_procs(family)
    assert len(rungs(out)) == 2, "killed in the second stage"
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 1 and "Resuming from" in again.stdout
    assert again.stdout.count("endpoint_rmse") == 1, "one process speaks"
    for ours, theirs in zip(timeless(out), timeless(climbed), strict=True):
        for name in ("fd", "endpoint_rmse", "fd_sets"):
            assert ours.pop(name) == pytest.approx(theirs.pop(name), rel=1e-6)
        assert ours.pop("fd_std") == pytest.approx(theirs.pop("fd_std"), rel=1e-4)
        assert ours == theirs


# -- parts -------------------------------------------------------------------------------------------------------------


def batches(sizes, value=0.0):
    seeds = iter(range(sum(sizes)))
    for size in sizes:
        own = [next(seeds) for _ in range(size)]
        yield Batch(own, torch.tensor(own).float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2) + value, None)


def test_what_a_measurement_notes(monkeypatch):
    """The first images; that some are no numbers, which become zeros; the time of sampling without the first batch."""
    watch = Watch(5)
    assert sum(len(batch.seeds) for batch in watch.pass_on(batches([4, 4, 4]))) == 12
    _, _, first, problem = watch.totals()
    assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and len(watch.kept) == 5 and problem is None
    for bad in (math.nan, math.inf):
        watch = Watch(0)
        passed = list(watch.pass_on(batches([4, 4], bad)))
        assert len(passed) == 2 and all(batch.images.eq(0).all() for batch in passed)
        assert watch.totals()[3] == "some images of seeds 0 to 3 hold NaN or infinities"

    clock = iter([0, 100, 200, 203, 300, 305, 400, 0, 7, 8])  # before and after each batch, and before the end
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    for sizes, expected in (([4, 4, 2], (3 + 5, 4 + 2)), ([14], (7, 14))):  # a single batch has to do
        watch = Watch(0)
        assert len(list(watch.pass_on(batches(sizes)))) == len(sizes) and watch.totals()[:2] == expected


def test_images_that_are_no_numbers_end_the_ladder(place, out, capsys, monkeypatch):
    spoil(monkeypatch, lambda steps: math.nan)
    message = "plain.pkl: some images of seeds 0 to 16 hold NaN or infinities; if it was just trained, a lower --lr"
    args = options(place, "--num_steps=4", "--detector=none", teacher="plain.pkl", detector=None)
    refused(capsys, 1, message, *args, f"--outdir={out}")


def test_progress_is_said_now_and_then(monkeypatch):
    now = iter([0, 4, 11, 15, 22])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    lines = []
    assert len(list(show_progress(batches([10] * 4), lambda batch: len(batch.seeds), 40, lines.append))) == 4
    assert lines == ["  20 of 40 images, 11s to go"]


def drawable(count, distances=True, spread=0.05):
    """A ladder of `count` rungs with numbers like real ones, the teacher's own curve and the data's floor."""
    table = [Rung(64, 127, 1.06 if distances else None, 0.0, 1.0, 0, "teacher.pkl", spread, [1.06] * 3, 50000, "x")]
    curve = []
    for i in range(1, count):
        n, fd, far = 64 >> i, *((1.0 + 0.15 * i, 2.0 * 3**i) if distances else (None, None))
        table.append(Rung(n, n, fd, 0.06 + 0.01 * i, 1.0, 1, "s.pkl", spread, [1.0] * 3))
        curve += [CurvePoint("euler", n, n, far, 0.05 * 1.6**i)]
        curve += [CurvePoint("heun", (n + 1) // 2, 2 * ((n + 1) // 2) - 1, far, 0.05 * 1.6**i)]
    return table, curve, Floor(900, [0.28, 0.3, 0.31])


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("distances", [True, False])
def test_any_ladder_can_be_drawn(count, distances):
    """With and without distances, curve, floor and error bars; no axis title is cut off, no legend covers data."""
    table, curve, floor = drawable(count, distances)
    plain = [Rung(r.steps, r.nfe, r.fd, r.endpoint_rmse, 1.0, 1, "s.pkl") for r in table]
    for args in ((table, curve, floor), (plain,)):
        figure = ladder_figure(*args)
        figure.draw_without_rendering()
        assert len(figure.axes) == (2 if distances and count > 1 else 1)
        below = figure.legends[0].get_window_extent().y1
        for axis in figure.axes:
            box, inner = axis.get_tightbbox(), figure.bbox
            assert below <= box.y0 + 1 and box.x0 >= 0 and box.x1 <= inner.x1 + 1 and box.y1 <= inner.y1 + 1
            labels = [label.get_window_extent() for label in axis.get_xticklabels()]
            assert all(a.x1 < b.x0 for a, b in pairwise(labels)), "numbers that run into each other"


def test_what_the_figure_shows():
    table, curve, floor = drawable(7)
    figure = ladder_figure(table, curve, floor)
    distances, errors = figure.axes
    assert distances.get_yscale() == errors.get_yscale() == "log", "the teacher's own few steps are far off"
    assert [label.get_text() for label in distances.get_xticklabels()] == ["1", "2", "4", "8", "16", "32", "127"]
    titles = [distances.get_xlabel(), distances.get_ylabel(), errors.get_ylabel()]
    assert titles[:2] == ["network calls per image (NFE)", "Fréchet distance (own detector)"]
    assert titles[2] == "end-point RMSE to the teacher (in [-1, 1])"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "students (64 → 32 → 16 → 8 → 4 → 2 → 1 steps), mean ± std of 3 x 50000 images",
        "teacher, 64 Heun steps (NFE 127)",
        "the data itself (900 images drawn from it, ± std)",
        "teacher itself with fewer Heun steps",
        "teacher itself with fewer Euler steps",
    ]
    flat = [line for line in distances.get_lines() if len(set(line.get_ydata())) == 1]
    levels = {line.get_linestyle(): line.get_ydata()[0] for line in flat}
    assert levels["--"] == 1.06 and levels[":"] == pytest.approx(floor.mean)
    (band,) = distances.patches
    assert band.get_height() == pytest.approx(2 * floor.std) and floor.std > 0
    bars = [high - low for bars in distances.collections for (_, low), (_, high) in bars.get_segments()]
    assert bars == pytest.approx([0.1] * 7), "one deviation up and down"
    lines = [line for line in errors.get_lines() if len(line.get_xdata()) > 1]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 3
    alike, _ = ladder_figure(table).axes
    assert alike.get_yscale() == "linear" and alike.get_ylim()[0] == 0


def test_the_table_has_a_line_for_everything():
    text = format_table(*drawable(2))
    assert "1.060 ± 0.050" in text and "1.150 ± 0.050" in text
    assert text.count("the teacher itself, ") == 2 and "the data itself: 900 images drawn from it, 3 times" in text
    assert len(text.splitlines()) == 1 + 2 + 2 + 1
    alone = Rung(4, 7, 1.06, 0.0, 1.0, 0, "t.pkl", None, [1.06])
    assert "±" not in format_table([alone]) and len(format_table([alone]).splitlines()) == 2
