"""Reads EDM's network pickles as data: a small pickle machine over a byte buffer that never calls what a file names.

A pickle is a program for a stack machine. Python's own machine imports any name the program mentions and calls it. This
one knows the few dozen instructions that picklers write for plain data (protocols 2 to 5), and a fixed list of names,
`GLOBALS`, each of which stands for a function *of this module* that makes an inert value of its arguments:

    torch_utils.persistence._reconstruct_persistent_obj  -> StoredObject: class name, attributes, source text
    torch.nn.modules.container.ModuleDict                -> StoredObject
    torch._utils._rebuild_tensor_v2, _rebuild_parameter  -> StoredTensor: a window on the buffer
    torch.storage._load_from_bytes                       -> StoredStorage
    numpy scalars                                        -> Python numbers
    OrderedDict, EasyDict, set                           -> dict, dict, set

`read_torch_archive` and `read_arrays` do the same with what torch.save writes, and with numpy arrays.

Any other name or instruction ends the reading with a ContentError. Lengths are checked before anything is taken from
the buffer, tensors stay windows on it, every byte is copied once at most, and the number of instructions is limited,
each of which makes one small object at most: reading takes the file's size and some 100 MB, whatever the file says.
Imports no torch.
"""

from __future__ import annotations

import functools
import io
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dnnlib.errors import printable

MAX_INSTRUCTIONS = 500_000  # the largest published networks take 90 thousand; one can cost 230 bytes (an empty set)
FREE_COPIES = 1 << 18  # bytes that even a small file may have copied
ITEM_SIZE = 100  # bytes of a dict or a set for each of its items
MAX_AXES = 16  # of a tensor
MAX_PREAMBLE = 1000  # bytes; torch writes 131
MAX_VALUES = 200_000  # of a plain entry, keys too, as often as they are referred to; 64 characters are one more
MAX_DEPTH = 32  # of lists in lists, modules in modules

NUMPY_SCALARS = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
STORAGES = {  # torch's storage classes: element type, as torch names it, and its size in bytes
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
STORAGE_MAGIC = 0x1950A86A20F9469CFC6C  # first value of torch's legacy format,
STORAGE_VERSION = 1001  # and the second


class ContentError(ValueError):
    """A file is damaged, or holds something other than a network's data. The text follows the file's name."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text, 800))  # it may quote the file


class ForeignError(ContentError):
    """The file is sound but foreign: only code that it brings along could make a network of it."""


class UnknownNameError(ForeignError):
    """The file refers to a class or function that is not on the list.

    classes: of the network and its parts that were being read then, the outermost first.
    """

    def __init__(self, name: str, classes: tuple[str, ...] = ()) -> None:
        super().__init__(f"refers to '{name[:200]}', which has no place in such a file")
        self.name, self.classes = name[:200], classes


@dataclass
class StoredObject:
    """An object of the class with this bare name, and its attributes. persistent: of EDM's kind, with the text of the
    module that defines the class in `source`."""

    class_name: str
    state: dict[Any, Any] = field(default_factory=dict)
    persistent: bool = True
    source: str = field(default="", repr=False)


@dataclass(frozen=True)
class StoredStorage:
    """Consecutive little-endian elements: `data` is a window on the file, `dtype` a name in torch."""

    dtype: str
    itemsize: int
    data: memoryview

    @property
    def count(self) -> int:
        """Number of elements."""
        return len(self.data) // self.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage, counted in elements. It lies within the storage and has no more elements than it."""

    storage: StoredStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class StoredArray:
    """A numpy array of numbers, a window on the file; None before its attributes are read."""

    value: np.ndarray | None = None


def read_pickle(data: bytes | bytearray | memoryview) -> Any:
    """The value that `data` holds: plain Python values (byte strings as memoryviews) and the Stored… classes.

    Raises ContentError for anything else, UnknownNameError for a name that is not on the list.
    """
    view = memoryview(data).cast("B")
    return _Machine(view, GLOBALS, _Limits(MAX_INSTRUCTIONS, FREE_COPIES + len(view))).run()


def read_torch_archive(data: bytes) -> Any:
    """The value in a file of torch.save, a zip archive: plain values, and `StoredTensor`s as windows on `data`.

    Raises ContentError for anything else. No part may be compressed, so none is larger than the file.
    """
    view = memoryview(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    except Exception as exc:  # a damaged directory shows in many ways: BadZipFile, struct.error, ValueError
        raise ContentError("is not a whole archive as torch.save writes it") from exc

    @functools.cache
    def part(name: str) -> memoryview:
        info = members.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise ContentError(f"has no uncompressed part {name}")
        lengths = view[info.header_offset + 26 : info.header_offset + 30]  # of the name and the extra field
        start = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        window = view[start : start + info.file_size]
        if len(window) != info.file_size or zlib.crc32(window) != info.CRC:
            raise ContentError(f"is damaged: {name} is not what its checksum says")
        return window

    def storage(value: Any) -> StoredStorage:
        match value:
            case ("storage", _Name(module="torch", name=name), str(key), str(), count) if _is_count(count):
                kept = StoredStorage(*STORAGES[name], part(f"data/{key}"))
                if len(kept.data) == count * kept.itemsize:
                    return kept
        raise ContentError("is damaged: a tensor's data is described in an unknown way")

    limits = _Limits(MAX_INSTRUCTIONS, FREE_COPIES + len(view))
    return _Machine(part("data.pkl"), _ARCHIVE_NAMES, limits, storage).run()


def read_arrays(data: bytes) -> Any:
    """The value that `data` holds: plain Python values and `StoredArray`s. Raises ContentError for anything else."""
    return _Machine(memoryview(data), _ARRAY_NAMES, _Limits(MAX_INSTRUCTIONS, FREE_COPIES + len(data))).run()


@dataclass
class Budget:
    """How many values may still be made."""

    values: int = MAX_VALUES


def plain(value: Any, budget: Budget | None = None) -> Any:
    """`value` as dicts with text keys, lists, strings and Python's own numbers. Raises TypeError if it is more.

    budget: what it may use up, and has used up afterwards, in whichever way it ends.
    """
    budget = Budget() if budget is None else budget

    def convert(value: Any, depth: int) -> Any:
        budget.values -= 1 + (len(value) // 64 if isinstance(value, str) else 0)
        if budget.values < 0 or depth > MAX_DEPTH:
            raise TypeError("too large or too deeply nested")
        if value is None or type(value) in (bool, int, float, str):
            return sys.intern(value) if isinstance(value, str) else value
        if isinstance(value, np.generic) and isinstance(value.item(), (bool, int, float, str)):
            return value.item()
        if isinstance(value, (list, tuple)):
            return [convert(item, depth + 1) for item in value]
        if isinstance(value, Mapping):
            return {convert_key(key, depth): convert(item, depth + 1) for key, item in value.items()}
        raise TypeError(f"{type(value).__name__} is not plain data")

    def convert_key(key: Any, depth: int) -> Any:
        if not isinstance(key, str):
            raise TypeError(f"a dict with a {type(key).__name__} for a key is not plain data")
        return convert(str(key), depth)

    return convert(value, 0)


# ----------------------------------------------------------------------------------------------------------------------
# The machine


class _Name(NamedTuple):
    """A global that the file refers to; it is on the list."""

    module: str
    name: str


class _Mark:
    """Where a group of values begins on the stack."""


@dataclass
class _Limits:
    """What the pickles of one file may use up together."""

    instructions: int
    copies: int  # bytes that may be copied, or read again: about as many as the file has, so that none is often
    preamble: bytes | None = None  # how the last tensor's data began: three pickles that need not be read again

    def spend_copies(self, count: int) -> None:
        self.copies -= count
        if self.copies < 0:
            raise ContentError("asks for more memory than its own size")


_MARK = _Mark()
_Instruction = Callable[["_Machine"], None]
_Builder = Callable[["_Machine", tuple[Any, ...]], Any]


class _Machine:
    """Runs pickles of a buffer, one after the other. `names`: the globals they may mention, and what calls build."""

    def __init__(
        self,
        data: memoryview,
        names: Mapping[tuple[str, str], _Builder],
        limits: _Limits,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.data = data
        self.end = len(data)
        self.names = names
        self.limits = limits
        self.persistent = persistent
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the pickle that begins at the current position."""
        self.stack, self.memo = [], {}
        if self.byte() != 0x80 or not 2 <= self.byte() <= 5:
            raise ContentError("is not a pickle of protocol 2 to 5")
        stack, memo, data, end, limits = self.stack, self.memo, self.data, self.end, self.limits
        while limits.instructions > 0:
            limits.instructions -= 1
            position = self.position
            if position >= end:
                self.need(1)
            opcode = data[position]
            self.position = position + 1
            if opcode == 0x94 and stack and stack[-1] is not _MARK:  # MEMOIZE, every second one of a modern pickle
                memo[len(memo)] = stack[-1]
                continue
            if opcode == 0x68 and position + 1 < end and data[position + 1] in memo:  # BINGET, the most frequent of all
                stack.append(memo[data[position + 1]])
                self.position = position + 2
                continue
            if opcode == 0x2E:  # STOP
                value = self.pop()
                if stack:
                    raise ContentError("is damaged: values are left over at its end")
                return value
            instruction = _INSTRUCTIONS.get(opcode)
            if instruction is None:
                raise ContentError(f"holds pickle instruction 0x{opcode:02x}, which has no place in such a file")
            instruction(self)
        raise ContentError(f"takes more than {MAX_INSTRUCTIONS} pickle instructions")

    # --- taking bytes

    def byte(self) -> int:
        """The next byte: most of a pickle is read in such, so this is kept quick."""
        position = self.position
        if position >= self.end:
            self.need(1)
        self.position = position + 1
        return self.data[position]

    def take(self, count: int) -> memoryview:
        start = self.position
        if start + count > self.end:
            self.need(count)
        self.position = start + count
        return self.data[start : start + count]

    def need(self, count: int) -> None:
        """Raises ContentError unless so many bytes are left."""
        missing = self.position + count - self.end
        if missing > 0:
            raise ContentError(f"is cut off: at byte {self.position} of {self.end}, {missing} more are announced")

    def number(self, size: int) -> int:
        """An unsigned little-endian number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        """A signed one."""
        return int.from_bytes(self.take(size), "little", signed=True)

    def text(self, size: int) -> str:
        """UTF-8 text of `size` bytes."""
        data = self.take(size)
        if self.persistent is not None:  # a storage's small texts; the same storage can be read any number of times
            self.limits.spend_copies(size)
        elif size > 16 and np.frombuffer(data, np.uint8).max() > 0xC3:  # beyond Latin-1: up to four bytes a character
            self.limits.spend_copies(3 * size)
        try:
            return str(data, "utf-8", "surrogatepass")
        except UnicodeDecodeError as exc:
            raise ContentError("is damaged: a text is not UTF-8") from exc

    def line(self) -> str:
        """Text up to a line feed; only names are stored so."""
        length = bytes(self.data[self.position : self.position + 500]).find(b"\n")
        if length < 0:
            raise ContentError("is damaged: a name does not end")
        text = self.text(length)
        self.position += 1
        return text

    # --- stack and memo

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ContentError("is damaged: a value is missing")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def pop_group(self) -> list[Any]:
        """Everything above the last mark."""
        group: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return group[::-1]
            group.append(value)
        raise ContentError("is damaged: the begin of a group is missing")

    def container(self, kind: type) -> Any:
        """The container on top, to add something to."""
        if type(self.top()) is not kind:
            raise ContentError(f"is damaged: a {kind.__name__} is missing")
        return self.stack[-1]

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ContentError("is damaged: it refers to a value that it does not hold")
        self.push(self.memo[index])

    # --- building values

    def set_items(self, items: list[Any]) -> None:
        target = self.container(dict)
        if len(items) % 2:
            raise ContentError("is damaged: a key has no value")
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def refer(self, module: Any, name: Any) -> None:
        """A global: nothing is imported, it only must be on the list."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ContentError("is damaged: a name is not text")
        if (module, name) not in self.names:
            raise UnknownNameError(f"{module[:200]}.{name[:200]}", self.classes_in_progress())
        self.push(_Name(module, name))

    def classes_in_progress(self) -> tuple[str, ...]:
        """Class names of the network under 'ema' whose values are on the stack, its parts' behind it."""
        above = self.stack[self.stack.index("ema") + 1 :] if "ema" in self.stack else []
        if above and isinstance(above[0], StoredObject):
            return (above[0].class_name,)
        return tuple(name for key, name in pairwise(above) if key == "class_name" and isinstance(name, str))

    def call(self) -> None:
        """A call of a global: this module's stand-in for it builds an inert value."""
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ContentError("is damaged: it calls something that cannot be called")
        try:
            self.push(self.names[name](self, arguments))
        except _UnexpectedArguments as exc:
            raise ContentError(f"is damaged: {name.module}.{name.name} is called with unexpected arguments") from exc

    def build(self) -> None:
        """Attributes for the object on the stack."""
        state, obj = self.pop(), self.top()
        if isinstance(obj, StoredObject) and not obj.persistent and isinstance(state, dict):
            obj.state = state
        elif isinstance(obj, StoredArray):
            obj.value = _array_content(state)
        elif (
            isinstance(obj, _Dtype) and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|", "=", ">")
        ):
            obj.order = state[1]
        elif not (isinstance(obj, dict) and isinstance(state, dict)):  # those of a dict have no use and are dropped
            raise ContentError("is damaged: attributes for something that has none")

    def refer_outside(self) -> None:
        if self.persistent is None:
            raise ContentError("refers to data outside itself; a network file holds all its data")
        self.push(self.persistent(self.pop()))


def _key(value: Any) -> Any:
    """Keys of dicts and members of sets are texts or small whole numbers (chosen large ones could all collide)."""
    if type(value) is not str and not (type(value) is int and abs(value) < 1 << 31):
        raise ContentError(f"is damaged: a {type(value).__name__} cannot be a key")
    return value


def _pushing(value: Callable[[_Machine], Any]) -> _Instruction:
    return lambda m: m.push(value(m))


def _tuple_of(size: int) -> _Instruction:
    return lambda m: m.push(tuple([m.pop() for _ in range(size)][::-1]))


def _global(m: _Machine) -> None:
    module = m.line()
    m.refer(module, m.line())


def _stack_global(m: _Machine) -> None:
    name = m.pop()
    m.refer(m.pop(), name)


def _append(m: _Machine) -> None:
    value = m.pop()
    m.container(list).append(value)


def _appends(m: _Machine) -> None:
    values = m.pop_group()
    m.container(list).extend(values)


def _add_items(m: _Machine) -> None:
    values = m.pop_group()
    m.container(set).update(map(_key, values))


def _set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items([key, value])


_INSTRUCTIONS: dict[int, _Instruction] = {
    0x95: lambda m: m.need(m.number(8)),  # FRAME
    ord("("): lambda m: m.push(_MARK),
    # plain values
    ord("N"): _pushing(lambda m: None),
    0x88: _pushing(lambda m: True),
    0x89: _pushing(lambda m: False),
    ord("K"): _pushing(lambda m: m.byte()),  # BININT1
    ord("M"): _pushing(lambda m: m.number(2)),  # BININT2
    ord("J"): _pushing(lambda m: m.signed(4)),  # BININT
    0x8A: _pushing(lambda m: m.signed(m.byte())),  # LONG1
    ord("G"): _pushing(lambda m: struct.unpack(">d", m.take(8))[0]),  # BINFLOAT
    0x8C: _pushing(lambda m: m.text(m.byte())),  # SHORT_BINUNICODE
    ord("X"): _pushing(lambda m: m.text(m.number(4))),  # BINUNICODE
    0x8D: _pushing(lambda m: m.text(m.number(8))),  # BINUNICODE8
    ord("C"): _pushing(lambda m: m.take(m.byte())),  # SHORT_BINBYTES
    ord("B"): _pushing(lambda m: m.take(m.number(4))),  # BINBYTES
    0x8E: _pushing(lambda m: m.take(m.number(8))),  # BINBYTES8
    0x96: _pushing(lambda m: m.take(m.number(8))),  # BYTEARRAY8
    ord("U"): _pushing(lambda m: str(m.take(m.byte()), "latin-1")),  # SHORT_BINSTRING, Python 2's names
    ord("T"): _pushing(lambda m: m.take(m.number(4))),  # BINSTRING, its byte strings
    # containers
    ord(")"): _pushing(lambda m: ()),
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("t"): _pushing(lambda m: tuple(m.pop_group())),
    ord("]"): _pushing(lambda m: []),
    ord("a"): _append,
    ord("e"): _appends,
    ord("}"): _pushing(lambda m: {}),
    ord("s"): _set_item,
    ord("u"): lambda m: m.set_items(m.pop_group()),
    0x8F: _pushing(lambda m: set()),
    0x90: _add_items,
    # memo
    ord("q"): lambda m: m.remember(m.byte()),  # BINPUT
    ord("r"): lambda m: m.remember(m.number(4)),  # LONG_BINPUT
    0x94: lambda m: m.remember(len(m.memo)),  # MEMOIZE
    ord("h"): lambda m: m.recall(m.byte()),  # BINGET
    ord("j"): lambda m: m.recall(m.number(4)),  # LONG_BINGET
    # objects
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): lambda m: m.call(),  # REDUCE
    0x81: lambda m: m.call(),  # NEWOBJ
    ord("b"): lambda m: m.build(),
    ord("Q"): lambda m: m.refer_outside(),  # BINPERSID
}


# ----------------------------------------------------------------------------------------------------------------------
# What stands for the names a network file may mention


class _UnexpectedArguments(Exception):
    """A call that no pickler writes."""


@dataclass
class _Dtype:
    """A numpy element type such as 'f8', and its byte order."""

    code: str
    order: str = "<"


def _persistent_object(m: _Machine, arguments: tuple[Any, ...]) -> StoredObject:
    match arguments:
        case ({"type": kind, "version": version, "class_name": str(name), "state": dict(state), **others},):
            if kind != "class":
                raise _UnexpectedArguments
            if version != 6:
                shown = version if isinstance(version, int) else type(version).__name__  # its text may be endless
                raise ContentError(f"holds a persistent object of format version {shown}; only version 6 is known")
            source = others.get("module_src")
            return StoredObject(name, state, source=source if isinstance(source, str) else "")
    raise _UnexpectedArguments


def _module_dict(m: _Machine, arguments: tuple[Any, ...]) -> StoredObject:
    if arguments:
        raise _UnexpectedArguments
    return StoredObject("ModuleDict", persistent=False)


def _dict(m: _Machine, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    match arguments:
        case ():
            return {}
        case (list() as pairs,) if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            m.limits.spend_copies(ITEM_SIZE * len(pairs))
            return {_key(key): value for key, value in pairs}
    raise _UnexpectedArguments


def _set(m: _Machine, arguments: tuple[Any, ...]) -> set[Any]:
    match arguments:
        case ():
            return set()
        case (list() as values,):
            m.limits.spend_copies(ITEM_SIZE * len(values))
            return set(map(_key, values))
    raise _UnexpectedArguments


def _bytes(m: _Machine, arguments: tuple[Any, ...]) -> memoryview:
    """How protocol 2 stores byte strings: an empty call, or a text of as many characters below 256."""
    match arguments:
        case ():
            return memoryview(b"")
        case (str(text), "latin1" | "latin-1"):
            m.limits.spend_copies(len(text))
            try:
                return memoryview(text.encode("latin-1"))
            except UnicodeEncodeError as exc:
                raise _UnexpectedArguments from exc
    raise _UnexpectedArguments


def _dtype(m: _Machine, arguments: tuple[Any, ...]) -> _Dtype:
    match arguments:
        case (str(code), *_) if code in NUMPY_SCALARS:
            return _Dtype(code)
    raise _UnexpectedArguments


def _scalar(m: _Machine, arguments: tuple[Any, ...]) -> int | float | bool:
    match arguments:
        case (_Dtype(code=code, order=order), memoryview() as raw) if len(raw) == int(code[1:]):
            number: int | float | bool = np.frombuffer(raw, dtype=order + code)[0].item()
            return number
    raise _UnexpectedArguments


def _array(m: _Machine, arguments: tuple[Any, ...]) -> StoredArray:
    return StoredArray()


def _from_buffer(m: _Machine, arguments: tuple[Any, ...]) -> StoredArray:
    """How protocol 5 stores arrays: bytes, element type, shape, 'C' or 'F'."""
    raw, dtype, shape, order, *_ = (*arguments, None, None, None, None)
    return StoredArray(_array_content((1, shape, dtype, order == "F", raw)))


def _array_content(state: Any) -> np.ndarray:
    match state:
        case (int(), tuple(shape), _Dtype(code=code, order=order), bool(by_column), memoryview() as raw) if (
            len(shape) <= MAX_AXES and all(_is_count(n) for n in shape) and math.prod(shape) * int(code[1:]) == len(raw)
        ):
            return np.frombuffer(raw, dtype=order + code).reshape(shape, order="F" if by_column else "C")
    raise ContentError("is damaged: an array contradicts itself")


def _parameter(m: _Machine, arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (StoredTensor() as tensor, bool(), dict()):
            return tensor
    raise _UnexpectedArguments


def _tensor(m: _Machine, arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (StoredStorage() as storage, offset, tuple(shape), tuple(stride), bool(), dict(), *_) if len(shape) == len(
            stride
        ) <= MAX_AXES and all(_is_count(n) for n in (offset, *shape, *stride)):
            last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            if 0 not in shape and (last >= storage.count or math.prod(shape) > storage.count):
                raise ContentError(
                    f"is damaged: a tensor of shape {list(shape)} in a storage of {storage.count} elements"
                )
            return StoredTensor(storage, offset, shape, stride)
    raise _UnexpectedArguments


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _storage(m: _Machine, arguments: tuple[Any, ...]) -> StoredStorage:
    """torch's legacy format: five pickles (magic, version, system, storage, list of keys), a count and the elements."""
    match arguments:
        case (memoryview() as data,):
            pass
        case _:
            raise _UnexpectedArguments
    inner = _Machine(data, _STORAGE_NAMES, m.limits, _storage_id)
    preamble = m.limits.preamble  # the same bytes in all tensors of a file, as a rule
    if preamble is not None and data[: len(preamble)] == preamble:
        inner.position = len(preamble)
    else:
        if inner.run() != STORAGE_MAGIC or inner.run() != STORAGE_VERSION:
            raise ContentError("is damaged: a tensor's data is not in torch's legacy format")
        match inner.run():
            case {"little_endian": True}:
                m.limits.preamble = bytes(data[: inner.position]) if inner.position <= MAX_PREAMBLE else None
            case _:
                raise ContentError("was written on a big-endian machine, which is not supported")
    head, keys = inner.run(), inner.run()
    if not isinstance(head, _StorageHead) or keys != [head.key] or inner.number(8) != head.size:
        raise ContentError("is damaged: a tensor's data contradicts itself")
    elements = inner.take(head.size * head.itemsize)
    if inner.position != len(data):
        raise ContentError("is damaged: a tensor has more data than it announces")
    return StoredStorage(head.dtype, head.itemsize, elements)


class _StorageHead(NamedTuple):
    dtype: str
    itemsize: int
    key: str
    size: int


def _storage_id(value: Any) -> _StorageHead:
    match value:
        case ("storage", _Name(name=name), str(key), str(), count, None) if _is_count(count):
            return _StorageHead(*STORAGES[name], key, count)
    raise ContentError("is damaged: a tensor's data is described in an unknown way")


def _not_called(m: _Machine, arguments: tuple[Any, ...]) -> Any:
    raise _UnexpectedArguments


_STORAGE_NAMES: dict[tuple[str, str], _Builder] = {("torch", name): _not_called for name in STORAGES}

GLOBALS: dict[tuple[str, str], _Builder] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("torch.nn.modules.container", "ModuleDict"): _module_dict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): _dict,
    ("dnnlib.util", "EasyDict"): _dict,
    ("dnnlib", "EasyDict"): _dict,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("builtins", "bytes"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}
"""Every name that a network file may mention: nothing else is accepted, and none of them is imported or called."""

_ARCHIVE_NAMES: dict[tuple[str, str], _Builder] = {
    **_STORAGE_NAMES,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): _dict,
}
_ARRAY_NAMES: dict[tuple[str, str], _Builder] = {
    ("numpy", "ndarray"): _not_called,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _bytes,
}
