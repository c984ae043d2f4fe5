"""Inception-v3 as the Fréchet Inception Distance uses it: the TensorFlow graph of 2015-12-05, in PyTorch.

The graph is the one of Szegedy et al. 2015 (arXiv:1512.00567) with the details of its TensorFlow export, which differ
from later versions of the same network: average pools that don't count their padding, a max pool in the last block,
1008 classes, and images resized as TensorFlow 1 did. Module names are those of the published weights file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 299
FEATURES = 2048


def resize_bilinear_tf1(images: Tensor, height: int, width: int) -> Tensor:
    """TensorFlow 1's bilinear resizing of images [N, C, H, W]: output pixel i looks at i * (old size / new size).

    No half-pixel shift and no antialiasing, so the last rows repeat the edge. float32 [N, C, height, width].
    """
    images = _lerp(images.float(), 3, width)
    return _lerp(images, 2, height)


def _lerp(x: Tensor, axis: int, size: int) -> Tensor:
    old = x.shape[axis]
    source = torch.arange(size, dtype=torch.float32, device=x.device) * (old / size)
    lower = source.long().clamp(max=old - 1)
    upper = (lower + 1).clamp(max=old - 1)
    fraction = (source - lower).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    low, high = x.index_select(axis, lower), x.index_select(axis, upper)
    return low + (high - low) * fraction


def _average_pool(x: Tensor) -> Tensor:
    """3x3 averages at every pixel; at the edge, of those pixels alone that exist."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class FrozenBatchNorm(nn.Module):
    """Batch norm with the statistics of its training: a fixed scale and shift per channel."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(
                name, torch.ones(channels) if name in ("weight", "running_var") else torch.zeros(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001)


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. Padding is (height, width)."""

    def __init__(
        self, cin: int, cout: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = FrozenBatchNorm(cout)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _row(cin: int, cout: int, size: int) -> Conv:
    return Conv(cin, cout, (1, size), padding=(0, size // 2))


def _column(cin: int, cout: int, size: int) -> Conv:
    return Conv(cin, cout, (size, 1), padding=(size // 2, 0))


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, double 3x3 and pool branches."""

    def __init__(self, cin: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(cin, 64, 1)
        self.branch5x5_1 = Conv(cin, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(cin, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(cin, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average_pool(x))], dim=1)


class BlockB(nn.Module):
    """35x35 -> 17x17."""

    def __init__(self, cin: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(cin, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(cin, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17x17: 7x7 convolutions, each as a row and a column."""

    def __init__(self, cin: int, mid: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(cin, 192, 1)
        self.branch7x7_1 = Conv(cin, mid, 1)
        self.branch7x7_2 = _row(mid, mid, 7)
        self.branch7x7_3 = _column(mid, 192, 7)
        self.branch7x7dbl_1 = Conv(cin, mid, 1)
        self.branch7x7dbl_2 = _column(mid, mid, 7)
        self.branch7x7dbl_3 = _row(mid, mid, 7)
        self.branch7x7dbl_4 = _column(mid, mid, 7)
        self.branch7x7dbl_5 = _row(mid, 192, 7)
        self.branch_pool = Conv(cin, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average_pool(x))], dim=1)


class BlockD(nn.Module):
    """17x17 -> 8x8."""

    def __init__(self, cin: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(cin, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(cin, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8x8: wide branches that fork at their end. The graph has two, which differ in their pool alone."""

    def __init__(self, cin: int, max_pool: bool) -> None:
        super().__init__()
        self.pool = _max_pool if max_pool else _average_pool
        self.branch1x1 = Conv(cin, 320, 1)
        self.branch3x3_1 = Conv(cin, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = Conv(cin, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = Conv(cin, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        forks += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], dim=1)


class InceptionV3(nn.Module):
    """Images uint8 [N, 3, H, W] of any size -> the 2048 numbers behind the last pool, float32 [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool=32)
        self.Mixed_5c = BlockA(256, pool=64)
        self.Mixed_5d = BlockA(288, pool=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, mid=128)
        self.Mixed_6c = BlockC(768, mid=160)
        self.Mixed_6d = BlockC(768, mid=160)
        self.Mixed_6e = BlockC(768, mid=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, max_pool=False)
        self.Mixed_7c = BlockE(2048, max_pool=True)
        self.fc = nn.Linear(FEATURES, 1008)  # class scores: part of the file, of no use for the features

    def forward(self, images: Tensor) -> Tensor:
        x = (resize_bilinear_tf1(images, INPUT_SIZE, INPUT_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))
