"""generate.py: EDM's images, seed by seed; students that can't be sampled wrongly; runs that go on where they were."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from dnnlib.cli import UsageError, UserError, parse_int_list
from formats.image_files import ImageFolder, ImageZip, Manifest, Run, format_int_list, prepare
from formats.network_files import load_network, save_network
from helpers import GOLDEN, golden, load_recipe, small_network
from training.grids import NoiseGrid, Sampling, network_grid
from training.pictures import to_uint8
from training.samplers import StackedRandomGenerator, ablation_sampler, dpmpp2m_sampler, edm_sampler, grid_sampler
from training.sampling import count_batches, iterate_images, plan_sampling, sample_batch, split_seeds

REPOSITORY = Path(__file__).parent.parent


def make_net(seed: int = 5, **kwargs: Any) -> Any:
    net = small_network(**kwargs)
    load_recipe(net, seed)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Network files: undistilled ones, a student with its grid, and the same student without."""
    folder = tmp_path_factory.mktemp("networks")
    net = make_net()
    student = Sampling(network_grid(net, 8).every(2), "euler", 2)
    one_step = Sampling(NoiseGrid((80.0, 0.0)), "euler", 2)
    for name, network, sampling in (
        ("plain", net, None),
        ("other", make_net(seed=6), None),
        ("classes", make_net(channels=3, label_dim=4), None),
        ("student", net, student),
        ("one_step", net, one_step),
    ):
        save_network(folder / f"{name}.pkl", network, sampling=sampling)
    names = ("plain", "other", "classes", "student", "one_step")
    return SimpleNamespace(**{name: str(folder / f"{name}.pkl") for name in names}, net=net, sampling=student)


def run(network: str, outdir: Path | str, *options: str) -> int:
    return generate.main([f"--network={network}", f"--outdir={outdir}", "--device=cpu", *options])


def read(folder: Path) -> dict[str, bytes]:
    """Every image in a folder, as bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def expected(sampler: Any, net: Any, seeds: list[int], **kwargs: Any) -> np.ndarray:
    """EDM's generate.py, written out: uint8 [N, H, W, C]."""
    random = StackedRandomGenerator("cpu", seeds)
    latents = random.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution])
    labels = None
    if net.label_dim:
        labels = torch.eye(net.label_dim)[random.randint(net.label_dim, size=[len(seeds)])]
    class_idx = kwargs.pop("class_idx", None)
    if class_idx is not None:
        labels = torch.zeros(len(seeds), net.label_dim)
        labels[:, class_idx] = 1
    images = sampler(net, latents, labels, randn_like=random.randn_like, **kwargs)
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


# ----------------------------------------------------------------------------------------------------------------------
# EDM's numbers


def test_to_uint8_golden():
    data = golden("to_uint8.npz")
    assert np.array_equal(to_uint8(torch.from_numpy(data["x"])), data["u8"])
    assert np.array_equal(to_uint8(torch.from_numpy(data["train_norm"])), data["roundtrip"])


@pytest.mark.parametrize("case", json.loads((GOLDEN / "generate_cli.json").read_text())["batches"])
def test_batches_golden(case):
    count = count_batches(case["num_seeds"], case["max_batch"], case["world"])
    assert count == case["num_batches"]
    batches = split_seeds(range(case["num_seeds"]), count)
    assert [seed for batch in batches for seed in batch] == list(range(case["num_seeds"]))
    assert max(map(len, batches)) <= case["max_batch"]
    for rank, theirs in enumerate(case["per_rank"]):
        ours = batches[rank :: case["world"]]
        assert (ours if isinstance(theirs[0], list) else [len(batch) for batch in ours]) == theirs


def test_int_lists():
    for text, values in json.loads((GOLDEN / "generate_cli.json").read_text())["parse_int_list"].items():
        assert parse_int_list(text) == values
        assert parse_int_list(format_int_list(values)) == values if values else format_int_list(values) == ""
    assert format_int_list([1, 2, 5, 6, 7, 8]) == "1,2,5-8"
    assert parse_int_list(format_int_list([-3, -2, -1, 0, 1, 2, 9])) == [-3, -2, -1, 0, 1, 2, 9]


# ----------------------------------------------------------------------------------------------------------------------
# Images


def test_grey_images_are_edms(files, tmp_path, capsys):
    assert run(files.plain, tmp_path / "out", "--seeds=3,1,7-9", "--steps=4") == 0
    images = read(tmp_path / "out")
    assert sorted(images) == ["000001.png", "000003.png", "000007.png", "000008.png", "000009.png"]
    wanted = expected(edm_sampler, files.net, [3, 1, 7, 8, 9], num_steps=4)
    for seed, image in zip([3, 1, 7, 8, 9], wanted, strict=True):
        assert np.array_equal(pixels(images[f"{seed:06d}.png"]), image[:, :, 0])
    printed = capsys.readouterr().out
    assert "EDM sampler: 4 steps from noise level 80, 7 network calls (NFE) per image" in printed


def test_colour_images_with_classes(files, tmp_path):
    net = load_network(files.classes).net
    for options, kwargs in (((), {}), (("--class=2",), {"class_idx": 2})):
        out = tmp_path / f"out{len(options)}"
        assert run(files.classes, out, "--seeds=0-4", "--steps=3", "--subdirs", *options) == 0
        wanted = expected(edm_sampler, net, [0, 1, 2, 3, 4], num_steps=3, **kwargs)
        images = read(out)
        assert sorted(images) == [f"000000/{seed:06d}.png" for seed in range(5)]
        for seed, image in enumerate(wanted):
            assert np.array_equal(pixels(images[f"000000/{seed:06d}.png"]), image)


def test_subdirs_by_thousands(files, tmp_path):
    assert run(files.plain, tmp_path / "out", "--seeds=999-1000,1234567", "--steps=1", "--subdirs") == 0
    names = ["000000/000999.png", "001000/001000.png", "1234000/1234567.png"]
    assert sorted(read(tmp_path / "out")) == names


@pytest.mark.parametrize(
    ("options", "sampler", "kwargs"),
    [
        (("--sigma_max=20", "--sigma-min=0.1", "--rho=5"), edm_sampler, {"sigma_max": 20, "sigma_min": 0.1, "rho": 5}),
        (
            ("--S_churn=30", "--S-min=0.05", "--S_max=50", "--S_noise=1.003"),
            edm_sampler,
            {"S_churn": 30, "S_min": 0.05, "S_max": 50, "S_noise": 1.003},
        ),
        (("--solver=euler",), ablation_sampler, {"solver": "euler"}),
        (("--solver=dpmpp2m", "--rho=5"), dpmpp2m_sampler, {"rho": 5}),
        (("--disc=vp", "--sigma_max=70"), ablation_sampler, {"discretization": "vp", "sigma_max": 70}),
        (("--disc=iddpm", "--schedule=vp"), ablation_sampler, {"discretization": "iddpm", "schedule": "vp"}),
        (("--scaling=vp", "--S_churn=9"), ablation_sampler, {"scaling": "vp", "S_churn": 9}),
    ],
)
def test_sampler_options(files, tmp_path, options, sampler, kwargs):
    """Options reach the sampler, and solver, disc, schedule or scaling select the ablation sampler."""
    assert run(files.plain, tmp_path / "out", "--seeds=0-2", "--steps=5", *options) == 0
    images = read(tmp_path / "out")
    wanted = expected(sampler, files.net, [0, 1, 2], num_steps=5, **kwargs)
    default = expected(edm_sampler, files.net, [0, 1, 2], num_steps=5)
    assert not np.array_equal(wanted, default)
    for seed in range(3):
        assert np.array_equal(pixels(images[f"{seed:06d}.png"]), wanted[seed, :, :, 0])


def test_one_step(files, tmp_path):
    assert run(files.plain, tmp_path / "out", "--seeds=0-1", "--steps=1") == 0
    latents = StackedRandomGenerator("cpu", [0, 1]).randn([2, 1, 8, 8])
    wanted = to_uint8(files.net(latents.double() * 80, torch.tensor(80.0)).double()).numpy()
    for seed in range(2):
        assert np.array_equal(pixels(read(tmp_path / "out")[f"{seed:06d}.png"]), wanted[seed, 0])


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_precision(files, tmp_path, precision):
    """On the CPU all but bf16 are fp32; bf16 is near, and not the same."""
    assert run(files.plain, tmp_path / "auto", "--seeds=0-3", "--steps=2") == 0
    assert run(files.plain, tmp_path / "out", "--seeds=0-3", "--steps=2", f"--precision={precision}") == 0
    a, b = read(tmp_path / "auto"), read(tmp_path / "out")
    difference = np.abs(np.stack([pixels(a[name]).astype(int) - pixels(b[name]) for name in a]))
    if precision == "bf16":
        assert 0 < difference.mean() < 8
    else:
        assert difference.max() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Students


@pytest.mark.parametrize(
    "options",
    [(), ("--steps=4",), ("--steps=8",), ("--solver=euler", "--sigma_max=80", "--S_churn=0"), ("--grid=8/2",)],
)
def test_student_runs_on_its_own_grid(files, tmp_path, options, capsys):
    """Left alone, or asked for its own steps or its teacher's: always the same four jumps."""
    assert run(files.student, tmp_path / "out", "--seeds=0-3", *options) == 0
    printed = capsys.readouterr().out
    assert "the network's own noise grid (80, 13.7, 1.287, 0.03519, 0): 4 steps of euler, distilled from 8" in printed
    assert "4 network calls (NFE) per image" in printed
    note = "8 is its teacher's number of steps, it makes its own 4"
    assert (note in printed) == (options == ("--steps=8",))
    latents = StackedRandomGenerator("cpu", range(4)).randn([4, 1, 8, 8])
    wanted = to_uint8(grid_sampler(files.net, latents, files.sampling.grid.levels, "euler")).numpy()
    for seed in range(4):
        assert np.array_equal(pixels(read(tmp_path / "out")[f"{seed:06d}.png"]), wanted[seed, 0])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--steps=5",
            "--steps=5: this network was distilled for 4; use --steps=4 (its own) or --steps=8 (its teacher's)",
        ),
        ("--solver=dpmpp2m", "--solver=dpmpp2m contradicts the noise grid that this network was distilled for"),
        ("--solver=heun", "use --solver=euler"),
        ("--sigma_max=40", "use --sigma_max=80.0, or leave it out"),
        ("--rho=7", "--rho=7.0 contradicts the noise grid"),
        ("--schedule=vp", "use --schedule=linear"),
        ("--scaling=vp", "use --scaling=none"),
        ("--S_churn=10", "use --S_churn=0"),
        ("--S_noise=1.01", "use --S_noise=1"),
        ("--grid=16/2", "--grid=16/2: this network's file has 8/2; use that, or leave it out"),
    ],
)
def test_student_refuses_other_grids(files, tmp_path, option, message, capsys):
    assert run(files.student, tmp_path / "out", option) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_step_student(files, tmp_path, capsys):
    assert run(files.one_step, tmp_path / "out", "--seeds=0-1", "--steps=2") == 0
    assert "(80, 0): 1 step of euler, distilled from 2, 1 network call (NFE) per image" in capsys.readouterr().out
    assert run(files.plain, tmp_path / "plain", "--seeds=0-1", "--steps=1") == 0
    assert read(tmp_path / "out") == read(tmp_path / "plain")


def test_grid_of_a_student_without_one(files, tmp_path):
    assert run(files.student, tmp_path / "known", "--seeds=0-3") == 0
    assert run(files.plain, tmp_path / "told", "--seeds=0-3", "--grid=8/2") == 0
    assert read(tmp_path / "told") == read(tmp_path / "known")
    assert run(files.plain, tmp_path / "shaped", "--seeds=0-3", "--grid=8/2", "--sigma_max=60") == 0
    assert read(tmp_path / "shaped") != read(tmp_path / "known")


# ----------------------------------------------------------------------------------------------------------------------
# Going on


def test_skip_existing_goes_on(files, tmp_path, capsys):
    """After losses of several kinds the result is that of one run; other images aren't touched."""
    out = tmp_path / "out"
    options = ("--seeds=0-19", "--steps=3", "--subdirs")
    assert run(files.plain, out, *options, "--batch=6") == 0
    whole = read(out)
    (out / "000000/000003.png").unlink()
    (out / "000000/000012.png").write_bytes(b"")
    (out / "000000/000013.png").write_bytes(whole["000000/000013.png"][:-20])
    untouched = (out / "000000/000009.png").stat().st_mtime_ns
    # Another --batch: the batches recorded (5 of 4 images) count, or sums could round differently.
    assert run(files.plain, out, *options, "--batch=20", "--skip-existing") == 0
    assert read(out) == whole
    assert (out / "000000/000009.png").stat().st_mtime_ns == untouched
    assert "Making 10 images" in capsys.readouterr().out  # batches 0-4 and 10-14
    assert json.loads((out / "manifest.json").read_text())["runs"] == [{"seeds": "0-19", "batches": 4}]
    assert run(files.plain, out, *options, "--skip-existing") == 0
    assert "has 20 images of these seeds already" in capsys.readouterr().out


def test_skip_existing_takes_more_seeds(files, tmp_path):
    out = tmp_path / "out"
    assert run(files.plain, out, "--seeds=0-3", "--steps=2") == 0
    first = read(out)
    assert run(files.plain, out, "--seeds=2-9", "--steps=2", "--batch=4", "--skip-existing") == 0
    images = read(out)
    assert {name: images[name] for name in first} == first
    assert len(images) == 10
    runs = json.loads((out / "manifest.json").read_text())["runs"]
    assert runs == [{"seeds": "0-3", "batches": 1}, {"seeds": "4-9", "batches": 2}]


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("other", (), "holds images that another network made"),
        ("plain", ("--steps=3",), "holds images that were made with num_steps=2, not 3"),
        ("plain", ("--steps=2", "--solver=euler"), "made with"),
        ("plain", ("--steps=2", "--precision=bf16"), "made with precision=auto, not bf16"),
        ("plain", ("--steps=2", "--subdirs"), "made with subdirs=False, not True"),
    ],
)
def test_skip_existing_refuses_images_of_others(files, tmp_path, network, options, message, capsys):
    out = tmp_path / "out"
    assert run(files.plain, out, "--seeds=0-3", "--steps=2") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(getattr(files, network), out, "--seeds=0-3", *(options or ("--steps=2",)), "--skip-existing") == 1
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_options_at_their_default_are_no_difference(files, tmp_path):
    assert run(files.plain, tmp_path / "out", "--seeds=0-1", "--steps=2") == 0
    same = ("--S_max=inf", "--rho=7", "--sigma_max=80", "--batch=1", "--skip-existing")
    assert run(files.plain, tmp_path / "out", "--seeds=0-1", "--steps=2", *same) == 0


def test_overwriting_leaves_nothing_to_confuse(files, tmp_path, monkeypatch, capsys):
    """Another network over an old folder, interrupted, then gone on with: no old image passes for a new one."""
    out, clean = tmp_path / "out", tmp_path / "clean"
    assert run(files.plain, out, "--seeds=0-9", "--steps=2") == 0
    before = read(out)
    for network, steps, words in ((files.other, 2, "another network made"), (files.plain, 3, "were made with ")):
        assert run(network, out, "--seeds=0-7", f"--steps={steps}") == 1
        assert f"holds 2 more images, that {words}" in capsys.readouterr().err and read(out) == before
    for seed in (8, 9):
        (out / f"{seed:06d}.png").unlink()
    write = ImageFolder.write

    def fail_late(self: ImageFolder, name: str, data: bytes) -> None:
        if name == "000005.png":
            raise OSError(errno.ENOSPC, "No space left on device", name)
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "write", fail_late)
        assert run(files.other, out, "--seeds=0-7", "--steps=2", "--batch=2") == 1
    assert "the disk is full while writing 000005.png" in capsys.readouterr().err
    assert run(files.other, out, "--seeds=0-7", "--steps=2", "--batch=2", "--skip-existing") == 0
    assert run(files.other, clean, "--seeds=0-7", "--steps=2", "--batch=2") == 0
    images = read(out)
    assert {name: images[name] for name in read(clean)} == read(clean)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, first: int) -> list[int]:
    """A signal comes before the batch that begins with this seed; the seeds that are made from here on."""
    real, made = sample_batch, []

    def interrupted(net: Any, seeds: Any, *rest: Any) -> Any:
        if seeds[0] == first:
            signal.raise_signal(signal.SIGTERM)
        made.extend(seeds)
        return real(net, seeds, *rest)

    monkeypatch.setattr("training.sampling.sample_batch", interrupted)
    return made


SOME = ["--seeds=0-7", "--steps=2", "--batch=2"]
GO_ON = "run the same command with --skip-existing to resume"


@pytest.mark.parametrize("to", ["out", "out.zip"])
def test_a_signal_says_how_to_go_on(files, tmp_path, monkeypatch, capsys, to):
    """What comes out is what an undisturbed run makes, to the last byte; in a folder nothing is made twice."""
    out, whole = tmp_path / to, tmp_path / f"whole-{to}"
    assert run(files.plain, whole, *SOME) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert run(files.plain, out, *SOME) == 128 + signal.SIGTERM
    advice = "a zip is made in one go" if to == "out.zip" else GO_ON
    assert capsys.readouterr().err.endswith(f".py: interrupted by SIGTERM; {advice}\n")
    assert out.is_dir() == (to == "out") and not out.is_file() and not list(tmp_path.glob(".*"))
    made = interrupt_at(monkeypatch, -1)
    assert run(files.plain, out, *SOME, "--skip-existing") == 0
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*/.*"))
    if out.is_file():
        assert len(made) == 8 and out.read_bytes() == whole.read_bytes()
    else:
        assert set(made) == {4, 5, 6, 7} and read(out) == read(whole)


def test_images_of_a_killed_zip_are_removed(files, tmp_path, capsys):
    """Of this zip alone: not those of another, nor what a link of such a name leads to."""
    assert run(files.plain, tmp_path / "whole.zip", *SOME) == 0
    out, other, precious = ImageZip(tmp_path / "out.zip"), ImageZip(tmp_path / "out2.zip"), tmp_path / "precious"
    for folder in (precious, out.work, other.work):
        folder.mkdir()
        (folder / "000003.png").write_bytes(b"half an image")
    assert run(files.plain, out.path, *SOME) == 0
    assert out.path.read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert {path.name for path in tmp_path.glob(".*")} == {other.work.name}
    out.work.symlink_to(precious)
    capsys.readouterr()
    assert run(files.plain, out.path, *SOME) == 1 and capsys.readouterr().err.count("\n") == 1
    assert (precious / "000003.png").read_text() == "half an image"


@pytest.mark.parametrize("to", ["out", "out.zip"])
def test_two_at_once(files, tmp_path, monkeypatch, capsys, to):
    """The second is told that the first is at work."""
    out, real = tmp_path / to, sample_batch
    monkeypatch.setattr("formats.image_files.PATIENCE", 0.2)
    seen = []

    def twice(net: Any, seeds: Any, *rest: Any) -> Any:
        if not seen:
            seen.append(run(files.plain, out, "--seeds=50-59", "--steps=2"))
        return real(net, seeds, *rest)

    monkeypatch.setattr("training.sampling.sample_batch", twice)
    assert run(files.plain, out, *SOME) == 0 and seen == [1]
    assert "another process is at work there" in capsys.readouterr().err
    names = zipfile.ZipFile(out).namelist() if out.is_file() else os.listdir(out)
    assert len(names) == 9 and not list(tmp_path.glob(".*"))


def test_a_zip_that_lacks_an_image_is_not_called_done(files, tmp_path, monkeypatch, capsys):
    write = ImageZip.write
    monkeypatch.setattr(ImageZip, "write", lambda self, name, data: name == "000003.png" or write(self, name, data))
    assert run(files.plain, tmp_path / "out.zip", *SOME) == 1
    assert "No such file or directory: " in capsys.readouterr().err
    assert not (tmp_path / "out.zip").exists()


def test_seeds_that_a_zip_made_anew_loses_are_told(files, tmp_path, capsys):
    for seeds, note in (("0-3", False), ("0-4", False), ("3-8", True)):
        assert run(files.plain, tmp_path / "out.zip", f"--seeds={seeds}", "--steps=2") == 0
        assert ("is made anew, without its 3 images of other seeds" in capsys.readouterr().out) == note


@pytest.mark.parametrize("name", ["000001.png", "dataset.json"])
@pytest.mark.parametrize("manifest", [False, True])
def test_pictures_that_it_did_not_make_are_refused(files, tmp_path, name, manifest, capsys):
    """Where there is no manifest; or one that does not list this image."""
    out = tmp_path / "out"
    out.mkdir()
    if manifest:
        assert run(files.plain, out, "--seeds=0", "--steps=1") == 0
    (out / name).write_bytes(b"mine")
    for options in ([], ["--skip-existing"]):
        status = run(files.plain, out, "--seeds=0-3", "--steps=1", *options)
        if manifest and name == "dataset.json":  # generate.py's own, as far as can be known
            assert status == 0
            continue
        assert status == 1 and (out / name).read_bytes() == b"mine"
        assert f"out holds {name}, but no manifest.json that says who made them" in capsys.readouterr().err


def test_seeds_beside_those_made_again_stay_known(files, tmp_path):
    out = tmp_path / "out"
    for seeds in ("0-5", "0-2", "0-7"):
        assert run(files.plain, out, f"--seeds={seeds}", "--steps=1") == 0
    assert len(read(out)) == 8


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_subfolder_that_is_a_link_is_refused(files, tmp_path, when, capsys, monkeypatch):
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    (outside / "000000.png").write_bytes(b"precious")

    def link() -> None:
        out.mkdir(exist_ok=True)
        (out / "000000").symlink_to(outside)

    if when == "before":
        link()
    else:
        monkeypatch.setattr(generate, "_make_ready", lambda network, *_: link() or network)
    (outside / "000000.png").unlink()
    assert run(files.plain, out, "--seeds=0-3", "--steps=1", "--subdirs") == 1
    assert "out/000000 is a link, and not followed" in capsys.readouterr().err
    assert not list(outside.iterdir())


@pytest.mark.parametrize(
    "runs",
    [
        [{"seeds": "0-9999999", "batches": 1}] * 8,
        [{"seeds": "0-3", "batches": 10**12}],
        [{"seeds": "0-3", "batches": 0}],
        [{"seeds": "0-3", "batches": math.inf}],
        [{"seeds": [math.inf], "batches": 1}],
    ],
)
def test_a_short_manifest_takes_little_memory(runs, monkeypatch):
    """Refused before anything is expanded."""
    text = json.dumps({"network": {}, "options": {}, "runs": runs})
    assert len(text) < 533
    tracemalloc.start()
    with pytest.raises(UserError, match="no list of generated images"):
        Manifest.from_json(text, "manifest.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    monkeypatch.setattr("formats.image_files.MAX_IMAGES", 10)
    fine = {"network": {}, "options": {}, "runs": [{"seeds": "0-4", "batches": 2}, {"seeds": "5-9", "batches": 2}]}
    assert len(Manifest.from_json(json.dumps(fine), "here").names()) == 10
    with pytest.raises(UserError, match="more than 10"):
        prepare(ImageFolder("nowhere"), Manifest({}, {}), range(11), max_batch=4)


def test_images_of_somebody_else_are_told_of(files, tmp_path, capsys):
    """fid.py measures all that lie in a folder."""
    (tmp_path / "out").mkdir()
    for name in ("a.jpg", "b.png", "notes.txt"):
        (tmp_path / "out" / name).write_bytes(b"")
    assert run(files.student, tmp_path / "out", "--seeds=0,1") == 0
    assert "also holds 2 other images, which fid.py would measure too" in capsys.readouterr().out


def test_run_that_left_nothing_is_planned_anew(files, tmp_path):
    """Out of memory at once: a smaller --batch must be able to help."""
    out = tmp_path / "out"
    assert run(files.plain, out, "--seeds=0-7", "--steps=1") == 0
    for path in out.glob("*.png"):
        path.unlink()
    assert run(files.plain, out, "--seeds=0-7", "--steps=1", "--batch=2", "--skip-existing") == 0
    assert json.loads((out / "manifest.json").read_text())["runs"] == [{"seeds": "0-7", "batches": 4}]


def test_manifest_says_who_made_the_images(files, tmp_path):
    assert run(files.student, tmp_path / "out", "--seeds=0-3") == 0
    data = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert data["network"]["sha256"] == load_network(files.student).sha256
    assert data["network"]["source"] == files.student
    assert data["options"]["levels"] == list(files.sampling.grid.levels)
    assert data["options"]["device"] == "cpu"


# ----------------------------------------------------------------------------------------------------------------------
# Zips


def test_zip(files, tmp_path, capsys):
    """The same images as in a folder, stored as they are; what is complete is left, what lacks images made anew."""
    options = ("--seeds=0-5", "--steps=2", "--subdirs")
    assert run(files.plain, tmp_path / "out", *options) == 0
    assert run(files.plain, tmp_path / "out.zip", *options) == 0
    images = read(tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [*sorted(images), "manifest.json"]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert {name: archive.read(name) for name in images} == images
        assert archive.read("manifest.json") == (tmp_path / "out" / "manifest.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.zip"]

    before = (tmp_path / "out.zip").read_bytes()
    assert run(files.plain, tmp_path / "out.zip", *options, "--skip-existing") == 0
    assert "has 6 images of these seeds already" in capsys.readouterr().out
    assert run(files.plain, tmp_path / "out.zip", "--seeds=0-8", *options[1:], "--skip-existing") == 0
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert len(archive.namelist()) == 10
        assert {name: archive.read(name) for name in images} == images
    assert run(files.other, tmp_path / "out.zip", *options, "--skip-existing") == 1
    assert "holds images that another network made" in capsys.readouterr().err
    assert run(files.plain, tmp_path / "out.zip", *options) == 0  # anew: the three other images are gone
    assert (tmp_path / "out.zip").read_bytes() == before


def test_failed_zip_leaves_the_old_one(files, tmp_path, monkeypatch, capsys):
    assert run(files.plain, tmp_path / "out.zip", "--seeds=0-1", "--steps=1") == 0
    before = (tmp_path / "out.zip").read_bytes()

    def full(image: np.ndarray) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("formats.image_files.encode_png", full)
    assert run(files.other, tmp_path / "out.zip", "--seeds=0-1", "--steps=1") == 1
    assert "the disk is full" in capsys.readouterr().err
    assert (tmp_path / "out.zip").read_bytes() == before
    monkeypatch.undo()
    assert run(files.plain, tmp_path / "out.zip", "--seeds=0-1", "--steps=1") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]
    assert (tmp_path / "out.zip").read_bytes() == before


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--seeds=9-7",), 2, "names no seed"),
        (("--seeds=a-b",), 2, "not a list of whole numbers"),
        (("--seeds=5,4294967301",), 2, "holds 5 and 4294967301, the same random numbers (modulo 2^32)"),
        (("--solver=dpmpp2m", "--disc=vp"), 2, "--disc=vp: --solver=dpmpp2m has no such setting; leave it out"),
        (("--solver=dpmpp2m", "--S_churn=1"), 2, "--S_churn=1.0: --solver=dpmpp2m has no such setting"),
        (("--labels=nothing.npy",), 2, "--labels: this network has no labels"),
        (("--class=1",), 2, "class 1: this network has no classes; leave --class (class_idx) out"),
        (("--rho=nan",), 2, "'nan' is not a finite number"),
        (("--grid=8/3",), 2, "--grid=8/3: 8 steps cannot be taken 3 at a time"),
        (("--grid=0/2",), 2, "at least one step, not 0"),
        (("--grid=8/0",), 2, "cannot be taken"),
        (("--sigma_min=3", "--sigma_max=2"), 2, "leave nothing to sample"),
    ],
)
def test_wrong_options(files, tmp_path, options, status, message, capsys):
    assert run(files.plain, tmp_path / "out", *options) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_places(files, tmp_path, capsys):
    (tmp_path / "file").write_text("here first")
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "text.zip").write_text("here first")
    for place, message in (
        ("file", "is a file; name a folder, or a .zip"),
        ("folder.zip", "is a folder; name a new .zip"),
        ("text.zip", "is no zip"),
        ("file/out", "Not a directory"),
    ):
        assert run(files.plain, tmp_path / place, "--seeds=0", "--steps=1") == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "here first"
    assert run(str(tmp_path / "missing.pkl"), tmp_path / "out") == 1
    assert "missing.pkl" in capsys.readouterr().err


def test_manifest_difference():
    network = {"source": "a", "sha256": "1"}
    mine = Manifest(network, {"num_steps": 2}, (Run((1, 2), 1),))
    assert Manifest.from_json(mine.to_json(), "here") == mine
    assert mine.difference(Manifest({"source": "b", "sha256": "1"}, {"num_steps": 2})) is None
    assert mine.difference(Manifest(network, {"num_steps": 2, "class": 3})) == "were made with class=3, not None"


# ----------------------------------------------------------------------------------------------------------------------
# For other programs


def test_iterate_images(files):
    """The call that fid.py and distill.py make: same images as the command line's, batch by batch."""
    network = load_network(files.classes)
    assert (plan_sampling(network).steps, plan_sampling(network).nfe) == (18, 35)
    batches = list(iterate_images(network, range(5), steps=3, max_batch=2, device="cpu", class_idx=1))
    assert [batch.seeds for batch in batches] == [[0, 1], [2, 3], [4]]
    assert all(batch.images.dtype == torch.float32 for batch in batches)
    images = torch.cat([batch.images for batch in batches]).double()
    assert [int(row.argmax()) for batch in batches if batch.labels is not None for row in batch.labels] == [1] * 5
    wanted = expected(edm_sampler, network.net, [0, 1], num_steps=3, class_idx=1)
    assert np.array_equal(to_uint8(images)[:2].permute(0, 2, 3, 1).numpy(), wanted)
    assert list(iterate_images(network, [], device="cpu")) == []
    with pytest.raises(UsageError, match="--steps=5"):
        iterate_images(load_network(files.student), [0], steps=5, device="cpu")
    with pytest.raises(UsageError, match="class 4"):
        iterate_images(network, [0], device="cpu", class_idx=4)


def test_names_that_other_programs_import():
    for name in ("edm_sampler", "ablation_sampler", "StackedRandomGenerator"):
        assert callable(getattr(generate, name))
    with pytest.raises(AttributeError):
        _ = generate.no_such_name


def test_two_processes_make_the_same(files, tmp_path):
    """Two processes divide the work, one zip comes out: byte for byte what one process makes in the same batches."""
    options = [f"--network={files.plain}", "--seeds=0-10", "--batch=3", "--steps=2", "--subdirs"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "generate.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for out in ("two.zip", "two"):
        done = subprocess.run(
            [*command, *options, f"--outdir={tmp_path / out}", "--device=cpu"],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Done: 11 images") == 1  # rank 0 alone speaks
    assert generate.main([*options, f"--outdir={tmp_path / 'one.zip'}", "--device=cpu"]) == 0
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    # What two processes began, one can go on with.
    whole = read(tmp_path / "two")
    assert len(whole) == 11
    (tmp_path / "two" / "000000" / "000004.png").unlink()
    assert generate.main([*options, f"--outdir={tmp_path / 'two'}", "--device=cpu", "--skip-existing"]) == 0
    assert read(tmp_path / "two") == whole
