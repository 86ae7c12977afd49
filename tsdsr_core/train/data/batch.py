"""A batch of training samples, and the random numbers that belong to each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...weights.prompt import Condition
from ..objectives.losses import logit_normal
from ..objectives.trajectory import Trajectory
from .randomness import generator_for


@dataclass(frozen=True)
class Batch:
    """Training samples, with their numbers in the endless sequence of the run."""

    low: Tensor
    """Low quality, enlarged bicubically, ``(B, 3, H, W)`` in 0..1."""
    high: Tensor
    """High quality, same shape."""
    numbers: Sequence[int]
    """The sample numbers. All random numbers of a sample are a function of it, whichever process draws them."""
    seed: int
    caption: Condition | None = None
    """Embedded captions; None to use the fixed prompt."""
    latent: Tensor | None = None
    """Unscaled latent of ``high``, if it was prepared."""
    guide: Tensor | None = None
    """Result of another restorer for ``low``, in the shape of ``high``, if the samples have one."""

    @staticmethod
    def of(sample: Mapping[str, Tensor], numbers: Sequence[int], seed: int, device: torch.device) -> Batch:
        """Build a batch on a device from what the data loader returns."""
        on = {key: value.to(device, torch.float32, non_blocking=True) for key, value in sample.items()}
        caption = Condition(on["tokens"], on["pooled"]) if "tokens" in on else None
        return Batch(on["low"], on["high"], numbers, seed, caption, on.get("latent"), on.get("guide"))

    def noise(self, like: Tensor, stream: str) -> Tensor:
        """Standard normal noise in the shape of ``like`` ``(B, ...)``, a function of each sample's number and of ``stream``."""
        drawn = [torch.randn(like.shape[1:], generator=self._generator(number, stream)) for number in self.numbers]
        return torch.stack(drawn).to(like)

    def levels(self, stream: str) -> Tensor:
        """Logit-normal noise levels ``(B,)``."""
        drawn = [torch.randn((), generator=self._generator(number, stream)) for number in self.numbers]
        return logit_normal(torch.stack(drawn)).to(self.high)

    def scheduled(self, first: int, last: int, levels: Tensor, stream: str) -> Tensor:
        """Noise levels ``(B,)`` at random indices from ``first`` to ``last`` of the schedule ``levels``."""
        drawn = [torch.randint(first, last + 1, (), generator=self._generator(number, stream)) for number in self.numbers]
        return levels[torch.stack(drawn).to(levels.device)].to(self.high)

    def starts(self, trajectory: Trajectory) -> Tensor:
        """Start index of each sample's trajectory, ``(B,)`` int64."""

        def draw(number: int, count: int) -> int:
            return int(torch.randint(count, (), generator=self._generator(number, "start")))

        return torch.tensor([trajectory.start(lambda n, k=number: draw(k, n)) for number in self.numbers]).to(self.high.device)

    def shifts(self, patch: int) -> Tensor:
        """A random offset within a patch for each sample, ``(B, 2)`` int64: row and column from 0 to ``patch - 1``."""
        drawn = [torch.randint(patch, (2,), generator=self._generator(number, "shift")) for number in self.numbers]
        return torch.stack(drawn)

    def chosen(self, probability: float, stream: str) -> Tensor:
        """For each sample, True with ``probability``, ``(B,)``."""
        drawn = [torch.rand((), generator=self._generator(number, stream)) for number in self.numbers]
        return (torch.stack(drawn) < probability).to(self.high.device)

    def _generator(self, number: int, stream: str) -> torch.Generator:
        return generator_for(self.seed, number, stream)
