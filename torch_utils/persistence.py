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
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from dnnlib import EasyDict
from dnnlib.cli import UserError

T = TypeVar("T")
Meta = dict[str, Any]

VERSION = 6  # of the format; EDM's loader accepts no other
HOMES = ("training.networks",)  # our modules with persistent classes, imported when a pickle first asks for one

_classes: dict[str, type] = {}  # our own classes, by bare name
_foreign: dict[tuple[str, str], type] = {}  # classes of carried modules, by (bare name, text)
_hooks: list[Callable[[Meta], Meta]] = []


class _Persistent:
    """What `persistent_class` adds to a class."""

    _orig_module_src: str
    _orig_class_name: str
    _init_args: tuple[Any, ...]
    _init_kwargs: dict[str, Any]

    @property
    def init_args(self) -> tuple[Any, ...]:
        """Positional arguments this object was made with (a copy)."""
        return copy.deepcopy(self._init_args)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments this object was made with (a copy)."""
        return copy.deepcopy(self._init_kwargs)

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
    Arguments must be picklable. Raises TypeError if another module has already registered a class of that name.
    """
    if is_persistent(cls):
        return cls
    name, module = cls.__name__, sys.modules[cls.__module__]
    source = _module_source(module)

    @functools.wraps(cls.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        self._init_args = copy.deepcopy(args)
        self._init_kwargs = copy.deepcopy(kwargs)

    bases = (cls,) if issubclass(cls, _Persistent) else (_Persistent, cls)
    body = {
        "__init__": __init__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_orig_module_src": source,
        "_orig_class_name": name,
    }
    decorated: type[T] = type(cls)(name, bases, body)  # type: ignore[misc]

    if hasattr(module, "__source__"):
        _foreign[name, source] = decorated
    else:
        known = _classes.setdefault(name, decorated)
        if known.__module__ != cls.__module__:
            raise TypeError(f"a persistent class {name} exists in {known.__module__}; its name must be unique")
        _classes[name] = decorated  # a module loaded anew replaces its own classes
    return decorated


def is_persistent(obj: Any) -> bool:
    """Whether `obj` is a class made by `persistent_class`, or an instance of one."""
    return "_orig_class_name" in vars(obj if isinstance(obj, type) else type(obj))


def is_own(obj: Any) -> bool:
    """Whether the class of `obj` is one of this program's persistent classes, and none that a pickle has brought."""
    return _classes.get(type(obj).__name__) is type(obj)


def import_hook(hook: Callable[[Meta], Meta]) -> Callable[[Meta], Meta]:
    """Registers a function that sees, and may change, the `meta` of every persistent object before it is rebuilt.

    EDM's means for loading old files (a renamed class, a lacking attribute). Usable as a decorator.
    """
    _hooks.append(hook)
    return hook


def find_class(class_name: str, module_src: str | None = None) -> type:
    """The registered class of that name. Runs no text: `module_src` only distinguishes classes of carried modules.

    A carried module is one that somebody has knowingly run from a text and that names this text in its attribute
    `__source__`. Raises UserError if there is no such class.
    """
    if module_src is not None and (class_name, module_src) in _foreign:
        return _foreign[class_name, module_src]
    if class_name not in _classes:
        for home in HOMES:
            importlib.import_module(home)
    if class_name not in _classes:
        raise UserError(
            f"the pickle holds an object of class '{class_name}', which is none of this project's classes "
            f"({', '.join(sorted(_classes))}); source text stored in a pickle is not run"
        )
    return _classes[class_name]


def _reconstruct_persistent_obj(meta: Meta) -> Any:
    """What a pickled persistent object calls. Raises UserError for another version of the format or unknown class."""
    meta = EasyDict(meta)  # what hooks written for EDM expect
    for hook in _hooks:
        meta = hook(meta)
    if meta["type"] != "class" or meta["version"] != VERSION:
        raise UserError(
            f"the pickle holds a persistent object of type '{meta['type']}', version {meta['version']}; "
            f"only type 'class', version {VERSION} (EDM's) can be read"
        )
    obj: Any = object.__new__(find_class(meta["class_name"], meta["module_src"]))
    set_state = getattr(obj, "__setstate__", obj.__dict__.update)
    set_state(meta["state"])
    return obj


def _module_source(module: ModuleType) -> str:
    """Text of a module, as one object per text: pickle then stores it once for all classes of the module."""
    return sys.intern(getattr(module, "__source__", None) or inspect.getsource(module))
