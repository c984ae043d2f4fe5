"""Archives, folders, images, lists of labels, statistics, names and options that nobody should trust.

More than a hundred, made here; one process of its own (hostile_runner.py) meets them one after the other, with little
memory and little time. Each is answered with one line and status 1 or 2, and nothing is left behind, or is no harm and
is taken. (Network files have test_hostile_files.py.)
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from formats.network_files import save_network
from helpers import make_dataset, small_network
from metrics.classifier import FORMAT, Classifier

RUNNER = Path(__file__).parent / "hostile_runner.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pipes, devices and limits of memory as Linux has them")


@dataclass
class Case:
    """A call, and what is to come of it: its status, and words of the one line (none where it is to be taken)."""

    script: str
    args: list[str]
    status: int
    words: str = ""


# -- images --------------------------------------------------------------------------------------------------------------


def picture(mode: str = "RGB", size: int = 8, kind: str = "png", **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, [size, size, 3], dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG file that claims to be of this size, whatever its data are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def patched(data: bytes, place: int, kind: str, *values: int) -> bytes:
    """`data` with other numbers at a place."""
    return data[:place] + struct.pack(kind, *values) + data[place + struct.calcsize(kind) :]


def tiff(tag: int, value: int) -> bytes:
    """A TIFF file with another value in one of its entries."""
    data = picture(kind="tiff")
    start = struct.unpack_from("<I", data, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            data = patched(data, entry + 2, "<HII", 4, 1, value)
    return data


def floats() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full([8, 8], np.nan, dtype=np.float32)).save(buffer, format="tiff")
    return buffer.getvalue()


GOOD, JPEG, BMP, GIF = picture(), picture(kind="jpeg"), picture(kind="bmp"), picture("P", kind="gif")
BAD_IMAGES: dict[str, bytes] = {
    "empty": b"",
    "signature alone": GOOD[:8],
    "header alone": GOOD[:33],
    "text": b"hello",
    "cut png": GOOD[:-60],
    "png with a wrong checksum": GOOD[:20] + b"\xff" + GOOD[21:],
    "png whose data end early": png(8, 8, data=bytes(20)),
    "png of a million pixels a side": png(1_000_000, 1_000_000),
    "png of 2^31 - 1 pixels a side": png(2**31 - 1, 2**31 - 1),
    "png of 2^32 - 1 pixels a side": png(2**32 - 1, 2**32 - 1),
    "png of 12000 pixels a side": png(12_000, 12_000),
    "png of no pixels": png(0, 0),
    "png of no height": png(8, 0),
    "long thin png": png(1, 2**31 - 1),
    "png of an unknown depth": png(8, 8, depth=3),
    "png of an unknown colour type": png(8, 8, colour=7),
    "png with a bomb of text": png(
        8, 8, data=bytes(200), extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))
    ),
    "png of which nothing is data": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)),
    "palette png without palette": png(8, 8, colour=3),
    "cut jpeg": picture(kind="jpeg", size=64)[:700],
    "jpeg without its end and its tables": JPEG[:2] + JPEG[-100:],
    "jpeg of 65535 pixels a side": patched(JPEG, JPEG.index(b"\xff\xc0") + 5, ">HH", 65535, 65535),
    "bmp of a million pixels a side": patched(BMP, 18, "<ii", 1_000_000, 1_000_000),
    "bmp of a negative width": patched(BMP, 18, "<ii", -8, 8),
    "gif of 65535 pixels a side": patched(GIF, 6, "<HH", 65535, 65535),
    "cut gif": GIF[:100],
    "cut webp": picture(kind="webp", size=64)[:200],
    "tiff of a million pixels a side": tiff(256, 1_000_000),
    "tiff with data beyond its end": tiff(273, 2**31),
    "tiff of 4 billion samples a pixel": tiff(277, 2**32 - 1),
    "numbers for pixels": floats(),
    "eps, which would start a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) show\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
}
GOOD_IMAGES: dict[str, bytes] = {
    "16-bit grey": Image.fromarray(np.full([8, 8], 40_000, np.uint16))._repr_png_() or b"",
    "palette": picture("P"),
    "cmyk": picture("CMYK", kind="jpeg"),
    "transparent": picture("RGBA"),
    "one bit": picture("1"),
    "animated": picture("P", kind="gif", save_all=True, append_images=[Image.new("P", (8, 8))] * 3),
    "animated png": picture(save_all=True, append_images=[Image.new("RGB", (8, 8))] * 3),
    "with a comment of a megabyte": png(8, 8, data=bytes(200), extra=chunk(b"tEXt", b"a\0" + b"x" * 1_000_000)),
}


# -- archives and folders ------------------------------------------------------------------------------------------------


def pack(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, data in files.items():
            archive.writestr(name.removesuffix("*"), data)
    return path


def patch_entries(path: Path, local: int, central: int, kind: str, value: int) -> None:
    """Changes a number in every entry's two headers."""
    data = path.read_bytes()
    for sign, place in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        for match in re.finditer(sign, data):
            data = patched(data, match.start() + place, kind, value)
    path.write_bytes(data)


FLAGS, METHOD, SIZE = (6, 8, "<H"), (8, 10, "<H"), (22, 24, "<I")  # places in the two headers, and the kind of number


def labels(value: Any) -> bytes:
    return json.dumps({"labels": value}).encode()


TWO = {"a.png": GOOD, "b.png": GOOD}
DEEP = b'{"labels": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
BAD_LABELS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{'labels': 1}", "not valid JSON"),
    "cut": (b'{"labels": [["a.png", 0], ["b.p', "not valid JSON"),
    "not text": (b"\xff\xfe\xfd", "not valid JSON"),
    "nine million lists": (b'{"labels": [' + b"[]," * 9_000_000 + b"0]}", "more than"),
    "nested": (DEEP, "not valid JSON"),
    "a number of a million digits": (b'{"labels": [["a.png", ' + b"9" * 1_000_000 + b"]]}", "not valid JSON"),
    "a text": (labels("a.png"), "must look like"),
    "a table": (labels({"a.png": 0}), "must look like"),
    "a number": (labels(3), "must look like"),
    "true": (labels(True), "must look like"),
    "a list": (b"[]", "must look like"),
    "triples": (labels([["a.png", 0, 0]]), "must look like"),
    "names that are none": (labels([[["a.png"], 0]]), "must look like"),
    "names that are missing": (labels([["a.png", 0]]), "no label for 1 of 2"),
    "other names": (labels([["../a.png", 0], ["./b.png", 0]]), "no label for 1 of 2"),
    "NaN": (labels([["a.png", float("nan")], ["b.png", 0]]), "all must be"),
    "infinity": (labels([["a.png", float("inf")], ["b.png", 0]]), "all must be"),
    "vectors with NaN": (labels([["a.png", [float("nan")]], ["b.png", [0]]]), "all must be"),
    "a huge number": (labels([["a.png", 1e300], ["b.png", 0]]), "all must be"),
    "a huge class": (labels([["a.png", 10**9], ["b.png", 0]]), "below 1000000"),
    "a huge whole number": (labels([["a.png", 10**400], ["b.png", 0]]), "all must be"),
    "negative": (labels([["a.png", -1], ["b.png", 0]]), "whole numbers"),
    "a table for a label": (labels([["a.png", {}], ["b.png", 0]]), "all must be"),
    "mixed": (labels([["a.png", [0]], ["b.png", 0]]), "all must be vectors"),
    "vectors of two lengths": (labels([["a.png", [0]], ["b.png", [0, 1]]]), "all must be vectors"),
    "two labels for one image": (labels([["a.png", 0], ["b.png", 0], ["a.png", 1]]), "a.png has two labels, 0 and 1"),
    "an escape in a name": (labels([["a.png", 0], ["b.png", "\x1b[2J\n\x07"]]), "all must be"),
}
NAMES = {
    "a new line": "a\nb.png",
    "an escape": "\x1b[2J\x1b]0;title\x07.png",
    "a carriage return": "a\rtrain.py: all is well.png",
    "quotes": "a\"'`$(reboot).png",
    "right to left": "\u202egnp.a.png",
    "a line separator": "a\u2028b.png",
    "a control character of Latin-1": "a\x9b2J.png",
    "a slash at the start": "/etc/a.png",
    "two dots": "../../a.png",
    "a drive": "C:\\windows\\a.png",
    "a long one": "x" * 5000 + ".png",
}


def archives(folder: Path) -> dict[str, tuple[Path, str]]:
    """Archives by name, and words of the answer."""
    made: dict[str, tuple[Path, str]] = {}

    def add(name: str, words: str, files: dict[str, bytes] = TWO, change: Any = None, **options: Any) -> None:
        path = pack(folder / f"{len(made):03}.zip", files, **options)
        if change is not None:
            patch_entries(path, *change)
        made[name] = path, words

    packed = {"compression": zipfile.ZIP_DEFLATED}
    add("encrypted", "encrypted", change=(*FLAGS, 1))
    add("unknown compression", "can't be read", change=(*METHOD, 77))
    add("wrong compression", "can't be read", change=(*METHOD, zipfile.ZIP_DEFLATED))
    add("a claim of 4 GB", "can't be read", change=(*SIZE, 2**32 - 2), **packed)
    add("a claim of too little", "a.png", change=(*SIZE, 20), **packed)
    add("a bomb of zeros", "a.png", {"a.png": bytes(200_000_000)}, **packed)
    add("a bomb of zeros that is too large", "claims to hold", {"a.png": bytes(300_000_000)}, **packed)
    add("a bomb of labels", "claims to hold", {**TWO, "dataset.json": bytes(300_000_000)}, **packed)
    add("a zip in a zip", "no image files", {"inner.zip": pack(folder / "inner.zip", TWO).read_bytes()})
    add("names that are folders", "no image files", {"a.png/": b"", "b/": b""})
    add("nothing but macOS' shadows", "no image files", {"__MACOSX/a.png": GOOD, "._b.png": GOOD})
    link = folder / "link.zip"
    with zipfile.ZipFile(link, "w") as archive:
        info = zipfile.ZipInfo("a.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    made["a symbolic link"] = link, "a.png"
    whole = pack(folder / "whole.zip", TWO).read_bytes()
    for name, data in {
        "cut": whole[:-30],
        "without its directory": whole[: whole.index(b"PK\x01\x02")],
        "a directory that points beyond the end": whole[:-6] + struct.pack("<I", 2**31)[:4] + whole[-2:],
        "nothing but an end": b"PK\x05\x06" + bytes(18),
        "gzip": b"\x1f\x8b\x08" + bytes(50),
    }.items():
        path = folder / f"{len(made):03}.zip"
        path.write_bytes(data)
        made[name] = path, str(path)
    return made


def folders(folder: Path) -> dict[str, tuple[Path, str]]:
    """Folders and special files by name, and words of the answer (none: they are taken)."""
    made: dict[str, tuple[Path, str]] = {}

    def add(name: str, words: str) -> Path:
        path = folder / f"folder{len(made)}"
        path.mkdir()
        made[name] = path, words
        return path

    os.mkfifo(add("a pipe among the images", "pipe or a device") / "a.png")
    (add("a link to a device", "pipe or a device") / "a.png").symlink_to("/dev/zero")
    (add("a link to a file of the system", "not an image") / "a.png").symlink_to("/etc/passwd")
    (add("a link to nothing", "a.png") / "a.png").symlink_to("nowhere")
    (add("a link to itself", "a.png") / "a.png").symlink_to("a.png")
    (add("a folder with an image's name", "no image files") / "a.png").mkdir()
    path = add("labels from a pipe", "pipe or a device")
    (path / "a.png").write_bytes(GOOD)
    os.mkfifo(path / "dataset.json")
    path = add("a loop of links", "")
    (path / "a.png").write_bytes(GOOD)
    (path / "loop").symlink_to(".", target_is_directory=True)
    (path / "up").symlink_to("/", target_is_directory=True)
    path = add("a file of a terabyte", "larger than")
    with open(path / "a.png", "wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(folder / "pipe.zip")
    made["a pipe"] = folder / "pipe.zip", "pipe or a device"
    made["a device"] = Path("/dev/zero"), "pipe or a device"
    for name in ("x-images-idx3-ubyte", "x.tar.gz"):
        os.mkfifo(folder / name)
        made[f"a pipe {name}"] = folder / name, "pipe or a device"
    return made


# -- statistics ----------------------------------------------------------------------------------------------------------


def npy(shape: str, kind: str = "<f8", data: bytes = b"") -> bytes:
    """A .npy file that claims this shape, whatever its data are."""
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def saved(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


MU, SIGMA = np.zeros(4), np.eye(4)
ARRAYS = pickle.dumps({"mu": MU, "sigma": SIGMA}, 4)  # as edm2's
BAD_STATISTICS: dict[str, tuple[bytes, str]] = {
    "objects": (saved(mu=np.array([print, 1], dtype=object), sigma=SIGMA), "plain arrays"),
    "a pickle": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", "plain arrays"),
    "an array of 10^18 numbers": (zipped({"mu.npy": npy(f"({10**18},)"), "sigma.npy": npy("(4, 4)")}), "plain arrays"),
    "an array of 10^9 numbers": (zipped({"mu.npy": npy(f"({10**9},)"), "sigma.npy": npy("(4, 4)")}), "plain arrays"),
    "a bomb": (zipped({"mu.npy": npy(f"({4 * 10**7},)", data=bytes(32 * 10**7))}), "mu.npy claims"),
    "a negative shape": (zipped({"mu.npy": npy("(-1,)")}), "plain arrays"),
    "code for a shape": (zipped({"mu.npy": npy("__import__('os').getpid()")}), "plain arrays"),
    "a nested header": (zipped({"mu.npy": npy("(" * 9000 + ")" * 9000)}), "plain arrays"),
    "a long header": (zipped({"mu.npy": npy("(4,)" + " " * 60_000)}), "plain arrays"),
    "an unknown type": (zipped({"mu.npy": npy("(4,)", kind="<q99")}), "plain arrays"),
    "text for an array": (zipped({"mu.npy": b"hello", "sigma.npy": b"hello"}), "not arrays of numbers"),
    "too little data": (zipped({"mu.npy": npy("(4,)", data=bytes(8))}), "plain arrays"),
    "wrong names": (saved(mean=MU, cov=SIGMA), "no mu and no sigma"),
    "a scalar": (saved(mu=0.0, sigma=SIGMA), "shape"),
    "three axes": (saved(mu=MU, sigma=np.zeros([4, 4, 4])), "shape"),
    "nothing": (saved(mu=np.zeros(0), sigma=np.zeros([0, 0])), "shape"),
    "NaN": (saved(mu=MU * np.nan, sigma=SIGMA), "NaN"),
    "texts": (saved(mu=np.array(["a"] * 4), sigma=SIGMA), "not arrays of numbers"),
    "complex": (saved(mu=MU * 1j, sigma=SIGMA), "not arrays of numbers"),
    "times": (saved(mu=MU.astype("M8[s]"), sigma=SIGMA), "not arrays of numbers"),
    "no covariance": (saved(mu=MU, sigma=np.triu(np.ones([4, 4]))), "not symmetric"),
    "a list of detectors": (saved(mu=MU, sigma=SIGMA, detector=np.array(["a"] * 100)), "plain arrays"),
    "an escape for a detector": (saved(mu=MU, sigma=SIGMA, detector=np.str_("\x1b[2J\n")), "two detectors"),
    "a half number of images": (saved(mu=MU, sigma=SIGMA, num=np.array([1, 2])), "plain arrays"),
    "a web page": (b"<!DOCTYPE html><title>404</title>", "plain arrays"),
    "bytes that become numbers of eight": (
        zipped({"mu.npy": npy("(8192,)", "|i1", bytes(8192)), "sigma.npy": npy("(8192, 8192)", "|i1", bytes(8192**2))}),
        "sigma.npy claims",
    ),
    "more features than any detector has": (
        zipped({"mu.npy": npy("(5000,)", "|i1", bytes(5000)), "sigma.npy": npy("(5000, 5000)", "|i1", bytes(5000**2))}),
        "more than 2048 features",
    ),
    "a number of images without end": (saved(mu=MU, sigma=SIGMA, num=np.float64("inf")), "plain arrays"),
    "edm2's, of another shape": (ARRAYS.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"), "pickle of plain arrays"),
    "edm2's, of no shape": (ARRAYS.replace(b"K\x04\x85", b"J\xff\xff\xff\xff\x85"), "pickle of plain arrays"),
    "edm2's, with the array twice": (ARRAYS[:-1] + b"b.", "pickle of plain arrays"),
    "edm2's, of objects": (ARRAYS.replace(b"\x8c\x02f8", b"\x8c\x02O8"), "pickle of plain arrays"),
}


# -- detectors -----------------------------------------------------------------------------------------------------------


def detector(facts: dict[str, Any] | str = {}, state: dict[str, Any] | None = None, **more: Any) -> bytes:  # noqa: B006
    """A classifier's file, with some facts or tensors in place of its own."""
    net = Classifier(8, 3, 4)
    if isinstance(facts, dict):
        facts = json.dumps({"resolution": 8, "channels": 3, "classes": 4, "dim": 128, **facts})
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "facts": facts, "state": state or net.state_dict(), **more}, buffer)
    return buffer.getvalue()


def members(data: bytes, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> bytes:
    """The same archive, compressed or with other content of its parts (`data_pkl` for data.pkl)."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    return zipped(
        {**parts, **{f"archive/{name.replace('_', '.')}": part for name, part in changed.items()}}, compression
    )


def one_for_all() -> dict[str, torch.Tensor]:
    """The tensors of a classifier, all in the memory of the largest."""
    state = Classifier(8, 3, 4).state_dict()
    largest = torch.zeros(max(tensor.numel() for tensor in state.values()))
    return {k: largest[: v.numel()].view(v.shape) if v.is_floating_point() else v for k, v in state.items()}


BAD_DETECTORS: dict[str, bytes] = {
    "compressed": members(detector(), zipfile.ZIP_DEFLATED),
    "4096 features": detector({"dim": 4096}),
    "2048 features that it lacks": detector({"dim": 2048}),
    **{
        f"a resolution of {value}": detector({"resolution": value})
        for value in (2**70, 8.0, "8", True, None, [8], 0, -8)
    },
    **{f"{name} of 1e999": detector({name: float("inf")}) for name in ("resolution", "channels", "classes", "dim")},
    "no number": detector({"resolution": float("nan")}),
    "5000 digits": detector('{"resolution": ' + "9" * 5000 + "}"),
    "deep facts": detector("[" * 100_000),
    "facts that are a list": detector("[]"),
    "a list for a format": detector(format=[FORMAT]),
    "one tensor for all": detector(state=one_for_all()),
    "numbers of another kind": detector(state={k: v.double() for k, v in Classifier(8, 3, 4).state_dict().items()}),
    "expanded": detector(
        state={k: torch.zeros([]).expand(v.shape) for k, v in Classifier(8, 3, 4).state_dict().items()}
    ),
    "no tensors": detector(state={"head.weight": 3}),
    "much memory": members(detector(), data_pkl=b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
    "a call": members(detector(), data_pkl=b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R."),
    "a missing part": members(detector()).replace(b"archive/data/3", b"archive/data/x"),
    "a wrong checksum": detector().replace(bytes(np.float32(1).tobytes() * 20), bytes(80), 1),
    "torch's older format": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
}

# -- options -------------------------------------------------------------------------------------------------------------

ABSURD = {  # options that are to be named in the answer
    "train": """--batch=1e9 --batch= --batch=½ --batch=1_0_ --blocks=1000000000 --cbase=1000000000 --cres=1,1000000000
        --cres=0-9999999999 --cres= --workers=1000000 --seed=1.0 --tick=1e-400 --lr=1e999 --desc=../../x --resume=""",
    "generate": "--seeds=0-999999999999 --steps=1000000000 --outdir= --outdir=FILE --batch=0x10 --sigma_max=1e400",
    "dataset_tool": "--source= --dest=FILE --max-images=1e3",
    "fid": "--num=1e5 --num=9223372036854775806 --batch=-1",
    "example": "--seeds=0-99999999 --steps=1000000000",
    "distill": """--eval-num=1000000000000 --eval-num=10000001 --eval-sets=1000000000 --until=99999999999999999999
        --ratio=0-9999999999""",
}
WORDED = [  # others, and words of the answer
    ("train", "--outdir is empty", ["--outdir="]),
    ("train", "--data is empty", ["--data="]),
    ("train", "Not a directory", ["--outdir=FILE/run"]),
    ("train", "--batch", ["--batch=" + "9" * 10_000]),
    ("train", "halved", ["--cres=" + ",".join(["1"] * 40)]),
    ("train", "--desc", ["--desc=a\nb"]),
    ("train", "is empty", ["--precond=edm_distillation", "--num_steps=4", "--transfer="]),
    ("train", "not a kind of address", ["--transfer=ftp://host/x"]),
    ("train", "is a folder", ["--transfer=/tmp"]),
    ("train", "No such option", ["--\x1b[2J=1"]),
    ("train", "unexpected extra", ["\x1b[2J\nx"]),
    ("generate", "--seeds names 2000001 images", ["--seeds=0-2000000"]),
    ("generate", "rho=1e-300", ["--rho=1e-300"]),
    ("generate", "--seeds", ["--seeds=" + ",".join(["0-9999998"] * 3)]),
    ("generate", "--seeds", ["--seeds=" + "1" * 6000]),
    ("generate", "--class", ["--class=99999999999999999999"]),
    ("dataset_tool", "power of two", ["--resolution=99999x99999"]),
    ("fid", "empty", ["--ref="]),
    ("distill", "--duration", ["--duration=" + ",".join(["1"] * 100_000)]),
]


# -- all of them ---------------------------------------------------------------------------------------------------------


def collect(folder: Path) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    good = make_dataset(folder / "good.zip", count=8)
    network = folder / "network.pkl"
    save_network(network, small_network())
    (folder / "FILE").write_text("x")
    dest = f"--dest={folder / 'never' / 'out.zip'}"
    never = f"--outdir={folder / 'never'}"

    def convert(name: str, source: Path, status: int, words: str) -> None:
        cases[name] = Case(
            "dataset_tool", [f"--source={source}", dest if status else f"--dest={folder}/t.zip"], status, words
        )

    convert("warm", good, 0, "")
    for index, (name, data) in enumerate(BAD_IMAGES.items()):
        convert(f"image: {name}", pack(folder / f"bad{index}.zip", {"a.png": data}), 1, "a.png")
    for index, (name, data) in enumerate(GOOD_IMAGES.items()):
        convert(f"image: {name}", pack(folder / f"good{index}.zip", {"a.png": data}), 0, "")
    for name, (path, words) in archives(folder).items():
        convert(f"archive: {name}", path, 1, words)
    for name, (path, words) in folders(folder).items():
        convert(f"folder: {name}", path, 1 if words else 0, words)
    for index, (name, entry) in enumerate(NAMES.items()):
        convert(f"name: {name}", pack(folder / f"name{index}.zip", {entry: b"no image"}), 1, "not an image")
    deep = {"d/" * 10_000 + f"{index}/a.png": GOOD for index in range(100)}
    convert("archive: folders in folders", pack(folder / "deep.zip", deep), 0, "")
    convert("archive: a name that comes twice", pack(folder / "twice.zip", {"a.png": b"x", "a.png*": GOOD}), 0, "")
    for index, (name, (text, words)) in enumerate(BAD_LABELS.items()):
        path = pack(folder / f"labels{index}.zip", {**TWO, "dataset.json": text})
        cases[f"labels: {name}"] = Case("train", [f"--data={path}", never, "--cond=1", "-n"], 1, words)
    for index, (name, (content, words)) in enumerate(BAD_STATISTICS.items()):
        path = folder / f"statistics{index}.npz"
        path.write_bytes(content)
        cases[f"statistics: {name}"] = Case("fid", ["calc", f"--images={good}", f"--ref={path}", "--num=4"], 1, words)
    for index, (name, content) in enumerate(BAD_DETECTORS.items()):
        path = folder / f"detector{index}.pt"
        path.write_bytes(content)
        args = ["ref", f"--data={good}", f"--dest={folder / 'never.npz'}", f"--detector={path}"]
        cases[f"detector: {name}"] = Case("fid", args, 1, "not a detector file")
    os.mkfifo(folder / "pipe.npz")
    cases["statistics: a pipe"] = Case("fid", ["calc", f"--images={good}", f"--ref={folder}/pipe.npz"], 1, "pipe")
    usual = {
        "train": [f"--data={good}", never, "-n"],
        "generate": [f"--network={network}", never],
        "dataset_tool": [f"--source={good}", dest],
        "fid": ["calc", f"--images={good}", f"--ref={folder / 'FILE'}"],
        "example": [f"--out={folder / 'never.png'}"],
        "distill": [f"--data={good}", never, f"--transfer={network}", "--num_steps=4"],
    }
    named = [(script, each.split("=")[0], [each]) for script, options in ABSURD.items() for each in options.split()]
    for script, words, options in named + WORDED:
        filled = [option.replace("FILE", str(folder / "FILE")) for option in options]
        cases[f"{script} {options[-1][:60]!r}"] = Case(script, [*usual[script], *filled], -1, words)
    return cases


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[set[str], dict[str, tuple[Case, dict[str, Any]]]]]:
    folder = tmp_path_factory.mktemp("untrusted")
    cases = collect(folder)
    before = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    calls = "\n".join(json.dumps([case.script, case.args]) for case in cases.values())
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    process = subprocess.run(
        [sys.executable, str(RUNNER), "scripts"],
        input=calls,
        cwd=folder,
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    lines = process.stdout.splitlines()
    assert len(lines) == len(cases), (list(cases)[len(lines)], process.stderr[-2000:])
    assert process.stderr == "", "something speaks past Python"
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - before
    yield left, {name: (case, json.loads(line)) for (name, case), line in zip(cases.items(), lines, strict=True)}


def test_every_one_is_answered_in_a_line(results: Any) -> None:
    wrong = {}
    for name, (case, result) in results[1].items():
        lines = [line for line in result["stderr"].splitlines() if not line.startswith("warning: ")]
        if case.status == 0:
            fine = result["status"] == 0 and not lines
        else:
            fine = (
                result["status"] in ((1, 2) if case.status < 0 else (case.status,))
                and len(lines) == 1
                and lines[0].startswith(f"{case.script}.py: error: ")
                and case.words in lines[0]
                and "please report" not in lines[0]
            )
        text = result["stderr"].replace("\n", "") + result["stdout"].replace("\n", "")
        if not fine or not text.isprintable():
            wrong[name] = (result["status"], result["stderr"][-400:], case.words)
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def test_nothing_is_left_behind(results: Any) -> None:
    assert results[0] == {"t.zip"}, "but for those that are taken"


def test_none_takes_long(results: Any) -> None:
    assert {name: result["seconds"] for name, (_, result) in results[1].items() if result["seconds"] > 8} == {}


def test_there_are_enough(results: Any) -> None:
    refused = [case for case, _ in results[1].values() if case.status]
    assert len(refused) >= 150 and len(results[1]) - len(refused) >= 10
