"""What a step of Stable Diffusion 3 medium's training takes, counted on the meta device: nothing is computed or allocated."""

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

from ..sd3 import POOLED_SHAPE, TOKENS_SHAPE, TRANSFORMER_CONFIG, VAE_CONFIG
from .batch import Batch
from .build import add_adapters
from .config import Config
from .networks import FAKE, STUDENT, TEACHER, Condition, Networks
from .trainers import StudentTrainer, TeacherTrainer

META = torch.device("meta")


@dataclass(frozen=True)
class Estimate:
    """Of one process; bytes unless named otherwise."""

    weights: int
    trained: int
    """Parameters, not bytes."""
    optimiser: int
    """AdamW's two averages, gradients and averaged weights, fp32."""
    activations: int
    """The most that is alive in a step beside those."""
    flops: int
    """Floating-point operations of a step."""

    @property
    def peak(self) -> int:
        return self.weights + self.optimiser + self.activations


def estimate(config: Config) -> Estimate:
    """Count one step of a LoRA stage.

    The perceptual term is counted as "gradients": LPIPS adds the activations of its own network.  What adapters compute is
    counted in fp32, without autocast.

    Raises:
        ValueError: for a run that trains a small model's weights.
    """
    if config.model.trained != "lora":
        raise ValueError("--dry-run counts Stable Diffusion 3 medium with LoRAs: set model.trained = 'lora'")
    config = replace(config, objective=replace(config.objective, perceptual="gradients"))
    networks = _networks(config)
    trainer: Any = (TeacherTrainer if config.stage == "teacher" else StudentTrainer)(networks, config)
    modules = list({id(m): m for m in (*networks.transformers.values(), networks.vae)}.values())
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    trained = sum(p.numel() for group in trainer.groups.values() for p in group.parameters.values())
    count, side = config.run.batch, config.data.crop
    high = torch.empty(count, 3, side, side, device=META)
    batch = Batch(torch.empty_like(high), high, range(count), 0)
    with FlopCounterMode(display=False) as flops, LiveBytes(modules) as live:
        trainer.accumulate(batch, 0, lambda loss: loss.backward())
    gradients = 4 * trained  # counted as alive too
    total = config.run.accumulate * flops.get_total_flops()
    return Estimate(weights, trained, 4 * 4 * trained, live.most - gradients, total)


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
    """Counts the bytes of the tensors that are made and alive at once, beside those of ``modules``."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        tensors = itertools.chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
        self.known = {tensor.untyped_storage()._cdata for tensor in tensors}  # views of them are no new bytes
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        for tensor in results if isinstance(results, tuple | list) else [results]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                _, before = self.living.get(storage._cdata, (None, 0))
                self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.total += storage.nbytes() - before
        if self.total > self.most:  # seldom: looking through all for the dead takes time
            self.living = {key: entry for key, entry in self.living.items() if not entry[0].expired()}
            self.total = sum(size for _, size in self.living.values())
            self.most = max(self.most, self.total)
        return results
