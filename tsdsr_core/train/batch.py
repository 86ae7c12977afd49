"""A batch of training samples, and the random numbers that belong to each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dasm import Trajectory
from .losses import logit_normal
from .networks import Condition
from .randomness import generator_for


@dataclass(frozen=True)
class Batch:
    """Samples with their numbers in the endless sequence of the run."""

    low: Tensor
    """Low quality, enlarged bicubically, ``(B, 3, H, W)`` in 0..1."""
    high: Tensor
    """High quality, same shape."""
    numbers: Sequence[int]
    """What is random about a sample is a function of its number, so that it does not matter which process draws it."""
    seed: int
    caption: Condition | None = None
    latent: Tensor | None = None
    """Unscaled latent of ``high``, where it was prepared."""

    @staticmethod
    def of(sample: Mapping[str, Tensor], numbers: Sequence[int], seed: int, device: torch.device) -> Batch:
        """What a data loader gives, on a device."""
        on = {key: value.to(device, torch.float32, non_blocking=True) for key, value in sample.items()}
        caption = Condition(on["tokens"], on["pooled"]) if "tokens" in on else None
        return Batch(on["low"], on["high"], numbers, seed, caption, on.get("latent"))

    def noise(self, like: Tensor, stream: str) -> Tensor:
        """Standard normal numbers in the shape of ``like`` ``(B, ...)``, each sample's own."""
        drawn = [torch.randn(like.shape[1:], generator=self._generator(number, stream)) for number in self.numbers]
        return torch.stack(drawn).to(like)

    def levels(self, stream: str) -> Tensor:
        """Logit-normal noise levels ``(B,)``."""
        drawn = [torch.randn((), generator=self._generator(number, stream)) for number in self.numbers]
        return logit_normal(torch.stack(drawn)).to(self.high)

    def starts(self, trajectory: Trajectory) -> Tensor:
        """Where each sample's trajectory starts, ``(B,)`` int64."""

        def draw(number: int, count: int) -> int:
            return int(torch.randint(count, (), generator=self._generator(number, "start")))

        return torch.tensor([trajectory.start(lambda n, k=number: draw(k, n)) for number in self.numbers]).to(self.high.device)

    def shifts(self, patch: int) -> Tensor:
        """A place in a grid of patches for each sample, ``(B, 2)`` int64: rows and columns from 0 to ``patch - 1``."""
        drawn = [torch.randint(patch, (2,), generator=self._generator(number, "shift")) for number in self.numbers]
        return torch.stack(drawn)

    def chosen(self, probability: float, stream: str) -> Tensor:
        """True with ``probability``, for each sample, ``(B,)``."""
        drawn = [torch.rand((), generator=self._generator(number, stream)) for number in self.numbers]
        return (torch.stack(drawn) < probability).to(self.high.device)

    def _generator(self, number: int, stream: str) -> torch.Generator:
        return generator_for(self.seed, number, stream)
