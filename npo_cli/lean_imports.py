"""Imports transformers without what no command of one process uses, until something uses it.

transformers imports at its top the modules that shard a model (`torch.distributed.tensor`, `.fsdp`, `.checkpoint`),
accelerate, and scipy for the losses of object detection; decorators and every optimizer step import torch's compiler
(`torch._dynamo`). Together they take half of the time before the first training step, and one process that compiles
nothing needs none of them.

Here a name that a module of transformers imports from there is a placeholder: called, subclassed or asked for an
attribute, it imports the real one; `isinstance` is False while the real module is not loaded, since then there is no
instance. Marks for the compiler do nothing until the compiler is imported. All other modules import as always. Only a
process that runs one command, and shards and compiles nothing, installs this (`npo_cli.session.startup`).
"""

import builtins
import copy
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from os import PathLike
from types import ModuleType
from typing import Any

DEFERRED = (
    *("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint"),
    *("torch.distributed._composable", "torch._dynamo", "scipy.optimize", "accelerate"),
)
"""Modules, with those in them, of which the importers get placeholders."""
IMPORTERS = ("transformers.", "accelerate.", "huggingface_hub.")
COMPILER = "torch._dynamo"
SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"
SHAPE_USERS = frozenset({"torch", "torch._refs", "torch._prims_common", "torch._prims", "torch._meta_registrations"})
COMPILER_USERS = frozenset({"torch.compiler", "torch._compile", "torch.optim.optimizer"})
"""Modules of torch that import the compiler in order to mark a function for it."""


class Deferred:
    """A name of a module that is imported when the name is used."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _load(self) -> Any:
        return getattr(import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """While a module of transformers is imported, as for a table of defaults, the result is a placeholder too."""
        if _is_importing():
            return DeferredResult(self, args, kwargs)
        return self._load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return getattr(self._load(), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._load(),)

    def __instancecheck__(self, instance: object) -> bool:
        return self._module in sys.modules and isinstance(instance, self._load())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._module in sys.modules and issubclass(subclass, self._load())

    def __or__(self, other: object) -> Any:
        """`DTensor | None` in an annotation."""
        return Any

    __ror__ = __or__


class DeferredResult:
    """What a placeholder returned at the top level of a module: made when an attribute of it is used."""

    def __init__(self, function: Deferred, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._make = lambda: function._load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return getattr(self._make(), name)


class PlainShapes:
    """The module for symbolic shapes as torch sees it when it infers the shape of a tensor without storage.

    A question about plain numbers is answered here, any other by the real module.
    """

    answers: Mapping[str, Callable[..., Any]] = {
        **dict.fromkeys(("expect_true", "statically_known_true", "guard_or_true", "guard_or_false"), bool),
        **{"guard_size_oblivious": bool, "guarding_hint_or_throw": int, "sym_eq": operator.eq},
        **{"has_guarding_hint": lambda size: True, "is_nested_int": lambda size: False},
        **{"sym_and": lambda *values: all(values), "sym_or": lambda *values: any(values)},
    }

    def __getattr__(self, name: str) -> Any:
        if name not in self.answers:
            return getattr(import_module(SYMBOLIC_SHAPES), name)

        def ask(*values: Any) -> Any:
            if all(map(_is_plain, values)):
                return self.answers[name](*values)
            return getattr(import_module(SYMBOLIC_SHAPES), name)(*values)

        return ask


def _is_plain(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(size, int) for size in value))


class DeferredModule(ModuleType):
    """What `from MODULE import NAME` reads names from."""

    def __getattr__(self, name: str) -> Deferred:
        if name.startswith("__"):
            raise AttributeError(name)
        return Deferred(self.__name__, name)


class CompilerConfig:
    """The one setting of the compiler that a function which is not compiled reads, and drops."""

    error_on_nested_fx_trace = True

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(f"{COMPILER}.config"), name)


class CompilerMarks:
    """Stands at `torch._dynamo` until that is imported: marks of functions do nothing."""

    @staticmethod
    def disable(function: Callable | None = None, *args: Any, **kwargs: Any) -> Any:
        """The function itself, also as a decorator with arguments."""
        return function if function is not None else CompilerMarks.disable

    assume_constant_result = allow_in_graph = disable
    config = CompilerConfig()
    eval_frame = DeferredModule("torch._dynamo.eval_frame")
    """Holds the class of compiled models, of which there is none."""

    @staticmethod
    def graph_break() -> None:
        """Nothing is traced."""

    def __getattr__(self, name: str) -> Any:
        """Anything else needs the compiler, which takes this place."""
        return getattr(import_module(COMPILER), name)


def install() -> None:
    """From now on; nothing where transformers is imported already."""
    if "transformers" in sys.modules or COMPILER in sys.modules:
        return
    real_import = builtins.__import__

    def lean_import(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if level == 0 and name not in sys.modules and globals is not None:
            importer = globals.get("__name__") or ""
            if name == SYMBOLIC_SHAPES and importer in SHAPE_USERS:
                return PlainShapes()
            if name == "sympy" and importer == "torch._prims_common":
                return DeferredModule(name)
            if name == COMPILER and importer in COMPILER_USERS:
                return _mark_compiler()
            is_deferred = name in DEFERRED or name.startswith(tuple(f"{module}." for module in DEFERRED))
            package = name.partition(".")[0]
            if is_deferred and fromlist and importer.startswith(IMPORTERS) and importer.partition(".")[0] != package:
                _mark_compiler()
                return DeferredModule(name)
        module = real_import(name, globals, locals, fromlist, level)
        if level and name == "utils.import_utils" and globals is not None and globals.get("__name__") == "transformers":
            _scan_folders_once(sys.modules["transformers.utils.import_utils"])
        return module

    builtins.__import__ = lean_import


def _scan_folders_once(import_utils: ModuleType) -> None:
    """transformers reads the source of every model for what it exports, and does so twice: keep what it found."""
    scan = getattr(import_utils, "create_import_structure_from_path", None)
    if scan is None:
        return
    found: dict[str, Any] = {}
    is_scanning: list[str] = []

    def scan_once(module_path: str | PathLike[str]) -> Any:
        path = os.path.realpath(module_path)
        folder = os.path.dirname(path) if os.path.isfile(path) else path
        if is_scanning:  # a folder in it
            return scan(module_path)
        if folder not in found:
            is_scanning.append(folder)
            found[folder] = scan(folder)
            is_scanning.clear()
        return copy.deepcopy(found[folder])

    import_utils.create_import_structure_from_path = scan_once  # type: ignore[attr-defined]


def _is_importing() -> bool:
    """Whether the top level of a module of transformers or accelerate is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__", "").startswith(IMPORTERS):
            return True
        frame = frame.f_back
    return False


def _mark_compiler() -> ModuleType:
    """torch, with the marks in the compiler's place, and submodules that are imported where another library, such as
    peft, takes them for imported."""
    torch = sys.modules["torch"]
    vars(torch).setdefault("_dynamo", CompilerMarks())
    vars(torch.distributed).setdefault("__getattr__", _load_submodule)
    return torch


def _load_submodule(name: str) -> ModuleType:
    module = f"torch.distributed.{name}"
    if module not in DEFERRED:
        raise AttributeError(f"module 'torch.distributed' has no attribute {name!r}")
    return import_module(module)
