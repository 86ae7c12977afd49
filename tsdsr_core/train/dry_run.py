"""Memory and operations of one training step of Stable Diffusion 3 medium, counted on the meta device without computing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError
from ..families.sd3.config import POOLED_SHAPE, TOKENS_SHAPE, TRANSFORMER_CONFIG, VAE_CONFIG
from ..weights.prompt import Condition
from .config import Config
from .data.batch import Batch
from .networks.build import add_adapters
from .networks.roles import FAKE, STUDENT, TEACHER, Networks
from .trainers import StudentTrainer, TeacherTrainer

META = torch.device("meta")
_LARGEST = 2**20
"""Of the batch and the rank: beyond, sizes of tensors could overflow."""


@dataclass(frozen=True)
class Estimate:
    """What one process needs, in bytes unless stated otherwise."""

    weights: int
    trained: int
    """Number of trained parameters."""
    optimiser: int
    """AdamW's state, gradients and averaged weights, in fp32."""
    activations: int
    """Peak of all other tensors during a step."""
    flops: int
    """Floating-point operations of a step."""

    @property
    def peak(self) -> int:
        return self.weights + self.optimiser + self.activations


def estimate(config: Config) -> Estimate:
    """Count one step of a stage that trains LoRAs.

    The perceptual term is counted as "gradients"; LPIPS adds the activations of its network.  Adapters are counted in fp32,
    without autocast.

    Raises:
        InputError: for a run that trains a small model's weights, or sizes beyond what the model or a tensor can have.
    """
    if config.model.trained != "lora":
        raise InputError("--dry-run works for Stable Diffusion 3 medium with LoRAs only: set model.trained = 'lora'")
    config = replace(config, objective=replace(config.objective, perceptual="gradients"))
    for name, size in (("run.batch", config.run.batch), ("model.rank", config.model.rank)):
        if size > _LARGEST:
            raise InputError(f"{name} = {size}: expected at most {_LARGEST} with --dry-run")
    networks = _networks(config)
    networks.check_side("data.crop", config.data.crop)
    trainer: Any = (TeacherTrainer if config.stage == "teacher" else StudentTrainer)(networks, config)
    modules = list({id(m): m for m in (*networks.transformers.values(), networks.vae)}.values())
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    trained = sum(p.numel() for group in trainer.groups.values() for p in group.parameters.values())
    count, side = config.run.batch, config.data.crop
    high = torch.empty(count, 3, side, side, device=META)
    batch = Batch(torch.empty_like(high), high, range(count), 0)
    with FlopCounterMode(display=False) as flops, LiveBytes(modules) as live:
        trainer.accumulate(batch, 0, lambda loss: loss.backward())
    gradients = 4 * trained  # part of live.peak, too
    total = config.run.accumulate * flops.get_total_flops()
    return Estimate(weights, trained, 4 * 4 * trained, live.peak - gradients, total)


def _networks(config: Config) -> Networks:
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    with META:
        transformer = SD3Transformer2DModel(**TRANSFORMER_CONFIG)
        nn.Module.to(transformer, dtype)
        vae = AutoencoderKL(**VAE_CONFIG).requires_grad_(False)
        add_adapters(config, transformer, vae, config.model.rank)
        prompt = Condition(torch.empty(TOKENS_SHAPE), torch.empty(POOLED_SHAPE))
    if config.model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    return Networks(dict.fromkeys((STUDENT, TEACHER, FAKE), transformer), vae, vae, prompt, prompt, adapters=True)


class LiveBytes(TorchDispatchMode):
    """Tracks the peak bytes of live tensors, not counting those of ``modules``."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        tensors = itertools.chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
        self.known = {tensor.untyped_storage()._cdata for tensor in tensors}  # views of them take no memory
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        for tensor in results if isinstance(results, tuple | list) else [results]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                _, before = self.living.get(storage._cdata, (None, 0))
                self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.total += storage.nbytes() - before
        if self.total > self.peak:  # only at a new peak, since looking for freed tensors takes time
            self.living = {key: entry for key, entry in self.living.items() if not entry[0].expired()}
            self.total = sum(size for _, size in self.living.values())
            self.peak = max(self.peak, self.total)
        return results
