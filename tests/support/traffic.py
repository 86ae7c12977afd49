"""Counts what a device would do: bytes that its kernels read and write, kernels, copies from host memory, synchronisations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KERNELS = {"aten::conv2d", "aten::linear", "aten::scaled_dot_product_attention", "aten::upsample_nearest2d"}
"""Composite operators that count as one kernel each; others count as what they are made of."""
_FREE = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
_WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero", "aten::nonzero"}


class Traffic(TorchDispatchMode):
    """Within it each operator on the device counts as one kernel that reads its inputs once and writes its outputs once.

    Views are free. The second pass with which cuDNN adds a bias is counted too (``_bias``): it reads and writes the result.
    """

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.kind = kind
        self.bytes = self.launches = self.uploads = self.waits = 0
        self.by_name: Counter[str] = Counter()
        """Bytes by operator."""
        self.launches_by_name: Counter[str] = Counter()
        self.largest_move = 0
        """Bytes of the largest copy between host memory and the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        if func.namespace == "aten" and name not in _KERNELS | _WAITS:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if name == "aten::conv2d" and args[0].is_contiguous(memory_format=torch.channels_last):
            result = result.contiguous(memory_format=torch.channels_last)  # as cuDNN gives it, which is not asked here
        self._count(func, name, args, kwargs, result)
        return result

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        given = list({id(tensor): tensor for tensor in _tensors((args, kwargs))}.values())
        made = list(_tensors(result))
        devices = {tensor.device.type for tensor in (*given, *made)}
        if self.kind not in devices or func.namespace != "aten":
            return
        if name in _WAITS:
            self.waits += 1
            return
        if name in ("aten::_to_copy", "aten::copy_") and len(devices) == 2:
            self._move(given[-1], made[0], args, kwargs)
            return
        if name in _FREE or _is_view(func):
            return
        if name in ("aten::copy_", "aten::fill_", "aten::zero_"):
            given = given[1:]  # what is overwritten is not read
        outputs = [argument.name for argument in func._schema.arguments if argument.is_out]
        written = {id(kwargs[key]) for key in outputs if key in kwargs}
        moved = sum(_bytes(tensor) for tensor in given if id(tensor) not in written) + sum(_bytes(tensor) for tensor in made)
        self._add(name, moved)
        if name == "aten::conv2d" and len(args) > 2 and args[2] is not None:
            self._add("bias of aten::conv2d", 2 * _bytes(made[0]))

    def add(self, name: str, *tensors: Tensor) -> None:
        """Count a kernel that is no operator of torch's."""
        self._add(name, sum(_bytes(tensor) for tensor in tensors))

    def _add(self, name: str, moved: int) -> None:
        self.launches += 1
        self.bytes += moved
        self.by_name[name] += moved
        self.launches_by_name[name] += 1

    def _move(self, source: Tensor, target: Tensor, args: Any, kwargs: Any) -> None:
        self.largest_move = max(self.largest_move, _bytes(target))
        if target.device.type == self.kind:
            self.uploads += 1
        elif not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            self.waits += 1


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """Bytes of different elements: those of an expanded dimension are one."""
    lengths = (length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(lengths) * tensor.element_size() if tensor.numel() else 0
