"""Tensors on a device that is not there: shapes, types and devices without data, by torch's ``FakeTensorMode``.

Each operator checks the devices of its inputs as the real one would, so that a tensor on the wrong device is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

_KINDS = {"cuda": 1, "mps": 13}
"""Their numbers in torch; that of "meta" is 14."""
_NUMBER = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
_TRUTH = (torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default)


class FakeDevice(FakeTensorMode):
    """Within it tensors have no data; what hangs on data is taken to be true, and an unknown number to be 1.

    Pictures are then finite, and no layer is all zeros. Tensors from before lie where they lie.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.device = torch.device(kind, 0)
        self.wide: set[str] = set()
        """Operators that gave float64 on the device: most accelerators have none."""
        self.ran: dict[str, set[str]] = {}
        """Types of the devices on which each operator ran."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TRUTH:
            assert len({given.device for given in args}) == 1, f"{func}: {[given.device for given in args]}"
            return True
        if func in _NUMBER:
            known = args[0].constant if isinstance(args[0], FakeTensor) else args[0]
            if known is not None:
                with no_dispatch():
                    return known.item()
            return True if args[0].dtype == torch.bool else 1
        if any(isinstance(to, torch.device) and to.type != "cpu" for to in (*args, *(kwargs or {}).values())):
            args = tuple(self._unknown(given) for given in args)  # torch would take a value that it knows to the device
        result = super().__torch_dispatch__(func, types, args, kwargs or {})
        if isinstance(result, FakeTensor):
            self.ran.setdefault(func.name().partition(".")[0], set()).add(result.device.type)
            if result.device.type == self.device.type and result.dtype == torch.float64:
                self.wide.add(str(func))
        return result

    def _unknown(self, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        fake = given if isinstance(given, FakeTensor) else self.from_tensor(given)
        fake.constant = None
        return fake

    def __enter__(self) -> FakeDevice:
        self._real_apply = nn.Module._apply
        nn.Module._apply = _apply
        return super().__enter__()

    def __exit__(self, *caught: Any) -> None:
        nn.Module._apply = self._real_apply
        super().__exit__(*caught)


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``, which cannot change the device of tensors without data."""
    for part in module.modules() if recurse else (module,):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
        part._buffers.update({name: function(value) for name, value in part._buffers.items() if value is not None})
    return module


class Stream:
    """Stands in for a stream of a device that is not there: an order of time, of which fake tensors know nothing."""

    def synchronize(self) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...

    def record_event(self) -> Stream:
        return self


def install(monkeypatch: Any, kind: str) -> FakeDevice:
    """A mode for a device of ``kind`` in this process; only what asks the device itself is answered in its place.

    Args:
        monkeypatch: pytest's, or another with its ``setattr``.
    """
    _guard(kind)
    _give_shapes()
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 8)  # small tables keep their values
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # it asks the device for its generation
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    for name, answer in {"mem_get_info": (8 * 10**9, 8 * 10**9), "memory_reserved": 0, "memory_allocated": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, _answer=answer: _answer)
    return FakeDevice(kind)


@functools.cache
def _give_shapes() -> torch.library.Library:
    """Let torch's kernels for synchronised batch norms, which know real devices alone, give shapes without data."""
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl(
        "batch_norm_stats", lambda x, eps: tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    )  # fmt: skip
    library.impl(
        "batch_norm_gather_stats_with_counts", lambda x, mean, *_: tuple(mean.new_empty(mean.shape[1]) for _ in range(2))
    )  # fmt: skip
    return library


def _guard(kind: str) -> None:
    """Let torch take a device for the current one that is not there, by what it has in this place for "meta"."""
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[kind].is_available():
        return
    library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"), None)
    try:
        guards = (ctypes.c_void_p * 15).in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        raise unittest.SkipTest("this build of torch has no place for the guard of a device that is not there") from None
    guards[_KINDS[kind]] = guards[14]
