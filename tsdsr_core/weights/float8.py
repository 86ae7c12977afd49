"""8-bit weights: the matrices of the transformer's attention and feed-forward layers in e4m3, with one scale each.

``W = s Q`` with ``Q`` in e4m3 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning": 3 bits of mantissa, at most 448).
The scale ``s`` is the smallest power of two for which ``|W| / s`` stays within 448, and at least 2^-15.  With powers of
two, ``s Q`` is exact in fp16, bf16 and fp32, and quantising it again changes nothing.  Compared with ``s = max|W| / 448``
the error is at most about 1 % larger, measured on normally and Laplace distributed ``W``.

Query, key and value share a scale, because hosts concatenate them to one matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..checks import some
from ..errors import InputError

STORED = torch.float8_e4m3fn
_LARGEST = torch.finfo(STORED).max
SCALE = "_scale"
"""Suffix of scales: ``<layer>.weight_scale`` is the scale of ``<layer>.weight``, one fp32 number."""
_LEAST_SCALE = 2.0**-15
"""The finest step of ``s Q`` is then 2^-24, that of fp16."""
_MATRIX = re.compile(
    r"transformer_blocks\.\d+\."
    r"(attn2?\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2))\.weight"
)
_JOINT = re.compile(r"\.(to|add)_[qkv](_proj)?\.")


def is_matrix(key: str) -> bool:
    """Whether ``quantise`` stores the weight ``key`` (diffusers' name) in 8 bits.

    >>> is_matrix("transformer_blocks.0.attn.to_q.weight"), is_matrix("proj_out.weight")
    (True, False)
    """
    return _MATRIX.fullmatch(key) is not None


def quantise(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Quantise an SD3 transformer's weights: matrices in 8 bits with their scales, all other weights in ``dtype``.

    The error of an element ``w`` is at most half a step of e4m3: the larger of ``|w| / 16`` and ``s / 1024``.

    Raises:
        InputError: for NaN and infinite values.
    """
    found = {key: weight.to(dtype) for key, weight in weights.items() if not is_matrix(key)}
    for keys in _joint(filter(is_matrix, weights)).values():
        scale = _scale({key: float(weights[key].abs().max()) for key in keys})
        for key in keys:
            found[key] = (weights[key].float() / scale).to(STORED)
            found[key + SCALE] = torch.tensor(scale, dtype=torch.float32)
    return found


def dequantise(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inverse of ``quantise``: the same keys without the scales, all in ``dtype``.

    Args:
        weights: must pass ``check_scales``.
    """
    plain = {key: weight for key, weight in weights.items() if not key.endswith(SCALE)}
    return {
        key: (weight.float() * weights[key + SCALE]).to(dtype) if weight.dtype == STORED else weight.to(dtype)
        for key, weight in plain.items()
    }


def check_scales(weights: Mapping[str, Tensor]) -> None:
    """Raise ``InputError`` unless each 8-bit weight has a valid scale, and each scale an 8-bit weight."""
    stored = [key for key, weight in weights.items() if weight.dtype == STORED]
    scales = [key.removesuffix(SCALE) for key in weights if key.endswith(SCALE)]
    odd = sorted({*stored} ^ {*scales} | {key for key in stored if not is_matrix(key)})
    if odd or not stored:
        raise InputError(f"8-bit weights and scales do not match: {some(odd) or 'there are none'}; make the bundle again")
    for keys in _joint(stored).values():
        scale = weights[keys[0] + SCALE]
        good = scale.dtype == torch.float32 and scale.numel() == 1 and 0 < float(scale) < math.inf
        if not good or any(not torch.equal(weights[key + SCALE], scale) for key in keys):
            raise InputError(
                f"the scale of {' and '.join(keys)}: expected one finite fp32 number above 0, the same for each; make the "
                "bundle again"
            )


def _joint(keys: Iterable[str]) -> dict[str, list[str]]:
    """``keys`` in groups that share a scale."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_JOINT.sub(r".\1_qkv.", key), []).append(key)
    return groups


def _scale(largest: Mapping[str, float]) -> float:
    """The scale for matrices whose ``max|W|`` are ``largest``."""
    damaged = [key for key, value in largest.items() if not math.isfinite(value)]
    if damaged:
        raise InputError(f"NaN or infinite values in {some(damaged)}: the model is damaged")
    mantissa, exponent = math.frexp(max(*largest.values(), _LEAST_SCALE * _LARGEST) / _LARGEST)
    return 2.0 ** (exponent - (mantissa == 0.5))
