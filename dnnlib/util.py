"""EasyDict, times in words, and opening files that may be URLs (with a cache that never holds half a file)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import queue
import re
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from .atomic import atomic_write, open_regular
from .errors import UserError, printable, public_url

MINUTE = 60.0  # seconds that a server has for each
CHUNK = 60_000  # bytes: 1 kB/s
MAX_REDIRECTS = 10
CONNECT_TIMEOUT = 5.0  # seconds until a host that does not even take the connection counts as out of reach
PAUSE, MAX_PAUSE = 0.5, 8.0  # seconds between two attempts: doubled after each
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
    (d, h), m, s = divmod(total // 3600, 24), total // 60 % 60, total % 60
    if total < 60:
        return f"{s}s"
    if total < 3600:
        return f"{m}m {s:02d}s"
    return f"{d}d {h:02d}h {m:02d}m" if d else f"{h}h {m:02d}m {s:02d}s"


def is_url(obj: Any, allow_file_urls: bool = False) -> bool:
    """Whether `obj` is an http(s) URL, or a file:// URL where those are allowed."""
    if not isinstance(obj, str) or "://" not in obj:
        return False
    try:
        scheme, host, *_ = urllib.parse.urlsplit(obj)
    except ValueError:
        return False
    return (scheme in ("http", "https") and bool(host)) or (allow_file_urls and scheme == "file")


def cache_path(url: str, folder: str | None = None) -> str:
    """The file that keeps the content of a URL: in `folder`, or in $DNNLIB_CACHE_DIR/downloads, or in
    ~/.cache/dnnlib/downloads."""
    root = os.environ.get("DNNLIB_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "dnnlib")
    key = hashlib.md5(url.encode("utf-8", "backslashreplace"), usedforsecurity=False).hexdigest()
    name = re.sub(r"[^0-9a-zA-Z._-]", "_", _base(url))[-128:]
    return os.path.join(folder or os.path.join(root, "downloads"), f"{key}_{name}")


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
    num_attempts: int = 5,
    verbose: bool = True,
    return_filename: bool = False,
    cache: bool = True,
    *,
    timeout: float = 60.0,
    kind: str = "a network",
    check: Callable[[bytes], None] | None = None,
) -> Any:
    """Opens a local path, a file:// URL or an http(s) URL for reading in binary. EDM's signature, and more.

    cache_dir: folder for downloads. cache: keep the download; otherwise it stays in memory.
    num_attempts: how often a download is tried. Each attempt begins at the first byte.
    verbose: show a progress bar on standard error (rank 0 only).
    return_filename: return the name of the local file instead of an open file.
    timeout: seconds of silence after which a connection counts as lost.
    kind: of `LIMITS`, whose size the file may not exceed.
    check: gets the first bytes of a download, and raises what is wrong with them before the rest is fetched.

    A download reaches its cache name complete or not at all, so processes may share the cache. Raises UserError for
    whatever the user can mend: a missing file, an unreachable host, HTTP 404, a web page in place of data.
    """
    if num_attempts < 1 or (return_filename and not cache):
        raise ValueError("at least one attempt is needed, and a file name only exists for a file that is kept")
    name = os.fspath(url)
    if is_url(name):
        path = cache_path(name, cache_dir)
        verbose = verbose and os.environ.get("RANK", "0") == "0"
        how = {"verbose": verbose, "timeout": timeout, "kind": kind, "check": check}
        if not cache:
            buffer = io.BytesIO()
            _download(name, buffer, num_attempts, **how)
            buffer.seek(0)
            return buffer
        if not os.path.exists(path):
            with atomic_write(path) as file:
                _download(name, file, num_attempts, **how)
    else:
        path = local_path(name)
        if not os.path.exists(path):
            raise UserError(f"{name}: no such file" if path else "the name of a file to read is empty")
        if os.path.isdir(path):
            raise UserError(f"{name}: is a folder, a file is needed")
    return path if return_filename else open_file(path, kind)


def open_file(
    path: str | os.PathLike[str], kind: str | None = None, within: str | os.PathLike[str] | None = None
) -> IO[bytes]:
    """`open(path, "rb")` of a file proper: every file that this program has not just written itself is opened here.

    kind: of `LIMITS`, whose size the file may not exceed; None for no limit.
    within: the folder that the file must lie in, wherever links on the way lead.

    Raises UserError for pipes, devices and sockets, for what is too large, and for what lies outside; OSError as `open`
    does.
    """
    name = os.fspath(path)
    if within is not None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(within)):
        raise UserError(f"{name}: is a link to something outside of {os.fspath(within)}; put the file itself there")
    file = os.fdopen(open_regular(path, os.O_RDONLY), "rb")
    if kind is not None and os.fstat(file.fileno()).st_size > LIMITS[kind]:
        file.close()
        raise UserError(f"{name}: {_too_large(kind)}")
    return file


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
            f"{name}: not a kind of address this program opens; give a path, or an http(s):// or file:// URL"
        )
    parts = urllib.parse.urlsplit(name)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{name}: a file:// URL names a file of this machine, as in file:///folder/file")
    return urllib.request.url2pathname(parts.path)


class _Interrupted(Exception):
    """An attempt failed in a way that may pass."""


def _download(url: str, file: IO[bytes], num_attempts: int, **how: Any) -> None:
    """Leaves the complete content in `file`. Raises UserError when it can't be had."""
    for attempt in range(1, num_attempts + 1):
        file.seek(0)
        file.truncate()
        try:
            return _receive(url, public_url(url), file, **how)
        except _Interrupted as exc:
            if attempt == num_attempts:
                tried = count(attempt, "attempt")
                raise UserError(f"{public_url(url)}: download failed after {tried}: {exc}") from None
        time.sleep(min(PAUSE * 2 ** (attempt - 1), MAX_PAUSE))


def _receive(
    url: str,
    source: str,
    file: IO[bytes],
    verbose: bool,
    timeout: float,
    kind: str,
    check: Callable[[bytes], None] | None,
) -> None:
    """One attempt; `source` is the address as it is shown. Raises _Interrupted for what may pass, else UserError."""
    import requests
    import urllib3
    from tqdm import tqdm

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show whole addresses
    session = requests.Session()
    session.max_redirects = MAX_REDIRECTS
    # requests would read the body of a redirect into memory, to its end
    session.hooks["response"].append(lambda answer, **_: answer.raw.close() if answer.is_redirect else None)
    waits = (min(CONNECT_TIMEOUT, timeout), timeout)
    # Content-Length counts the bytes of the file itself only if the server doesn't compress it on the way.
    get = partial(session.get, url, headers={"Accept-Encoding": "identity"}, stream=True, timeout=waits)
    response, position = None, 0
    try:
        response = _in_a_minute(get)
        total = _check_answer(response, source)
        if verbose and not sys.stderr.isatty():
            print(f"Downloading {source} ...", file=sys.stderr, flush=True)
        hide = None if verbose else True  # None: where standard error is no terminal
        with tqdm(total=total, unit="B", unit_scale=True, desc=_base(source), disable=hide, leave=False) as bar:
            # iter_content would yield each of a server's chunks, which may be of one byte
            while chunk := _in_a_minute(partial(response.raw.read, CHUNK, decode_content=True)):
                if position == 0:
                    _check_start(chunk, source, kind, response.headers.get("Content-Type", ""))
                    if check is not None:
                        check(chunk)
                position += len(chunk)
                if max(total or 0, position) > LIMITS[kind]:
                    raise UserError(f"{source}: {_too_large(kind)}")
                file.write(chunk)
                bar.update(len(chunk))
    except queue.Empty:
        raise _Interrupted("the server sends less than 1 kB/s") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as exc:
        raise _failure(exc, source, response is not None) from None  # it holds the whole address
    except ValueError as exc:
        if response is not None:
            raise  # `check` finds the content wrong
        raise _failure(exc, source, False) from None
    if total not in (None, position):
        raise _Interrupted(f"got {position} of {total} bytes")


def _in_a_minute(call: Callable[[], Any]) -> Any:
    """What `call` returns. Raises queue.Empty where it takes longer than a minute, in which a server may send one byte
    after the other: each restarts the timeout of its socket. Its thread is then left alone."""
    box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put((call(), None))
        except BaseException as exc:
            box.put((None, exc))

    threading.Thread(target=work, daemon=True).start()
    result, failure = box.get(timeout=MINUTE)
    if failure is not None:
        raise failure
    return result


def _check_answer(response: Any, source: str) -> int | None:
    """The length of the body, if the server gives it. Raises UserError or _Interrupted for what is no file."""
    answer = f"the server answered HTTP {response.status_code} {response.reason}"
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise _Interrupted(answer)
    if response.status_code != 200:
        raise UserError(f"{source}: {answer}{_HINTS.get(response.status_code, '')}")
    length = response.headers.get("Content-Length", "") if "Content-Encoding" not in response.headers else ""
    return int(length[:20]) if length.isascii() and length.isdigit() else None  # or thousands of digits


def _check_start(chunk: bytes, source: str, kind: str, content_type: str) -> None:
    head = chunk[:1024].lstrip().lower()
    is_html = content_type.lower().startswith("text/html") and head.startswith(b"<")
    if is_html or head.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{source}: is a web page, not a data file; give the address of the file itself")
    if not chunk.startswith(STARTS.get(kind, b"")):
        raise UserError(f"{source}: does not begin as {kind} does; check the address")


def _failure(exc: BaseException, source: str, answered: bool) -> UserError | _Interrupted:
    """What a failed request means."""
    import requests

    if isinstance(exc, requests.TooManyRedirects):
        return UserError(f"{source}: redirected more than {MAX_REDIRECTS} times")
    cause: Any = exc
    while isinstance(inner := getattr(cause, "reason", None) or next(reversed(cause.args), None), BaseException):
        cause = inner  # 'Connection refused', not what the connection pool makes of it, with the whole address
    reason = printable(str(getattr(cause, "strerror", None) or cause).split(": ", 1)[-1].rstrip("."), 200)
    if isinstance(exc, ValueError):
        return UserError(f"{source}: leads to an address that is not http(s), or malformed: {reason}")
    if answered:
        return _Interrupted(f"the connection broke off ({reason})")
    return _Interrupted(f"the host can't be reached ({reason}); check the address and the network")


def _base(url: str) -> str:
    """The file's name in a URL."""
    return os.path.basename(urllib.parse.urlsplit(url).path) or "download"
