"""Writing many images: into a folder or a zip, with a manifest that says who made them, so that a run can go on.

The manifest (`manifest.json`) holds the network's hash, the options that the images depend on, and which seeds were
made in how many batches: the size of a batch decides how sums round, so a run that goes on keeps the batches it began
with and its images are those of a run that was never interrupted.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
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

from .dataset import image_formats
from .sampling import count_batches, split_seeds

MANIFEST = "manifest.json"
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip's file, without its name
PATIENCE = 20.0  # seconds to wait for a zip: processes of a killed launcher, which may hold it, have ended by then
PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"  # a file that ends otherwise was cut off


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
        """Raises UserError for anything that `to_json` didn't write."""
        try:
            data = json.loads(text)
            runs = tuple(Run(tuple(parse_int_list(run["seeds"])), int(run["batches"])) for run in data["runs"])
            return cls(dict(data["network"]), dict(data["options"]), runs)
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
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
# Where images go. Several processes write at once, each image is written by one of them; `previous`, `begin` and
# `finish` are rank 0's business, before the others `open` and after they `close`.


class ImageFolder:
    """A folder of image files, each written in one piece."""

    is_unfinished = False  # each image is in its place

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def held(self) -> AbstractContextManager[None]:
        """Nothing to hold: whoever makes the same images writes the same files."""
        return nullcontext()

    def previous(self, mine: Manifest, unfinished: bool) -> Manifest | None:
        """What an earlier run left here, or None. Raises UserError for a path that is no folder."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--outdir={self.path} is a file; name a folder, or a .zip")
        path = self.path / MANIFEST
        return Manifest.from_json(path.read_bytes(), path) if path.is_file() else None

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
        """Says who makes the images from here on, and removes what others left in the place of the `fresh` ones."""
        check_folder(self.path)
        for name in fresh:
            (self.path / name).unlink(missing_ok=True)
        write_text(self.path / MANIFEST, manifest.to_json())

    def open(self, rank: int) -> None:
        """Nothing to do: folders are made as they are needed."""

    def write(self, name: str, data: bytes) -> None:
        """Writes one image; threads may do so at the same time."""
        with atomic_write(self.path / name) as file:
            file.write(data)

    def close(self, complete: bool) -> None:
        """Nothing to do: every image is in its place."""

    def finish(self, manifest: Manifest, needed: Iterable[str]) -> None:
        """Nothing to do either."""


class ImageZip:
    """An uncompressed zip of images, sorted by name, with the manifest last.

    It appears, or replaces what was there, when all is written; until then each process writes a part of its own beside
    it (`.NAME.part…`), and a journal there says who is at work, so that a run can go on with what others have left.
    The zip's bytes depend on the images alone, not on the number of processes, interruptions or the time of day.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._kept: frozenset[str] = frozenset()  # images of the zip that is already there
        self._left: dict[str, _Piece] = {}  # images of parts that an interrupted run has left
        self._part: zipfile.ZipFile | None = None
        self._part_file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def held(self) -> AbstractContextManager[None]:
        """Keeps others from this zip and its parts. Raises UserError where one is at work, OSError where nothing can be
        written."""
        check_folder(self.path.parent)
        return locked_file(self.path, PATIENCE)

    def previous(self, mine: Manifest, unfinished: bool) -> Manifest | None:
        """What an earlier run left here, or None; with `unfinished` also one that did not come to its end, unless only
        the zip before it is like `mine`. Raises UserError for a path that is no zip."""
        if self.path.is_dir():
            raise UserError(f"--outdir={self.path} is a folder; name a new .zip, or a folder without .zip")
        manifest = self._finished() if self.path.exists() else None
        journal = self._read_journal() if unfinished else None
        if journal is not None and (manifest is None or mine.difference(journal.manifest) is None):
            self._kept &= journal.kept
            for path in self._parts():
                self._left.update(_pieces(path))
            return journal.manifest
        return manifest

    def _finished(self) -> Manifest:
        try:
            with zipfile.ZipFile(self.path) as old:
                names = old.namelist()
                text = old.read(MANIFEST) if MANIFEST in names else None
        except zipfile.BadZipFile as exc:
            raise UserError(f"--outdir={self.path} is no zip ({exc}); remove it, or use another name") from exc
        if text is None:  # somebody's data set?
            raise UserError(f"--outdir={self.path} holds no {MANIFEST}, so it is not ours to replace; use another name")
        self._kept = frozenset(names) - {MANIFEST}
        return Manifest.from_json(text, self.path / MANIFEST)

    def has(self, name: str) -> bool:
        """Whether this image is in the zip that is already there, or in a part of it."""
        return name in self._kept or name in self._left

    @property
    def is_unfinished(self) -> bool:
        """Whether there are parts to be put together, as `previous` has found."""
        return bool(self._left)

    def begin(self, manifest: Manifest, fresh: Iterable[str]) -> None:
        """Keeps those of the earlier images that `manifest` speaks of and that aren't to be made afresh."""
        stay = frozenset(manifest.names()) - frozenset(fresh)
        self._kept &= stay
        self._left = {name: piece for name, piece in self._left.items() if name in stay}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        needed = {piece.path for piece in self._left.values()}
        for path in self._part_names():  # of a run that was killed; or links, through which nothing is to be written
            if path not in needed:
                path.unlink()
        generation = 1 + max((_generation(path) for path in needed), default=-1)
        write_text(self._journal(), _Journal(manifest, self._kept, generation).to_json())

    def open(self, rank: int) -> None:
        """Begins this process's part."""
        journal = self._read_journal()
        assert journal is not None, "rank 0 has just written it"
        path = self._part_path(journal.generation, rank)
        self._part_file = open(path, "xb")  # noqa: SIM115 (never somebody else's, or what a link of that name leads to)
        self._part = zipfile.ZipFile(self._part_file, "w", zipfile.ZIP_STORED)

    def write(self, name: str, data: bytes) -> None:
        """Writes one image; threads may do so at the same time."""
        assert self._part is not None
        try:
            with self._lock:
                self._part.writestr(name, data)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, str(self.path)) from exc

    def close(self, complete: bool) -> None:
        """Completes this process's part, or leaves it for a run that goes on, if there is anything in it."""
        if self._part is None or self._part_file is None:
            return
        with self._lock, nullcontext() if complete else suppress(OSError):  # a full disk has been reported already
            try:
                self._part.close()
            finally:
                self._part_file.close()
        if not complete and not self._part.namelist():
            Path(self._part_file.name).unlink(missing_ok=True)
            if not self._parts():
                self._journal().unlink(missing_ok=True)

    def finish(self, manifest: Manifest, needed: Iterable[str]) -> None:
        """Puts the parts, and the images kept, together. Raises UserError where a needed one is missing."""
        parts = self._parts()
        for path in parts:
            self._left.update(_pieces(path))
        missing = sum(not self.has(name) for name in needed)
        if missing:
            raise UserError(f"{self.path}: {missing} images are missing in its parts; start again with --skip-existing")
        with ExitStack() as stack, atomic_write(self.path) as file:
            files = {path: stack.enter_context(open(path, "rb")) for path in parts}
            old = stack.enter_context(zipfile.ZipFile(self.path)) if self._kept else None
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
                for name in sorted({*self._kept, *self._left} & {*manifest.names()}):
                    piece = self._left.get(name)
                    if piece is not None:
                        files[piece.path].seek(piece.start)
                        data = files[piece.path].read(piece.size)
                    else:
                        assert old is not None
                        data = old.read(name)
                    target.writestr(zipfile.ZipInfo(name), data)  # ZipInfo: always the same date
                target.writestr(zipfile.ZipInfo(MANIFEST), manifest.to_json())
        for path in [*parts, self._journal()]:
            path.unlink(missing_ok=True)

    def _journal(self) -> Path:
        return self.path.with_name(f".{self.path.name}.parts.json")

    def _read_journal(self) -> _Journal | None:
        """None where there is none, or none that can be read."""
        try:
            return _Journal.from_json(self._journal().read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):
            return None

    def _part_path(self, generation: int, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.part{generation}-{rank}")

    def _part_names(self) -> list[Path]:
        """Whatever has the name of a part."""
        pattern = re.compile(rf"{re.escape(f'.{self.path.name}.part')}\d+-\d+")
        folder = self.path.parent
        return [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []

    def _parts(self) -> list[Path]:
        """The parts that there are, the oldest first."""
        found = (path for path in self._part_names() if path.is_file() and not path.is_symlink())
        return sorted(found, key=_generation)


def _generation(part: Path) -> int:
    """How many runs that were interrupted came before the one that wrote a part."""
    return int(part.name.rpartition(".part")[2].partition("-")[0])


@dataclass(frozen=True)
class _Journal:
    """Who writes a zip's parts, which images of the zip that is there are to stay, and which run this is."""

    manifest: Manifest
    kept: frozenset[str]
    generation: int

    def to_json(self) -> str:
        values = {"kept": sorted(self.kept), "generation": self.generation}
        return json.dumps({**values, "manifest": json.loads(self.manifest.to_json())})

    @classmethod
    def from_json(cls, text: str) -> _Journal:
        data = json.loads(text)
        manifest = Manifest.from_json(json.dumps(data["manifest"]), "the journal")
        return cls(manifest, frozenset(data["kept"]), int(data["generation"]))


@dataclass(frozen=True)
class _Piece:
    """Where an image lies in a part."""

    path: Path
    start: int
    size: int


def _pieces(path: Path) -> dict[str, _Piece]:
    """The whole images of a part, which has no table of contents if its process was killed: from one header to the
    next, as far as each image has its checksum."""
    found: dict[str, _Piece] = {}
    with open(path, "rb") as file:
        while len(header := file.read(LOCAL_HEADER.size)) == LOCAL_HEADER.size:
            magic, _, flags, method, _, _, crc, size, full_size, name_size, extra_size = LOCAL_HEADER.unpack(header)
            if magic != b"PK\x03\x04" or flags & 8 or method != zipfile.ZIP_STORED or size != full_size:
                break
            name = file.read(name_size)
            file.seek(extra_size, os.SEEK_CUR)
            start = file.tell()
            if zlib.crc32(file.read(size)) != crc or file.tell() != start + size or not name.isascii():
                break
            found[name.decode("ascii")] = _Piece(path, start, size)
    return found


def open_output(outdir: str | os.PathLike[str]) -> ImageFolder | ImageZip:
    """A zip if the name ends so, otherwise a folder. Touches nothing yet."""
    return ImageZip(outdir) if str(outdir).lower().endswith(".zip") else ImageFolder(outdir)


# ----------------------------------------------------------------------------------------------------------------------
# Going on


@dataclass(frozen=True)
class Work:
    """What is to be done: `batches` of seeds to be made, the manifest to leave, a `note` for people (or '').

    is_unfinished: there are parts of a zip, to be put together even if no image is missing.
    """

    manifest: Manifest
    batches: list[list[int]]
    is_unfinished: bool
    note: str = ""


def prepare(
    output: ImageFolder | ImageZip,
    mine: Manifest,
    seeds: Sequence[int],
    *,
    max_batch: int,
    world_size: int = 1,
    skip_existing: bool = False,
) -> Work:
    """Finds out which batches must be made, and readies `output` for them. `mine` says who is about to do so.

    Without `skip_existing` everything is made afresh. With it, seeds of earlier runs keep the batches they had, and
    those whose images are all there are left out. Raises UserError where images of somebody else would get mixed in.
    """
    theirs = output.previous(mine, unfinished=skip_existing)
    difference = None if theirs is None else mine.difference(theirs)
    names = {seed: mine.name(seed) for seed in seeds}
    advice = "use another --outdir"
    if theirs is None or isinstance(output, ImageZip) or {*theirs.names()} <= {*names.values()}:
        advice += ", or leave --skip-existing out to make all of them anew"
    if skip_existing and difference is not None:
        raise UserError(f"{output.path}, or what is there of it, holds images that {difference}; {advice}")
    if skip_existing and theirs is None and any(map(output.has, names.values())):
        raise UserError(f"{output.path} holds images, but no {MANIFEST} that says who made them; {advice}")

    runs: list[Run] = []
    present: set[int] = set()
    if theirs is not None and difference is None and skip_existing:
        present = {seed for run in theirs.runs for seed in run.seeds if seed in names and output.has(names[seed])}
        # Of a run that left nothing (out of memory at once?) there are no batches to keep.
        runs = [run for run in theirs.runs if not names.keys() >= set(run.seeds) or not present.isdisjoint(run.seeds)]
    elif theirs is not None and difference is None and isinstance(output, ImageFolder):  # they stay where they are
        runs = [run for run in theirs.runs if names.keys().isdisjoint(run.seeds)]
    known = {seed for run in runs for seed in run.seeds}
    fresh = tuple(seed for seed in names if seed not in known)
    if fresh:
        runs.append(Run(fresh, count_batches(len(fresh), max_batch, world_size)))
    missing = names.keys() - present
    batches = [batch for run in runs for batch in split_seeds(run.seeds, run.batches) if not missing.isdisjoint(batch)]

    work = Work(replace(mine, runs=tuple(runs)), batches, output.is_unfinished)
    left = {*work.manifest.names()}
    if theirs is not None and isinstance(output, ImageFolder):  # a zip is made anew, of what the manifest speaks of
        left |= {*theirs.names()}
    strays = sum(map(output.has, left - {*names.values()}))
    if strays and difference is not None:
        raise UserError(
            f"{output.path} holds {strays} more images, that {difference}: fid.py would measure them together with "
            "these; use another --outdir, or remove them"
        )
    if isinstance(output, ImageZip) and theirs is not None and not skip_existing:
        gone = len({*theirs.names()} - {*names.values()})
        if gone:
            work = replace(work, note=f"{output.path} is made anew, without its {gone} images of other seeds")
    if strays:
        work = replace(work, note=f"{output.path} also holds {strays} images of other seeds, measured by fid.py too")
    others = output.foreign(set(names.values())) if theirs is None and isinstance(output, ImageFolder) else 0
    if others:
        work = replace(work, note=f"{output.path} also holds {others} other images, which fid.py would measure too")
    if batches or output.is_unfinished:
        output.begin(work.manifest, [names[seed] for seed in fresh])
    return work


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
