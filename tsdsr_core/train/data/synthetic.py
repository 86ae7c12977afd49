"""Synthetic training images: dead leaves, text and gradients, for edges and letters that few photographs have."""

from __future__ import annotations

import math
import string

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor


def draw_image(side: int, generator: Generator) -> Tensor:
    """A random image, uint8 ``(3, side, side)``, drawn at twice the size and averaged for smooth edges."""
    random = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    draw = (_dead_leaves, _text, _gradient)[random.choice(3, p=(0.6, 0.3, 0.1))]
    return torch.from_numpy(np.array(draw(2 * side, random).reduce(2))).permute(2, 0, 1)


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = random.integers(0, 256, 3)
    grey = random.random() * 0.7
    mean = (int(red) + int(green) + int(blue)) / 3
    return tuple(round(grey * mean + (1 - grey) * int(c)) for c in (red, green, blue))  # type: ignore[return-value]


def _dead_leaves(side: int, random: np.random.Generator) -> Image.Image:
    """Overlapping shapes whose radii follow r^-3, as scale-invariant as natural images (Lee, Mumford & Huang 2001)."""
    image = Image.new("RGB", (side, side), _colour(random))
    canvas = ImageDraw.Draw(image)
    low, high = 6.0, side / 4
    for _ in range(600):
        u = random.random()
        radius = (low**-2 + u * (high**-2 - low**-2)) ** -0.5
        x, y = random.random(2) * side
        if random.random() < 0.5:
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(random))
        else:
            turn, corners = random.random() * math.tau, int(random.integers(3, 6))
            angles = [turn + math.tau * i / corners for i in range(corners)]
            canvas.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=_colour(random))
    return image


def _text(side: int, random: np.random.Generator) -> Image.Image:
    image = _gradient(side, random) if random.random() < 0.5 else Image.new("RGB", (side, side), _colour(random))
    canvas = ImageDraw.Draw(image)
    letters = list(string.ascii_letters + string.digits + " .,:;-")
    y = 0.0
    while y < side:
        size = float(random.uniform(16, 64))
        line = "".join(random.choice(letters, 40))
        canvas.text((random.uniform(-20, 20), y), line, fill=_colour(random), font=ImageFont.load_default(size))
        y += 1.3 * size
    return image


def _gradient(side: int, random: np.random.Generator) -> Image.Image:
    angle = random.random() * math.tau
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    ramp = np.clip(0.5 + math.cos(angle) * x + math.sin(angle) * y, 0, 1)[..., None]
    start, end = np.array(_colour(random)), np.array(_colour(random))
    return Image.fromarray(((1 - ramp) * start + ramp * end).round().astype(np.uint8))
