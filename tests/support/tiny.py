"""Tiny random models in exactly the published layouts: an SD3 folder, the LoRA pair and the embedding pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

TRANSFORMER = {
    "sample_size": 64, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "caption_projection_dim": 32, "joint_attention_dim": 24, "pooled_projection_dim": 20,
    "pos_embed_max_size": 96,
}  # fmt: skip
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 24, 24), "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 4,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
TRANSFORMER_TARGETS = [
    "to_k", "to_q", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "proj", "linear", "proj_out",
]  # fmt: skip
"""The modules that the published transformer LoRA adapts."""
_RESNETS = [f"down_blocks.{level}.resnets.{index}.conv{n}" for level in range(4) for index in range(2) for n in (1, 2)]
VAE_TARGETS = [
    f"encoder.{name}"
    for name in [
        "conv_in", *_RESNETS, "down_blocks.1.resnets.0.conv_shortcut", "down_blocks.2.resnets.0.conv_shortcut",
        *(f"down_blocks.{level}.downsamplers.0.conv" for level in range(3)),
        *(f"mid_block.attentions.0.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"mid_block.resnets.{index}.conv{n}" for index in range(2) for n in (1, 2)), "conv_out",
    ]
]  # fmt: skip
"""The modules that the published VAE LoRA adapts in SD3's autoencoder."""
RANK = 4


@dataclass(frozen=True)
class Published:
    """Folders in the published layouts, and the same models with unmerged PEFT adapters as the oracle."""

    sd3: Path
    loras: Path
    embeddings: Path
    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    tokens: Tensor
    pooled: Tensor


def make_published(folder: Path, seed: int = 0) -> Published:
    """Random models whose LoRAs change the result visibly."""
    torch.manual_seed(seed)
    transformer, vae = SD3Transformer2DModel(**TRANSFORMER), AutoencoderKL(**VAE)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.3)  # keeps most pixels off the clamp
    paths = folder / "sd3", folder / "tsdsr", folder / "default"
    transformer.save_pretrained(paths[0] / "transformer")
    vae.save_pretrained(paths[0] / "vae")
    for path in paths[1:]:
        path.mkdir(parents=True)
    for model, targets, name in ((transformer, TRANSFORMER_TARGETS, "transformer"), (vae, VAE_TARGETS, "vae")):
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
        save_file(randomised_lora(model), paths[1] / f"{name}.safetensors")
    tokens, pooled = torch.randn(1, 9, 24), torch.randn(1, 20)
    torch.save(tokens, paths[2] / "prompt_embeds.pt")
    torch.save(pooled, paths[2] / "pool_embeds.pt")
    return Published(*paths, transformer.eval(), vae.eval(), tokens, pooled)


def randomised_lora(model: torch.nn.Module) -> dict[str, Tensor]:
    """Fill the adapter (PEFT starts with B = 0) and return it under the published keys."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".default." in name:
            torch.nn.init.normal_(parameter, std=0.15)
            tensors["transformer." + name.replace(".default", "")] = parameter.detach().clone()
    return tensors


def photo(height: int, width: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Smooth random 8-bit pictures ``(batch, 3, height, width)`` in 0..1."""
    noise = torch.rand(batch, 3, height // 8 + 2, width // 8 + 2, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=False)
    return (smooth.clamp(0, 1) * 255).round() / 255


def disc(side: int, soft: float) -> tuple[Tensor, Tensor]:
    """A white disc ``(1, 3, side, side)`` over hidden black, and its 8-bit alpha with an edge ``soft`` pixels wide."""
    middle = torch.arange(side) + 0.5 - side / 2
    distance = torch.hypot(middle[:, None], middle)
    alpha = ((side / 3 - distance) / soft + 0.5).clamp(0, 1) if soft else (distance < side / 3).float()
    alpha = (alpha * 255).round()[None, None] / 255
    return (alpha > 0).float().repeat(1, 3, 1, 1), alpha
