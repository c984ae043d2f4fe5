"""The conversion tool: EDM's pixels, names and labels; every source; what it says; what it refuses."""

import gzip
import io
import json
import os
import pickle
import shlex
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dataset_tool
import train
from dnnlib.errors import UserError
from formats import image_sources
from helpers import GOLDEN
from training.dataset import ImageFolderDataset

ROOT = Path(__file__).parent.parent
FACTS = json.loads((GOLDEN / "dataset_tool_facts.json").read_text())
with np.load(GOLDEN / "dataset_tool.npz") as _data:
    NUMBERS = dict(_data)


def tool(source: object, dest: object, *options: str) -> int:
    return dataset_tool.main([f"--source={source}", f"--dest={dest}", *options])


def noise(seed: int = 0, width: int = 8, height: int = 8, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def fill(folder: Path, files: dict[str, np.ndarray | bytes]) -> Path:
    """Writes images (or bytes) into a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.fromarray(content).save(path)
    return folder


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def images(path: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(io.BytesIO(d))) for name, d in entries(path).items() if name.endswith(".png")])


def labels(path: Path) -> object:
    return json.loads(entries(path)["dataset.json"])["labels"]


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Golden's source: three folders of two 32x24 images."""
    return fill(tmp_path / "pets", {n[4:].replace("_", "/", 1): v for n, v in NUMBERS.items() if n.startswith("src_")})


# --- EDM's facts


@pytest.mark.parametrize(
    ("fact", "tag"),
    [("folder_resolution16", "fr16"), ("folder_centercrop16", "fc16"), ("folder_ccw16x8", "fw16")],
)
def test_golden_folders(fact, tag, pets, tmp_path, capsys):
    dest = tmp_path / "out.zip"
    assert tool(pets, dest, *FACTS[fact]["args"][4:]) == 0
    np.testing.assert_array_equal(images(dest), NUMBERS[f"out_{tag}"])
    assert labels(dest) == FACTS[f"labels_{tag}"]["labels"]
    assert list(entries(dest))[: len(FACTS[fact]["first"])] == FACTS[fact]["first"]
    said = capsys.readouterr().out
    assert "6 images, 16x16 RGB" in said and "0 ant, 1 cat, 2 dog" in said and "3 classes" in said


def test_golden_bytes(pets, tmp_path):
    """Entry by entry the file that EDM's tool wrote; and the same file to the last byte every time."""
    assert tool(pets, tmp_path / "a.zip", "--resolution=16x16") == 0
    assert entries(tmp_path / "a.zip") == entries(GOLDEN / "dataset_tool_example_out.zip")
    os.utime(pets / "ant" / "0.png", (1, 1))
    assert tool(pets, tmp_path / "b.zip", "--resolution=16X16") == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.external_attr for info in archive.infolist()} == {25165824}
    png = entries(tmp_path / "a.zip")["00000/img00000000.png"]
    assert png[16:29] == struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0) and len(png) == 852


def test_zip_to_zip_and_to_folder(tmp_path, capsys):
    source = GOLDEN / "dataset_tool_example_out.zip"
    assert tool(source, tmp_path / "z.zip", "--max-images=4") == 0
    assert list(entries(tmp_path / "z.zip")) == FACTS["zip_to_zip"]["names"]
    assert labels(tmp_path / "z.zip") == FACTS["labels_z2"]["labels"]
    assert tool(source, tmp_path / "new" / "folder", "--max_images=4") == 0
    files = {p.relative_to(tmp_path / "new/folder").as_posix(): p for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in files.items()} == entries(tmp_path / "z.zip")
    data = ImageFolderDataset(tmp_path / "new" / "folder", use_labels=True)
    assert len(data) == 4 and data.label_dim == 2
    capsys.readouterr()
    assert tool(source, tmp_path / "new" / "folder") == 1
    assert "is not empty" in capsys.readouterr().err


def test_folder_of_every_thousand(tmp_path):
    source = fill(tmp_path / "in", {f"{i:04d}.png": noise(i, 2, 2) for i in range(1003)})
    assert tool(source, tmp_path / "out.zip") == 0
    names = list(entries(tmp_path / "out.zip"))
    assert [names[999], names[1000], *names[1002:]] == [
        "00000/img00000999.png",
        "00001/img00001000.png",
        "00001/img00001002.png",
        "dataset.json",
    ]


# --- CIFAR-10, MNIST, digits


def cifar(
    path: Path, batches: int = 5, per_batch: int = 4, protocol: int = 2, **change: object
) -> tuple[Path, np.ndarray]:
    """A small archive in CIFAR-10's form, and its images [N, 32, 32, 3]."""
    data = np.random.RandomState(1).randint(0, 256, (batches, per_batch, 3072), dtype=np.uint8)
    with tarfile.open(path, "w:gz") as archive:
        for i in range(batches):
            content = {"data": data[i], "labels": list(range(per_batch)), "batch_label": "x", **change}
            add(archive, f"cifar-10-batches-py/data_batch_{i + 1}", pickle.dumps(content, protocol))
        add(archive, "cifar-10-batches-py/test_batch", b"")
    return path, data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("protocol", "classes"),
    [(4, [0, 1, 2, 3]), (5, [0, 1, 2, 3]), (2, [*np.arange(4)]), (2, np.arange(4, dtype=">i4")), (2, np.arange(4))],
)
def test_cifar(protocol, classes, tmp_path, monkeypatch):
    monkeypatch.setattr(image_sources, "CIFAR10_IMAGES", 20)
    path, expected = cifar(tmp_path / "cifar-10-python.tar.gz", protocol=protocol, labels=classes)
    assert tool(path, tmp_path / "out.zip") == 0
    np.testing.assert_array_equal(images(tmp_path / "out.zip"), expected)
    assert [label for _, label in labels(tmp_path / "out.zip")] == [0, 1, 2, 3] * 5
    assert tool(path, tmp_path / "part.zip", "--max-images=3") == 0
    assert len(images(tmp_path / "part.zip")) == 3


def test_cifar_as_python_2_wrote_it(tmp_path):
    """Protocol 2, byte strings, numpy 1's names: the real archive's form, spelt out."""
    raw = bytes(range(256)) * 24
    stream = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02M\x00\x0c"
        b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tbU\x06labels](K\x03K\x09eu."
    )
    pixels, classes = image_sources._cifar_batch(stream, "x")
    np.testing.assert_array_equal(pixels, np.frombuffer(raw, np.uint8).reshape(2, 3072))
    assert classes == [3, 9]
    theirs = pickle.loads(stream, encoding="latin1")  # and the reference agrees
    np.testing.assert_array_equal(theirs["data"], pixels)
    assert theirs["labels"] == classes


class Hostile:
    """Unpickled carelessly it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_cifar_refusals(tmp_path, capsys, monkeypatch):
    def refused(path: Path, *words: str) -> None:
        assert tool(path, tmp_path / "out.zip") == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and all(word in message for word in words), message
        assert not (tmp_path / "out.zip").exists()

    refused(cifar(tmp_path / "small.tar.gz")[0], "small.tar.gz holds 20 training images instead of CIFAR-10's 50000")
    refused(cifar(tmp_path / "four.tar.gz", batches=4)[0], "data_batch_5 is missing")
    monkeypatch.setattr(image_sources, "CIFAR10_IMAGES", 20)
    evil = cifar(tmp_path / "evil.tar.gz", extra=Hostile(tmp_path / "pwned"))[0]
    refused(evil, "data_batch_1 in", "it refers to ", "unknown here")
    assert not (tmp_path / "pwned").exists()
    refused(cifar(tmp_path / "a.tar.gz", labels=[0, 1, 2])[0], "'labels' is not a list of 4")
    refused(cifar(tmp_path / "a.tar.gz", labels=[0, 1, 2, 10])[0], "'labels' is not")
    refused(cifar(tmp_path / "a.tar.gz", labels=None)[0], "'labels' is not")
    refused(cifar(tmp_path / "a.tar.gz", data=np.zeros((4, 100), np.uint8))[0], "'data' is not")
    refused(cifar(tmp_path / "a.tar.gz", data=np.zeros((4, 3072)))[0], "'data' is not")
    refused(cifar(tmp_path / "a.tar.gz", data=np.array([None] * 4))[0], "data_batch_1 in", "is damaged")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for number in range(1, 6):
            add(archive, f"data_batch_{number}", b"no pickle")
    refused(tmp_path / "a.tar.gz", "data_batch_1 in", "is damaged")
    whole = cifar(tmp_path / "a.tar.gz")[0].read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "half.tar.gz", "half.tar.gz is damaged")
    (tmp_path / "text.tar.gz").write_text("text")
    refused(tmp_path / "text.tar.gz", "not a whole tar")
    refused(tmp_path / "none.tar.gz", "no such file", "none.tar.gz")


def packed_zeros(size: int) -> bytes:
    """So many bytes, packed by gzip, in little time."""
    part = gzip.compress(bytes(1 << 24))
    return part * (size >> 24)


P5 = b"\x80\x05"
BOMBS = {  # batches that take gigabytes, or minutes, in Python's own unpickler
    "a memo of 32 GB": P5 + b"Nr\xff\xff\xff\x7f.",
    "a byte array of 8 GB": P5 + b"\x96" + struct.pack("<Q", 8 << 30) + b".",
    "a million dicts": P5 + b"}" * 1_000_000 + b".",
    "a million memories": P5 + b"N" + b"\x94" * 1_000_000 + b".",
    "laughing lists": P5 + b"]\x94" + b"".join(b"](h%ch%ce\x94" % (n, n) for n in range(60)) + b".",
    "a buffer that is elsewhere": P5 + b"\x97.",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_batches_that_ask_for_more_than_they_hold(content):
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x is damaged, or|'data' is not"):
        image_sources._cifar_batch(content, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000_000


def header(kind: bytes, size: int = 0, name: str = "data_batch_1") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, name
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(header(b"x", 1 << 30)) + packed_zeros(1 << 30), "unpacks to more than"),
        (gzip.compress(header(b"L", 1 << 30)) + packed_zeros(1 << 30), "unpacks to more than"),
        *[(gzip.compress(header(kind) + bytes(1024)), "data_batch_1 is missing") for kind in (b"1", b"2", b"6")],
    ],
    ids=["endless header", "endless name", "link to itself", "symbolic link to itself", "pipe"],
)
def test_archives_whose_headers_lie(content, words, tmp_path, monkeypatch):
    monkeypatch.setattr(image_sources, "MAX_UNPACKED", 1 << 24)
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=words):
        image_sources.read_cifar10(str(tmp_path / "x.tar.gz"))


def mnist(folder: Path, count: int = 5) -> tuple[Path, np.ndarray]:
    folder.mkdir(exist_ok=True)
    pixels = np.random.RandomState(2).randint(0, 256, (count, 28, 28), dtype=np.uint8)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes()))
    classes = gzip.compress(struct.pack(">II", 0x801, count) + bytes(i % 10 for i in range(count)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(classes)
    return path, pixels


def test_mnist(tmp_path):
    path, pixels = mnist(tmp_path / "images-idx3")
    assert tool(path, tmp_path / "out.zip") == 0
    padded = images(tmp_path / "out.zip")
    assert padded.shape == (5, 32, 32)
    np.testing.assert_array_equal(padded[:, 2:-2, 2:-2], pixels)
    assert padded.sum() == pixels.sum()
    assert [label for _, label in labels(tmp_path / "out.zip")] == [0, 1, 2, 3, 4]
    assert len(entries(tmp_path / "out.zip")["00000/img00000000.png"]) == FACTS["mnist"]["png0"]["file_bytes"]
    bare = tmp_path / "t10k-images-idx3-ubyte"
    bare.write_bytes(gzip.decompress(path.read_bytes()))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(
        gzip.decompress((path.parent / "train-labels-idx1-ubyte.gz").read_bytes())
    )
    assert tool(bare, tmp_path / "bare.zip") == 0
    assert (tmp_path / "bare.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()


@pytest.mark.parametrize(
    ("images_name", "labels_name"),
    [
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
        ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-train-labels-idx1-ubyte"),
        ("TRAIN-IMAGES.IDX3", "TRAIN-LABELS.IDX1"),
    ],
)
def test_other_spellings_of_mnist(images_name, labels_name, tmp_path):
    path, pixels = mnist(tmp_path / "m")
    beside = path.with_name("train-labels-idx1-ubyte.gz")
    for old, name in ((path, images_name), (beside, labels_name)):
        data = old.read_bytes()
        old.unlink()
        (path.parent / name).write_bytes(data if name.endswith(".gz") else gzip.decompress(data))
    assert tool(path.parent / images_name, tmp_path / "out.zip") == 0
    np.testing.assert_array_equal(images(tmp_path / "out.zip")[:, 2:-2, 2:-2], pixels)


def test_cifar_unpacked(tmp_path, monkeypatch):
    """The archive, as a plain tar, its folder, and the folder that this lies in: the same data set."""
    monkeypatch.setattr(image_sources, "CIFAR10_IMAGES", 20)
    path, _ = cifar(tmp_path / "cifar-10-python.tar.gz")
    (tmp_path / "cifar-10-python.tar").write_bytes(gzip.decompress(path.read_bytes()))
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "folder", filter="data")
    made = set()
    for source in (path.name, "cifar-10-python.tar", "folder", "folder/cifar-10-batches-py"):
        assert tool(tmp_path / source, tmp_path / "out.zip") == 0
        made.add((tmp_path / "out.zip").read_bytes())
    assert len(made) == 1


def test_mnist_refusals(tmp_path, capsys):
    path, _ = mnist(tmp_path / "m")
    labels_path = path.parent / "train-labels-idx1-ubyte.gz"
    good, good_labels = path.read_bytes(), labels_path.read_bytes()
    raw = gzip.decompress(good)
    for content, labels_content, *words in (
        (gzip.compress(raw[:-1]), good_labels, "train-images", "cut short"),
        (good[:-20], good_labels, "train-images", "damaged"),
        (gzip.compress(b"\0\0\x0d\x03" + raw[4:]), good_labels, "not an idx file"),
        (gzip.compress(struct.pack(">IIII", 0x803, 2**31, 2**31, 2**31)), good_labels, "cut short"),
        (gzip.compress(struct.pack(">IIII", 0x803, 0, 28, 28)), good_labels, "holds 0 bytes"),
        (good, gzip.compress(struct.pack(">II", 0x801, 4) + bytes(4)), "for 4 labels"),
        (good, b"", "train-labels", "not an idx file"),
        (good, None, "train-labels-idx1-ubyte.gz, must lie beside it"),
    ):
        path.write_bytes(content)
        labels_path.write_bytes(labels_content) if labels_content is not None else labels_path.unlink()
        assert tool(path, tmp_path / "out.zip") == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and all(word in message for word in words), message


def test_digits(tmp_path, capsys):
    from sklearn.datasets import load_digits

    assert tool("digits", tmp_path / "digits.zip") == 0
    said = capsys.readouterr().out
    assert "1797 images, 8x8 grey" in said and f"--data={tmp_path / 'digits.zip'} --cond=1" in said
    (command,) = (line for line in said.splitlines() if "train.py" in line)
    assert train.main([*shlex.split(command)[2:], "--dry-run", "--device=cpu"]) == 0
    assert "Parameters:              0.7" in capsys.readouterr().out, "a small network"
    data = ImageFolderDataset(tmp_path / "digits.zip", use_labels=True)
    assert (len(data), data.image_shape, data.label_dim) == (1797, [1, 8, 8], 10)
    digits = load_digits()
    for i in (0, 5, 1796):
        image, label = data[i]
        np.testing.assert_allclose(image[0] / 255, digits.images[i] / 16, atol=0.5 / 255)
        assert label.argmax() == digits.target[i]


# --- Labels, and what is said of them


def test_dataset_json_before_folders(tmp_path, capsys):
    source = fill(tmp_path / "in", {"a/0.png": noise(0), "b/0.png": noise(1)})
    (source / "dataset.json").write_text('{"labels": [["a/0.png", 3], ["b/0.png", 5], ["gone.png", 9]]}')
    assert tool(source, tmp_path / "out.zip") == 0
    assert [label for _, label in labels(tmp_path / "out.zip")] == [3, 5]
    (source / "dataset.json").write_text('{"labels": null}')  # says that the folders are no classes
    assert tool(source, tmp_path / "out.zip") == 0
    assert labels(tmp_path / "out.zip") is None
    assert "no labels: dataset.json has none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([["0.png", 0], ["1.png", 1], ["3.png", 1]], ["no label for 1 of 4 images, the first is 2.png"]),
        ([[f"j/{i}.png", i] for i in range(4)], ["4 of 4 images", "0.png", "it has one for j/0.png"]),
        ([[f"{i}.jpg", i] for i in range(4)], ["4 of 4 images", "0.png", "it has one for 0.jpg"]),
        ([["0.png", 0], ["1.png", 1], ["2.png", None], ["3.png", 1]], ["1 of 4 images, the first is 2.png"]),
    ],
)
def test_labels_are_never_lost(given, words, tmp_path, capsys):
    source = fill(tmp_path / "in", {f"{i}.png": noise(i) for i in range(4)})
    (source / "dataset.json").write_text(json.dumps({"labels": given}))
    assert tool(source, tmp_path / "out.zip") == 1 and not (tmp_path / "out.zip").exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message
    if given[0][0] == "0.png":
        assert tool(source, tmp_path / "out.zip", "--max-images=2") == 0  # the two that are kept have theirs
        assert [label for _, label in labels(tmp_path / "out.zip")] == [0, 1]


@pytest.mark.parametrize(
    ("names", "options", "order", "words"),
    [
        (
            "0 1 2 10",
            [],
            "0 1 2 10",
            "in the order of their numbers: 0, 1, 2, 10; in EDM it is that of names: 0, 1, 10, 2",
        ),
        ("0 1 2 10", ["--class-order=name"], "0 1 10 2", ""),
        ("1 2 3", [], "1 2 3", ""),
        ("1 10 9 a", [], "1 10 9 a", ""),
    ],
)
def test_numeric_class_folders(names, options, order, words, tmp_path, capsys):
    source = fill(tmp_path / "in", {f"{name}/0.png": noise(i) for i, name in enumerate(names.split())})
    assert tool(source, tmp_path / "out.zip", *options) == 0
    printed = capsys.readouterr().out
    assert f"{', '.join(f'{i} {name}' for i, name in enumerate(order.split()))}\n" in printed
    assert words in printed and bool(words) == ("order of their numbers" in printed)


def test_what_is_left_out_and_what_was_done_is_printed(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x112] = 3
    source = fill(
        tmp_path / "in", {"ant/0.png": noise(0), "cat/1.png": noise(1), "dog/0.heic": b"x", "cat/.0.png": b"x"}
    )
    Image.fromarray(noise(2)).save(source / "ant/2.png", exif=exif)
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(source / "ant/3.png")
    Image.fromarray(noise(3)).save(source / "cat/4.gif", save_all=True, append_images=[Image.fromarray(noise(4))])
    assert tool(source, tmp_path / "out.zip") == 0
    printed = capsys.readouterr().out
    for words in (
        "5 images, 8x8 RGB",
        "left out: 1 .heic, 1 hidden (",
        "1 image turned upright, as the EXIF orientation asks\n",
        "1 image with transparent pixels, put on black\n",
        "1 image with several frames or pages, of which the first is taken\n",
        "labels from top-level folders: 0 ant, 1 cat\n",
    ):
        assert words in printed, (words, printed)
    np.testing.assert_array_equal(images(tmp_path / "out.zip")[1], noise(2)[::-1, ::-1])
    assert not images(tmp_path / "out.zip")[2].any()


def test_parts_of_a_set_are_no_classes(tmp_path, capsys):
    source = fill(tmp_path / "in", {f"{part}/{name}/0.png": noise(0) for part in ("Train", "val") for name in "ab"})
    assert tool(source, tmp_path / "out.zip") == 0
    assert "note: Train, val count as classes; if they are parts of one set" in capsys.readouterr().out
    assert tool(source / "Train", tmp_path / "out.zip") == 0
    assert "0 a, 1 b\n" in capsys.readouterr().out


def test_unreadable_images(tmp_path, capsys):
    """Before anything is written; with --skip-bad they are left out, and their class too if nothing is left of it."""
    good = {f"a/{i:02d}.png": noise(i) for i in range(3)}
    source = fill(tmp_path / "in", {**good, **{f"b/{i:02d}.png": b"x" for i in range(12)}, "c/0.png": noise(7)})
    (source / "a/01.png").write_bytes((source / "a/00.png").read_bytes()[:-80])
    assert tool(source, tmp_path / "out.zip") == 1 and not (tmp_path / "out.zip").exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "a/01.png in " in message and "can't be decoded" in message
    assert message.endswith("; mend or remove it, or leave such images out by --skip-bad\n")
    assert tool(source, tmp_path / "out.zip", "--skip-bad") == 0
    printed = capsys.readouterr().out
    assert "3 images, 8x8 RGB" in printed and "left out 13 images that can't be read: a/01.png, b/00.png" in printed
    assert "no image of 1 class came along: b" in printed
    assert [label for _, label in labels(tmp_path / "out.zip")] == [0, 0, 2]
    assert tool(source, tmp_path / "out.zip", "--max-images=1") == 0, "as many as are asked for were read"
    assert tool(source / "b", tmp_path / "no.zip", "--skip-bad") == 1
    assert "no image is left: 0 are too small, 12 can't be read" in capsys.readouterr().err


def test_labels_that_cannot_be_trained_on_are_copied_with_a_warning(tmp_path, capsys):
    source = fill(tmp_path / "in", {f"{i}.png": noise(i) for i in range(2)})
    (source / "dataset.json").write_text('{"labels": [["0.png", 3], ["1.png", [0.5, 1.0]]]}')
    assert tool(source, tmp_path / "out.zip") == 0
    assert labels(tmp_path / "out.zip") == FACTS["labels_fullj"]["labels"]
    assert "warning" in capsys.readouterr().out


def test_flat_and_half_flat_folders_have_no_labels(tmp_path, capsys):
    source = fill(tmp_path / "in", {"0.png": noise(0), "1.png": noise(1)})
    assert tool(source, tmp_path / "out.zip") == 0 and labels(tmp_path / "out.zip") is None
    fill(source, {"more/2.png": noise(2), "and/3.png": noise(3)})
    assert tool(source, tmp_path / "out.zip") == 0 and labels(tmp_path / "out.zip") is None
    assert capsys.readouterr().out.count("no labels: ") == 2
    assert labels(tmp_path / "out.zip") is None


# --- Transforms


def test_grey_images_in_the_wide_crop(tmp_path):
    source = fill(tmp_path / "in", {"0.png": noise(0, 32, 24, channels=1)})
    assert tool(source, tmp_path / "out.zip", "--resolution=16x8", "--transform=center-crop-wide") == 0
    out = images(tmp_path / "out.zip")[0]
    assert out.shape == (16, 16) and not out[:4].any() and not out[12:].any() and out[4:12].any()


def test_refused_images_leave_no_gap(tmp_path, capsys):
    sizes = [(8, 8), (32, 32), (12, 40), (32, 32)]
    source = fill(tmp_path / "in", {f"{i}.png": noise(i, *size) for i, size in enumerate(sizes)})
    assert tool(source, tmp_path / "out.zip", "--resolution=16x8", "--transform=center-crop-wide") == 0
    assert list(entries(tmp_path / "out.zip")) == ["00000/img00000000.png", "00000/img00000001.png", "dataset.json"]
    assert "left out 2 images smaller than --resolution: 0.png, 2.png" in capsys.readouterr().out
    assert tool(source, tmp_path / "no.zip", "--resolution=64x64", "--transform=center-crop-wide") == 1
    assert "no image is left: 4 are too small, 0 can't be read (the first: 0.png)" in capsys.readouterr().err
    assert not (tmp_path / "no.zip").exists()


# --- Refusals: one line, status 2 for a wrong option and 1 for the rest, nothing damaged


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resolution=12x12"], "power of two"),
        (["--resolution=16x8"], "must be square"),
        (["--transform=center-crop"], "needs --resolution"),
        (["--transform=center-crop", "--resolution=16x8"], "must be square"),
        (["--transform=center-crop-wide", "--resolution=8x16"], "at most the width"),
        (["--transform=center-crop-wide", "--resolution=12x8"], "power of two"),
    ],
)
def test_wrong_options(options, words, pets, tmp_path, capsys):
    assert tool(pets, tmp_path / "out.zip", *options) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"notes.txt": b"x"}, ["no image files inside", "left out: 1 .txt"]),
        ({"a.png": noise(0, 8, 4)}, ["a.png is 8x4", "--transform=center-crop"]),
        ({"a.png": noise(0, 12, 12)}, ["a.png is 12x12", "power of two"]),
        ({"a.png": noise(0), "b.png": noise(0, 16, 16)}, ["b.png is 16x16 RGB, but a.png is 8x8 RGB"]),
        ({"a.png": noise(0), "b.png": b"text"}, ["b.png in", "not an image"]),
    ],
)
def test_wrong_sources(files, words, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    source = fill(tmp_path / "in", files)
    (tmp_path / "out.zip").write_bytes(b"precious")
    for dest in ("out.zip", "folder"):
        assert tool(source, tmp_path / dest) == 1
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and all(word in captured.err for word in words), captured.err
    assert (tmp_path / "out.zip").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.zip"]


def test_dest_in_the_way(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert tool("digits", tmp_path / "file", "--max-images=1") == 1 and "is a file" in capsys.readouterr().err
    (tmp_path / "folder.zip").mkdir()
    assert tool("digits", tmp_path / "folder.zip", "--max-images=1") == 1 and "is a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert tool("digits", tmp_path / "empty", "--max-images=1") == 0
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == ["00000", "dataset.json"]


def test_a_set_can_be_converted_in_place(tmp_path):
    source = fill(tmp_path / "in", {f"{i}.png": noise(i) for i in range(3)})
    assert tool(source, tmp_path / "set.zip") == 0
    assert tool(tmp_path / "set.zip", tmp_path / "set.zip", "--resolution=4x4") == 0
    assert images(tmp_path / "set.zip").shape == (3, 4, 4, 3)


@pytest.mark.parametrize("first", ["a", "z"])
def test_grey_among_colour_becomes_rgb(first, tmp_path, capsys):
    """Wherever the grey ones stand; labels and pixels are as ever."""
    source = tmp_path / "mixed"
    rng = np.random.default_rng(0)
    pixels = {}
    for name, shape in (("m1", (8, 8, 3)), ("m2", (8, 8, 3)), (f"{first}1", (8, 8)), (f"{first}2", (8, 8))):
        pixels[name] = rng.integers(0, 256, shape, dtype=np.uint8)
        (source / name[0]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[name]).save(source / name[0] / f"{name}.png")
    assert tool(source, tmp_path / "out.zip") == 0
    said = capsys.readouterr().out
    assert "4 images, 8x8 RGB" in said and "2 grey images became RGB" in said
    for made, name in zip(images(tmp_path / "out.zip"), sorted(pixels), strict=True):
        wanted = pixels[name]
        assert np.array_equal(made, wanted if wanted.ndim == 3 else np.repeat(wanted[:, :, None], 3, axis=2))
    assert [label for _, label in labels(tmp_path / "out.zip")] == [0, 0, 1, 1]


def test_the_first_images_of_class_folders(tmp_path, capsys):
    fill(tmp_path / "in", {f"{name}/{i}.png": noise(i) for name in ("ant", "cat", "dog") for i in range(2)})
    for number, wanted in ((1, "0 ant"), (3, "0 ant, 1 cat"), (5, "0 ant, 1 cat, 2 dog"), (6, "0 ant, 1 cat, 2 dog")):
        assert tool(tmp_path / "in", tmp_path / "out.zip", f"--max-images={number}") == 0
        said = capsys.readouterr().out
        assert f"labels from top-level folders: {wanted}\n" in said
        assert ("came along" in said) == (number < 5) and ("left out: " in said) == (number < 6)


def test_a_result_within_its_source_and_a_picture_as_source(tmp_path, capsys):
    Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / "a.png")
    for dest in (tmp_path / "out", tmp_path / "x/../y/out"):
        assert tool(tmp_path, dest) == 2
        assert "would be part of it next time" in capsys.readouterr().err
    assert tool(tmp_path / "a.png", tmp_path / "out.zip") == 1
    assert "a.png is neither a folder nor a whole zip archive" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert tool(tmp_path, tmp_path / "out.zip") == 0 and tool(tmp_path, tmp_path / "out.zip") == 0
    assert capsys.readouterr().out.count("1 image, 8x8 RGB") == 2, "a zip is no part of it"
