"""Files that nobody thought of: good ones with changes at random, and pickles from a grammar of what pickles may hold.

Whatever a file holds, `load_network` returns a network or raises UserError, and does nothing besides reading it.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dnnlib.cli import UserError
from formats.network_files import METADATA, NetworkFile, _safetensors, load_network
from formats.pickle_reader import GLOBALS, STORAGES
from formats.pickle_writer import NetworkPickler
from hostile_cases import (
    HEAD,
    META,
    PERSISTENT,
    call,
    calling,
    header_of,
    name,
    raw,
    safe,
    spoiled,
    storage,
    text,
    value,
)
from test_network_files import small
from watch import watch

KWARGS: dict[str, Any] = {"img_channels": 2, "model_channels": 4, "channel_mult": [1], "attn_resolutions": []}
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")  # goes with the process
ENTRIES = {"sampling": {"levels": [80.0, 1.0, 0.0], "solver": "euler", "ratio": 2}, "dataset_kwargs": {"path": "x.zip"}}

fuzz = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@cache
def tiny() -> Any:
    """A network as small as can be."""
    return small(**KWARGS, label_dim=0, encoder_type="standard", augment_dim=0)


@cache
def good(kind: str) -> bytes:
    """A small file of either kind."""
    buffer = io.BytesIO()
    net = tiny()
    if kind == "safetensors":
        return _safetensors(net, ENTRIES, half=False)
    NetworkPickler(buffer, half=False).dump({"ema": net, **ENTRIES})
    return buffer.getvalue()


@cache
def place() -> str:
    """Where the files are stored for loading. Loads good ones first, so that all modules are there."""
    path = str(Path(FOLDER.name) / "net.pkl")
    for kind in ("pickle", "safetensors"):
        Path(path).write_bytes(good(kind))
        load_network(path)
    return path


def load(data: bytes) -> NetworkFile | str:
    """The network of such a file, or what is wrong with it, in one line."""
    path = place()
    Path(path).write_bytes(data)
    with watch(path) as events:
        try:
            result: NetworkFile | str = load_network(path)
        except UserError as exc:
            result = str(exc)
    assert not events
    if isinstance(result, str):
        assert result.startswith(path) and result.isprintable() and len(result) < 1000
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Changes to good files


@cache
def borders(kind: str) -> list[int]:
    """Where something begins in a good file: instructions of the pickle, those inside its tensors, the JSON's values."""
    data = good(kind)
    if kind == "safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        return [0, 8, *(place for place in range(8, end) if data[place] in b'"{[:,]}'), end]
    places = [position for _, _, position in pickletools.genops(data) if position is not None]
    for _, arg, position in pickletools.genops(data):
        if isinstance(arg, bytes) and arg.startswith(b"\x80\x02") and position is not None:
            start = data.index(arg, position)
            places += range(start, start + min(len(arg), 250))
    return sorted(places)


INTERESTING = [b"", b"\0", b"\xff", b"(", b".", b"R", b"b", b"Q", b"0", b"2", b"h\0", b"}", b"]", b"\x93", b"\x81"]
INTERESTING += [b"\x85", b"1e999", b"null", b"-1", b"[]", b"{}", b'"', b"18446744073709551615"]
INTERESTING += [b"\xff" * 4, b"\xff" * 8, b"\0" * 4]


@st.composite
def changed(draw: st.DrawFn, kind: str) -> bytes:
    """A good file after a few changes, most of them where something begins."""
    data, spots = bytearray(good(kind)), borders(kind)
    spot = st.sampled_from(spots) | st.integers(0, len(data))
    length = st.integers(1, 8) | st.integers(1, 2000)
    for _ in range(draw(st.integers(1, 3))):
        start = min(draw(spot), len(data))
        size = draw(length)
        match draw(st.sampled_from(["set", "flip", "number", "insert", "delete", "copy", "replace", "cut"])):
            case "set":
                new = draw(st.binary(min_size=1, max_size=4) | st.sampled_from(INTERESTING))
                data[start : start + len(new)] = new
            case "flip":
                bit = draw(st.integers(0, 7))
                data[start : start + 1] = bytes(byte ^ 1 << bit for byte in data[start : start + 1])
            case "number":
                start += draw(st.integers(0, 3))
                width = draw(st.sampled_from(["<B", "<H", "<I", "<Q"]))
                bits = 8 * struct.calcsize(width)
                edge = st.sampled_from([0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1])
                new = struct.pack(width, draw(edge | st.integers(0, 2**bits - 1)))
                data[start : start + len(new)] = new
            case "insert":
                data[start:start] = draw(st.binary(max_size=20) | st.sampled_from(INTERESTING))
            case "delete":
                del data[start : start + size]
            case "copy" | "replace" as case:
                source = min(draw(spot), len(data))
                data[start : start + (size if case == "replace" else 0)] = data[source : source + size]
            case "cut":
                data = data[:start]
    return bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Sound files that hold something odd

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.integers(-(1 << 80), 1 << 80),
    st.floats(),
    st.sampled_from(["", "x", "EDMPrecond", "SongUNet", "DhariwalUNet", "fourier", "residual", "skip", "heun", "F16"]),
    st.text(max_size=8),
)
odd = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def alter(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any]) -> None:
    """Replaces, removes or adds something somewhere in dicts and lists."""
    while isinstance(tree, (dict, list)):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = draw(st.sampled_from(keys)) if keys else None
        if key is None or not isinstance(tree[key], (dict, list)) or draw(st.integers(0, 3)) == 0:
            break
        tree = tree[key]
    else:
        return  # an earlier change has left no such thing here
    what = draw(st.integers(0, 9))
    if key is None or what == 0:
        if isinstance(tree, dict):
            tree[draw(st.text(max_size=5))] = draw(values)
        else:
            tree.append(draw(values))
    elif what == 1:
        del tree[key]
    else:
        tree[key] = draw(values)


@st.composite
def odd_pickle(draw: st.DrawFn) -> bytes:
    """A network whose modules, tensors or arguments are not what they should be."""

    def edit(states: dict[str, Any], rest: dict[str, Any]) -> None:
        values = odd | st.sampled_from(
            [torch.zeros(4), torch.zeros(2, 2, dtype=torch.int8), nn.Parameter(torch.ones(1))]
        )
        for _ in range(draw(st.integers(1, 2))):
            match draw(st.sampled_from(["state", "table", "arguments", "arguments", "entries"])):
                case "state":
                    alter(draw, states[draw(st.sampled_from(sorted(states)))], values)
                case "table":
                    state = states[draw(st.sampled_from(sorted(states)))]
                    alter(draw, state.get(draw(st.sampled_from(["_parameters", "_buffers"]))), values)
                case "arguments":
                    alter(draw, states[""].get("_init_kwargs"), odd)
                case "entries":
                    alter(draw, rest, values)

    entries = {"sampling": {"levels": [80.0, 1.0, 0.0], "solver": "euler", "ratio": 2}}
    return spoiled(edit, entries, tiny)()


@st.composite
def odd_safetensors(draw: st.DrawFn) -> bytes:
    """A header, or the network that it describes, that are not what they should be."""
    data = good("safetensors")
    header = header_of(data)
    meta = json.loads(header["__metadata__"][METADATA])
    for _ in range(draw(st.integers(1, 2))):
        alter(draw, draw(st.sampled_from([header, meta, meta.get("init_kwargs"), meta.get("entries")])), odd)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"][METADATA] = json.dumps(meta)
    return safe(header, data[8 + int.from_bytes(data[:8], "little") :])


# ---------------------------------------------------------------------------------------------------------------------
# Pickles from a grammar

TEXTS = ["ema", "state", "_modules", "_parameters", "_buffers", "_init_kwargs", "_init_args", "model", "class_name"]
TEXTS += ["type", "class", "version", "module_src", "EDMPrecond", "SongUNet", "Linear", "f8", "<", "latin1", "sampling"]
TEXTS += ["img_resolution", "img_channels", "model_channels", "channel_mult", "num_blocks", "model_type", "dropout"]
CLASSES = ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "SongUNet", "DhariwalUNet", "Linear", "Conv2d", "x"]

plain_values = (scalars | st.sampled_from(TEXTS)).map(value)
names = st.sampled_from(sorted(GLOBALS)).map(lambda pair: name(*pair))
memory = st.integers(0, 3).map(lambda index: b"h" + bytes([index]))
leaves = st.one_of(
    plain_values, st.binary(max_size=20).map(raw), names, memory, st.sampled_from([b"]", b"}", b")", b"\x8f"])
)


def composed(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Everything that can be made of other values."""
    several = st.lists(inner, max_size=4)
    keys = st.sampled_from(TEXTS).map(text) | inner
    pairs = st.lists(st.tuples(keys, inner).map(b"".join), max_size=4).map(b"".join)
    state = st.lists(st.tuples(st.sampled_from(TEXTS[1:8]).map(text), inner).map(b"".join), max_size=4).map(b"".join)
    fields = st.sampled_from(["version", "type", "class_name", "x"]).map(text)
    whole = st.sampled_from(CLASSES).map(lambda kind: value({**META, "class_name": kind}))
    meta = st.tuples(whole, state).map(lambda t: t[0] + text("state") + b"}(" + t[1] + b"us")
    odd_meta = st.tuples(whole, fields, inner).map(lambda t: t[0] + t[1] + t[2] + b"s")
    count = st.integers(-1, 5)
    elements = st.tuples(st.integers(0, 40), count, st.sampled_from(sorted(STORAGES)))
    stored = elements.map(
        lambda t: calling(name("torch.storage", "_load_from_bytes"), raw(storage(bytes(t[0]), t[1], t[2])))
    )
    numbers = st.lists(count, max_size=3).map(lambda shape: value(tuple(shape)))
    tensors = st.tuples(stored, count.map(value), numbers, numbers).map(
        lambda t: calling(name("torch._utils", "_rebuild_tensor_v2"), *t, b"\x89", call("collections", "OrderedDict"))
    )
    return st.one_of(
        several.map(lambda items: b"](" + b"".join(items) + b"e"),
        several.map(lambda items: b"(" + b"".join(items) + b"t"),
        several.map(lambda items: b"\x8f(" + b"".join(items) + b"\x90"),
        pairs.map(lambda items: b"}(" + items + b"u"),
        st.tuples(names | inner, several).map(lambda t: calling(t[0], *t[1])),
        st.tuples(names, inner).map(lambda t: t[0] + t[1] + b"\x85\x81"),
        st.tuples(inner, inner).map(lambda t: t[0] + t[1] + b"b"),
        (meta | odd_meta).map(lambda code: calling(name(*PERSISTENT), code)),
        tensors,
        tensors.map(lambda code: calling(name("torch._utils", "_rebuild_parameter"), code, b"\x89}")),
        st.tuples(inner, st.integers(0, 3)).map(lambda t: t[0] + b"q" + bytes([t[1]])),
        inner.map(lambda code: code + b"\x94"),
    )


trees = st.recursive(leaves, composed, max_leaves=25)
tokens = st.one_of(leaves, st.integers(0, 255).map(lambda byte: bytes([byte])), st.binary(max_size=5))


@st.composite
def grammatical(draw: st.DrawFn) -> bytes:
    """A pickle of a dict with an 'ema', as a tree, as two of them with instructions at random between, or worse."""
    code = draw(trees)
    if draw(st.integers(0, 3)) == 0:
        code += b"".join(draw(st.lists(tokens, max_size=6)))
    others = draw(st.lists(st.tuples(st.sampled_from(TEXTS).map(text), trees).map(b"".join), max_size=2))
    head = draw(st.sampled_from([HEAD, HEAD, HEAD, b"\x80\x02", b"\x80\x05"]))
    return head + b"}" + text("ema") + code + b"s" + b"".join(other + b"s" for other in others) + b"."


# ---------------------------------------------------------------------------------------------------------------------


FILES = {
    "changed pickles": changed("pickle"),
    "changed safetensors": changed("safetensors"),
    "odd pickles": odd_pickle(),
    "odd safetensors": odd_safetensors(),
    "grammatical pickles": grammatical(),
}


@pytest.mark.parametrize("files", FILES)
@fuzz
@given(st.data())
def test_files_load_and_run_or_are_refused(files: str, data: st.DataObject) -> None:
    """What has been loaded also makes images, unless it asks for large ones."""
    result = load(data.draw(FILES[files]))
    if isinstance(result, NetworkFile) and result.net.img_resolution <= 64:
        images = torch.zeros(1, result.net.img_channels, result.net.img_resolution, result.net.img_resolution)
        with torch.no_grad():
            assert result.net(images, torch.tensor(1.0)).shape == images.shape


@fuzz
@given(st.binary(max_size=200).map(lambda data: HEAD + data) | st.binary(max_size=100))
def test_any_bytes(data: bytes) -> None:
    assert isinstance(load(data), str)


@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_the_good_ones_load(kind: str) -> None:
    result = load(good(kind))
    assert isinstance(result, NetworkFile) and result.sampling is not None
    assert result.sampling.grid.levels == (80.0, 1.0, 0.0)
