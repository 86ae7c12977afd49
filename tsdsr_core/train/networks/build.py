"""Builds the networks of a run: a small model with its own weights, or adapters on Stable Diffusion 3."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ...errors import InputError
from ...families.folder import load_part
from ...families.load import load
from ...families.restorer import Restorer
from ...families.sd3.config import TRANSFORMER_TARGETS, VAE_TARGETS
from ...vae.program import is_zero
from ...weights.lora import Lora, load_lora
from ...weights.prompt import Condition, load_prompt
from ..config import Config
from . import small_model
from .roles import FAKE, STUDENT, TEACHER, Networks, fingerprint, set_parameters

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class Sources:
    """The files that a run starts from; None for what is not needed or starts with random weights."""

    base: Path | None = None
    """Small models: a model bundle. Adapters: an SD3 folder in diffusers' layout."""
    teacher: Path | None = None
    """The export of stage "teacher": a bundle, or a LoRA of the transformer."""
    embeddings: Path | None = None
    """Adapters: embeddings of the fixed prompt."""
    null: Path | None = None
    """Adapters: embeddings of the empty prompt."""


def build_networks(config: Config, sources: Sources, device: torch.device) -> Networks:
    """Load or initialise the networks that a stage needs.

    Raises:
        InputError: for a missing or unsuitable source, with the argument to change.
    """
    torch.manual_seed(config.run.seed)
    networks = _adapted(config, sources, device) if config.model.trained == "lora" else _separate(config, sources, device)
    if config.model.gradient_checkpointing:
        for model in (*networks.transformers.values(), networks.vae, networks.student_vae):
            model.enable_gradient_checkpointing()
    return networks


def _separate(config: Config, sources: Sources, device: torch.device) -> Networks:
    """A small model, with separate weights for each role."""
    base = _small_base(config, sources, device)
    _skip_unused(base.vae)
    prompt = base.prompt.condition()
    null = Condition(torch.zeros_like(prompt.tokens), torch.zeros_like(prompt.pooled))
    if config.stage == "teacher":
        transformers = {TEACHER: base.transformer.requires_grad_(True)}
        return Networks(transformers, base.vae, base.vae, prompt, null, adapters=False)
    if config.stage == "pretrain":
        vae = base.vae.requires_grad_(True)
        _freeze_unused(vae)
        return Networks({STUDENT: base.transformer.requires_grad_(True)}, vae, vae, prompt, null, adapters=False)
    student_vae = copy.deepcopy(base.vae)
    for part in (student_vae.encoder, student_vae.quant_conv):
        if part is not None:
            part.requires_grad_(True)
    _freeze_unused(student_vae)
    transformers = {STUDENT: base.transformer.requires_grad_(True)}
    if config.distils:
        if sources.teacher is None:
            raise InputError(f"objective {config.objective.name!r} needs --teacher: a bundle exported from stage 'teacher'")
        teacher = _small(sources.teacher, "--teacher", device)
        _check_teacher(teacher, base, sources.teacher)
        transformers |= {TEACHER: teacher.transformer, FAKE: copy.deepcopy(teacher.transformer).requires_grad_(True)}
    return Networks(transformers, base.vae, student_vae, prompt, null, adapters=False)


def _small_base(config: Config, sources: Sources, device: torch.device) -> Restorer:
    """The base model, or a new small model for stage pretrain."""
    if sources.base is None and config.stage != "pretrain":
        raise InputError(f"stage {config.stage!r} needs --base: the bundle of a small model, or builtin")
    if sources.base is None:
        transformer, vae, prompt = small_model.build(config.run.seed, config.model.layers, config.model.layers_per_block)
        return Restorer(transformer, vae, prompt, device, torch.float32)
    start = _small(sources.base, "--base", device)
    layers = start.transformer.config["num_layers"]
    if config.stage == "pretrain" and layers != config.model.layers:
        raise InputError(
            f"--base {sources.base} has {layers} blocks, the configuration {config.model.layers}: set model.layers={layers}, "
            "or omit --base to start a new model"
        )
    if config.stage == "pretrain":
        start.vae = small_model.deepened(start.vae, config.model.layers_per_block).to(device)
    return start


def _small(path: Path, option: str, device: torch.device) -> Restorer:
    """Load the small model of a model bundle."""
    if not path.is_file():
        raise InputError(f"{option} {path}: expected a model bundle, or builtin")
    found = load(path, device=device, dtype=torch.float32)
    if found.family.is_folded(found.transformer):
        raise InputError(f"{option} {path} is folded and works at one noise level only: use an unfolded bundle")
    return found


def _freeze_unused(vae: Any) -> None:
    """Freeze the small autoencoder's attention, which stays zero, and its dead blocks."""
    for half in (vae.encoder, vae.decoder):
        half.mid_block.attentions.requires_grad_(False)
        for block in _dead_blocks(half):
            block.requires_grad_(False)


def _skip_unused(vae: Any) -> None:
    """Skip the computation of attentions that add zero and of dead blocks."""
    for half in (vae.encoder, vae.decoder):
        for attention in half.mid_block.attentions:
            if is_zero(attention.to_out[0]):
                attention.set_processor(_IdentityAttention())
        for block in _dead_blocks(half):
            block.forward = _identity


def _dead_blocks(half: Any) -> list[Any]:
    """Residual blocks that are and stay the identity: both convolutions are zero, so neither gets a gradient."""
    found = [module for module in half.modules() if isinstance(module, ResnetBlock2D) and module.conv_shortcut is None]
    return [block for block in found if is_zero(block.conv1) and is_zero(block.conv2)]


def _identity(hidden_states: Tensor, temb: Any = None) -> Tensor:
    return hidden_states


class _IdentityAttention:
    """Attention processor for diffusers that returns its input, as an attention does whose residual branch is zero."""

    def __call__(self, attention: Any, hidden_states: Tensor, temb: Any = None, **others: Any) -> Tensor:
        return hidden_states


def _check_teacher(teacher: Restorer, base: Restorer, path: Path) -> None:
    expected, found = (fingerprint(model.vae, torch.float16) for model in (base, teacher))  # export writes fp16
    if found != expected:
        raise InputError(f"--teacher {path} was trained with another autoencoder than that of --base: train it on this base")


def _adapted(config: Config, sources: Sources, device: torch.device) -> Networks:
    """One base model with an adapter for each role."""
    if sources.base is None or sources.embeddings is None:
        raise InputError(
            "model.trained = 'lora' needs --base, an SD3 folder, and --embedding-dir, the embeddings of the fixed prompt"
        )
    if sources.null is None and (config.stage == "teacher" or config.distils):
        raise InputError("--null is needed, the embeddings of the empty prompt: make them with tsdsr train prepare --null")
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    transformer = load_part(sources.base, "transformer", dtype).requires_grad_(False).eval()
    vae = load_part(sources.base, "vae", torch.float32).requires_grad_(False).eval()  # 16 bits would lose the adapter
    if config.distils and sources.teacher is not None:
        psi, rank = _load_psi(sources.teacher)
        add_adapters(config, transformer, vae, rank)
        for role in (TEACHER, FAKE):  # phi starts as psi, so that they differ only by what phi learns from the student
            _set_adapter(transformer, psi, role, sources.teacher)
    else:
        add_adapters(config, transformer, vae, None)
    for model in (transformer, vae):
        nn.Module.to(model, device)
    prompt, null = (
        load_prompt(path).to(device, torch.float32).condition()
        for path in (sources.embeddings, sources.null or sources.embeddings)
    )
    _check_widths(prompt, null, transformer)
    roles = (STUDENT, TEACHER, FAKE)
    return Networks(dict.fromkeys(roles, transformer), vae, vae, prompt, null, adapters=True)


def _check_widths(prompt: Condition, null: Condition, transformer: Any) -> None:
    widths = transformer.config["joint_attention_dim"], transformer.config["pooled_projection_dim"]
    for option, found in (("--embedding-dir", prompt), ("--null", null)):
        if (found.tokens.shape[2], found.pooled.shape[1]) != widths:
            raise InputError(
                f"{option} has embeddings of widths {(found.tokens.shape[2], found.pooled.shape[1])}, the transformer takes "
                f"{widths}: use embeddings made with --base"
            )
    if null.tokens.shape != prompt.tokens.shape:
        raise InputError(
            f"--null has {null.tokens.shape[1]} tokens, --embedding-dir {prompt.tokens.shape[1]}: make both with the same base"
        )


def add_adapters(config: Config, transformer: SD3Transformer2DModel, vae: AutoencoderKL, psi_rank: int | None) -> None:
    """Add the adapters of a stage's roles to the published layers, in fp32; they start without any effect.

    Args:
        psi_rank: rank of the student's teacher, and of phi, which starts as a copy of it; None for a teacher without adapter.
    """
    rank = config.model.rank
    ranks = {TEACHER: rank} if config.stage == "teacher" else {STUDENT: rank}
    if config.distils:
        ranks |= {FAKE: psi_rank or rank} | ({TEACHER: psi_rank} if psi_rank else {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        for role, own in ranks.items():
            transformer.add_adapter(_adapter(own, TRANSFORMER_TARGETS), role)
    if STUDENT in ranks:
        vae.add_adapter(_adapter(rank, VAE_TARGETS), STUDENT)
    for model in (transformer, vae):
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()


def _load_psi(path: Path) -> tuple[Lora, int]:
    """Load the teacher's LoRA; also returns its rank."""
    lora = load_lora(path, "transformer")
    ranks = {pair.rank for pair in lora.pairs.values()}
    if len(ranks) > 1:
        raise InputError(f"--teacher {path} has modules of ranks {sorted(ranks)}: expected a single rank")
    return lora, ranks.pop()


@torch.no_grad()
def _set_adapter(transformer: Any, lora: Lora, role: str, path: Path) -> None:
    """Load a LoRA's factors into a role's adapter."""
    factors = {}
    for name, pair in lora.pairs.items():
        factors[f"{name}.lora_A.{role}.weight"] = pair.down.float()
        factors[f"{name}.lora_B.{role}.weight"] = pair.up.float() * (pair.alpha / pair.rank)
    own = {name: parameter for name, parameter in transformer.named_parameters() if f".{role}." in name}
    set_parameters(own, factors, f"--teacher {path}")


def _adapter(rank: int, targets: list[str] | str) -> LoraConfig:
    from peft import LoraConfig  # here, since tsdsr train --help works without it

    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
