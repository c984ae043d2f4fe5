"""What images are conditioned on: lists of classes, label vectors, labels of a data set; and what is recorded of it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distill
import example
import fid
import generate
import train
from dnnlib.cli import UsageError, UserError
from formats.image_files import ImageFolder
from formats.network_files import NetworkFile, load_network, save_network
from helpers import load_recipe, make_dataset, small_network
from metrics.classifier import train_detector
from test_generate import expected, pixels, read
from training.dataset import ImageFolderDataset
from training.grids import Sampling, network_grid
from training.labels import Labels, choose_labels, read_labels
from training.samplers import edm_sampler
from training.sampling import sample

VECTORS = [[i % 3 / 2, i % 5 / 4] for i in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks of four classes and of label vectors, data sets of both, and a .npy file."""
    folder = tmp_path_factory.mktemp("place")
    for name, dim, kwargs in (("classes", 4, None), ("vectors", 2, {"label_kind": "vectors"})):
        net = small_network(label_dim=dim)
        load_recipe(net, 5)
        save_network(folder / f"{name}.pkl", net, dataset_kwargs=kwargs)
        save_network(folder / f"{name}-student.pkl", net, sampling=Sampling(network_grid(net, 4).every(2)))
    make_dataset(folder / "classes.zip", count=40)
    with zipfile.ZipFile(folder / "classes.zip") as old, zipfile.ZipFile(folder / "vectors.zip", "w") as new:
        names = [name for name in old.namelist() if name.endswith(".png")]
        for name in names:
            new.writestr(name, old.read(name))
        pairs = [list(pair) for pair in zip(names, VECTORS, strict=True)]
        new.writestr("dataset.json", json.dumps({"labels": pairs}))
    np.save(folder / "vectors.npy", np.array(VECTORS))
    np.save(folder / "classes.npy", np.array([3, 3, 1]))
    np.save(folder / "ten.npy", np.array([9]))
    make_dataset(folder / "two.zip", count=40, classes=2)
    return folder


def make(place: Path, network: str, out: Path, *options: str) -> int:
    words = [f"--network={place / network}.pkl", f"--outdir={out}", "--steps=2", "--device=cpu", *options]
    return generate.main(words)


def labels_of(out: Path) -> dict[str, Any]:
    if out.is_file():
        with zipfile.ZipFile(out) as archive:
            return dict(json.loads(archive.read("dataset.json"))["labels"])
    return dict(json.loads((out / "dataset.json").read_text())["labels"])


@pytest.mark.parametrize("to", ["out", "out.zip"])
@pytest.mark.parametrize("classes", [None, [2], [1, 3]])
def test_classes_are_recorded(place: Path, tmp_path: Path, to: str, classes: list[int] | None) -> None:
    """In EDM's format: the images are a data set. Without a choice and with one class they are EDM's images."""
    options = [] if classes is None else [f"--class={','.join(map(str, classes))}"]
    assert make(place, "classes", tmp_path / to, "--seeds=0-9", "--subdirs", "--S_churn=20", *options) == 0
    labels = labels_of(tmp_path / to)
    assert list(labels) == [f"000000/{seed:06d}.png" for seed in range(10)]
    assert {*labels.values()} <= {*(classes or range(4))} and (len({*labels.values()}) > 1) == (classes != [2])
    made = ImageFolderDataset(tmp_path / to, use_labels=True)
    assert made.label_values.tolist() == list(labels.values())
    net = load_network(place / "classes.pkl").net
    one_hot = torch.eye(4)[list(labels.values())]
    given = {} if classes is None else {"class_idx": 2}
    if classes != [1, 3]:
        wanted = expected(edm_sampler, net, [*range(10)], num_steps=2, S_churn=20, **given)
        assert np.array_equal(made.images(range(10))[:, 0], wanted[:, :, :, 0])
        return
    random_labels = lambda net, latents, _, **kwargs: edm_sampler(net, latents, one_hot, **kwargs)  # noqa: E731
    wanted = expected(random_labels, net, [*range(10)], num_steps=2, S_churn=20)
    assert np.array_equal(made.images(range(10))[:, 0], wanted[:, :, :, 0])


def test_labels_of_images_from_before(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run that continues has not made itself it draws again: the labels of an undisturbed run."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert make(place, "classes", whole, "--seeds=0-7", "--batch=2") == 0
    with monkeypatch.context() as patch:  # killed after the last image
        patch.setattr(ImageFolder, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert make(place, "classes", out, "--seeds=0-7", "--batch=2") == 130
    assert not (out / "dataset.json").exists() and len(read(out)) == 8
    (out / "000003.png").unlink()
    for options in (["--skip-existing"], ["--skip-existing"]):
        assert make(place, "classes", out, "--seeds=0-7", "--batch=2", *options) == 0
        assert labels_of(out) == labels_of(whole)
    (out / "dataset.json").unlink()
    assert make(place, "classes", out, "--seeds=0-7", "--batch=2", "--skip-existing") == 0
    assert labels_of(out) == labels_of(whole)
    assert make(place, "classes", out, "--seeds=2-3") == 0  # again, beside others that stay
    assert labels_of(out) == labels_of(whole)


def test_vectors(place: Path, tmp_path: Path) -> None:
    net = load_network(place / "vectors.pkl").net
    assert make(place, "vectors", tmp_path / "one", "--seeds=0-3", "--class=0.2,0.8") == 0
    imposed = lambda net, latents, _, **kwargs: edm_sampler(  # noqa: E731
        net, latents, torch.tensor([[0.2, 0.8]]).expand(4, 2), **kwargs
    )
    wanted = expected(imposed, net, [0, 1, 2, 3], num_steps=2)
    assert all(np.array_equal(pixels(read(tmp_path / "one")[f"{i:06d}.png"]), wanted[i, :, :, 0]) for i in range(4))
    assert np.allclose([*labels_of(tmp_path / "one").values()], [0.2, 0.8])
    for source in ("vectors.zip", "vectors.npy"):
        assert make(place, "vectors", tmp_path / source[-3:], "--seeds=0-9", f"--labels={place / source}") == 0
    drawn = [*labels_of(tmp_path / "zip").values()]
    assert all(label in VECTORS for label in drawn) and len({*map(tuple, drawn)}) > 2
    assert read(tmp_path / "zip") == read(tmp_path / "npy")
    assert labels_of(tmp_path / "npy") == labels_of(tmp_path / "zip")
    network = load_network(place / "vectors.pkl")
    again = sample(network, [*range(10)], steps=2, labels=place / "vectors.npy")
    assert np.array_equal(again[7, :, :, 0], pixels(read(tmp_path / "npy")["000007.png"]))
    words = [f"--network={place}/vectors.pkl", f"--labels={place}/vectors.zip", f"--out={tmp_path}/a.png"]
    assert example.main([*words, "--seeds=0-3"]) == 0
    assert "label vectors of 2 numbers" in network.describe()


def test_vectors_for_a_teacher_whose_file_records_none(place: Path, tmp_path: Path) -> None:
    """EDM's files don't, whatever their labels were."""
    save_network(tmp_path / "edm.pkl", small_network(label_dim=2))
    files = [f"--data={place / 'vectors.zip'}", f"--transfer={tmp_path / 'edm.pkl'}", f"--outdir={tmp_path / 'run'}"]
    assert train.main([*files, "--precond=edm_distillation", "--num_steps=2", "--batch=8", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("vectors", [], "was trained with label vectors of 2 numbers, no classes: give some to draw from (--labels="),
        ("vectors", ["--class=1"], "or one vector (--class=0.5,0.5)"),
        ("vectors", ["--class=0.2,nan"], "or one vector"),
        ("vectors", ["--labels=classes.npy"], "--labels holds classes; this network was trained with 2 numbers"),
        ("vectors", ["--labels=two.zip"], "--labels holds classes; this network was trained with 2 numbers"),
        ("classes", ["--labels=ten.npy"], "--labels holds class 9, this network's classes are 0 to 3"),
        ("vectors", ["--labels=vectors.npy", "--class=0.2,0.8"], "exclude each other"),
        ("classes", ["--class=0.2,0.8"], "class 0.2: this network's classes are 0 to 3"),
        ("classes", ["--class=1,4"], "class 4: this network's classes are 0 to 3"),
        ("classes", ["--labels=vectors.zip"], "holds vectors of 2 numbers, this network takes 4"),
        ("classes", ["--labels=classes.pkl"], "neither a folder nor a whole zip"),
        ("classes", ["--class=one"], "neither a class (3), nor classes (1,2,5-10), nor a label vector (0.2,0.8)"),
    ],
)
def test_refused(
    place: Path, tmp_path: Path, network: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [option.replace("--labels=", f"--labels={place}/") for option in options]
    assert make(place, network, tmp_path / "out", *given) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_files_of_labels(place: Path, tmp_path: Path) -> None:
    assert read_labels(place / "classes.npy").values.tolist() == [3, 3, 1]
    assert read_labels(place / "classes.zip").values.tolist() == [i % 4 for i in range(40)]
    for bad in ([0.5], [-1], np.array([2**64 - 1], np.uint64), [[np.nan]], np.zeros([0]), np.zeros([1, 1, 1]), ["a"]):
        np.save(tmp_path / "bad.npy", np.array(bad))
        with pytest.raises(UserError, match="--labels"):
            read_labels(tmp_path / "bad.npy")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="no array of numbers"):
        read_labels(tmp_path / "bad.npy")
    make_dataset(tmp_path / "plain.zip", classes=None)
    with pytest.raises(UserError, match="has no labels to draw from"):
        read_labels(tmp_path / "plain.zip")
    plain = NetworkFile(small_network(), None, "", "a.pkl", None, {})
    assert choose_labels(plain) is None
    with pytest.raises(UsageError, match="no labels; leave it out"):
        choose_labels(plain, labels=place / "classes.npy")


def test_from_a_data_set_of_vectors_to_a_ladder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every label that a network is conditioned on, from training to fid.py, is one of the data."""
    drawn: list[list[float]] = []
    forward = torch.nn.Module.__call__

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[2] if type(self).__name__ == "EDMPrecond" and len(args) > 2 else None
        if labels is not None and labels.device.type == "cpu":
            drawn.extend(labels.tolist())
        return forward(self, *args, **kwargs)

    train_detector(place / "classes.zip", tmp_path / "detector.pt", kimg=0.2)
    monkeypatch.setattr(torch.nn.Module, "__call__", seen)
    data, detector = f"--data={place / 'vectors.zip'}", f"--detector={tmp_path / 'detector.pt'}"
    small = ["--batch=12", "--tick=1", "--seed=0", "--device=cpu"]
    network = ["--cbase=16", "--cres=1,2", "--blocks=1", "--warmup=0"]
    words = [data, "--cond=1", *network, f"--outdir={tmp_path / 'run'}", "--nosubdir"]
    assert train.main([*words, "--duration=0.00012", *small]) == 0
    teacher = max((tmp_path / "run").glob("*.pkl"))
    proposed = [line for line in capsys.readouterr().out.splitlines() if "generate.py" in line or "fid.py gen" in line]
    assert len(proposed) == 2 and all(f"--labels={place / 'vectors.zip'}" in line for line in proposed)
    ladder = [data, f"--transfer={teacher}", f"--outdir={tmp_path / 'ladder'}", "--num_steps=2", "--duration=0.00012"]
    assert distill.main([*ladder, detector, "--eval-num=12", "--eval-sets=1", *small]) == 0
    student = max((tmp_path / "ladder").glob("stage-*/*.pkl"))
    other = [f"--outdir={tmp_path / 'other'}", f"--transfer={teacher}", "--precond=edm_distillation", "--num_steps=2"]
    capsys.readouterr()
    assert train.main([*other, f"--data={place / 'two.zip'}", "--dry-run", *small]) == 1
    assert "was trained with label vectors, and " in capsys.readouterr().err
    for path in (teacher, student):
        assert load_network(path).has_label_vectors
    measured = [f"--network={student}", "--num=12", detector, f"--labels={place / 'vectors.zip'}", "--device=cpu"]
    (reference,) = (tmp_path / "ladder" / "rungs").glob("reference-*.npz")
    capsys.readouterr()
    assert fid.main(["gen", *measured, f"--ref={reference}"]) == 0
    table = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    assert float(capsys.readouterr().out) == pytest.approx(table[-1]["fd"], rel=1e-3)
    assert len(drawn) > 100 and all(label in VECTORS for label in drawn)


def test_labels_are_drawn_by_seed_alone() -> None:
    from training.samplers import StackedRandomGenerator

    labels = Labels(torch.tensor([5, 7, 9]))
    whole = labels.draw(StackedRandomGenerator("cpu", range(6)), 6, 10, "cpu")
    parts = [labels.draw(StackedRandomGenerator("cpu", [seed]), 1, 10, "cpu") for seed in range(6)]
    assert torch.equal(whole, torch.cat(parts)) and {*labels.plain(whole)} <= {5, 7, 9}
