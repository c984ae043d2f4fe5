"""EasyDict, times in words, and opening files that may be URLs (with a cache that never holds half a file)."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import itertools
import json
import os
import re
import stat
import sys
import time
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .atomic import atomic_write
from .errors import UserError

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 16  # bytes taken from a connection at a time: what is lost at most when it breaks off
MAX_REDIRECTS = 10
MAX_SILENT = 3  # a host that does not answer at all is given up after so many attempts
CONNECT_TIMEOUT = 5.0  # seconds until a host that does not even take the connection counts as silent
MAX_PAUSE = 8.0  # seconds, the longest wait between two attempts
LIMITS = {  # bytes that a file of a kind may have: many times what this program or EDM's writes
    "a network": 8 << 30,
    "a training state": 32 << 30,
    "statistics": 1 << 30,
    "a detector": 1 << 30,
    "JSON": 1 << 26,
    "a run's JSON": 1 << 22,
    "a log": 1 << 28,
    "a picture": 1 << 28,
}


class EasyDict(dict[str, Any]):
    """A dict whose entries are also attributes: `d.x` is `d["x"]`. The name that EDM's network pickles refer to."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


def count(number: int, noun: str) -> str:
    """'1 step', '2 steps', '2 classes'."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def format_time(seconds: float) -> str:
    """A duration as EDM's status line shows it: '7s', '5m 10s', '2h 05m 10s', '1d 02h 03m'."""
    total = round(seconds)
    minutes, s = divmod(total, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if total < 60:
        return f"{s}s"
    if total < 60 * 60:
        return f"{m}m {s:02d}s"
    if total < 24 * 60 * 60:
        return f"{h}h {m:02d}m {s:02d}s"
    return f"{days}d {h:02d}h {m:02d}m"


def is_url(obj: Any, allow_file_urls: bool = False) -> bool:
    """Whether `obj` is an http(s) URL, or a file:// URL where those are allowed."""
    if not isinstance(obj, str) or "://" not in obj:
        return False
    try:
        parts = urllib.parse.urlsplit(obj)
    except ValueError:
        return False
    scheme = parts.scheme.lower()
    return (scheme in ("http", "https") and bool(parts.netloc)) or (allow_file_urls and scheme == "file")


def make_cache_dir_path(*paths: str) -> str:
    """A folder below $DNNLIB_CACHE_DIR, or below ~/.cache/dnnlib. It is not made here."""
    root = os.environ.get("DNNLIB_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "dnnlib")
    return os.path.join(root, *paths)


def is_cached(url: str) -> bool:
    """Whether `open_url` has the content here already."""
    return bool(_cached(url, make_cache_dir_path("downloads"))[1])


def _cached(url: str, folder: str) -> tuple[str, list[str]]:
    """What the names of its files in a cache begin with, and those that there are."""
    key = hashlib.md5(url.encode("utf-8"), usedforsecurity=False).hexdigest()
    return key, sorted(glob.glob(os.path.join(glob.escape(folder), f"{key}_*")))


def open_url(
    url: str | os.PathLike[str],
    cache_dir: str | None = None,
    num_attempts: int = 10,
    verbose: bool = True,
    return_filename: bool = False,
    cache: bool = True,
    *,
    pause: float = 0.5,
    timeout: float = 60.0,
) -> Any:
    """Opens a local path, a file:// URL or an http(s) URL for reading in binary. EDM's signature, and two more options.

    cache_dir: folder for downloads; default `downloads` below $DNNLIB_CACHE_DIR or ~/.cache/dnnlib.
    num_attempts: how often a download is tried, each attempt going on where the last one stopped if the server allows.
    verbose: show a progress bar on standard error (rank 0 only).
    return_filename: return the name of the local file instead of an open file.
    cache: keep the download; otherwise it is held in memory.
    pause: seconds before the second attempt, doubled for each one after it.
    timeout: seconds of silence after which a connection counts as lost.

    A download reaches its cache name complete or not at all, so processes may share the cache. Raises UserError for
    whatever the user can mend: a missing file, an unreachable host, HTTP 404, a web page in place of data.
    """
    if num_attempts < 1:
        raise ValueError("num_attempts must be at least 1")
    if return_filename and not cache:
        raise ValueError("a file name can only be returned for a file that is kept: cache=True")
    name = os.fspath(url)
    if not is_url(name):
        path = local_path(name)
        if not path:
            raise UserError("the name of a file to read is empty; give a path or a URL")
        if not os.path.exists(path):
            raise UserError(f"{name}: no such file")
        if os.path.isdir(path):
            raise UserError(f"{name}: is a folder, a file is needed")
        return path if return_filename else open_file(path)

    fetch = _Download(name, num_attempts, verbose and os.environ.get("RANK", "0") == "0", pause, timeout)
    if not cache:
        buffer = io.BytesIO()
        fetch.into(buffer)
        buffer.seek(0)
        return buffer
    folder = cache_dir or make_cache_dir_path("downloads")
    key, found = _cached(name, folder)
    if found:
        return found[0] if return_filename else open(found[0], "rb")
    base = os.path.basename(urllib.parse.urlsplit(name).path) or "download"
    target = os.path.join(folder, f"{key}_{re.sub(r'[^0-9a-zA-Z._-]', '_', base)[-128:]}")
    with atomic_write(target) as file:
        fetch.into(file)
    return target if return_filename else open(target, "rb")


def open_file(
    path: str | os.PathLike[str], kind: str | None = None, within: str | os.PathLike[str] | None = None
) -> IO[bytes]:
    """`open(path, "rb")` of a file proper: every file that this program has not just written itself is opened here.

    kind: of `LIMITS`, whose size the file may not exceed; None for no limit.
    within: the folder that the file must lie in, wherever links on the way lead.

    Raises UserError for pipes, devices and sockets, which may never end, for what is too large, and for what lies
    outside; OSError as `open` does.
    """
    name = os.fspath(path)
    if within is not None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(within)):
        raise UserError(f"{name}: is a link to something outside of {os.fspath(within)}; put the file itself there")
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as exc:
        if exc.errno != errno.ENXIO:  # a socket
            raise
        raise UserError(f"{name}: {_NO_FILE}") from exc
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{name}: {_NO_FILE}")
        if kind is not None and found.st_size > LIMITS[kind]:
            raise UserError(f"{name}: {_too_large(kind)}")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_file(path: str | os.PathLike[str], kind: str, within: str | os.PathLike[str] | None = None) -> bytes:
    """The content of a small file, opened by `open_file`. Raises UserError where it grows beyond its limit."""
    with open_file(path, kind, within) as file:
        # by the MiB: `read` takes memory for all that it is asked for, before it knows how much there is
        data = b"".join(itertools.islice(iter(partial(file.read, 1 << 20), b""), (LIMITS[kind] >> 20) + 1))
    if len(data) > LIMITS[kind]:
        raise UserError(f"{os.fspath(path)}: {_too_large(kind)}")
    return data


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file of a run or a ladder; an empty one where there is no such file, it can't be read, or
    holds something else."""
    try:
        content = parse_json(read_file(path, "a run's JSON"))
    except (OSError, ValueError, RecursionError, UserError):
        return {}
    return content if isinstance(content, dict) else {}


def parse_json(text: str | bytes) -> Any:
    """`json.loads`; whole numbers that are no floats are infinite: arithmetic with them raises no errors."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits))


_NO_FILE = "not a file but a pipe or a device; copy its content into a file"


def _too_large(kind: str) -> str:
    limit = LIMITS[kind]
    size = f"{limit >> 30} GiB" if limit >= 1 << 30 else f"{limit >> 20} MiB"
    return f"larger than {size}, the limit for {kind}; is it the file that was meant?"


def local_path(name: str) -> str:
    """The path meant by a plain path or a file:// URL. Raises UserError for any other kind of URL."""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        return name
    if not is_url(name, allow_file_urls=True):
        raise UserError(
            f"{name}: not a kind of address this program opens; give a path or an http(s):// or file:// URL"
        )
    parts = urllib.parse.urlsplit(name)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{name}: a file:// URL names a file of this machine, as in file:///folder/file")
    return urllib.request.url2pathname(parts.path)


class _Interrupted(Exception):
    """An attempt failed in a way that may pass: the next one can go on. `answered`: the server did say something."""

    def __init__(self, reason: str, answered: bool = True) -> None:
        super().__init__(reason)
        self.answered = answered


class _Download:
    """Fetches one URL into a seekable file, in as many attempts as it takes and is allowed."""

    def __init__(self, url: str, num_attempts: int, verbose: bool, pause: float, timeout: float) -> None:
        self.url = url
        self.num_attempts = num_attempts
        self.verbose = verbose
        self.pause = pause
        self.timeout = timeout
        self.validator: str | None = None  # ETag or date of what has come so far: a changed file is not glued to it
        self.total: int | None = None  # length of the whole file in bytes, where the server says

    def into(self, file: IO[bytes]) -> None:
        """Leaves the complete content in `file`. Raises UserError when that can't be had."""
        silent = 0
        for attempt in range(1, self.num_attempts + 1):
            try:
                return self._attempt(file)
            except _Interrupted as exc:
                silent = 0 if exc.answered else silent + 1
                if attempt == self.num_attempts or silent == MAX_SILENT:
                    raise UserError(f"{self.url}: download failed after {attempt} attempts: {exc}") from exc
                time.sleep(min(self.pause * 2 ** (attempt - 1), MAX_PAUSE))

    def _attempt(self, file: IO[bytes]) -> None:
        import requests

        # Content-Length and Range count the bytes of the file itself only if the server doesn't compress it on the way.
        headers = {"Accept-Encoding": "identity"}
        start = file.seek(0, os.SEEK_END)
        if start > 0:
            headers["Range"] = f"bytes={start}-"
            if self.validator is not None:
                headers["If-Range"] = self.validator
        try:
            with requests.Session() as session:
                session.max_redirects = MAX_REDIRECTS
                waits = (min(CONNECT_TIMEOUT, self.timeout), self.timeout)
                with session.get(self.url, headers=headers, stream=True, timeout=waits) as response:
                    self._receive(response, file, start)
        except requests.TooManyRedirects as exc:
            raise UserError(f"{self.url}: redirected more than {MAX_REDIRECTS} times") from exc
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as exc:
            raise UserError(f"{self.url}: leads to an address that is not http(s): {exc}") from exc
        except requests.exceptions.SSLError as exc:
            raise UserError(f"{self.url}: the secure connection failed: {_reason(exc)}") from exc
        except (requests.ConnectionError, requests.Timeout) as exc:
            reason = f"the host can't be reached ({_reason(exc)}); check the address and the network"
            raise _Interrupted(reason, answered=False) from exc
        except requests.RequestException as exc:
            raise UserError(f"{self.url}: download failed: {_reason(exc)}") from exc

    def _receive(self, response: requests.Response, file: IO[bytes], start: int) -> None:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise _Interrupted(f"the server answered HTTP {status} {response.reason}")
        if status == 416:  # nothing lies beyond what we have, and yet it was not the whole: begin again
            file.truncate(0)
            raise _Interrupted("the server could not go on from where the connection broke off")
        if status == 206 and self._continues(response, start):
            position = start
        elif status == 200:
            position = 0
            file.truncate(0)
            self.validator = _validator(response)
            length = response.headers.get("Content-Length", "")
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            self.total = int(length) if length.isascii() and length.isdigit() and not encoded else None
        elif status == 206:
            file.truncate(0)
            raise _Interrupted("the server went on at the wrong place")
        else:
            hint = "; check the address" if status == 404 else ""
            raise UserError(f"{self.url}: the server answered HTTP {status} {response.reason}{hint}")

        file.seek(position)
        with self._progress(position) as bar:
            try:
                for chunk in response.iter_content(CHUNK):
                    if position == 0 and _is_html(response.headers.get("Content-Type", ""), chunk):
                        raise UserError(
                            f"{self.url}: is a web page, not a data file; give the address of the file itself"
                        )
                    file.write(chunk)
                    position += len(chunk)
                    bar.update(len(chunk))
            except OSError as exc:  # requests' exceptions are OSErrors too; those of our own disk are not the network's
                if type(exc).__module__.startswith("requests"):
                    raise _Interrupted(f"the connection broke off after {position} bytes") from exc
                raise
        if self.total is not None and position != self.total:
            if position > self.total:
                file.truncate(0)
            raise _Interrupted(f"got {position} of {self.total} bytes")

    def _continues(self, response: requests.Response, start: int) -> bool:
        """Whether a 206 answer holds the rest of the same file, from byte `start` on."""
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if match is None or int(match[1]) != start or start == 0:
            return False
        return match[2] == "*" or self.total is None or int(match[2]) == self.total

    def _progress(self, position: int) -> Any:
        if not self.verbose:
            return contextlib.nullcontext(_NoBar())
        from tqdm import tqdm

        if not sys.stderr.isatty():
            print(f"Downloading {self.url} ...", file=sys.stderr, flush=True)
        name = os.path.basename(urllib.parse.urlsplit(self.url).path) or self.url
        return tqdm(total=self.total, initial=position, unit="B", unit_scale=True, desc=name, disable=None, leave=False)


class _NoBar:
    def update(self, count: int) -> None:
        """Shows nothing."""


def _validator(response: requests.Response) -> str | None:
    """What tells this version of the file from another one in If-Range: a strong ETag or the date of last change."""
    etag = response.headers.get("ETag")
    if etag is not None and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


def _is_html(content_type: str, start: bytes) -> bool:
    head = start[:1024].lstrip().lower()
    return head.startswith((b"<!doctype html", b"<html")) or (
        content_type.lower().startswith("text/html") and head.startswith(b"<")
    )


def _reason(exc: BaseException) -> str:
    """The innermost cause of a requests error, in its own short words ('Connection refused', not the pool's story)."""
    inner: Any = exc
    for _ in range(8):
        following = getattr(inner, "reason", None) or next(
            (a for a in inner.args if isinstance(a, BaseException)), None
        )
        if not isinstance(following, BaseException):
            break
        inner = following
    return str(getattr(inner, "strerror", None) or inner).split(": ", 1)[-1].rstrip(".")
