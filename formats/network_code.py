"""Runs the code that a network's pickle brings along: what --trust-network-code asks for, and nothing else does.

The pickle is loaded as Python and EDM would. Whatever is to run is named on standard error before it does.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import sys
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from dnnlib.errors import UserError, printable
from torch_utils import distributed as dist
from torch_utils import persistence
from torch_utils.misc import load_tensors
from training import networks

from .pickle_reader import GLOBALS

PREFIX = "_network_code_"  # how the modules begin that are made of texts
OPTIONAL: dict[str, Any] = {  # what networks of foreign code may lack, and then is
    "label_dim": 0,
    "sigma_min": 0.0,
    "sigma_max": math.inf,
    "round_sigma": networks.Precond.round_sigma,
    "compute_dtype": None,
    "transient": networks.Precond.transient,
}


def run_pickle(data: bytes, source: str) -> dict[Any, Any]:
    """The content of a network's pickle, its code run. Raises UserError if that fails, or it has no network."""
    try:
        content = _CodeUnpickler(io.BytesIO(data)).load()
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
    return {**content, "ema": net.cpu().float()}


class _CodeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch_utils.persistence", "_reconstruct_persistent_obj"):
            return _run_and_reconstruct
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # torch's own would unpickle whatever there is
            return lambda data: load_tensors(io.BytesIO(data))
        if module.startswith(PREFIX):
            raise UserError(f"{name} is defined in a text that a file brings, and is no persistent class")
        if (module, name) not in GLOBALS:
            warn(f"--trust-network-code: the file uses {printable(f'{module}.{name}', 400)} of this machine's Python")
        return super().find_class(module, name)


def _run_and_reconstruct(meta: dict[str, Any]) -> Any:
    """A persistent object; its source text is run as a module, once for each text."""
    text = meta["module_src"]
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    name = f"{PREFIX}{digest[:16]}"
    if name not in sys.modules:
        warn(
            "--trust-network-code: running the source text that the file brings for its "
            f"{printable(meta['class_name'], 100)} and others, as module {name}: {len(text.encode('utf-8'))} bytes, "
            f"SHA-256 {digest}"
        )
        module = sys.modules[name] = ModuleType(name)
        vars(module)["__source__"] = text  # by this `persistence` knows its classes
        try:
            exec(compile(text, f"<{name}>", "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return persistence._reconstruct_persistent_obj(meta, vars(sys.modules[name]))


def warn(text: str) -> None:
    """A line on standard error, beside the results, by rank 0."""
    dist.print0(printable(text), file=sys.stderr)
