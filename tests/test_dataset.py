"""Reading data sets: EDM's facts, every kind of image, threads and processes, and what is wrong with users' files."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnnlib.cli import UserError
from engine.setup import fingerprint
from helpers import GOLDEN
from training import dataset
from training.dataset import ImageFolderDataset, PackedFiles
from training.decoding import decode_image, image_formats

FACTS = json.loads((GOLDEN / "dataset_facts.json").read_text())
WITH_FILE = [tag for tag, fact in FACTS.items() if (GOLDEN / fact["file"]).exists() and "error" not in fact]
with np.load(GOLDEN / "dataset.npz") as _data:
    NUMBERS = dict(_data)


def noise(seed: int = 0, size: int = 8, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C], or [H, W] for grey."""
    shape = (size, size, channels) if channels > 1 else (size, size)
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, format=kind, **options)
    return file.getvalue()


def make_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def labelled(path: Path, labels: object, count: int = 3) -> str:
    """A set of a.png, b.png, ... whose dataset.json has these labels."""
    files = {f"{chr(97 + i)}.png": encode(noise(i)) for i in range(count)}
    return make_zip(path / "set.zip", {**files, "dataset.json": json.dumps({"labels": labels}).encode()})


@pytest.mark.parametrize("tag", [*WITH_FILE, "directory"])
def test_golden(tag, tmp_path):
    fact = FACTS[tag]
    path = GOLDEN / fact["file"]
    if tag == "directory":
        path = tmp_path / fact["file"]
        with zipfile.ZipFile(GOLDEN / "ds_int.zip") as archive:
            archive.extractall(path)
    data = ImageFolderDataset(str(path), **fact["kwargs"])
    assert (len(data), data.name, data._image_fnames) == (fact["len"], fact["name"], fact["image_fnames"])
    for name in ("image_shape", "resolution", "num_channels", "label_shape", "label_dim", "has_labels"):
        assert getattr(data, name) == fact[name], name
    assert data.has_onehot_labels == fact["has_onehot"]
    details = [data.get_details(i) for i in range(len(data))]
    assert {**details[0], "raw_label": details[0].raw_label.tolist()} == fact["details0"]
    np.testing.assert_array_equal([d.raw_idx for d in details], NUMBERS[f"{tag}/raw_idx"])
    np.testing.assert_array_equal([d.xflip for d in details], NUMBERS[f"{tag}/xflip"])
    images, labels = (np.stack(part) for part in zip(*(data[i] for i in range(len(data))), strict=True))
    assert images.dtype == np.uint8 and labels.dtype == np.float32
    np.testing.assert_array_equal(labels, NUMBERS[f"{tag}/labels"])
    if f"{tag}/images" in NUMBERS:
        np.testing.assert_array_equal(images, NUMBERS[f"{tag}/images"])


def test_another_resolution_is_refused():
    with pytest.raises(UserError, match="16x16 images, but resolution 32"):
        ImageFolderDataset(GOLDEN / FACTS["res_bad"]["file"], **FACTS["res_bad"]["kwargs"])


def test_items_are_the_callers_own():
    data = ImageFolderDataset(GOLDEN / "ds_int.zip", use_labels=True, cache=True)
    image, label = data[0]
    image[:], label[:] = 0, 9
    assert data[0][0].any() and data[0][1].max() == 1
    assert data[-1][0].tolist() == data[len(data) - 1][0].tolist()


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "gif", "tiff", "webp", "ppm", "avif"])
def test_formats(kind):
    smooth = np.kron(noise(1, 2), np.ones((8, 8, 1), np.uint8))
    options = {"webp": {"lossless": True}, "avif": {"subsampling": "4:4:4"}}.get(kind, {})
    pixels = decode_image(encode(smooth, kind, **options), "x")
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    error = np.abs(pixels.astype(int) - smooth)
    assert error.mean() < 15 if kind in ("jpeg", "avif") else error.max() == 0


def test_colour_modes():
    rgb, grey = Image.fromarray(noise(2)), Image.fromarray(noise(2, channels=1))
    palette = rgb.quantize(256)
    np.testing.assert_array_equal(decode_image(encode(palette), "x"), np.array(palette.convert("RGB")))
    cmyk = rgb.convert("CMYK")
    np.testing.assert_array_equal(decode_image(encode(cmyk, "tiff"), "x"), np.array(cmyk.convert("RGB")))
    bits = grey.convert("1")
    np.testing.assert_array_equal(decode_image(encode(bits), "x")[:, :, 0], np.array(bits) * np.uint8(255))


def test_transparency_is_put_on_black():
    """Whatever colour lies under it; an opaque alpha channel alters nothing."""
    colour, grey = noise(2), noise(2, channels=1)
    for base, mode in ((colour, "RGBA"), (grey, "LA")):
        shaped = base.reshape(8, 8, -1)
        for alpha in (0, 128, 255):
            found: list[str] = []
            image = Image.fromarray(base).convert(mode)
            image.putalpha(alpha)
            pixels = decode_image(encode(image), "x", found)
            assert pixels.shape == shaped.shape and found == (["transparent"] if alpha < 255 else [])
            np.testing.assert_allclose(pixels, shaped * (alpha / 255), atol=1)
    keyed = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert decode_image(encode(keyed, transparency=7), "x")[0, :, 0].tolist() == [0, 9]
    deep = Image.fromarray(np.array([[257, 514]], np.uint16))
    assert decode_image(encode(deep, transparency=514), "x")[0, :, 0].tolist() == [1, 0]
    palette = Image.fromarray(colour).quantize(8)
    assert not decode_image(encode(palette, transparency=bytes(8)), "x").any()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    upright = np.kron(noise(1, 2, 2)[:, :, 0], np.ones((8, 16), np.uint8))
    turned = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}
    stored = np.rot90(upright[:, ::-1] if orientation in (2, 4, 5, 7) else upright, turned[orientation])
    exif, found = Image.Exif(), list[str]()
    exif[0x112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpeg" else {}
    pixels = decode_image(encode(np.ascontiguousarray(stored), kind, exif=exif, **options), "x", found)
    assert pixels.shape[:2] == upright.shape and found == (["turned"] if orientation > 1 else [])
    np.testing.assert_allclose(pixels[:, :, 0].astype(int), upright, atol=8)
    wrong = encode(upright, "jpeg", exif=b"Exif\0\0II*\0" + b"\xff" * 40)  # a damaged note spoils no picture
    assert decode_image(wrong, "x").shape[:2] == upright.shape


def test_frames_are_noticed():
    frames = [Image.fromarray(noise(i)) for i in range(2)]
    for kind, options in (("gif", {}), ("tiff", {}), ("webp", {"lossless": True})):
        found: list[str] = []
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode_image(data, "x", found)[:, :, 0] > 128, noise(0)[:, :, 0] > 128)
        assert found == ["frames"]


def iptc(content: bytes) -> bytes:
    """An IPTC record around a whole image file, which Pillow's plugin opens whatever its format."""
    fields = [(3, 60, b"\1\0"), (3, 65, b"\1"), (3, 20, b"\0\0\0\x08"), (3, 30, b"\0\0\0\x08"), (3, 120, b"\5")]
    fields.append((8, 10, content))
    return b"".join(struct.pack(">BBBH", 0x1C, a, b, len(data)) + data for a, b, data in fields)


def test_no_image_starts_another_program(tmp_path, monkeypatch):
    """A gs of the test's own leaves a mark where Pillow calls it, as it does without a list of formats."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/mark'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) show\n%%EOF\n"
    for name, data in {"eps": eps, "iptc of eps": iptc(eps), "iptc of png": iptc(encode(noise()))}.items():
        with pytest.raises(UserError, match="not an image of a kind that is read"):
            decode_image(data, name)
        if name == "iptc of png":
            continue
        assert not (tmp_path / "mark").exists(), name
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
            image.load()
        assert (tmp_path / "mark").exists(), f"{name}: the trap does not work"
        (tmp_path / "mark").unlink()


def test_every_image_is_opened_with_a_list_of_formats():
    root = Path(dataset.__file__).parent.parent
    for path in root.glob("*.py"), root.glob("[!t.]*/*.py"), root.glob("t[!e]*/*.py"):
        for file in path:
            for call in re.findall(r"Image\.open\((?:[^()]|\([^()]*(?:\([^()]*\))*[^()]*\))*\)", file.read_text()):
                assert "formats=" in call, (file, call)


def test_16_bit_grey_is_scaled_and_not_clipped():
    deep = np.array([[0, 128, 129, 257], [514, 30000, 65280, 65535]], dtype=np.uint16)
    expected = [[0, 0, 1, 1], [2, 117, 254, 255]]
    for kind in ("png", "tiff"):
        assert decode_image(encode(Image.fromarray(deep), kind), "x")[:, :, 0].tolist() == expected
    assert decode_image(encode(Image.fromarray(deep.astype(np.int32)), "tiff"), "x")[:, :, 0].tolist() == expected
    with pytest.raises(UserError, match="16 bits"):
        decode_image(encode(Image.fromarray(np.full((2, 2), 70000, np.int32)), "tiff"), "x")
    with pytest.raises(UserError, match="floating-point"):
        decode_image(encode(Image.fromarray(np.ones((2, 2), np.float32)), "tiff"), "x")


def test_which_files_are_images(tmp_path):
    endings, formats = image_formats()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".gif"} <= endings
    assert not {".pdf", ".eps", ".ps", ".txt", ".json", ""} & endings and "EPS" not in formats
    assert {"EPS", "IPTC"}.isdisjoint(formats)
    names = ["a.PNG", "sub/b.png", "__MACOSX/._a.png", "sub/._b.png", "c.pdf", "d.eps", "e.eps", "notes.txt", "png"]
    names += [".ipynb_checkpoints/a.png", "sub/Thumbs.db", "sub/.b.png", "dataset.json", "f.heic", "sub/"]
    path = make_zip(tmp_path / "x.zip", {name: b"" if name.endswith("/") else encode(noise()) for name in names})
    folder = tmp_path / "folder"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    for place in (path, folder):
        files = PackedFiles(place)
        assert files.image_names() == ["a.PNG", "sub/b.png"]
        assert files.notes() == [
            "left out: 5 hidden (names that begin with a dot, __MACOSX, Thumbs.db), "
            "2 .eps, 1 .pdf, 1 .heic, 1 .txt, 1 without an ending"
        ]


def test_links_are_followed_but_not_in_circles(tmp_path):
    """Links to files and to folders elsewhere; what would be read twice, or for ever, is named."""
    (tmp_path / "set/a/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/b").mkdir(parents=True)
    for place in ("set/a/0.png", "elsewhere/b/1.png", "2.png"):
        (tmp_path / place).write_bytes(encode(noise()))
    (tmp_path / "set/a/3.png").symlink_to(tmp_path / "2.png")
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/a/deep/up").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path)
    (tmp_path / "set/c").symlink_to(tmp_path / "elsewhere/b")
    files = PackedFiles(tmp_path / "set")
    assert files.image_names() == ["a/0.png", "a/3.png", "b/b/1.png"]
    assert sorted(files.not_followed) == ["a/deep/up", "b/up", "c"]
    assert files.notes() == ["left out: 3 by a link to a folder that is read already"]


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_set_within_one_folder(as_folder, tmp_path):
    labels = json.dumps({"labels": [["./0.png", 1], ["sub\\1.png", 0]]}).encode()
    files = {
        "my/0.png": encode(noise(0)),
        "my/sub/1.png": encode(noise(1)),
        "my/dataset.json": labels,
        "__MACOSX/x": b"",
        "READ.ME": b"",
    }
    path = Path(make_zip(tmp_path / "x", files))
    if as_folder:
        zipfile.ZipFile(path).extractall(tmp_path / "folder")
        path = tmp_path / "folder"
    data = ImageFolderDataset(path, use_labels=True)
    assert data._image_fnames == ["0.png", "sub/1.png"] and data.labels([0, 1]).argmax(axis=1).tolist() == [1, 0]
    assert data.notes[0] == f"read from my/ in {path}"
    np.testing.assert_array_equal(data[1][0], noise(1).transpose(2, 0, 1))


def test_threads_share_one_archive(tmp_path):
    files = {f"{i:03d}.png": encode(noise(i, 16)) for i in range(60)}
    data = ImageFolderDataset(make_zip(tmp_path / "x.zip", files, zipfile.ZIP_DEFLATED))
    with ThreadPoolExecutor(8) as pool:
        for i, (image, _) in zip(range(600), pool.map(lambda i: data[i % 60], range(600)), strict=True):
            np.testing.assert_array_equal(image, noise(i % 60, 16).transpose(2, 0, 1))


def test_reopened_after_pickle_and_close(tmp_path):
    shutil.copy(GOLDEN / "ds_int.zip", tmp_path / "x.zip")
    data = ImageFolderDataset(tmp_path / "x.zip", use_labels=True, cache=True, max_size=5, xflip=True)
    expected = [data[i] for i in range(len(data))]
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 5000  # without the cached images
    data.close()
    for other in (copy, data):
        for i, (image, label) in enumerate(expected):
            np.testing.assert_array_equal(other[i][0], image)
            np.testing.assert_array_equal(other[i][1], label)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_processes_read_on_their_own(tmp_path):
    files = {f"{i:03d}.png": encode(noise(i, 64)) for i in range(40)}
    data = ImageFolderDataset(make_zip(tmp_path / "x.zip", files))
    parent = data._files._zip()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sums = pool.starmap(_sum, [(data, i % 40) for i in range(240)], chunksize=1)
    assert sums == [int(noise(i % 40, 64).sum()) for i in range(240)]
    data._files._opened = (-1, parent)  # as it looks to a child process
    assert data[0][0].shape == (3, 64, 64) and data._files._zip() is not parent


def _sum(data: ImageFolderDataset, i: int) -> int:
    return int(data[i][0].sum())


def test_cache_decodes_once(monkeypatch):
    data = ImageFolderDataset(GOLDEN / "ds_int.zip", cache=True, xflip=True)
    plain = ImageFolderDataset(GOLDEN / "ds_int.zip")
    decoded = []
    monkeypatch.setattr(dataset, "decode_image", lambda *file: decoded.append(file) or decode_image(*file))
    for _ in range(2):
        for i in range(24):
            image = data[i][0]
    assert len(decoded) == 12
    np.testing.assert_array_equal(image, plain[11][0][:, :, ::-1])


def open_all(path: object, **kwargs: object) -> None:
    data = ImageFolderDataset(path, **kwargs)
    for i in range(len(data)):
        data[i]


def refused(match: str, path: object, **kwargs: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        open_all(path, **kwargs)
    assert "\n" not in str(caught.value) and str(Path(str(path)).name) in str(caught.value)


def test_missing_empty_and_broken_archives(tmp_path):
    refused("no such file or folder", tmp_path / "nothing.zip")
    whole = (GOLDEN / "ds_int.zip").read_bytes()
    for content in (b"", b"this is text", whole[: len(whole) // 2]):
        (tmp_path / "bad.zip").write_bytes(content)
        refused("neither a folder nor a whole zip .*copied to the end", tmp_path / "bad.zip")
    refused("no image files", make_zip(tmp_path / "none.zip", {"notes.txt": b"x"}))
    (tmp_path / "folder").mkdir()
    refused("no image files", tmp_path / "folder")


def test_broken_images(tmp_path):
    good = encode(noise())
    cut = {"a.png": good, "b.png": good[: len(good) // 2]}
    refused("b.png in .*x.zip can't be decoded", make_zip(tmp_path / "x.zip", cut))
    refused("b.png in .*x.zip is not an image", make_zip(tmp_path / "x.zip", {"a.png": good, "b.png": b"text"}))
    refused("a.png in .*x.zip is not an image", make_zip(tmp_path / "x.zip", {"a.png": b""}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(encode(noise(), "jpeg")[:200])
    refused("a.jpg in .*folder can't be decoded", tmp_path / "folder")
    flipped = bytearray(Path(make_zip(tmp_path / "y.zip", {"a.png": good, "b.png": good})).read_bytes())
    flipped[len(good) + 100] ^= 255
    (tmp_path / "y.zip").write_bytes(flipped)
    refused("b.png in .*y.zip can't be read: Bad CRC", tmp_path / "y.zip")


def test_bombs(tmp_path, monkeypatch):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    refused("has more than the 178,956,970 pixels that Pillow allows", make_zip(tmp_path / "x.zip", {"a.png": bomb}))
    monkeypatch.setattr(dataset, "MAX_FILE_BYTES", 1000)
    refused("claims to hold", make_zip(tmp_path / "y.zip", {"a.png": bytes(1001)}, zipfile.ZIP_DEFLATED))


def test_images_that_differ(tmp_path):
    a, large, grey = encode(noise()), encode(noise(size=16)), encode(noise(channels=1))
    two = {"a.png": a, "b.png": large}
    refused("b.png in .* is 16x16 RGB, but .* 8x8 RGB", make_zip(tmp_path / "x.zip", two))
    refused("b.png in .* is 8x8 grey", make_zip(tmp_path / "x.zip", {"a.png": a, "b.png": grey}))
    refused("b.png in .* is 8x8 RGB, but .* grey", make_zip(tmp_path / "x.zip", {"a.png": grey, "b.png": a}))
    wide = encode(np.zeros((8, 16, 3), np.uint8))
    refused("a.png in .* is 16x8 .*square.*--resolution", make_zip(tmp_path / "x.zip", {"a.png": wide}))


def test_names_that_point_elsewhere_are_only_names(tmp_path):
    (tmp_path / "in").mkdir()
    names = ["../up.png", "/root.png", "C:\\c.png", "a\\b.png"]
    data = ImageFolderDataset(make_zip(tmp_path / "in" / "x.zip", dict.fromkeys(names, encode(noise()))))
    assert len(data) == 4 and data[3][0].shape == (3, 8, 8)
    assert [p.name for p in tmp_path.rglob("*.png")] == []


LABELS = {
    "label for 1 of 3 images, the first is c.png; it has one for C.png": [["a.png", 0], ["b.png", 1], ["C.png", 1]],
    "label for 3 of 3 images, the first is a.png; it has one for j/a.png": [["j/a.png", 0]],
    "label of b.png is -1, that of a.png is 0; all must be classes": [["a.png", 0], ["b.png", -1], ["c.png", 1]],
    "label of a.png is 0.5,": [["a.png", 0.5], ["b.png", 1], ["c.png", 1]],
    "label of c.png is 1000000000,": [["a.png", 0], ["b.png", 1], ["c.png", 10**9]],
    'label of b.png is "cat",': [["a.png", 0], ["b.png", "cat"], ["c.png", 1]],
    "label of b.png is true,": [["a.png", 0], ["b.png", True], ["c.png", 1]],
    "label for 1 of 3 images, the first is c.png:": [["a.png", 0], ["b.png", 0], ["c.png", None]],
    r"label of b.png is \[1\], that of a.png is 0": [["a.png", 0], ["b.png", [1]], ["c.png", 1]],
    r"label of b.png is 0, that of a.png is \[1\]": [["a.png", [1]], ["b.png", 0], ["c.png", [1]]],
    r"b.png is \[1\], .* all must be vectors of 2": [["a.png", [1, 2]], ["b.png", [1]], ["c.png", [1, 2]]],
    r"label of a.png is \[\],": [["a.png", []], ["b.png", []], ["c.png", []]],
    r"label of a.png is \[\[1\]\],": [["a.png", [[1]]], ["b.png", [[1]]], ["c.png", [[1]]]],
    r"label of a.png is \[NaN\],": [["a.png", [float("nan")]], ["b.png", [0]], ["c.png", [1]]],
    r"label of a.png is \[1000.*,": [["a.png", [10**400]], ["b.png", [0]], ["c.png", [1]]],
    "must look like .*": [["a.png", 0], ["b.png"], ["c.png", 1]],
    "must look like": [[3, "a.png"]],
    "must look": {"a.png": 0},
}


@pytest.mark.parametrize("message", LABELS)
def test_bad_labels(message, tmp_path):
    path = labelled(tmp_path, LABELS[message])
    refused(message, path, use_labels=True)
    open_all(path)  # and none of this matters where labels aren't used


def test_bad_json(tmp_path):
    image = {"a.png": encode(noise())}
    for text in (b"{", b"", b"\xff\xfe", b"[" * 100_000):
        refused("not valid JSON", make_zip(tmp_path / "x.zip", {**image, "dataset.json": text}), use_labels=True)
    for text in (b"[]", b"3", b"{}", b'{"label": null}', b'{"labels": 3}'):
        refused("must look like", make_zip(tmp_path / "x.zip", {**image, "dataset.json": text}), use_labels=True)


def test_good_labels_of_other_kinds(tmp_path):
    data = ImageFolderDataset(
        labelled(tmp_path, [["a.png", 2.0], ["b.png", 0], ["c.png", 1], ["z", 7]]), use_labels=True
    )
    assert data.label_dim == 3 and data.get_label(0).tolist() == [0, 0, 1]
    data = ImageFolderDataset(labelled(tmp_path, [["a.png", [1]], ["b.png", [2.5]], ["c.png", [-1]]]), use_labels=True)
    assert data.label_shape == [1] and not data.has_onehot_labels and data.get_label(1).tolist() == [2.5]
    data = ImageFolderDataset(labelled(tmp_path, []), use_labels=True)
    assert not data.has_labels and data.label_dim == 0


def test_max_size_must_leave_something(tmp_path):
    with pytest.raises(UserError, match="at least one image"):
        ImageFolderDataset(GOLDEN / "ds_int.zip", max_size=0)


def test_random_damage_is_always_named(tmp_path):
    """Whatever bytes are overwritten or cut off: it works or it is a UserError."""
    rng = random.Random(0)
    whole = (GOLDEN / "ds_gray.zip").read_bytes()
    path = tmp_path / "x.zip"
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        for _ in range(rng.choice([1, 3, 20])):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            open_all(path, use_labels=True)
            outcomes.add("fine")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"fine", "refused"}


def test_many_at_once():
    data = ImageFolderDataset(GOLDEN / "ds_int.zip")
    np.testing.assert_array_equal(data.images([3, 1, 3]), np.stack([data[i][0] for i in (3, 1, 3)]))


def test_a_fingerprint_is_of_what_is_read(tmp_path):
    folder, other = tmp_path / "data", tmp_path / "other"
    for name in (folder, other):
        name.mkdir()
        (name / "0.png").write_bytes(encode(noise(1)))
    (folder / "linked").symlink_to(other)
    before = fingerprint(str(folder))
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    assert fingerprint(str(folder)) == before
    (other / "1.png").write_bytes(encode(noise(2)))
    assert fingerprint(str(folder)) != before
