"""Imports without optional dependencies: they may take seconds, or be installed in a version that does not load."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Inside, packages called ``names`` are not found, unless they are loaded already.

    What is imported inside works without them later too, so this is for programs that know all that they will need.

    >>> with hidden("wave"):
    ...     try:
    ...         import wave
    ...     except ModuleNotFoundError:
    ...         print("not found")
    not found
    >>> import wave
    """
    new = [name for name in names if name not in sys.modules]
    for name in new:
        leave_out(name)
    try:
        yield
    finally:
        for name in new:
            put_back(name)


def leave_out(name: str) -> None:
    """Let the package called ``name`` count as not installed until ``put_back``, unless it is loaded already.

    >>> leave_out("tabnanny")
    >>> importlib.util.find_spec("tabnanny") is None
    True
    >>> put_back("tabnanny")
    >>> importlib.util.find_spec("tabnanny") is None
    False
    """
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def put_back(name: str) -> None:
    """Undo ``leave_out``."""
    if name in sys.modules and sys.modules[name] is None:
        del sys.modules[name]


def import_pyiqa() -> ModuleType:
    """Import pyiqa, which needs the torchvision that programs of this project leave out.

    Raises:
        ImportError: if it is not installed, or it or torchvision does not load.
    """
    put_back("torchvision")
    try:
        return importlib.import_module("pyiqa")
    except (RuntimeError, OSError) as error:  # of torchvision for another build of torch
        advice = "torch and torchvision must be of the same kind, both for the CPU or both for the same GPU"
        raise ImportError(f"it does not load: {error}; {advice}: https://pytorch.org/get-started/locally") from error


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, who only marks functions for ``torch.compile`` does not load it; who needs more of it does.

    The marks are lost, so this is for programs that will not compile what is imported inside.
    """
    if _COMPILER in sys.modules:
        yield
        return
    sys.modules[_COMPILER] = stand_in = _StandIn(_COMPILER)
    try:
        yield
    finally:
        if sys.modules.get(_COMPILER) is stand_in:
            del sys.modules[_COMPILER]


class _StandIn(ModuleType):
    """Has the two decorators of ``torch._dynamo`` that are used at import, doing nothing; loads the module for all else."""

    @staticmethod
    def disable(function: Any = None, *_: Any, **__: Any) -> Any:
        return function or (lambda marked: marked)

    @staticmethod
    def allow_in_graph(function: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by the import system itself
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return getattr(importlib.import_module(_COMPILER), name)
