"""Data sets of square images: a folder or zip archive of image files, with labels in `dataset.json`.

The layout is StyleGAN's and EDM's: image files in plain string order of their names, and at the top level an optional
`dataset.json` with the single entry `labels`, a list of [name, label] pairs or null. Whole-number labels are classes,
lists of numbers are condition vectors. `dataset_tool.py` makes such data sets.

Nothing is ever unpacked to disk. Imports no torch.
"""

from __future__ import annotations

import json
import os
import posixpath
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import EasyDict
from dnnlib.errors import UserError
from dnnlib.util import LIMITS, count, read_file

from .decoding import decode_image, image_formats

MAX_FILE_BYTES = LIMITS["a picture"]  # a larger file is no image and no list of labels
MAX_CLASSES = 1_000_000  # more than that are identifiers, not classes, and one-hot labels would fill the memory
MAX_JSON_PARTS = 1 << 23  # lists and tables in dataset.json, each of 60 bytes in memory; ImageNet's has 1.3 M
MAX_WRAPPERS = 16  # folders in folders that a data set is sought in


class Dataset:
    """A list of images with labels: chooses a subset, mirrors, caches. Subclasses read the images.

    `dataset[i]` is (image uint8 [C, H, W], label float32 [label_dim]); `images` and `labels` give many at once, at a
    fraction of the cost. All may be asked for by several threads and, after a fork or through pickle, by several
    processes.

    name         of the data set, for people
    raw_shape    [number of images, C, H, W] before anything is chosen
    raw_labels   of all these images: classes int64 [N], vectors float32 [N, D], or None
    max_size     keep so many images at most, chosen at random by `random_seed`
    xflip        the same images again, mirrored, after all the plain ones
    cache        keep decoded images in memory

    `notes` are lines on what was left out.
    """

    def __init__(
        self,
        name: str,
        raw_shape: list[int],
        raw_labels: np.ndarray | None = None,
        max_size: int | None = None,
        xflip: bool = False,
        random_seed: int = 0,
        cache: bool = False,
    ) -> None:
        if max_size is not None and max_size < 1:
            raise UserError(f"data set {name}: max_size is {max_size}, but at least one image must remain")
        self.name, self.raw_shape, self.image_shape = name, raw_shape, raw_shape[1:]
        self.num_channels, self.resolution = self.image_shape[:2]
        self.notes: list[str] = []
        self._cache = cache
        self._cached: tuple[np.ndarray, np.ndarray] | None = None  # all images, and which of them are there

        # Classes count up to the largest of the whole set, whatever is chosen of it.
        self._labels = np.zeros([self.raw_shape[0], 0], np.float32) if raw_labels is None else raw_labels
        self.has_onehot_labels = self._labels.dtype == np.int64
        self.label_shape = [int(self._labels.max()) + 1] if self.has_onehot_labels else list(self._labels.shape[1:])
        self.label_dim = self.label_shape[0]
        self.has_labels = self.label_dim > 0
        self.has_label_vectors = self.has_labels and not self.has_onehot_labels

        self._raw_idx = np.arange(self.raw_shape[0], dtype=np.int64)
        if max_size is not None and max_size < self._raw_idx.size:
            np.random.RandomState(random_seed % (1 << 31)).shuffle(self._raw_idx)
            self._raw_idx = np.sort(self._raw_idx[:max_size])
        self._xflip = np.repeat([False, True], self._raw_idx.size)[: self._raw_idx.size * (1 + xflip)]
        self._raw_idx = np.tile(self._raw_idx, 1 + xflip)

    def _load_raw_images(self, raw_indices: list[int]) -> np.ndarray:
        """Several images of the whole set, uint8 [N, C, H, W]."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes files; reading again opens them again."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def __len__(self) -> int:
        return self._raw_idx.size

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images([idx])[0], self.get_label(idx)

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Images uint8 [N, C, H, W] of the items at `indices` (N >= 1)."""
        chosen = np.asarray(indices, dtype=np.int64)
        raw, mirrored = self._raw_idx[chosen], self._xflip[chosen]
        images = self._load_cached(raw) if self._cache else self._load_raw_images(raw.tolist())
        images[mirrored] = images[mirrored, :, :, ::-1]
        return images

    def _load_cached(self, raw: np.ndarray) -> np.ndarray:
        """The same from memory, where they come to lie when they are read first."""
        if self._cached is None:  # memory that nothing has been written to costs nothing yet
            self._cached = (np.empty(self.raw_shape, np.uint8), np.zeros(self.raw_shape[0], np.bool_))
        pixels, present = self._cached
        missing = raw[~present[raw]]
        if len(missing):
            pixels[missing] = self._load_raw_images(missing.tolist())
            present[missing] = True
        return pixels[raw]

    def get_label(self, idx: int) -> np.ndarray:
        """float32 [label_dim]: one-hot for classes."""
        return self.labels([idx])[0]

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """Labels float32 [N, label_dim] of the items at `indices`."""
        labels = self._labels[self._raw_idx[np.asarray(indices, dtype=np.int64)]]
        if not self.has_onehot_labels:
            return labels  # a copy already
        onehot = np.zeros([len(labels), self.label_dim], dtype=np.float32)
        onehot[np.arange(len(labels)), labels] = 1
        return onehot

    def get_details(self, idx: int) -> EasyDict:
        """Where item `idx` comes from: raw_idx, xflip, raw_label."""
        raw_idx = int(self._raw_idx[idx])
        return EasyDict(raw_idx=raw_idx, xflip=bool(self._xflip[idx]), raw_label=self._labels[raw_idx].copy())

    @property
    def label_values(self) -> np.ndarray:
        """Labels of all items as they are stored: classes int64 [N], or vectors float32 [N, label_dim]."""
        return np.asarray(self._labels[self._raw_idx])


class ImageFolderDataset(Dataset):
    """The image files of a folder (with its sub-folders) or zip archive.

    Images are decoded as `decode_image` describes. The first image defines shape and channels; one that differs is an
    error when it is read.

    resolution   None, or what the images must have
    use_pyspng   of EDM's signature; has no effect, Pillow reads every format here
    options      max_size, xflip, random_seed, cache of Dataset

    Raises UserError for whatever is wrong with the files, with their names: at once for the archive, the first image
    and the labels, on reading for the other images. A set without labels is none, even under `use_labels`: ask
    `has_labels`. Labels for some images only are an error.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resolution: int | None = None,
        use_pyspng: bool = True,
        *,
        use_labels: bool = False,
        **options: Any,
    ) -> None:
        self.path = os.fspath(path)
        self._files = PackedFiles(self.path)
        self._image_fnames = self._files.image_names()
        if not self._image_fnames:
            raise self._files.no_images("; dataset_tool.py makes data sets in the right form")
        first = self._image_fnames[0]
        height, width, channels = decode_image(self._files.read(first), self._files.where(first)).shape
        if height != width:
            raise UserError(
                f"{self._files.where(first)} is {width}x{height} (width x height), but images must be "
                "square: convert the data set with dataset_tool.py --resolution=WxH --transform=center-crop"
            )
        if resolution is not None and resolution != height:
            raise UserError(f"{self.path} holds {width}x{height} images, but resolution {resolution} is asked for")
        name = os.path.splitext(os.path.basename(os.path.abspath(self.path)))[0]
        shape = [len(self._image_fnames), channels, height, width]
        array, labels = None, self._files.labels() if use_labels else None
        if labels:
            self._files.check_labels(labels, self._image_fnames)
            values = [labels[each] for each in self._image_fnames]
            array = label_array(values, self._image_fnames, self._files.where("dataset.json"))
        super().__init__(name, shape, array, **options)
        self.notes = self._files.notes()

    def _load_raw_images(self, raw_indices: list[int]) -> np.ndarray:
        images = np.empty([len(raw_indices), *self.image_shape], np.uint8)
        for image, name in zip(images, (self._image_fnames[index] for index in raw_indices), strict=True):
            pixels = decode_image(self._files.read(name), self._files.where(name)).transpose(2, 0, 1)
            if pixels.shape != image.shape:
                raise UserError(
                    f"{self._files.where(name)} is {_describe(pixels)}, but the first image of the data set is "
                    f"{_describe(image)}; all must be alike, which dataset_tool.py sees to"
                )
            image[:] = pixels
        return images

    def close(self) -> None:
        self._files.close()


class PackedFiles:
    """Reads the files of a folder or zip archive by name, names with forward slashes.

    Hidden files are left out. Links are followed; a link to a folder that is read already, or that holds one, is not.
    Where everything lies in one folder that is a data set by itself (it has a dataset.json, or no images but in
    sub-folders), names are those within it. `left_out` is a line on what is not read.

    Threads may share it. After a fork or unpickling it opens the archive anew, because processes that share one open
    file also share its position. Raises UserError with file and archive for whatever can't be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._opened: tuple[int, Any] = (0, None)  # process id and archive, replaced in one piece
        if not os.path.exists(self.path):
            raise UserError(f"{self.path}: no such file or folder; dataset_tool.py makes data sets")
        self.is_folder = os.path.isdir(self.path)
        if not self.is_folder and not os.path.isfile(self.path):
            raise UserError(f"{self.path}: neither a folder nor a zip archive, but a pipe or a device")
        self.root = ""  # the folder that all names are within
        self.not_followed: list[str] = []
        paths = {*(self._walk() if self.is_folder else self._zip().namelist())}
        hidden = {path for path in paths if any(map(_is_hidden, path.split("/")))}
        self.names = sorted(path for path in paths - hidden if not path.endswith("/"))
        unread = {*self.names} - {*self.image_names()}
        while (top := self._wrapper()) and self.root.count("/") < MAX_WRAPPERS:
            self.root += top
            self.names = [name.removeprefix(top) for name in self.names if name.startswith(top)]
        unread -= {self.root + "dataset.json", self.root + "manifest.json"}
        kinds = Counter(os.path.splitext(name)[1].lower() or "without an ending" for name in sorted(unread))
        kinds["hidden (names that begin with a dot, __MACOSX, Thumbs.db)"] = len(hidden)
        kinds["by a link to a folder that is read already"] = len(self.not_followed)
        self.left_out = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(10) if number)

    def _walk(self) -> Iterator[str]:
        """Files by their paths, and hidden folders."""
        known = [Path(self.path).resolve()]  # folders that are read, with all that is in them
        for folder, folders, names in os.walk(self.path, onerror=_raise, followlinks=True):
            start = "" if folder == self.path else os.path.relpath(folder, self.path).replace(os.sep, "/") + "/"
            folders.sort()
            for name in folders.copy():
                path = Path(folder, name)
                if _is_hidden(name):
                    yield start + name
                    folders.remove(name)
                elif path.is_symlink():
                    target = path.resolve()
                    if any(target.is_relative_to(other) or other.is_relative_to(target) for other in known):
                        self.not_followed.append(start + name)
                        folders.remove(name)
                    else:
                        known.append(target)
            yield from (start + name for name in names)

    def _wrapper(self) -> str:
        """The single folder that all images lie in, with a slash, if it is a data set by itself; otherwise ''."""
        tops = {name.partition("/")[0] + "/" for name in self.names if "/" in name}
        depths = {name.count("/") for name in self.image_names()}
        if len(tops) != 1 or not depths or 0 in depths or "dataset.json" in self.names:
            return ""
        top = tops.pop()
        return top if 1 not in depths or f"{top}dataset.json" in self.names else ""

    def notes(self) -> list[str]:
        """Lines on the folder that is read, if it is not the whole, and on what is left out."""
        notes = [f"read from {self.root} in {self.path}"] if self.root else []
        return notes + ([f"left out: {self.left_out}"] if self.left_out else [])

    def no_images(self, advice: str = "") -> UserError:
        left_out = f" (left out: {self.left_out})" if self.left_out else ""
        return UserError(f"{self.path}: no image files inside{left_out}{advice}")

    def where(self, name: str) -> str:
        """'folder/a.png in data.zip', for messages."""
        return f"{self.root}{name} in {self.path}"

    def _zip(self) -> zipfile.ZipFile:
        process, archive = self._opened
        if process != os.getpid():
            try:
                archive = zipfile.ZipFile(self.path)
            except Exception as exc:  # damage shows in many ways: BadZipFile, struct.error, OSError, ValueError
                if isinstance(exc, OSError) and exc.filename is not None:
                    raise  # can't be opened at all
                raise UserError(
                    f"{self.path} is neither a folder nor a whole zip archive ({exc}); was it copied to the end?"
                ) from exc
            self._opened = (os.getpid(), archive)
        return archive

    def image_names(self) -> list[str]:
        """Files with the ending of a format that is read, in plain string order."""
        endings = image_formats()[0]
        return [name for name in self.names if os.path.splitext(name)[1].lower() in endings]

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        if self.is_folder:
            return read_file(os.path.join(self.path, self.root + name), "a picture")
        try:
            info = self._zip().getinfo(self.root + name)
            if info.file_size > MAX_FILE_BYTES:
                raise ValueError(f"it claims to hold {info.file_size} bytes")
            return self._zip().read(info)
        except MemoryError:
            raise
        except Exception as exc:  # damage shows in many ways: BadZipFile, zlib.error, EOFError, RuntimeError, KeyError
            raise UserError(f"{self.where(name)} can't be read: {exc}; is the archive damaged or encrypted?") from exc

    def labels(self) -> dict[str, Any] | None:
        """The labels of the top-level dataset.json by file name, as they stand there; None if there are none. Names
        may begin with ./ or with the folder that all lies in, have backslashes, and accents in either Unicode form.

        Raises UserError if the file is not of the form {"labels": [[name, label], ...]} or {"labels": null}.
        """
        if "dataset.json" not in self.names:
            return None
        where, text = self.where("dataset.json"), self.read("dataset.json")
        if text.count(b"[") + text.count(b"{") > MAX_JSON_PARTS:
            raise UserError(f"{where} holds more than {MAX_JSON_PARTS} lists and tables; it has one for each image")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise UserError(f"{where} is not valid JSON ({exc})") from exc
        labels = content.get("labels", ()) if isinstance(content, dict) else ()
        if labels is None:
            return None
        if not isinstance(labels, list) or not all(map(_is_pair, labels)):
            raise UserError(f'{where} must look like {{"labels": [["name.png", 3], ...]}} or {{"labels": null}}')
        known, spelled, table = {*self.names}, dict[str, str](), dict[str, Any]()
        if not all(name in known for name, _ in labels):
            spelled = {_spelling(start + name): name for start in (self.root, "") for name in self.names}
        for name, label in labels:
            path = name if name in known else spelled.get(_spelling(name), name)
            if path in table and table[path] != label:
                raise UserError(f"{where}: {name} has two labels, {_short(table[path])} and {_short(label)}")
            table[path] = label
        return table

    def check_labels(self, labels: Mapping[str, Any], names: Sequence[str]) -> None:
        """Raises UserError unless each of these images has a label."""
        missing = [name for name in names if labels.get(name) is None]
        if missing:
            stranger = next((name for name in labels if name not in {*self.names}), None)
            other = f"; it has one for {stranger}, which is not there" if stranger is not None else ""
            raise UserError(
                f"{self.where('dataset.json')} has no label for {len(missing)} of {count(len(names), 'image')}, the "
                f"first is {missing[0]}{other}: complete it, or do without labels (--cond=0 in train.py, "
                f'{{"labels": null}} as dataset.json)'
            )

    def close(self) -> None:
        (_, archive), self._opened = self._opened, (0, None)
        if archive is not None:
            archive.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (0, None)}


def _spelling(name: str) -> str:
    """The same for all ways to write a path."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def _is_hidden(name: str) -> bool:
    return name.lower() in ("__macosx", "thumbs.db") or (name.startswith(".") and name.strip(".") != "")


def label_array(labels: list[Any], names: list[str], where: str) -> np.ndarray:
    """Labels as JSON has them -> classes int64 [N], or vectors float32 [N, D].

    Raises UserError, naming `where` and the image, for what is neither.
    """
    vectors = isinstance(labels[0], list)
    wanted = f"vectors of {len(labels[0])}" if vectors else f"classes, whole numbers 0, 1, 2, ... below {MAX_CLASSES}"
    for label, name in zip(labels, names, strict=True):
        if vectors:
            fits = isinstance(label, list) and 0 < len(label) == len(labels[0]) and all(map(_is_number, label))
        else:
            fits = _is_number(label) and label == int(label) and 0 <= label < MAX_CLASSES
        if not fits:
            first = f"that of {names[0]} is {_short(labels[0])}"
            raise UserError(f"{where}: the label of {name} is {_short(label)}, {first}; all must be {wanted}")
    return np.array(labels, dtype=np.float32 if vectors else np.int64)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


def _is_number(value: Any) -> bool:
    """A number that float32 can hold; NaN fails the comparison."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38


def _describe(image: np.ndarray) -> str:
    channels, height, width = image.shape
    return f"{width}x{height} {'grey' if channels == 1 else 'RGB'}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _raise(error: OSError) -> None:
    raise error
