"""EasyDict, durations, and downloads against a local HTTP server that misbehaves on purpose."""

from __future__ import annotations

import copy
import http.server
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dnnlib
from dnnlib import EasyDict
from dnnlib.atomic import append_text, atomic_write, locked, locked_file, write_text
from dnnlib.cli import UserError
from dnnlib.errors import printable
from dnnlib.util import CHUNK, LIMITS, format_time, is_url, make_cache_dir_path, open_file, open_url, read_file

BODY = bytes(range(256)) * 4096  # 1 MiB, more than one chunk and more than a socket buffers in one go


# ---------------------------------------------------------------------------------------------------------------------
# EasyDict and durations


def test_easydict_is_a_dict_with_attributes() -> None:
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
def test_easydict_survives_copies_and_pickles(protocol: int) -> None:
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
def test_format_time(seconds: float, text: str) -> None:
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
def test_is_url(obj: object, remote: bool, with_files: bool) -> None:
    assert is_url(obj) is remote
    assert is_url(obj, allow_file_urls=True) is with_files


def test_local_paths_and_file_urls_open_directly(tmp_path: Path) -> None:
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
def test_local_mistakes_are_one_line(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        open_url(name.format(tmp_path))
    assert "\n" not in str(caught.value)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_neither_read_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("special")
    make(path)
    for action in (lambda: open_file(path), lambda: read_file(path, "JSON"), lambda: open_url(path)):
        with pytest.raises(UserError, match="special: not a file but a pipe or a device"):
            action()
    if not path.is_symlink():
        with pytest.raises(UserError, match="special: not a file but a pipe or a device"):
            append_text(path, "text")


def test_files_have_a_size_and_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_links_are_replaced_not_written_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_every_legal_name_can_be_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with locked_file(path, 1), atomic_write(path) as file:
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
def test_text_from_files_is_made_printable(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_text_from_files_is_made_short() -> None:
    assert printable("x" * 40, 40) == "x" * 40
    assert printable("begin" + "x" * 10**7 + "end.pkl", 30) == "beginxxxxxxxxxx ... xxxend.pkl"
    assert all(len(printable("\U000e0001" * n, limit)) <= limit for n in (3, 10, 5000) for limit in (9, 30, 1000))
    assert all(999 <= len(printable(part * 10**6)) <= 1000 for part in ("long ", "\x1b"))


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError):
        open_url("http://host.org/x", cache=False, return_filename=True)
    with pytest.raises(ValueError):
        open_url("http://host.org/x", num_attempts=0)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", "somewhere")
    assert make_cache_dir_path("downloads") == os.path.join("somewhere", "downloads")
    monkeypatch.delenv("DNNLIB_CACHE_DIR")
    assert make_cache_dir_path("x") == os.path.join(os.path.expanduser("~"), ".cache", "dnnlib", "x")


def test_import_is_light() -> None:
    code = "import sys, dnnlib.util; print(*({'torch', 'requests', 'tqdm', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


class Server(http.server.ThreadingHTTPServer):
    """Answers every path with `answer(handler, number of this request)`; remembers the requests' Range headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[Handler, int], None] = lambda handler, count: handler.whole()
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is none of the test's business."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.ranges.append(self.headers["Range"])
        self.server.answer(self, len(self.server.ranges))

    def reply(self, status: int, body: bytes = b"", send: int | None = None, **headers: str) -> None:
        """`send`: how much of the body really goes out before the line goes dead."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Connection": "close"} | headers).items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[:send])
        self.wfile.flush()

    def whole(self, send: int | None = None, body: bytes = BODY, **headers: str) -> None:
        self.reply(200, body, send, **headers)

    def rest(self, body: bytes = BODY, shift: int = 0) -> None:
        """A proper 206 answer to the Range asked for (or, with `shift`, to another one)."""
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) + shift  # type: ignore[index]
        self.reply(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def fetch(url: str, **options: object) -> bytes:
    with open_url(url, verbose=False, pause=0.001, timeout=5, **options) as file:  # type: ignore[arg-type]
        data: bytes = file.read()
    return data


def cached(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "cache" / "downloads"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_download_is_kept_and_not_repeated(server: Server, tmp_path: Path) -> None:
    url = server.url + "/nets/a%20net.pkl?x=1"
    assert fetch(url) == BODY
    assert len(cached(tmp_path)) == 1 and cached(tmp_path)[0].name.endswith("_a_20net.pkl")
    server.answer = lambda handler, count: handler.reply(500)
    name = open_url(url, verbose=False, return_filename=True)
    assert name == str(cached(tmp_path)[0]) and Path(name).read_bytes() == BODY
    assert len(server.ranges) == 1
    with pytest.raises(UserError):
        fetch(server.url + "/nets/other.pkl", num_attempts=1)  # another address is another file


def test_a_named_cache_folder_and_none_at_all(server: Server, tmp_path: Path) -> None:
    assert fetch(server.url + "/x", cache=False) == BODY
    assert cached(tmp_path) == []
    assert fetch(server.url + "/x", cache_dir=str(tmp_path / "own[1]")) == BODY
    assert fetch(server.url + "/x", cache_dir=str(tmp_path / "own[1]")) == BODY
    assert len(list((tmp_path / "own[1]").iterdir())) == 1 and len(server.ranges) == 2


def test_a_cut_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    cut = 600_000
    server.answer = lambda handler, count: handler.whole(send=cut, ETag='"v1"') if count == 1 else handler.rest()
    assert fetch(server.url + "/net.pkl") == BODY
    assert server.ranges == [None, f"bytes={cut // CHUNK * CHUNK}-"]  # nothing but the last, incomplete chunk is lost
    assert len(cached(tmp_path)) == 1


def test_a_server_that_cannot_continue_starts_again(server: Server) -> None:
    server.answer = lambda handler, count: handler.whole(send=600_000 if count == 1 else None)
    assert fetch(server.url + "/net.pkl") == BODY
    assert len(server.ranges) == 2


@pytest.mark.parametrize("second", ["wrong place", "beyond the end", "other length"])
def test_a_continuation_that_does_not_fit_is_not_glued_on(server: Server, second: str) -> None:
    def answer(handler: Handler, count: int) -> None:
        if count == 1:
            handler.whole(send=600_000)
        elif count == 2 and second == "wrong place":
            handler.rest(shift=10)
        elif count == 2 and second == "beyond the end":
            handler.reply(416)
        elif count == 2:
            handler.rest(body=BODY + b"longer")
        else:
            handler.whole()

    server.answer = answer
    assert fetch(server.url + "/net.pkl") == BODY
    assert server.ranges[2] is None


def test_a_file_that_changed_meanwhile_is_fetched_anew(server: Server) -> None:
    new = BODY[::-1]

    def answer(handler: Handler, count: int) -> None:
        if count == 1:
            handler.whole(send=600_000, ETag='"v1"')
        elif handler.headers["If-Range"] == '"v2"':
            handler.rest(body=new)
        else:
            handler.whole(body=new, ETag='"v2"')

    server.answer = answer
    assert fetch(server.url + "/net.pkl") == new


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.answer = lambda handler, count: handler.reply(status) if count < 4 else handler.whole()
    assert fetch(server.url + "/net.pkl") == BODY
    assert len(server.ranges) == 4


def test_a_server_without_lengths_is_believed(server: Server) -> None:
    server.answer = lambda handler, count: handler.whole(Content_Length="")
    assert fetch(server.url + "/net.pkl") == BODY


def test_a_broken_chunked_transfer_is_noticed(server: Server) -> None:
    def answer(handler: Handler, count: int) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n" % len(BODY) + BODY + b"\r\n" + (b"0\r\n\r\n" if count == 2 else b"100\r\nhalf"))

    server.answer = answer
    assert fetch(server.url + "/net.pkl") == BODY
    assert len(server.ranges) == 2


def test_truncated_for_good(server: Server, tmp_path: Path) -> None:
    server.answer = lambda handler, count: handler.whole(send=1000)
    with pytest.raises(UserError, match=r"net\.pkl: download failed after 3 attempts: .*bytes") as caught:
        fetch(server.url + "/net.pkl", num_attempts=3)
    assert "\n" not in str(caught.value)
    assert cached(tmp_path) == []  # nothing a later run could take for the file
    server.answer = lambda handler, count: handler.whole()
    assert fetch(server.url + "/net.pkl") == BODY


@pytest.mark.parametrize(
    ("status", "words"), [(404, "HTTP 404 Not Found; check the address"), (403, "HTTP 403"), (204, "HTTP 204")]
)
def test_an_answer_that_will_not_change_is_final(server: Server, tmp_path: Path, status: int, words: str) -> None:
    server.answer = lambda handler, count: handler.reply(status)
    with pytest.raises(UserError, match=re.escape(words)):
        fetch(server.url + "/net.pkl")
    assert len(server.ranges) == 1 and cached(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b"\n<!DOCTYPE html><p>Log in", "application/octet-stream"), (b"<head><title>Quota exceeded", "text/html; x")],
)
def test_a_web_page_is_no_data_file(server: Server, tmp_path: Path, body: bytes, content_type: str) -> None:
    server.answer = lambda handler, count: handler.whole(body=body, Content_Type=content_type)
    with pytest.raises(UserError, match="is a web page"):
        fetch(server.url + "/net.pkl")
    assert len(server.ranges) == 1 and cached(tmp_path) == []


def test_binary_data_mislabelled_as_html_is_fine(server: Server) -> None:
    server.answer = lambda handler, count: handler.whole(Content_Type="text/html")
    assert fetch(server.url + "/net.pkl") == BODY


def test_redirects(server: Server) -> None:
    def answer(handler: Handler, count: int) -> None:
        places = {"/once": "/net.pkl", "/loop": "/loop", "/file": "file:///etc/hostname", "/ftp": "ftp://127.0.0.1/x"}
        place = places.get(handler.path)
        handler.reply(302, Location=place) if place else handler.whole()

    server.answer = answer
    assert fetch(server.url + "/once") == BODY
    with pytest.raises(UserError, match="redirected more than 10 times"):
        fetch(server.url + "/loop")
    for path in ("/file", "/ftp"):
        with pytest.raises(UserError, match=r"not http\(s\)"):
            fetch(server.url + path)


def test_unreachable_host(server: Server, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match=r"after 3 attempts: the host can't be reached \(.*refused\)") as caught:
        fetch(f"http://127.0.0.1:{port}/net.pkl")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert cached(tmp_path) == []


def test_unknown_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **kwargs: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"nowhere\.invalid/net\.pkl: .*Name or service not known"):
        fetch("http://nowhere.invalid/net.pkl")


def test_an_interruption_leaves_nothing_behind(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)  # Ctrl-C while waiting for the second attempt
    server.answer = lambda handler, count: handler.whole(send=1000)
    with pytest.raises(KeyboardInterrupt):
        fetch(server.url + "/net.pkl")
    assert cached(tmp_path) == []


def _download_in_a_process(url: str) -> None:
    assert fetch(url) == BODY


def test_two_processes_fetch_the_same_file(server: Server, tmp_path: Path) -> None:
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


def test_progress_goes_to_standard_error_of_rank_0(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_url(server.url + "/a.pkl").close()
    monkeypatch.setenv("RANK", "1")
    open_url(server.url + "/b.pkl").close()
    out, err = capsys.readouterr()
    assert out == "" and "a.pkl" in err and "b.pkl" not in err


def test_a_folder_is_held_against_other_programs(tmp_path):
    code = "import sys; from dnnlib.atomic import locked\nwith locked(sys.argv[1]): print('in', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    root = Path(__file__).parent.parent
    other = subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="another process is at work there"), locked(tmp_path / "run", patience=0.2):
        raise AssertionError("two at once")
    with locked(tmp_path / "elsewhere"):  # is another matter
        pass
    other.kill()
    other.wait()
    with locked(tmp_path / "run", patience=5):  # a killed process holds nothing
        pass
    with locked(tmp_path / "run", patience=0):  # nor does one that is done
        pass
