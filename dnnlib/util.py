"""EasyDict, times in words, and opening files that may be URLs (with a cache that never holds half a file)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import logging
import os
import queue
import re
import stat
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from .atomic import atomic_write
from .errors import UserError, printable, public_url

MINUTE = 60.0  # seconds that a server has for each
CHUNK = 60_000  # bytes: 1 kB/s
MAX_REDIRECTS = 10
MAX_SILENT = 3  # a host that does not answer at all is given up after so many attempts
CONNECT_TIMEOUT = 5.0  # seconds until a host that does not even take the connection counts as silent
MAX_PAUSE = 8.0  # seconds, the longest wait between two attempts
LIMITS = {  # bytes that a file of a kind may have: many times what this program or EDM's writes
    "a network": 8 << 30,
    "a training state": 32 << 30,
    "statistics": 1 << 30,
    "a detector": 1 << 30,
    "JSON": 1 << 25,
    "a run's JSON": 1 << 22,
    "a log": 1 << 28,
    "a picture": 1 << 28,
}
STARTS = {"statistics": (b"PK", b"\x93NUMPY", b"\x80"), "a detector": (b"PK", b"\x80")}  # zip, npy, pickle
_SIGN_IN = "; where it needs a user name or a token, give them within the address (they are neither shown nor kept)"
_HINTS = {401: _SIGN_IN, 403: _SIGN_IN, 404: "; check the address"}


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


def cache_path(url: str, folder: str | None = None) -> str:
    """The file that keeps the content of a URL: in `folder`, or in `downloads` below `make_cache_dir_path()`."""
    key = hashlib.md5(url.encode("utf-8", "backslashreplace"), usedforsecurity=False).hexdigest()
    name = re.sub(r"[^0-9a-zA-Z._-]", "_", _base(url))[-128:]
    return os.path.join(folder or make_cache_dir_path("downloads"), f"{key}_{name}")


def forget(source: str | os.PathLike[str]) -> None:
    """Removes the cached content of a URL, which its reader found cut or spoilt: the next try fetches it anew."""
    if is_url(source):
        with contextlib.suppress(OSError):
            os.unlink(cache_path(str(source)))


@contextlib.contextmanager
def forgotten_if_bad(source: str | os.PathLike[str]) -> Iterator[None]:
    """For a reader of `source`: where it raises UserError, it would do so for ever with what is in the cache."""
    try:
        yield
    except UserError:
        forget(source)
        raise


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
    kind: str = "a network",
    check: Callable[[bytes], None] | None = None,
) -> Any:
    """Opens a local path, a file:// URL or an http(s) URL for reading in binary. EDM's signature and four more options.

    cache_dir: folder for downloads; default `downloads` below $DNNLIB_CACHE_DIR or ~/.cache/dnnlib.
    num_attempts: how often a download is tried. Each attempt begins at the first byte.
    verbose: show a progress bar on standard error (rank 0 only).
    return_filename: return the name of the local file instead of an open file.
    cache: keep the download; otherwise it stays in memory.
    pause: seconds before the second attempt, doubled for each one after it.
    timeout: seconds of silence after which a connection counts as lost.
    kind: of `LIMITS`, whose size the file may not exceed.
    check: gets the first bytes of a download, and raises what is wrong with them before the rest is fetched.

    A download reaches its cache name complete or not at all, so processes may share the cache. Raises UserError for
    whatever the user can mend: a missing file, an unreachable host, HTTP 404, a web page in place of data.
    """
    if num_attempts < 1:
        raise ValueError("num_attempts must be at least 1")
    if return_filename and not cache:
        raise ValueError("a file name can only be returned for a file that is kept: cache=True")
    name = os.fspath(url)
    if is_url(name):
        path = cache_path(name, cache_dir)
        verbose = verbose and os.environ.get("RANK", "0") == "0"
        how = (num_attempts, verbose, pause, timeout, kind, check)
        if not cache:
            buffer = io.BytesIO()
            _download(name, buffer, *how)
            buffer.seek(0)
            return buffer
        if not os.path.exists(path):
            with atomic_write(path) as file:
                _download(name, file, *how)
    else:
        path = local_path(name)
        if not path:
            raise UserError("the name of a file to read is empty; give a path or a URL")
        if not os.path.exists(path):
            raise UserError(f"{name}: no such file")
        if os.path.isdir(path):
            raise UserError(f"{name}: is a folder, a file is needed")
    return path if return_filename else open_file(path, kind)


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
    """An attempt failed in a way that may pass. `answered`: the server did send something."""

    def __init__(self, reason: str, answered: bool = True) -> None:
        super().__init__(reason)
        self.answered = answered


def _download(
    url: str,
    file: IO[bytes],
    num_attempts: int,
    verbose: bool,
    pause: float,
    timeout: float,
    kind: str,
    check: Callable[[bytes], None] | None,
) -> None:
    """Leaves the complete content in `file`. Raises UserError when it can't be had."""
    silent = 0
    for attempt in range(1, num_attempts + 1):
        file.seek(0)
        file.truncate()
        try:
            with contextlib.closing(_stream(url, timeout)) as stream:
                return _receive(stream, file, public_url(url), verbose, kind, check)
        except _Interrupted as exc:
            silent = 0 if exc.answered else silent + 1
            if attempt == num_attempts or silent == MAX_SILENT:
                attempts = count(attempt, "attempt")
                raise UserError(f"{public_url(url)}: download failed after {attempts}: {exc}") from None
        time.sleep(min(pause * 2 ** (attempt - 1), MAX_PAUSE))


def _receive(
    stream: Iterator[Any],
    file: IO[bytes],
    source: str,
    verbose: bool,
    kind: str,
    check: Callable[[bytes], None] | None,
) -> None:
    """Writes what an attempt brings. Raises _Interrupted for what may pass, UserError for the rest."""
    from tqdm import tqdm

    response = next(stream)
    status, headers, position = response.status_code, response.headers, 0
    if status in (408, 429) or status >= 500:
        raise _Interrupted(f"the server answered HTTP {status} {response.reason}")
    if status != 200:
        raise UserError(f"{source}: the server answered HTTP {status} {response.reason}{_HINTS.get(status, '')}")
    length = headers.get("Content-Length", "") if "Content-Encoding" not in headers else ""
    total = int(length[:20]) if length.isascii() and length.isdigit() else None  # or thousands of digits
    if verbose and not sys.stderr.isatty():
        print(f"Downloading {source} ...", file=sys.stderr, flush=True)
    hide = None if verbose else True  # None: where standard error is no terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc=_base(source), disable=hide, leave=False) as bar:
        for chunk in stream:
            if position == 0 and _is_html(headers.get("Content-Type", ""), chunk):
                raise UserError(f"{source}: is a web page, not a data file; give the address of the file itself")
            if position == 0 and not chunk.startswith(STARTS.get(kind, b"")):
                raise UserError(f"{source}: does not begin as {kind} does; check the address")
            if position == 0 and check is not None:
                check(chunk)
            position += len(chunk)
            if max(total or 0, position) > LIMITS[kind]:
                raise UserError(f"{source}: {_too_large(kind)}")
            file.write(chunk)
            bar.update(len(chunk))
    if total not in (None, position):
        raise _Interrupted(f"got {position} of {total} bytes")


def _stream(url: str, timeout: float) -> Generator[Any]:
    """The response to a GET, then its body in pieces of CHUNK bytes; each of them comes within a minute.

    A thread fetches them, and is left alone where it takes longer: each byte restarts the timeout of its socket.
    """
    import requests

    items: queue.Queue[Any] = queue.Queue(maxsize=16)
    closed = threading.Event()
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show whole addresses

    def work() -> None:
        try:
            with requests.Session() as session:
                session.max_redirects = MAX_REDIRECTS
                session.hooks["response"].append(_drop_redirects_body)
                waits = (min(CONNECT_TIMEOUT, timeout), timeout)
                # Content-Length counts the bytes of the file itself only if the server doesn't compress it on the way.
                headers = {"Accept-Encoding": "identity"}
                with session.get(url, headers=headers, stream=True, timeout=waits) as response:
                    items.put(response)
                    # iter_content would yield each of a server's chunks, which may be of one byte
                    for chunk in iter(partial(response.raw.read, CHUNK, decode_content=True), b""):
                        if closed.is_set():
                            return
                        items.put(chunk)
            items.put(None)
        except BaseException as exc:
            items.put(exc)

    threading.Thread(target=work, daemon=True).start()
    answered = False
    try:
        while (item := items.get(timeout=MINUTE)) is not None:
            if isinstance(item, BaseException):
                raise _failure(item, public_url(url), answered) from None  # it holds the whole address
            yield item
            answered = True
    except queue.Empty:
        raise _Interrupted("the server sends less than 1 kB/s", answered) from None
    finally:
        closed.set()
        while not items.empty():  # the thread may wait for a place
            items.get()


def _drop_redirects_body(response: Any, **_: Any) -> None:
    """requests would read it into memory, to its end."""
    if response.is_redirect:
        response.raw.close()


def _failure(exc: BaseException, source: str, answered: bool) -> BaseException:
    """What a failed request means: a UserError, or an _Interrupted. Other exceptions are returned as they are."""
    import requests
    import urllib3

    if not isinstance(exc, (requests.RequestException, urllib3.exceptions.HTTPError, ValueError)):
        return exc
    cause: BaseException = exc
    inner: Any = exc
    while isinstance(inner, BaseException):  # 'Connection refused', not what the connection pool makes of it
        cause, inner = inner, getattr(inner, "reason", None) or next(reversed(inner.args), None)
    reason = printable(str(getattr(cause, "strerror", None) or cause).split(": ", 1)[-1].rstrip("."), 200)
    if isinstance(exc, requests.TooManyRedirects):
        return UserError(f"{source}: redirected more than {MAX_REDIRECTS} times")
    if isinstance(exc, ValueError):
        return UserError(f"{source}: leads to an address that is not http(s), or malformed: {reason}")
    if answered:
        return _Interrupted(f"the connection broke off ({reason})")
    if isinstance(exc, requests.exceptions.SSLError):
        return UserError(f"{source}: the secure connection failed: {reason}")
    return _Interrupted(f"the host can't be reached ({reason}); check the address and the network", answered=False)


def _base(url: str) -> str:
    """The file's name in a URL."""
    return os.path.basename(urllib.parse.urlsplit(url).path) or "download"


def _is_html(content_type: str, start: bytes) -> bool:
    head = start[:1024].lstrip().lower()
    return head.startswith((b"<!doctype html", b"<html")) or (
        content_type.lower().startswith("text/html") and head.startswith(b"<")
    )
