"""Says what a weight file is, from its first bytes or from the names and shapes of its tensors; no tensor is read.

``recognise`` goes through ``_RECORDS`` in order and takes the first whose names are in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .reading import SUFFIXES, first_bytes, tensor_shapes


@dataclass(frozen=True)
class Kind:
    """What a weight file is."""

    name: str
    """Such as "a LoRA"."""
    use: str
    """What to do with it, or instead of it."""
    fits: bool = False
    """Whether TSD-SR works with it, in ComfyUI at least."""

    @property
    def is_lora(self) -> bool:
        """Whether it is an adapter of any kind."""
        return self.use in (_PEFT, _LORA)


_FOLDER = (
    "on the command line, give --model a folder with transformer/ and vae/ in diffusers' layout, such as "
    "stabilityai/stable-diffusion-3-medium-diffusers"
)
_SD3 = f"in ComfyUI, open it with Load Checkpoint and connect TSD-SR Load LoRA; {_FOLDER}"
_BARE_SD3 = f"in ComfyUI, open it with Load Diffusion Model and connect TSD-SR Load LoRA; {_FOLDER}"
_OTHER = f"TSD-SR works with Stable Diffusion 3 medium: {_FOLDER}"
_PEFT = "expected a LoRA with PEFT's keys"
_LORA = "choose it in TSD-SR Load LoRA, or give --lora-dir a folder with the transformer's and the VAE's LoRA"
_PROMPT = "choose it in TSD-SR Load Prompt, or give it as --embedding-dir"
_NEEDLESS = "TSD-SR needs no text encoder: its prompt embeddings take the place of one"


@dataclass(frozen=True)
class _Record:
    name: str
    use: str
    needs: tuple[str, ...]
    """Patterns, each of which some key must have."""
    lacks: str = "$^"
    """Pattern that no key may have."""
    fits: bool = False


_JOINT = r"(^|\.)joint_blocks\.\d+\."
_DIFFUSERS_SD3 = (r"(^|\.)transformer_blocks\.\d+\.attn\.add_[qkv]_proj\.", r"(^|\.)pos_embed\.(proj|pos_embed)\b")
_UNET = r"(^|\.)input_blocks\.\d+\."
_DIFFUSERS_UNET = (r"(^|\.)down_blocks\.\d+\.", r"(^|\.)time_embedding\.")
_RECORDS = (
    _Record("DoRA", _PEFT, (r"lora_magnitude_vector|dora_scale",)),
    _Record("LoHa", _PEFT, (r"\.hada_",)),
    _Record("LoKr", _PEFT, (r"\.lokr_",)),
    _Record("OFT", _PEFT, (r"\.oft_",)),
    _Record("a Tucker-decomposed LoRA", _PEFT, (r"\.lora_mid\.",)),
    _Record("a LoRA with biases", _PEFT, (r"\.lora_B(\.\w+)?\.bias$",)),
    _Record("a LoRA under the names of kohya's trainers", _PEFT, (r"\.lora_(down|up)\.",)),
    _Record("a LoRA under the names of old diffusers", _PEFT, (r"\.lora\.(down|up)\.",)),
    _Record("full differences", _PEFT, (r"\.diff(_b)?$",)),
    _Record(
        "a LoRA with whole weights or biases, PEFT's modules_to_save or bias",
        _PEFT,
        (r"\.lora_A\.", r"^(?!.*lora_).*\.(weight|bias)$"),
    ),
    _Record("a LoRA", _LORA, (r"\.lora_[AB]\.",), fits=True),
    _Record("prompt embeddings", _PROMPT, (r"^prompt_embeds$", r"^pooled_prompt_embeds$"), fits=True),
    _Record("a ControlNet", _OTHER, (r"(^|\.)(controlnet_blocks|controlnet_cond_embedding|control_model|zero_convs)\.",)),
    _Record("a Stable Diffusion 3.5 medium model", _OTHER, (_JOINT, r"\.x_block\.attn2\.")),
    _Record("a Stable Diffusion 3.5 large model", _OTHER, (_JOINT, r"\.attn\.ln_[qk]\.")),
    _Record("a Stable Diffusion 3 medium model", _SD3, (_JOINT,), fits=True),
    _Record("a Flux model", _OTHER, (r"(^|\.)double_blocks\.\d+\.img_attn\.", r"(^|\.)single_blocks\."), r"token_refiner"),
    _Record("a Flux model in diffusers' layout", _OTHER, (r"(^|\.)single_transformer_blocks\.",), r"(^|\.)pos_embed\."),
    _Record("a Stable Diffusion 3.5 transformer in diffusers' layout", _OTHER, (*_DIFFUSERS_SD3, r"\.attn\.norm_q\.")),
    _Record("a Stable Diffusion 3 transformer in diffusers' layout", _BARE_SD3, _DIFFUSERS_SD3, fits=True),
    _Record("a Stable Diffusion XL model", _OTHER, (_UNET, r"(^|\.)label_emb\.|^conditioner\."), r"time_stack"),
    _Record("a Stable Diffusion 2 model", _OTHER, (_UNET, r"^cond_stage_model\.model\.")),
    _Record("a Stable Diffusion 1 model", _OTHER, (_UNET, r"^cond_stage_model\.transformer\.")),
    _Record("a UNet of Stable Diffusion 1 or 2", _OTHER, (_UNET,), r"time_stack|label_emb"),
    _Record("a Stable Diffusion XL UNet in diffusers' layout", _OTHER, (*_DIFFUSERS_UNET, r"(^|\.)add_embedding\.")),
    _Record("a Stable Diffusion 1 or 2 UNet in diffusers' layout", _OTHER, _DIFFUSERS_UNET),
    _Record("a CLIP text encoder", _NEEDLESS, (r"(^|\.)text_model\.encoder\.layers\.\d",)),
    _Record("a T5 text encoder", _NEEDLESS, (r"(^|\.)encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.",)),
    _Record("a network of an ESRGAN upscaler", _OTHER, (r"(^|\.)(conv_first|model\.0)\.weight$", r"\.(rdb|RDB)\d\.")),
    _Record("a TAESD, the small autoencoder of previews", _OTHER, (r"^(\w+\.)?(layers\.)?\d+\.conv\.\d+\.weight$",)),
)
_GGUF = b"GGUF"
_TORCH, _OLD_TORCH = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Beginnings of files of ``torch.save``, and of those in its old format."""
_ARCHITECTURE = re.compile(rb"\x14\0{7}general\.architecture\x08\0{3}.{8}", re.DOTALL)
_LATENTS = 16
"""Latent channels of Stable Diffusion 3."""
_VAE_USE = "in ComfyUI, open it with Load VAE; on the command line, the VAE is the folder vae/ in the model's folder"
_VAE = (r"(^|\.)encoder\.(down|down_blocks)\.\d+\.", r"(^|\.)decoder\.(up|up_blocks)\.\d+\.")
_SCALED = r"\.comfy_quant$|(^|\.)scaled_fp8$|\.(scale_weight|weight_scale)$"
"""Keys of 8-bit weights that ComfyUI reads."""
_QUANTISED = (
    ("bitsandbytes, 4 bits", r"\.(quant_state\.bitsandbytes__\w+|nested_absmax|absmax)$"),
    ("bitsandbytes, 8 bits", r"\.(SCB|weight_format)$"),
    ("quanto", r"\.weight\._(data|scale)$"),
    ("Nunchaku or GPTQ", r"\.(qweight|wscales|qzeros)$"),
)
"""Names of quantisations that ComfyUI does not read itself, and patterns of the keys by which they are recognised."""
_IN_FILE = {
    "VAE": r"^(first_stage_model|vae)\.",
    "text encoders": r"^(text_encoders|cond_stage_model|conditioner)\.",
}
"""What a checkpoint of a model may have beside it."""


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Kind | None:
    """What a file with tensors of these shapes by key is; None if it is not recognised.

    >>> recognise({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}).name
    'a Stable Diffusion 3 medium model, without VAE, without text encoders'
    """
    text = "\n".join(shapes)

    def has(pattern: str) -> bool:
        return re.search(pattern, text, re.MULTILINE) is not None

    quantised = next((f", quantised ({name})" for name, pattern in _QUANTISED if has(pattern)), "")
    scaled = ", in scaled 8 bits" if has(_SCALED) else ""
    for record in _RECORDS:
        if not all(map(has, record.needs)) or has(record.lacks):
            continue
        if quantised:
            return Kind(record.name + quantised, _OTHER)
        if not has(_JOINT) and not has(_UNET):
            return Kind(record.name + scaled, record.use, record.fits)
        contents = "".join(f", {'with' if has(pattern) else 'without'} {part}" for part, pattern in _IN_FILE.items())
        use = _BARE_SD3 if record.use == _SD3 and not has(_IN_FILE["VAE"]) else record.use
        return Kind(record.name + scaled + contents, use, record.fits)
    return _vae(shapes) if all(map(has, _VAE)) else None


def recognise_file(path: Path) -> Kind | None:
    """What a file is; None if it is not recognised.

    Raises:
        InputError: if it cannot be read or is damaged, with its name.
    """
    start = first_bytes(path)
    if start.startswith(_GGUF):
        return Kind(f"a GGUF file{_architecture(start)}, which is quantised", _OTHER)
    if start.startswith(_TORCH) or (start.startswith(_OLD_TORCH) and path.suffix.lower() not in SUFFIXES):
        return Kind("a PyTorch file", _OTHER)
    return recognise(tensor_shapes(path))


def _vae(shapes: Mapping[str, tuple[int, ...]]) -> Kind:
    latents = next(
        (shape[1] for key, shape in shapes.items() if key.endswith("decoder.conv_in.weight") and len(shape) > 1), None
    )
    if latents == _LATENTS:
        return Kind(f"a VAE with {latents} latent channels, as those of Stable Diffusion 3 and Flux have", _VAE_USE, fits=True)
    return Kind(f"a VAE with {latents} latent channels" if latents else "a VAE", _OTHER)


def _architecture(start: bytes) -> str:
    """The model that a GGUF file names in its first entry, in brackets; "" if that is another one.

    Format: magic, version (4 bytes), numbers of tensors and entries (8 bytes each), and for each entry its name, its type (4
    bytes) and its value; texts follow their length (8 bytes).
    """
    entry = _ARCHITECTURE.match(start, 24)
    if entry is None:
        return ""
    length = int.from_bytes(start[entry.end() - 8 : entry.end()], "little")
    return f" ({start[entry.end() : entry.end() + min(length, 32)].decode(errors='replace')})"
