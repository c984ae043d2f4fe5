"""Turns images from many places into a data set as StyleGAN, EDM and this project read it (training/dataset.py).

The result is a function of the input alone, down to the last byte of the zip file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib import cli  # before packages: it says what to do where they are missing

# isort: split
import click

from dnnlib.atomic import atomic_write
from dnnlib.cli import UsageError, UserError, printable
from dnnlib.util import count, open_file

if TYPE_CHECKING:  # heavy, so imported where needed: --help answers at once
    import numpy as np

CIFAR10_IMAGES = 50_000
SMALL = [  # for 16x16 in minutes on two cores: docs/your-own-data.md
    *["--cbase=32", "--cres=1,2", "--blocks=1", "--batch=64", "--lr=2e-3", "--warmup=0.001", "--lr-decay=linear"],
    *["--dropout=0", "--augment=0", "--duration=0.03", "--tick=3", "--snap=2"],
]
MAX_SIDE = 8192  # pixels
MAX_UNPACKED = 1 << 28  # bytes; a file of the real archives unpacks to far less

Save = Callable[[str, bytes], None]
Transform = Callable[["np.ndarray"], "np.ndarray | None"]


@dataclass(frozen=True)
class Picture:
    """One image of a source: its name for messages, uint8 [H, W, C] with C = 1 or 3, its label as it goes to JSON."""

    name: str
    pixels: np.ndarray
    label: int | list[float] | None = None


@dataclass(frozen=True)
class Source:
    """`count` pictures, read one by one; `note` says where labels come from, `folders` are the classes' if they do."""

    count: int
    pictures: Iterable[Picture]
    note: str = ""
    folders: Sequence[str] = ()


@dataclass
class Outcome:
    """What a conversion did: names of the images without label and of those refused, and the shape of the rest."""

    shape: tuple[int, ...] = ()
    labels: list[tuple[str, Any]] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    coloured: int = 0  # grey images among colour ones, made RGB


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def open_source(source: str) -> Source:
    """The pictures behind --source. Raises UserError if there is nothing to be read."""
    name = os.path.basename(source)
    if source == "digits":
        return read_digits()
    if not os.path.exists(source):
        raise UserError(f"--source={source}: no such file or folder")
    if name.endswith((".tar.gz", ".tgz")):
        return read_cifar10(source)
    if "idx3-ubyte" in name:
        return read_mnist(source)
    if os.path.isfile(source):
        from training.dataset import image_formats

        if os.path.splitext(name)[1].lower() in image_formats()[0]:
            raise UserError(f"--source={source} is an image; name the folder that it is in")
    return read_packed(source)


def read_packed(path: str) -> Source:
    """Image files of a folder (with its sub-folders) or zip archive, in plain string order of their names.

    Labels come from dataset.json, or else from the names of top-level folders in string order, if there are several
    and every image is in one.
    """
    from training.dataset import PackedFiles, decode_image

    files = PackedFiles(path)
    names = files.image_names()
    if not names:
        raise UserError(f"{path}: no image files inside ({len(files.names)} files of other kinds)")
    labels: dict[str, Any] | None = None
    classes: list[str] = []
    note = "no labels: there is neither a dataset.json nor a folder for each of several classes"
    if "dataset.json" in files.names:
        labels = files.labels()
        note = "labels from dataset.json" if labels else "no labels: dataset.json has none"
    else:
        folders = sorted({name.partition("/")[0] if "/" in name else "" for name in names})
        if len(folders) > 1 and not folders[0]:
            stray = next(name for name in names if "/" not in name)
            note = f"no labels: {stray} lies in no class's folder, so those of all are dropped"
        if len(folders) == 1 and folders[0]:
            note = f"no labels: all images lie in one folder, {folders[0]}; several would be classes"
        if len(folders) > 1 and folders[0]:
            labels = {name: folders.index(name.partition("/")[0]) for name in names}
            note, classes = "labels from top-level folders", folders

    def pictures() -> Iterator[Picture]:
        for name in names:
            pixels = decode_image(files.read(name), f"{name} in {path}")
            yield Picture(name, pixels, labels.get(name) if labels else None)

    return Source(len(names), pictures(), note, classes)


def read_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits: 8x8, grey, ten classes. They travel inside that package."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 ... 16
    labels = digits.target.tolist()
    pictures = (Picture(f"digit {i}", image[:, :, None], labels[i]) for i, image in enumerate(images))
    return Source(len(images), pictures, "labels: the digits")


def read_cifar10(path: str) -> Source:
    """The five training batches of cifar-10-python.tar.gz."""
    import tarfile
    import zlib

    import numpy as np

    images, labels = [], []
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:gz") as archive:
            members = {os.path.basename(member.name): member for member in archive if member.isfile()}
            for name in (f"data_batch_{i}" for i in range(1, 6)):
                if name not in members:
                    raise UserError(f"{path}: {name} is missing; is it CIFAR-10's Python version, and whole?")
                batch = archive.extractfile(members[name])
                if batch is None or members[name].size > MAX_UNPACKED:
                    raise UserError(f"{path}: {name} is not one of CIFAR-10's files")
                pixels, classes = _cifar_batch(batch.read(), f"{name} in {path}")
                images.append(pixels)
                labels += classes
    except (tarfile.TarError, EOFError, zlib.error) as exc:
        raise UserError(f"{path} is not a whole tar.gz archive: {exc}") from exc
    if len(labels) != CIFAR10_IMAGES:
        raise UserError(f"{path} holds {len(labels)} training images instead of CIFAR-10's {CIFAR10_IMAGES}")
    pixels = np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    pictures = (Picture(f"image {i}", image, labels[i]) for i, image in enumerate(pixels))
    return Source(len(labels), pictures, "labels: CIFAR-10's")


def _cifar_batch(data: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """One batch, a pickled dict: uint8 [n, 3072] and n classes."""
    import numpy as np

    try:
        batch = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
        batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels, labels = _plain(batch.get("data")), np.asarray(_plain(batch.get("labels"))).tolist()
    except UserError as exc:
        raise UserError(f"{where}: {exc}") from exc
    except Exception as exc:  # a damaged pickle can fail in any way
        raise UserError(f"{where} is damaged: {exc}") from exc
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * 32 * 32,):
        raise UserError(f"{where}: 'data' is not a table of bytes, 3072 for each image")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(x in range(10) for x in labels):
        raise UserError(f"{where}: 'labels' is not a list of {len(pixels)} classes 0 ... 9")
    return pixels, labels


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, strings, numbers and numpy arrays of whole numbers. Nothing in the file is run.

    The names a pickle calls are replaced by the small stand-ins below, which hold a description of an array until
    `_plain` makes one; so a hostile file doesn't even reach numpy's own unpickling.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")  # numpy 2's name
        stand_ins: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Type,
            ("numpy.core.multiarray", "_reconstruct"): lambda cls, shape, code: _Array(),
            ("numpy.core.multiarray", "scalar"): lambda kind, raw: _Array((), kind, False, raw),
            ("numpy.core.numeric", "_frombuffer"): lambda raw, kind, shape, order: _Array(
                shape, kind, order == "F", raw
            ),
            ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
        }
        if (module, name) not in stand_ins:
            raise UserError(f"it refers to {module}.{name}, which a table of images has no use for; not opened")
        return stand_ins[module, name]


class _Type:
    """Stands for numpy.dtype: whole numbers only."""

    def __init__(self, code: str, *_: Any) -> None:
        if re.fullmatch(r"[iu][1248]", code) is None:
            raise UserError(f"it holds an array of kind {code!r}, not of whole numbers")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = (">" if state[1] == ">" else "<") + self.code[-2:]


class _Array:
    """Stands for numpy.ndarray."""

    def __init__(self, *content: Any) -> None:
        self.content = content

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.content = state[1:]  # after a version number


def _plain(value: Any) -> Any:
    """What was unpickled, with arrays in place of their stand-ins. Raises ValueError if sizes don't fit."""
    import numpy as np

    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, _Array):
        return value
    shape, kind, by_columns, raw = value.content
    data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    array = np.frombuffer(data, kind.code).reshape(shape, order="F" if by_columns else "C")
    return array if array.ndim else array.item()


def read_mnist(path: str) -> Source:
    """MNIST and its relatives: ...-images-idx3-ubyte.gz with ...-labels-idx1-ubyte.gz beside it, padded to 32x32."""
    import numpy as np

    labels_path = os.path.join(os.path.dirname(path), os.path.basename(path).replace("images-idx3", "labels-idx1"))
    images = _read_idx(path, axes=3)
    if labels_path == path or not os.path.exists(labels_path):
        raise UserError(f"{path}: the labels, {os.path.basename(labels_path)}, must lie beside it")
    labels = _read_idx(labels_path, axes=1)
    if len(labels) != len(images) or images.shape[1:] != (28, 28):
        raise UserError(f"{path} holds {list(images.shape)} pixels for {len(labels)} labels; expected N of 28x28 for N")
    images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    pictures = (Picture(f"image {i}", image[:, :, None], int(labels[i])) for i, image in enumerate(images))
    return Source(len(images), pictures, f"labels from {os.path.basename(labels_path)}")


def _read_idx(path: str, axes: int) -> np.ndarray:
    """A file of bytes in LeCun's idx format, packed with gzip or not: uint8 with so many axes."""
    import gzip
    import zlib

    import numpy as np

    with open_file(path) as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            data = (gzip.GzipFile(fileobj=raw) if packed else raw).read(MAX_UNPACKED)
        except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
            raise UserError(f"{path} is damaged: {exc}") from exc
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes([0, 0, 8, axes]):
        raise UserError(f"{path} is not an idx file of bytes with {axes} axes")
    shape = [int(size) for size in np.frombuffer(data, ">u4", axes, offset=4)]
    count = int(np.prod(shape, dtype=object))
    if len(data) != start + count or not count:
        raise UserError(f"{path} holds {len(data) - start} bytes for {shape}: it is cut short or not what it says")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def make_transform(name: str | None, size: tuple[int, int] | None) -> Transform:
    """uint8 [H, W, C] -> the image that is stored, or None for one that is refused. `size` is (width, height).

    None              resized to `size` regardless of the sides' ratio, or left alone without `size`
    center-crop       the largest square in the middle, resized
    center-crop-wide  EDM's: all columns, and as many rows of the middle as the whole has when it is `width` wide,
                      resized, with black above and below; true to shape for images of just `size`. Images narrower
                      than that, or with fewer such rows than `height`, are refused

    Raises UsageError for a size that can't give a square image with a power of two pixels on a side.
    """
    if size is None:
        if name is not None:
            raise UsageError(f"--transform={name} needs --resolution=WxH")
        return lambda pixels: pixels
    width, height = size
    if name == "center-crop-wide":
        if not 0 < height <= width:
            raise UsageError(f"--resolution={width}x{height}: for center-crop-wide the height is at most the width")
    elif width != height:
        raise UsageError(f"--resolution={width}x{height}: images must be square; or use --transform=center-crop-wide")
    if not _is_power_of_two(width) or width > MAX_SIDE:
        raise UsageError(f"--resolution={width}x{height}: the side must be a power of two, 8, 16, 32, ... {MAX_SIDE}")

    def square(pixels: np.ndarray) -> np.ndarray:
        h, w = pixels.shape[:2]
        side = min(h, w)
        middle = pixels[(h - side) // 2 : (h + side) // 2, (w - side) // 2 : (w + side) // 2]
        return resize(middle, width, height)

    def wide(pixels: np.ndarray) -> np.ndarray | None:
        import numpy as np

        h, w = pixels.shape[:2]
        part = round(width * h / w)
        if w < width or part < height:
            return None
        middle = resize(pixels[(h - part) // 2 : (h + part) // 2], width, height)
        canvas = np.zeros([width, width, pixels.shape[2]], dtype=np.uint8)
        canvas[(width - height) // 2 : (width + height) // 2] = middle
        return canvas

    if name == "center-crop-wide":
        return wide
    return square if name == "center-crop" else lambda pixels: resize(pixels, width, height)


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [h, w, C] -> uint8 [height, width, C] with Pillow's Lanczos filter; nothing is done at the right size."""
    import numpy as np
    from PIL import Image

    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS)).reshape(height, width, -1)


def _is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Destinations


def check_dest(dest: str, source: str) -> None:
    """Raises UserError if `dest` can't be written, or would become part of the source, before any work is done."""
    if not dest:
        raise UsageError("--dest is empty; name a folder or a .zip file")
    if _is_zip(dest):
        if os.path.isdir(dest):
            raise UserError(f"{dest} is a folder; name another --dest, or one that doesn't end in .zip")
    elif os.path.isdir(dest):
        if os.listdir(dest):
            raise UserError(f"the folder {dest} is not empty; empty it or name another --dest")
    elif os.path.exists(dest):
        raise UserError(f"{dest} is a file; name a folder or a .zip file as --dest")
    if not _is_zip(dest) and Path(source).is_dir() and Path(dest).resolve().is_relative_to(Path(source).resolve()):
        raise UsageError(f"--dest={dest} lies in --source={source}, and would be part of it next time; name another")


@contextlib.contextmanager
def open_dest(dest: str) -> Iterator[Save]:
    """Yields `save(name, data)`. A zip file appears, or replaces an older one, when the block ends well; a folder's
    files too. If it doesn't, all is as it was."""
    if _is_zip(dest):
        import zipfile

        with atomic_write(dest) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

            def save(name: str, data: bytes) -> None:
                info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # the same bytes on every day
                info.external_attr = 0o600 << 16
                info.create_system = 3  # and on every system: file modes are Unix's
                archive.writestr(info, data)

            yield save
        return
    folder = Path(dest)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
    try:

        def save(name: str, data: bytes) -> None:
            path = work / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

        yield save
        if hasattr(os, "sync"):
            os.sync()  # once for all files
        for path in sorted(work.iterdir(), key=lambda path: path.name == "dataset.json"):  # which comes last
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(work)
        if is_new and not os.listdir(folder):
            folder.rmdir()


def _is_zip(dest: str) -> bool:
    return dest.lower().endswith(".zip")


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, C] -> a PNG file that is not compressed: fast to read, and bytes that don't depend on zlib."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.save(file, format="png", compress_level=0, optimize=False)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------


class ColourAmongGrey(Exception):
    """A colour image came after grey ones: all are to become RGB, from the beginning."""


def convert(
    source: Source, save: Save, transform: Transform, max_images: int | None = None, rgb: bool = False
) -> Outcome:
    """Saves the pictures as 00000/img00000000.png, ... (a folder for every 1000), then dataset.json.

    Refused pictures leave no gap in the numbers. If any image has no label, none is written. Grey images become RGB
    where the first is in colour, or with `rgb`; ColourAmongGrey is raised where that comes out too late.
    Raises UserError if images are not all of one shape, square, with a power of two pixels on a side; if none is left.
    """
    import numpy as np
    from tqdm import tqdm

    result = Outcome()
    first = ""
    limit = source.count if max_images is None else min(max_images, source.count)
    with tqdm(total=limit, unit="img", disable=None, leave=False) as progress:
        for picture in source.pictures:
            if len(result.labels) == limit:
                break
            grey = picture.pixels.shape[2] == 1
            if not grey and result.shape[2:] == (1,):
                raise ColourAmongGrey
            colours = grey and (rgb or result.shape[2:] == (3,))
            pixels = transform(np.repeat(picture.pixels, 3, axis=2) if colours else picture.pixels)
            if pixels is None:
                result.skipped.append(picture.name)
                continue
            if not result.shape:
                result.shape, first = pixels.shape, picture.name
                _check_shape(pixels.shape, first)
            if pixels.shape != result.shape:
                raise UserError(
                    f"{picture.name} is {_describe(pixels.shape)}, but {first} is {_describe(result.shape)}: all "
                    "images must be alike (--resolution=WxH --transform=center-crop makes them one size)"
                )
            index = len(result.labels)
            name = f"{index // 1000:05d}/img{index:08d}.png"
            save(name, encode_png(np.ascontiguousarray(pixels)))
            result.labels.append((name, picture.label))
            result.coloured += colours
            if picture.label is None:
                result.unlabelled.append(picture.name)
            progress.update()
    if not result.labels:
        raise UserError(f"no image is left: all {len(result.skipped)} are too small (the first: {result.skipped[0]})")
    save("dataset.json", json.dumps({"labels": None if result.unlabelled else result.labels}).encode())
    return result


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    height, width = shape[:2]
    if height != width:
        raise UserError(
            f"{name} is {width}x{height}, but images must be square: add --resolution=WxH, and --transform=center-crop "
            "to cut the sides off instead of squeezing"
        )
    if not _is_power_of_two(width):
        raise UserError(f"{name} is {width}x{height}, but the side must be a power of two: add --resolution=WxH")


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} {'grey' if shape[2] == 1 else 'RGB'}"


def report(result: Outcome, source: Source, dest: str) -> None:
    """Says what was written, whatever did not come along, and what to do next."""
    has_classes = _report(result, source, dest)
    script = Path(__file__).with_name("train.py")
    words = [cli.program("python"), script.name if script.parent == Path.cwd() else str(script)]
    words += ["--outdir=training-runs", f"--data={dest}", f"--cond={int(has_classes)}"]
    title = "a network trained on them from scratch"
    if result.shape[1] < 32:
        title, words = "a small network trained on them from scratch, in minutes", [*words, *SMALL]
    print(cli.bold("Next:"))
    print(f"  {title} (what it costs: --dry-run; other sizes: docs/your-own-data.md)")
    print(f"    {shlex.join(words)}")


def _report(result: Outcome, source: Source, dest: str) -> bool:
    """`report` without its end; returns whether there are labels to train with: a single class is none."""
    from training.dataset import label_array

    total, lost = len(result.labels), len(result.unlabelled)
    print(f"{count(total, 'image')}, {_describe(result.shape)}, written to {dest}")
    if result.coloured:
        print(f"{count(result.coloured, 'grey image')} became RGB, as the others are")
    if result.skipped:
        first = printable(result.skipped[0])
        print(f"skipped {count(len(result.skipped), 'image')} smaller than --resolution, the first: {first}")
    rest = source.count - total - len(result.skipped)
    if rest:
        print(f"left out: {count(rest, 'image')} after these (--max-images takes the first, in the order of names)")
    if 0 < lost < total:
        print(
            f"warning: all labels were dropped, because {lost} of {count(total, 'image')} have none, "
            f"the first: {printable(result.unlabelled[0])}"
        )
        return False
    print(printable(source.note) + _folders(result, source))
    if lost:
        return False
    try:
        labels = label_array([label for _, label in result.labels], [name for name, _ in result.labels], "dataset.json")
        if labels.ndim == 1:
            here = len({*labels.tolist()})
            print(count(int(labels.max()) + 1, "class") + (f", images of {here}" if here <= labels.max() else ""))
            if rest and (here == 1 or here < len(source.folders)):
                print(f"warning: images of {count(here, 'class')} came along; without --max-images there may be more")
        else:
            print(f"{labels.shape[1]} numbers each")
    except UserError as exc:
        print(f"warning: the labels were copied, but can't be trained on: {printable(str(exc))}")
        return False
    return bool(labels.ndim > 1 or labels.max() > 0)


def _folders(result: Outcome, source: Source) -> str:
    """': 0 cat, 1 dog', the folders that images came from, by their classes."""
    here = sorted({label for _, label in result.labels if isinstance(label, int)}) if source.folders else []
    shown = ", ".join(f"{label} {printable(source.folders[label])}" for label in here[:10])
    return f": {shown}{', ...' if len(here) > 10 else ''}" if here else ""


def _parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"'{value}' is not of the form WxH, such as 64x64", ctx, param)
    return int(match[1]), int(match[2] or match[1])


@cli.command(name="dataset_tool")
@click.option("--source", help="Where the images are: see above", metavar="PATH", required=True)
@click.option("--dest", help="Zip file (replaced) or empty folder for the result", metavar="PATH", required=True)
@click.option("--max-images", help="Write at most so many, the first ones", metavar="INT", type=cli.Whole(min=1))
@click.option("--transform", help="Cut to shape", type=cli.Choice(["center-crop", "center-crop-wide"]))
@click.option("--resolution", help="Resize, for example 64x64; 64 is the same", metavar="WxH", callback=_parse_size)
def command(
    source: str, dest: str, max_images: int | None, transform: str | None, resolution: tuple[int, int] | None
) -> None:
    """Convert images into a data set for training: a zip file of uncompressed PNG files with labels.

    \b
    --source is one of
      PATH/                           a folder: all images in it and its sub-folders
      PATH.zip                        the same, in a zip archive
      cifar-10-python.tar.gz          CIFAR-10's training images
      train-images-idx3-ubyte.gz      MNIST's, with train-labels-idx1-ubyte.gz beside it; padded to 32x32
      digits                          scikit-learn's 1,797 handwritten digits, 8x8 (a folder of that name: ./digits)

    Images may be in any format that Pillow reads. Grey stays grey unless others are in colour, everything else becomes
    RGB, transparency is dropped. All must be of one size, square, with a power of two pixels on a side, unless
    --resolution makes them so: alone it squeezes, with --transform=center-crop it takes the square in the middle.
    center-crop-wide is EDM's, for images of WxH pixels (others it distorts): black above and below makes them square;
    smaller ones are left out.

    Labels come from a dataset.json at the top of the source ({"labels": [["name.png", 3], ...]}), or else every
    top-level folder is a class, numbered in the order of their names. If an image has no label, all are dropped.

    \b
    Examples:
      python dataset_tool.py --source=downloads/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip
      python dataset_tool.py --source=photos/ --dest=photos-64x64.zip --resolution=64x64 --transform=center-crop
      python dataset_tool.py --source=digits --dest=datasets/digits-8x8.zip
    """
    check_dest(dest, source)
    change = make_transform(transform, resolution)
    for rgb in (False, True):
        opened = open_source(source)
        with contextlib.suppress(ColourAmongGrey):
            with open_dest(dest) as save:
                result = convert(opened, save, change, max_images, rgb)
            break
    report(result, opened, dest)


def main(args: Sequence[str] | None = None) -> int:
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
