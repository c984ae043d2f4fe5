"""Inception-v3 as the Fréchet Inception Distance uses it: the TensorFlow graph of 2015-12-05, in PyTorch.

The graph is the one of Szegedy et al. 2015 (arXiv:1512.00567) with the details of its TensorFlow export, which differ
from later versions of the same network: average pools that don't count their padding, a max pool in the last block,
1008 classes, and images resized as TensorFlow 1 did. Module names are those of the published weights file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 299
FEATURES = 2048


def resize_bilinear_tf1(images: Tensor, height: int, width: int) -> Tensor:
    """TensorFlow 1's bilinear resizing of images [N, C, H, W]: output pixel i lies at i * (old size / new size).

    No half-pixel shift and no antialiasing, so the last rows repeat the edge. float32 [N, C, height, width].
    """
    x = images.float()
    for axis, size in ((3, width), (2, height)):
        old = x.shape[axis]
        source = torch.arange(size, dtype=torch.float32, device=x.device) * (old / size)
        lower = source.long().clamp(max=old - 1)
        fraction = (source - lower).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        low, high = x.index_select(axis, lower), x.index_select(axis, (lower + 1).clamp(max=old - 1))
        x = low + (high - low) * fraction
    return x


_average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halving_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. Padding is (height, width)."""

    def __init__(
        self, cin: int, cout: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _row(cin: int, cout: int, size: int) -> Conv:
    return Conv(cin, cout, (1, size), padding=(0, size // 2))


def _column(cin: int, cout: int, size: int) -> Conv:
    return Conv(cin, cout, (size, 1), padding=(size // 2, 0))


class Block(nn.Module):
    """Branches over the same input, their outputs side by side. `branch_pool` begins with the pool.

    The layers of a branch are called after it: branch5x5_1, branch5x5_2; a single one just branch1x1. A branch may end
    in a fork: branch3x3_2a and branch3x3_2b.
    """

    def __init__(self, pool: Callable[[Tensor], Tensor], **branches: Sequence[Conv | tuple[Conv, Conv]]) -> None:
        super().__init__()
        self.pool, self.chains = pool, dict[str, list[list[str]]]()
        for branch, chain in branches.items():
            self.chains[branch] = []
            for number, layer in enumerate(chain, 1):
                name = f"{branch}_{number}" if len(chain) > 1 else branch
                layers = {name: layer} if isinstance(layer, Conv) else {f"{name}a": layer[0], f"{name}b": layer[1]}
                self.chains[branch].append([*layers])
                for each, conv in layers.items():
                    self.add_module(each, conv)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, chain in self.chains.items():
            ends = [self.pool(x) if branch == "branch_pool" else x]
            for names in chain:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            outputs += ends
        return torch.cat(outputs, dim=1)


def block_a(cin: int, pool: int) -> Block:
    """35x35."""
    return Block(
        _average_pool,
        branch1x1=[Conv(cin, 64, 1)],
        branch5x5=[Conv(cin, 48, 1), Conv(48, 64, 5, padding=2)],
        branch3x3dbl=[Conv(cin, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, padding=1)],
        branch_pool=[Conv(cin, pool, 1)],
    )


def block_b(cin: int) -> Block:
    """35x35 -> 17x17."""
    return Block(
        _halving_pool,
        branch3x3=[Conv(cin, 384, 3, stride=2)],
        branch3x3dbl=[Conv(cin, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, stride=2)],
        branch_pool=[],
    )


def block_c(cin: int, mid: int) -> Block:
    """17x17: 7x7 convolutions, each as a row and a column."""
    return Block(
        _average_pool,
        branch1x1=[Conv(cin, 192, 1)],
        branch7x7=[Conv(cin, mid, 1), _row(mid, mid, 7), _column(mid, 192, 7)],
        branch7x7dbl=[Conv(cin, mid, 1), *(side(mid, mid, 7) for side in (_column, _row, _column)), _row(mid, 192, 7)],
        branch_pool=[Conv(cin, 192, 1)],
    )


def block_d(cin: int) -> Block:
    """17x17 -> 8x8."""
    return Block(
        _halving_pool,
        branch3x3=[Conv(cin, 192, 1), Conv(192, 320, 3, stride=2)],
        branch7x7x3=[Conv(cin, 192, 1), _row(192, 192, 7), _column(192, 192, 7), Conv(192, 192, 3, stride=2)],
        branch_pool=[],
    )


def block_e(cin: int, pool: Callable[[Tensor], Tensor]) -> Block:
    """8x8: wide branches that fork at their end. The graph has two, which differ in their pool alone."""
    return Block(
        pool,
        branch1x1=[Conv(cin, 320, 1)],
        branch3x3=[Conv(cin, 384, 1), (_row(384, 384, 3), _column(384, 384, 3))],
        branch3x3dbl=[Conv(cin, 448, 1), Conv(448, 384, 3, padding=1), (_row(384, 384, 3), _column(384, 384, 3))],
        branch_pool=[Conv(cin, 192, 1)],
    )


class InceptionV3(nn.Module):
    """Images uint8 [N, 3, H, W] of any size -> the 2048 numbers behind the last pool, float32 [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = block_a(192, pool=32)
        self.Mixed_5c = block_a(256, pool=64)
        self.Mixed_5d = block_a(288, pool=64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, mid=128)
        self.Mixed_6c = block_c(768, mid=160)
        self.Mixed_6d = block_c(768, mid=160)
        self.Mixed_6e = block_c(768, mid=192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, _average_pool)
        self.Mixed_7c = block_e(2048, _max_pool)
        self.fc = nn.Linear(FEATURES, 1008)  # class scores: part of the file, of no use for the features

    def forward(self, images: Tensor) -> Tensor:
        x = (resize_bilinear_tf1(images, INPUT_SIZE, INPUT_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _halving_pool(x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = _halving_pool(x)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))
