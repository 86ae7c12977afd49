"""All in one: an image in, a restored and larger image out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..tsdsr_core.alpha import enlarge_alpha
from ..tsdsr_core.image_size import PROCESS_SIZE, SCALE_RANGE, Size, SizePlan, plan_target, target_size
from ..tsdsr_core.pipeline import Options, Stages, run_stages
from ..tsdsr_core.system.peak import peak_memory
from . import inputs
from .checks import checked
from .host import models, running, sampling
from .host import vae as host_vae
from .host.draft import Draft, draft_state
from .host.schema import Schema, field
from .report import Report
from .types import Conditioning, HostModel, Vae

_LARGEST = 16384
_MOST_PIXELS = _LARGEST**2
_SEARCHED = (
    "tsdsr", "tsd-sr", "upscale", "upscaler", "super resolution", "enlarge", "restore old photo", "photo restoration",
    "image restoration", "enhance", "denoise", "remove noise", "film grain", "sharpen", "deblur", "jpeg artifacts",
    "compression artifacts", "face restoration", "one-step diffusion",
    "老照片", "旧照片", "修复老照片", "照片修复", "图像修复", "修复", "复原", "放大", "图像放大", "超分辨率", "高清",
    "变清晰", "画质增强", "降噪", "去噪", "去模糊", "锐化", "老照片修復", "圖像放大", "超解析度",
    "古い写真", "写真修復", "写真を修復", "修復", "復元", "拡大", "アップスケール", "超解像", "高解像度",
    "高画質化", "ノイズ除去", "鮮明化", "ぼけ除去",
    "오래된 사진", "옛날 사진", "사진 복원", "이미지 복원", "복원", "복구", "확대", "업스케일", "초해상도",
    "고해상도", "화질 개선", "노이즈 제거", "선명하게",
)  # fmt: skip
"""What people search for, in the languages of the pack; the frontend ranks matches in the name of a node before these."""
_BY_FACTOR, _LONGER_SIDE, _SHORTER_SIDE, _WIDTH, _HEIGHT = "scale by", "longer side", "shorter side", "width", "height"


class Upscale(io.ComfyNode):
    """TSDSRUpscale: encode, step, decode and colour fix for each image of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side = field(
            io.Int, "pixels", default=2048, min=16, max=_LARGEST, tooltip="Length of that side of the result in pixels."
        )
        return Schema(
            node_id="TSDSRUpscale",
            display_name="TSD-SR Upscale",
            description="Restores and enlarges images in one step with TSD-SR: removes noise, blur and compression artifacts. "
            "Works with any image size, batches and alpha; tile sizes and memory use are automatic.",
            search_aliases=list(_SEARCHED),
            essentials_category="Image Tools",
            inputs=[
                field(io.Image, "image", tooltip="One image or a batch, of any size, with or without alpha."),
                field(io.Model, "model", tooltip=inputs.MODEL),
                field(io.Vae, "vae", tooltip=inputs.VAE),
                field(io.Conditioning, "conditioning", tooltip=inputs.CONDITIONING),
                field(
                    io.DynamicCombo, "size",
                    options=[
                        io.DynamicCombo.Option(_BY_FACTOR, [
                            field(
                                io.Float, "factor", default=4.0, min=SCALE_RANGE[0], max=SCALE_RANGE[1], step=0.05,
                                tooltip="How many times larger the result is. TSD-SR was trained for 4.",
                            )
                        ]),
                        *(io.DynamicCombo.Option(name, [side]) for name in (_LONGER_SIDE, _SHORTER_SIDE, _WIDTH, _HEIGHT)),
                    ],
                    tooltip="How the size of the result is set. The aspect ratio is always kept.",
                ),
                inputs.strength("VAE round trip only"),
                inputs.colour_fix("the input", automatic="as suits the model"),
                *inputs.tiling(),
                inputs.vae_tile(),
                inputs.draft(),
            ],
            outputs=[io.Image.Output()],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,  # its report is shown again with a result that is at hand
            accept_all_inputs=True,  # else a misspelt size or color_fix is no argument at all
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, draft: bool | None = False, **others: Any) -> Any:
        return draft_state(draft)

    @classmethod
    @checked
    def execute(
        cls, image: torch.Tensor, model: HostModel, vae: Vae, conditioning: Conditioning, size: dict[str, Any], strength: float,
        color_fix: dict[str, Any], tile: int, tile_overlap: int, tile_batch: int, vae_tile: int = 0, draft: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        sampling.check_model(model)
        sampling.check_conditioning(conditioning, model)
        models.check_vae(vae, model)
        decoder = Draft(vae) if draft else None
        rgb, alpha = inputs.to_core(image)
        defaults = {"process_size": PROCESS_SIZE, **models.defaults_of(model)}
        if color_fix.get("wavelet_levels"):  # 0 is automatic
            defaults["wavelet_levels"] = color_fix["wavelet_levels"]
        options = replace(
            inputs.step_options(strength, tile, tile_overlap, tile_batch), colour_fix=color_fix["color_fix"], **defaults
        )  # fmt: skip
        factor = host_vae.factor_of(vae)
        target = _target((rgb.shape[2], rgb.shape[3]), size)
        plan = plan_target(target, factor * model.model.diffusion_model.patch_size, options.process_size)
        host_vae.check_memory(vae, *plan.padded, vae_tile or None, decodes=not draft)
        progress = running.NodeProgress(len(rgb) * _units(plan, factor, model, options))
        report = Report()
        stages = Stages(
            encode=report.timed("encode", lambda pixels: host_vae.encode(vae, pixels, progress, vae_tile or None)),
            step=report.timed(
                "step",
                lambda z: sampling.run_one_step(model, conditioning, z, options, progress=progress, used=report.tiles),
            ),
            decode=report.timed(
                "decode",
                lambda latents: (
                    decoder.decode(latents, progress) if decoder else host_vae.decode(vae, latents, progress, vae_tile or None)
                ),
            ),
            image_device=running.image_device(vae.patcher),
        )
        result = rgb.new_empty(len(rgb), *target, 3 if alpha is None else 4)

        def finished(restored: torch.Tensor, *alpha: torch.Tensor) -> torch.Tensor:
            return inputs.to_host(restored, enlarge_alpha(alpha[0], target) if alpha else None)

        with peak_memory(vae.patcher.load_device) as memory:
            for index, restored in enumerate(run_stages(rgb, plan, stages, options, report.progress)):
                own = () if alpha is None else (alpha[index : index + 1],)
                result[index : index + 1] = stages.image_device.run(*target, finished, restored, *own)
                if len(rgb) > 1:
                    running.show_text(cls, f"{index + 1}/{len(rgb)} images")
        given = {"tile": tile, "tile_batch": tile_batch, **color_fix}
        automatic = [name for name, value in given.items() if value == 0]
        levels = options.wavelet_levels if "wavelet_levels" in color_fix else None
        text = report.text(len(rgb), (rgb.shape[2], rgb.shape[3]), plan, memory.peak, automatic, levels)
        return io.NodeOutput(result, ui=ui.PreviewText(text))


def _units(plan: SizePlan, factor: int, model: Any, options: Options) -> int:
    """Progress units of one image: its tiles in all stages."""
    latents = torch.empty(1, 1, plan.padded[0] // factor, plan.padded[1] // factor, dtype=torch.float32, device="meta")
    return 2 * host_vae.UNITS + len(sampling.plan_transformer_tiles(latents, model, options))


def _target(size: Size, wanted: dict[str, Any]) -> Size:
    """(height, width) of the result.

    Raises:
        ValueError: where it is more than 16 times the input, or too large for any memory.
    """
    target = _wanted(size, wanted)
    if target[0] * target[1] > _MOST_PIXELS:
        raise ValueError(
            f"the result would be {target[1]}x{target[0]} pixels: expected at most {_LARGEST}x{_LARGEST}; choose a smaller size"
        )
    return target


def _wanted(size: Size, wanted: dict[str, Any]) -> Size:
    how = wanted["size"]
    if how == _BY_FACTOR:
        return target_size(size, wanted["factor"])
    height, width = size
    reference = {_LONGER_SIDE: max(size), _SHORTER_SIDE: min(size), _WIDTH: width, _HEIGHT: height}[how]
    factor = wanted["pixels"] / reference
    if factor > SCALE_RANGE[1]:
        raise ValueError(f"{how} {wanted['pixels']} is {factor:.1f} times the input: expected at most {SCALE_RANGE[1]:g} times")
    return target_size(size, factor)
