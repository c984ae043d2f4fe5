"""Writing many images: into a folder or a zip, with a manifest of how they were made.

The manifest (`manifest.json`) holds the network's hash, the options that the images depend on, and which seeds were
made in how many batches: the size of a batch decides how sums round, so a folder that is continued keeps the batches it
began with, and its images are those of a run that was never interrupted. The images of a network with classes have
`dataset.json` beside them: their labels, in EDM's format. A zip is made in one go, or anew.
"""

from __future__ import annotations

import io
import json
import os
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from PIL import Image

from dnnlib.atomic import atomic_write, check_folder, locked_file, write_text
from dnnlib.cli import UserError, parse_int_list
from dnnlib.util import LIMITS, count, open_file, read_file
from training.decoding import image_formats
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

    def names(self) -> list[str]:
        """All images."""
        return [self.name(seed) for run in self.runs for seed in run.seeds]

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
    start = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[end - 1] + 1:
            first, last = values[start], values[end - 1]
            # parse_int_list reads no ranges of negative numbers
            parts += map(str, values[start:end]) if last - first < 2 or first < 0 else [f"{first}-{last}"]
            start = end
    return ",".join(parts)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, C] (C = 1 or 3) as an 8-bit PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Where images go. Several processes write at once, each image is written by one of them; `lock`, `previous`, `begin`
# and `finish` are rank 0's business, before the others `open` and after they `close`.


class ImageFolder:
    """A folder of image files, each written in one piece."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def lock(self) -> AbstractContextManager[None]:
        """Keeps others out. Raises UserError where one is at work, OSError where nothing can be written."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--outdir={self.path} is a file; name a folder, or a .zip")
        check_folder(self.path)
        return locked_file(self.path / MANIFEST, PATIENCE)

    def previous(self) -> Manifest | None:
        """What an earlier run left here, or None."""
        path = self.path / MANIFEST
        if not path.exists():
            return None
        return Manifest.from_json(read_file(path, "JSON"), path)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name, whole or not."""
        return os.path.lexists(self.path / name)

    def has(self, name: str) -> bool:
        """Whether this image is here, and whole (a crash of the machine can leave empty files)."""
        path = self.path / name
        if not path.is_file() or path.stat().st_size < len(PNG_END):
            return False
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END

    def foreign(self, names: Container[str]) -> int:
        """How many image files beside those called `names` lie here."""
        found = os.listdir(self.path) if self.path.is_dir() else []
        endings = image_formats()[0]
        return sum(os.path.splitext(name)[1].lower() in endings and name not in names for name in found)

    def begin(self, manifest: Manifest, fresh: Iterable[str]) -> None:
        """Records who makes the images from here on, and removes what others left in the place of the `fresh` ones."""
        for folder in {os.path.dirname(name) for name in manifest.names()}:
            self._check_own(folder)
        for name in (*fresh, LABELS):  # the labels come back when all is done
            (self.path / name).unlink(missing_ok=True)
        write_text(self.path / MANIFEST, manifest.to_json())

    def open(self, rank: int) -> None:
        """Nothing to do: folders are made as they are needed."""

    def write(self, name: str, data: bytes) -> None:
        """Writes one image; threads may do so at the same time."""
        self._check_own(os.path.dirname(name))
        with atomic_write(self.path / name) as file:
            file.write(data)

    def _check_own(self, folder: str) -> None:
        """Raises UserError for a subfolder that is a link: what it leads to is not ours to write."""
        if folder and (self.path / folder).is_symlink():
            raise UserError(f"{self.path / folder} is a link, and not followed; remove it, or use another --outdir")

    def close(self, complete: bool) -> None:
        """Nothing to do: every image is in its place."""

    def finish(self, manifest: Manifest, labels: Labels) -> None:
        """Writes the labels, if there are any."""
        if labels:
            write_text(self.path / LABELS, labels_json(labels))


class ImageZip:
    """An uncompressed zip of images, sorted by name, with the labels (if there are any) and the manifest last.

    It appears, or replaces what was there, when all is written; until then each process writes a part of its own beside
    it (`.NAME….part…`), which the next run removes if this one is killed. The zip's bytes depend on the images alone,
    not on the number of processes or the time of day.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._part: zipfile.ZipFile | None = None
        self._part_file: IO[bytes] | None = None
        self._writing = threading.Lock()

    def lock(self) -> AbstractContextManager[None]:
        """Keeps others out. Raises UserError where one is at work, OSError where nothing can be written."""
        if self.path.is_dir():
            raise UserError(f"--outdir={self.path} is a folder; name a new .zip, or a folder without .zip")
        check_folder(self.path.parent)
        return locked_file(self.path, PATIENCE)

    def previous(self) -> Manifest | None:
        """Who made the zip that is there, or None. Raises UserError for a file that is not ours to replace."""
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

    def has(self, name: str) -> bool:
        """Nothing of an earlier zip stays."""
        return False

    def begin(self, manifest: Manifest, fresh: Iterable[str]) -> None:
        """Removes the parts of a run that was killed; and links of such names, which `open` refuses."""
        for path in self._parts():
            path.unlink()

    def open(self, rank: int) -> None:
        """Begins this process's part."""
        path = self.path.with_name(f"{self._stem()}{rank}")
        self._part_file = open(path, "xb")  # noqa: SIM115 (never somebody else's, or what a link of that name leads to)
        self._part = zipfile.ZipFile(self._part_file, "w", zipfile.ZIP_STORED)

    def write(self, name: str, data: bytes) -> None:
        """Writes one image; threads may do so at the same time."""
        assert self._part is not None
        try:
            with self._writing:
                self._part.writestr(name, data)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, str(self.path)) from exc

    def close(self, complete: bool) -> None:
        """Completes this process's part, or removes it."""
        if self._part is None or self._part_file is None:
            return
        whole = False
        try:
            with self._part_file, nullcontext() if complete else suppress(OSError):  # a full disk is reported already
                self._part.close()
            whole = complete
        finally:
            if not whole:
                Path(self._part_file.name).unlink(missing_ok=True)

    def finish(self, manifest: Manifest, labels: Labels) -> None:
        """Puts the parts together. Raises UserError where an image is missing."""
        paths = self._parts()
        try:
            with ExitStack() as stack, atomic_write(self.path) as file:
                parts = [stack.enter_context(zipfile.ZipFile(path)) for path in paths]
                found = {name: part for part in parts for name in part.namelist()}
                missing = sum(name not in found for name in manifest.names())
                if missing:
                    raise UserError(f"{self.path}: {count(missing, 'image')} missing in its parts; make it again")
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:  # ZipInfo: always the same date
                    for name in sorted(manifest.names()):
                        target.writestr(zipfile.ZipInfo(name), found[name].read(name))
                    if labels:
                        target.writestr(zipfile.ZipInfo(LABELS), labels_json(labels))
                    target.writestr(zipfile.ZipInfo(MANIFEST), manifest.to_json())
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    def _stem(self) -> str:
        """How the names of parts begin: like the zip's, and short enough where that one is not."""
        return f".{self.path.name[:40]}.{zlib.crc32(os.fsencode(self.path.name)):08x}.part"

    def _parts(self) -> list[Path]:
        stem, folder = self._stem(), self.path.parent
        return [path for path in folder.iterdir() if path.name.startswith(stem)] if folder.is_dir() else []


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
    *,
    max_batch: int,
    world_size: int = 1,
    skip_existing: bool = False,
    labelled: bool = False,
) -> Work:
    """Finds out which batches must be made, and readies `output` for them. `mine` says who is about to do so.

    Without `skip_existing` everything is made afresh. With it, seeds of a folder's earlier runs keep the batches they
    had, and those whose images are all there are left out; a zip that lacks some is made anew. labelled: the images are
    to have labels. Raises UserError where images of somebody else would get mixed in, or be lost.
    """
    theirs = output.previous()
    difference = None if theirs is None else mine.difference(theirs)
    names = {seed: mine.name(seed) for seed in seeds}
    wanted, before = {*names.values()}, set() if theirs is None else {*theirs.names()}
    is_zip = isinstance(output, ImageZip)
    if skip_existing and difference is not None:
        anew = ", or leave --skip-existing out to make all of them anew" if is_zip or before <= wanted else ""
        raise UserError(f"{output.path} holds images that {difference}; use another --outdir{anew}")
    if theirs is not None and is_zip and skip_existing and before >= wanted:
        return Work(theirs, [], is_done=True)
    if isinstance(output, ImageFolder):
        ours = before if theirs is None else {*before, LABELS}
        others = [name for name in (*names.values(), LABELS) if name not in ours and output.exists(name)]
        if others:
            found = others[0] + " and more" * (len(others) > 1)
            raise UserError(
                f"{output.path} holds {found}, but no {MANIFEST} that says who "
                "made them; use another --outdir, or remove them"
            )

    runs: list[Run] = []
    present: set[int] = set()
    if theirs is not None and difference is None and isinstance(output, ImageFolder):
        if skip_existing:
            present = {seed for run in theirs.runs for seed in run.seeds if seed in names and output.has(names[seed])}
            # Of a run that left nothing (out of memory at once?) there are no batches to keep.
            runs = [r for r in theirs.runs if not names.keys() >= {*r.seeds} or not present.isdisjoint(r.seeds)]
        else:  # the images of other seeds stay where they are
            rest = (replace(run, seeds=tuple(seed for seed in run.seeds if seed not in names)) for run in theirs.runs)
            runs = [run for run in rest if run.seeds]
    known = {seed for run in runs for seed in run.seeds}
    fresh = tuple(seed for seed in names if seed not in known)
    if fresh:
        runs.append(Run(fresh, count_batches(len(fresh), max_batch, world_size)))
    missing = names.keys() - present
    batches = [batch for run in runs for batch in split_seeds(run.seeds, run.batches) if not missing.isdisjoint(batch)]
    manifest = replace(mine, runs=tuple(runs))
    if sum(len(run.seeds) for run in runs) > MAX_IMAGES:
        raise UserError(f"--outdir={output.path} would hold more than {MAX_IMAGES} images; use several")

    note = ""
    if isinstance(output, ImageFolder):
        strays = count(sum(map(output.has, {*manifest.names(), *before} - wanted)), "more image")
        if strays[0] != "0" and difference is not None:
            raise UserError(
                f"{output.path} holds {strays}, that {difference}: fid.py would measure them together with these; use "
                "another --outdir, or remove them"
            )
        if theirs is None:
            strays = count(output.foreign(wanted), "other image")
        if strays[0] != "0":
            note = f"{output.path} also holds {strays}, which fid.py would measure too"
    elif theirs is not None and (skip_existing or before - wanted):
        lost = f", without its {count(len(before - wanted), 'image')} of other seeds" if before - wanted else ""
        note = f"{output.path} is made anew{lost}"
    elif skip_existing:
        note = f"{output.path} is made in one go: --skip-existing continues folders, not zips"
    is_done = not batches and isinstance(output, ImageFolder) and (output.exists(LABELS) or not labelled)
    if not is_done:
        output.begin(manifest, [names[seed] for seed in fresh])
    return Work(manifest, batches, is_done, note)


class BackgroundWriter:
    """Encodes and writes images in threads, while the network makes the next ones.

    A context manager: its end waits for the last image. An error of a thread is raised by the next call.
    """

    def __init__(self, output: ImageFolder | ImageZip, name: Callable[[int], str], rank: int = 0) -> None:
        self._output, self._name, self._rank = output, name, rank
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        self._waiting: deque[list[Future[None]]] = deque()

    def __enter__(self) -> BackgroundWriter:
        self._output.open(self._rank)
        return self

    def submit(self, seeds: Sequence[int], images: np.ndarray) -> None:
        """images: uint8 [N, H, W, C]. Waits while more than two batches are under way, so that memory stays bounded."""
        pairs = zip(seeds, images, strict=True)
        self._waiting.append([self._pool.submit(self._write, self._name(seed), image) for seed, image in pairs])
        self._wait(2)

    def _write(self, name: str, image: np.ndarray) -> None:
        self._output.write(name, encode_png(image))

    def _wait(self, batches: int) -> None:
        while len(self._waiting) > batches:
            for future in self._waiting.popleft():
                future.result()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = False
        try:
            if kind is None:
                self._wait(0)
                complete = True
        finally:
            # Who is interrupted keeps what was made; after an error (a full disk?) nothing more is tried.
            self._pool.shutdown(cancel_futures=kind is None or not issubclass(kind, KeyboardInterrupt))
            self._output.close(complete)
