"""Draw the registry's icon and banner and the thumbnails of the example workflows.

    python docs/draw_pictures.py

The built-in model's are what it does to docs/examples: the input, enlarged bicubically, on the left, its result on the
right. Those of SD3 medium show the input and the workflow's stages, since its weights are not at hand.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor

from tsdsr_core.diffusers_models import load_builtin
from tsdsr_core.image_io import read_picture
from tsdsr_core.restore import Options, bicubic, restore

ROOT = Path(__file__).parent.parent
ICON, BANNER, THUMBNAIL = (400, 400), (1680, 720), (640, 426)
SLANT = 0.18
"""How far the dividing line leans, as a share of the width."""
STAGES = {
    "TSD-SR with SD3 medium": ["SD3 medium", "TSD-SR LoRA", "Upscale"],
    "TSD-SR step by step": ["Enlarge", "Encode", "One Step", "Decode", "Color Fix"],
    "TSD-SR as a sampler": ["Encode", "SamplerCustomAdvanced", "Decode"],
    "TSD-SR after text to image": ["Text", "SD3 medium", "TSD-SR", "4x"],
}


def main() -> None:
    """Draw all of them."""
    images = ROOT / "docs" / "images"
    parrots, lighthouse = before_and_after("parrots"), before_and_after("lighthouse")
    divided(*parrots, (250, 40, 650, 440), ICON).save(images / "icon.png")
    banner = divided(*parrots, (0, 90, 768, 419), BANNER)
    title(banner, "TSD-SR", 110, (70, 560))
    banner.save(images / "banner.jpg", quality=88)
    whole = (0, 0, 768, 511)
    divided(*lighthouse, whole, THUMBNAIL).save(ROOT / "workflows" / "TSD-SR built-in model.jpg", quality=88)
    sheet([before_and_after(name) for name in ("lighthouse", "parrots", "window")]).save(
        ROOT / "workflows" / "TSD-SR a whole folder.jpg", quality=88
    )
    for name, stages in STAGES.items():
        chain(lighthouse[0].crop(whole).resize(THUMBNAIL), stages).save(ROOT / "workflows" / f"{name}.jpg", quality=88)


def before_and_after(name: str) -> tuple[Image.Image, Image.Image]:
    """An example, enlarged bicubically and restored by the built-in model."""
    picture = read_picture(ROOT / "docs" / "examples" / f"{name}.png").rgb
    model = load_builtin(torch.device("cpu"), torch.float32)
    result = restore(picture, model.restorer(), Options(**model.defaults))
    return as_image(bicubic(picture, (result.shape[2], result.shape[3]))), as_image(result)


def as_image(picture: Tensor) -> Image.Image:
    """``(1, 3, H, W)`` in 0..1."""
    return Image.fromarray((picture[0] * 255).round().byte().permute(1, 2, 0).numpy())


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


def sheet(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Three pictures, one above the other, each before and after."""
    result = Image.new("RGB", THUMBNAIL, "white")
    height = (THUMBNAIL[1] - 8) // 3
    for index, (left, right) in enumerate(pairs):
        width = left.width
        strip = width * height // THUMBNAIL[0]
        top = (left.height - strip) // 2
        result.paste(divided(left, right, (0, top, width, top + strip), (THUMBNAIL[0], height)), (0, index * (height + 4)))
    return result


def chain(photo: Image.Image, stages: list[str]) -> Image.Image:
    """A dimmed photo with the workflow's stages over it."""
    result = ImageEnhance.Brightness(photo).enhance(0.5)
    draw = ImageDraw.Draw(result)
    font = ImageFont.load_default(26)
    row, gap = 54, 16
    top = (result.height - len(stages) * row - (len(stages) - 1) * gap) // 2
    middle = result.width // 2
    for index, stage in enumerate(stages):
        half = 20 + draw.textlength(stage, font=font) / 2
        box = (middle - half, top, middle + half, top + row)
        if index:
            draw.line([(middle, top - gap), (middle, top)], fill="white", width=3)
        draw.rounded_rectangle(box, 12, fill=(53, 53, 53), outline="white", width=2)
        draw.text((middle, top + row // 2), stage, font=font, fill="white", anchor="mm")
        top += row + gap
    return result


def title(picture: Image.Image, text: str, size: int, place: tuple[int, int]) -> None:
    """Write ``text`` onto ``picture``."""
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text(place, text, font=font, fill="white", stroke_width=5, stroke_fill=(0, 0, 0))


if __name__ == "__main__":
    main()
