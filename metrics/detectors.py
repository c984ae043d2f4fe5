"""Detectors: networks that turn images into the features whose statistics are compared."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.util import count, forgotten_if_bad, open_url, read_file
from torch_utils import distributed as dist
from torch_utils.misc import load_tensors

from .classifier import classifier_from_file
from .inception import FEATURES, InceptionV3

INCEPTION = "inception-2015-12-05"
"""The id of the Inception detector, and of statistics files that don't name theirs (EDM's)."""

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True, eq=False)
class Detector:
    """A feature extractor on its device.

    id: names the detector in statistics files; equal ids mean equal features.
    net: module, uint8 images [N, channels, H, W] -> float32 features [N, dim].
    resolution: the only image size it takes (H = W); None where any will do.
    """

    id: str
    net: nn.Module
    dim: int
    channels: int
    resolution: int | None
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, dim] of images uint8 [N, C, H, W], moved here if need be; grey ones count as RGB too.

        Raises UserError for images that the detector can't take.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], not {images.dtype} {tuple(images.shape)}")
        images = images.to(self.device)
        if images.shape[1] == 1 and self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != self.channels:
            channels = count(images.shape[1], "channel")
            raise UserError(f"the images have {channels}, the detector {self.id} takes {self.channels}")
        if self.resolution is not None and images.shape[2:] != (self.resolution, self.resolution):
            size = f"{images.shape[3]}x{images.shape[2]}"
            raise UserError(
                f"the images are {size}, the detector {self.id} was made for {self.resolution}x{self.resolution}"
            )
        with torch.inference_mode(), full_precision():
            return self.net(images)


def load_detector(spec: str | os.PathLike[str] = "inception", device: torch.device | str = "cpu") -> Detector:
    """The detector that `spec` names, ready on `device`.

    spec: 'inception' (downloads the published weights at first use), or the path or URL of the weights file of
    Inception, or of a file that `metrics.classifier.train_detector` wrote. Under several processes, call it on all.
    Raises UserError for a file that can't be had, or is no detector.
    """
    spec, device = os.fspath(spec), torch.device(device)
    content = dist.rank0_first(lambda: _read(spec))
    digest = hashlib.sha256(content).hexdigest()
    with forgotten_if_bad(INCEPTION_URL if spec == "inception" else spec):
        if digest == INCEPTION_SHA256:
            net: nn.Module = InceptionV3()
            net.load_state_dict(load_tensors(io.BytesIO(content)))
            detector = Detector(INCEPTION, net, FEATURES, channels=3, resolution=None, device=device)
        elif spec == "inception" or "inception" in os.path.basename(spec).lower():
            raise UserError(
                f"{spec}: not the Inception weights of 2015-12-05, or a damaged copy: its SHA-256 begins with "
                f"{digest[:8]} instead of {INCEPTION_SHA256[:8]}; fetch it again from {INCEPTION_URL}"
            )
        else:
            net = made = classifier_from_file(content, spec)
            kind = f"classifier:{digest[:16]}"
            detector = Detector(kind, net, made.dim, made.channels, made.resolution, device)
    net.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return detector


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in true float32 on CUDA, whatever the program around it chose: features must not depend on that."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


def _read(spec: str) -> bytes:
    """The content of the weights file."""
    source = INCEPTION_URL if spec == "inception" else spec
    try:
        return read_file(open_url(source, return_filename=True, kind="a detector"), "a detector")
    except UserError as exc:
        if spec != "inception":
            raise
        raise UserError(
            f"the Inception weights can't be downloaded ({exc}); name a local copy of "
            f"{os.path.basename(INCEPTION_URL)} with --detector=PATH, or measure with a small detector of your own: "
            "fid.py detector --data=ZIP --dest=FILE, then --detector=FILE for the reference (fid.py ref) and the images"
        ) from exc
