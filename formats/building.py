"""From what a file says of a network to the network: one of this project's classes, made without initial values.

Everything stored must fit the network that the constructor arguments make: every part, every tensor, every shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from training import networks

from .pickle_reader import ContentError, ForeignError

PRECONDS = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
MAX_SIZE = 1 << 16  # no width, resolution or table of a known network is larger
MAX_LIST = 64  # numbers in a list among the constructor arguments of a network
MAX_PARTS = 5000  # modules of a network; the largest published ones have 320
LISTS = ("channel_mult", "attn_resolutions", "resample_filter")  # constructor arguments: lists of numbers
TEXTS = ("model_type", "embedding_type", "encoder_type", "decoder_type")  # constructor arguments: texts
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights may be stored as
SETTINGS = (  # attributes that may be set after a network was made; any other would contradict its weights
    *("use_fp16", "sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "epsilon_t", "C_1", "C_2"),
    *("dropout", "label_dropout", "skip_scale", "eps"),
)
CLASS = "class of the module"  # its place among the attributes
MISFIT = "does not fit the network it describes"

State = dict[str, Any]


class _WithoutWeights(TorchFunctionMode):
    """While this is on, initial weights have a shape but no data: a network is made in no time, from no random draws.

    Arithmetic on them with numbers, which leaves a shape as it is, is left out: torch would import sympy for it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.rand, torch.randn, torch.ones):
            return torch.empty(*args, device="meta")
        if func in (Tensor.mul, Tensor.sub) and args[0].is_meta and not isinstance(args[1], Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def make(class_name: str, args: Any, kwargs: Any, attributes: Mapping[str, State], parts: int) -> nn.Module:
    """A network of this class without weights. Raises ContentError.

    attributes  of its modules, by path; they win over constructor arguments, since EDM restores a network from them
    parts       how many modules there are for it
    """
    if class_name not in PRECONDS:
        raise ContentError(f"its 'ema' is of class {class_name[:100]}; a network is one of {', '.join(PRECONDS)}")
    if not isinstance(kwargs, dict) or not isinstance(args, list):
        raise ContentError("is damaged: its constructor arguments are no dict")
    cls: Any = getattr(networks, class_name)
    signature = inspect.signature(cls)
    usual = {name: parameter.default for name, parameter in signature.parameters.items()} | kwargs
    root = {} if args else attributes.get("", {})
    kwargs = kwargs | {name: value for name, value in root.items() if name in usual and value != usual[name]}
    try:
        given = signature.bind(*args, **kwargs).arguments
        _check_arguments({**given.pop("model_kwargs", {}), **given}, parts)
        with _WithoutWeights():
            net: nn.Module = cls(*args, **kwargs)
    except ContentError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError, IndexError) as exc:
        raise ForeignError(f"its {class_name} can't be made from its own constructor arguments: {exc!s:.300}") from exc
    modules = dict(net.named_modules())
    if strange := attributes.keys() - modules.keys():
        raise ForeignError(f"{MISFIT}: that has no part {min(strange)}")
    for path, module in modules.items():
        found = attributes.get(path, {})
        if found.get(CLASS, type(module).__name__) != type(module).__name__:
            raise ForeignError(f"{MISFIT}: {path} is a {found[CLASS]}, not a {type(module).__name__}")
        for name, value in found.items():
            own = vars(module).get(name)
            if not is_number(own) or isinstance(own, bool) != isinstance(value, bool) or own == value:
                continue
            if name not in SETTINGS:
                raise ForeignError(f"{MISFIT}: {path}.{name} is {value!s:.50}, not {own}")
            setattr(module, name, value)
        if not 0 <= vars(module).get("dropout", 0) <= 1:
            raise ContentError(f"is damaged: {path}.dropout is no probability")
    return net


def _check_arguments(given: State, parts: int) -> None:
    """Refuses arguments of a wrong kind, and those that would make a network out of all proportion to its file."""
    numbers: dict[str, list[Any]] = {}
    for name, value in given.items():
        items = value if name in LISTS and isinstance(value, list) else [value]
        if not all(isinstance(item, str) if name in TEXTS else is_number(item) for item in items):
            raise TypeError(f"{name} is a {type(value).__name__}")  # str * int could be huge
        numbers[name] = [] if name in TEXTS else items
    levels = numbers.get("channel_mult", [1])
    numbers["channels"] = [int(level * width) for level in levels for width in numbers.get("model_channels", [])]
    too_large = any(isinstance(item, int) and abs(item) > MAX_SIZE for items in numbers.values() for item in items)
    if too_large or any(len(items) > MAX_LIST for items in numbers.values()):
        raise ContentError(f"its constructor arguments hold a size above {MAX_SIZE}, or too many")
    # A level has as many blocks in the encoder and one more in the decoder, and each of these has two parts and more.
    blocks = 2 * abs(numbers.get("num_blocks", [0])[0]) + 1
    if 3 * blocks * len(levels) > parts:
        raise ForeignError("its constructor arguments make a larger network than it holds the parts of")


def fill(net: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Copies `tensors` into `net`, all of them and no other, in its own types; whether its parameters were float16.

    They are taken out, so that no more than one is there twice. Raises ForeignError.
    """
    expected = net.state_dict()
    problems = [f"lacks {name}" for name in expected if name not in tensors]
    problems += [f"has {name}, which the network does not" for name in tensors if name not in expected]
    both = [(name, list(tensors[name].shape), list(value.shape)) for name, value in expected.items() if name in tensors]
    problems += [f"{name}: {found}, not {wanted}" for name, found, wanted in both if found != wanted]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ForeignError(f"{MISFIT}, tensor by tensor: {'; '.join(problems[:3])}{more}"[:600])
    parameters = dict(net.named_parameters())
    half = True
    values = {}
    for name, value in expected.items():
        found = tensors.pop(name)
        if found.dtype not in FLOATS:
            raise ForeignError(f"stores {name} as {found.dtype}; a network of a known kind has floating-point weights")
        half = half and (found.dtype == torch.float16 or name not in parameters)
        values[name] = found.to(value.dtype, memory_format=torch.contiguous_format, copy=True)
    net.load_state_dict(values, assign=True)
    return half


def scalars(state: Mapping[Any, Any]) -> State:
    """The numbers and flags among a module's own attributes."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and not name.startswith("_") and name != "training" and is_number(value)
    }


def is_number(value: Any) -> bool:
    """Whether it is a number or a flag, of Python's own or numpy's kinds."""
    return isinstance(value, (bool, int, float, np.number, np.bool_))
