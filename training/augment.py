"""Non-leaking augmentation: random geometry and colour, and labels by which the network knows what was done.

Sources: the pipeline of Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (appendix B),
with the labels of Karras et al. 2022 (appendix F.2). Without labels a network would learn to make turned and stretched
images; with them it learns that all-zero labels mean the data as it is.

A tuple of random draws decides for each image alone, so the result doesn't depend on which images share a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .draws import RandomSource

# Low-pass decomposition filter of the sym6 wavelet (Daubechies 1992, table 6.3), an orthonormal filter with sum
# sqrt(2). Orthonormal means: filtering up and back down with nothing in between gives the image itself.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
DELAY = 5  # the tap at the filter's visual centre: sample m of the twice as fine image lies at pixel coordinate m / 2


@dataclass(eq=False)
class AugmentPipe:
    """Random operations on images, each with a multiplier that is 0 when the operation is off.

    An operation fires for an image with probability min(multiplier * p, 1). `pipe(images)` returns the images and
    their labels, `label_dim` numbers each, which are zero for what did not fire.

    The `_std` and `_max` arguments set how strong it is; scale factors are 2 to the power of a normal number.
    """

    p: float = 1
    # These move pixels exactly: flips, quarter turns, shifts by whole pixels.
    xflip: float = 0
    yflip: float = 0
    rotate_int: float = 0
    translate_int: float = 0
    translate_int_max: float = 0.125
    # These resample the image once, all together; `aniso` stretches it along an axis.
    scale: float = 0
    rotate_frac: float = 0
    aniso: float = 0
    translate_frac: float = 0
    scale_std: float = 0.2
    rotate_frac_max: float = 1
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125
    # These are one affine map of the colours.
    brightness: float = 0
    contrast: float = 0
    lumaflip: float = 0
    hue: float = 0
    saturation: float = 0
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    hue_max: float = 1
    saturation_std: float = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            setattr(self, field.name, float(getattr(self, field.name)))

    @property
    def label_dim(self) -> int:
        """Columns of the labels, which is the `augment_dim` a network needs."""
        one = (self.xflip, self.yflip, self.scale, self.brightness, self.contrast, self.lumaflip, self.saturation)
        two = (self.rotate_int, self.translate_int, self.rotate_frac, self.aniso, self.translate_frac, self.hue)
        return sum(multiplier > 0 for multiplier in one) + 2 * sum(multiplier > 0 for multiplier in two)

    def __call__(self, images: Tensor, draws: RandomSource | None = None) -> tuple[Tensor, Tensor]:
        """Float images [N, C, H, W] -> (augmented images, labels float32 [N, label_dim]).

        `draws` gives the random numbers; without it they come from torch's default generator, in EDM's order. An
        operation that is off draws nothing. Nothing waits for the device. Colours need C = 1 or 3, quarter turns
        H = W; otherwise ValueError.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"expected float images [N, C, H, W], not {images.dtype} {list(images.shape)}")
        draws = RandomSource(images.device) if draws is None else draws
        columns: list[Tensor] = []
        images = self._move_pixels(images, draws, columns)
        maps = self._geometry(images, draws, columns)
        if maps:
            images = resample(images, functools.reduce(torch.matmul, maps))
        if any((self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation)):
            images = recolour(images, self._colours(images, draws, columns))
        if not columns:
            return images, torch.zeros(len(images), 0, device=images.device)
        return images, torch.stack([column.to(torch.float32) for column in columns], dim=1)

    def _gated(self, multiplier: float, values: Tensor, draws: RandomSource) -> Tensor:
        """`values` [N] or [2, N], 0 for the images for which the operation does not fire."""
        return torch.where(draws.rand(values.shape[-1]) < multiplier * self.p, values, 0)

    def _move_pixels(self, images: Tensor, draws: RandomSource, columns: list[Tensor]) -> Tensor:
        """Flips, quarter turns and whole-pixel shifts, which change no pixel's value."""
        n, _, height, width = images.shape
        for multiplier, axis in ((self.xflip, 3), (self.yflip, 2)):
            if multiplier > 0:
                flip = self._gated(multiplier, draws.randint(2, n), draws)
                images = torch.where(_each(flip) == 1, images.flip(axis), images)
                columns += [flip]
        if self.rotate_int > 0:
            if height != width:
                raise ValueError(f"quarter turns need square images, not {height} x {width}")
            turn = self._gated(self.rotate_int, draws.randint(4, n), draws)
            mirror_x, mirror_y = (turn == 1) | (turn == 2), (turn == 2) | (turn == 3)
            images = torch.where(_each(mirror_x), images.flip(3), images)
            images = torch.where(_each(mirror_y), images.flip(2), images)
            images = torch.where(_each(turn % 2 == 1), images.transpose(2, 3), images)
            columns += [mirror_x, mirror_y]
        if self.translate_int > 0:
            shift = self._gated(self.translate_int, draws.rand(2, n, batch_dim=1) * 2 - 1, draws)
            reach_x, reach_y = width * self.translate_int_max, height * self.translate_int_max
            right, up = (shift[0] * reach_x).round().long(), (shift[1] * reach_y).round().long()
            from_x = mirror(torch.arange(width, device=images.device) - _each(right), width)
            from_y = mirror(torch.arange(height, device=images.device)[:, None] + _each(up), height)
            images = images.gather(3, from_x.expand(images.shape)).gather(2, from_y.expand(images.shape))
            columns += [right / reach_x, up / reach_y]
        return images

    def _geometry(self, images: Tensor, draws: RandomSource, columns: list[Tensor]) -> list[Tensor]:
        """Matrices [N, 3, 3] whose product, from left to right, says where each output pixel comes from.

        Homogeneous pixel coordinates about the image's centre. The product is the inverse of what happens to the image,
        whose operations apply in the order below.
        """
        n, _, height, width = images.shape
        maps = []
        if self.scale > 0:
            size = self._gated(self.scale, draws.randn(n), draws)
            shrink = torch.exp2(-size * self.scale_std)
            maps += [_scale(shrink, shrink)]
            columns += [size]
        if self.rotate_frac > 0:
            angle = self._gated(self.rotate_frac, (draws.rand(n) * 2 - 1) * (math.pi * self.rotate_frac_max), draws)
            maps += [_rotate(angle)]
            columns += [angle.cos() - 1, angle.sin()]
        if self.aniso > 0:
            stretch, axis = draws.randn(n), (draws.rand(n) * 2 - 1) * math.pi
            stretch = self._gated(self.aniso, stretch, draws)
            axis = torch.where(draws.rand(n) < self.aniso_rotate_prob, axis, 0)
            factor = torch.exp2(stretch * self.aniso_std)
            maps += [_rotate(-axis) @ _scale(1 / factor, factor) @ _rotate(axis)]
            columns += [stretch * axis.cos(), stretch * axis.sin()]
        if self.translate_frac > 0:
            shift = self._gated(self.translate_frac, draws.randn(2, n, batch_dim=1), draws)
            x, y = shift * self.translate_frac_std
            maps += [_matrix(1.0, 0.0, -x * width, 0.0, 1.0, -y * height, 0.0, 0.0, 1.0)]
            columns += [shift[0], shift[1]]
        return maps

    def _colours(self, images: Tensor, draws: RandomSource, columns: list[Tensor]) -> Tensor:
        """The affine map of colours [N, 3, 4] (matrix and offset) on RGB in [-1, 1]."""
        n = len(images)
        grey = torch.full((3, 3), 1 / 3, device=images.device)  # projection on the grey axis
        eye = torch.eye(3, device=images.device)
        matrix, offset = eye.expand(n, 3, 3), torch.zeros(n, 3, 1, device=images.device)
        if self.brightness > 0:
            value = self._gated(self.brightness, draws.randn(n), draws)
            offset = offset + value[:, None, None] * self.brightness_std
            columns += [value]
        if self.contrast > 0:
            value = self._gated(self.contrast, draws.randn(n), draws)
            factor = torch.exp2(value * self.contrast_std)[:, None, None]
            matrix, offset = matrix * factor, offset * factor
            columns += [value]
        if self.lumaflip > 0:
            flip = self._gated(self.lumaflip, draws.randint(2, n), draws)
            reflect = eye - 2 * grey * flip[:, None, None]
            matrix, offset = reflect @ matrix, reflect @ offset
            columns += [flip]
        if self.hue > 0:
            angle = self._gated(self.hue, (draws.rand(n) * 2 - 1) * (math.pi * self.hue_max), draws)
            turn = _turn_hue(angle)
            matrix, offset = turn @ matrix, turn @ offset
            columns += [angle.cos() - 1, angle.sin()]
        if self.saturation > 0:
            value = self._gated(self.saturation, draws.randn(n), draws)
            saturate = grey + (eye - grey) * torch.exp2(value * self.saturation_std)[:, None, None]
            matrix, offset = saturate @ matrix, saturate @ offset
            columns += [value]
        return torch.cat([matrix, offset], dim=2)


def resample(images: Tensor, source: Tensor) -> Tensor:
    """Moves images [N, C, H, W] by affine maps, low-pass filtered, with mirrored surroundings.

    `source` [N, 3, 3] maps a position in the output to the position in the input it shows, both in pixels from the
    centre, x to the right and y down. The image is made twice as fine with the sym6 filter, sampled bilinearly, and
    filtered down. One image's width beyond each edge is mirrored, what is farther out is zero. This fixed margin
    needs no look at the transforms (no waiting for the device) and makes an image's result its own. Where TF32 is
    allowed the matrix products use it; 10 bits of mantissa are still finer than an 8-bit image.
    """
    height, width = images.shape[2:]
    up_y, down_y = _filters(height, images.device, images.dtype)
    up_x, down_x = _filters(width, images.device, images.dtype)
    fine = up_y @ images @ up_x.T
    x = _fine_positions(width, images.device)[None, :]
    y = _fine_positions(height, images.device)[:, None]
    a = source[:, :, :, None, None]
    from_x = a[:, 0, 0] * x + a[:, 0, 1] * y + a[:, 0, 2]
    from_y = a[:, 1, 0] * x + a[:, 1, 1] * y + a[:, 1, 2]
    # Pixel position -> fraction of the fine image, -1 .. 1: two samples a pixel, the first of each pair on the pixel.
    grid = torch.stack([(4 * from_x - 1) / fine.shape[3], (4 * from_y - 1) / fine.shape[2]], dim=3)
    sampled = torch.nn.functional.grid_sample(fine, grid.to(fine.dtype), padding_mode="zeros", align_corners=False)
    return down_y @ sampled @ down_x.T


def recolour(images: Tensor, colours: Tensor) -> Tensor:
    """Applies affine colour maps [N, 3, 4] to images [N, C, H, W]; grey images keep the mean of what grey becomes."""
    channels = images.shape[1]
    if channels == 1:
        colours = colours.mean(dim=1, keepdim=True)
        colours = torch.cat([colours[:, :, :3].sum(dim=2, keepdim=True), colours[:, :, 3:]], dim=2)
    elif channels != 3:
        raise ValueError(f"colours can be changed in images of 1 or 3 channels, not {channels}")
    colours = colours.to(images.dtype)
    return (colours[:, :, :-1] @ images.flatten(2) + colours[:, :, -1:]).reshape(images.shape)


def mirror(index: Tensor, size: int) -> Tensor:
    """Folds any whole-number positions back into 0 .. size - 1, mirrored at the first and last pixel."""
    last = size - 1
    return last - (last - index % max(2 * last, 1)).abs()


@functools.lru_cache(maxsize=16)
def _filters(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices (up, down) that filter one axis: mirrored and twice as fine [6 size - 4, size], and back down
    [size, 2 size + 10] from the samples at `_fine_positions`."""
    taps = np.array(SYM6) / np.sum(SYM6)
    mirrored = mirror(torch.arange(1 - size, 2 * size - 1), size).numpy()
    up = np.zeros((2 * len(mirrored) + len(taps), size))
    for place, pixel in enumerate(mirrored):
        up[2 * place : 2 * place + len(taps), pixel] += 2 * taps  # every other fine sample is new, hence the 2
    up = up[DELAY : DELAY + 2 * len(mirrored)]
    down = np.zeros((size, 2 * size + 10))
    for pixel in range(size):
        down[pixel, 2 * pixel : 2 * pixel + len(taps)] = taps
    with torch.inference_mode(False):  # the cache may be filled while sampling and used while training
        return torch.tensor(up, dtype=dtype, device=device), torch.tensor(down, dtype=dtype, device=device)


def _fine_positions(size: int, device: torch.device) -> Tensor:
    """Positions, in pixels from the centre, of the fine samples that `size` output pixels need: [2 size + 10]."""
    return (torch.arange(2 * size + 10, device=device) - DELAY) / 2 - (size - 1) / 2


def _each(values: Tensor) -> Tensor:
    """A number for each image [N], as it broadcasts against images."""
    return values[:, None, None, None]


def _matrix(*entries: Tensor | float) -> Tensor:
    """[N, 3, 3] from nine entries, row by row, that are numbers or tensors [N]."""
    like = next(entry for entry in entries if isinstance(entry, Tensor))
    same = [entry if isinstance(entry, Tensor) else torch.full_like(like, entry) for entry in entries]
    return torch.stack(same, dim=1).reshape(-1, 3, 3)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    return _matrix(x, 0.0, 0.0, 0.0, y, 0.0, 0.0, 0.0, 1.0)


def _rotate(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return _matrix(cos, -sin, 0.0, sin, cos, 0.0, 0.0, 0.0, 1.0)


def _turn_hue(angle: Tensor) -> Tensor:
    """Rotation [N, 3, 3] of RGB about the grey axis (Rodrigues' formula; a rotation by a cyclic shift at 120 deg)."""
    cos, sin = angle.cos(), angle.sin() / math.sqrt(3)
    same, other = (1 + 2 * cos) / 3, (1 - cos) / 3
    back, forth = other - sin, other + sin
    return _matrix(same, back, forth, forth, same, back, back, forth, same)


# ----------------------------------------------------------------------------------------------------------------------
# How losses use it


def augment_batch(
    net: Any, images: Tensor, pipe: Callable[..., tuple[Tensor, Tensor]] | None, draws: RandomSource
) -> tuple[Tensor, Tensor | None]:
    """Augmented images [N, C, H, W] and their labels [N, augment_dim]; None for a network that reads no such labels.

    Without a pipe, a network that reads augmentation labels gets zeros: the same function as none at all, and the
    weights that read them stay part of the graph.
    """
    if pipe is not None:
        return pipe(images, draws)
    reader = getattr(getattr(net, "model", None), "map_augment", None)
    return images, images.new_zeros([len(images), reader.weight.shape[1]]) if reader is not None else None


def call_network(net: Any, x: Tensor, sigma: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
    """D(x; sigma), with augmentation labels for a network that reads them."""
    extra = {} if augment_labels is None else {"augment_labels": augment_labels}
    denoised: Tensor = net(x, sigma, labels, **extra)
    return denoised
