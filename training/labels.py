"""What images are conditioned on: classes or label vectors, of which each seed draws one."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UsageError, UserError
from dnnlib.util import count, read_file

from .dataset import MAX_CLASSES, Dataset, ImageFolderDataset

if TYPE_CHECKING:
    from formats.network_files import NetworkFile

    from .samplers import StackedRandomGenerator


@dataclass(frozen=True)
class Labels:
    """Labels to draw from, all with the same chance.

    values: classes int64 [K], or vectors float32 [K, label_dim], on the CPU.
    """

    values: Tensor

    def draw(self, random: StackedRandomGenerator, size: int, label_dim: int, device: torch.device | str) -> Tensor:
        """One for each seed of `random`: float32 [size, label_dim], one-hot for classes."""
        chosen = self.values.to(device)[random.randint(len(self.values), size=[size], device=device)]
        if self.values.ndim == 2:
            return chosen
        return torch.nn.functional.one_hot(chosen, label_dim).to(torch.float32)

    def plain(self, drawn: Tensor) -> list[Any]:
        """What `draw` gave as `dataset.json` has it: classes, or lists of numbers."""
        plain: list[Any] = (drawn if self.values.ndim == 2 else drawn.argmax(dim=1)).tolist()
        return plain

    def digest(self) -> str:
        """SHA-256 of the values, in hexadecimal."""
        return hashlib.sha256(self.values.numpy().tobytes()).hexdigest()


Condition = int | Sequence[float] | None
LabelSource = str | os.PathLike[str] | np.ndarray | Labels | None


def choose_labels(network: NetworkFile, class_idx: Condition = None, labels: LabelSource = None) -> Labels | None:
    """What the labels of images are drawn from; None for a network without labels.

    class_idx  a class or a list of classes; for a network that was trained with label vectors, one vector
    labels     data set or .npy file (or an array): vectors [K, label_dim] or classes [K], drawn as often as they occur

    Neither: all classes, which a network of label vectors doesn't have. Raises UsageError for what does not fit the
    network, UserError for a bad file.
    """
    dim = network.net.label_dim
    if not dim:
        if class_idx is not None:
            shown = str(class_idx).strip("[]")
            raise UsageError(f"class {shown}: this network has no classes; leave --class (class_idx) out")
        if labels is not None:
            raise UsageError("--labels: this network has no labels; leave it out")
        return None
    if labels is not None:
        if class_idx is not None:
            raise UsageError("--class and --labels exclude each other; give one of them")
        chosen = labels if isinstance(labels, Labels) else read_labels(labels)
        values = chosen.values
        if values.ndim == 1 and network.has_label_vectors:
            raise UsageError(f"--labels holds classes; this network was trained with {count(dim, 'number')} per label")
        if values.ndim == 2 and values.shape[1] != dim:
            raise UsageError(f"--labels holds vectors of {count(values.shape[1], 'number')}, this network takes {dim}")
        if values.ndim == 1 and int(values.max()) >= dim:
            raise UsageError(f"--labels holds class {int(values.max())}, this network's classes are 0 to {dim - 1}")
        return chosen
    if class_idx is None and not network.has_label_vectors:
        return Labels(torch.arange(dim))
    numbers = [] if class_idx is None else [class_idx] if isinstance(class_idx, int) else list(class_idx)
    if network.has_label_vectors:
        if len(numbers) != dim or not all(map(math.isfinite, numbers)):
            vector = ",".join(["0.5"] * min(dim, 3)) + ",..." * (dim > 3)
            raise UsageError(
                f"this network was trained with label vectors of {count(dim, 'number')}, no classes: give some to draw "
                f"from (--labels=ZIP|NPY, its data set for example), or one vector (--class={vector})"
            )
        return Labels(torch.tensor([numbers], dtype=torch.float32))
    for number in numbers:
        if number not in range(dim):
            raise UsageError(f"class {number}: this network's classes are 0 to {dim - 1}")
    if not numbers:
        raise UsageError("--class names no class at all")
    return Labels(torch.tensor([int(number) for number in numbers]))


def read_labels(source: str | os.PathLike[str] | np.ndarray) -> Labels:
    """The labels of a data set (folder or zip), of a .npy file or of an array: classes [K], or vectors [K, label_dim].

    Raises UserError for anything else.
    """
    if not isinstance(source, np.ndarray):
        path = os.fspath(source)
        if not path.lower().endswith(".npy"):
            dataset = ImageFolderDataset(path, use_labels=True)
            dataset.close()
            if not dataset.has_labels:
                raise UserError(f"--labels={path} has no labels to draw from")
            return Labels(torch.from_numpy(dataset.label_values))
        data = read_file(path, "statistics")
        try:
            source = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as exc:
            raise UserError(f"--labels={path} is no array of numbers ({exc})") from exc
    source = np.asarray(source)
    if source.ndim in (1, 2) and source.size and source.dtype.kind in "iuf":
        values = source.astype(np.float64)
        if source.ndim == 2 and (abs(values) < 3e38).all():
            return Labels(torch.from_numpy(values.astype(np.float32)))
        if source.ndim == 1 and (values == values.round()).all() and 0 <= values.min() <= values.max() < MAX_CLASSES:
            return Labels(torch.from_numpy(values.astype(np.int64)))
    raise UserError("--labels: neither classes 0, 1, 2, ... [K] nor label vectors of finite numbers [K, label_dim]")


def vector_labels(dataset: Dataset) -> Labels | None:
    """The label vectors of a data set; None where it has classes, or no labels."""
    return Labels(torch.from_numpy(dataset.label_values)) if dataset.has_label_vectors else None
