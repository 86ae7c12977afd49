"""Draw the registry's icon and banner and the thumbnails of the example workflows.

    python docs/draw_pictures.py

The built-in model's are what it does to docs/examples: the input, enlarged bicubically, on the left, its result on the
right. Those of SD3 medium show a photo and the stages over it, since its weights are not at hand.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor

from tsdsr_core.families.load import load
from tsdsr_core.images.files import read_picture
from tsdsr_core.pipeline import Options, bicubic, restore

ROOT = Path(__file__).parent.parent
ICON, BANNER, THUMBNAIL = (400, 400), (1680, 720), (512, 512)
SLANT = 0.18
"""How far the dividing line leans, as a share of the width."""
Box = tuple[int, int, int, int]
STAGES: dict[str, tuple[str, Box, list[str]]] = {
    "02": ("window", (0, 0, 512, 512), ["Stable Diffusion 3", "TSD-SR LoRA", "Upscale"]),
    "04": ("parrots", (100, 0, 612, 512), ["LoRA tsdsr: g", "LoRA tsdsr-mse: 1 - g", "Upscale"]),
    "07": ("lighthouse", (0, 128, 384, 512), ["Enlarge", "Encode", "One Step", "Decode", "Color Fix"]),
    "08": ("window", (320, 64, 768, 512), ["Encode", "SamplerCustomAdvanced", "Decode"]),
    "09": ("lighthouse", (256, 0, 512, 256), ["Text", "Stable Diffusion 3", "TSD-SR", "2x"]),
}
"""By number of the template: an example, the part of its enlargement that is shown, and the stages."""


def main() -> None:
    """Draw all of them."""
    images = ROOT / "docs" / "images"
    names = {path.stem.split()[0]: path.with_suffix(".jpg") for path in (ROOT / "workflows").glob("*.json")}
    pairs = {name: before_and_after(name) for name in ("lighthouse", "parrots", "window")}
    divided(*pairs["parrots"], (250, 40, 650, 440), ICON).save(images / "icon.png")
    banner = divided(*pairs["parrots"], (0, 90, 768, 419), BANNER)
    title(banner, "TSD-SR", 110, (70, 560))
    banner.save(images / "banner.jpg", quality=88)
    thumbnails = {
        "01": divided(*pairs["lighthouse"], (120, 0, 632, 512), THUMBNAIL),
        "03": divided(*before_and_after("grainy", passes=(1.0, 4.0)), (60, 0, 828, 768), THUMBNAIL),
        "05": sheet(list(pairs.values())),
        "06": playing(divided(*pairs["parrots"], (180, 0, 692, 512), THUMBNAIL)),
    }
    for number, (name, box, stages) in STAGES.items():
        thumbnails[number] = chain(pairs[name][0].crop(box).resize(THUMBNAIL, Image.Resampling.LANCZOS), stages)
    for number, path in names.items():
        thumbnails[number].save(path, quality=88)


def before_and_after(name: str, passes: tuple[float, ...] = (4.0,)) -> tuple[Image.Image, Image.Image]:
    """An example, enlarged bicubically and restored by the built-in model, once with each of the factors ``passes``."""
    picture = result = read_picture(ROOT / "docs" / "examples" / f"{name}.png").rgb
    model = load("builtin", device=torch.device("cpu"), dtype=torch.float32)
    for factor in passes:
        result = restore(result, model.model(), replace(Options(**model.defaults), scale=factor))
    return as_image(bicubic(picture, (result.shape[2], result.shape[3]))), as_image(result)


def as_image(picture: Tensor) -> Image.Image:
    """``(1, 3, H, W)`` in 0..1."""
    return Image.fromarray((picture[0] * 255).round().byte().permute(1, 2, 0).numpy())


def divided(left: Image.Image, right: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
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


def playing(picture: Image.Image) -> Image.Image:
    """A picture with the sign of a video in its middle."""
    draw, (x, y) = ImageDraw.Draw(picture, "RGBA"), (picture.width / 2, picture.height / 2)
    draw.ellipse((x - 60, y - 60, x + 60, y + 60), fill=(0, 0, 0, 150), outline="white", width=4)
    draw.polygon([(x - 20, y - 32), (x - 20, y + 32), (x + 36, y)], fill="white")
    return picture


def title(picture: Image.Image, text: str, size: int, place: tuple[int, int]) -> None:
    """Write ``text`` onto ``picture``."""
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text(place, text, font=font, fill="white", stroke_width=5, stroke_fill=(0, 0, 0))


if __name__ == "__main__":
    main()
