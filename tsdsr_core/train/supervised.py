"""Supervised one-step objective: encoder, transformer and decoder trained end to end through the colour fix.

``x_L -> z_L = E(x_L) -> z_H = z_L - v(z_L) -> D(z_H) -> colour fix -> L1 against x_H``; a share of each batch passes
high-quality images with strength 0, which keeps the autoencoder an autoencoder.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle import Bundle
from ..colour import wavelet
from ..diffusers_models import merged_bundle
from ..files import atomic_path
from ..flow import TIMESTEP, one_step
from ..prompt import PromptEmbeds
from . import small_model
from .config import SupervisedConfig
from .data import Mixture, PairSource
from .preview import fit_preview

log = logging.getLogger(__name__)
CHECKPOINT = "last.pt"


@dataclass
class State:
    """Everything a run needs to go on exactly where it stopped."""

    models: nn.ModuleDict
    ema: nn.ModuleDict
    optimiser: torch.optim.Optimizer
    prompt: PromptEmbeds
    generator: torch.Generator
    step: int = 0


def new_state(config: SupervisedConfig) -> State:
    """A run at step 0."""
    transformer, vae, prompt = small_model.build(config.seed)
    models = nn.ModuleDict({"transformer": transformer, "vae": vae})
    for half in (vae.encoder, vae.decoder):
        half.mid_block.attentions.requires_grad_(False)
    trained = [p for p in models.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    ema = copy.deepcopy(models).requires_grad_(False)
    return State(models, ema, optimiser, prompt, torch.Generator().manual_seed(config.seed))


def restore_pixels(models: nn.ModuleDict, prompt: PromptEmbeds, pixels: Tensor, strength: Tensor) -> Tensor:
    """Differentiable one-step restoration of ``pixels`` ``(B, 3, H, W)`` in 0..1, ``strength`` ``(B, 1, 1, 1)``."""
    transformer: Any = models["transformer"]
    vae: Any = models["vae"]
    count = len(pixels)
    z = vae.encode(pixels * 2 - 1).latent_dist.mode() * vae.config["scaling_factor"]
    velocity = transformer(
        hidden_states=z,
        timestep=torch.full((count,), TIMESTEP),
        encoder_hidden_states=prompt.tokens.expand(count, -1, -1),
        pooled_projections=prompt.pooled.expand(count, -1),
        return_dict=False,
    )[0]
    z = one_step(z, strength * velocity)
    return vae.decode(z / vae.config["scaling_factor"], return_dict=False)[0] / 2 + 0.5


def loss_of(state: State, config: SupervisedConfig, low: Tensor, high: Tensor) -> Tensor:
    """The objective on one batch of enlarged low-quality and high-quality images, ``(B, 3, H, W)`` in 0..1."""
    kept = round(config.reconstruction_share * len(low))
    strength = torch.ones(len(low), 1, 1, 1)
    strength[:kept] = 0
    source = torch.cat((high[:kept], low[kept:]))
    output = restore_pixels(state.models, state.prompt, source, strength)
    fixed = wavelet(output, source, config.wavelet_levels)
    return (fixed - high).abs().mean() + config.raw_weight * (output - high).abs().mean()


def learning_rate(config: SupervisedConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay over the last ``decay_steps``; ``step`` counts from 0."""
    up = (step + 1) / max(1, config.warmup_steps)
    down = (config.steps - step) / max(1, config.decay_steps)
    return config.learning_rate * min(1.0, up, down)


def train(state: State, config: SupervisedConfig, photos: list[Tensor], out: Path) -> None:
    """Run ``state`` up to ``config.steps``, saving ``out/last.pt`` every ``save_every`` steps and at the end.

    Raises:
        FloatingPointError: if the loss is not finite, naming the step; the last checkpoint stays.
    """
    mixture = Mixture(config.crop, config.scale, tuple(config.presets.items()), config.synthetic_share)
    source = PairSource(photos, mixture, state.generator)
    running = None
    while state.step < config.steps:
        for group in state.optimiser.param_groups:
            group["lr"] = learning_rate(config, state.step)
        shift_positions(state)
        loss = loss_of(state, config, *source.batch(config.batch))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {state.step}; {out / CHECKPOINT} is untouched")
        state.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(state.models.parameters(), config.clip_norm)
        state.optimiser.step()
        state.step += 1
        update_ema(state, config.ema_decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if state.step % 20 == 0:
            log.info("step %d  loss %.5f", state.step, running)
        if state.step % config.save_every == 0 or state.step == config.steps:
            save_checkpoint(state, config, out / CHECKPOINT)


def shift_positions(state: State) -> None:
    """Train each crop at a random place of the position table, so that tiles of 64 cells meet no unknown position."""
    grid = small_model.TRANSFORMER_CONFIG["pos_embed_max_size"]
    original: Tensor = state.ema["transformer"].pos_embed.pos_embed  # type: ignore[union-attr,assignment]
    reach = grid // 5
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=state.generator).tolist()
    rolled = original.view(grid, grid, -1).roll((dy, dx), (0, 1)).view_as(original)
    state.models["transformer"].pos_embed.pos_embed.copy_(rolled)  # type: ignore[union-attr,operator]


def update_ema(state: State, decay: float) -> None:
    """Exponential moving average of the weights, with a shorter memory at the start."""
    decay = min(decay, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        for average, value in zip(state.ema.parameters(), state.models.parameters(), strict=True):
            average.lerp_(value, 1 - decay)


def save_checkpoint(state: State, config: SupervisedConfig, path: Path) -> None:
    """Write the whole run to ``path``, all or nothing."""
    values: dict[str, Any] = {
        "models": state.models.state_dict(),
        "ema": state.ema.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "tokens": state.prompt.tokens,
        "pooled": state.prompt.pooled,
        "generator": state.generator.get_state(),
        "step": state.step,
        "config": json.dumps(asdict(config)),
    }
    with atomic_path(path) as temporary:
        torch.save(values, temporary)


def load_checkpoint(path: Path, config: SupervisedConfig) -> State:
    """Read a run that ``save_checkpoint`` wrote; ``config`` may set a new schedule.

    Raises:
        ValueError: for a missing, damaged or foreign file.
    """
    values = _read_checkpoint(path)
    state = new_state(config)
    state.models.load_state_dict(values["models"])
    state.ema.load_state_dict(values["ema"])
    state.optimiser.load_state_dict(values["optimiser"])
    state.generator.set_state(values["generator"])
    return replace(state, prompt=PromptEmbeds(values["tokens"], values["pooled"]), step=values["step"])


def read_checkpoint_config(path: Path) -> SupervisedConfig:
    """The configuration that a checkpoint was trained with."""
    return SupervisedConfig(**json.loads(_read_checkpoint(path)["config"]))


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint that can be read: {error}") from error
    if not isinstance(values, dict) or not {"models", "ema", "optimiser", "generator", "config"} <= set(values):
        raise ValueError(f"{path} is no checkpoint of this trainer")
    return values


def export(state: State, config: SupervisedConfig) -> Bundle:
    """The averaged weights as a self-contained bundle in fp16."""
    defaults = {"process_size": 0, "wavelet_levels": config.wavelet_levels}
    notes = {"license": "Apache-2.0", "objective": "supervised", "steps": str(state.step), "scale": str(config.scale)}
    vae: Any = state.ema["vae"]
    with torch.no_grad():
        preview = fit_preview(lambda pixels: vae.encode(pixels).latent_dist.mode())
    bundle = merged_bundle(state.ema["transformer"], vae, state.prompt, torch.float16, defaults, notes)
    return replace(bundle, preview=preview)
