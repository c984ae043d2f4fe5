"""Where dataset_tool.py takes images from: folders, zip archives, CIFAR-10, MNIST, digits. Imports no torch."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnnlib.errors import UserError
from dnnlib.util import open_file
from training.dataset import PackedFiles
from training.decoding import decode_image

from .pickle_reader import ContentError, read_arrays

CIFAR10_IMAGES = 50_000
PARTS = ("train", "training", "val", "valid", "validation", "test", "testing")  # names of folders that are no classes
MAX_UNPACKED = 1 << 28  # bytes; a file of the real archives unpacks to far less


@dataclass(frozen=True)
class Picture:
    """One image of a source: its name for messages, uint8 [H, W, C] with C = 1 or 3 (None: it can't be read, for the
    reason in `problem`), its label as it goes to JSON, and which of training.decoding.REMARKS hold."""

    name: str
    pixels: np.ndarray | None
    label: int | list[float] | None = None
    remarks: Sequence[str] = ()
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """`count` pictures, read one by one; `note` is where labels come from, `folders` are the classes' if they do,
    `remarks` are further lines to print."""

    count: int
    pictures: Iterable[Picture]
    note: str = ""
    folders: Sequence[str] = ()
    remarks: Sequence[str] = ()


def open_source(source: str, limit: int | None = None, by_name: bool = False) -> Source:
    """The pictures behind --source. Raises UserError if there is nothing to be read.

    limit: how many images have labels at least. by_name: class folders are never in the order of numbers.
    """
    if source == "digits":
        return read_digits()
    if not os.path.exists(source):
        raise UserError(f"--source={source}: no such file or folder")
    inside = os.listdir(source) if os.path.isdir(source) else []
    if "cifar-10-batches-py" in inside:
        return read_cifar10(os.path.join(source, "cifar-10-batches-py"))
    if source.endswith((".tar.gz", ".tgz", ".tar")) or "data_batch_1" in inside:
        return read_cifar10(source)
    if os.path.isfile(source) and "idx3" in _spelling(os.path.basename(source)):
        return read_mnist(source)
    return read_packed(source, limit, by_name)


def read_packed(path: str, limit: int | None = None, by_name: bool = False) -> Source:
    """Image files of a folder (with its sub-folders) or zip archive, in plain string order of their names.

    Labels come from dataset.json, or else from the names of top-level folders, if there are several and every image is
    in one. Classes are in string order (EDM's), or by number where all names are numbers, unless `by_name`.
    """
    files = PackedFiles(path)
    names = files.image_names()
    if not names:
        raise files.no_images()
    labels: dict[str, Any] | None = None
    classes: list[str] = []
    remarks = files.notes()
    if "dataset.json" in files.names:
        labels = files.labels()
        note = "labels from dataset.json" if labels else "no labels: dataset.json has none"
        if labels:
            files.check_labels(labels, names[:limit])
    else:
        tops = {name: name.partition("/")[0] if "/" in name else "" for name in names}
        folders = sorted({*tops.values()})
        if folders == [""]:
            note = "no labels: there is neither a dataset.json nor a folder for each of several classes"
        elif not folders[0]:
            stray = next(name for name in names if not tops[name])
            note = f"no labels: {stray} lies in no class's folder, so those of all are dropped"
        elif len(folders) == 1:
            note = f"no labels: all images lie in one folder, {folders[0]}; several would be classes"
        else:
            are_numbers = all(re.fullmatch("[0-9]{1,18}", folder) for folder in folders)
            classes = sorted(folders, key=int) if are_numbers and not by_name else folders
            note = "labels from top-level folders"
            if classes != folders:
                order = f"{_some(classes)}; in EDM it is that of names: {_some(folders)}"
                remarks.append(f"classes are in the order of their numbers: {order} (--class-order=name)")
            if len(parts := [top for top in classes if top.lower() in PARTS]) > 1:
                advice = "if they are parts of one set, convert one at a time"
                remarks.append(f"note: {_some(parts)} count as classes; {advice}")
            number = {folder: index for index, folder in enumerate(classes)}
            labels = {name: number[top] for name, top in tops.items()}

    def pictures() -> Iterator[Picture]:
        for name in names:
            if labels and labels.get(name) is None:  # beyond the first `limit` images
                files.check_labels(labels, names)
            found = list[str]()
            try:
                pixels = decode_image(files.read(name), files.where(name), found)
            except (UserError, OSError) as exc:
                yield Picture(name, None, problem=str(exc))
            else:
                yield Picture(name, pixels, labels[name] if labels else None, found)

    return Source(len(names), pictures(), note, classes, remarks)


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:10]) + (", ..." if len(words) > 10 else "")


def read_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits: 8x8, grey, ten classes. They travel inside that package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 ... 16
    labels = digits.target.tolist()
    pictures = (Picture(f"digit {i}", image[:, :, None], labels[i]) for i, image in enumerate(images))
    return Source(len(images), pictures, "labels: the digits")


def read_cifar10(path: str) -> Source:
    """The five training batches of cifar-10-python.tar.gz, or of its folder when it is unpacked."""
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    content: dict[str, bytes] = {}
    if os.path.isdir(path):
        for name in {*batches}.intersection(os.listdir(path)):
            content[name] = _unpacked(os.path.join(path, name))
    else:
        try:  # unpacked in one piece: tarfile would take as much memory as a header announces
            with tarfile.open(fileobj=io.BytesIO(_unpacked(path)), mode="r:") as archive:
                for member in archive:
                    name = os.path.basename(member.name)
                    if member.isreg() and name in batches and (file_of := archive.extractfile(member)) is not None:
                        content[name] = file_of.read()
        except (tarfile.TarError, EOFError, ValueError) as exc:
            raise UserError(f"{path} is not a whole tar archive: {exc}") from exc
    if missing := {*batches} - {*content}:
        raise UserError(f"{path}: {min(missing)} is missing; is it CIFAR-10's Python version, and whole?")
    parts = [_cifar_batch(content[name], f"{name} in {path}") for name in batches]
    labels = [label for _, classes in parts for label in classes]
    if len(labels) != CIFAR10_IMAGES:
        raise UserError(f"{path} holds {len(labels)} training images instead of CIFAR-10's {CIFAR10_IMAGES}")
    pixels = np.concatenate([part for part, _ in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    pictures = (Picture(f"image {i}", image, labels[i]) for i, image in enumerate(pixels))
    return Source(len(labels), pictures, "labels: CIFAR-10's")


def _cifar_batch(data: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """One batch, a pickled dict: uint8 [n, 3072] and n classes."""
    try:
        batch = read_arrays(data)
    except ContentError as exc:
        raise UserError(f"{where} is damaged, or no table of images: it {exc}") from exc
    found = batch if isinstance(batch, dict) else {}
    pixels, labels = (getattr(found.get(name), "value", found.get(name)) for name in ("data", "labels"))
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * 32 * 32,):
        raise UserError(f"{where}: 'data' is not a table of bytes, 3072 for each image")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(x in range(10) for x in labels):
        raise UserError(f"{where}: 'labels' is not a list of {len(pixels)} classes 0 ... 9")
    return pixels, labels


def _spelling(name: str) -> str:
    """train-images-idx3-ubyte.gz, train-images.idx3-ubyte: the same name."""
    return re.sub("[-._]", "", name.lower().removesuffix(".gz"))


def read_mnist(path: str) -> Source:
    """MNIST and its relatives: ...-images-idx3-ubyte.gz with ...-labels-idx1-ubyte.gz beside it, padded to 32x32."""
    folder, name = os.path.split(path)
    wanted = re.sub("images(.*)idx3", r"labels\1idx1", name, flags=re.IGNORECASE)
    beside = [file for file in os.listdir(folder or ".") if _spelling(file) == _spelling(wanted) != _spelling(name)]
    if not beside:
        raise UserError(f"{path}: the labels, {wanted}, must lie beside it")
    labels_name = wanted if wanted in beside else min(beside)
    images, labels = _read_idx(path, axes=3), _read_idx(os.path.join(folder, labels_name), axes=1)
    if len(labels) != len(images) or images.shape[1:] != (28, 28):
        raise UserError(f"{path} holds {list(images.shape)} pixels for {len(labels)} labels; expected N of 28x28 for N")
    images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    pictures = (Picture(f"image {i}", image[:, :, None], int(labels[i])) for i, image in enumerate(images))
    return Source(len(images), pictures, f"labels from {labels_name}")


def _read_idx(path: str, axes: int) -> np.ndarray:
    """A file of bytes in LeCun's idx format, packed with gzip or not: uint8 with so many axes."""
    data = _unpacked(path)
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes([0, 0, 8, axes]):
        raise UserError(f"{path} is not an idx file of bytes with {axes} axes")
    shape = [int(size) for size in np.frombuffer(data, ">u4", axes, offset=4)]
    count = int(np.prod(shape, dtype=object))
    if len(data) != start + count or not count:
        raise UserError(f"{path} holds {len(data) - start} bytes for {shape}: it is cut short or not what it says")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _unpacked(path: str) -> bytes:
    """The content of a file that is packed with gzip or not, of MAX_UNPACKED bytes at most. Raises UserError."""
    with open_file(path) as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            data = (gzip.GzipFile(fileobj=raw) if packed else raw).read(MAX_UNPACKED + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
            raise UserError(f"{path} is damaged: {exc}") from exc
    if len(data) > MAX_UNPACKED:
        raise UserError(f"{path} unpacks to more than {MAX_UNPACKED >> 20} MiB, the most of CIFAR-10 or MNIST")
    return data
