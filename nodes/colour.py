"""The colour fix on its own."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..tsdsr_core.colour import WAVELET_LEVELS, match_colour
from ..tsdsr_core.pipeline import bicubic
from . import inputs
from .checks import checked
from .host import models, running
from .host.schema import Schema, field
from .types import HostModel


class ColorFix(io.ComfyNode):
    """TSDSRColorFix: IMAGE with the colours of a reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TSDSRColorFix",
            display_name="TSD-SR Color Fix",
            description="Gives a restored image the colours of a reference, usually the original image. Alpha is kept.",
            search_aliases=["color match", "colour fix", "wavelet color fix", "adain"],
            inputs=[
                field(io.Image, "image", tooltip="The restored image or batch."),
                field(
                    io.Image,
                    "reference",
                    tooltip="The image with the right colours, of any size: one for all images, or one per image.",
                ),
                inputs.colour_fix("the reference", automatic="as suits the connected model; 5 without one"),
                field(
                    io.Model, "model", optional=True,
                    tooltip="Optional. The model that restored the image, for its number of wavelet levels.",
                ),
            ],
            outputs=[io.Image.Output()],
            accept_all_inputs=True,  # else a misspelt color_fix is no argument at all
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, image: Tensor, reference: Tensor, color_fix: dict[str, Any], model: HostModel | None = None
    ) -> io.NodeOutput:  # fmt: skip
        content, alpha = inputs.to_core(image)
        style, _ = inputs.to_core(reference)
        if len(style) not in (1, len(content)):
            raise ValueError(f"reference has {len(style)} images for {len(content)} images: connect one, or one per image")
        suitable = models.defaults_of(model) if model is not None else {}
        levels = color_fix.get("wavelet_levels") or suitable.get("wavelet_levels", WAVELET_LEVELS)
        height, width = content.shape[2:]
        result = content.new_empty(len(content), height, width, 3 if alpha is None else 4)
        if alpha is not None:
            result[..., 3:] = alpha.movedim(1, -1)

        def fix(each: Tensor, style: Tensor) -> Tensor:
            reference = bicubic(style, (height, width))
            return inputs.to_host(match_colour(each, reference, color_fix["color_fix"], levels).clamp(0, 1), None)

        device = running.image_device(model)
        for index, each in enumerate(content.split(1)):  # one by one, so that memory grows by the result alone
            own = style[index : index + 1] if len(style) > 1 else style
            result[index : index + 1, ..., :3] = device.run(height, width, fix, each, own)
        return io.NodeOutput(result)
