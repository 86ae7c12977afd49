"""Draw the registry's icon and banner: a photograph that is coarse on the left and restored on the right.

python docs/draw_icon.py docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from tsdsr_core.diffusers_models import load_builtin
from tsdsr_core.image_io import read_picture
from tsdsr_core.restore import Options, restore

PHOTO = Path(__file__).parent / "examples" / "parrots.png"
ICON, BANNER = (400, 400), (1680, 720)
SLANT = 0.18
"""How far the dividing line leans, as a share of the width."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    low, restored = pictures()
    divided(low, restored, (250, 40, 650, 440), ICON).save(folder / "icon.png")
    banner = divided(low, restored, (0, 90, 768, 419), BANNER)
    draw = ImageDraw.Draw(banner)
    draw.text((70, 560), "TSD-SR", font=ImageFont.load_default(110), fill="white", stroke_width=5, stroke_fill=(0, 0, 0))
    banner.save(folder / "banner.jpg", quality=88)


def pictures() -> tuple[Image.Image, Image.Image]:
    """The photograph, coarse and restored, at one size."""
    picture = read_picture(PHOTO).rgb
    model = load_builtin(torch.device("cpu"), torch.float32)
    result = restore(picture, model.restorer(), Options(**model.defaults))
    restored = Image.fromarray((result[0] * 255).round().byte().permute(1, 2, 0).numpy())
    coarse = Image.open(PHOTO).convert("RGB").resize((48, 32), Image.Resampling.BOX)
    return coarse.resize(restored.size, Image.Resampling.NEAREST), restored


def divided(left: Image.Image, right: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """Both pictures, cropped to ``box`` and resized to ``size``, with a slanting line between them."""
    left, right = (p.crop(box).resize(size, Image.Resampling.LANCZOS) for p in (left, right))
    width, height = size
    top, bottom = (0.5 + SLANT / 2) * width, (0.5 - SLANT / 2) * width
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon([(0, 0), (top, 0), (bottom, height), (0, height)], fill=255)
    right.paste(left, mask=mask)
    ImageDraw.Draw(right).line([(top, 0), (bottom, height)], fill="white", width=max(3, width // 130))
    return right


if __name__ == "__main__":
    main()
