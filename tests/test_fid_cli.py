"""fid.py as a user meets it: what it prints, what it refuses, and that several processes find the same."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from formats.network_files import load_network, save_network
from helpers import make_dataset, small_network
from metrics import detectors
from metrics.classifier import train_detector
from metrics.statistics import Stats
from training.dataset import ImageFolderDataset
from training.grids import NoiseGrid, Sampling
from training.pictures import to_uint8
from training.sampling import iterate_images

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a data set, another one, a hurriedly trained detector and its reference."""
    folder = tmp_path_factory.mktemp("fid")
    make_dataset(folder / "data.zip", count=300, seed=0)
    make_dataset(folder / "other.zip", count=150, seed=1)
    make_dataset(folder / "plain.zip", count=20, classes=None)
    train_detector(folder / "data.zip", folder / "detector.pt", kimg=1)
    assert (
        fid.main(["ref", f"--data={folder}/data.zip", f"--dest={folder}/ref", f"--detector={folder}/detector.pt"]) == 0
    )
    return folder


def run(capsys, *args: str) -> tuple[int, str, str]:
    status = fid.main(args)
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, status: int, message: str, *args: str) -> None:
    """One line on standard error that holds `message`, nothing on standard output, and the exit status."""
    got, out, err = run(capsys, *args)
    assert (got, out) == (status, "")
    assert err.count("\n") == 1 and err.startswith("fid.py: error: ") and message in err


def test_reference_and_distance(place, capsys):
    ref = Stats.load(place / "ref.npz")  # the ending was left to the program, as numpy does it
    assert ref.num == 300 and ref.mu.shape == (128,) and ref.detector_id.startswith("classifier:")
    options = (f"--ref={place}/ref.npz", f"--detector={place}/detector.pt")
    status, out, err = run(capsys, "calc", f"--images={place}/data.zip", "--num=300", *options)
    assert status == 0 and 0 <= float(out) < 1e-9 and err == ""
    _, part, _ = run(capsys, "calc", f"--images={place}/data.zip", "--num=150", *options)
    _, same_part, _ = run(capsys, "calc", f"--images={place}/data.zip", "--num=150", "--batch=7", *options)
    _, other_part, _ = run(capsys, "calc", f"--images={place}/data.zip", "--num=150", "--seed=1", *options)
    _, other, _ = run(capsys, "calc", f"--images={place}/other.zip", "--num=150", *options)
    assert float(out) < float(part) < float(other)
    assert float(same_part) == pytest.approx(float(part), rel=1e-4) and float(other_part) != float(part)
    assert part == f"{float(part):g}\n"


def test_wrong_options(capsys):
    refused(capsys, 2, "Missing command")
    refused(capsys, 2, "Missing option '--ref'", "calc", "--images=x")
    refused(capsys, 2, "--kimg", "detector", "--data=x", "--dest=y", "--kimg=0")
    refused(capsys, 2, "give one of them", "gen", "--network=x", "--ref=y", "--num=5", "--seeds=1,2")
    refused(capsys, 2, "two different seeds", "gen", "--network=x", "--ref=y", "--seeds=3,3")


def test_two_detectors_are_not_mixed(place, capsys, tmp_path):
    images, ref = f"--images={place}/data.zip", Stats.load(place / "ref.npz")
    np.savez(tmp_path / "edm.npz", mu=ref.mu, sigma=ref.sigma)
    args = ("calc", images, f"--ref={tmp_path}/edm.npz", f"--detector={place}/detector.pt")
    refused(capsys, 1, f"{ref.detector_id} for the images, inception-2015-12-05 for the reference", *args)
    refused(
        capsys, 1, f"inception-2015-12-05 for the images, {ref.detector_id}", "calc", images, f"--ref={place}/ref.npz"
    )


def test_samples_in_an_npz(place, capsys, tmp_path):
    """guided-diffusion's arr_0 gives what the same images in a zip give, the same ones being chosen."""
    dataset = ImageFolderDataset(place / "other.zip")
    pixels = dataset.images(range(len(dataset))).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "samples.npz", pixels, np.arange(len(pixels)))
    options = (f"--ref={place}/ref.npz", f"--detector={place}/detector.pt", "--seed=3")
    for num in ("--num=150", "--num=77"):
        expected = run(capsys, "calc", f"--images={place}/other.zip", num, *options)
        assert run(capsys, "calc", f"--images={tmp_path}/samples.npz", num, *options) == expected and expected[0] == 0
    refused(capsys, 1, "found 150 images", "calc", f"--images={tmp_path}/samples.npz", *options)
    made = run(capsys, "ref", f"--data={tmp_path}/samples.npz", f"--dest={tmp_path}/made.npz", options[1])
    assert made[0] == 0 and Stats.load(tmp_path / "made.npz").num == 150
    refused(capsys, 1, "fid.py ref makes", "calc", f"--images={place}/other.zip", f"--ref={tmp_path}/samples.npz")
    bad = tmp_path / "bad.npz"
    for save, content in (
        (np.savez_compressed, pixels),
        (np.savez, pixels.astype(np.float32)),
        (np.savez, pixels.transpose(0, 3, 1, 2)),
        (np.savez, pixels[:0]),
        (np.savez, np.asfortranarray(pixels)),
        (np.savez, np.array([{}])),
    ):
        save(bad, content)
        refused(capsys, 1, "bad.npz: not an npz of samples (", "calc", f"--images={bad}", *options)
    whole = (tmp_path / "samples.npz").read_bytes()
    for damaged in (b"", whole[:5000], whole.replace(b"arr_0", b"arr_7"), whole.replace(b"(150,", b"(999,")):
        bad.write_bytes(damaged)
        refused(capsys, 1, "bad.npz: not an npz of samples (", "calc", f"--images={bad}", *options)


def test_references_of_other_programs(place, capsys, tmp_path):
    """npz files with more in them, edm2's pickles, and what is none: with the way out."""
    ref = Stats.load(place / "ref.npz")
    table = {"mu": ref.mu, "sigma": ref.sigma}
    files = {f"p{protocol}.pkl": pickle.dumps({"fid": table, "fd_dinov2": table}, protocol) for protocol in (2, 3, 4)}
    files["flat.pkl"] = pickle.dumps({key: np.asfortranarray(value, ">f4") for key, value in table.items()})
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "guided.npz", arr_0=np.zeros([4, 8, 8, 3], np.uint8), **table, mu_s=ref.mu, sigma_s=ref.sigma)
    for name in (*files, "guided.npz"):
        found = Stats.load(tmp_path / name)
        assert (found.detector_id, found.num) == (detectors.INCEPTION, None)
        tolerance = 1e-6 if name == "flat.pkl" else 0
        np.testing.assert_allclose(found.mu, ref.mu, rtol=tolerance)
        np.testing.assert_allclose(found.sigma, ref.sigma, rtol=tolerance, atol=tolerance)
        assert ("fid are used, fd_dinov2 not" in capsys.readouterr().err) == name.startswith("p")
    args = ("calc", f"--images={place}/data.zip", f"--detector={place}/detector.pt")
    refused(capsys, 1, "is a folder, not statistics; fid.py ref makes", *args, f"--ref={tmp_path}")
    for content in (
        {"fid": {"mu": ref.mu, "sigma": {}}},
        {"fid": {"mu": ref.mu.astype(complex), "sigma": ref.sigma}},
        {"fd_dinov2": table},
        {"fid": 3},
        [1, 2],
        {"fid": {"mu": np.array([print]), "sigma": ref.sigma}},
        {"fid": print},
    ):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
        refused(capsys, 1, "bad.pkl: ", *args, f"--ref={tmp_path}/bad.pkl")
    (tmp_path / "bad.pkl").write_bytes(files["p4.pkl"][:-50])
    refused(capsys, 1, "bad.pkl: not a readable pickle of plain arrays, as edm2", *args, f"--ref={tmp_path}/bad.pkl")


def test_missing_inception(place, capsys, tmp_path, monkeypatch):
    """Without the weights and without a network: what to do instead."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(detectors, "INCEPTION_URL", "http://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth")
    make = ("ref", f"--data={place}/data.zip", f"--dest={tmp_path}/x.npz")
    status, out, err = run(capsys, *make)
    assert (status, out) == (1, "") and not (tmp_path / "x.npz").exists()
    line = err.splitlines()[-1]
    assert "can't be downloaded" in line and "--detector=PATH" in line and "fid.py detector" in line
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"cut off")
    weights = f"--detector={tmp_path}/pt_inception-2015-12-05-6726825d.pth"
    refused(capsys, 1, "instead of 6726825d", *make, weights)


def test_reference_from_a_url(place, capsys, server):
    """What came cut off, or is another file, is not kept: the next start fetches it anew."""
    names = ("ref.npz", "detector.pt")
    whole = {f"/{name}": (place / name).read_bytes() for name in names}
    left = {path: [b"what is this?", data[: len(data) // 2], data] for path, data in whole.items()}
    server.answer = lambda handler, count: handler.whole(body=left[handler.path].pop(0), Content_Length="")
    ref, detector = (f"{server.url}/{name}" for name in names)
    args = ("calc", f"--images={place}/other.zip", "--num=150", f"--detector={detector}")
    for message in (
        f"{ref}: does not begin as statistics",
        f"{ref}: not a readable npz file",
        f"{detector}: does not begin as a detector",
        f"{detector}: not a detector file",
    ):
        status, _, err = run(capsys, *args, f"--ref={ref}")
        assert status == 1 and message in err
    status, out, _ = run(capsys, *args, f"--ref={ref}")
    assert status == 0 and run(capsys, *args, f"--ref={place}/ref.npz")[1] == out and server.asked == 6


def test_detector_command(place, capsys):
    args = ("detector", f"--data={place}/data.zip", f"--dest={place}/again.pt", "--kimg=1")
    status, out, err = run(capsys, *args)
    assert status == 0 and out == "" and "30 held-out images" in err and "4 classes" in err
    assert (place / "again.pt").read_bytes() == (place / "detector.pt").read_bytes()
    before = (place / "again.pt").read_bytes()
    refused(capsys, 1, "no class labels", "detector", f"--data={place}/plain.zip", f"--dest={place}/again.pt")
    assert (place / "again.pt").read_bytes() == before  # what existed before is not damaged
    for other in ("plain.zip", "data.zip"):
        content = (place / other).read_bytes()
        refused(capsys, 1, "is not a detector file", "detector", f"--data={place}/data.zip", f"--dest={place / other}")
        assert (place / other).read_bytes() == content


# ----------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.fixture(scope="module")
def student(place) -> Path:
    net = small_network(label_dim=4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    sampling = Sampling(NoiseGrid((80.0, 2.0, 0.1, 0.0)), "euler", 2)
    save_network(place / "student.pkl", net, sampling=sampling)
    return place / "student.pkl"


def test_gen_measures_what_calc_would(place, student, capsys, tmp_path):
    options = (f"--ref={place}/ref.npz", f"--detector={place}/detector.pt")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for batch in iterate_images(load_network(student), range(40), max_batch=16, device="cpu"):
            for seed, image in zip(batch.seeds, to_uint8(batch.images), strict=True):
                buffer = io.BytesIO()
                Image.fromarray(image[0].numpy()).save(buffer, "PNG")
                archive.writestr(f"{seed:06d}.png", buffer.getvalue())
    _, expected, _ = run(capsys, "calc", f"--images={tmp_path}/images.zip", "--num=40", *options)
    status, out, err = run(capsys, "gen", f"--network={student}", "--num=40", "--batch=16", *options)
    assert status == 0 and float(out) == pytest.approx(float(expected), rel=1e-5)
    assert "the network's own noise grid" in err and "3 network calls" in err
    assert run(capsys, "gen", f"--network={student}", "--seeds=0-39", "--batch=16", "--steps=6", *options)[1] == out
    assert run(capsys, "gen", f"--network={student}", "--seeds=40-79", *options)[1] != out
    assert run(capsys, "gen", f"--network={student}", "--seeds=0-39", "--class=2", *options)[1] != out


def test_two_processes_find_the_same(place, student, capsys):
    """Under torchrun the number comes once, and is the one of a single process."""
    options = (f"--ref={place}/ref.npz", f"--detector={place}/detector.pt", "--batch=16")
    for args in (
        ("calc", f"--images={place}/other.zip", "--num-images=103", *options),
        ("gen", f"--network={student}", "--seeds=0-32", *options),
    ):
        _, alone, _ = run(capsys, *args)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        together = subprocess.run([*launch, "fid.py", *args], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert together.returncode == 0, together.stderr
        assert together.stdout.count("\n") == 1
        assert float(together.stdout) == pytest.approx(float(alone), rel=1e-5)
