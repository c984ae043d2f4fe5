"""Mean and covariance of features: of a data set, of images as they come, from and to files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.atomic import atomic_write
from dnnlib.errors import UserError, printable
from dnnlib.util import count, forgotten_if_bad, open_url
from formats.pickle_reader import StoredArray, read_arrays
from torch_utils import distributed as dist
from torch_utils.progress import show_progress
from training.dataset import Dataset, ImageFolderDataset
from training.sampling import own_batches

from .detectors import INCEPTION, Detector
from .frechet import Array, checked_moments, frechet_distance
from .images import open_images, read_images
from .inception import FEATURES

COLLAPSED = 0.01  # of the reference's variance: images with less are all alike
MAX_ARRAY_BYTES = 8 * FEATURES**2 + (1 << 16)  # Inception's covariance, and numpy's header
MAX_PICKLE_BYTES = 8 * MAX_ARRAY_BYTES  # edm2's hold those of two detectors
ARRAYS = ("mu", "sigma", "num", "detector")  # what is read of an npz


@dataclass(frozen=True, eq=False)
class Stats:
    """What a set of images looks like to a detector.

    mu [D], sigma [D, D]: mean and covariance of the features, float64. num: how many images (None: unknown).
    detector_id: what made the features; statistics of two detectors have nothing to do with each other.
    """

    mu: Array
    sigma: Array
    num: int | None
    detector_id: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an npz file: EDM's `mu` and `sigma`, besides `num` and `detector`."""
        arrays: dict[str, Any] = {"mu": self.mu, "sigma": self.sigma, "detector": np.str_(self.detector_id)}
        if self.num is not None:
            arrays["num"] = np.int64(self.num)
        with atomic_write(path) as file:
            np.savez(file, **arrays)

    @staticmethod
    def load(source: str | os.PathLike[str]) -> Stats:
        """Reads the file at a path or URL: an npz, or edm2's pickle, of whose statistics those of `fid` are taken.

        One without `detector` is EDM's (pytorch-fid's, guided-diffusion's), so it comes from Inception. Raises
        UserError for a file that is missing, neither of the two, lacks mu or sigma, or holds NaN or odd shapes.
        """
        if os.path.isdir(source):
            raise UserError(f"{source}: is a folder, not statistics; fid.py ref makes such a file from a data set")
        with forgotten_if_bad(source), open_url(source, kind="statistics") as file:
            is_pickle = file.read(1) == b"\x80"
            file.seek(0)
            try:
                arrays = _from_pickle(file, source) if is_pickle else _from_npz(file)
                num = int(arrays["num"].item()) if "num" in arrays else None
                detector = str(arrays["detector"].item()) if "detector" in arrays else INCEPTION
            except Exception as exc:  # damage shows in many ways: ValueError, BadZipFile, zlib.error, MemoryError
                kind = "pickle of plain arrays, as edm2 writes them" if is_pickle else "npz file of plain arrays"
                reason = f" ({exc})" if "pickle" not in str(exc) else ""  # numpy would advise to run what is in there
                raise UserError(f"{source}: not a readable {kind}{reason}") from exc
        missing = " and no ".join(name for name in ("mu", "sigma") if name not in arrays)
        if missing:
            raise UserError(f"{source}: has no {missing}; fid.py ref makes such a file from a data set")
        if max((0, *np.shape(arrays["mu"]), *np.shape(arrays["sigma"]))) > FEATURES:
            raise UserError(f"{source}: statistics of more than {FEATURES} features, which no detector makes")
        mu, sigma = checked_moments(arrays["mu"], arrays["sigma"], str(source))
        return Stats(mu, sigma, num, detector)


def _from_npz(file: IO[bytes]) -> dict[str, Array]:
    content = np.load(file, allow_pickle=False)
    if not isinstance(content, np.lib.npyio.NpzFile):
        raise ValueError("a single array; statistics are mu and sigma")
    archive: Any = content.zip
    for entry in archive.infolist():
        if entry.filename.removesuffix(".npy") in ARRAYS and entry.file_size > MAX_ARRAY_BYTES:
            raise ValueError(f"{entry.filename} claims {entry.file_size} bytes")
    return {name: content[name] for name in ARRAYS if name in content}


def _from_pickle(file: IO[bytes], source: object) -> dict[str, Array]:
    """Of edm2's {'fid': {'mu': ..., 'sigma': ...}, 'fd_dinov2': ...}, or of one such inner dict, the arrays."""
    if os.fstat(file.fileno()).st_size > MAX_PICKLE_BYTES:
        raise ValueError(f"larger than {MAX_PICKLE_BYTES} bytes")
    found = read_arrays(file.read())
    if isinstance(found, dict) and "fid" in found:
        others = printable(", ".join(str(name) for name in found if name != "fid"), 100)
        if others:
            dist.print0(f"note: {printable(source)}: its statistics fid are used, {others} not", file=sys.stderr)
        found = found["fid"]
    if not isinstance(found, dict):
        raise ValueError("something else than a dict")
    return {name: found[name].value for name in ("mu", "sigma") if isinstance(found.get(name), StoredArray)}


def frechet_between(a: Stats, b: Stats) -> float:
    """The Fréchet distance between two sets of images. Raises UserError if they come from two detectors."""
    check_same_detector(a.detector_id, b.detector_id)
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def check_same_detector(images: str, reference: str) -> None:
    """Raises UserError, naming both, unless the two detector ids are the same."""
    if images != reference:
        raise UserError(
            f"statistics of two detectors can't be compared: {images} for the images, {reference} for the reference; "
            "name the reference's own with --detector, or make the reference again with this one (fid.py ref)"
        )


def check_reference(reference: Stats, detector: Detector) -> None:
    """Raises UserError unless `reference` can be compared with what `detector` will find."""
    check_same_detector(detector.id, reference.detector_id)
    if len(reference.mu) != detector.dim:
        raise UserError(
            f"the reference holds statistics of {len(reference.mu)} features, the detector {detector.id} makes "
            f"{detector.dim}; make the reference again (fid.py ref)"
        )


def note_if_collapsed(images: Stats, reference: Stats, source: object) -> None:
    """One line on standard error where the images are all alike; their distance is a number all the same."""
    if np.trace(images.sigma) < COLLAPSED * np.trace(reference.sigma):
        little = f"less than {COLLAPSED:.0%} of the reference's variance"
        dist.print0(f"warning: {source} has collapsed: its images are all alike, with {little}", file=sys.stderr)


class FeatureStatistics:
    """Sums of features and of their products, in float64, from which mean and covariance follow."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros([], dtype=torch.int64, device=device)
        self.total = torch.zeros([dim], dtype=torch.float64, device=device)
        self.products = torch.zeros([dim, dim], dtype=torch.float64, device=device)

    def append(self, features: Tensor) -> None:
        """Adds features [N, dim] of any float type."""
        features = features.to(self.total)
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.products += features.T @ features

    def reduce(self) -> None:
        """Adds up the sums of all processes, on each of them. To be called once, after the last `append`."""
        dist.barrier()  # shares of the work may end hours apart
        dist.all_reduce_sum([self.count, self.total, self.products])

    def mean_cov(self) -> tuple[Array, Array, int]:
        """(mean [dim], covariance [dim, dim] with divisor N - 1, N). Raises UserError for N < 2, NaN and infinities."""
        num = int(self.count)
        if num < 2:
            raise UserError(f"found {count(num, 'image')}; a covariance needs at least 2")
        mu = self.total / num
        sigma = (self.products - torch.outer(mu, mu) * num) / (num - 1)
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise UserError("the features of some images are NaN or infinite: the detector can't measure these images")
        return mu.cpu().numpy(), sigma.cpu().numpy(), num


def statistics_of_images(batches: Iterable[Tensor], detector: Detector, *, warn: bool = True) -> Stats:
    """Statistics of images given in batches uint8 [n, C, H, W]; each process brings its own share, all get the result.

    warn: one line on standard error where there are too few images for the number of features.
    """
    sums = FeatureStatistics(detector.dim, detector.device)
    for images in batches:
        sums.append(detector(images))
    return _result(sums, detector, warn)


def _result(sums: FeatureStatistics, detector: Detector, warn: bool = True) -> Stats:
    sums.reduce()
    mu, sigma, num = sums.mean_cov()
    if warn and num <= detector.dim:
        dist.print0(
            f"warning: {num} images are few for {detector.dim} features: the covariance has not its full rank, and the "
            "distance comes out too large; compare it only with distances of equally many images",
            file=sys.stderr,
        )
    return Stats(mu, sigma, num, detector.id)


def statistics_of_dataset(
    path: str | os.PathLike[str], detector: Detector, *, num: int | None = None, seed: int = 0, batch: int = 64
) -> Stats:
    """Statistics of the images in a folder, a zip or an npz of samples, the work being shared among the processes.

    num: use so many images, drawn with `seed` as EDM draws them; fewer is an error. None: all.
    """
    with closing(open_images(path, max_size=num, random_seed=seed)) as dataset:
        if num is not None and len(dataset) < num:
            raise UserError(
                f"{path}: found {count(len(dataset), 'image')}, fewer than the {num} asked for"
                + (f"; set --num-images={len(dataset)}" if len(dataset) > 1 else "")
            )
        for note in dataset.notes:
            dist.print0(f"note: {printable(note)}", file=sys.stderr)
        return statistics_of_images((images for _, images in _own_images(dataset, path, batch)), detector)


def dataset_against_itself(
    path: str | os.PathLike[str], detector: Detector, *, draws: int, images: int, seed: int = 0, batch: int = 64
) -> tuple[Stats, list[float]]:
    """What `statistics_of_dataset` finds, and how far images drawn from the data set are from all of it, in one pass.

    Returns (statistics of all images, one Fréchet distance per draw). Draw i takes `images` (2 or more) of them at
    random, with replacement, keyed by (seed, i): what a network that had memorised the data would come to, were it
    measured by as many images. A Fréchet distance of samples is too large by about c (1/n + 1/m), for n images
    against m; here by c/n, which nothing that is measured by n images can be expected to go below.
    """
    everything, *drawn = (FeatureStatistics(detector.dim, detector.device) for _ in range(1 + draws))
    with closing(ImageFolderDataset(path)) as dataset:
        num = len(dataset)
        generators = [np.random.default_rng([seed, index]) for index in range(draws)]
        times = [np.bincount(rng.integers(num, size=images), minlength=num) for rng in generators]  # has each image
        for indices, pixels in _own_images(dataset, path, batch):
            features = detector(pixels)
            everything.append(features)
            for part, counts in zip(drawn, times, strict=True):
                chosen = np.repeat(np.arange(len(features)), counts[indices])
                if len(chosen):
                    part.append(features[torch.from_numpy(chosen).to(features.device)])
    stats = _result(everything, detector)
    for part in drawn:
        part.reduce()
    distances = dist.from_rank0(  # minutes for Inception
        lambda: [frechet_distance(*part.mean_cov()[:2], stats.mu, stats.sigma) for part in drawn]
    )
    return stats, distances


def _own_images(dataset: Dataset, path: object, batch: int) -> Iterator[tuple[list[int], Tensor]]:
    """This process's share of a data set: indices, and their images uint8 [n, C, H, W]. Shows progress."""
    num = len(dataset)
    if num < 2:
        raise UserError(f"{path}: found {num} image; statistics need at least 2")
    share = own_batches(range(num), batch)
    return zip(share, with_progress(read_images(dataset, share), num), strict=True)


def load_reference(source: str | os.PathLike[str]) -> Stats:
    """`Stats.load` under several processes: one download, and a failure on all of them."""
    return dist.rank0_first(lambda: Stats.load(source))


def with_progress(batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
    """Passes the batches on; rank 0's standard error shows how far all processes are, of `total` images."""
    return show_progress(batches, len, total, partial(dist.print0, file=sys.stderr))
