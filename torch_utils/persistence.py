"""Objects that pickle in the format of EDM's network files: with the source text of the module that defines them.

A persistent object is pickled as the call `_reconstruct_persistent_obj(meta)`, where `meta` is a plain dict with the
keys type ("class"), version (6), module_src (text of the defining module), class_name (a bare name) and state (the
instance's attributes). EDM's own loader runs the text. Nothing here ever does: `class_name` is looked up among the
classes that this process has registered with `persistent_class`, and an unknown one is an error.

The text that is written stands alone: EDM runs it as a fresh module, in which `torch_utils.persistence` is EDM's own.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dnnlib.cli import UserError

T = TypeVar("T")
Meta = dict[str, Any]

VERSION = 6  # of the format; EDM's loader accepts no other

_classes: dict[str, type] = {}  # our own classes, by bare name


class _Persistent:
    """What `persistent_class` adds to a class."""

    _orig_module_src: str
    _orig_class_name: str
    _init_args: tuple[Any, ...]
    _init_kwargs: dict[str, Any]

    init_args = property(lambda self: copy.deepcopy(self._init_args))  # what the object was made with
    init_kwargs = property(lambda self: copy.deepcopy(self._init_kwargs))

    def __reduce__(self) -> tuple[Callable[[Meta], Any], tuple[Meta]]:
        if not is_persistent(self):
            raise TypeError(f"{type(self).__qualname__} needs @persistent_class: its pickle would be read as its base")
        transient = getattr(self, "transient", ())
        meta = {
            "type": "class",
            "version": VERSION,
            "module_src": self._orig_module_src,
            "class_name": self._orig_class_name,
            "state": {name: value for name, value in vars(self).items() if name not in transient},
        }
        return _reconstruct_persistent_obj, (meta,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with all attributes, those that a pickle leaves out included."""
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(vars(self), memo))
        return clone


def persistent_class(cls: type[T]) -> type[T]:
    """Class decorator: instances remember their constructor arguments and pickle as described above.

    The result is a subclass of `cls` with its name, so that `isinstance` and `super()` work as before. Attributes
    listed in a class attribute `transient` are settings of the moment: a pickle leaves them out, a copy keeps them.
    Arguments must be picklable.

    A module that --trust-network-code has run has its text in `__source__`: its classes are foreign.
    """
    if is_persistent(cls):
        return cls
    module = sys.modules[cls.__module__]
    carried = getattr(module, "__source__", None)
    source = sys.intern(carried or inspect.getsource(module))  # one object: pickle stores it once for all classes

    @functools.wraps(cls.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        self._init_args = copy.deepcopy(args)
        self._init_kwargs = copy.deepcopy(kwargs)

    bases = (cls,) if issubclass(cls, _Persistent) else (_Persistent, cls)
    body = {
        **{name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")},
        "__init__": __init__,
        "_orig_module_src": source,
        "_orig_class_name": cls.__name__,
    }
    decorated: type[T] = type(cls)(cls.__name__, bases, body)  # type: ignore[misc]
    if carried is None:
        _classes[cls.__name__] = decorated
    return decorated


def is_persistent(obj: Any) -> bool:
    """Whether `obj` is a class made by `persistent_class`, or an instance of one."""
    return "_orig_class_name" in vars(obj if isinstance(obj, type) else type(obj))


def is_own(obj: Any) -> bool:
    """Whether the class of `obj` is one of this program's persistent classes, and none that a pickle has brought."""
    return _classes.get(type(obj).__name__) is type(obj)


def _reconstruct_persistent_obj(meta: Meta, classes: Mapping[str, Any] = _classes) -> Any:
    """What a pickled persistent object calls. Raises UserError for another version of the format or unknown class.

    classes: by name, those that may be meant.
    """
    if meta["type"] != "class" or meta["version"] != VERSION:
        raise UserError(
            f"the pickle holds a persistent object of type '{meta['type']}', version {meta['version']}; "
            f"only type 'class', version {VERSION} (EDM's) can be read"
        )
    importlib.import_module("training.networks")
    cls: Any = classes.get(meta["class_name"])
    if not is_persistent(cls):
        raise UserError(
            f"the pickle holds an object of class '{meta['class_name']}', which is none of this project's classes "
            f"({', '.join(sorted(_classes))}); source text stored in a pickle is not run"
        )
    obj: Any = object.__new__(cls)
    getattr(obj, "__setstate__", obj.__dict__.update)(meta["state"])
    return obj
