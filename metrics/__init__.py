"""How good are the images? Fréchet distances between sets of images, in the features of a detector.

`detectors` turns images into features (Inception-v3, or a small classifier of one's own), `statistics` turns features
into means and covariances, `frechet` compares those. The names below are imported when first used, so that
`import metrics` alone does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import train_detector
    from .detectors import Detector, DetectorUnavailable, load_detector
    from .frechet import frechet_distance
    from .statistics import Stats, frechet_between, statistics_of_dataset, statistics_of_images

_HOMES = {
    "train_detector": "classifier",
    "Detector": "detectors",
    "DetectorUnavailable": "detectors",
    "load_detector": "detectors",
    "frechet_distance": "frechet",
    "Stats": "statistics",
    "frechet_between": "statistics",
    "statistics_of_dataset": "statistics",
    "statistics_of_images": "statistics",
}
__all__ = [
    "Detector",
    "DetectorUnavailable",
    "Stats",
    "frechet_between",
    "frechet_distance",
    "load_detector",
    "statistics_of_dataset",
    "statistics_of_images",
    "train_detector",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
