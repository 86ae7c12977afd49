"""Detects infinite and NaN values where they arise, and runs in fp32 what overflows in fp16."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from .memory import log


def check_finite(values: Tensor, source: str, advice: str) -> Tensor:
    """Return ``values`` if all of them are finite; later, clamping would turn others into a black or white image.

    Args:
        source: name of the values, for the message.
        advice: what the user can do, for the message.

    Raises:
        FloatingPointError: if a value is infinite or NaN.
    """
    if not torch.isfinite(values).all():
        raise FloatingPointError(f"{source} is not finite (infinite or NaN values): {advice}")
    return values


def fits(part: str, weights: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Whether all finite weights of a part of the model stay finite in ``dtype``; logs a warning if not."""
    if dtype == torch.float32 or all(_stay_finite(weight, dtype) for weight in weights):
        return True
    log.warning("the %s has weights beyond %s; running it in fp32", part, str(dtype).removeprefix("torch."))
    return False


def _stay_finite(weight: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(torch.isfinite(weight.to(dtype)), torch.isfinite(weight))


def half_dtype(half: str, dtype: torch.dtype, overflowed: Collection[str]) -> torch.dtype:
    """The type in which a half of the VAE runs: ``dtype``, or fp32 if it is one of those that ``overflowed``."""
    return torch.float32 if half in overflowed else dtype


def run_half(half: str, dtype: torch.dtype, overflowed: set[str], run: Callable[[torch.dtype], Tensor]) -> Tensor:
    """Run a half of the VAE in ``dtype``; if 16 bits overflow, run it again in fp32, and only in fp32 from then on.

    Args:
        half: "encoder" or "decoder".
        overflowed: the halves that overflowed so far; updated.
        run: runs the half in the given type and returns its result.

    Raises:
        FloatingPointError: if the result is not finite in fp32 either.
    """
    if half_dtype(half, dtype, overflowed) != torch.float32:
        result = run(dtype)
        if torch.isfinite(result).all():
            return result
        log.warning("the VAE %s overflowed in %s; running it in fp32 from now on", half, str(dtype).removeprefix("torch."))
        overflowed.add(half)
    advice = "the VAE, its LoRA or the input is damaged, or they do not belong together"
    return check_finite(run(torch.float32), f"the result of the VAE {half} in fp32", advice)
