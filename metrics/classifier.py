"""A small classifier as a detector: the way to measure images where Inception does not fit or cannot be had.

Trained within seconds to minutes on a labelled data set, with everything random drawn from one seed. What it learns to
recognise the classes by, the activations before its last layer, are the features.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib.atomic import atomic_write
from dnnlib.errors import UserError
from dnnlib.util import count
from formats.state import check_archive
from torch_utils.misc import load_tensors, save_tensors
from training.dataset import ImageFolderDataset

from .images import read_images

RESOLUTIONS = (8, 64)  # smallest and largest image side
SIZES = {"resolution": RESOLUTIONS, "channels": (1, 64), "classes": (1, 4096), "dim": (1, 2048)}  # of a file
FORMAT = "edm-distill-classifier-1"
BATCH = 128
FEWEST_IMAGES = 10
MAX_IMAGES = 100_000  # of a larger data set a part is drawn: they are kept in memory


class Classifier(nn.Module):
    """Images uint8 [N, channels, resolution, resolution] -> features float32 [N, dim]; `classify` gives class scores.

    Convolutions that halve the image until its side is below 8 and double the width up to `dim`; a mean over pixels.
    """

    def __init__(self, resolution: int, channels: int, classes: int, dim: int = 128) -> None:
        super().__init__()
        self.resolution, self.channels, self.classes, self.dim = resolution, channels, classes, dim
        first = 2 if resolution > 16 else 1  # at full size, these layers would cost more than all others
        layers = [*_layer(channels, dim // 4, stride=first), *_layer(dim // 4, dim // 4)]
        width, side = dim // 4, -(-resolution // first)
        while side >= 8:
            layers += _layer(width, min(2 * width, dim), stride=2)
            width, side = min(2 * width, dim), -(-side // 2)
        self.trunk = nn.Sequential(*layers, *_layer(width, dim))
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images.float() / 127.5 - 1).mean(dim=(2, 3))

    def classify(self, images: Tensor) -> Tensor:
        """Class scores before the softmax [N, classes]."""
        return self.head(self(images))


def _layer(cin: int, cout: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, kernel_size=3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]


@dataclass(frozen=True)
class Trained:
    """What is known of a classifier besides its weights; stored in its file.

    accuracy: share of right answers on `held_out` images that it did not train on.
    """

    resolution: int
    channels: int
    classes: int
    dim: int
    seed: int
    kimg: float
    images: int
    held_out: int
    accuracy: float


def train_detector(
    data: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    seed: int = 0,
    kimg: float | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """Trains a classifier on a labelled data set (folder or zip) and writes it to the file `dest`.

    kimg: thousands of images to train for; None: what fits the resolution. The same seed and data give the same file on
    the same machine, with the same number of threads above 16x16. Raises UserError for data without class labels or of
    an unsuitable size.
    """
    images, labels, classes = _labelled_images(data, seed)
    resolution = images.shape[-1]
    if kimg is None:  # seconds at 8x8, one or two minutes at 32x32 and 64x64, on two CPU cores
        kimg = 40 if resolution <= 16 else 300 if resolution <= 32 else 150
    held_out = min(max(len(images) // 10, 1), 10_000)  # the images come shuffled
    net = fit(images[held_out:], labels[held_out:], classes, seed=seed, kimg=kimg, device=device)
    accuracy = _accuracy(net, images[:held_out], labels[:held_out], device)
    facts = Trained(resolution, images.shape[1], classes, net.dim, seed, float(kimg), len(images), held_out, accuracy)
    state = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    with atomic_write(dest) as file:
        save_tensors({"format": FORMAT, "facts": json.dumps(asdict(facts)), "state": state}, file)
    return facts


def fit(
    images: Tensor, labels: Tensor, classes: int, *, seed: int, kimg: float, device: torch.device | str = "cpu"
) -> Classifier:
    """Trains a classifier on images uint8 [N, C, R, R] with labels int64 [N]; returns it in eval mode.

    AdamW with a linear warm-up and decay; pictures shifted by up to an eighth of their side, but not mirrored, since a
    mirrored digit is no digit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(images.shape[-1], images.shape[1], classes)
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = max(math.ceil(1000 * kimg / BATCH), 1)
    order = torch.empty(0, dtype=torch.int64)
    with _reproducible(images.shape[-1]):
        for step in range(steps):
            while len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(images), generator=draws)])
            chosen, order = order[:BATCH], order[BATCH:]
            batch = _shifted(images[chosen].to(device), draws)
            scores = net.classify(batch)
            loss = F.cross_entropy(scores, labels[chosen].to(device), label_smoothing=0.1)
            done = (step + 0.5) / steps
            optimizer.param_groups[0]["lr"] = 3e-3 * min(done / 0.2, (1 - done) / 0.8)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    if not loss.isfinite():
        raise UserError("the classifier's training diverged; take another --seed or a smaller --kimg")
    return net.eval()


def _shifted(images: Tensor, draws: torch.Generator) -> Tensor:
    """The batch moved by a random number of pixels, the same for all its images; mid-grey comes in at the edge."""
    size, most = images.shape[-1], images.shape[-1] // 8
    down, right = torch.randint(0, 2 * most + 1, [2], generator=draws).tolist()
    padded = F.pad(images, [most] * 4, value=128)
    return padded[:, :, down : down + size, right : right + size].contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _accuracy(net: Classifier, images: Tensor, labels: Tensor, device: torch.device | str) -> float:
    parts = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((net.classify(x.to(device)).argmax(dim=1) == y.to(device)).sum()) for x, y in parts)
    return right / len(images)


@contextmanager
def _reproducible(resolution: int) -> Iterator[None]:
    """The same sums in the same order every time, for as long as the block runs.

    cuDNN keeps to its reproducible kernels. Small images are left to one thread: more gain little, lose much on a busy
    machine, and would make the result depend on the number of cores.
    """
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if resolution <= 16:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        threads, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
        torch.set_num_threads(threads)


def _labelled_images(data: str | os.PathLike[str], seed: int) -> tuple[Tensor, Tensor, int]:
    """(images uint8 [N, C, R, R], labels int64 [N], number of classes) in an order shuffled with `seed`."""
    smallest, largest = RESOLUTIONS
    with closing(ImageFolderDataset(data, use_labels=True, max_size=MAX_IMAGES, random_seed=seed)) as dataset:
        num, size = len(dataset), dataset.resolution
        if not dataset.has_onehot_labels:
            remedy = "(dataset_tool.py reads them from dataset.json or top-level folders)"
            raise UserError(
                f"{data}: has no class labels, which a detector learns; make a data set with labels {remedy}"
            )
        if not smallest <= size <= largest:
            sizes = f"a detector takes {smallest} to {largest} pixels a side (dataset_tool.py --resolution converts)"
            raise UserError(f"{data}: the images are {size}x{size}; {sizes}")
        if num < FEWEST_IMAGES or dataset.label_dim < 2:
            few = f"{count(num, 'image')} and {dataset.label_dim} classes are too few to train a detector"
            raise UserError(f"{data}: {few}; {FEWEST_IMAGES} images of 2 classes are the least")
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()
        images = torch.cat(list(read_images(dataset, (order[i : i + 1000] for i in range(0, num, 1000)))))
        return images, torch.from_numpy(dataset.label_values[order]), dataset.label_dim


def classifier_from_file(content: bytes, source: str) -> Classifier:
    """The classifier in the content of the file `source`. Raises UserError if there is none.

    The tensors in it must be those of the network that it declares, before memory is taken for either.
    """
    try:
        check_archive(io.BytesIO(content), limit=len(content))
        found = load_tensors(io.BytesIO(content))
        if found["format"] != FORMAT:
            raise ValueError("something else, or another version")
        facts = json.loads(found["facts"])
        sizes = {name: facts[name] for name in SIZES}
        if not all(type(sizes[name]) is int and low <= sizes[name] <= high for name, (low, high) in SIZES.items()):
            raise ValueError(f"impossible sizes {sizes}")
        with torch.device("meta"):
            net = Classifier(**sizes)
        stored = found["state"]
        declared = {name: (tensor.dtype, tensor.shape) for name, tensor in net.state_dict().items()}
        if {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} != declared:
            raise ValueError("other tensors than those of the network")
        if sum(tensor.nbytes for tensor in stored.values()) > len(content):
            raise ValueError("tensors that are larger than the file")
        net.load_state_dict({name: tensor.clone() for name, tensor in stored.items()}, assign=True)
    except Exception as exc:  # torch.load has a different one for every way in which a file can be wrong
        raise UserError(f"{source}: not a detector file, or a damaged one; fid.py detector makes them") from exc
    return net
