"""Reads EDM's network pickles as data: a small pickle machine that never calls what a file names.

A pickle is a program for a stack machine. Python's own machine imports any name the program mentions and calls it. This
one knows the few dozen instructions that picklers write for plain data (protocols 2 to 5), and a fixed list of names,
`GLOBALS`, each of which stands for a function *of this module* that makes an inert value of its arguments:

    torch_utils.persistence._reconstruct_persistent_obj  -> StoredObject: class name, attributes, source text
    torch.nn.modules.container.ModuleDict                -> StoredObject
    torch._utils._rebuild_tensor_v2, _rebuild_parameter  -> torch's tensor, with memory of its own
    torch.storage._load_from_bytes                       -> StoredStorage
    numpy scalars                                        -> Python numbers
    OrderedDict, EasyDict, set                           -> dict, dict, set

Any other name or instruction ends the reading with a ContentError. What may be copied is limited, and so is the
number of instructions, each of which makes one small object at most: reading takes three times the file's size and some
100 MB, whatever the file says.
"""

from __future__ import annotations

import encodings.raw_unicode_escape  # noqa: F401 (else pickletools does, for an instruction that is then refused)
import io
import math
import pickletools
import sys
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from dnnlib.errors import printable

MAX_INSTRUCTIONS = 500_000  # the largest published networks take 130 thousand; one can cost 230 bytes (an empty set)
FREE_COPIES = 1 << 18  # bytes that even a small file may have copied
ITEM_SIZE = 100  # bytes of a set for each of its members
MAX_AXES = 16  # of a tensor
MAX_HEAD = 1000  # bytes before the elements of a tensor; torch writes 220
MAX_VALUES = 600_000  # of all plain entries, keys too, as often as they are referred to; 64 characters are one more
MAX_DEPTH = 32  # of lists in lists

NUMPY_SCALARS = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
STORAGES = {  # torch's storage classes and their element types
    **{f"{name}Storage": getattr(torch, name.lower()) for name in ("Float", "Half", "BFloat16", "Double", "Bool")},
    **{f"{name}Storage": getattr(torch, name.lower()) for name in ("Long", "Int", "Short")},
    **{"CharStorage": torch.int8, "ByteStorage": torch.uint8},
}
STORAGE_MAGIC = 0x1950A86A20F9469CFC6C  # first value of torch's legacy format
STORAGE_VERSION = 1001  # second value of torch's legacy format


class ContentError(ValueError):
    """A file is damaged, or holds something other than a network's data. The text follows the file's name."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text, 800))  # it may quote the file


class ForeignError(ContentError):
    """The file is sound but foreign: only code that it brings along, or refers to, could make a network of it."""


@dataclass
class StoredObject:
    """An object of the class with this bare name, its attributes, and the text of the module that defines the class."""

    class_name: str
    state: dict[Any, Any] = field(default_factory=dict)
    source: str = field(default="", repr=False)


class StoredStorage(NamedTuple):
    """Consecutive little-endian elements: `data` is a window on the file."""

    dtype: torch.dtype
    key: str
    size: int
    data: memoryview


@dataclass
class StoredArray:
    """A numpy array of numbers, a window on the file; None before its attributes are read."""

    value: np.ndarray | None = None


@dataclass
class Budget:
    """How much of something a file may still have. Raises ContentError with `message` when it is spent."""

    left: int
    message: str

    def spend(self, amount: int = 1) -> None:
        self.left -= amount
        if self.left < 0:
            raise ContentError(self.message)


def read_pickle(data: bytes | memoryview) -> Any:
    """The value that `data` holds: plain Python values (byte strings as memoryviews) and the Stored… classes.

    Raises ContentError for anything else, ForeignError for a name that is not on the list.
    """
    return _Machine(data, GLOBALS).run()


def read_arrays(data: bytes) -> Any:
    """The value that `data` holds: plain Python values and `StoredArray`s. Raises ContentError for anything else."""
    return _Machine(data, _ARRAY_NAMES).run()


def plain(value: Any, budget: Budget | None = None) -> Any:
    """`value` as dicts with text keys, lists, strings and Python's own numbers. Raises TypeError if it is more.

    budget: of values; beyond it ContentError is raised.
    """
    budget = budget or Budget(MAX_VALUES, "too large")

    def convert(value: Any, depth: int) -> Any:
        budget.spend(1 + (len(value) // 64 if isinstance(value, str) else 0))
        if depth > MAX_DEPTH:
            raise TypeError("too deeply nested")
        if value is None or type(value) in (bool, int, float, str):
            return sys.intern(value) if isinstance(value, str) else value
        if isinstance(value, np.generic) and isinstance(value.item(), (bool, int, float, str)):
            return value.item()
        if isinstance(value, (list, tuple)):
            return [convert(item, depth + 1) for item in value]
        budget.spend(len(value) if isinstance(value, Mapping) else 0)
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {convert(str(key), depth): convert(item, depth + 1) for key, item in value.items()}
        raise TypeError(f"{type(value).__name__} is not plain data")

    return convert(value, 0)


# ----------------------------------------------------------------------------------------------------------------------
# The machine


class _Name(NamedTuple):
    """A global that the file refers to; it is on the list."""

    module: str
    name: str


class _Machine:
    """Runs pickles of a buffer, one after the other.

    names: the globals they may mention, and what calls of these build (None: the arguments are unexpected).
    outer: the machine whose limits are to hold for both together.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        names: Mapping[tuple[str, str], Callable[..., Any]],
        outer: _Machine | None = None,
    ) -> None:
        self.data, self.stream = memoryview(data), io.BytesIO(data)
        self.names = names
        self.instructions = Budget(MAX_INSTRUCTIONS, f"takes more than {MAX_INSTRUCTIONS} pickle instructions")
        self.copies = Budget(FREE_COPIES + 2 * len(data), "asks for more memory than its own size")  # bytes
        if outer:
            self.instructions, self.copies = outer.instructions, outer.copies

    def run(self) -> Any:
        """The value of the pickle that begins at the current position. `pickletools` decodes it, and runs nothing."""
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        instructions = pickletools.genops(self.stream)
        try:
            instruction, argument, _ = next(instructions)
            if instruction.name != "PROTO" or argument not in range(2, 6):
                raise ContentError("is not a pickle of protocol 2 to 5")
            for instruction, argument, _ in instructions:
                self.instructions.spend()
                if (name := instruction.name) in VALUES:
                    value = VALUES[name](self, argument)  # which may begin another stack
                    self.stack.append(value)
                elif name in ACTIONS:
                    ACTIONS[name](self, argument)
                elif name != "STOP":
                    raise ContentError(f"holds pickle instruction {name}, which has no place in such a file")
            (value,) = self.stack
        except ContentError:
            raise
        except (ValueError, TypeError, LookupError) as exc:
            place = f"at byte {self.stream.tell()} of {len(self.data)}"
            raise ContentError(f"is cut off or damaged {place}: {exc}") from exc
        return value

    def window(self, argument: Sized) -> memoryview:
        """The bytes of the instruction just read."""
        end = self.stream.tell()
        return self.data[end - len(argument) : end]

    def text(self, argument: str) -> str:
        self.copies.spend(max(sys.getsizeof(argument) - len(argument) - 100, 0))  # beyond Latin-1, up to 3 times
        return argument

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_group(self) -> list[Any]:
        """Everything above the last mark."""
        group, self.stack = self.stack, self.marked.pop()
        return group

    def pop(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def fill(self, kind: type, items: list[Any]) -> None:
        """Adds items (of a dict: keys and values in turn) to the container on top of the stack."""
        target: Any = self.stack[-1]
        found = type(target)  # a name of its own: mypy would take `target` for an object of an unknown class
        if found is not kind:
            raise TypeError(f"a {kind.__name__} is missing")
        if kind is list:
            target.extend(items)
        elif kind is set:
            target.update(map(_key, items))
        else:
            target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def refer(self, module: Any, name: Any) -> _Name:
        """A global: nothing is imported, it only must be on the list."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name is not text")
        if (module, name) not in self.names:
            raise ForeignError(f"refers to '{module[:100]}.{name[:100]}', unknown here")
        return _Name(module, name)

    def refer_outside(self, value: Any) -> StoredStorage:
        """A persistent id: what torch's format knows a tensor's data by, which follow behind the last pickle."""
        match value:
            case ("storage", _Name(module="torch", name=name), str(key), str(), count, None) if _is_count(count):
                return StoredStorage(STORAGES[name], key, count, memoryview(b""))
        raise ContentError("refers to data outside itself; a network file holds all its data")

    def call(self) -> Any:
        """A call of a global: this module's stand-in for it builds an inert value."""
        name, arguments = self.pop(2)
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise TypeError("something is called that cannot be")
        value = self.names[name](self, *arguments)
        if value is None:
            raise TypeError(f"{name.module}.{name.name} is called with unexpected arguments")
        return value

    def build(self) -> None:
        """Attributes for the object on the stack."""
        match self.stack.pop(), self.stack[-1]:
            case dict(state), StoredObject() as obj:
                obj.state = state
            case state, StoredArray() as array:
                array.value = _array_content(state)
            case (_, "<" | "|" | "=" | ">" as order, *_), _Dtype() as dtype:
                dtype.order = order
            case dict(), dict():  # those of a dict have no use and are dropped
                pass
            case _:
                raise TypeError("attributes for something that has none")


def _key(value: Any) -> Any:
    """Keys of dicts and members of sets are texts or small whole numbers (chosen large ones could all collide)."""
    if type(value) is not str and not (type(value) is int and abs(value) < 1 << 31):
        raise TypeError(f"a {type(value).__name__} cannot be a key")
    return value


VALUES: dict[str, Callable[[_Machine, Any], Any]] = {  # instructions that push a value
    **dict.fromkeys(("BININT1", "BININT2", "BININT", "LONG1", "BINFLOAT", "SHORT_BINSTRING"), lambda m, x: x),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.text),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINSTRING"), _Machine.window),
    "NONE": lambda m, x: None,
    "NEWTRUE": lambda m, x: True,
    "NEWFALSE": lambda m, x: False,
    "EMPTY_LIST": lambda m, x: [],
    "EMPTY_DICT": lambda m, x: {},
    "EMPTY_SET": lambda m, x: set(),
    "EMPTY_TUPLE": lambda m, x: (),
    "TUPLE1": lambda m, x: tuple(m.pop(1)),
    "TUPLE2": lambda m, x: tuple(m.pop(2)),
    "TUPLE3": lambda m, x: tuple(m.pop(3)),
    "TUPLE": lambda m, x: tuple(m.pop_group()),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, x: m.memo[x]),
    "GLOBAL": lambda m, x: m.refer(*x.split(" ", 1)),
    "STACK_GLOBAL": lambda m, x: m.refer(*m.pop(2)),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, x: m.call()),
    "BINPERSID": lambda m, x: m.refer_outside(*m.pop(1)),
}
ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {  # and those that don't
    "FRAME": lambda m, x: None,
    "MARK": lambda m, x: m.mark(),
    "APPEND": lambda m, x: m.fill(list, m.pop(1)),
    "APPENDS": lambda m, x: m.fill(list, m.pop_group()),
    "SETITEM": lambda m, x: m.fill(dict, m.pop(2)),
    "SETITEMS": lambda m, x: m.fill(dict, m.pop_group()),
    "ADDITEMS": lambda m, x: m.fill(set, m.pop_group()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    "MEMOIZE": lambda m, x: m.remember(len(m.memo)),
    "BUILD": lambda m, x: m.build(),
}


# ----------------------------------------------------------------------------------------------------------------------
# What stands for the names a file may mention: functions of the machine and the arguments, None for unexpected ones


@dataclass
class _Dtype:
    """A numpy element type such as 'f8', and its byte order."""

    code: str
    order: str = "<"


def _persistent_object(m: _Machine, meta: Any) -> Any:
    match meta:
        case {"type": "class", "version": int(version), "class_name": str(name), "state": dict(state), **others}:
            if version != 6:
                raise ContentError(f"holds a persistent object of format version {version}; only version 6 is known")
            source = others.get("module_src")
            return StoredObject(name, state, source if isinstance(source, str) else "")


def _set(m: _Machine, values: Any = ()) -> Any:
    if not isinstance(values, (list, tuple)):
        return None
    m.copies.spend(ITEM_SIZE * len(values))
    return set(map(_key, values))


def _bytes(m: _Machine, text: Any = "", codec: Any = "latin1") -> Any:
    """How protocol 2 stores byte strings: an empty call, or a text of as many characters below 256."""
    if isinstance(text, str) and codec in ("latin1", "latin-1"):
        m.copies.spend(len(text))
        return memoryview(text.encode("latin-1"))
    return None


def _dtype(m: _Machine, code: Any, *flags: Any) -> Any:
    return _Dtype(code) if isinstance(code, str) and code in NUMPY_SCALARS else None


def _scalar(m: _Machine, dtype: Any, raw: Any) -> Any:
    return _array_content((1, (), dtype, False, raw)).item()


def _from_buffer(m: _Machine, raw: Any, dtype: Any, shape: Any, order: Any) -> Any:
    """How protocol 5 stores arrays; order: 'C' or 'F'."""
    return StoredArray(_array_content((1, shape, dtype, order == "F", raw)))


def _array_content(state: Any) -> np.ndarray:
    match state:
        case (int(), tuple(shape), _Dtype(code=code, order=order), bool(by_column), memoryview() as raw) if (
            len(shape) <= MAX_AXES and all(map(_is_count, shape)) and math.prod(shape) * int(code[1:]) == len(raw)
        ):
            return np.frombuffer(raw, dtype=order + code).reshape(shape, order="F" if by_column else "C")
    raise ContentError("is damaged: an array contradicts itself")


def _parameter(m: _Machine, tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    return tensor if isinstance(tensor, torch.Tensor) else None


def _tensor(m: _Machine, storage: Any, offset: Any, shape: Any, stride: Any, *others: Any) -> Any:
    if not isinstance(storage, StoredStorage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        return None
    if not len(shape) == len(stride) <= MAX_AXES or not all(map(_is_count, (offset, *shape, *stride))):
        return None
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last >= storage.size or math.prod(shape) > storage.size):
        raise ContentError(f"is damaged: a tensor of shape {list(shape)} in a storage of {storage.size} elements")
    size = storage.dtype.itemsize
    m.copies.spend(math.prod(shape) * size)
    strides = [step * size if n > 1 else 0 for n, step in zip(shape, stride, strict=True)]
    elements = np.ndarray(shape, f"i{size}", storage.data, offset * size, strides)  # they may lie at odd addresses
    return torch.from_numpy(elements.copy()).view(storage.dtype)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _storage(m: _Machine, data: Any) -> Any:
    """torch's legacy format: five pickles (magic, version, system, storage, list of keys), a count and the elements."""
    if not isinstance(data, memoryview):
        return None
    inner = _Machine(data[:MAX_HEAD], _STORAGE_NAMES, m)
    magic, version, system, storage, keys = (inner.run() for _ in range(5))
    size, elements = data[(end := inner.stream.tell()) : end + 8], data[end + 8 :]
    if not isinstance(storage, StoredStorage) or (magic, version) != (STORAGE_MAGIC, STORAGE_VERSION):
        raise ContentError("is damaged: a tensor's data is not in torch's legacy format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ContentError("was written on a big-endian machine, which is not supported")
    stated = keys, int.from_bytes(size, "little"), len(elements)
    if stated != ([storage.key], storage.size, storage.size * storage.dtype.itemsize):
        raise ContentError("is damaged: a tensor's data contradicts itself, or is cut off")
    return storage._replace(data=elements)


def _not_called(m: _Machine, *arguments: Any) -> Any:
    return None


_STORAGE_NAMES = {("torch", name): _not_called for name in STORAGES}
GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("torch.nn.modules.container", "ModuleDict"): lambda m: StoredObject("ModuleDict"),
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): lambda m: {},
    **{(module, "EasyDict"): lambda m: {} for module in ("dnnlib.util", "dnnlib")},
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): _bytes for module in ("builtins", "__builtin__")},
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _dtype,
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}
"""Every name that a network file may mention: nothing else is accepted, and none of them is imported or called."""

_ARRAY_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _not_called,
    **{name: build for name, build in GLOBALS.items() if name[0].startswith("numpy") or name[0] == "_codecs"},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda m, *arguments: StoredArray() for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}
