"""Checks the inputs of a node against its schema before any work.

The host checks only values that are set in the node, and not all of them: NaN passes, and so does everything that comes
over a connection.  A dynamic choice that is missing or misspelt does not reach ``execute`` at all.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..tsdsr_core.checks import check_choice, check_number, described
from ..tsdsr_core.system.memory import log
from ..tsdsr_core.weights.reading import is_dense

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that images, latents, masks and prompts may have; torch can hardly calculate with others."""
_OVERSHOOT = 0.25
"""How far outside 0..1 values may lie, as after resizing, before the log mentions that they are clipped."""


def checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Decorator of a node's ``execute``: a bad input is a ``ValueError`` that names it, what came and what is expected.

    Arguments that the schema does not know are dropped.
    """

    @functools.wraps(execute)
    def run(cls: Any, **given: Any) -> io.NodeOutput:
        with _usual_numbers():
            return execute(cls, **_checked(cls.define_schema().inputs, given))

    return run


@contextlib.contextmanager
def _usual_numbers() -> Iterator[None]:
    """Within it torch's default number type is fp32, in which the host builds models: other packs set another and forget it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _checked(fields: Sequence[Any], given: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for field in fields:
        name = f"{prefix}{field.id}"
        if field.id in given:
            found[field.id] = _check(field, name, given[field.id])
        elif not field.optional:
            if field.get_io_type() != "COMFY_DYNAMICCOMBO_V3":
                raise ValueError(f"{name} is missing: expected a value")
            keys = ", ".join(option.key for option in field.options)
            raise ValueError(f"{name} is missing or misspelt: expected one of {keys}")  # older hosts pass nothing unknown on
    return found


def _check(field: Any, name: str, value: Any) -> Any:
    kind = field.get_io_type()
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return _check_dynamic(field, name, value)
    if kind in ("INT", "FLOAT"):
        whole = kind == "INT"
        if whole and isinstance(value, float) and value.is_integer():
            value = int(value)  # nodes that calculate give whole numbers as floats
        return check_number(name, value, field.min, field.max, whole)
    if kind == "COMBO":
        return check_choice(name, value, field.options)
    if kind == "IMAGE":
        check_image(name, value)
        return value
    if kind in _LOOKS and not _LOOKS[kind](value):
        raise ValueError(f"{name} {described(value)}: expected a {kind}; check the node connected to it")
    if kind == "LATENT":
        samples = value["samples"]
        if isinstance(samples, Tensor) and not is_plain(samples):
            raise ValueError(f"{name} {_told(samples)}: expected a LATENT of floats, not empty; check the node connected to it")
    if kind == "CONDITIONING":
        for tokens, extra in value:
            check_prompt(name, tokens, extra.get("pooled_output"))
    return value


_LOOKS: dict[str, Callable[[Any], bool]] = {
    "BOOLEAN": lambda value: isinstance(value, bool),
    "STRING": lambda value: isinstance(value, str),
    "MODEL": lambda value: hasattr(value, "model"),
    "VAE": lambda value: getattr(value, "first_stage_model", None) is not None,  # what a checkpoint without a VAE gives
    "CONDITIONING": lambda value: (
        isinstance(value, list)
        and all(isinstance(part, list | tuple) and len(part) == 2 and isinstance(part[1], dict) for part in value)
    ),
    "LATENT": lambda value: isinstance(value, dict) and hasattr(value.get("samples"), "is_nested"),  # joint ones are no Tensor
}
"""Whether a value looks like one of its type; the nodes say the rest of what they need."""


def _check_dynamic(field: Any, name: str, value: Any) -> dict[str, Any]:
    """A dynamic choice is a dictionary of the chosen key and the inputs that this choice brings."""
    options = {option.key: option.inputs for option in field.options}
    chosen = check_choice(name, value.get(field.id) if isinstance(value, dict) else value, options)
    if not isinstance(value, dict):
        raise ValueError(f"{name} {described(value)}: this setting cannot be connected; choose it in the node")
    return {field.id: chosen, **_checked(options[chosen], value, f"{name}.")}


def is_plain(value: Any) -> bool:
    """Whether ``value`` is an ordinary tensor of floats, and not empty."""
    return isinstance(value, Tensor) and is_dense(value) and value.dtype in FLOATS and value.numel() > 0


def _told(value: Any) -> str:
    return described(value) + (f" of {value.dtype}" if isinstance(value, Tensor) else "")


def check_prompt(name: str, tokens: Any, pooled: Any) -> None:
    """Raise ``ValueError`` unless these are finite floats ``(B, tokens, width)`` and ``(B, width)``; None is left to others."""
    for part, value, shape in (("tokens", tokens, "(1, tokens, width)"), ("pooled output", pooled, "(1, width)")):
        if value is not None and (not is_plain(value) or value.ndim != shape.count(",") + 1 or not torch.isfinite(value).all()):
            raise ValueError(
                f"{name} with {part} {_told(value)}: expected finite floats {shape}; check the node connected to it"
            )


def check_latents(latents: Any, channels: int, belongs: str) -> None:
    """Raise ``ValueError`` unless ``latents`` are finite floats ``(B, channels, h, w)``; ``belongs`` says what to connect."""
    if not is_plain(latents) or latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"the latent is {_told(latents)}: expected floats of (batch, {channels}, height, width); {belongs}")
    if not torch.isfinite(latents).all():
        raise ValueError("the latent has NaN or infinite values: check the image, and set vae_precision to fp32")


def check_mask(mask: Any) -> Tensor:
    """The noise mask of a latent, clipped to 0..1; raises ``ValueError`` unless it is finite floats and not empty."""
    if not is_plain(mask) or mask.ndim < 2:
        raise ValueError(f"the latent's noise mask is {_told(mask)}: expected a MASK of floats in 0..1, not empty")
    if not torch.isfinite(mask).all():
        raise ValueError("the latent's noise mask has NaN or infinite values: expected 0..1; check the node that made it")
    return mask.clamp(0, 1)


def check_image(name: str, image: Any) -> None:
    """Raise ``ValueError`` unless ``image`` is an IMAGE: float ``(B, H, W, 1, 3 or 4)``, not empty, finite, not in 0..255."""
    expected = "expected an IMAGE (batch, height, width, channels) of floats in 0..1 with 1, 3 or 4 channels"
    if (
        not isinstance(image, Tensor)
        or not is_dense(image)
        or image.ndim != 4
        or image.shape[-1] not in (1, 3, 4)
        or 0 in image.shape
    ):
        raise ValueError(f"{name} {described(image)}: {expected}, not empty")
    if image.dtype not in FLOATS:
        raise ValueError(f"{name} of {image.dtype}: {expected}")
    low, high = (float(value) for value in image.aminmax())  # NaN where there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} has NaN or infinite values: {expected}; check the node connected to it")
    if image.mean(dtype=torch.promote_types(image.dtype, torch.float32)) > 1:
        raise ValueError(f"{name} has values from {low:g} to {high:g}, so the result would be white: {expected}")
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        log.warning("%s has values from %g to %g; values outside 0..1 are clipped", name, low, high)
