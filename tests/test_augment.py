"""Augmentation against EDM's numbers, against arithmetic done by hand, and as something a batch is cut into."""

import json

import numpy as np
import pytest
import torch

from helpers import GOLDEN
from training import augment
from training.augment import AugmentPipe, mirror, resample
from training.draws import StepDraws

PRESET = {"xflip": 1e8, "yflip": 1, "scale": 1, "rotate_frac": 1, "aniso": 1, "translate_frac": 1}
EVERYTHING = {
    **dict.fromkeys(("xflip", "yflip", "rotate_int", "translate_int", "scale", "rotate_frac", "aniso"), 1),
    **dict.fromkeys(("translate_frac", "brightness", "contrast", "lumaflip", "hue", "saturation"), 1),
}
with np.load(GOLDEN / "augment.npz") as _data:
    NUMBERS = dict(_data)
CASES = sorted({name.split("/")[0] for name in NUMBERS if "/" in name})


def case(tag: str) -> tuple[dict[str, float], torch.Tensor]:
    """The pipe's arguments and the images of a golden case."""
    return json.loads(str(NUMBERS[f"{tag}/kwargs_json"])), torch.from_numpy(
        NUMBERS[json.loads(str(NUMBERS[f"{tag}/src"]))]
    )


@pytest.mark.parametrize("tag", CASES)
def test_golden(tag):
    kwargs, images = case(tag)
    pipe = AugmentPipe(**kwargs)
    torch.manual_seed(int(NUMBERS[f"{tag}/seed"]))
    out, labels = pipe(images)
    assert torch.equal(torch.rand(4), torch.from_numpy(NUMBERS[f"{tag}/rand4_after"])), "draws more or less than EDM"
    np.testing.assert_array_equal(labels.numpy(), NUMBERS[f"{tag}/labels"])
    assert labels.dtype == torch.float32 and pipe.label_dim == labels.shape[1]
    # Whatever resamples noise images with steps of 2 from pixel to pixel depends on how sampling positions are
    # rounded in float32, in EDM (8e-6 from float64 arithmetic, see below) as here. The rest has nothing to round.
    resampled = any(kwargs.get(name) for name in ("scale", "rotate_frac", "aniso", "translate_frac"))
    np.testing.assert_allclose(out.numpy(), NUMBERS[f"{tag}/out"], rtol=0, atol=3e-5 if resampled else 1e-6)


@pytest.mark.parametrize("tag", ["train_p1", "all_p1", "gray_train_p1", "only_rotate_frac", "train_p0"])
def test_golden_in_double_precision(tag, monkeypatch):
    """With exact positions only EDM's own rounding is left."""
    monkeypatch.setattr(augment, "resample", lambda images, source: resample(images.double(), source.double()).float())
    kwargs, images = case(tag)
    torch.manual_seed(int(NUMBERS[f"{tag}/seed"]))
    out, _ = AugmentPipe(**kwargs)(images)
    np.testing.assert_allclose(out.numpy(), NUMBERS[f"{tag}/out"], rtol=0, atol=1.5e-5)


def test_nothing_on_draws_nothing_and_changes_nothing():
    images = torch.rand(2, 3, 8, 8)
    state = torch.get_rng_state()
    out, labels = AugmentPipe()(images)
    assert torch.equal(out, images) and labels.shape == (2, 0) and torch.equal(torch.get_rng_state(), state)


def test_filters_reconstruct_perfectly():
    """sym6 is orthonormal: up and down again is the identity, whatever the image (float64: to rounding)."""
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    torch.testing.assert_close(resample(images, identity), images, rtol=0, atol=1e-11)
    taps = np.array(augment.SYM6)
    for shift in range(0, 12, 2):
        assert np.dot(taps[shift:], taps[: 12 - shift]) == pytest.approx(float(shift == 0), abs=1e-11)
    # Six vanishing moments of its high-pass partner make it sym6 and not another orthonormal filter.
    for power in range(6):
        assert np.sum((-1.0) ** np.arange(12) * np.arange(12) ** power * taps) == pytest.approx(0, abs=1e-6)


def test_resample_moves_a_smooth_image_where_it_should():
    """A wide bump moved by half a pixel and shrunk stands where arithmetic says."""

    def bump(x0: float, y0: float, width: float) -> torch.Tensor:
        at = torch.arange(32, dtype=torch.float64) - 15.5
        return torch.exp(-((at[None, :] - x0) ** 2 + (at[:, None] - y0) ** 2) / (2 * width**2))[None, None]

    source = torch.tensor([[1.25, 0, -0.5], [0, 1.25, 1.0], [0, 0, 1]], dtype=torch.float64)[None]
    # The output at p shows the input at 1.25 p + (-0.5, 1): a bump at (2, -1) appears at (2.5, -2) / 1.25.
    inner = (..., slice(6, -6), slice(6, -6))  # the rim shows the mirrored bump too
    moved, expected = resample(bump(2, -1, 4), source)[inner], bump(2.0, -1.6, 4 / 1.25)[inner]
    torch.testing.assert_close(moved, expected, rtol=0, atol=0.01)
    assert (moved - bump(2.5, -1.6, 4 / 1.25)[inner]).abs().max() > 0.05  # half a pixel would be seen


@pytest.mark.parametrize("size", [1, 2, 5])
def test_mirror(size):
    expected = np.pad(np.arange(size), 3 * size, mode="reflect") if size > 1 else np.zeros(7, dtype=int)
    assert mirror(torch.arange(-3 * size, 4 * size), size).tolist() == expected.tolist()


def test_whole_pixel_moves_by_hand():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    draws = Script([[0.999, 0.0], [0]])  # far right, far down
    out, labels = AugmentPipe(translate_int=1, translate_int_max=0.25)(image, draws)
    assert labels.tolist() == [[1, -1]]
    assert out[0, 0].tolist() == [[5, 4, 5, 6], [1, 0, 1, 2], [5, 4, 5, 6], [9, 8, 9, 10]]
    for turn in range(4):
        out, labels = AugmentPipe(rotate_int=1)(image, Script([[turn], [0]]))
        assert torch.equal(out, torch.rot90(image, turn, (2, 3)))
        assert labels.tolist() == [[float(turn in (1, 2)), float(turn in (2, 3))]]


def test_colour_by_hand():
    image = torch.tensor([0.5, 0.1, -0.3]).reshape(1, 3, 1, 1)  # its grey level is 0.1

    def colour(name: str, *values: float, **constants: float) -> list[float]:
        pipe = AugmentPipe(**{name: 1, **constants})
        out, _ = pipe(image, Script([[value] for value in values]))
        return out.flatten().tolist()

    assert colour("brightness", 2.0, 0) == pytest.approx([0.9, 0.5, 0.1])
    assert colour("contrast", 2.0, 0) == pytest.approx([1.0, 0.2, -0.6])
    assert colour("lumaflip", 1, 0) == pytest.approx([0.3, -0.1, -0.5])
    assert colour("saturation", 1.0, 0) == pytest.approx([0.9, 0.1, -0.7])
    # 120 degrees: the channels move on
    assert colour("hue", 0.5 + 1 / 3, 0) == pytest.approx([-0.3, 0.5, 0.1], abs=1e-6)
    assert colour("hue", 0.5 + 1 / 6, 0, hue_max=2) == pytest.approx([-0.3, 0.5, 0.1], abs=1e-6)


def test_colour_of_grey_images_and_odd_channels():
    out, _ = AugmentPipe(brightness=1, hue=1, saturation=1)(
        torch.full((1, 1, 2, 2), 0.3), Script([[1.0], [0], [0.8], [0], [1.0], [0]])
    )
    assert out.flatten().tolist() == pytest.approx([0.5] * 4)  # a grey pixel has no hue to change
    with pytest.raises(ValueError, match="1 or 3 channels"):
        AugmentPipe(hue=1)(torch.zeros(2, 2, 4, 4))


def test_probability():
    pipe = AugmentPipe(p=0.25, yflip=1, scale=2)
    torch.manual_seed(0)
    labels = pipe(torch.zeros(4000, 1, 2, 2))[1]
    assert (labels[:, 1] != 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (labels[:, 0] != 0).float().mean().item() == pytest.approx(0.125, abs=0.02)
    pipe.p = 0.0
    assert not pipe(torch.zeros(100, 1, 2, 2))[1].any()


def test_an_image_does_not_depend_on_its_batch():
    """What a step's images become is the same however the batch is cut."""
    pipe = AugmentPipe(**EVERYTHING)
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    whole, labels = pipe(images, StepDraws(3, 5, 6, "cpu").part(0, 6))
    draws = StepDraws(3, 5, 6, "cpu")
    parts = [pipe(images[start:stop], draws.part(start, stop)) for start, stop in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole, rtol=0, atol=2e-6)
    assert (whole - images).abs().mean() > 0.1


def test_not_square_images():
    images = torch.rand(2, 3, 8, 16)
    pipe = AugmentPipe(**{**EVERYTHING, "rotate_int": 0})
    assert pipe(images)[0].shape == images.shape
    pipe.p = 0
    pipe.xflip = 0
    torch.testing.assert_close(pipe(images)[0], images, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="square"):
        AugmentPipe(rotate_int=1)(images)
    with pytest.raises(ValueError, match="float images"):
        pipe(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_any_device_and_no_waiting_for_it():
    """The meta device refuses tensors of another device as well as any look at a value."""
    images, labels = AugmentPipe(**EVERYTHING)(torch.zeros(4, 3, 16, 16, device="meta"))
    assert images.shape == (4, 3, 16, 16) and labels.shape == (4, 19)
    assert images.device.type == labels.device.type == "meta"


class Script:
    """A RandomSource that hands out given numbers: the rows in turn, whatever is asked for."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows = iter(rows)

    def rand(self, *shape: int, batch_dim: int = 0) -> torch.Tensor:
        assert shape[batch_dim] == 1
        return torch.tensor(next(self.rows), dtype=torch.float32).reshape(shape)

    randn = rand

    def randint(self, high: int, *shape: int, batch_dim: int = 0) -> torch.Tensor:
        values = self.rand(*shape, batch_dim=batch_dim).long()
        assert int(values.max()) < high
        return values
