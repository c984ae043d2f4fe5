"""Files that are either the old one or the new one, never half of each. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yields a binary file that becomes `path` when the block ends well, and vanishes when it doesn't.

    Written beside the target under an unpredictable name, flushed to disk, renamed over it, and the folder flushed,
    so that a crash at any moment leaves the old file or the new one. Raises OSError, with `path` as its file name.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".tmp")
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(target)) from exc
    try:
        with os.fdopen(fd, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; these are ordinary ones
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as exc:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(exc, OSError) and exc.errno is not None and exc.filename in (None, temporary):
            raise OSError(exc.errno, exc.strerror, str(target)) from exc
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a small text file in one piece (UTF-8)."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


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
