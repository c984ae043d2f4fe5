"""Fréchet distances, feature statistics, their files, detectors and the small classifier."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dataset_tool
from dnnlib.cli import UserError
from helpers import GOLDEN, golden, make_dataset
from metrics import classifier, detectors, frechet
from metrics.detectors import INCEPTION, Detector, full_precision, load_detector
from metrics.frechet import checked_moments, frechet_distance
from metrics.images import read_images
from metrics.statistics import FeatureStatistics, Stats, frechet_between, statistics_of_dataset, statistics_of_images
from training.dataset import ImageFolderDataset

FID_CASES = [f"{size}_{kind}" for size in ("d16", "d64") for kind in ("full", "shift", "singular", "same", "scaled")]


def moments(case: str) -> list[np.ndarray]:
    data = golden("fid.npz")
    return [data[f"{case}/{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]


def random_moments(seed: int, dim: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal([dim, rank or dim])
    return rng.standard_normal(dim), a @ a.T


# ----------------------------------------------------------------------------------------------------------------------
# The distance


@pytest.mark.parametrize("case", FID_CASES)
def test_golden_distances(case):
    expected = float(golden("fid.npz")[f"{case}/fid"])
    got = frechet_distance(*moments(case))
    if case.endswith("_same"):
        assert 0 <= got < 1e-8
    else:
        assert got == pytest.approx(expected, rel=1e-6 if case.endswith("_singular") else 1e-9, abs=0)


def test_one_dimension_is_the_difference_of_means_and_deviations():
    assert frechet_distance([1.0], [[9.0]], [3.0], [[4.0]]) == pytest.approx(4 + 1, rel=1e-14)


def test_commuting_covariances():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal([20, 20]))
    v1, v2 = rng.uniform(0, 4, [2, 20])
    s1, s2 = (turn * v1) @ turn.T, (turn * v2) @ turn.T
    expected = np.square(np.sqrt(v1) - np.sqrt(v2)).sum() + 20 * 0.25
    assert frechet_distance(np.zeros(20), s1, np.full(20, 0.5), s2) == pytest.approx(expected, rel=1e-13)


def test_singular_covariances_lose_no_digits():
    """For a a^T and b b^T the root's trace is |a . b|; roots of the product's eigenvalues are only good to 1e-8."""
    a, b = np.random.default_rng(1).standard_normal([2, 50])
    expected = a @ a + b @ b - 2 * abs(a @ b)
    assert frechet_distance(np.zeros(50), np.outer(a, a), np.zeros(50), np.outer(b, b)) == pytest.approx(
        expected, rel=1e-12
    )
    mu, sigma = random_moments(2, 50, rank=7)
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-11 * np.trace(sigma)


def test_no_spread_at_all():
    zero = np.zeros([3, 3])
    assert frechet_distance([1, 2, 3], zero, [1, 2, 3], zero) == 0
    assert frechet_distance(np.ones(3), zero, np.zeros(3), np.eye(3)) == pytest.approx(6)


def alike(dim: int, spread: float = 0.0, num: int = 1000, batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Moments, summed up as those of images, of features that are all equal, or lie `spread` to either side of that."""
    rng = torch.Generator().manual_seed(dim)
    mean, direction = torch.rand([2, dim], generator=rng, dtype=torch.float64)
    sums = FeatureStatistics(dim)
    for start in range(0, num, batch):
        signs = 1 - 2 * (torch.arange(start, min(start + batch, num)) % 2)
        sums.append(mean + spread * signs[:, None] * direction / direction.norm())
    return sums.mean_cov()[:2]


@pytest.mark.parametrize(("dim", "batch"), [(8, 64), (128, 64), (128, 1), (512, 100), (2048, 500)])
def test_images_that_are_all_alike_have_a_distance(dim, batch):
    """|difference of means|^2 and the reference's variance are left; two such sets are as far apart as their means."""
    mu, sigma = alike(dim, batch=batch)
    variances = np.random.default_rng(dim).uniform(1e-3, 0.1, dim)
    expected = np.square(mu - 0.5).sum() + variances.sum()
    assert frechet_distance(mu, sigma, np.full(dim, 0.5), np.diag(variances)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-10
    assert frechet_distance(mu, sigma, mu - 1, alike(dim, num=300)[1]) == pytest.approx(dim, rel=1e-10)


@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
def test_images_that_are_nearly_alike_have_a_distance(dim, spread):
    """Two kinds of image, s^2 v v^T: the root's trace is s (v^T sigma v)^(1/2). Cut off by rounding: s below 1e-6."""
    mu, sigma = alike(dim, spread)
    variances = np.random.default_rng(dim).uniform(1e-3, 0.1, dim)
    direction = torch.rand([2, dim], generator=torch.Generator().manual_seed(dim), dtype=torch.float64)[1].numpy()
    root = spread * np.sqrt(np.square(direction) @ variances) / np.linalg.norm(direction)
    expected = np.square(mu - 0.5).sum() + variances.sum() + spread**2 * 1000 / 999 - 2 * root * np.sqrt(1000 / 999)
    assert frechet_distance(mu, sigma, np.full(dim, 0.5), np.diag(variances)) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-10


@pytest.mark.parametrize("rank", [1, 40, 119, 120, 300])
@pytest.mark.parametrize("stored", [np.float64, np.float32])
def test_every_way_to_factor_gives_the_same_distance(rank, stored):
    """Plain Cholesky at full rank, with pivots below it, eigenvalues for what float32 has made indefinite."""
    rng = np.random.default_rng(rank)
    moments = []
    for shift in (0.0, 0.3):
        features = rng.standard_normal([rank + 1, 120]) * np.geomspace(1, 0.01, 120) + shift
        moments.append((features.mean(axis=0), np.cov(features, rowvar=False).astype(stored).astype(np.float64)))
    (mu1, sigma1), (mu2, sigma2) = moments
    a1, a2 = (frechet._eigen_factor(sigma, 0.0, "here") for sigma in (sigma1, sigma2))
    root_trace = np.linalg.svd(a1.T @ a2, compute_uv=False).sum()
    expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2) - 2 * root_trace
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("smallest", "quick"), [(1e-2, True), (1e-7, False)])
def test_the_fast_sum_of_singular_values_is_taken_only_where_it_is_exact(monkeypatch, smallest, quick):
    rng = np.random.default_rng(0)
    q1, q2 = (np.linalg.qr(rng.standard_normal((300, 300)))[0] for _ in range(2))
    singular = np.geomspace(1, smallest, 300)
    calls = []
    svd = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda *args, **kwargs: calls.append(1) or svd(*args, **kwargs))
    for rows in (300, 450):
        matrix = np.vstack([q1 * singular @ q2, np.zeros((rows - 300, 300))])
        for m in (matrix, matrix.T):
            assert frechet._sum_of_singular_values(m) == pytest.approx(singular.sum(), rel=1e-12)
    assert len(calls) == (0 if quick else 4)


def test_symmetry_and_invariance():
    (m1, s1), (m2, s2) = random_moments(3, 30), random_moments(4, 30, rank=12)
    d = frechet_distance(m1, s1, m2, s2)
    assert frechet_distance(m2, s2, m1, s1) == pytest.approx(d, rel=1e-12)
    turn, _ = np.linalg.qr(np.random.default_rng(5).standard_normal([30, 30]))
    assert frechet_distance(turn @ m1, turn @ s1 @ turn.T, turn @ m2, turn @ s2 @ turn.T) == pytest.approx(d, rel=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, s: (m[:3], s), "shape"),
        (lambda m, s: (m, s[:, :3]), "shape"),
        (lambda m, s: (m[None], s), "shape"),
        (lambda m, s: (m * np.nan, s), "NaN"),
        (lambda m, s: (m, s + np.inf), "NaN or infinite"),
        (lambda m, s: (m, s + np.triu(np.ones_like(s))), "not symmetric"),
        (lambda m, s: (m, -s), "negative eigenvalue"),
        (lambda m, s: (m * 1e200, s), "not a finite number"),
        (lambda m, s: (m[:2], s[:2, :2]), "2 and of 4 features|4 and of 2 features"),
        (lambda m, s: (np.array(["a"] * 4), s), "not arrays of numbers"),
    ],
)
def test_bad_moments_are_named(change, message):
    m, s = random_moments(6, 4)
    bad = change(m, s)
    for pair in ((*bad, m, s), (m, s, *bad)):
        with pytest.raises(UserError, match=message):
            frechet_distance(*pair)


def test_the_largest_numbers_are_kept() -> None:
    with np.errstate(all="raise"):
        assert checked_moments([0.0], [[1.7e308]], "x")[1].tolist() == [[1.7e308]]


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_accumulated_statistics_are_numpys():
    data = golden("fid.npz")
    for case in ("d16_full", "d64_full", "d16_singular"):
        features = torch.from_numpy(data[f"{case}/feats1"])
        sums = FeatureStatistics(features.shape[1])
        for part in features.split(7):
            sums.append(part)
        sums.reduce()
        mu, sigma, num = sums.mean_cov()
        assert num == len(features)
        np.testing.assert_allclose(mu, data[f"{case}/mu1"], rtol=0, atol=1e-14)
        np.testing.assert_allclose(sigma, data[f"{case}/sigma1"], rtol=0, atol=1e-14)
        np.testing.assert_allclose(sigma, np.cov(features.double().numpy().T), rtol=0, atol=1e-14)


def test_too_few_images_and_bad_features():
    sums = FeatureStatistics(3)
    with pytest.raises(UserError, match="found 0 images"):
        sums.mean_cov()
    sums.append(torch.ones(1, 3))
    with pytest.raises(UserError, match="found 1 image;"):
        sums.mean_cov()
    sums.append(torch.full([1, 3], torch.nan))
    with pytest.raises(UserError, match="NaN or infinite"):
        sums.mean_cov()


class Powers(nn.Module):
    """The golden pipeline's stand-in for Inception: powers 1, 2, 3, ... of all values, cut to 2048 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(list(images.shape))
        x = images.to(torch.float32).flatten(1) / 255
        return torch.cat([x**power for power in range(1, 2048 // x.shape[1] + 2)], dim=1)[:, :2048]


def powers() -> Detector:
    return Detector("powers", Powers(), 2048, channels=3, resolution=None, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "case", ["stub_int_b64", "stub_int_b5", "stub_int_num6_seed0", "stub_int_num6_seed3", "stub_gray"]
)
def test_golden_pipeline(case, capsys):
    """Which images, in which batches, with which statistics: as EDM."""
    data = golden("fid.npz")
    facts = json.loads(str(data["facts_json"]))[case]
    kwargs = facts["kwargs"]
    detector = powers()
    stats = statistics_of_dataset(
        GOLDEN / facts["file"],
        detector,
        num=kwargs.get("num_expected"),
        seed=kwargs.get("seed", 0),
        batch=kwargs.get("max_batch_size", 64),
    )
    assert detector.net.shapes == facts["batch_shapes"]
    assert stats.num == sum(shape[0] for shape in facts["batch_shapes"])
    np.testing.assert_allclose(stats.mu, data[f"{case}/mu"], rtol=0, atol=1e-14)
    np.testing.assert_allclose(stats.sigma[::32, ::32], data[f"{case}/sigma_64x64_stride32"], rtol=0, atol=1e-14)
    assert np.trace(stats.sigma) == pytest.approx(float(data[f"{case}/trace"]), rel=1e-9)
    assert np.linalg.norm(stats.sigma) == pytest.approx(float(data[f"{case}/fro"]), rel=1e-9)
    assert "few for 2048 features" in capsys.readouterr().err


def test_too_few_images(tmp_path):
    with pytest.raises(UserError, match=r"found 12 images, fewer than the 13 asked for; set --num-images=12"):
        statistics_of_dataset(GOLDEN / "ds_int.zip", powers(), num=13)
    make_dataset(tmp_path / "one.zip", count=1)
    with pytest.raises(UserError, match="found 1 image; statistics need at least 2"):
        statistics_of_dataset(tmp_path / "one.zip", powers())


def test_images_come_in_order_and_errors_come_through(tmp_path):
    path = make_dataset(tmp_path / "many.zip", count=60)
    dataset = ImageFolderDataset(path)
    batches = [[5], list(range(50)), [], [7, 3, 59]]
    for wanted, got in zip(batches[:2] + batches[3:], read_images(dataset, batches[:2] + batches[3:]), strict=True):
        assert got.dtype == torch.uint8
        assert torch.equal(got, torch.from_numpy(np.stack([dataset[i][0] for i in wanted])))
    with zipfile.ZipFile(tmp_path / "broken.zip", "w") as archive, zipfile.ZipFile(path) as whole:
        for name in sorted(whole.namelist())[:60]:
            archive.writestr(name, b"no picture" if "0042" in name else whole.read(name))
    with pytest.raises(UserError, match="img00000042"):
        statistics_of_dataset(tmp_path / "broken.zip", powers(), batch=4)


# ----------------------------------------------------------------------------------------------------------------------
# Files of statistics


def test_statistics_survive_their_file(tmp_path):
    mu, sigma = random_moments(7, 5)
    Stats(mu, sigma, 123, "classifier:abc").save(tmp_path / "deep" / "x.npz")
    again = Stats.load(tmp_path / "deep" / "x.npz")
    assert (again.num, again.detector_id) == (123, "classifier:abc")
    assert np.array_equal(again.mu, mu) and np.array_equal(again.sigma, sigma)
    with np.load(tmp_path / "deep" / "x.npz", allow_pickle=False) as file:
        assert {"mu", "sigma"} <= set(file)


def test_a_file_without_mark_is_inceptions(tmp_path):
    mu, sigma = random_moments(8, 5)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    edm = Stats.load(tmp_path / "edm.npz")
    assert (edm.detector_id, edm.num) == (INCEPTION, None)
    with pytest.raises(UserError, match=f"two detectors.*{INCEPTION}.*classifier:abc"):
        frechet_between(edm, Stats(mu, sigma, 9, "classifier:abc"))


def test_bad_statistics_files_are_named(tmp_path):
    mu, sigma = random_moments(9, 5)

    def content(write: Any = np.savez, *array: np.ndarray, **arrays: Any) -> bytes:
        file = io.BytesIO()
        write(file, *array, **arrays)
        return file.getvalue()

    whole = content(mu=mu, sigma=sigma)
    for number, (bad, message) in enumerate(
        [
            (content(sigma=sigma), "0.npz: has no mu;"),
            (content(x=1), "has no mu and no sigma"),
            (content(mu=mu, sigma=sigma[:4, :4]), "shape"),
            (content(mu=mu * np.nan, sigma=sigma), "NaN"),
            (content(mu=np.array([{}], dtype=object), sigma=sigma), "not a readable npz file of plain arrays"),
            (content(np.save, mu), "a single array"),
            *((each, "not a readable npz file") for each in (b"PK\x03\x04 nothing", b"", whole[: len(whole) // 2])),
        ]
    ):
        (tmp_path / f"{number}.npz").write_bytes(bad)
        with pytest.raises(UserError, match=message):
            Stats.load(tmp_path / f"{number}.npz")
    with pytest.raises(UserError, match="no such file"):
        Stats.load(tmp_path / "nowhere.npz")


# ----------------------------------------------------------------------------------------------------------------------
# Detectors


def test_detector_takes_the_images_it_was_made_for():
    rgb = powers()
    grey = torch.randint(0, 256, [2, 1, 4, 4], dtype=torch.uint8)
    assert torch.equal(rgb(grey), rgb(grey.repeat(1, 3, 1, 1)))
    assert rgb.net.shapes[0] == [2, 3, 4, 4]
    small = Detector("small", Powers(), 2048, channels=1, resolution=8, device=torch.device("cpu"))
    with pytest.raises(UserError, match="3 channels, the detector small takes 1"):
        small(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="9x8, the detector small was made for 8x8"):
        small(torch.zeros(2, 1, 8, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        small(torch.zeros(2, 1, 8, 8))


def test_full_precision_restores_the_callers_choice():
    before = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(KeyError), full_precision():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        raise KeyError
    assert torch.backends.cudnn.conv.fp32_precision == before
    assert torch.backends.cudnn.allow_tf32 in (True, False)  # PyTorch's older interface still answers


# ----------------------------------------------------------------------------------------------------------------------
# The small classifier


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's 1797 handwritten digits, 8x8."""
    path = tmp_path_factory.mktemp("digits") / "digits.zip"
    assert dataset_tool.main(["--source=digits", f"--dest={path}"]) == 0
    return path


@pytest.fixture(scope="module")
def trained(digits) -> tuple[Path, classifier.Trained]:
    path = digits.with_name("detector.pt")
    return path, classifier.train_detector(digits, path)


def test_classifier_reads_digits(trained, digits):
    path, facts = trained
    assert facts.accuracy > 0.97  # of images that it has not seen
    assert (facts.images, facts.held_out, facts.classes, facts.resolution, facts.channels) == (1797, 179, 10, 8, 1)
    detector = load_detector(path)
    assert detector.id.startswith("classifier:") and len(detector.id) == len("classifier:") + 16
    assert (detector.dim, detector.resolution, detector.channels) == (128, 8, 1)
    dataset = ImageFolderDataset(digits, use_labels=True)
    images = torch.from_numpy(np.stack([dataset[i][0] for i in range(500)]))
    labels = torch.tensor([int(dataset.get_label(i).argmax()) for i in range(500)])
    features = detector(images)
    assert features.shape == (500, 128) and features.dtype == torch.float32
    net = detector.net
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert (net.head(features.clone()).argmax(dim=1) == labels).float().mean() > 0.98


def test_classifier_sees_differences(trained, digits):
    """Halves of the same data are near; noise brings images farther away, the more the farther."""
    detector = load_detector(trained[0])
    dataset = ImageFolderDataset(digits)
    images = torch.from_numpy(np.stack([dataset[i][0] for i in range(len(dataset))]))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    reference = statistics_of_images(images[order[::2]].split(300), detector)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    distances = []
    for strength in (0, 20, 60):
        changed = (images + strength * noise).clip(0, 255).to(torch.uint8)[order[1::2]]
        distances.append(frechet_between(statistics_of_images(changed.split(300), detector), reference))
    assert 0 < 2 * distances[0] < distances[1] and 2 * distances[1] < distances[2]


def test_same_seed_same_detector(tmp_path, digits):
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        classifier.train_detector(digits, tmp_path / name, seed=seed, kimg=1)
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's random numbers are touched
    a, b, c = (load_detector(tmp_path / name).id for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(("size", "channels"), [(8, 3), (28, 1), (32, 3), (64, 3), (9, 1)])
def test_classifier_fits_every_small_resolution(size, channels):
    net = classifier.Classifier(size, channels, classes=4).eval()
    images = torch.randint(0, 256, [2, channels, size, size], dtype=torch.uint8)
    assert net(images).shape == (2, 128) and net.classify(images).shape == (2, 4)
    assert 0 < net(images).std() < 10


def test_unsuitable_training_data(tmp_path):
    for name, options, message in (
        ("plain", {"classes": None}, "no class labels"),
        ("one", {"classes": 1}, "and 1 classes are too few"),
        ("large", {"count": 4, "size": 96}, "96x96"),
        ("few", {"count": 9}, "9 images and 4 classes are too few"),
    ):
        make_dataset(tmp_path / name, **options)
        with pytest.raises(UserError, match=message):
            classifier.train_detector(tmp_path / name, tmp_path / "out.pt", kimg=1)
    for path, message in ((tmp_path / "nowhere", "no such file"), (GOLDEN / "ds_vec.zip", "no class labels")):
        with pytest.raises(UserError, match=message):
            classifier.train_detector(path, tmp_path / "out.pt", kimg=1)
    assert not (tmp_path / "out.pt").exists()


def test_bad_detector_files(tmp_path, trained):
    good, path = torch.load(trained[0], weights_only=True), tmp_path / "x.pt"
    facts = json.loads(good["facts"])
    for content in (
        b"nothing",
        trained[0].read_bytes()[:-1000],
        {"weights": torch.zeros(2)},
        [1, 2],
        {**good, "format": "edm-distill-classifier-9"},
        {**good, "facts": "{"},
        {**good, "facts": json.dumps({**facts, "dim": 10**9})},
        {**good, "facts": json.dumps({**facts, "dim": 64})},
        {**good, "state": {**good["state"], "more": torch.zeros(1)}},
        Path("/"),  # an object that a pickle would have to build
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError, match="not a detector file"):
            load_detector(path)
    with pytest.raises(UserError, match="no such file"):
        load_detector(tmp_path / "nowhere.pt")


def test_missing_inception_says_what_to_do(monkeypatch):
    monkeypatch.setattr(detectors, "INCEPTION_URL", "http://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"--detector=PATH.*fid\.py detector"):
        load_detector()
