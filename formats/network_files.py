"""Reading and writing networks: EDM's pickles and safetensors.

Reading runs nothing that a file brings along: `pickle_reader` turns a pickle into data, the class names in it stand for
this project's own classes, and everything stored must fit the network that its constructor arguments make: every part,
every tensor, every shape. `trust_network_code=True` is the one way to run a file's code. Where the text stored with a
known class is no known version of it (`known_code`), the network is read all the same, with a warning.

A pickle written here opens in EDM's own code: `ema` is a persistent object with its source text, everything else plain
dicts, lists, strings and numbers. The same network gives the same bytes.

A .safetensors file holds the weights under their state-dict names, and in its metadata, under `edm_network`, one JSON
text: class_name, init_args, init_kwargs, attributes (those set after construction), entries (sampling, loss_fn, ...).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnnlib.atomic import atomic_write
from dnnlib.errors import UserError, printable, public_url
from dnnlib.util import count, forget, forgotten_if_bad, open_url
from torch_utils import distributed as dist
from torch_utils import persistence
from torch_utils.misc import load_tensors, save_tensors
from training import networks
from training.grids import Sampling, network_grid

from . import known_code
from .pickle_reader import (
    GLOBALS,
    MAX_DEPTH,
    MAX_VALUES,
    Budget,
    ContentError,
    ForeignError,
    StoredObject,
    StoredTensor,
    UnknownNameError,
    plain,
    read_pickle,
)
from .pickle_writer import NetworkPickler, stored_tensor

KNOWN_CLASSES = known_code.CLASSES | {"ModuleDict"}
PRECONDS = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
FORMATS = ("EDM pickle", "safetensors", "pickle, its own code run")
ENTRIES = (
    "loss_fn",
    "augment_pipe",
    "dataset_kwargs",
    "sampling",
    "training_options",
)  # of a file, besides the network
VARIANTS = "unknown_variants"  # entry of a file that was converted from one with an unknown version of these classes
METADATA = "edm_network"  # key of the JSON text in a safetensors file
MAX_SIZE = 1 << 16  # no width, resolution or table of a known network is larger
MAX_LIST = 64  # numbers in a list among the constructor arguments of a network
MAX_PARTS = 5000  # modules of a network; the largest published ones have 320,
MAX_MEMBERS = 100_000  # and tensors, attributes and modules together 20 thousand
MAX_NAME = 200  # characters of a tensor's full name
MAX_TEXTS = 8  # source texts of a network's classes; EDM's have one
MAX_HEADER = 1 << 22  # bytes before the tensors of a safetensors file
MAX_IGNORED = 100  # names of entries that are left aside
LISTS = ("channel_mult", "attn_resolutions", "resample_filter")  # constructor arguments that are lists of numbers,
TEXTS = ("model_type", "embedding_type", "encoder_type", "decoder_type")  # and those that are texts
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights may be stored as
SETTINGS = (  # attributes that may be set after a network was made; any other would contradict its weights
    *("use_fp16", "sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "epsilon_t", "C_1", "C_2"),
    *("dropout", "label_dropout", "skip_scale", "eps"),
)

State = dict[str, Any]


@dataclass(frozen=True)
class NetworkFile:
    """A network and what its file holds besides.

    net             eval mode, requires_grad off, on the CPU, float32
    sampling        noise grid and solver of a distilled network, else None
    sha256          of the file, in hexadecimal
    source          path, or URL without user name, password and query
    dataset_kwargs  options of the data set it was trained on, if the file has them
    extra           the file's other entries (loss_fn, augment_pipe, ...), as far as they are plain data
    format          what kind of file it was found to be: FORMATS
    half            whether its parameters were stored in float16
    variants        classes (and what they use) of which the file's text, or that of the file it was converted from, has
                    a version unknown here; this project's own stand in for them
    ignored         names of entries that are not plain data (a teacher, an optimiser, ...) and were not kept
    """

    net: Any
    sampling: Sampling | None
    sha256: str
    source: str
    dataset_kwargs: dict[str, Any] | None
    extra: dict[str, Any]
    format: str = FORMATS[0]
    ignored: tuple[str, ...] = ()
    half: bool = False
    variants: tuple[str, ...] = ()

    @property
    def has_label_vectors(self) -> bool:
        """Whether its file records that it was trained with label vectors: one-hot labels mean nothing to it."""
        return bool(self.net.label_dim) and (self.dataset_kwargs or {}).get("label_kind") == "vectors"

    @property
    def own_code(self) -> bool:
        """Whether the network is of foreign code that the file brought along."""
        return not persistence.is_own(self.net)

    def describe(self) -> str:
        """One line for people: kind of file, kind of network, its size, its grid if it is a student's."""
        net = self.net
        parameters = sum(p.numel() for p in net.parameters())
        what = type(net).__name__[:100]
        if getattr(net, "model", None) is not None:
            what += f" of {type(net.model).__name__[:100]}"
        shape = f"{net.img_channels}x{net.img_resolution}x{net.img_resolution}"
        labels = count(net.label_dim, "class") if net.label_dim else "no classes"
        labels = f"label vectors of {count(net.label_dim, 'number')}" if self.has_label_vectors else labels
        steps = self.sampling.grid.steps if self.sampling else 0
        kind = f"student of {count(steps, 'step')}" if steps else "undistilled"
        kept = f"{self.format}{' in half precision' * self.half}"
        found = [kept, what, f"{parameters / 1e6:.2f} M parameters", shape, labels, kind]
        foreign = [name for name in self.extra if name not in ENTRIES]
        found += [f"also holds {', '.join(foreign)[:200]}"] if foreign else []
        found += [f"left aside: {', '.join(self.ignored)[:200]}"] if self.ignored else []
        found += [f"an unknown variant of {', '.join(self.variants)[:200]}"] if self.variants else []
        return printable(", ".join(found))


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class ForeignNetworkError(UserError):
    """The network is of a kind that this project doesn't know; only running the file's own code could load it."""


def load_network(path_or_url: str | os.PathLike[str], *, trust_network_code: bool = False) -> NetworkFile:
    """Reads the network (`ema`) of an EDM pickle or a safetensors file; the content decides which.

    Nothing in the file is executed, unless `trust_network_code` is set and the network, or the version of a class that
    it was written with, is unknown here.
    Raises UserError, naming the file, for anything that is no such file or doesn't fit together.
    """
    source = public_url(os.fspath(path_or_url))
    if os.path.isdir(source):
        raise UserError(f"{source}: is a folder, a file is needed{_network_in(Path(source))}")
    try:
        with open_url(path_or_url, check=_check_start) as file:
            _check_start(file.read(1024))
            file.seek(0)
            return _understand(file.read(), source, trust_network_code)
    except ForeignNetworkError:
        raise
    except (UserError, ContentError) as exc:
        forget(os.fspath(path_or_url))  # cut off by a server that gave no length, for example
        raise exc if isinstance(exc, UserError) else UserError(f"{source}: {exc}") from exc


def _network_in(folder: Path) -> str:
    """'; the newest network in it is ...' of a run's or a ladder's folder, or one of runs."""
    found = [*folder.glob("network-snapshot-*.pkl"), *folder.glob("*/network-snapshot-*.pkl")]
    return f"; the newest network in it is {max(found, key=lambda path: path.stat().st_mtime)}" if found else ""


def _understand(data: bytes, source: str, trust_network_code: bool, warn: bool = True) -> NetworkFile:
    try:
        content = _read(data)
    except ContentError as exc:
        if not isinstance(exc, ForeignError) or data[:1] != b"\x80":  # only pickles bring code along
            raise UserError(f"{source}: {exc}") from exc
        if not trust_network_code:
            raise ForeignNetworkError(
                f"{source}: {exc}; only if you trust its author: --trust-network-code runs the code it brings, with "
                "all your rights"
            ) from exc
        content = _run_pickle(data, source)
    if content.variants and trust_network_code:
        content = _run_pickle(data, source)
    net, entries = content.net, content.entries
    try:
        sampling = _sampling(net, content)
    except ValueError as exc:
        raise UserError(f"{source}: its noise grid can't be used: {str(exc)[:300]}") from exc
    dataset_kwargs = entries.get("dataset_kwargs")
    lost = ["dataset_kwargs"] if dataset_kwargs is not None and not isinstance(dataset_kwargs, dict) else []
    variants = content.variants or _marked(entries.pop(VARIANTS, None))
    if variants and warn:
        names = printable(", ".join(variants), 200)
        origin, advice = "", "; --trust-network-code runs the code that the file brings"
        if not content.variants:
            origin, advice = "converted from a file of which this holds: ", ""
        _warn(
            f"Warning: {printable(source, 300)}: {origin}its text of {names} is no version known here (a fork's?). "
            f"This program's own is used instead, whose numbers may differ{advice}"
        )
    return NetworkFile(
        net=net.eval().requires_grad_(False),
        sampling=sampling,
        sha256=hashlib.sha256(data).hexdigest(),
        source=source,
        dataset_kwargs=dataset_kwargs if isinstance(dataset_kwargs, dict) else None,
        extra={
            name: value
            for name, value in entries.items()
            if name not in ("dataset_kwargs", "sampling") and (value is not None or name not in ENTRIES)
        },
        format=content.format,
        ignored=(*content.ignored, *lost),
        half=content.half,
        variants=variants,
    )


def _marked(value: Any) -> tuple[str, ...]:
    """The entry VARIANTS of a file, as far as it is one."""
    names = value if isinstance(value, list) else []
    return tuple(str(name)[:100] for name in names[: known_code.MAX_NAMES])


@dataclass(frozen=True)
class _Content:
    """What was found in a file: the network, its other entries as plain data, and the names of those that are not."""

    net: nn.Module
    entries: State
    ignored: Sequence[str]
    format: str
    half: bool = False
    variants: tuple[str, ...] = ()


def _sampling(net: Any, content: _Content) -> Sampling | None:
    """The grid of a student. Raises ValueError for one that can't be.

    Students of an earlier fork of EDM have it in their loss alone: every `ratio`-th of `num_steps` levels.
    """
    entries = content.entries
    if entries.get("sampling") is not None:
        return Sampling.from_dict(entries["sampling"])
    match entries.get("loss_fn"):
        case {"class_name": "EDMDistillationLoss", "num_steps": int(steps), "ratio": int(ratio)}:
            return Sampling(network_grid(net, steps).every(ratio), "euler", ratio)
        case {"class_name": "EDMDistillationLoss"}:
            raise ValueError("its loss is an EDMDistillationLoss that does not say num_steps and ratio")
    return None


def _read(data: bytes) -> _Content:
    """The network in `data` and the other entries. Raises ContentError, whatever the format."""
    _check_start(data[:1024])
    return _read_safetensors(data) if data[8:9] == b"{" else _read_edm_pickle(data)


def _check_start(start: bytes) -> None:
    """Refuses what the first bytes show to be no network, before gigabytes of it are read. Raises ContentError."""
    text = start[:1024].lstrip().lower()
    if not start:
        raise ContentError("is empty")
    if text.startswith((b"<!doctype html", b"<html")):
        raise ContentError("is a web page, not a network; check where it was downloaded from")
    if start.startswith(b"PK\x03\x04"):
        raise ContentError(
            "is an archive: a data set, or one as torch.save writes it (a training state, a detector, bare weights); "
            "give a network-snapshot-*.pkl (convert.py --like makes one of bare weights)"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ContentError("is a pointer of Git LFS, not the file itself: git lfs pull fetches that")
    if start[8:9] != b"{" and not (start[:1] == b"\x80" and start[1:2] in (b"", *(bytes([n]) for n in range(2, 6)))):
        raise ContentError("is not a pickle of protocol 2 to 5, nor a safetensors file")


def _read_edm_pickle(data: bytes) -> _Content:
    try:
        content = read_pickle(memoryview(data))
    except UnknownNameError as exc:
        unknown = next((index for index, name in enumerate(exc.classes) if name not in KNOWN_CLASSES), None)
        if unknown is None:
            raise
        raise _foreign_class(exc.classes[unknown], unknown > 0, f" (it refers to '{exc.name}')") from exc
    if not isinstance(content, dict) or not isinstance(content.get("ema"), StoredObject):
        raise ContentError(f"has no network under 'ema', where EDM's network files have theirs; {_instead(content)}")
    parts = dict(_walk(content["ema"]))
    root = parts[""]
    tensors = {
        name: tensor
        for path, part in parts.items()
        for name, tensor in _members(part, path, "_parameters", "_buffers")
        if tensor is not None
    }
    for name, tensor in tensors.items():
        if not isinstance(tensor, StoredTensor):
            raise ContentError(f"is damaged: {name} is not a tensor")
    elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
    size = sum(math.prod(tensor.shape) * tensor.storage.itemsize for tensor in tensors.values())
    if max(size, 2 * elements) > len(data):  # float16 is the smallest type
        raise ContentError("is damaged: its tensors are larger than the file")
    attributes = {path: _scalars(part.state) for path, part in parts.items()}
    try:
        args, kwargs = plain(root.state.get("_init_args", ())), plain(root.state.get("_init_kwargs", {}))
    except TypeError as exc:
        raise ContentError(f"is damaged: among its constructor arguments, {exc}") from exc
    net = _make(root.class_name, args, kwargs, attributes, len(parts), elements)
    _check_same(
        "part",
        {path: part.class_name for path, part in parts.items()},
        {path: type(module).__name__ for path, module in net.named_modules()},
    )
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    _fill(net, shapes, lambda name: _copy(tensors[name]))
    parameters = {name for name, _ in net.named_parameters()}
    half = all(tensor.storage.dtype == "float16" for name, tensor in tensors.items() if name in parameters)
    return _Content(net, *_other_entries(content), "EDM pickle", half, _variants(parts.values()))


def _variants(parts: Iterable[StoredObject]) -> tuple[str, ...]:
    """What the source texts of a network's parts define in an unknown version. Of texts beyond MAX_TEXTS, the classes
    that are stored with them."""
    texts: dict[str, str] = {}
    for part in parts:
        if part.source:
            texts.setdefault(part.source, part.class_name)
    found: list[str] = []
    for index, (text, class_name) in enumerate(texts.items()):
        found += known_code.unknown_definitions(text) if index < MAX_TEXTS else [class_name]
    return tuple(dict.fromkeys(found))[: known_code.MAX_NAMES]


def _foreign_class(name: str, is_part: bool, detail: str = "") -> ForeignError:
    return ForeignError(f"holds a {'part' if is_part else 'network'} of class '{name[:100]}', unknown here{detail}")


def _instead(content: Any) -> str:
    """What a file without an `ema` holds, in words."""
    if not isinstance(content, dict):
        return "it holds something else"
    networks_there = [str(name)[:50] for name, value in content.items() if isinstance(value, StoredObject)]
    if networks_there:
        return f"it holds objects under {', '.join(networks_there[:8])[:200]}: store the averaged network as 'ema'"
    return f"it holds a dict of {', '.join(str(name)[:50] for name in list(content)[:8])[:200]}"


def _walk(root: StoredObject) -> Iterator[tuple[str, StoredObject]]:
    """Every module from `root` down with its path, '' for the first one.

    Bounded in every respect, since a file may refer to itself, and to one large table or text as often as it likes.
    """
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    parts = members = 0
    while waiting:
        path, part, depth = waiting.pop()
        if not isinstance(part, StoredObject):
            raise ContentError(f"is damaged: part '{path}' is not a module")
        if part.class_name not in KNOWN_CLASSES:
            raise _foreign_class(part.class_name, bool(path))
        parts += 1
        members += len(part.state) + sum(len(table) for table in part.state.values() if isinstance(table, dict))
        if depth > MAX_DEPTH or parts > MAX_PARTS or members > MAX_MEMBERS:
            raise ContentError("is damaged: its network has no end")
        yield path, part
        children = [(name, child) for name, child in _members(part, path, "_modules") if child is not None]
        waiting += [(name, child, depth + 1) for name, child in reversed(children)]


def _members(part: StoredObject, path: str, *tables: str) -> Iterator[tuple[str, Any]]:
    """The entries of a module's tables of parameters, buffers or modules, under their full names."""
    for table in tables:
        members = part.state.get(table, {})
        if not isinstance(members, dict):
            raise ContentError(f"is damaged: {table} of part '{path}' is no dict")
        for name, value in members.items():
            if isinstance(name, str) and len(path) + len(name) > MAX_NAME:
                raise ContentError(f"is damaged: {path}.{name[:50]}... is no name")
            yield (f"{path}.{name}" if path else str(name)), value


def _scalars(state: Mapping[Any, Any]) -> State:
    """The numbers and flags among a module's own attributes."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and not name.startswith("_") and name != "training" and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_))


def _other_entries(content: Mapping[Any, Any]) -> tuple[State, list[str]]:
    """Everything but `ema` as far as it is plain, and the names of what is not. EDM's loss and augmentation objects
    become dicts of their plain attributes: an earlier fork's loss has its whole teacher inside."""
    entries: State = {}
    ignored: list[str] = []
    total = Budget(3 * MAX_VALUES)

    def keep(where: State, name: str, value: Any, full_name: str) -> None:
        budget = Budget()
        try:
            where[name] = plain(value, budget)
        except TypeError as exc:  # tensors and the like: no part of a network file, and nobody asks for them
            if full_name == "sampling":
                raise ContentError(f"its noise grid can't be used: {exc}") from exc
            if len(ignored) < MAX_IGNORED:
                ignored.append(full_name)
        total.values -= MAX_VALUES - budget.values
        if total.values < 0:
            raise ContentError("holds too much besides its network")

    for name, value in content.items():
        if not isinstance(name, str) or name == "ema":
            if name != "ema" and len(ignored) < MAX_IGNORED:
                ignored.append(str(name)[:50])
            continue
        if isinstance(value, StoredObject):
            total.values -= len(value.state)
            public = {k: v for k, v in value.state.items() if isinstance(k, str) and not k.startswith("_")}
            found: State = {"class_name": value.class_name}
            for key, attribute in public.items():
                keep(found, key, attribute, f"{name[:50]}.{key[:50]}")
            value = found
        keep(entries, name, value, name)
    return entries, ignored


# ----------------------------------------------------------------------------------------------------------------------
# From data to a network


class _WithoutWeights(TorchFunctionMode):
    """While this is on, initial weights have a shape but no data: a network is made in no time, from no random draws.

    Arithmetic on them with numbers, which leaves a shape as it is, is left out too.
    """

    MAKERS = (torch.rand, torch.randn, torch.ones)
    ARITHMETIC = (torch.Tensor.mul, torch.Tensor.sub)  # what networks.py does with them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.MAKERS:
            return torch.empty(*args, device="meta")
        if func in self.ARITHMETIC and args[0].is_meta and not isinstance(args[1], Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def _make(
    class_name: str, args: Any, kwargs: Any, attributes: Mapping[str, State], parts: int, elements: int
) -> nn.Module:
    """A network of this class without weights. Attributes (by path of the module) win over constructor arguments,
    since EDM restores a network from its attributes. Raises ContentError.

    parts, elements: how many modules and weights there are for it.
    """
    if class_name not in PRECONDS:
        raise ContentError(f"its 'ema' is of class {class_name[:100]}; a network is one of {', '.join(PRECONDS)}")
    cls: Any = getattr(networks, class_name)
    if not isinstance(kwargs, dict) or not isinstance(args, list):
        raise ContentError("is damaged: its constructor arguments are no dict")
    parameters = inspect.signature(cls.__init__).parameters
    for name, value in attributes.get("", {}).items():
        default = parameters[name].default if name in parameters else value
        if name in parameters and not args and value != kwargs.get(name, default):
            kwargs = {**kwargs, name: value}
    _check_arguments(cls, args, kwargs, parts, elements)
    try:
        with _WithoutWeights():
            net: nn.Module = cls(*args, **kwargs)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, IndexError) as exc:
        raise _unusable(class_name, str(exc)) from exc
    for path, module in net.named_modules():
        for name, value in attributes.get(path, {}).items():
            own = vars(module).get(name)
            if not _is_number(own) or isinstance(own, bool) != isinstance(value, bool) or own == value:
                continue
            if name not in SETTINGS:
                found = str(value)[:50]
                raise ForeignError(f"does not fit the network it describes: {path}.{name} is {found}, not {own}")
            setattr(module, name, value)
        if not 0 <= vars(module).get("dropout", 0) <= 1:
            raise ContentError(f"is damaged: {path}.dropout is no probability")
    return net


def _unusable(class_name: str, reason: str) -> ForeignError:
    return ForeignError(f"its {class_name} can't be made from its own constructor arguments: {reason[:300]}")


def _check_arguments(cls: Any, args: list[Any], kwargs: State, parts: int, elements: int) -> None:
    """Refuses arguments of a wrong kind, and those that would make a network out of all proportion to its file."""
    try:
        given = dict(inspect.signature(cls.__init__).bind(None, *args, **kwargs).arguments)
    except TypeError as exc:
        raise _unusable(cls.__name__, str(exc)) from exc
    given |= given.pop("model_kwargs", {})
    del given["self"]
    sizes: dict[str, list[int]] = {}
    for name, value in given.items():
        items = value if name in LISTS and isinstance(value, list) else [value]
        if len(items) > MAX_LIST or any(isinstance(item, int) and abs(item) > MAX_SIZE for item in items):
            raise ContentError(f"its constructor arguments hold a size above {MAX_SIZE}, or too many")
        if not all(isinstance(item, str) if name in TEXTS else _is_number(item) for item in items):
            raise _unusable(cls.__name__, f"{name} is a {type(value).__name__}")  # str * int could be huge
        sizes[name] = [abs(item) for item in items if isinstance(item, int)]
    width = max(sizes.get("model_channels", []), default=1)
    levels = sizes.get("channel_mult", [1])
    if width * max(levels, default=1) > MAX_SIZE:
        raise ContentError(f"its constructor arguments hold a size above {MAX_SIZE}, or too many")
    # A level has as many blocks in the encoder and one more in the decoder. Each of these has five layers, and for each
    # of its channels nine weights and more.
    blocks = 2 * max(sizes.get("num_blocks", []), default=0) + 1
    if 3 * blocks * len(levels) > parts or 9 * blocks * width * sum(levels) > elements:
        raise ForeignError("its constructor arguments make a larger network than it holds the parts and weights of")


def _fill(net: nn.Module, shapes: Mapping[str, list[int]], tensor: Callable[[str], Tensor]) -> None:
    """Gives `net` its weights and buffers, all of them and no other, in its own types. Raises ForeignError.

    tensor: called once for each name; if it forgets what it returns, no more than one tensor is there twice.
    """
    expected = net.state_dict()
    _check_same("tensor", shapes, {name: list(value.shape) for name, value in expected.items()})
    values = {}
    for name, value in expected.items():
        found = tensor(name)
        if found.dtype not in FLOATS:
            raise ForeignError(f"stores {name} as {found.dtype}; a network of a known kind has floating-point weights")
        values[name] = found.to(value.dtype).contiguous()
    net.load_state_dict(values, assign=True)


def _check_same(what: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ForeignError with the first few names that only one side has, or for which the two differ."""
    problems = [f"lacks {name}" for name in expected if name not in found]
    problems += [f"has {name}, which the network does not" for name in found if name not in expected]
    problems += [
        f"{name}: {found[name]}, not {expected[name]}"
        for name in expected
        if found.get(name, expected[name]) != expected[name]
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ForeignError(
            f"does not fit the network it describes, {what} by {what}: {'; '.join(problems[:3])}{more}"[:600]
        )


def _copy(stored: StoredTensor) -> Tensor:
    """A tensor of its own from a window on the file, whose numbers may lie at odd addresses."""
    size = stored.storage.itemsize
    steps = [step * size if n > 1 else 0 for n, step in zip(stored.shape, stored.stride, strict=True)]
    elements = np.ndarray(stored.shape, f"i{size}", stored.storage.data, stored.offset * size, strides=steps)
    return torch.from_numpy(elements.copy()).view(getattr(torch, stored.storage.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors


def _read_safetensors(data: bytes) -> _Content:
    from safetensors import SafetensorError
    from safetensors.torch import load

    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER:
        raise ContentError(f"is a damaged safetensors file: its header is said to have {size} bytes")
    try:
        header = json.loads(str(data[8 : 8 + size], "utf-8"))  # bytes could be UTF-16 to json
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if 8 + size + max(ends, default=0) != len(data):
            raise ValueError(f"it has {len(data)} bytes, but announces {8 + size + max(ends, default=0)}")
        tensors = load(bytes(data))
        meta = json.loads((header.get("__metadata__") or {}).get(METADATA, "null"))
    except (SafetensorError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as exc:
        reason = " ".join(str(exc).split())[:200]  # torch's are long
        raise ContentError(f"is a damaged safetensors file: {reason}") from exc
    if meta is None:
        raise ContentError(
            f"is a safetensors file without '{METADATA}' in its metadata: it does not say which network it is "
            "(convert.py --like does)"
        )
    match meta:
        case {
            "class_name": str(class_name),
            "init_args": list(args),
            "init_kwargs": dict(kwargs),
            "attributes": dict(attributes),
            "entries": dict(entries),
        } if all(isinstance(values, dict) for values in attributes.values()):
            pass
        case _:
            raise ContentError(f"is a safetensors file whose '{METADATA}' is not as this program writes it")
    if class_name not in PRECONDS:
        raise _foreign_class(class_name, False)
    try:
        args, kwargs, entries = plain(args), plain(kwargs), plain(entries)
    except TypeError as exc:
        raise ContentError(f"is a safetensors file whose '{METADATA}' is {exc}") from exc
    scalars = {path: _scalars(values) for path, values in attributes.items()}
    elements = sum(tensor.numel() for tensor in tensors.values())
    net = _make(class_name, args, kwargs, scalars, min(len(tensors), MAX_PARTS), elements)
    parameters = {name for name, _ in net.named_parameters()}
    half = all(tensor.dtype == torch.float16 for name, tensor in tensors.items() if name in parameters)
    _fill(net, {name: list(tensor.shape) for name, tensor in tensors.items()}, tensors.pop)
    return _Content(net, entries, (), "safetensors", half)


def _write_safetensors(file: IO[bytes], net: nn.Module, entries: State, half: bool) -> None:
    from safetensors.torch import save

    class_name, init_args, init_kwargs = type(net).__name__, plain(net._init_args), plain(net._init_kwargs)
    if type(net) is not getattr(networks, class_name, None):
        raise TypeError(f"{class_name} is of foreign code, which only a .pkl can carry (or bare weights: .pt)")
    fresh = dict(_make(class_name, init_args, init_kwargs, {}, MAX_PARTS, sys.maxsize).named_modules())
    attributes = {}
    for path, module in net.named_modules():
        usual = _scalars(vars(fresh[path]))
        changed = {name: plain(value) for name, value in _scalars(vars(module)).items() if usual.get(name) != value}
        attributes.update({path: changed} if changed else {})
    meta = {
        "class_name": class_name,
        "init_args": init_args,
        "init_kwargs": init_kwargs,
        "attributes": attributes,
        "entries": entries,
    }
    weights = {name for name, _ in net.named_parameters()}
    tensors = {name: stored_tensor(tensor, half and name in weights, name) for name, tensor in net.state_dict().items()}
    content = save(tensors, {METADATA: json.dumps(meta)})
    if int.from_bytes(content[:8], "little") > MAX_HEADER:
        raise TypeError("the entries are too large for the header of a safetensors file")
    file.write(content)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def save_network(
    path: str | os.PathLike[str],
    net: nn.Module,
    *,
    sampling: Sampling | None = None,
    loss_fn: Mapping[str, Any] | None = None,
    augment_pipe: Mapping[str, Any] | None = None,
    dataset_kwargs: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Writes `net` as the `ema` of an EDM pickle, or as safetensors if `path` ends in .safetensors. Atomic.

    net: of one of this project's classes; it is not changed, and is stored as float32 on the CPU, in eval mode.
    loss_fn, augment_pipe, dataset_kwargs: settings as plain dicts. extra: further entries of the file, by name; a
    loaded file's `extra` may be given as it is.
    half: store the parameters (not the buffers) in float16; raises ValueError if they don't fit.
    Raises TypeError for anything that is not plain data, OSError if the disk won't have it.
    """
    if not persistence.is_persistent(net):
        raise TypeError(f"{type(net).__name__} is no network of this project and cannot be stored")
    entries = _entries(sampling, loss_fn, augment_pipe, dataset_kwargs, extra)
    with atomic_write(path) as file:
        _write(file, os.fspath(path), net, entries, half)


def _entries(
    sampling: Sampling | None,
    loss_fn: Mapping[str, Any] | None,
    augment_pipe: Mapping[str, Any] | None,
    dataset_kwargs: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
) -> State:
    """What a file holds besides the network, as plain data, in the order in which it is stored."""
    given = {
        "loss_fn": loss_fn,
        "augment_pipe": augment_pipe,
        "dataset_kwargs": dataset_kwargs,
        "sampling": None if sampling is None else sampling.to_dict(),
    }
    entries: State = dict.fromkeys(given)
    entries |= plain(extra or {})
    entries |= {name: plain(value) for name, value in given.items() if value is not None}
    if "ema" in entries:
        raise ValueError("an entry named 'ema' is the network itself")
    return entries


def _write(file: IO[bytes], name: str, net: nn.Module, entries: State, half: bool) -> None:
    if name.endswith(".safetensors"):
        _write_safetensors(file, net, entries, half)
    else:
        NetworkPickler(file, half).dump({"ema": net, **entries})


def convert_network(file: NetworkFile, path: str | os.PathLike[str], *, half: bool | None = None) -> None:
    """Writes a loaded network in the format that `path` ends in: .pt (the bare state_dict), or as `save_network`.

    half: store the parameters in float16; None: as in the file that `file` came from.
    What was written is read again before it takes its name, and must hold the same values (with `half`, those values
    in float16). Raises UserError for a network that the format can't hold.
    """
    target = os.fspath(path)
    try:
        with atomic_write(target) as stream:
            _write_checked(file, stream, target, file.half if half is None else half)
    except (TypeError, ValueError) as exc:
        raise UserError(f"{file.source}: can't become {target}: {exc}") from exc


def with_weights(like: NetworkFile, source: str) -> NetworkFile:
    """`like` with the weights of a bare state dict, by torch.save or in a safetensors file. Raises UserError."""
    from safetensors.torch import load

    with forgotten_if_bad(source), open_url(source) as file:
        try:
            is_safetensors = file.read(9)[8:] == b"{"
            file.seek(0)
            tensors = load(file.read()) if is_safetensors else load_tensors(file)
        except OSError:
            raise
        except Exception as exc:  # torch.load has a different one for every way in which a file can be wrong
            raise UserError(f"{source}: is no state dict that torch.save wrote ({type(exc).__name__})") from exc
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{source}: is no bare state dict (name -> tensor), as --like needs it")
    net = copy.deepcopy(like.net)
    parameters = {name for name, _ in net.named_parameters()}
    half = all(tensor.dtype == torch.float16 for name, tensor in tensors.items() if name in parameters)
    try:
        _fill(net, {str(name): list(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)
    except ForeignError as exc:
        raise UserError(f"{source}: {exc} ({like.source})") from exc
    return replace(like, net=net.eval().requires_grad_(False), source=public_url(source), half=half)


def _write_checked(file: NetworkFile, stream: IO[bytes], target: str, half: bool) -> None:
    names = {name for name, _ in file.net.named_parameters()}
    if target.endswith(".pt"):
        tensors = {n: stored_tensor(t, half and n in names, n) for n, t in file.net.state_dict().items()}
        save_tensors(tensors, stream)
    else:
        extra = {**file.extra, **({VARIANTS: list(file.variants)} if file.variants else {})}
        _write(stream, target, file.net, _entries(file.sampling, None, None, file.dataset_kwargs, extra), half)
    stream.seek(0)
    _check_copy(file, stream, target, half)
    stream.seek(0, os.SEEK_END)


def check_storable(file: NetworkFile) -> None:
    """Raises whatever storing the network in a pickle raises, and reading it again. Nothing is written."""
    if not persistence.is_persistent(file.net):
        raise TypeError("its class is not in the file, whose copies could not carry it")
    _write_checked(file, io.BytesIO(), "network.pkl", False)


def _check_copy(file: NetworkFile, stream: IO[bytes], target: str, half: bool) -> None:
    """Raises RuntimeError where a new file doesn't hold what `file` does: a fault of this program."""
    if target.endswith(".pt"):
        tensors = load_tensors(stream)
    elif not persistence.is_own(file.net):  # its code ran when it was loaded
        tensors = _run_pickle(stream.read(), target, announce=False).net.state_dict()
    else:
        again = _understand(stream.read(), target, False, warn=False)
        tensors = again.net.state_dict()
        # By their text: NaN is not equal to itself.
        if repr((again.sampling, again.dataset_kwargs, again.extra)) != repr(
            (file.sampling, file.dataset_kwargs, file.extra)
        ):
            raise RuntimeError("the copy's other entries differ from the original's")
    parameters = {name for name, _ in file.net.named_parameters()}
    for name, tensor in file.net.state_dict().items():
        expected = stored_tensor(tensor, half and name in parameters, name).to(tensors[name].dtype)
        if not torch.allclose(tensors[name], expected, rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(f"the copy's {name} differs from the original's")


# ----------------------------------------------------------------------------------------------------------------------
# Running a file's code, when the user has asked for it


OPTIONAL: dict[str, Any] = {  # what networks of foreign code may lack, and then is
    "label_dim": 0,
    "sigma_min": 0.0,
    "sigma_max": math.inf,
    "round_sigma": networks.Precond.round_sigma,
    "compute_dtype": None,
    "transient": networks.Precond.transient,
}


def _run_pickle(data: bytes, source: str, announce: bool = True) -> _Content:
    """Loads a pickle as Python and EDM would, with the code that it carries. Raises UserError if that fails."""
    try:
        content = _CodeUnpickler(io.BytesIO(data), announce).load()
    except (Exception, SystemExit) as exc:  # foreign code can raise anything
        reason = " ".join(str(exc).split())[:300]
        raise UserError(f"{source}: running its code failed: {type(exc).__name__[:100]}: {reason}") from exc
    net = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(net, nn.Module):
        raise UserError(f"{source}: has no network under 'ema', where EDM's network files have theirs")
    for name, value in OPTIONAL.items():
        if persistence.is_persistent(net) and not hasattr(net, name):
            setattr(type(net), name, value)  # of the class: a copy's file is to hold what the original's does
    for name in ("img_resolution", "img_channels", "label_dim"):
        if not isinstance(getattr(net, name, None), int | np.integer):
            kind = printable(type(net).__name__, 100)
            raise UserError(f"{source}: its network of class {kind} has no {name} that is a number; nothing can use it")
    return _Content(net.cpu().float(), *_other_entries(content), "pickle, its own code run")


class _CodeUnpickler(pickle.Unpickler):
    """Python's unpickler; source text of persistent objects is run as a module, once for each text. Whatever is to run
    is named before it does."""

    def __init__(self, file: IO[bytes], announce: bool) -> None:
        super().__init__(file)
        self.announce = announce

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch_utils.persistence", "_reconstruct_persistent_obj"):
            return _run_and_reconstruct
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage  # torch's own would unpickle whatever the bytes hold
        if module.startswith(_CARRIED):
            raise UserError(f"{name} is defined in a text that a file brings, and is no persistent class")
        if (module, name) not in GLOBALS and self.announce:
            _warn(f"--trust-network-code: the file uses {printable(f'{module}.{name}', 400)} of this machine's Python")
        return super().find_class(module, name)


def _load_storage(data: bytes) -> Any:
    return load_tensors(io.BytesIO(data))


def _warn(text: str) -> None:
    """For people, beside the results: on standard error, by rank 0."""
    dist.print0(printable(text), file=sys.stderr)


_CARRIED = "_network_code_"  # how the modules begin that are made of texts


def _run_and_reconstruct(meta: State) -> Any:
    text = meta["module_src"]
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    name = f"{_CARRIED}{digest[:16]}"
    if name not in sys.modules:
        class_name = printable(meta["class_name"], 100)
        _warn(
            f"--trust-network-code: running the source text that the file brings for its {class_name} and others, as "
            f"module {name}: {len(text.encode('utf-8'))} bytes, SHA-256 {digest}"
        )
        module = ModuleType(name)
        module.__dict__["__source__"] = text  # by this `persistence` knows its classes
        sys.modules[name] = module
        try:
            exec(compile(text, f"<{name}>", "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return persistence._reconstruct_persistent_obj(meta)
