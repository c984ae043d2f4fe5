"""EasyDict, durations, locks, and downloads from a local HTTP server that misbehaves on purpose."""

from __future__ import annotations

import contextlib
import copy
import errno
import http.server
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import click
import psutil
import pytest

import dnnlib
from dnnlib import EasyDict, cli
from dnnlib.atomic import append_text, atomic_write, locked, write_text
from dnnlib.errors import UserError, printable, public_url, without_secrets
from dnnlib.util import LIMITS, cache_path, forget, format_time, is_url, open_file, open_url, read_file

BODY = bytes(range(256)) * 4096  # 1 MiB, more than one chunk and more than a socket buffers in one go


# ---------------------------------------------------------------------------------------------------------------------
# EasyDict and durations


def test_easydict_is_a_dict_with_attributes():
    d = EasyDict(a=1)
    d.b = [2]
    assert d == {"a": 1, "b": [2]} and d.a == 1 and d["b"] == [2]
    del d.a
    assert "a" not in d
    with pytest.raises(AttributeError):
        _ = d.a
    with pytest.raises(AttributeError):
        del d.a
    assert dnnlib.EasyDict is EasyDict


@pytest.mark.parametrize("protocol", range(2, 6))
def test_easydict_survives_copies_and_pickles(protocol):
    d = EasyDict(a=1, nested=EasyDict(b=2))
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d, protocol))):
        assert twin == d and type(twin) is EasyDict and twin.nested.b == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (310, "5m 10s"),
        (3600, "1h 00m 00s"),
        (7510, "2h 05m 10s"),
        (93780, "1d 02h 03m"),
        (864000, "10d 00h 00m"),
    ],
)
def test_format_time(seconds, text):
    assert format_time(seconds) == text


# ---------------------------------------------------------------------------------------------------------------------
# Local files


@pytest.mark.parametrize(
    ("obj", "remote", "with_files"),
    [
        ("https://host.org/a/b.pkl", True, True),
        ("http://127.0.0.1:80/x", True, True),
        ("HTTP://host.org/x", True, True),
        ("http:///x", False, False),
        ("file:///x", False, True),
        ("s3://bucket/x", False, False),
        ("folder/x.pkl", False, False),
        ("C:\\nets\\x.pkl", False, False),
        ("http://[bad", False, False),
        (Path("x"), False, False),
        (None, False, False),
    ],
)
def test_is_url(obj, remote, with_files):
    assert is_url(obj) is remote
    assert is_url(obj, allow_file_urls=True) is with_files


def test_local_paths_and_file_urls_open_directly(tmp_path):
    path = tmp_path / "a b.bin"
    path.write_bytes(b"content")
    for name in (path, str(path), path.as_uri()):
        with open_url(name) as file:
            assert file.read() == b"content"
    assert open_url(path.as_uri(), return_filename=True) == str(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}/none.pkl", "none.pkl: no such file"),
        ("{}", "is a folder"),
        ("file://{}/none", "no such file"),
        ("file://other{}/none", "file of this machine"),
        ("s3://bucket/net.pkl", "not a kind of address"),
    ],
)
def test_local_mistakes_are_one_line(tmp_path, name, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        open_url(name.format(tmp_path))
    assert "\n" not in str(caught.value)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_neither_read_nor_written(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("special")
    make(path)
    for action in (lambda: open_file(path), lambda: read_file(path, "JSON"), lambda: open_url(path)):
        with pytest.raises(UserError, match="special: not a file but a pipe or a device"):
            action()
    if not path.is_symlink():
        with pytest.raises(UserError, match="special: not a file but a pipe or a device"):
            append_text(path, "text")


def test_files_have_a_size_and_a_place(tmp_path, monkeypatch):
    monkeypatch.setitem(LIMITS, "JSON", 1 << 20)
    large, folder = tmp_path / "large.json", tmp_path / "run"
    with large.open("wb") as file:
        file.truncate((1 << 20) + 1)
    folder.mkdir()
    with pytest.raises(UserError, match="larger than 1 MiB, the limit for JSON"):
        read_file(large, "JSON")
    os.truncate(large, 1 << 20)
    assert len(read_file(large, "JSON", within=tmp_path)) == 1 << 20
    (folder / "link.json").symlink_to(large)
    (folder / "loop.json").symlink_to(folder / "loop.json")
    assert read_file(folder / "link.json", "JSON", within=tmp_path), "a link within the folder"
    with pytest.raises(UserError, match="link to something outside of"):
        read_file(folder / "link.json", "JSON", within=folder)
    with pytest.raises(OSError):
        read_file(folder / "loop.json", "JSON", within=folder)
    with pytest.raises(FileNotFoundError):
        read_file(folder / "none.json", "JSON", within=folder)


def test_links_are_replaced_not_written_through(tmp_path, capsys):
    outside, link = tmp_path / "outside.txt", tmp_path / "log.txt"
    for content in ("precious", None):
        outside.write_text(content) if content else outside.unlink()
        link.unlink(missing_ok=True)
        link.symlink_to(outside)
        append_text(link, "a line\n")
        append_text(link, "another \udcff\n")
        assert link.read_text() == "a line\nanother \\udcff\n" and not link.is_symlink()
        assert outside.read_text() == content if content else not outside.exists()
        assert capsys.readouterr().err.count("was a link") == 1
    write_text(link, "half a character: \ud800")
    assert link.read_text() == "half a character: \\ud800"


@pytest.mark.parametrize("name", ["人" * 80 + ".zip", "é" * 126 + ".a", "x" * 255, "\udcff" * 200])
def test_every_legal_name_can_be_written(tmp_path, name):
    path = tmp_path / name
    with atomic_write(path) as file:
        file.write(b"content")
    assert path.read_bytes() == b"content" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 人 text", "plain é 人 text"),
        ("two\nlines\tand  gaps\x00", "two lines and gaps\\x00"),
        ("\x1b[2J\x9b\u202e\udcff", "\\x1b[2J\\x9b\\u202e\\udcff"),
        (12, "12"),
    ],
)
def test_text_from_files_is_made_printable(text, shown):
    assert printable(text) == shown


def test_text_from_files_is_made_short():
    assert printable("x" * 40, 40) == "x" * 40
    assert printable("begin" + "x" * 10**7 + "end.pkl", 30) == "beginxxxxxxxxxx ... xxxend.pkl"
    assert all(len(printable("\U000e0001" * n, limit)) <= limit for n in (3, 10, 5000) for limit in (9, 30, 1000))
    assert all(999 <= len(printable(part * 10**6)) <= 1000 for part in ("long ", "\x1b"))


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", "somewhere")
    assert os.path.dirname(cache_path("http://h/x")) == os.path.join("somewhere", "downloads")
    monkeypatch.delenv("DNNLIB_CACHE_DIR")
    folder = os.path.join(os.path.expanduser("~"), ".cache", "dnnlib", "downloads")
    assert os.path.dirname(cache_path("http://h/x")) == folder


def test_import_is_light():
    code = "import sys, dnnlib.util; print(*({'torch', 'requests', 'tqdm', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


class Server(http.server.ThreadingHTTPServer):
    """Answers every path with `answer(handler, number of this request)`; counts the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[Handler, int], None] = lambda handler, count: handler.whole()
        self.asked = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is none of the test's business."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        assert self.headers["Range"] is None
        self.server.asked += 1
        self.server.answer(self, self.server.asked)

    def reply(self, status: int, body: bytes = b"", send: int | None = None, **headers: str) -> None:
        """`send`: how much of the body really goes out before the line goes dead."""
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body)), "Connection": "close"} | headers).items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[:send])
        self.wfile.flush()

    def whole(self, send: int | None = None, body: bytes = BODY, **headers: str) -> None:
        self.reply(200, body, send, **headers)

    def log_message(self, format: str, *args: object) -> None:
        pass


def fetch(url: str, **options: object) -> bytes:
    with open_url(url, verbose=False, timeout=5, **options) as file:  # type: ignore[arg-type]
        data: bytes = file.read()
    return data


def cached(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "cache" / "downloads"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_download_is_kept_and_not_repeated(server, tmp_path):
    url = server.url + "/nets/a%20net.pkl?x=1"
    assert fetch(url) == BODY
    assert len(cached(tmp_path)) == 1 and cached(tmp_path)[0].name.endswith("_a_20net.pkl")
    server.answer = lambda handler, count: handler.reply(500)
    name = open_url(url, verbose=False, return_filename=True)
    assert name == str(cached(tmp_path)[0]) and Path(name).read_bytes() == BODY
    assert server.asked == 1
    with pytest.raises(UserError):
        fetch(server.url + "/nets/other.pkl", num_attempts=1)  # another address is another file


def test_a_named_cache_folder_and_none_at_all(server, tmp_path):
    assert fetch(server.url + "/x", cache=False) == BODY
    assert cached(tmp_path) == []
    assert fetch(server.url + "/x", cache_dir=str(tmp_path / "own[1]")) == BODY
    assert fetch(server.url + "/x", cache_dir=str(tmp_path / "own[1]")) == BODY
    assert len(list((tmp_path / "own[1]").iterdir())) == 1 and server.asked == 2


@pytest.mark.parametrize("first", [BODY, BODY[::-1]])
def test_a_download_that_broke_off_starts_anew(server, tmp_path, first):
    """Nothing of the first attempt stays, whether the server has another file by now or not."""
    server.answer = lambda handler, count: handler.whole(send=600_000, body=first) if count == 1 else handler.whole()
    assert fetch(server.url + "/net.pkl") == BODY
    assert server.asked == 2 and len(cached(tmp_path)) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    server.answer = lambda handler, count: handler.reply(status) if count < 4 else handler.whole()
    assert fetch(server.url + "/net.pkl") == BODY
    assert server.asked == 4


def test_a_server_without_lengths_is_believed(server):
    server.answer = lambda handler, count: handler.whole(Content_Length="")
    assert fetch(server.url + "/net.pkl") == BODY


def test_a_broken_chunked_transfer_is_noticed(server):
    def answer(handler: Handler, count: int) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n" % len(BODY) + BODY + b"\r\n" + (b"0\r\n\r\n" if count == 2 else b"100\r\nhalf"))

    server.answer = answer
    assert fetch(server.url + "/net.pkl") == BODY
    assert server.asked == 2


def test_truncated_for_good(server, tmp_path):
    server.answer = lambda handler, count: handler.whole(send=1000)
    with pytest.raises(UserError, match=r"net\.pkl: download failed after 3 attempts: .*bytes") as caught:
        fetch(server.url + "/net.pkl", num_attempts=3)
    assert "\n" not in str(caught.value)
    assert cached(tmp_path) == []  # nothing a later run could take for the file
    server.answer = lambda handler, count: handler.whole()
    assert fetch(server.url + "/net.pkl") == BODY


@pytest.mark.parametrize(
    ("status", "body", "content_type", "words"),
    [
        (404, b"", "", "HTTP 404 Not Found; check the address"),
        (403, b"", "", "HTTP 403 Forbidden; where"),
        (204, b"", "", "HTTP 204"),
        (200, b"\n<!DOCTYPE html><p>Log in", "application/octet-stream", "is a web page"),
        (200, b"<head><title>Quota exceeded", "text/html; x", "is a web page"),
    ],
)
def test_an_answer_that_will_not_change_is_final(server, tmp_path, status, body, content_type, words):
    server.answer = lambda handler, count: handler.reply(status, body, Content_Type=content_type)
    with pytest.raises(UserError, match=re.escape(words)):
        fetch(server.url + "/net.pkl")
    assert server.asked == 1 and cached(tmp_path) == []


def test_binary_data_mislabelled_as_html_is_fine(server):
    server.answer = lambda handler, count: handler.whole(Content_Type="text/html")
    assert fetch(server.url + "/net.pkl") == BODY


def test_redirects(server):
    def answer(handler: Handler, count: int) -> None:
        place = {"/once": "/net.pkl", "/loop": "/loop"}.get(handler.path)
        handler.reply(302, Location=place) if place else handler.whole()

    server.answer = answer
    assert fetch(server.url + "/once") == BODY
    with pytest.raises(UserError, match="redirected more than 10 times"):
        fetch(server.url + "/loop")


@pytest.mark.parametrize("length", ["", str(len(BODY) + 1), "9" * 5000])
def test_a_download_has_a_largest_size(server, tmp_path, length, monkeypatch):
    monkeypatch.setitem(LIMITS, "JSON", len(BODY))
    server.answer = lambda handler, count: handler.whole(body=BODY + b"x", Content_Length=length)
    with pytest.raises(UserError, match=r"net\.pkl: larger than 1 MiB, the limit for JSON"):
        fetch(server.url + "/net.pkl", kind="JSON")
    assert server.asked == 1 and cached(tmp_path) == []


def test_the_first_bytes_are_checked_before_the_rest_comes(server, tmp_path):
    def answer(handler: Handler, count: int) -> None:
        handler.reply(200, BODY, send=100_000)
        received.wait(30)

    def check(start: bytes) -> None:
        received.set()
        raise UserError(f"begins with {start[:2]!r}")

    received = threading.Event()
    server.answer = answer
    with pytest.raises(UserError, match="begins with b"):
        fetch(server.url + "/net.pkl", check=check)
    assert received.is_set() and server.asked == 1 and cached(tmp_path) == []


@pytest.mark.parametrize("where", ["status line", "headers", "body", "chunks"])
def test_a_server_that_drips_is_given_up(server, monkeypatch, where):
    """Every byte comes in time, and all together never."""

    def answer(handler: Handler, count: int) -> None:
        if where != "status line":
            end = {"body": b"y\r\n\r\n", "chunks": b"y\r\nTransfer-Encoding: chunked\r\n\r\n"}.get(where, b"")
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: " + end)
        for _ in range(200):
            handler.wfile.write(b"1\r\nx\r\n" if where == "chunks" else b"x")
            if done.wait(0.02):
                return

    done = threading.Event()
    monkeypatch.setattr("dnnlib.util.MINUTE", 0.2)
    server.answer = answer
    try:
        with pytest.raises(UserError, match=r"net\.pkl: download failed after 2 attempts: .* less than 1 kB/s"):
            fetch(server.url + "/net.pkl", num_attempts=2)
    finally:
        done.set()
    assert server.asked == 2


def test_the_body_of_a_redirect_is_not_read(server):
    def answer(handler: Handler, count: int) -> None:
        if count == 2:
            return handler.whole()
        handler.reply(302, Location="/b", Content_Length="")
        with contextlib.suppress(OSError):
            for _ in range(100):  # MB
                handler.wfile.write(bytes(1_000_000))

    server.answer = answer
    tracemalloc.start()
    assert fetch(server.url + "/net.pkl") == BODY
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000


def test_what_its_reader_found_cut_leaves_the_cache(server, tmp_path):
    url = server.url + "/ref.npz?token=1"
    for source in (url, str(tmp_path / "local.npz")):
        Path(source).write_bytes(BODY) if source != url else fetch(url)
        forget(source)
    assert cached(tmp_path) == [] and (tmp_path / "local.npz").exists()
    forget(url)  # nothing there: nothing to do
    assert fetch(url) == BODY and server.asked == 2


# ---------------------------------------------------------------------------------------------------------------------
# Secrets in addresses


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("https://me:SE@CRET@host.org:81/a b/n.pkl?token=SECRET with more#SECRET", "https://host.org:81/a b/n.pkl"),
        ("HTTP://SECRET@host.org", "HTTP://host.org"),
        ("--network=http://host.org/a@b.pkl?SECRET", "--network=http://host.org/a@b.pkl"),
        ("s3://KEY:SECRET@bucket/n.pkl", "s3://bucket/n.pkl"),
        ("folder/a@b?.pkl", "folder/a@b?.pkl"),
        ("file:///folder/a@b?c#d.pkl", "file:///folder/a@b?c#d.pkl"),
        ("C:\\nets\\x?.pkl", "C:\\nets\\x?.pkl"),
    ],
)
def test_public_url(source, shown):
    assert public_url(source) == shown
    assert without_secrets(f"a {shown}: 'x' ({shown}), or {shown}.") == f"a {shown}: 'x' ({shown}), or {shown}."


def test_secrets_leave_a_text_and_its_words_stay():
    text = "http://me:SECRET@h/n.pkl?t=SECRET: failed ('https://h/?SECRET'), see http://h/SECRET#no."
    assert without_secrets(text) == "http://h/n.pkl: failed ('https://h/'), see http://h/SECRET."


@pytest.mark.parametrize("kind", ["refused", "redirected", "404", "html", "cut", "header"])
def test_a_download_shows_no_secret(server, kind, capfd, monkeypatch):
    def answer(handler: Handler, count: int) -> None:
        if kind == "redirected":
            handler.reply(302, Location="http://me:SECRET@[::1/?token=SECRET")
        elif kind == "header":  # which urllib3 would report with the whole address
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nbroken\r\nX: y\r\n\r\n<html>")
        else:
            body = b"<html>" if kind == "html" else BODY
            handler.reply(404 if kind == "404" else 200, body, send=100 if kind == "cut" else None)

    server.answer = answer
    host = server.url.removeprefix("http://") if kind != "refused" else "127.0.0.1:9"
    monkeypatch.setenv("EDM_DEBUG", "1")
    command = cli.command(name="x")(lambda: open_url(f"http://me:SECRET@{host}/n.pkl?t=SECRET", num_attempts=1))
    assert cli.run(command, []) == 1
    out, err = capfd.readouterr()
    assert f"http://{host}/n.pkl" in err and "Traceback" in err and "SECRET" not in out + err


def test_an_option_with_a_secret_is_noted_and_kept_without(capsys, monkeypatch):
    @cli.command(name="x")
    @click.option("--ref")
    @click.option("--network")
    def command(ref: str, network: str) -> None:
        used.append(ref)
        kept.append(cli.given(click.get_current_context()))

    used, kept = [], []  # type: ignore[var-annotated]
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert cli.run(command, ["--ref=http://h/x?SECRET", "--network=http://h/y"]) == 0
    assert used == ["http://h/x?SECRET"] * 2 and kept == [{"ref": "http://h/x", "network": "http://h/y"}] * 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Note: --ref=http://h/x: ") and "SECRET" not in line


def test_unreachable_host(server, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match=r"after 5 attempts: the host can't be reached \(.*refused\)") as caught:
        fetch(f"http://127.0.0.1:{port}/net.pkl")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert cached(tmp_path) == []


NO_HOSTS = ["a" * 70 + ".org", "127.0.0.1:99999", "127.0.0.1:x", "127.0.0.1:9\udcff", "h\x00.org"]


@pytest.mark.parametrize(
    ("is_redirect", "address"),
    [
        *[(False, f"http://{host}/net.pkl?SECRET") for host in NO_HOSTS],
        *[(True, place) for place in ("file:///etc/hostname", "http://[::1", f"http://{'a' * 70}.org/x?SECRET")],
    ],
)
def test_an_address_that_cannot_be(server, tmp_path, is_redirect, address):
    server.answer = lambda handler, count: handler.reply(302, Location=address)
    with pytest.raises(UserError, match=r"net\.pkl: .*malformed: ") as caught:
        fetch(server.url + "/net.pkl" if is_redirect else address)
    assert server.asked == is_redirect and cached(tmp_path) == []
    assert len(str(caught.value)) < 300 and "SECRET" not in str(caught.value)


def test_an_interruption_leaves_nothing_behind(server, tmp_path, monkeypatch):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)  # Ctrl-C while waiting for the second attempt
    server.answer = lambda handler, count: handler.whole(send=1000)
    with pytest.raises(KeyboardInterrupt):
        fetch(server.url + "/net.pkl")
    assert cached(tmp_path) == []


def _download_in_a_process(url: str) -> None:
    assert fetch(url) == BODY


def test_two_processes_fetch_the_same_file(server, tmp_path):
    together = threading.Barrier(2, timeout=30)

    def answer(handler: Handler, count: int) -> None:
        together.wait()  # both are in the middle of it
        handler.whole()

    server.answer = answer
    workers = [
        multiprocessing.get_context("spawn").Process(target=_download_in_a_process, args=(server.url + "/net.pkl",))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [path.read_bytes() == BODY for path in cached(tmp_path)] == [True]


def test_progress_goes_to_standard_error_of_rank_0(server, capsys, monkeypatch):
    open_url(server.url + "/a.pkl").close()
    monkeypatch.setenv("RANK", "1")
    open_url(server.url + "/b.pkl").close()
    out, err = capsys.readouterr()
    assert out == "" and "a.pkl" in err and "b.pkl" not in err


# ---------------------------------------------------------------------------------------------------------------------
# Locks


def is_free(place: Path, patience: float = 0) -> bool:
    try:
        with locked(place, patience):
            return True
    except UserError as exc:
        assert re.fullmatch(r".*/place: another process is at work there; wait for it, or stop it", str(exc))
        return False


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "place"


def test_a_lock_is_for_one_thread_of_one_process_at_a_time(place):
    with locked(place, 0):
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(is_free(place)))
        thread.start()
        thread.join()
        assert results == [False] and not is_free(place, 0.1)
        with locked(place.with_name("elsewhere"), 0), locked(place, 0, place / "another.lock"):
            pass
    assert is_free(place) and not list(place.iterdir())


def test_a_lock_ends_with_its_process(place):
    """However it ends, and whatever children it leaves; a file of another lock that is left over is no obstacle."""
    code = """if True:
        import os, sys, time
        from dnnlib.atomic import locked
        with locked(sys.argv[1], 0):
            if os.fork() == 0:
                os.close(1)
                time.sleep(60)
                os._exit(0)
            if os.fork() == 0:
                os._exit(0)
            os.wait()
            print("in", flush=True)
            sys.stdin.read()"""
    words = [sys.executable, "-c", code, str(place)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        children = psutil.Process(other.pid).children()
        try:
            assert not is_free(place)
            other.kill()
            other.wait()
            assert is_free(place, 5) and len(children) == 1 and children[0].is_running()
        finally:
            for child in children:
                child.kill()


def test_a_lock_is_gone_afterwards_and_a_waiting_process_gets_a_new_one(place):
    inside: list[str] = []

    def work(name: str) -> None:
        with locked(place, 30):
            inside.append(name)
            assert len(inside) == 1
            time.sleep(0.02)
            inside.remove(name)
            done.append(name)

    done: list[str] = []
    threads = [threading.Thread(target=work, args=(name,)) for name in "abcde"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list("abcde") and list(place.iterdir()) == []


def test_no_link_is_followed_to_a_lock_and_no_pipe_stops_anybody(place, tmp_path):
    place.mkdir()
    (place / ".lock").symlink_to(tmp_path / "other")
    command = cli.command(name="x")(lambda: locked(place, 0).__enter__())
    assert cli.run(command, []) == 1 and not (tmp_path / "other").exists()
    (place / ".lock").unlink()
    os.mkfifo(place / ".lock")
    assert is_free(place)


def test_a_file_system_without_locks_is_named(place, monkeypatch, capsys):
    def flock(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    assert is_free(place)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: ") and "place" in line and "no locks here (Function not implemented)" in line


def test_a_folder_that_takes_no_lock_is_one_line(tmp_path, monkeypatch, capsys):
    def readonly(path: object, *args: object, **kwargs: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    command = cli.command(name="x")(lambda: locked(tmp_path, 0).__enter__())
    monkeypatch.setattr("os.open", readonly)
    assert cli.run(command, []) == 1
    assert capsys.readouterr().err == f"x.py: error: Read-only file system: {tmp_path}/.lock\n"
