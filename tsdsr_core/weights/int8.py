"""int8 weights: the matrices of the transformer's attention and feed-forward layers, rotated, with one scale for each row.

``W R = diag(s) Q``, rounded: ``Q`` in int8, ``s_i`` the largest magnitude in row ``i`` of ``W R``, divided by 127.  The
rotation ``R`` repeats a regular Hadamard matrix ``H`` of ``g = 4^k`` rows along its diagonal:

    H = 2^-k (H4 x ... x H4),  with k Kronecker factors  H4 = 1 everywhere, but -1 on the antidiagonal.

``H`` is orthogonal and symmetric, so it is its own inverse, and ``W x = (W R)(R x)``: a host that multiplies in int8 rotates
its inputs too.  Rotating spreads single large numbers over a group.  The rows of a regular Hadamard matrix have the same
sum, so that a constant stays one, which Sylvester's matrices would gather into one large number (Huang et al. 2025,
"ConvRot: Rotation-Based Plug-and-Play 4-bit Quantization for Diffusion Transformers", arXiv:2512.03673).  The format is that
of ComfyUI from 0.27 on, ``int8_tensorwise`` with ``convrot``.

Error: each element of ``W R`` is off by at most ``s_i / 2``, and typically by ``s_i / sqrt(12)``.  ``R`` keeps lengths, so
row ``i`` of ``W`` with ``n`` elements is off by at most ``s_i sqrt(n) / 2`` in length, and one element by ``s_i sqrt(g) / 2``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import some
from ..errors import InputError
from .float8 import SCALE, is_matrix

STORED = torch.int8
_LARGEST = 127
"""The range is symmetric; -128 is not used."""
_GROUPS = (256, 64, 16)
"""Rows of ``H``, in the order of preference: 256 is what hosts have the fastest kernels for; each must be a power of 4."""
_LEAST_SCALE = 1e-30
"""The scale of a row of zeros, as the host has it."""


def group(width: int) -> int:
    """Size of the groups that are rotated, for matrices with ``width`` columns; 1 if they are not rotated.

    >>> group(1536), group(6144), group(128), group(24)
    (256, 256, 64, 1)
    """
    return next((size for size in _GROUPS if width % size == 0), 1)


def rotate(x: Tensor) -> Tensor:
    """``x R`` for ``x`` of shape ``(..., n)``; rotating twice gives ``x`` again, up to rounding.

    >>> rotate(torch.ones(1, 64)).unique(), rotate(rotate(torch.eye(16))).round().equal(torch.eye(16))
    (tensor([1.]), True)
    """
    size = group(x.shape[-1])
    return x if size == 1 else (x.unflatten(-1, (-1, size)) @ _hadamard(size).to(x)).flatten(-2)


def quantise(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Quantise an SD3 transformer's weights: matrices ``(m, n)`` in int8 with fp32 scales ``(m, 1)``, all others in ``dtype``.

    Raises:
        InputError: for NaN and infinite values.
    """
    found = {key: weight.to(dtype) for key, weight in weights.items() if not is_matrix(key)}
    for key in filter(is_matrix, weights):
        rotated = rotate(weights[key].float())
        largest = rotated.abs().amax(1, keepdim=True)
        if not torch.isfinite(largest).all():
            raise InputError(f"NaN or infinite values in {key}: the model is damaged")
        scale = (largest / _LARGEST).clamp(min=_LEAST_SCALE)
        found[key] = (rotated / scale).round().to(STORED)
        found[key + SCALE] = scale
    return found


def dequantise(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inverse of ``quantise``: the same keys without the scales, rotated back, all in ``dtype``.

    Quantising the result in fp32 again gives the same int8 numbers.

    Args:
        weights: must pass ``check_scales``.
    """
    plain = {key: weight for key, weight in weights.items() if not key.endswith(SCALE)}
    return {
        key: rotate(weight.float() * weights[key + SCALE]).to(dtype) if weight.dtype == STORED else weight.to(dtype)
        for key, weight in plain.items()
    }


def check_scales(weights: Mapping[str, Tensor]) -> None:
    """Raise ``InputError`` unless each int8 matrix has valid scales, and all scales have an int8 matrix."""
    stored = [key for key, weight in weights.items() if weight.dtype == STORED]
    scales = [key.removesuffix(SCALE) for key in weights if key.endswith(SCALE)]
    odd = sorted({*stored} ^ {*scales} | {key for key in stored if not is_matrix(key) or weights[key].dim() != 2})
    if odd or not stored:
        raise InputError(f"int8 weights and scales do not match: {some(odd) or 'there are none'}; make the bundle again")
    for key in stored:
        scale = weights[key + SCALE]
        rows = len(weights[key])
        if scale.dtype != torch.float32 or scale.shape != (rows, 1) or not ((scale > 0) & torch.isfinite(scale)).all():
            raise InputError(
                f"the scales of {key}: expected finite fp32 numbers above 0, one for each of {rows} rows; make the bundle again"
            )


def _hadamard(size: int) -> Tensor:
    """``H`` with ``size`` rows, a power of 4, in fp32 on the CPU."""
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    factor = (1 - 2 * torch.eye(4, dtype=torch.float32, device="cpu").flip(0)) / 2
    while len(one) < size:
        one = torch.kron(one, factor)
    return one
