"""Turns images from many places into a data set as StyleGAN, EDM and this project read it (training/dataset.py).

The result is a function of the input alone, down to the last byte of the zip file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
NAMED = 10  # so many images that can't be read are named, the rest counted

Save = Callable[[str, bytes], None]
Transform = Callable[["np.ndarray"], "np.ndarray | None"]


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
    source: Source,
    save: Save,
    transform: Transform,
    max_images: int | None = None,
    rgb: bool = False,
    skip_bad: bool = False,
) -> Outcome:
    """Saves the pictures as 00000/img00000000.png, ... (a folder for every 1000), then dataset.json.

    Refused pictures leave no gap in the numbers. Grey images become RGB where the first is in colour, or with `rgb`;
    ColourAmongGrey is raised where that comes out too late. Raises UserError if images are not all of one shape,
    square, with a power of two pixels on a side; if none is left; and, without `skip_bad`, if some can't be read: at
    the end, with their names.
    """
    import numpy as np
    from tqdm import tqdm

    result = Outcome()
    first = ""
    unsaved = 0  # of those after one that can't be read
    pictures = iter(source.pictures)
    limit = source.count if max_images is None else min(max_images, source.count)
    with tqdm(total=limit, unit="img", disable=None, leave=False) as progress:
        while len(result.labels) + unsaved < limit and (picture := next(pictures, None)) is not None:
            if picture.pixels is None:
                result.unreadable.append(
                    f"{picture.name} ({picture.problem})" if not result.unreadable else picture.name
                )
                continue
            if result.unreadable and not skip_bad:
                unsaved += 1
                progress.update()
                continue
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
            result.remarks.update(picture.remarks)
            progress.update()
    if result.unreadable and (not skip_bad or not result.labels + result.skipped):
        advice = "no other is left" if skip_bad else "mend or remove what is bad, or leave it out by --skip-bad"
        raise UserError(
            f"{count(len(result.unreadable), 'image')} can't be read, so nothing is written ({advice}): "
            f"{_first(result.unreadable)}"
        )
    if not result.labels:
        raise UserError(f"no image is left: all {len(result.skipped)} are too small (the first: {result.skipped[0]})")
    has_labels = result.labels[0][1] is not None
    save("dataset.json", json.dumps({"labels": result.labels if has_labels else None}).encode())
    return result


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


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
    """Prints what was written, what was left out, and what to do next."""
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
    from training.decoding import describe_remarks

    total = len(result.labels)
    print(f"{count(total, 'image')}, {_describe(result.shape)}, written to {dest}")
    if result.coloured:
        print(f"{count(result.coloured, 'grey image')} became RGB, as the others are")
    for line in (*source.remarks, *describe_remarks(result.remarks)):
        print(printable(line))
    if result.unreadable:
        bad = printable(_first(result.unreadable))
        print(f"warning: left out {count(len(result.unreadable), 'image')} that can't be read: {bad}")
    if result.skipped:
        first = printable(result.skipped[0])
        print(f"skipped {count(len(result.skipped), 'image')} smaller than --resolution, the first: {first}")
    rest = source.count - total - len(result.skipped) - len(result.unreadable)
    if rest:
        print(f"left out: {count(rest, 'image')} after these (--max-images takes the first, in the order of names)")
    print(printable(source.note) + _folders(result, source))
    if result.labels[0][1] is None:
        return False
    try:
        labels = label_array([label for _, label in result.labels], [name for name, _ in result.labels], "dataset.json")
        if labels.ndim == 1:
            here = len({*labels.tolist()})
            print(count(int(labels.max()) + 1, "class") + (f", images of {here}" if here <= labels.max() else ""))
            if not rest and here < len(source.folders):
                gone = next(name for label, name in enumerate(source.folders) if label not in labels)
                print(f"warning: no image of {count(len(source.folders) - here, 'class')} is left: {printable(gone)}")
            if rest and (here == 1 or here < len(source.folders)):
                print(f"warning: images of {count(here, 'class')} came along; without --max-images there may be more")
        else:
            print(f"{count(labels.shape[1], 'number')} each")
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
    change = make_transform(transform, resolution)
    from formats.image_sources import open_source

    for rgb in (False, True):
        opened = open_source(source, max_images, by_name=class_order == "name")
        with contextlib.suppress(ColourAmongGrey):
            with open_dest(dest) as save:
                result = convert(opened, save, change, max_images, rgb, skip_bad)
            break
    report(result, opened, dest)


def main(args: Sequence[str] | None = None) -> int:
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
