"""Files that are either the old one or the new one, never half of each. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import platform
import re
import secrets
import stat
import sys
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
    with contextlib.ExitStack() as stack:
        try:
            with os.fdopen(fd, "w+b") as file:
                if fcntl is not None:  # a second descriptor keeps the lock until the file has its name
                    stack.callback(os.close, os.dup(fd))
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException as exc:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
                for folder in made:
                    folder.rmdir()  # if nobody else has put something there
            if isinstance(exc, OSError) and exc.errno is not None and exc.filename in (None, temporary):
                raise OSError(exc.errno, exc.strerror, str(target)) from exc
            raise
    # Flushes the folder's list of names, so that the rename survives a power cut. Some systems can't.
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        stack.callback(os.close, names := os.open(target.parent, os.O_RDONLY))
        os.fsync(names)


def _make_temporary(target: Path) -> tuple[int, str]:
    """A new file beside `target`, open, and locked until it is closed, which marks it as being written."""
    folder = os.path.abspath(target.parent)
    if folder not in _cleaned:
        _cleaned.add(folder)
        remove_unfinished(folder)
    beginning = os.fsencode(target.name)[:100].decode("utf-8", "ignore")  # names of 255 bytes are the longest
    while True:
        temporary = str(target.with_name(f".{beginning}.{secrets.token_hex(8)}{SUFFIX}"))
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if _try_lock(fd) is not False and os.fstat(fd).st_nlink:
            return fd, temporary
        os.close(fd)  # between its making and its locking another process took it for one left behind


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
def locked(
    path: str | os.PathLike[str], patience: float = 5.0, place: str | os.PathLike[str] | None = None
) -> Iterator[None]:
    """Keeps other programs that ask for it from a folder, by a lock of the kernel, which ends with the process.

    patience: seconds to wait for the lock, because a killed process may need some to end. Raises UserError if it is
    still locked then. File systems without locks are not guarded; a warning names them.
    place: the lock file, which is made and removed: default `.lock` in the folder; needed where `path` is a file.
    """
    from filelock import FileLock, Timeout  # takes 0.2 s

    file = Path(path, ".lock") if place is None else Path(place)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=patience, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{os.fspath(path)}: another process is at work there; wait for it, or stop it") from None
    except OSError as exc:
        if exc.filename is not None:  # it can't be opened
            raise
        print(f"Warning: {file}: no locks here ({exc.strerror}); start no second process there", file=sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # before it is released: whoever gets it then finds that it has no name
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
    if os.path.islink(path):
        print(f"{printable(path)} was a link; it is a file of its own from here on", file=sys.stderr)
        os.unlink(path)
    return io.FileIO(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)), "ab")


def open_regular(path: str | os.PathLike[str], flags: int) -> int:
    """`os.open` of a file proper. Raises UserError for pipes, devices and sockets, which may never end."""
    problem = UserError(f"{os.fspath(path)}: not a file but a pipe or a device; put a file there, or use another path")
    try:
        fd = os.open(path, flags | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # a pipe that nobody reads, a socket
            raise problem from exc
        raise
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) if stat.S_ISDIR(mode) else problem
