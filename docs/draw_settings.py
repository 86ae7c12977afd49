"""Draw the pictures of the help pages that show what a setting does.

    python docs/draw_settings.py

Writes web/docs/images/strength.png, tile.png and color_fix.png: parts of docs/examples, restored by the built-in model.  For
the colour fixes the result has a strong colour cast, since the model's own is hardly visible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from draw_pictures import as_image
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tsdsr_core.colour import METHODS, match_colour
from tsdsr_core.families.load import load
from tsdsr_core.images.files import read_picture
from tsdsr_core.pipeline import Options, bicubic, restore

ROOT = Path(__file__).parent.parent
LABEL, GAP = 22, 4
Box = tuple[int, int, int, int]
CAST = torch.tensor([0.9, 0.75, 0.6])
"""Too warm and too pale, by red, green and blue."""


def main() -> None:
    """Draw all of them."""
    model = load("builtin", device=torch.device("cpu"), dtype=torch.float32)
    usual = Options(**model.defaults)

    def restored(image: Tensor, **changes) -> Tensor:
        return restore(image, model.model(), replace(usual, **changes))

    images = ROOT / "web" / "docs" / "images"
    window, parrots = (read_picture(ROOT / "docs" / "examples" / f"{name}.png").rgb for name in ("window", "parrots"))
    dials = {f"strength {value:g}": restored(window, strength=value) for value in (0.0, 0.5, 1.0)}
    grid({"input": enlarged(window), **dials}, (200, 160, 400, 360)).save(images / "strength.png", optimize=True)
    whole, small = restored(window), restored(window, tile=16, tile_overlap=0)
    print(f"tile 16: {255 * float((whole - small).abs().mean()):.1f} levels from automatic on average")
    tiles = {"automatic": whole, "tile 16, overlap 0": small, "difference, 10 times": (10 * (whole - small).abs()).clamp(0, 1)}
    grid({"input": enlarged(window), **tiles}, (320, 120, 560, 320)).save(images / "tile.png", optimize=True)
    reference, result = enlarged(parrots), (restored(parrots) * CAST.view(3, 1, 1) + 0.1).clamp(0, 1)
    fixes = {name: match_colour(result, reference, name, usual.wavelet_levels).clamp(0, 1) for name in METHODS}
    grid({"input": reference, **fixes}, (100, 32, 740, 512), 3).save(images / "color_fix.png", optimize=True)


def enlarged(image: Tensor) -> Tensor:
    """``image``, four times as large without a model."""
    return bicubic(image, (4 * image.shape[2], 4 * image.shape[3]))


def grid(pictures: Mapping[str, Tensor], box: Box, smaller: int = 1) -> Image.Image:
    """The same part of all pictures in two columns, since the page is narrow, each with its name above.

    Args:
        smaller: how many times smaller they are drawn.
    """
    width, height = (box[2] - box[0]) // smaller, (box[3] - box[1]) // smaller + LABEL
    result = Image.new("RGB", (2 * width + GAP, -(-len(pictures) // 2) * height), "white")
    draw, font = ImageDraw.Draw(result), ImageFont.load_default(14)
    for index, (name, picture) in enumerate(pictures.items()):
        left, top = index % 2 * (width + GAP), index // 2 * height
        draw.text((left + width // 2, top + LABEL // 2), name, font=font, fill="black", anchor="mm")
        result.paste(as_image(picture).crop(box).reduce(smaller), (left, top + LABEL))
    return result


if __name__ == "__main__":
    main()
