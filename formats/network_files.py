"""Reading and writing networks: EDM's pickles and safetensors.

Reading runs nothing that a file brings along: what is stored becomes data (`pickle_reader`), and data one of this
project's own networks (`building`). `trust_network_code=True` is the one way to run a file's code (`network_code`).

A pickle written here opens in EDM's own code: `ema` is a persistent object with its source text, everything else plain
dicts, lists, strings and numbers. The same network gives the same bytes. A .safetensors file holds the weights under
their state-dict names, and in its metadata a JSON text (docs/formats.md).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dnnlib.atomic import atomic_write
from dnnlib.errors import UserError, printable, public_url
from dnnlib.util import count, forget, forgotten_if_bad, open_url
from torch_utils import persistence
from torch_utils.misc import load_tensors, save_tensors
from training import networks
from training.grids import Sampling, network_grid

from . import known_code
from .building import CLASS, MAX_PARTS, State, fill, make, scalars
from .network_code import run_pickle, warn
from .pickle_reader import MAX_VALUES, Budget, ContentError, ForeignError, StoredObject, plain, read_pickle
from .pickle_writer import NetworkPickler, stored_tensor

KNOWN_CLASSES = known_code.CLASSES | {"ModuleDict"}
STORED = ("loss_fn", "augment_pipe", "dataset_kwargs", "sampling")  # entries of every file, besides the network
VARIANTS = "unknown_variants"  # entry of a file that was converted from one with an unknown version of these classes
METADATA = "edm_network"  # key of the JSON text in a safetensors file, and what there is in that
META = {"class_name": str, "init_args": list, "init_kwargs": dict, "attributes": dict, "entries": dict}
MAX_MEMBERS = 100_000  # tensors, attributes and modules together; the largest published networks have 20 thousand
MAX_NAME = 200  # characters of a tensor's full name
MAX_TEXTS = 8  # source texts of a network's classes; EDM's have one
MAX_HEADER = 1 << 22  # bytes before the tensors of a safetensors file
MAX_IGNORED = 100  # names of entries that are left aside


@dataclass(frozen=True)
class NetworkFile:
    """A network and what its file holds besides.

    net             eval mode, requires_grad off, on the CPU, float32
    sampling        noise grid and solver of a distilled network, else None
    sha256          of the file, in hexadecimal
    source          path, or URL without user name, password and query
    dataset_kwargs  options of the data set it was trained on, if the file has them
    extra           the file's other entries (loss_fn, augment_pipe, ...), as far as they are plain data
    format          what kind of file it was found to be
    ignored         names of entries that are not plain data (a teacher, an optimiser, ...) and were not kept
    half            whether its parameters were stored in float16
    """

    net: Any
    sampling: Sampling | None
    sha256: str
    source: str
    dataset_kwargs: dict[str, Any] | None
    extra: dict[str, Any]
    format: str = "EDM pickle"
    ignored: tuple[str, ...] = ()
    half: bool = False

    @property
    def has_label_vectors(self) -> bool:
        """Whether its file records that it was trained with label vectors: one-hot labels mean nothing to it."""
        return bool(self.net.label_dim) and (self.dataset_kwargs or {}).get("label_kind") == "vectors"

    @property
    def foreign_code(self) -> bool:
        """Whether the network is of foreign code that the file brought along."""
        return not persistence.is_own(self.net)

    @property
    def variants(self) -> tuple[str, ...]:
        """Classes (and what they use) of which the file's text, or that of the file it was converted from, has a
        version unknown here; this project's own stand in for them."""
        names = self.extra.get(VARIANTS)
        return tuple(str(name)[:100] for name in names[: known_code.MAX_NAMES]) if isinstance(names, list) else ()

    def describe(self) -> str:
        """One line for people: kind of file, kind of network, its size, its grid if it is a student's."""
        net, labels = self.net, count(self.net.label_dim, "class") if self.net.label_dim else "no classes"
        inner = f" of {type(net.model).__name__[:100]}" if getattr(net, "model", None) is not None else ""
        foreign = [name for name in self.extra if name not in (*STORED, "training_options", VARIANTS)]
        found = [
            f"{self.format}{' in half precision' * self.half}",
            type(net).__name__[:100] + inner,
            f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters",
            f"{net.img_channels}x{net.img_resolution}x{net.img_resolution}",
            f"label vectors of {count(net.label_dim, 'number')}" if self.has_label_vectors else labels,
            f"student of {count(self.sampling.grid.steps, 'step')}" if self.sampling else "undistilled",
        ]
        others = {"also holds": foreign, "left aside:": self.ignored, "an unknown variant of": self.variants}
        found += [f"{words} {', '.join(names)[:200]}" for words, names in others.items() if names]
        return printable(", ".join(found))


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def load_network(path_or_url: str | os.PathLike[str], *, trust_network_code: bool = False) -> NetworkFile:
    """Reads the network (`ema`) of an EDM pickle or a safetensors file; the content decides which.

    Nothing in the file is executed, unless `trust_network_code` is set and the network, or the version of a class that
    it was written with, is unknown here.
    Raises UserError, naming the file, for anything that is no such file or doesn't fit together.
    """
    source = public_url(os.fspath(path_or_url))
    if os.path.isdir(source):
        found = [path for depth in ("", "*/") for path in Path(source).glob(f"{depth}network-snapshot-*.pkl")]
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        advice = f"; the newest network in it is {newest}" if newest else ""
        raise UserError(f"{source}: is a folder, a file is needed{advice}")
    try:
        with open_url(path_or_url, check=_check_start) as file:
            _check_start(file.read(1024))
            file.seek(0)
            network = _understand(file.read(), source, trust_network_code)
    except ContentError as exc:
        if not isinstance(exc, ForeignError):
            forget(os.fspath(path_or_url))  # cut off by a server that gave no length, for example
        raise UserError(f"{source}: {exc}") from exc
    if network.variants:
        names = printable(", ".join(network.variants), 200)
        warn(
            f"Warning: {printable(source, 300)}: its text of {names} is no version known here (a fork's?), or that of "
            "the file that it was converted from. This program's own is used instead, whose numbers may differ; "
            "--trust-network-code runs the code that a file brings"
        )
    return network


NO_NETWORK = (  # how other files begin, as regular expressions, and what is wrong with them
    (rb"\Z", "is empty"),
    (rb"\s*<(!doctype )?html", "is a web page, not a network; check where it was downloaded from"),
    (
        rb"PK\x03\x04",
        "is an archive: a data set, or one as torch.save writes it (a training state, a detector, bare weights); "
        "give a network-snapshot-*.pkl (convert.py --like makes one of bare weights)",
    ),
    (rb"version https://git-lfs", "is a pointer of Git LFS, not the file itself: git lfs pull fetches that"),
    (rb"(?!.{8}\{|\x80([\x02-\x05]|\Z))", "is not a pickle of protocol 2 to 5, nor a safetensors file"),
)


def _check_start(start: bytes) -> None:
    """Refuses what the first bytes show to be no network, before gigabytes of it are read. Raises ContentError."""
    for pattern, text in NO_NETWORK:
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            raise ContentError(text)


def _understand(data: bytes, source: str, trust_network_code: bool) -> NetworkFile:
    """What `data` holds, whose origin is `source`. Raises UserError or ContentError."""
    is_pickle = data[8:9] != b"{"
    kind = "EDM pickle" if is_pickle else "safetensors"
    try:
        net, half, entries, ignored = _read_pickle(data, trust_network_code) if is_pickle else _read_safetensors(data)
    except ForeignError as exc:
        advice = "; only if you trust its author: --trust-network-code runs the code it brings, with all your rights"
        if not is_pickle or not trust_network_code:  # only pickles bring code along
            raise ForeignError(f"{exc}{advice if is_pickle else ''}") from exc
        content = run_pickle(data, source)
        kind, net, half, (entries, ignored) = "pickle, its own code run", content["ema"], False, _other_entries(content)
    try:
        sampling = _sampling(net, entries)
    except ValueError as exc:
        raise ContentError(f"its noise grid can't be used: {exc!s:.300}") from exc
    dataset_kwargs = entries.pop("dataset_kwargs", None)
    if not isinstance(dataset_kwargs, dict | None):
        dataset_kwargs, ignored = None, [*ignored, "dataset_kwargs"]
    entries.pop("sampling", None)
    extra = {name: value for name, value in entries.items() if value is not None or name not in STORED}
    digest, net = hashlib.sha256(data).hexdigest(), net.eval().requires_grad_(False)
    return NetworkFile(net, sampling, digest, source, dataset_kwargs, extra, kind, tuple(ignored), half)


def _sampling(net: Any, entries: State) -> Sampling | None:
    """The grid of a student. Raises ValueError for one that can't be.

    Students of an earlier fork of EDM have it in their loss alone: every `ratio`-th of `num_steps` levels.
    """
    if entries.get("sampling") is not None:
        return Sampling.from_dict(entries["sampling"])
    match entries.get("loss_fn"):
        case {"class_name": "EDMDistillationLoss", "num_steps": int(steps), "ratio": int(ratio)}:
            return Sampling(network_grid(net, steps).every(ratio), "euler", ratio)
        case {"class_name": "EDMDistillationLoss"}:
            raise ValueError("its loss is an EDMDistillationLoss that does not say num_steps and ratio")
    return None


# ----------------------------------------------------------------------------------------------------------------------
# EDM's pickles. The reader of a format returns (network, whether half precision, other entries, names left out)


def _read_pickle(data: bytes, trust_network_code: bool) -> tuple[nn.Module, bool, State, list[str]]:
    content = read_pickle(data)
    root = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(root, StoredObject):
        names = list(content)[:8] if isinstance(content, dict) else ["something else"]
        holds = ", ".join(str(name)[:50] for name in names)[:200]
        raise ContentError(f"has no network under 'ema', where EDM's network files have theirs; it holds {holds}")
    attributes, tensors, texts = _collect(root)
    found = map(known_code.unknown_definitions, texts) if len(texts) <= MAX_TEXTS else [texts.values()]
    unknown = list(dict.fromkeys(name for names in found for name in names))[: known_code.MAX_NAMES]
    if unknown and trust_network_code:
        raise ForeignError(f"holds an unknown version of {', '.join(unknown)}")
    if sum(tensor.nbytes for tensor in tensors.values()) > len(data):
        raise ContentError("is damaged: its tensors are larger than the file")
    try:
        args, kwargs = plain(root.state.get("_init_args", ())), plain(root.state.get("_init_kwargs", {}))
    except TypeError as exc:
        raise ContentError(f"is damaged: among its constructor arguments, {exc}") from exc
    net = make(root.class_name, args, kwargs, attributes, len(attributes))
    half = fill(net, tensors)
    entries, ignored = _other_entries(content)
    return net, half, entries | ({VARIANTS: unknown} if unknown else {}), ignored


def _collect(root: StoredObject) -> tuple[dict[str, State], dict[str, Any], dict[str, str]]:
    """Of every module from `root` down: class and numbers by path, tensors by name, and source texts (of a class).

    Bounded in every respect, since a file may refer to itself, and to one large table or text as often as it likes.
    """
    attributes: dict[str, State] = {}
    tensors: dict[str, Any] = {}
    texts: dict[str, str] = {}
    waiting: list[tuple[str, Any]] = [("", root)]
    members = 0
    while waiting:
        path, part = waiting.pop()
        if not isinstance(part, StoredObject):
            raise ContentError(f"is damaged: part '{path}' is not a module")
        if part.class_name not in KNOWN_CLASSES:
            what = "part" if path else "network"
            raise ForeignError(f"holds a {what} of class '{part.class_name[:100]}', unknown here")
        attributes[path] = {**scalars(part.state), CLASS: part.class_name}
        texts.setdefault(part.source or root.source, part.class_name)
        tables = [part.state.pop(table, {}) for table in ("_parameters", "_buffers", "_modules")]
        if not all(isinstance(table, dict) for table in tables):
            raise ContentError(f"is damaged: tensors or modules of part '{path}' are no dict")
        members += 1 + len(part.state) + sum(map(len, tables))
        if len(attributes) > MAX_PARTS or members > MAX_MEMBERS:
            raise ContentError("is damaged: its network has no end")
        parameters, buffers, modules = (
            {f"{path}.{name}".lstrip(".")[:MAX_NAME]: each for name, each in table.items() if each is not None}
            for table in tables
        )
        tensors |= parameters | buffers
        waiting += modules.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ContentError(f"is damaged: {name} is not a tensor")
    return attributes, tensors, texts


def _other_entries(content: Mapping[Any, Any]) -> tuple[State, list[str]]:
    """Everything but `ema` as far as it is plain, and the names of what is not. EDM's loss and augmentation objects
    become dicts of their plain attributes: an earlier fork's loss has its whole teacher inside."""
    entries: State = {}
    ignored: list[str] = []
    budget = Budget(MAX_VALUES, "holds too much besides its network")

    def keep(where: State, key: Any, value: Any, name: str) -> None:
        try:
            if not isinstance(key, str):
                raise TypeError(f"a key of type {type(key).__name__}")
            where[key] = plain(value, budget)
        except TypeError as exc:  # tensors and the like: no part of a network file, and nobody asks for them
            if name == "sampling":
                raise ContentError(f"its noise grid can't be used: {exc}") from exc
            if len(ignored) < MAX_IGNORED:
                ignored.append(name)

    for key, value in content.items():
        name = str(key)[:50]
        if isinstance(value, StoredObject) and key != "ema":
            entries[name] = {"class_name": value.class_name}
            budget.spend(len(value.state))
            for attribute, each in value.state.items():
                if not str(attribute).startswith("_"):
                    keep(entries[name], attribute, each, f"{name}.{str(attribute)[:50]}")
        elif key != "ema":
            keep(entries, key, value, name)
    return entries, ignored


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors


def _read_safetensors(data: bytes) -> tuple[nn.Module, bool, State, list[str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER:
        raise ContentError(f"is a damaged safetensors file: its header is said to have {size} bytes")
    try:
        header = json.loads(str(data[8 : 8 + size], "utf-8"))  # bytes could be UTF-16 to json
        tensors = load(data)
        meta = plain(json.loads((header.get("__metadata__") or {}).get(METADATA, "null")))
    except (SafetensorError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as exc:
        raise ContentError(f"is a damaged safetensors file: {' '.join(str(exc).split())[:200]}") from exc
    is_ours = isinstance(meta, dict) and all(isinstance(meta.get(name), kind) for name, kind in META.items())
    if not is_ours or not all(isinstance(values, dict) for values in meta["attributes"].values()):
        raise ContentError(
            f"is a safetensors file without '{METADATA}' as this program writes it in its metadata: it does not say "
            "which network it is (convert.py --like does)"
        )
    class_name, args, kwargs, attributes, entries = (meta[name] for name in META)
    attributes = {path: scalars(values) for path, values in attributes.items()}
    net = make(class_name, args, kwargs, attributes, min(len(tensors), MAX_PARTS))
    return net, fill(net, tensors), entries, []


def _safetensors(net: nn.Module, entries: State, half: bool) -> bytes:
    from safetensors.torch import save

    class_name, init_args, init_kwargs = type(net).__name__, plain(net._init_args), plain(net._init_kwargs)
    if type(net) is not getattr(networks, class_name, None):
        raise TypeError(f"{class_name} is of foreign code, which only a .pkl can carry (or bare weights: .pt)")
    fresh = dict(make(class_name, init_args, init_kwargs, {}, MAX_PARTS).named_modules())
    attributes = {}
    for path, module in net.named_modules():
        usual = scalars(vars(fresh[path]))
        changed = {name: value for name, value in scalars(vars(module)).items() if usual.get(name) != value}
        attributes.update({path: plain(changed)} if changed else {})
    meta = dict(zip(META, (class_name, init_args, init_kwargs, attributes, entries), strict=True))
    content: bytes = save(_stored_tensors(net, half), {METADATA: json.dumps(meta)})
    if int.from_bytes(content[:8], "little") > MAX_HEADER:
        raise TypeError("the entries are too large for the header of a safetensors file")
    return content


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
    loss_fn, augment_pipe, dataset_kwargs: settings as plain dicts. extra: further entries, such as a loaded file's.
    half: store the parameters (not the buffers) in float16; raises ValueError if they don't fit.
    Raises TypeError for anything that is not plain data, OSError if the disk won't have it.
    """
    given = {"loss_fn": loss_fn, "augment_pipe": augment_pipe, "dataset_kwargs": dataset_kwargs}
    entries = _entries(sampling, given, extra or {})
    with atomic_write(path) as file:
        _write(file, os.fspath(path), net, entries, half)


def _entries(sampling: Sampling | None, given: Mapping[str, Any], extra: Mapping[str, Any]) -> State:
    """What a file holds besides the network, as plain data, in the order in which it is stored."""
    if "ema" in extra:
        raise ValueError("an entry named 'ema' is the network itself")
    given = {**given, "sampling": sampling and sampling.to_dict()}
    known = {name: plain(value) for name, value in given.items() if value is not None}
    return {**dict.fromkeys(STORED), **plain(extra), **known}


def _write(file: IO[bytes], name: str, net: nn.Module, entries: State, half: bool) -> None:
    if name.endswith(".pt"):
        save_tensors(_stored_tensors(net, half), file)
    elif not persistence.is_persistent(net):
        raise TypeError(f"{type(net).__name__} is no network of this project and cannot be stored")
    elif name.endswith(".safetensors"):
        file.write(_safetensors(net, entries, half))
    else:
        NetworkPickler(file, half).dump({"ema": net, **entries})


def _stored_tensors(net: nn.Module, half: bool) -> dict[str, Tensor]:
    parameters = {name for name, _ in net.named_parameters()}
    return {name: stored_tensor(value, half and name in parameters, name) for name, value in net.state_dict().items()}


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


def check_storable(file: NetworkFile) -> None:
    """Raises whatever storing the network in a pickle raises, and reading it again. Nothing is written."""
    _write_checked(file, io.BytesIO(), "network.pkl", False)


def _write_checked(file: NetworkFile, stream: IO[bytes], target: str, half: bool) -> None:
    """Writes, and raises RuntimeError where the copy doesn't hold what `file` does: a fault of this program."""
    entries = _entries(file.sampling, {"dataset_kwargs": file.dataset_kwargs}, file.extra)
    _write(stream, target, file.net, entries, half)
    stream.seek(0)
    if target.endswith(".pt"):
        tensors = load_tensors(stream)
    else:
        again = _understand(stream.read(), target, file.foreign_code)
        tensors = again.net.state_dict()
        texts = {repr((each.sampling, each.dataset_kwargs, each.extra)) for each in (again, file)}
        if len(texts) > 1:  # compared by their text: NaN is not equal to itself
            raise RuntimeError("the copy's other entries differ from the original's")
    for name, expected in _stored_tensors(file.net, half).items():
        if not torch.allclose(tensors[name], expected.to(tensors[name].dtype), rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(f"the copy's {name} differs from the original's")
    stream.seek(0, os.SEEK_END)


def with_weights(like: NetworkFile, source: str) -> NetworkFile:
    """`like` with the weights of a bare state dict, by torch.save or in a safetensors file. Raises UserError."""
    from safetensors.torch import load

    with forgotten_if_bad(source), open_url(source) as file:
        data = file.read()
        try:
            tensors = load(data) if data[8:9] == b"{" else load_tensors(io.BytesIO(data))
        except Exception as exc:  # torch.load has a different one for every way in which a file can be wrong
            raise UserError(f"{source}: is no state dict that torch.save wrote ({type(exc).__name__})") from exc
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{source}: is no bare state dict (name -> tensor), as --like needs it")
    net = copy.deepcopy(like.net)
    try:
        half = fill(net, {str(name): tensor for name, tensor in tensors.items()})
    except ForeignError as exc:
        raise UserError(f"{source}: {exc} ({like.source})") from exc
    return replace(like, net=net.eval().requires_grad_(False), source=public_url(source), half=half)
