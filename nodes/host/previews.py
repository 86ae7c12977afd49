"""Previews of unfinished images: small, and their errors never end a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("tsdsr")

SIDE = 64
"""Latent cells; a previewer gets no more of them, since it may decode them with a network, all at once."""


class WholeLatents(Tensor):
    """Latents whose parts are those of their thumbnail, as long as there is one.

    The host's callback shows the first image of what it is given and keeps the whole as the denoised output.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    thumbnail: Tensor | None = None

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(index) if self.thumbnail is None else self.thumbnail[index]


def small(latents: Tensor) -> Tensor:
    """``latents`` ``(B, C, h, w)``, or a thumbnail of at most ``SIDE`` cells a side."""
    factor = -(-max(latents.shape[2:]) // SIDE)
    if factor == 1:
        return latents
    return F.avg_pool2d(latents, [min(factor, side) for side in latents.shape[2:]], ceil_mode=True)


def guarded(callback: Callable[[int, Tensor, Tensor, int], None]) -> Callable[[int, Tensor, Tensor, int], None]:
    """The host's sampling ``callback`` with a thumbnail to show, whose errors end no run.

    At the last step it gets the whole latents to keep.
    """
    reported = False

    def guard(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        nonlocal reported
        whole = None
        try:
            given = small(x0)
            if step + 1 == total and given is not x0:
                whole = x0.as_subclass(WholeLatents)
                whole.thumbnail, given = given, whole
            callback(step, given, x, total)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # previewers are other people's networks
            if not reported:
                log.warning("the preview failed: %s", str(error).partition("\n")[0])
            reported = True
        if whole is not None:
            whole.thumbnail = None

    return guard
