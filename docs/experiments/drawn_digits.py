"""The data of ``digits.py``: digits drawn with a font, what degradation leaves of them, and their principal components."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE, COMPONENTS, LABELS = 28, 64, 10


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``(count, 1, 28, 28)`` in -1..1 and their labels: a font's digits, turned, slanted, stretched, thinner or bolder."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, LABELS, count)
    images = np.stack([_digit(int(label), random) for label in labels])
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1, torch.from_numpy(labels)


def _digit(label: int, random: np.random.Generator) -> np.ndarray:
    large = 4 * SIDE
    canvas = Image.new("L", (large, large))
    font = ImageFont.load_default(float(random.uniform(76, 96)))
    stroke = int(random.integers(0, 6))
    ImageDraw.Draw(canvas).text((large / 2, large / 2), str(label), 255, font, anchor="mm", stroke_width=stroke)
    angle, slant = random.normal(0, 0.12), random.normal(0, 0.2)
    wide, high = random.uniform(0.75, 1.25), random.uniform(0.85, 1.15)
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = np.array([[cosine, sine], [-sine, cosine]]) @ np.array([[1, slant], [0, 1]]) @ np.diag([1 / wide, 1 / high])
    centre = np.full(2, large / 2)
    shift = centre - matrix @ (centre + random.normal(0, 4, 2))
    placed = canvas.transform(
        (large, large), Image.Transform.AFFINE, (*matrix[0], shift[0], *matrix[1], shift[1]), Image.Resampling.BICUBIC
    )
    return np.array(placed.reduce(4))


def degrade(images: Tensor, seed: int) -> Tensor:
    """Blurred (sigma 1.5), four times smaller, with noise of 0.3, and enlarged bicubically: the same shape."""
    axis = torch.arange(-4, 5, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (axis / 1.5) ** 2)
    kernel = kernel / kernel.sum()
    blurred = F.conv2d(F.pad(images, (4,) * 4, mode="replicate"), (kernel[:, None] * kernel)[None, None])
    small = F.avg_pool2d(blurred, 4)
    noisy = small + 0.3 * torch.randn(small.shape, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noisy, SIDE, mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class Basis:
    """Principal components; latents ``(B, 64, 1, 1)`` of about unit variance in all."""

    mean: Tensor
    rows: Tensor
    scale: Tensor

    @staticmethod
    def of(images: Tensor) -> Basis:
        """The basis of digits."""
        flat = images.flatten(1)
        mean = flat.mean(0)
        rows = torch.linalg.svd(flat - mean, full_matrices=False)[2][:COMPONENTS]
        return Basis(mean, rows, ((flat - mean) @ rows.T).square().mean().sqrt())

    def encode(self, images: Tensor) -> Tensor:
        """Latents of ``(B, 1, 28, 28)``."""
        return ((images.flatten(1) - self.mean) @ self.rows.T / self.scale)[:, :, None, None]

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents."""
        return (z.flatten(1) * self.scale @ self.rows + self.mean).view(-1, 1, SIDE, SIDE)
