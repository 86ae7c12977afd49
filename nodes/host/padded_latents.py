"""Where the image lies in a padded latent, and whether it still lies there.

A LATENT is a dict that other nodes copy while they change its tensor, so a size kept in the dict may no longer hold:
after LatentFlip the padding is on the other side.  The area is therefore used only where the padded cells of the latent
are recognised: each must be a linear combination of the values that TSD-SR Encode and the step had in that cell.  This
allows for scaling, masks, and blending or compositing with the restored latent; flips and quarter-turns are tried too.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..types import Latent

KEY: Final = "tsdsr_placement"
"""Entry of a LATENT with its ``Placement``."""
_TOLERANCE = 2**-7
"""Of a cell's length: rounding to bf16 changes no number by more than half of it; shifts and scales stay far below."""
_FIRST = 8
"""Cells that are looked at first: they settle most comparisons."""


class Area(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class Placement:
    """Recognises the latents of one call of TSD-SR Encode, and what the step makes of them; kept in their dict.

    The step adds its results through ``follow``, since the host's sampler nodes give our sampler the tensor alone.
    """

    def __init__(self, latents: Tensor, size: tuple[int, int], factor: int) -> None:
        """For ``latents`` ``(B, C, h, w)`` whose upper left ``size`` (height, width) in pixels is the image."""
        self.factor = factor
        self.known = [_Known(Area(0, 0, *size), factor, latents)]
        _alive.add(self)

    def find(self, image: Tensor) -> Area | None:
        """The area of the image in one latent ``(C, h, w)`` on the CPU; None where the latent is not recognised."""
        for mirrored in (False, True):
            upright = image.flip(-1) if mirrored else image
            for quarters in range(4):
                turned = torch.rot90(upright, quarters, (-2, -1))
                for known in self.known:
                    if known.recognises(turned):
                        pixels = turned.shape[-2] * self.factor, turned.shape[-1] * self.factor
                        return _turned_back(known.area, pixels, quarters, mirrored)
        return None

    def follow(self, before: Tensor, change: Tensor) -> None:
        """As the function ``follow``, for the images of ``before`` that are recognised; on the CPU."""
        images: dict[Area, list[int]] = {}
        for index, image in enumerate(before):
            area = self.find(image)
            if area and self.find(image + change[index]) != area:
                images.setdefault(area, []).append(index)
        self.known += [_Known(area, self.factor, before[kept], change[kept]) for area, kept in images.items()]


_alive: weakref.WeakSet[Placement] = weakref.WeakSet()


class _Known:
    """Latents of one shape and area: for each padded cell, a basis of the values that may be there."""

    def __init__(self, area: Area, factor: int, *latents: Tensor) -> None:
        self.area = area
        self.shape = latents[0].shape[1:]
        self.padded = _padded_cells(area, factor, self.shape)
        values = [_cells(part.to("cpu", torch.float32), self.padded) for part in latents]
        self.basis = torch.linalg.qr(torch.stack(values, -1)).Q  # (B, cells, C, parts)

    def recognises(self, image: Tensor) -> bool:
        """Whether the padded cells of ``image`` ``(C, h, w)`` fit one of the latents."""
        if image.shape != self.shape:
            return False
        values, basis = _cells(image, self.padded)[..., None], self.basis
        for some in (slice(_FIRST), slice(None)):
            part, spaces = values[some], basis[:, some]
            other = part - spaces @ (spaces.mT @ part)
            fits = other.norm(dim=-2) < _TOLERANCE * part.norm(dim=-2)
            basis = basis[fits.flatten(1).all(1)]
        return len(basis) > 0


def follow(before: Tensor, change: Tensor) -> None:
    """Note that combinations of ``before`` and ``change``, both ``(B, C, h, w)``, have their image where ``before`` has it."""
    if _alive:
        before, change = before.to("cpu", torch.float32), change.to("cpu", torch.float32)
    for placement in list(_alive):
        placement.follow(before, change)


def image_area(latent: Latent, factor: int) -> Area:
    """The smallest area of a LATENT ``(B, C, h, w)`` that holds all its images; the whole where one is not recognised.

    Args:
        factor: pixels per latent cell of the VAE that decodes it.
    """
    samples, own = latent["samples"], latent.get(KEY)
    whole = Area(0, 0, samples.shape[2] * factor, samples.shape[3] * factor)
    if not isinstance(own, Placement) or own.factor != factor:
        return whole
    others = [placement for placement in list(_alive) if placement is not own and placement.factor == factor]
    areas: set[Area] = set()
    for image in samples.to("cpu", torch.float32):
        found = own.find(image)
        areas |= {found} if found else {area for other in others if (area := other.find(image))} or {whole}
    if areas == {whole}:
        logging.info(
            "TSD-SR Decode: the latent was changed, so the padding added by TSD-SR Encode was not found; nothing is cropped"
        )
    top, left = min(area.top for area in areas), min(area.left for area in areas)
    bottom, right = max(area.top + area.height for area in areas), max(area.left + area.width for area in areas)
    return Area(top, left, bottom - top, right - left)


def fitted_mask(mask: Tensor, latents: Tensor, stretched: bool = False) -> Tensor:
    """A noise mask on the images of padded latents ``(B, C, h, w)``; beyond them it goes on as at their edge.

    The host stretches a mask over the padding, so that it lies up to two cells beside its place.

    Args:
        mask: ``(N, c, H, W)``; if there are fewer masks than images, they repeat.
        stretched: whether the host has done that already; undone, edges lie in their place but are a cell wider.

    Returns:
        ``(B, c, h, w)`` in fp32; ``mask`` where no padding is known or where the mask is as large as that with the image.
    """
    known = [_known_area(image) for image in latents.to("cpu", torch.float32)] if _alive else []
    cells, factor = latents.shape[2:], next((found[1] for found in known if found), 0)
    padded_size = torch.Size(side * factor for side in cells)
    if not factor or (mask.shape[2:] in (cells, padded_size) and not stretched):
        return mask
    whole = Area(0, 0, *padded_size), factor
    masks = mask.to("cpu", torch.float32)
    fitted = [_sampled(masks[index % len(mask)], cells, *(found or whole)) for index, found in enumerate(known)]
    return torch.stack(fitted).to(mask.device)


def _known_area(image: Tensor) -> tuple[Area, int] | None:
    """Where the image of one latent ``(C, h, w)`` lies, and the pixels per cell."""
    for placement in list(_alive):
        if area := placement.find(image):
            return area, placement.factor
    return None


def _sampled(mask: Tensor, cells: torch.Size, area: Area, factor: int) -> Tensor:
    """``mask`` ``(c, H, W)``, which covers ``area``, at the centres of latent cells: bilinear, as the host resizes masks."""
    places = []
    for count, start, length, size in zip(cells, area[:2], area[2:], mask.shape[1:], strict=True):
        centres = (torch.arange(count, dtype=torch.float32) + 0.5) * factor
        places.append((2 * (centres - start) / length - 1).clamp(1 / size - 1, 1 - 1 / size))
    rows, columns = torch.meshgrid(*places, indexing="ij")
    return F.grid_sample(mask[None], torch.stack((columns, rows), -1)[None], mode="bilinear", align_corners=False)[0]


def _padded_cells(area: Area, factor: int, shape: tuple[int, ...]) -> Tensor:
    """Mask ``(h, w)`` of the cells that are not wholly within ``area``."""
    rows, columns = (torch.arange(side, dtype=torch.int64) * factor for side in shape[-2:])
    inside_rows = (rows >= area.top) & (rows + factor <= area.top + area.height)
    inside_columns = (columns >= area.left) & (columns + factor <= area.left + area.width)
    return ~(inside_rows[:, None] & inside_columns)


def _cells(latents: Tensor, chosen: Tensor) -> Tensor:
    """Values ``(..., cells, C)`` of the chosen cells of ``(..., C, h, w)``."""
    return latents[..., chosen].movedim(-1, -2)


def _turned_back(area: Area, pixels: tuple[int, int], quarters: int, mirrored: bool) -> Area:
    """``area`` of an image of the size ``pixels``, as it was before the image was mirrored and turned by ``quarters``."""
    height, width = pixels
    for _ in range(-quarters % 4):
        area = Area(width - area.left - area.width, area.top, area.width, area.height)
        height, width = width, height
    return area._replace(left=width - area.left - area.width) if mirrored else area
