"""Writes EDM's network pickles, so that EDM's own code opens them: the counterpart of `pickle_reader`.

The stream refers to nothing but the names that EDM's own files refer to; tensors are in torch's legacy format.
"""

from __future__ import annotations

import copyreg
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torch_utils import persistence

from .pickle_reader import STORAGE_MAGIC, STORAGE_VERSION, STORAGES, plain


def stored_tensor(tensor: Tensor, half: bool = False, name: str = "a parameter") -> Tensor:
    """`tensor` as it goes into a file: contiguous, on the CPU, floating-point numbers as float32 or float16.

    name: for the ValueError if float16 can't hold it.
    """
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
    if half:
        tensor = tensor.half()
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds numbers that float16 can't; store the network in float32")
    return tensor.contiguous().view(-1).view(tensor.shape)  # the same strides, whatever the memory format was


class NetworkPickler(pickle.Pickler):
    """Writes a network as EDM does, from whatever device and type, with nothing in it but what a reader needs.

    Hooks and compiled code stay out, numpy's numbers become Python's own, and tensors are numbered in the order they
    appear (torch would take memory addresses): the same network gives the same bytes.
    """

    def __init__(self, file: IO[bytes], half: bool) -> None:
        super().__init__(file, protocol=4)
        self.half = half
        self.count = 0

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            is_parameter = isinstance(obj, nn.Parameter)
            tensor = stored_tensor(obj, self.half and is_parameter)
            self.count += 1
            storage = _Call(torch.storage._load_from_bytes, (_storage_bytes(tensor, str(self.count)),))
            layout = (0, tuple(tensor.shape), tensor.stride())
            call = _Call(torch._utils._rebuild_tensor_v2, (storage, *layout, False, OrderedDict()))
            return (torch._utils._rebuild_parameter, (call, False, OrderedDict())) if is_parameter else tuple(call)
        if isinstance(obj, nn.Module) and persistence.is_persistent(obj):
            build, (meta,) = cast(Any, obj.__reduce__())
            return build, ({**meta, "state": _module_state(meta["state"], persistence.is_own(obj))},)
        if type(obj) is nn.ModuleDict:
            return copyreg.__newobj__, (nn.ModuleDict,), _module_state(vars(obj))  # type: ignore[attr-defined]
        return NotImplemented


class _Call(NamedTuple):
    """Is pickled as this call."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> Any:
        return tuple(self)


def _module_state(state: dict[str, Any], own: bool = True) -> dict[str, Any]:
    """A module's attributes for storing. Equal texts become one object, so that pickle sees them as one.

    own: of a class whose attributes are plain data. Those of foreign code are stored as they are.
    """
    kept: dict[str, Any] = {}
    for name, value in state.items():
        if name in ("_parameters", "_buffers", "_modules"):
            kept[name] = {sys.intern(key): item for key, item in value.items()}
        elif name == "_non_persistent_buffers_set":
            kept[name] = set(value)
        elif name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            kept[name] = OrderedDict()
        elif name == "training":
            kept[name] = False
        elif name != "_compiled_call_impl":
            kept[name] = value if not own else tuple(plain(value)) if name == "_init_args" else plain(value)
    return kept


def _storage_bytes(tensor: Tensor, key: str) -> bytes:
    """The elements of a contiguous tensor in torch's legacy format, as `torch.storage._load_from_bytes` takes it."""
    storage_class = getattr(torch, {dtype: name for name, dtype in STORAGES.items()}[tensor.dtype])
    sizes = {"short": 2, "int": 4, "long": 4}
    system = {"protocol_version": STORAGE_VERSION, "little_endian": True, "type_sizes": sizes}
    # A persistent id is the pickle of a tuple with another instruction at its end.
    described = pickle.dumps(("storage", storage_class, key, "cpu", tensor.numel(), None), protocol=2)
    parts = [pickle.dumps(value, protocol=2) for value in (STORAGE_MAGIC, STORAGE_VERSION, system)]
    parts += [described.removesuffix(pickle.STOP) + pickle.BINPERSID + pickle.STOP, pickle.dumps([key], protocol=2)]
    return b"".join([*parts, struct.pack("<q", tensor.numel()), tensor.numpy().tobytes()])
