"""Turns images from many places into a data set as StyleGAN, EDM and this project read it (training/dataset.py).

The result is a function of the input alone, down to the last byte of the zip file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from dnnlib.atomic import atomic_write
from dnnlib.cli import UsageError, UserError, printable
from dnnlib.util import count

if TYPE_CHECKING:  # heavy, so imported where needed: --help answers at once
    import numpy as np

    from formats.image_sources import Source

SMALL = [  # for 16x16 in minutes on two cores: docs/your-own-data.md
    *["--cbase=32", "--cres=1,2", "--blocks=1", "--batch=64", "--lr=2e-3", "--warmup=0.001", "--lr-decay=linear"],
    *["--dropout=0", "--augment=0", "--duration=0.03", "--tick=3", "--snap=2"],
]
CLASS_ORDER = "How class folders are numbered if all their names are numbers: 0, 1, 2, 10, or 0, 1, 10, 2 as in EDM"
MAX_SIDE = 8192  # pixels

Save = Callable[[str, bytes], None]
Size = tuple[int, int]  # width, height


@dataclass
class Outcome:
    """What a conversion did: the shape and labels of the images written, the names of those too small, and what is
    wrong with those that can't be read."""

    shape: tuple[int, ...] = ()
    labels: list[tuple[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    coloured: int = 0  # grey images among colour ones, made RGB
    remarks: Counter[str] = field(default_factory=Counter)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def check_size(transform: str | None, size: Size | None) -> None:
    """Raises UsageError for a size that can't give a square image with a power of two pixels on a side."""
    if size is None:
        if transform is not None:
            raise UsageError(f"--transform={transform} needs --resolution=WxH")
        return
    width, height = size
    problem = None
    if transform == "center-crop-wide" and height > width:
        problem = "for center-crop-wide the height is at most the width"
    elif transform != "center-crop-wide" and width != height:
        problem = "images must be square; or use --transform=center-crop-wide"
    elif not _is_power_of_two(width) or width > MAX_SIDE:
        problem = f"the side must be a power of two, 8, 16, 32, ... {MAX_SIDE}"
    if problem:
        raise UsageError(f"--resolution={width}x{height}: {problem}")


def cut(pixels: np.ndarray, transform: str | None, size: Size | None) -> np.ndarray | None:
    """uint8 [H, W, C] -> the image that is stored, or None for one that is refused.

    None              resized to `size` regardless of the sides' ratio, or left alone without `size`
    center-crop       the largest square in the middle, resized
    center-crop-wide  EDM's: all columns, and as many rows of the middle as the whole has when it is `width` wide,
                      resized, with black above and below; true to shape for images of just `size`. Images narrower
                      than that, or with fewer such rows than `height`, are refused
    """
    import numpy as np

    if size is None:
        return pixels
    h, w = pixels.shape[:2]
    width, height = size
    if transform == "center-crop":
        side = min(h, w)
        pixels = pixels[(h - side) // 2 : (h + side) // 2, (w - side) // 2 : (w + side) // 2]
    if transform == "center-crop-wide":
        part = round(width * h / w)
        if w < width or part < height:
            return None
        pixels = pixels[(h - part) // 2 : (h + part) // 2]
    canvas = np.zeros([width, width, pixels.shape[2]], dtype=np.uint8)
    canvas[(width - height) // 2 : (width + height) // 2] = resize(pixels, size)
    return canvas


def resize(pixels: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [h, w, C] -> uint8 [height, width, C] with Pillow's Lanczos filter; nothing is done at the right size."""
    import numpy as np
    from PIL import Image

    if pixels.shape[:2] == size[::-1]:
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    return np.array(image.resize(size, Image.Resampling.LANCZOS)).reshape(*size[::-1], -1)


def _is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Destinations


def check_dest(dest: str, source: str) -> None:
    """Raises UserError if `dest` can't be written, or would become part of the source, before any work is done."""
    path = Path(dest)
    if _is_zip(dest):
        if path.is_dir():
            raise UserError(f"{dest} is a folder; name another --dest, or one that doesn't end in .zip")
        return
    if path.is_dir() and os.listdir(dest):
        raise UserError(f"the folder {dest} is not empty; empty it or name another --dest")
    if path.exists() and not path.is_dir():
        raise UserError(f"{dest} is a file; name a folder or a .zip file as --dest")
    if Path(source).is_dir() and path.resolve().is_relative_to(Path(source).resolve()):
        raise UsageError(f"--dest={dest} lies in --source={source}, and would be part of it next time; name another")


@contextlib.contextmanager
def open_dest(dest: str) -> Iterator[Save]:
    """Yields `save(name, data)`. A zip file appears, or replaces an older one, when the block ends well; a folder's
    files too. If it doesn't, all is as it was."""
    with _open_zip(dest) if _is_zip(dest) else _open_folder(Path(dest)) as save:
        yield save


@contextlib.contextmanager
def _open_zip(dest: str) -> Iterator[Save]:
    import zipfile

    def save(name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name)  # the same bytes on every day
        info.external_attr = 0o600 << 16
        info.create_system = 3  # and on every system: file modes are Unix's
        archive.writestr(info, data)

    with atomic_write(dest) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        yield save


@contextlib.contextmanager
def _open_folder(folder: Path) -> Iterator[Save]:
    def save(name: str, data: bytes) -> None:
        path = work / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
    try:
        yield save
        if hasattr(os, "sync"):
            os.sync()  # once for all files
        for path in sorted(work.iterdir()):  # dataset.json comes last
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(work)
        if is_new and not os.listdir(folder):
            folder.rmdir()


def _is_zip(dest: str) -> bool:
    return dest.lower().endswith(".zip")


# ---------------------------------------------------------------------------------------------------------------------
# Conversion


class ColourAmongGrey(Exception):
    """A colour image came after grey ones: all are to become RGB, from the beginning."""


def convert(
    source: Source,
    save: Save,
    transform: str | None = None,
    size: Size | None = None,
    max_images: int | None = None,
    rgb: bool = False,
    skip_bad: bool = False,
) -> Outcome:
    """Saves the pictures as 00000/img00000000.png, ... (a folder for every 1000), then dataset.json.

    Refused pictures leave no gap in the numbers. Grey images become RGB where the first is in colour, or with `rgb`;
    ColourAmongGrey is raised where that comes out too late. Raises UserError if images are not all of one shape,
    square, with a power of two pixels on a side; if none is left; and, without `skip_bad`, for one that can't be read.
    """
    import numpy as np
    from tqdm import tqdm

    from training.decoding import encode_png

    result, first = Outcome(), ""
    limit = source.count if max_images is None else min(max_images, source.count)
    with tqdm(total=limit, unit="img", disable=None, leave=False) as progress:
        for picture in source.pictures:
            if picture.pixels is None and not skip_bad:
                raise UserError(f"{picture.problem}; mend or remove it, or leave such images out by --skip-bad")
            if picture.pixels is None:
                result.unreadable.append(picture.name)
                continue
            grey = picture.pixels.shape[2] == 1
            if not grey and result.shape[2:] == (1,):
                raise ColourAmongGrey
            colours = grey and (rgb or result.shape[2:] == (3,))
            pixels = cut(np.repeat(picture.pixels, 3, axis=2) if colours else picture.pixels, transform, size)
            if pixels is None:
                result.skipped.append(picture.name)
                continue
            if not result.shape:
                result.shape, first = pixels.shape, picture.name
                if pixels.shape[0] != pixels.shape[1] or not _is_power_of_two(pixels.shape[0]):
                    raise UserError(
                        f"{first} is {_describe(pixels.shape)}, but images must be square, and the side must be a "
                        "power of two: add --resolution=WxH (and --transform=center-crop, to cut instead of squeezing)"
                    )
            if pixels.shape != result.shape:
                raise UserError(
                    f"{picture.name} is {_describe(pixels.shape)}, but {first} is {_describe(result.shape)}: all "
                    "images must be alike (--resolution=WxH --transform=center-crop makes them one size)"
                )
            index = len(result.labels)
            name = f"{index // 1000:05d}/img{index:08d}.png"
            # not compressed: fast to read, and bytes that don't depend on zlib
            save(name, encode_png(np.ascontiguousarray(pixels), compress_level=0))
            result.labels.append((name, picture.label))
            result.coloured += colours
            result.remarks.update(picture.remarks)
            progress.update()
            if len(result.labels) == limit:
                break
    if not result.labels:
        raise UserError(
            f"no image is left: {len(result.skipped)} are too small, {len(result.unreadable)} can't be read "
            f"(the first: {[*result.skipped, *result.unreadable][0]})"
        )
    has_labels = result.labels[0][1] is not None
    save("dataset.json", json.dumps({"labels": result.labels if has_labels else None}).encode())
    return result


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} {'grey' if shape[2] == 1 else 'RGB'}"


def report(result: Outcome, source: Source, dest: str) -> None:
    """Prints what was written, what was left out, and what to do next."""
    from training.decoding import describe_remarks

    def left_out(what: str, names: list[str]) -> None:
        if names:
            print(printable(f"warning: left out {count(len(names), 'image')} {what}: {', '.join(names[:10])}"))

    total = len(result.labels)
    print(f"{count(total, 'image')}, {_describe(result.shape)}, written to {dest}")
    if result.coloured:
        print(f"{count(result.coloured, 'grey image')} became RGB, as the others are")
    for line in (*source.remarks, *describe_remarks(result.remarks)):
        print(printable(line))
    left_out("that can't be read", result.unreadable)
    left_out("smaller than --resolution", result.skipped)
    if rest := source.count - total - len(result.skipped) - len(result.unreadable):
        print(f"left out: {count(rest, 'image')} after these (--max-images takes the first, in the order of names)")
    has_classes = _report_labels(result, source)
    script = Path(__file__).with_name("train.py")
    words = [cli.program("python"), script.name if script.parent == Path.cwd() else str(script)]
    words += ["--outdir=training-runs", f"--data={dest}", f"--cond={int(has_classes)}"]
    title = "a network trained on them from scratch"
    if result.shape[1] < 32:
        title, words = "a small network trained on them from scratch, in minutes", [*words, *SMALL]
    note = "what it costs: --dry-run; other sizes: docs/your-own-data.md"
    print(f"{cli.bold('Next:')}\n  {title} ({note})\n    {shlex.join(words)}")


def _report_labels(result: Outcome, source: Source) -> bool:
    """Prints what labels there are; returns whether there are any to train with: a single class is none."""
    from training.dataset import label_array

    names, values = zip(*result.labels, strict=True)
    here = sorted({*values}) if source.folders else []
    shown = ", ".join(f"{label} {source.folders[label]}" for label in here[:10])
    print(printable(f"{source.note}: {shown}{', ...' if len(here) > 10 else ''}" if here else source.note))
    if gone := [folder for label, folder in enumerate(source.folders) if label not in here]:
        print(printable(f"warning: no image of {count(len(gone), 'class')} came along: {', '.join(gone[:10])}"))
    if values[0] is None:
        return False
    try:
        labels = label_array(list(values), list(names), "dataset.json")
    except UserError as exc:
        print(f"warning: the labels were copied, but can't be trained on: {printable(exc)}")
        return False
    if labels.ndim == 2:
        print(f"{count(labels.shape[1], 'number')} each")
        return True
    classes, used = int(labels.max()) + 1, len({*labels.tolist()})
    print(count(classes, "class") + (f", images of {used}" if used < classes else ""))
    return classes > 1


class _Resolution(cli.Parsed):
    name = "size"

    def parse(self, text: str) -> Size:
        match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip().lower())
        if match is None:
            raise ValueError("is not of the form WxH, such as 64x64")
        return int(match[1]), int(match[2] or match[1])


@cli.command(name="dataset_tool")
@click.option("--source", help="Where the images are: see above", metavar="PATH", required=True)
@click.option("--dest", help="Zip file (replaced) or empty folder for the result", metavar="PATH", required=True)
@click.option("--max-images", help="Write at most so many, the first ones", type=cli.Whole(min=1))
@click.option("--transform", help="Cut to shape", type=cli.Choice(["center-crop", "center-crop-wide"]))
@click.option("--resolution", help="Resize, for example 64x64; 64 is the same", metavar="WxH", type=_Resolution())
@click.option("--class-order", help=CLASS_ORDER, type=cli.Choice(["number", "name"]), default="number")
@click.option("--skip-bad", help="Leave images out that can't be read, which otherwise end it", is_flag=True)
def command(
    source: str,
    dest: str,
    max_images: int | None,
    transform: str | None,
    resolution: tuple[int, int] | None,
    class_order: str,
    skip_bad: bool,
) -> None:
    """Convert images into a data set for training: a zip file of uncompressed PNG files with labels.

    \b
    --source is one of
      PATH/                           a folder: all images in it and its sub-folders
      PATH.zip                        the same, in a zip archive
      cifar-10-python.tar.gz          CIFAR-10's training images (or unpacked: cifar-10-batches-py/)
      train-images-idx3-ubyte.gz      MNIST's, with train-labels-idx1-ubyte.gz beside it; padded to 32x32
      digits                          scikit-learn's 1,797 handwritten digits, 8x8 (a folder of that name: ./digits)

    Images are PNG, JPEG, WebP, BMP, GIF, TIFF, PPM or AVIF files. Grey stays grey unless others are in colour,
    everything else becomes RGB; transparent pixels are put on black, and photographs are turned upright. All must be of
    one size, square, with a power of two pixels on a side, unless --resolution makes them so: alone it squeezes, with
    --transform=center-crop it takes the square in the middle. center-crop-wide is EDM's, for images of WxH pixels
    (others it distorts): black above and below makes them square; smaller ones are left out.

    Labels come from a dataset.json at the top of the source ({"labels": [["name.png", 3], ...]}), or else every
    top-level folder is a class, numbered in the order of their names (of numbers where all are numbers). A data set
    within one folder is found there. Links are followed; hidden files are left out.

    \b
    Examples:
      python dataset_tool.py --source=downloads/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip
      python dataset_tool.py --source=photos/ --dest=photos-64x64.zip --resolution=64x64 --transform=center-crop
      python dataset_tool.py --source=digits --dest=datasets/digits-8x8.zip
    """
    check_dest(dest, source)
    check_size(transform, resolution)
    from formats.image_sources import open_source

    for rgb in (False, True):
        opened = open_source(source, max_images, by_name=class_order == "name")
        with contextlib.suppress(ColourAmongGrey):
            with open_dest(dest) as save:
                result = convert(opened, save, transform, resolution, max_images, rgb, skip_bad)
            break
    report(result, opened, dest)


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
