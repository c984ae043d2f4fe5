"""Writing many images: into a folder or a zip, with a manifest of how they were made.

The manifest (`manifest.json`) holds the network's hash, the options that the images depend on, and which seeds were
made in how many batches: the size of a batch decides how sums round, so a folder that is continued keeps the batches it
began with, and its images are those of a run that was never interrupted. The images of a network with classes have
`dataset.json` beside them: their labels, in EDM's format. A zip is made in one go, or anew.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.atomic import atomic_write, check_folder, locked, write_text
from dnnlib.cli import UserError, parse_int_list
from dnnlib.util import LIMITS, count, open_file, read_file
from training.decoding import encode_png, image_formats
from training.sampling import count_batches, split_seeds

MANIFEST, LABELS = "manifest.json", "dataset.json"
MAX_IMAGES = 2_000_000  # of a folder or zip: seeds and names are kept in memory, and a short list can mean many
MAX_PROCESSES = 1 << 16  # of one job: so many batches more than seeds may be recorded
PATIENCE = 20.0  # seconds to wait for a lock: processes of a killed launcher, which may have it, have ended by then
PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"  # a file that ends otherwise was cut off
Labels = Mapping[str, int | list[float]]  # of images, by name


@dataclass(frozen=True)
class Run:
    """Seeds that were made together, cut into `batches` (see `training.sampling.split_seeds`)."""

    seeds: tuple[int, ...]
    batches: int


@dataclass(frozen=True)
class Manifest:
    """Who made the images of a folder or zip."""

    network: Mapping[str, str]  # source, sha256
    options: Mapping[str, Any]
    runs: tuple[Run, ...] = ()

    def to_json(self) -> str:
        runs = [{"seeds": format_int_list(run.seeds), "batches": run.batches} for run in self.runs]
        return json.dumps({**asdict(self), "runs": runs}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: object) -> Manifest:
        """Raises UserError for anything that `to_json` didn't write, and for more than MAX_IMAGES seeds in all."""
        try:
            data, runs, left = json.loads(text), [], MAX_IMAGES
            for run in data["runs"]:
                seeds, batches = parse_int_list(run["seeds"], left), int(run["batches"])
                left -= len(seeds)
                if not 1 <= batches <= len(seeds) + MAX_PROCESSES:
                    raise ValueError(f"{len(seeds)} seeds in {batches} batches")
                runs.append(Run(tuple(seeds), batches))
            return cls(dict(data["network"]), dict(data["options"]), tuple(runs))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as exc:
            raise UserError(f"{where} is no list of generated images ({exc!r}); use another --outdir") from exc

    def name(self, seed: int) -> str:
        """'000042.png', or with the option `subdirs` '000000/000042.png', a new folder every 1000 seeds."""
        return f"{seed - seed % 1000:06d}/{seed:06d}.png" if self.options.get("subdirs") else f"{seed:06d}.png"

    def names(self) -> dict[str, int]:
        """All images, and their seeds."""
        return {self.name(seed): seed for run in self.runs for seed in run.seeds}

    def difference(self, other: Manifest) -> str | None:
        """In a few words, why images of `other` can't stand beside those of this one; None if they can."""
        if self.network.get("sha256") != other.network.get("sha256"):
            return f"another network made ({other.network.get('source')})"
        for name in sorted({*self.options, *other.options}):
            mine, theirs = self.options.get(name), other.options.get(name)
            if mine != theirs:
                return f"were made with {name}={theirs}, not {mine}"
        return None


def format_int_list(values: Sequence[int]) -> str:
    """The inverse of `parse_int_list`: [1, 2, 5, 6, 7] -> '1,2,5-7'."""
    parts: list[str] = []
    for _, group in groupby(enumerate(values), key=lambda pair: pair[1] - pair[0]):
        run = [value for _, value in group]
        # parse_int_list reads no ranges of negative numbers
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 and run[0] >= 0 else map(str, run)
    return ",".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Where images go. All processes call `write`, each for other images; the rest is rank 0's, before and after that.


class ImageFolder:
    """A folder of image files, each written in one piece."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def lock(self) -> AbstractContextManager[None]:
        """Keeps others out. Raises UserError where one is at work, OSError where nothing can be written."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--outdir={self.path} is a file; name a folder, or a .zip")
        check_folder(self.path)
        return locked(self.path, PATIENCE)

    def previous(self) -> Manifest | None:
        """What an earlier run left here."""
        path = self.path / MANIFEST
        return Manifest.from_json(read_file(path, "JSON"), path) if path.exists() else None

    def has(self, name: str) -> bool:
        """Whether this image is here, and whole (a crash of the machine can leave empty files)."""
        path = self.path / name
        if not path.is_file() or path.stat().st_size < len(PNG_END):
            return False
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END

    def images(self) -> set[str]:
        """The names of all image files that fid.py would measure, whoever made them."""
        found = (path for path in self.path.rglob("*") if path.suffix.lower() in image_formats()[0])
        return {path.relative_to(self.path).as_posix() for path in found}

    def begin(self, manifest: Manifest, fresh: Iterable[str]) -> None:
        """Records who makes the images from here on, and removes what others left in the place of the `fresh` ones."""
        for name in (*fresh, LABELS):  # the labels come back when all is done
            self._place(name).unlink(missing_ok=True)
        write_text(self.path / MANIFEST, manifest.to_json())

    def write(self, name: str, data: bytes) -> None:
        """Writes one image; threads may do so at the same time."""
        with atomic_write(self._place(name)) as file:
            file.write(data)

    def _place(self, name: str) -> Path:
        """Raises UserError in a subfolder that is a link: what it leads to is not ours to write."""
        path = self.path / name
        if path.parent != self.path and path.parent.is_symlink():
            raise UserError(f"{path.parent} is a link, and not followed; remove it, or use another --outdir")
        return path

    def finish(self, manifest: Manifest, labels: Labels) -> None:
        """Writes the labels, if there are any."""
        if labels:
            write_text(self.path / LABELS, labels_json(labels))


class ImageZip:
    """An uncompressed zip of images, sorted by name, with the labels (if there are any) and the manifest last.

    It appears, or replaces what was there, when all is written; until then the images are in a hidden folder beside it,
    which the next run removes if this one is killed. The zip's bytes depend on the images alone, not on the number of
    processes or the time of day.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # A name like the zip's, and short enough where that one is not.
        self.work = self.path.with_name(f".{self.path.name[:40]}.{zlib.crc32(os.fsencode(self.path.name)):08x}.images")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """As that of a folder; removes what is unfinished at its end."""
        if self.path.is_dir():
            raise UserError(f"--outdir={self.path} is a folder; name a new .zip, or a folder without .zip")
        check_folder(self.path.parent)
        with locked(self.path, PATIENCE, self.work.with_suffix(".lock")):
            try:
                yield
            finally:
                shutil.rmtree(self.work, ignore_errors=True)

    def previous(self) -> Manifest | None:
        """Who made the zip that is there. Raises UserError for a file that is not ours to replace."""
        if not self.path.exists():
            return None
        try:
            with open_file(self.path) as file, zipfile.ZipFile(file) as old:
                if MANIFEST not in old.namelist():  # somebody's data set?
                    raise UserError(
                        f"--outdir={self.path} holds no {MANIFEST}, so it is not ours to replace; use another name"
                    )
                size = old.getinfo(MANIFEST).file_size
                text = old.read(MANIFEST) if size <= LIMITS["JSON"] else b""
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as exc:
            raise UserError(f"--outdir={self.path} is no zip ({exc}); remove it, or use another name") from exc
        return Manifest.from_json(text, self.path / MANIFEST)

    def begin(self, manifest: Manifest, fresh: Iterable[str]) -> None:
        """Makes the folder for the images, instead of one that a killed run has left."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(mode=0o700, parents=True)  # nobody else can put links into it
        for folder in {os.path.dirname(name) for name in manifest.names()} - {""}:
            (self.work / folder).mkdir()

    def write(self, name: str, data: bytes) -> None:
        """Writes one image; threads may do so at the same time."""
        (self.work / name).write_bytes(data)

    def finish(self, manifest: Manifest, labels: Labels) -> None:
        """Makes the zip. Raises OSError where an image is missing."""
        with atomic_write(self.path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
            for name in sorted(manifest.names()):  # ZipInfo: always the same date
                target.writestr(zipfile.ZipInfo(name), (self.work / name).read_bytes())
            if labels:
                target.writestr(zipfile.ZipInfo(LABELS), labels_json(labels))
            target.writestr(zipfile.ZipInfo(MANIFEST), manifest.to_json())


def labels_json(labels: Labels) -> str:
    """`dataset.json` of images and their labels, in the order of their names."""
    return json.dumps({"labels": [[name, labels[name]] for name in sorted(labels)]}) + "\n"


def open_output(outdir: str | os.PathLike[str]) -> ImageFolder | ImageZip:
    """A zip if the name ends so, otherwise a folder. Touches nothing yet."""
    return ImageZip(outdir) if str(outdir).lower().endswith(".zip") else ImageFolder(outdir)


# ----------------------------------------------------------------------------------------------------------------------
# What is to be done


@dataclass(frozen=True)
class Work:
    """What is to be done: `batches` of seeds to be made, the manifest to leave, a `note` for people (or '').

    is_done: there is nothing to be made, nor any labels to be written.
    """

    manifest: Manifest
    batches: list[list[int]]
    is_done: bool
    note: str = ""


def prepare(
    output: ImageFolder | ImageZip,
    mine: Manifest,
    seeds: Sequence[int],
    max_batch: int,
    world_size: int = 1,
    *,
    skip_existing: bool = False,
    labelled: bool = False,
) -> Work:
    """Finds out which batches must be made, and readies `output` for them. `mine` says who is about to do so.

    Without `skip_existing` everything is made afresh. With it, images of a folder that are there are left out; a zip
    that lacks some is made anew. Seeds of a folder's earlier runs keep the batches they had. labelled: the images are
    to have labels. Raises UserError where images of somebody else would get mixed in, or be lost.
    """
    theirs = output.previous()
    difference = None if theirs is None else mine.difference(theirs)
    if skip_existing and difference is not None:
        raise UserError(f"{output.path} holds images that {difference}; use another --outdir")
    names = {mine.name(seed): seed for seed in seeds}
    before = {} if theirs is None else theirs.names()

    runs: list[Run] = []  # earlier ones whose images stay
    present: set[int] = set()
    note = ""
    if isinstance(output, ImageZip):
        if skip_existing and theirs is not None and before.keys() >= names.keys():
            return Work(theirs, [], is_done=True)
        if lost := before.keys() - names.keys():
            note = f"{output.path} is made anew, without its {count(len(lost), 'image')} of other seeds"
    else:
        for name in (*names, LABELS):
            if name not in before and (name != LABELS or theirs is None) and os.path.lexists(output.path / name):
                raise UserError(
                    f"{output.path} holds {name}, but no {MANIFEST} that says who made them; use another --outdir, or "
                    "remove such files"
                )
        strays = output.images() - names.keys()
        if difference is not None and (others := strays & before.keys()):
            raise UserError(
                f"{output.path} holds {count(len(others), 'more image')}, that {difference}: fid.py would measure them "
                "together with these; use another --outdir, or remove them"
            )
        if strays:
            note = f"{output.path} also holds {count(len(strays), 'other image')}, which fid.py would measure too"
        if theirs is not None and difference is None:
            if skip_existing:
                present = {seed for name, seed in names.items() if name in before and output.has(name)}
            # Of a run that left nothing (out of memory at once?) there are no batches to keep.
            runs = [run for run in theirs.runs if not present.isdisjoint(run.seeds) or {*run.seeds} - {*seeds}]

    planned = {seed for run in runs for seed in run.seeds}
    fresh = tuple(seed for seed in seeds if seed not in planned)
    if len(planned) + len(fresh) > MAX_IMAGES:
        raise UserError(f"--outdir={output.path} would hold more than {MAX_IMAGES} images; use several")
    if fresh:
        runs.append(Run(fresh, count_batches(len(fresh), max_batch, world_size)))
    missing = {*seeds} - present
    batches = [batch for run in runs for batch in split_seeds(run.seeds, run.batches) if not missing.isdisjoint(batch)]
    manifest = replace(mine, runs=tuple(runs))
    is_done = not batches and isinstance(output, ImageFolder) and (not labelled or (output.path / LABELS).exists())
    if not is_done:
        output.begin(manifest, map(mine.name, fresh))
    return Work(manifest, batches, is_done, note)


@contextmanager
def writing(
    output: ImageFolder | ImageZip, name: Callable[[int], str]
) -> Iterator[Callable[[Sequence[int], Iterable[np.ndarray]], None]]:
    """Yields submit(seeds, images uint8 [N, H, W, C]): threads encode and write them, while the network makes the next.

    `submit` waits for the batch before, so that memory stays bounded, and raises an error that a thread has met; the
    end of the block waits for the last image.
    """
    waiting: list[Future[None]] = []

    def write(seed: int, image: np.ndarray) -> None:
        output.write(name(seed), encode_png(image))

    def submit(seeds: Sequence[int], images: Iterable[np.ndarray]) -> None:
        for future in waiting:
            future.result()
        waiting[:] = map(pool.submit, [write] * len(seeds), seeds, images)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield submit
        submit([], [])
