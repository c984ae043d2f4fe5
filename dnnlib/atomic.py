"""Files that are either the old one or the new one, never half of each. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import platform
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import UserError, printable

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# Ends the names of unfinished files: this program's, on this machine; locks may not reach from machine to machine.
SUFFIX = f".edm-{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}.tmp"
_UNFINISHED = re.compile(r"\..+\.edm-[0-9a-f]{8}\.tmp", re.DOTALL)
NO_FILE = "not a file but a pipe or a device; remove it, or use another path"
DAY = 24 * 3600.0
_cleaned: set[str] = set()  # folders that this process has looked through


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yields a binary file that becomes `path` when the block ends well, and vanishes when it doesn't.

    Written beside the target under an unpredictable name, flushed to disk, renamed over it, and the folder flushed,
    so that a crash at any moment leaves the old file or the new one. A process that is killed leaves its unfinished
    file behind; the next one that writes into the folder removes it. Raises OSError, with `path` as its file name.
    """
    target = Path(path)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = _make_temporary(target)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(target)) from exc
    held = contextlib.ExitStack()
    try:
        with os.fdopen(fd, "w+b") as file:
            if fcntl is not None:  # a second descriptor keeps the lock until the file has its name
                held.callback(os.close, os.dup(fd))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; these are ordinary ones
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as exc:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
            for folder in made:
                folder.rmdir()  # if nobody else has put something there
        if isinstance(exc, OSError) and exc.errno is not None and exc.filename in (None, temporary):
            raise OSError(exc.errno, exc.strerror, str(target)) from exc
        raise
    finally:
        held.close()


def _make_temporary(target: Path) -> tuple[int, str]:
    """A new file beside `target`, open, and locked until it is closed, which marks it as being written."""
    folder = os.path.abspath(target.parent)
    if folder not in _cleaned:
        _cleaned.add(folder)
        remove_unfinished(folder)
    while True:
        fd, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{_short(target.name)}.", suffix=SUFFIX)
        if _try_lock(fd) is not False and os.fstat(fd).st_nlink:
            return fd, temporary
        os.close(fd)  # between its making and its locking another process took it for one left behind


def _short(name: str) -> str:
    """As much of a file's name as leaves room for a prefix and a suffix: 255 bytes are what file systems take."""
    return os.fsencode(name)[:100].decode("utf-8", "ignore")


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Removes what killed processes of this program have left in a folder: unfinished files that nobody holds.

    Those of other machines must be a day old too; where a file system knows no locks, nothing is touched.
    """
    for entry in os.scandir(folder):
        if _UNFINISHED.fullmatch(entry.name):
            with contextlib.suppress(OSError):  # gone already, or not ours to remove
                if entry.name.endswith(SUFFIX) or time.time() - entry.stat().st_mtime > DAY:
                    with os.fdopen(os.open(entry.path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
                        if _try_lock(file.fileno()):
                            os.unlink(entry.path)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], patience: float = 5.0) -> Iterator[None]:
    """Keeps other programs that ask for it from the folder (made if need be), by a lock of the kernel on a file in it,
    which ends with the process.

    patience: seconds to wait for the process that has it, which may be a killed one on its way out. Raises UserError
    where it stays. File systems that know no locks are not guarded, which a warning names.
    """
    busy = f"{os.fspath(folder)}: another process is at work there; wait for it, or stop it"
    with _lock(os.path.join(folder, ".lock"), patience, busy):
        yield


@contextlib.contextmanager
def locked_file(path: str | os.PathLike[str], patience: float) -> Iterator[None]:
    """The same for a file that is to be written, by a lock beside it that is gone afterwards."""
    name = Path(path).name
    place = Path(path).with_name(f".{name if len(os.fsencode(name)) < 250 else _short(name)}.lock")
    with _lock(place, patience, f"{os.fspath(path)}: another process is at work on it; wait for it, or stop it"):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                place.unlink()  # before it is released: whoever gets it then sees that it has no name


@contextlib.contextmanager
def _lock(file: str | os.PathLike[str], patience: float, busy: str) -> Iterator[None]:
    from filelock import FileLock, Timeout  # takes 0.2 s

    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    lock = FileLock(file, timeout=patience, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(busy) from None
    except OSError as exc:
        if exc.filename is not None:  # it can't be opened
            raise
        print(f"Warning: {file}: no locks here ({exc.strerror}); start no second process there", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def _try_lock(fd: int) -> bool | None:
    """Whether the file is this process's now; None where there are no locks, in the system or on the file system."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises the OSError with which `atomic_write(path)` would fail, as far as it can be known without writing.

    For work that takes hours before its result is written.
    """
    if os.path.isdir(path) or not os.path.basename(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path) or ".")
    check_folder(Path(path).parent)


def check_folder(path: str | os.PathLike[str]) -> None:
    """The same for a folder that is to be there, or to be made, with files written into it."""
    place = Path(path)
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def check_no_link(path: str | os.PathLike[str]) -> None:
    """For a folder that is made in one of this program's own. Raises UserError where a link has its name: nothing is
    written through it."""
    if os.path.islink(path):
        raise UserError(f"{os.fspath(path)}: is a link; put the folder itself there, or remove the link")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a small text file in one piece (UTF-8; halves of characters, which paths may hold, as escapes)."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Adds `text` (UTF-8) to the end of a file: all of it, or nothing where the disk is full. Not flushed to disk."""
    data = memoryview(text.encode("utf-8", "backslashreplace"))
    with open_for_append(path) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as exc:
            file.truncate(start)
            raise OSError(exc.errno, exc.strerror, os.fspath(path)) from exc


def open_for_append(path: str | os.PathLike[str]) -> io.FileIO:
    """`open(path, "ab", buffering=0)` of a file proper. A link of that name is replaced by a file, never followed, and
    what it led to stays as it is. Raises UserError for pipes, devices and sockets."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
    if os.path.islink(path):
        print(f"{printable(path)} was a link; it is a file of its own from here on", file=sys.stderr)
        os.unlink(path)
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as exc:
        if exc.errno != errno.ENXIO:  # a pipe that nobody reads, a socket
            raise
        raise UserError(f"{os.fspath(path)}: {NO_FILE}") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{os.fspath(path)}: {NO_FILE}")
    return io.FileIO(fd, "ab")


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flushes a folder's list of names, so that a rename survives a power cut. Nothing to do where that can't be."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass  # some network file systems refuse to flush a folder; the rename itself has been done
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
