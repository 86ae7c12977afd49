"""The training loop: accelerate's processes and precision, accumulation, averages, schedules, checkpoints, logs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from .batch import Batch
from .checkpoint import FILE, Checkpoint, check_frozen, write_checkpoint
from .config import Config, Optimiser
from .networks import set_parameters
from .trainers import Trainer

log = logging.getLogger(__name__)

Validate = Callable[[Callable[[Tensor], Tensor | None], int], Mapping[str, float]]
"""Given what restores, and the step: figures to log; may log pictures itself."""


class Loop:
    """One run of a trainer."""

    def __init__(self, trainer: Trainer, config: Config, accelerator: Accelerator, out: Path) -> None:
        self.trainer, self.config, self.accelerator, self.out = trainer, config, accelerator, out
        rates = config.optimiser
        self.optimisers = {
            name: torch.optim.AdamW(
                list(group.parameters.values()), group.learning_rate, (0.9, rates.beta2), weight_decay=rates.weight_decay
            )
            for name, group in trainer.groups.items()
        }
        self.step = self.seen = 0
        self.first = next(iter(trainer.groups.values())).parameters
        self.average = {name: parameter.detach().clone() for name, parameter in self.first.items()}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ValueError: where it is of another model, or was trained beside another one.
        """
        check_frozen(checkpoint, self.trainer.networks.frozen)
        for name, group in self.trainer.groups.items():
            set_parameters(group.parameters, checkpoint.weights.get(name, {}), f"the {name} in the checkpoint")
            own = self.optimisers[name].state_dict()["param_groups"]  # the averages are restored, the settings are the run's
            self.optimisers[name].load_state_dict({**checkpoint.optimisers[name], "param_groups": own})
        self.average = {name: checkpoint.average[name].to(value) for name, value in self.average.items()}
        self.step, self.seen = checkpoint.step, checkpoint.samples

    def run(self, batches: Iterator[Batch], prompt: Mapping[str, Tensor], validate: Validate) -> None:
        """Train up to the configured step.

        Raises:
            FloatingPointError: where a loss or a gradient is not finite, naming it and the step; the last checkpoint stays.
            OSError: where a checkpoint cannot be written; the last one stays.
        """
        run, main = self.config.run, self.accelerator.is_main_process
        with tqdm(total=run.steps, initial=self.step, unit="step", disable=None if main else True) as bar:
            while self.step < run.steps:
                losses = self._one_step(batches)
                self.step += 1
                self.seen += run.batch * run.accumulate * self.accelerator.num_processes
                self._update_average()
                bar.update()
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
                self.accelerator.log({f"loss/{name}": value for name, value in losses.items()}, self.step)
                over = self.step == run.steps
                if main and (over or self.step % run.save_every == 0):
                    write_checkpoint(self.out / FILE, self._checkpoint(prompt))
                    log.info("step %d: %s", self.step, ", ".join(f"{name} {value:.5f}" for name, value in losses.items()))
                if main and (over or self.step % run.validate_every == 0):
                    with self.averaged():
                        figures = validate(self.trainer.restore, self.step)
                    self.accelerator.log({f"validation/{name}": value for name, value in figures.items()}, self.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The first group with its averaged weights."""
        own = {name: parameter.detach().clone() for name, parameter in self.first.items()}
        set_parameters(self.first, self.average, "the average")
        try:
            yield
        finally:
            set_parameters(self.first, own, "the weights")

    def _one_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        factor = learning_rate_factor(self.config.optimiser, self.step, self.config.run.steps)
        for name, optimiser in self.optimisers.items():
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = factor * self.trainer.groups[name].learning_rate
        total: dict[str, Tensor] = {}
        parts = self.config.run.accumulate
        for _ in range(parts):
            losses = self.trainer.accumulate(next(batches), self.step, lambda loss: self.accelerator.backward(loss / parts))
            total = {name: total.get(name, 0) + value.float() / parts for name, value in losses.items()}
        named = self._reduced(total)
        for name, optimiser in self.optimisers.items():
            self._clip(name)
            optimiser.step()
        return named

    def _reduced(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean gradients and losses over all processes; a value that is not finite ends the run."""
        if self.accelerator.num_processes > 1:
            for group in self.trainer.groups.values():
                parameters = list(group.parameters.values())
                own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # the same tensors everywhere
                mean: Any = self.accelerator.reduce(torch.cat([grad.flatten() for grad in own]), "mean")
                for parameter, part in zip(parameters, mean.split([grad.numel() for grad in own]), strict=True):
                    parameter.grad = part.view_as(parameter)
        values: Any = self.accelerator.reduce(torch.stack(list(losses.values())), "mean")
        named = dict(zip(losses, values.tolist(), strict=True))
        for name, value in named.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss {name} is {value} at step {self.step}; {self._stays()}")
        return named

    def _clip(self, group: str) -> None:
        parameters = self.trainer.groups[group].parameters
        norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        if not torch.isfinite(norm):
            wrong = [name for name, p in parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
            raise FloatingPointError(
                f"the gradient of {', '.join(wrong[:4]) or group} ({len(wrong)} tensors of {group}) is not finite at step "
                f"{self.step}; {self._stays()}"
            )
        nn.utils.clip_grads_with_norm_(parameters.values(), self.config.optimiser.clip_norm, norm)

    def _stays(self) -> str:
        return f"{self.out / FILE} is untouched; a lower learning rate or precision = 'fp32' may help"

    def _update_average(self) -> None:
        """Exponential moving average, with a shorter memory at the start."""
        decay = min(self.config.run.ema_decay, self.step / (9 + self.step))
        with torch.no_grad():
            for name, parameter in self.first.items():
                self.average[name].lerp_(parameter, 1 - decay)

    def _checkpoint(self, prompt: Mapping[str, Tensor]) -> Checkpoint:
        weights = {
            name: {key: value.detach() for key, value in group.parameters.items()}
            for name, group in self.trainer.groups.items()
        }
        states: dict[str, Any] = {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}
        frozen = self.trainer.networks.frozen
        return Checkpoint(self.config, self.step, weights, self.average, states, prompt, self.seen, frozen)


def learning_rate_factor(settings: Optimiser, step: int, steps: int) -> float:
    """What the learning rates are multiplied by in a step, counted from 0: linear warm-up, then a schedule.

    cosine: ``(1 + cos(pi p)) / 2`` within each of ``cycles`` equal parts of the rest (Loshchilov & Hutter 2017, hard restarts).
    linear: 1, then a line to 0 over the last ``decay_steps``.
    """
    warmup = min(settings.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "linear":
        return min(1.0, (steps - step) / max(1, settings.decay_steps))
    position = (step - warmup) / (steps - warmup) * settings.cycles
    return 0.5 * (1 + math.cos(math.pi * (position % 1)))
