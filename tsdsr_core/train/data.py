"""Training images: folders of photographs and synthetic pictures -> pairs of (low quality, high quality) crops."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..image_io import read_picture
from ..jobs import collect
from ..restore import bicubic
from . import synthetic
from .degradations import degrade

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mixture:
    """What a batch is drawn from."""

    crop: int
    """Side of a high-quality crop in pixels, a multiple of ``scale``."""
    scale: int
    presets: tuple[tuple[str, float], ...]
    """Degradation presets and their weights."""
    synthetic_share: float
    """Share of synthetic pictures, 0..1."""


def load_photos(folders: Sequence[Path], smallest: int) -> list[Tensor]:
    """All colour images of ``folders`` whose sides are at least ``smallest`` pixels, as uint8 ``(3, H, W)``.

    A file that cannot be read is reported once and left out.

    Raises:
        ValueError: if no image is left.
    """
    photos = []
    for path in collect([str(folder) for folder in folders]).paths:
        try:
            picture = read_picture(path)
        except ValueError as error:
            log.warning("left out: %s", error)
            continue
        if not picture.grey and min(picture.rgb.shape[2:]) >= smallest:
            photos.append((picture.rgb[0] * 255).round().byte())
    if not photos:
        names = ", ".join(map(str, folders))
        raise ValueError(f"no colour image of at least {smallest}x{smallest} pixels in {names}")
    return photos


class PairSource:
    """Endless source of training pairs, a function of its generator's state alone."""

    def __init__(self, photos: Sequence[Tensor], mixture: Mixture, generator: Generator) -> None:
        self.photos = photos
        self.mixture = mixture
        self.generator = generator
        self.margin = 8 * mixture.scale  # the degradation needs surroundings, or each crop has false borders
        own = torch.Generator().manual_seed(0)  # apart from the run's, or a resumed run would draw other numbers
        side = max(256, mixture.crop + 2 * self.margin)
        self.synthetic = [synthetic.picture(side, own) for _ in range(32)]

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` pairs: bicubically enlarged low quality and high quality, each ``(count, 3, crop, crop)`` in 0..1."""
        pairs = [self._pair() for _ in range(count)]
        return torch.stack([low for low, _ in pairs]), torch.stack([high for _, high in pairs])

    def _pair(self) -> tuple[Tensor, Tensor]:
        high = self._crop(self.mixture.crop + 2 * self.margin)
        names, weights = zip(*self.mixture.presets, strict=True)
        preset = names[int(torch.multinomial(torch.tensor(weights, dtype=torch.float32), 1, generator=self.generator))]
        low = degrade(high, self.mixture.scale, preset, self.generator)
        enlarged = bicubic(low[None], (high.shape[1], high.shape[2]))[0]
        inner = slice(self.margin, self.margin + self.mixture.crop)
        return enlarged[:, inner, inner], high[:, inner, inner]

    def _crop(self, side: int) -> Tensor:
        if float(torch.rand((), generator=self.generator)) < self.mixture.synthetic_share:
            source = self.synthetic[self._int(len(self.synthetic))]
        else:
            source = self.photos[self._int(len(self.photos))]
        source_side = side
        if min(source.shape[1:]) >= 2 * side and self._int(2):  # half-size views: finer detail from the same photo
            source_side = 2 * side
        top = self._int(source.shape[1] - source_side + 1)
        left = self._int(source.shape[2] - source_side + 1)
        crop = source[:, top : top + source_side, left : left + source_side].float() / 255
        if source_side != side:
            crop = torch.nn.functional.avg_pool2d(crop, 2)
        if self._int(2):
            crop = crop.flip(2)
        return torch.rot90(crop, self._int(4), (1, 2))

    def _int(self, stop: int) -> int:
        return int(torch.randint(stop, (1,), generator=self.generator))
