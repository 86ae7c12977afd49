"""Measures time and memory of the published procedure and of this project's, with random weights in the published layout.

Published: diffusers and peft with unmerged adapters, one tile of 64 latent cells at a time, the autoencoder untiled.
This project's: a merged and folded bundle, tiles in batches, the exact tiled autoencoder.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ...families.bundle import read_bundle, write_bundle
from ...families.load import from_bundle, load, merged_bundle
from ...families.restorer import Restorer
from ...families.sd3.config import (
    POOLED_SHAPE,
    TOKENS_SHAPE,
    TRANSFORMER_CONFIG,
    TRANSFORMER_TARGETS,
    VAE_CONFIG,
    VAE_TARGETS,
)
from ...families.sd3.fold import fold
from ...flow import TIMESTEP
from ...pipeline import Model, Options, restore
from ...system.atomic import reason, torch_writer, write_files, write_tensors
from ...system.device import release_memory
from ...system.memory import fits_beside
from ...system.peak import peak_memory
from ...weights.lora import TRANSFORMER_FILE, VAE_FILE, load_lora
from ...weights.prompt import POOLED_FILE, TOKENS_FILE, PromptEmbeds, load_prompt

STAGE_NAMES = ("encode", "step", "decode", "colour")
"""Stages of the pipeline, as ``restore`` reports its progress."""
BUNDLE = "ours.safetensors"
"""Name of the bundle of random weights."""
SCALE = 4


@dataclass(frozen=True)
class Architecture:
    """Configuration of a model in the published layout."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    tokens: tuple[int, ...]
    pooled: tuple[int, ...]
    rank: int


SIZES = {
    "tiny": Architecture(
        {**TRANSFORMER_CONFIG, "num_layers": 4, "num_attention_heads": 4, "caption_projection_dim": 256,
         "joint_attention_dim": 256, "pooled_projection_dim": 128},
        {**VAE_CONFIG, "block_out_channels": (32, 64, 64, 64)}, (1, 333, 256), (1, 128), 16,
    ),
    "sd3-medium": Architecture(TRANSFORMER_CONFIG, VAE_CONFIG, TOKENS_SHAPE, POOLED_SHAPE, 64),
}  # fmt: skip


@dataclass
class Timing:
    """Time and memory of restoring one image."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage."""
    peak_bytes: int | None = None
    """Peak memory beyond what was in use before: allocated on a CUDA device, resident on the CPU; None elsewhere."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Contender:
    """A loaded procedure."""

    name: str
    model: Model
    options: Options
    weights: int
    """Bytes of the weights."""
    load_seconds: float
    own: Restorer | None = None
    """The loaded model of our procedure, which can be compiled and limited in memory; None for the published one."""


def write_random_weights(folder: Path, size: Architecture, dtype: torch.dtype) -> None:
    """Write random weights: an SD3 folder, the LoRA pair and the embeddings, and our bundle made from them.

    Their standard deviation keeps activations finite in 16 bits.
    """
    torch.manual_seed(0)
    parts = (
        ("transformer", SD3Transformer2DModel, size.transformer, TRANSFORMER_TARGETS, TRANSFORMER_FILE),
        ("vae", AutoencoderKL, size.vae, VAE_TARGETS, VAE_FILE),
    )
    for name, kind, config, targets, file in parts:
        with torch.device("meta"):
            model = kind(**config)
        _fill(model, dtype)
        try:
            model.save_pretrained(folder / "sd3" / name)
        except SafetensorError as error:
            raise OSError(f"{folder / 'sd3' / name} could not be written: {reason(error)}") from error
        _add_adapter(model, size.rank, targets)
        adapters = {key: value for key, value in model.named_parameters() if ".default." in key}
        tensors = {
            "transformer." + key.replace(".default", ""): torch.randn(value.shape) * 0.01 for key, value in adapters.items()
        }
        write_tensors(folder / file, tensors)
        del model
    prompt = {TOKENS_FILE: torch.randn(size.tokens), POOLED_FILE: torch.randn(size.pooled)}
    write_files({folder / name: torch_writer(tensor) for name, tensor in prompt.items()})
    model = load(
        folder / "sd3", loras=_loras(folder), prompt=load_prompt(folder), device=torch.device("cpu"), dtype=torch.float32
    )
    fold(model.transformer, model.prompt.pooled)
    write_bundle(folder / BUNDLE, merged_bundle(model.transformer, model.vae, model.prompt, dtype, {}, {}))


def _add_adapter(model: Any, rank: int, targets: list[str] | str) -> None:
    from peft import LoraConfig  # here, so that tsdsr bench --help works without it

    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def _fill(model: nn.Module, dtype: torch.dtype) -> None:
    model.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(float(name.endswith("weight")))
        for buffer in model.buffers():
            buffer.normal_(std=0.02)


def _loras(folder: Path) -> Any:
    return load_lora(folder / TRANSFORMER_FILE), load_lora(folder / VAE_FILE)


def load_published(folder: Path, device: torch.device, dtype: torch.dtype) -> Contender:
    """Load the published procedure: unmerged adapters, one tile at a time."""
    start = time.perf_counter()
    prompt = load_prompt(folder).to(device, dtype)
    transformer = SD3Transformer2DModel.from_pretrained(folder / "sd3" / "transformer", torch_dtype=dtype)
    vae = AutoencoderKL.from_pretrained(folder / "sd3" / "vae", torch_dtype=dtype)
    for model, lora, targets in zip((transformer, vae), _loras(folder), (TRANSFORMER_TARGETS, VAE_TARGETS), strict=True):
        rank = next(iter(lora.pairs.values())).rank
        _add_adapter(model, rank, targets)
        state = {key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): value
                 for key, value in lora.state_dict().items()}  # fmt: skip
        _, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        nn.Module.to(model.requires_grad_(False).eval(), device, dtype)
    seconds = time.perf_counter() - start
    options = Options(scale=SCALE, recipe="official", tile_batch=1, process_size=0)
    model = _published_model(transformer, vae, prompt, dtype)
    return Contender("published", model, options, _bytes(transformer) + _bytes(vae), seconds)


def _published_model(transformer: Any, vae: Any, prompt: PromptEmbeds, dtype: torch.dtype) -> Model:
    def velocity(z: Tensor) -> Tensor:
        timestep = torch.full((len(z),), TIMESTEP, device=z.device, dtype=dtype)
        return transformer(z.to(dtype), prompt.tokens, prompt.pooled, timestep, return_dict=False)[0].to(z.dtype)

    return Model(
        encode=torch.inference_mode()(lambda x: vae.encode(x.to(dtype)).latent_dist.mode().to(x.dtype)),
        velocity=torch.inference_mode()(velocity),
        decode=torch.inference_mode()(lambda z: vae.decode(z.to(dtype), return_dict=False)[0].to(z.dtype)),
        scaling_factor=vae.config["scaling_factor"],
        vae_factor=2 ** (len(vae.config["block_out_channels"]) - 1),
        patch=transformer.config["patch_size"],
        longest_side=transformer.config["pos_embed_max_size"] * transformer.config["patch_size"],
    )


def load_ours(folder: Path, device: torch.device, dtype: torch.dtype, prompt_tokens: int | None = None) -> Contender:
    """Load this project's procedure, from the merged and folded bundle."""
    start = time.perf_counter()
    model: Restorer = from_bundle(read_bundle(folder / BUNDLE), device, dtype)
    if prompt_tokens is not None:
        model.prompt = model.prompt.pruned(prompt_tokens)
    seconds = time.perf_counter() - start
    options = Options(scale=SCALE, process_size=0)
    return Contender("ours", model.model(), options, _bytes(model.transformer) + _bytes(model.vae), seconds, model)


def _bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters())


def run_once(contender: Contender, side: int, device: torch.device) -> Timing:
    """Restore an image of ``side / SCALE`` pixels a side to ``side`` pixels."""
    image = torch.rand(1, 3, side // SCALE, side // SCALE, generator=torch.Generator().manual_seed(0))
    if contender.own is None or fits_beside(side, side, contender.own.free_memory()):
        image = image.to(device)
    timing = Timing()
    ends: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        synchronise(device)
        ends[stage] = time.perf_counter()

    release_memory(device)
    with peak_memory(device) as memory:
        start = time.perf_counter()
        restore(image, contender.model, contender.options, progress)
        synchronise(device)
        ends["colour"] = time.perf_counter()
    for stage in STAGE_NAMES:
        timing.seconds[stage] = ends[stage] - start
        start = ends[stage]
    timing.peak_bytes = memory.growth
    return timing


def count_flops(contender: Contender, side: int, device: torch.device) -> int:
    """Floating-point operations of one run: matrix products, convolutions and attention.

    The model must not be compiled yet: ``torch.compile`` never compiles what it first runs under a counter.
    """
    assert contender.own is None or contender.own.compiled is None
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # torch has no formula for it
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run_once(contender, side, device)
    return counter.get_total_flops()


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: a large matrix product, the best of five runs."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        torch.matmul(a, b)
        synchronise(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def machine(device: torch.device) -> str:
    """Description of the machine: device, torch and Python."""
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type in ("cuda", "xpu"):
        name = getattr(torch, device.type).get_device_name(device)
    elif device.type != "cpu":
        name = device.type
    return f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}"
