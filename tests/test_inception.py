"""Inception-v3 against numbers of the public implementations, and its weights file.

tests/golden/inception.npz was computed with torch-fidelity 0.4.0 (FeatureExtractorInceptionV3) on the weights of
`recipe` below; pytorch-fid 0.3.0 with torchvision 0.29.2 gives the same features to the last bit on case b, where
nothing is resized. Another convolution back end changes them by up to 1e-6. Contents: `names_json`: names and shapes of
the weights; for each case of `inputs` the features, per stage of `stages_json` mean and deviation of its output, and,
for a and c, every 23rd pixel of the first resized image.
"""

from __future__ import annotations

import hashlib
import json
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.cli import UserError
from helpers import golden
from metrics import detectors, inception
from metrics.inception import InceptionV3, resize_bilinear_tf1


def recipe(name: str, shape: torch.Size) -> Tensor:
    """Weights that keep activations near 1, from the CRC of their name."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        z = 1 + 0.2 * np.abs(z)
    elif name.endswith("bn.weight"):
        z = 1 + 0.2 * z
    elif len(shape) == 1:
        z = 0.2 * z
    else:
        z = z * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(z.astype(np.float32))


def inputs() -> dict[str, Tensor]:
    """Noise at 32x32 (two images), at the network's own size, a little above it, and a picture at 64x64."""
    rng = np.random.RandomState(7)
    shapes = {"a": (2, 3, 32, 32), "b": (1, 3, 299, 299), "c": (1, 3, 320, 310)}
    images = {name: rng.randint(0, 256, shape).astype(np.uint8) for name, shape in shapes.items()}
    return {name: torch.from_numpy(image) for name, image in {**images, "d": golden("inception.npz")["d/in"]}.items()}


@pytest.fixture(scope="module")
def net() -> InceptionV3:
    net = InceptionV3().eval().requires_grad_(False)
    net.load_state_dict({name: recipe(name, tensor.shape) for name, tensor in published(net).items()})
    return net


def published(net: InceptionV3) -> dict[str, Tensor]:
    """The weights, without batch norm's counters, as the published file has them."""
    return {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}


def test_weights_are_those_of_the_published_file(net):
    state = published(net)
    assert [[name, list(tensor.shape)] for name, tensor in state.items()] == json.loads(
        str(golden("inception.npz")["names_json"])
    )
    count = sum(tensor.numel() for tensor in state.values())
    assert count == 23_885_392
    assert 0 < 95_628_359 - 4 * count < 100_000  # size of the file less that of its numbers: names and shapes


@pytest.mark.parametrize("case", "abcd")
def test_golden_features(net, case):
    data = golden("inception.npz")
    images = inputs()[case]
    assert case != "a" or np.array_equal(images.numpy(), data["a/in"])
    stages: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: stages.__setitem__(name, out))
        for name in json.loads(str(data["stages_json"]))
    ]
    with torch.no_grad():
        features = net(images)
    for hook in hooks:
        hook.remove()
    assert features.shape == (len(images), 2048) and features.dtype == torch.float32
    got = np.array([[float(out.double().mean()), float(out.double().std())] for out in stages.values()])
    np.testing.assert_allclose(got, data[f"{case}/stage_mean_std"], rtol=0, atol=2e-7)  # tells which stage goes wrong
    np.testing.assert_allclose(features.numpy(), data[f"{case}/features"], rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "wrong", ["pools count padding", "last pool averages", "half-pixel resizing", "scaled by 127.5"]
)
def test_the_golden_features_can_tell(net, wrong, monkeypatch):
    """Each peculiarity of this graph matters: what later versions do instead is far outside the tolerance."""
    if wrong == "pools count padding":
        pool = lambda x: F.avg_pool2d(x, 3, stride=1, padding=1)  # noqa: E731
        for block in net.children():
            if getattr(block, "pool", None) is inception._average_pool:
                monkeypatch.setattr(block, "pool", pool)
    elif wrong == "last pool averages":
        monkeypatch.setattr(net.Mixed_7c, "pool", net.Mixed_7b.pool)
    elif wrong == "half-pixel resizing":
        resize = lambda x, h, w: F.interpolate(x.float(), (h, w), mode="bilinear", align_corners=False)  # noqa: E731
        monkeypatch.setattr(inception, "resize_bilinear_tf1", resize)
    else:
        resize = lambda x, h, w: resize_bilinear_tf1(x, h, w) * (128 / 127.5)  # noqa: E731
        monkeypatch.setattr(inception, "resize_bilinear_tf1", resize)
    with torch.no_grad():
        features = net(inputs()["a"])
    assert np.abs(features.numpy() - golden("inception.npz")["a/features"]).max() > 1e-3


@pytest.mark.parametrize("case", "ac")
def test_golden_resizing(case):
    resized = resize_bilinear_tf1(inputs()[case], 299, 299)
    expected = golden("inception.npz")[f"{case}/resized_probe"]
    np.testing.assert_allclose(resized[0, :, ::23, ::23].numpy(), expected, rtol=0, atol=2e-5)


def test_resizing_by_hand():
    """TensorFlow 1: pixel i of the result lies at i * old / new; beyond the last old pixel, that one is repeated."""
    row = torch.tensor([10, 20, 40], dtype=torch.uint8).reshape(1, 1, 1, 3)
    assert resize_bilinear_tf1(row, 1, 6).flatten().tolist() == [10, 15, 20, 30, 40, 40]
    assert resize_bilinear_tf1(row.mT, 6, 1).flatten().tolist() == [10, 15, 20, 30, 40, 40]
    assert resize_bilinear_tf1(row, 1, 2).flatten().tolist() == [10, 30]  # positions 0 and 1.5, no antialiasing
    square = torch.tensor([[0, 100], [200, 20]], dtype=torch.uint8).reshape(1, 1, 2, 2)
    expected = [[0, 50, 100, 100], [100, 80, 60, 60], [200, 110, 20, 20], [200, 110, 20, 20]]
    assert resize_bilinear_tf1(square, 4, 4)[0, 0].tolist() == expected
    image = torch.randint(0, 256, [1, 3, 299, 299], dtype=torch.uint8)
    assert torch.equal(resize_bilinear_tf1(image, 299, 299), image.float())


def test_average_pool_by_hand():
    """At the edge the mean goes over the pixels that exist."""
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).reshape(1, 1, 3, 3)
    expected = [[3, 3.5, 4], [4.5, 5, 5.5], [6, 6.5, 7]]
    assert inception._average_pool(x)[0, 0].tolist() == expected
    assert inception._max_pool(x)[0, 0].tolist() == [[5, 6, 6], [8, 9, 9], [8, 9, 9]]


def test_weights_file_is_found_checked_and_loaded(net, tmp_path, monkeypatch):
    """In either of torch.save's formats, with or without batch norm's counters, by path and as the default."""
    images, expected = inputs()["d"], torch.from_numpy(golden("inception.npz")["d/features"])
    for number, (content, zipped) in enumerate([(published(net), True), (net.state_dict(), False)]):
        path = tmp_path / f"weights{number}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        monkeypatch.setattr(detectors, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setattr(detectors, "INCEPTION_URL", path.as_uri())
        detector = detectors.load_detector(path if number else "inception")
        assert (detector.id, detector.dim, detector.resolution) == (detectors.INCEPTION, 2048, None)
        assert torch.allclose(detector(images), expected, rtol=0, atol=5e-6)


def test_a_wrong_weights_file_is_refused(tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"SHA-256 begins with .* instead of 6726825d"):
        detectors.load_detector(path)
