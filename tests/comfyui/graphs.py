"""What the host tests run: prompts, and random weights in SD3's layout where ComfyUI's loaders look for them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tsdsr_core.families.load import load
from tsdsr_core.families.sd3.config import VAE_CONFIG
from tsdsr_core.weights.lora import load_lora
from tsdsr_core.weights.prompt import load_prompt

from ..support.tiny import TRANSFORMER_TARGETS, VAE_TARGETS, randomised_lora
from . import host as host_module
from .host import Graph, Host

CPU = torch.device("cpu")
BUILTIN = "built-in model (no download)"
TRANSFORMER = {
    "sample_size": 64, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 64,
    "num_attention_heads": 2, "caption_projection_dim": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
}  # fmt: skip
"""Two narrow blocks that take the prompts of the real text encoders."""
TILES = {"tile": 16, "tile_overlap": 4, "tile_batch": 0}
UPSCALE = {
    "strength": 1.0, "color_fix": "wavelet", "color_fix.wavelet_levels": 0, "tile": 0, "tile_overlap": 8, "tile_batch": 0,
}  # fmt: skip


@dataclass
class SD3:
    """Random weights in SD3's layout: a tiny transformer, the VAE and one text encoder at full size."""

    folder: Path
    loras: Path
    embeddings: Path


def make_sd3(host: Host) -> SD3:
    """Write them under the names that the tests and the example workflows use."""
    models = host.base / "models"
    torch.manual_seed(0)
    transformer, vae = SD3Transformer2DModel(**TRANSFORMER), AutoencoderKL(**VAE_CONFIG)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.3)
    found = SD3(host.base / "sd3", models / "loras" / "tsdsr", models / "tsdsr" / "default")
    transformer.save_pretrained(found.folder / "transformer")
    vae.save_pretrained(found.folder / "vae")
    save_file(transformer.state_dict(), models / "diffusion_models" / "sd3.safetensors")
    save_file(vae.state_dict(), models / "vae" / "sd3.safetensors")
    found.loras.mkdir(parents=True)
    found.embeddings.mkdir(parents=True)
    for model, targets, name in ((transformer, TRANSFORMER_TARGETS, "transformer"), (vae, VAE_TARGETS, "vae")):
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        for pair in (found.loras, found.loras.with_name("tsdsr-mse")):
            pair.mkdir(exist_ok=True)
            tensors = {key: 0.3 * tensor for key, tensor in randomised_lora(model).items()}
            save_file(tensors, pair / f"{name}.safetensors")
    torch.save(torch.randn(1, 9, 4096), found.embeddings / "prompt_embeds.pt")
    torch.save(torch.randn(1, 2048), found.embeddings / "pool_embeds.pt")
    for path in found.embeddings.iterdir():
        shutil.copy(path, models / "tsdsr")
    _make_checkpoints(models)
    return found


def _make_checkpoints(models: Path) -> None:
    """``sd3_medium.safetensors``, and the same with a text encoder."""
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    save_file({key: value.half() for key, value in text.state_dict().items()}, models / "clip_l.safetensors")
    parts = [models / "diffusion_models" / "sd3.safetensors", models / "vae" / "sd3.safetensors", models / "clip_l.safetensors"]
    (models / "checkpoints").mkdir(exist_ok=True)
    script = host_module.ROOT / "tests" / "comfyui" / "pack" / "make_checkpoint.py"
    folder, python = host_module.find()
    subprocess.run([python, script, *parts, models / "checkpoints"], cwd=folder, check=True)


def core_sd3(sd3: SD3):
    """The same weights in the core."""
    loras = load_lora(sd3.loras / "transformer.safetensors"), load_lora(sd3.loras / "vae.safetensors")
    return load(sd3.folder, loras=loras, prompt=load_prompt(sd3.embeddings), device=CPU, dtype=torch.float32)


def load_sd3(graph: Graph, **changes) -> tuple[str, str]:
    """(LoRA loader, prompt loader)."""
    model = graph.add("UNETLoader", unet_name="sd3.safetensors", weight_dtype="default")
    vae = graph.add("VAELoader", vae_name="sd3.safetensors")
    inputs = {
        "transformer_lora": "tsdsr/transformer.safetensors", "vae_lora": "tsdsr/vae.safetensors", "transformer_strength": 1.0,
        "vae_strength": 1.0, "vae_precision": "fp32", **changes,
    }  # fmt: skip
    lora = graph.add("TSDSRLoadLora", model=(model, 0), vae=(vae, 0), **inputs)
    return lora, graph.add("TSDSRLoadPrompt", prompt="default/prompt_embeds.pt")


def builtin_graph(image: tuple[str, int] | str = "photo.png", graph: Graph | None = None, **changes) -> tuple[Graph, str]:
    """The all-in-one graph of the built-in model, and its SaveImage node."""
    graph = graph or Graph()
    source = (graph.add("LoadImage", image=image), 0) if isinstance(image, str) else image
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    inputs = {"model": (loader, 0), "vae": (loader, 1), "conditioning": (loader, 2), "size": "scale by", "size.factor": 2.0}
    result = graph.add("TSDSRUpscale", image=source, **{**inputs, **UPSCALE, **changes})
    return graph, graph.add("SaveImage", images=(result, 0), filename_prefix="test")


def stages(graph: Graph, model: tuple, vae: tuple, conditioning: tuple, name: str) -> str:
    """Encode, one step, decode and colour fix at the photo's own size; the node that saves it."""
    image = graph.add("LoadImage", image="photo.png")
    latent = graph.add("TSDSREncode", image=(image, 0), vae=vae)
    step = graph.add("TSDSROneStep", model=model, conditioning=conditioning, latent=(latent, 0), strength=1.0, **TILES)
    decoded = graph.add("TSDSRDecode", latent=(step, 0), vae=vae)
    levels = {"color_fix.wavelet_levels": 5}
    fixed = graph.add("TSDSRColorFix", image=(decoded, 0), reference=(image, 0), color_fix="wavelet", **levels)
    return graph.add("SaveImage", images=(fixed, 0), filename_prefix=name)


def differs(found: np.ndarray, expected: torch.Tensor) -> float:
    """Largest difference in 8-bit levels; the host's SaveImage cuts fractions off."""
    assert found.shape == tuple(expected.permute(1, 2, 0).shape)
    return np.abs(found - np.floor(expected.permute(1, 2, 0).numpy() * 255)).max()


def all_inputs(node: dict) -> Iterator[tuple[str, str, dict]]:
    """(name, type, options) of each input that ``/object_info`` tells of, with those that a DynamicCombo brings, once."""
    seen = set()
    for group in ("required", "optional"):
        for name, (kind, options) in node["input"].get(group, {}).items():
            yield name, kind, options
            for choice in options.get("options", []) if kind == "COMFY_DYNAMICCOMBO_V3" else []:
                for inner, inner_kind, inner_options in all_inputs({"input": choice["inputs"]}):
                    if inner not in seen:
                        yield f"{name}.{inner}", inner_kind, inner_options
                    seen.add(inner)


def frozen(node: dict) -> dict:
    """What a saved workflow relies on: inputs in their order with types, choices and ranges, and the outputs."""
    inputs = {}
    for name, kind, options in all_inputs(node):
        kept = {key: options[key] for key in ("min", "max") if key in options}
        if kind == "COMFY_DYNAMICCOMBO_V3":
            kept["choices"] = [choice["key"] for choice in options["options"]]
        elif kind == "COMBO" and name in ("dtype", "vae_precision"):  # the others list files
            kept["choices"] = options["options"]
        inputs[name] = [kind, kept] if kept else [kind]
    return {"inputs": inputs, "outputs": node["output"]}
