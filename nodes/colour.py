"""The colour fix on its own."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..tsdsr_core.colour import WAVELET_LEVELS, match_colour
from ..tsdsr_core.restore import bicubic
from . import inputs
from .host.schema import field, schema


class ColorFix(io.ComfyNode):
    """TSDSRColorFix: IMAGE with the colours of a reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TSDSRColorFix",
            "TSD-SR Color Fix",
            description="Gives a restored picture the colours of the one it was made from. Alpha is kept.",
            search_aliases=["color match", "colour fix", "wavelet color fix", "adain"],
            inputs=[
                field(io.Image, "image", tooltip="The restored picture."),
                field(io.Image, "reference", tooltip="The picture with the right colours, of any size; one, or one for each."),
                inputs.colour_fix("the reference"),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: Any, reference: Any, color_fix: dict[str, Any]) -> io.NodeOutput:
        content, alpha = inputs.to_core(image)
        style, _ = inputs.to_core(reference)
        if len(style) not in (1, len(content)):
            raise ValueError(f"{len(style)} references for {len(content)} images: give one, or one for each")
        style = bicubic(style, (content.shape[2], content.shape[3])).expand_as(content)
        levels = color_fix.get("wavelet_levels", WAVELET_LEVELS)
        fixed = match_colour(content, style, color_fix["color_fix"], levels).clamp(0, 1)
        return io.NodeOutput(inputs.to_host(fixed, alpha))
