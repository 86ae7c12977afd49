"""The training loop: gradient accumulation, averaged weights, learning rates, checkpoints and logs, on accelerate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import FILE, Checkpoint, check_frozen, check_optimiser, write_checkpoint
from .config import Config, OptimiserSettings
from .data.batch import Batch
from .logs import writing_logs
from .networks.roles import check_same_shapes, set_parameters
from .trainers import Trainer

log = logging.getLogger(__name__)

Validate = Callable[[Callable[[Tensor], Tensor | None], int], Mapping[str, float]]
"""Takes the trainer's ``restore`` and the step; returns metrics to log by name. May log images itself."""


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
        """Continue where a checkpoint stopped.

        Raises:
            InputError: if it is damaged, belongs to another model, or was trained with other frozen networks.
        """
        check_frozen(checkpoint, self.trainer.networks.frozen)
        for name, group in self.trainer.groups.items():
            check_same_shapes(checkpoint.weights.get(name, {}), group.parameters, f"the {name} in the checkpoint")
            check_optimiser(checkpoint, name, list(group.parameters.values()))
        check_same_shapes(checkpoint.average, self.first, "the average in the checkpoint")
        for name, group in self.trainer.groups.items():
            set_parameters(group.parameters, checkpoint.weights[name], f"the {name} in the checkpoint")
            own = self.optimisers[name].state_dict()["param_groups"]  # restore the moments, keep this run's settings
            self.optimisers[name].load_state_dict({**checkpoint.optimisers[name], "param_groups": own})
        self.average = {name: checkpoint.average[name].to(value) for name, value in self.average.items()}
        self.step, self.seen = checkpoint.step, checkpoint.samples

    def run(self, batches: Iterator[Batch], prompt: Mapping[str, Tensor], validate: Validate) -> None:
        """Train up to the configured step.

        Raises:
            FloatingPointError: if a loss or gradient is not finite, with its name and the step; the last checkpoint is kept.
            OSError: if a checkpoint or the logs cannot be written; the last checkpoint is kept.
        """
        run, main = self.config.run, self.accelerator.is_main_process
        if self.step >= run.steps and main:
            said = "nothing to do: the checkpoint has %d steps, run.steps is %d; raise it to continue"
            log.warning(said, self.step, run.steps)
        with tqdm(total=run.steps, initial=self.step, unit="step", disable=None if main else True) as bar:
            while self.step < run.steps:
                losses = self._one_step(batches)
                self.step += 1
                self.seen += run.batch * run.accumulate * self.accelerator.num_processes
                self._update_average()
                bar.update()
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
                self.log({f"loss/{name}": value for name, value in losses.items()})
                over = self.step == run.steps
                if main and (over or self.step % run.save_every == 0):
                    write_checkpoint(self.out / FILE, self._checkpoint(prompt))
                    log.info("step %d: %s", self.step, ", ".join(f"{name} {value:.5f}" for name, value in losses.items()))
                if main and (over or self.step % run.validate_every == 0):
                    with self.averaged():
                        figures = validate(self.trainer.restore, self.step)
                    self.log({f"validation/{name}": value for name, value in figures.items()})

    def log(self, values: Mapping[str, float]) -> None:
        """Write figures by name to the logs, for the current step; raises ``OSError`` if that fails."""
        with writing_logs(self.out):
            self.accelerator.log(dict(values), self.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the first group for the duration of the block."""
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
        """Average gradients and losses over all processes; raises ``FloatingPointError`` if a loss is not finite."""
        if self.accelerator.num_processes > 1:
            for group in self.trainer.groups.values():
                self._reduce_gradients(list(group.parameters.values()))
        values: Any = self.accelerator.reduce(torch.stack(list(losses.values())), "mean")
        named = dict(zip(losses, values.tolist(), strict=True))
        for name, value in named.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss {name} is {value} at step {self.step}; {self._advice()}")
        return named

    def _reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average a group's gradients; parameters without one in any process keep none, or weight decay would move them."""
        given = [p.grad is not None for p in parameters]
        if not any(given):  # which groups are trained depends only on the step, so all processes agree
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # all processes must reduce the same
        flags = own[0].new_tensor(given, dtype=own[0].dtype)
        mean: Any = self.accelerator.reduce(torch.cat([*(grad.flatten() for grad in own), flags]), "mean")
        *parts, shares = mean.split([*(grad.numel() for grad in own), len(parameters)])
        for parameter, part, share in zip(parameters, parts, shares.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if share else None

    def _clip(self, group: str) -> None:
        parameters = self.trainer.groups[group].parameters
        norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        if not torch.isfinite(norm):
            wrong = [name for name, p in parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
            raise FloatingPointError(
                f"the gradient of {', '.join(wrong[:4]) or group} ({len(wrong)} tensors of {group}) is not finite at step "
                f"{self.step}; {self._advice()}"
            )
        nn.utils.clip_grads_with_norm_(parameters.values(), self.config.optimiser.clip_norm, norm)

    def _advice(self) -> str:
        return f"{self.out / FILE} is unchanged; a lower learning rate or precision = 'fp32' may help"

    def _update_average(self) -> None:
        """Update the exponential moving average; its decay is lower during the first steps."""
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


def learning_rate_factor(settings: OptimiserSettings, step: int, steps: int) -> float:
    """Factor of the learning rates at a step, 0..1: linear warm-up, then the schedule.

    cosine: ``(1 + cos(pi p)) / 2`` in each of ``cycles`` equal parts after the warm-up (Loshchilov & Hutter 2017, hard
    restarts). linear: 1, then linearly to 0 over the last ``decay_steps``.

    Args:
        step: counted from 0.
        steps: length of the run.

    >>> from tsdsr_core.train.config import OptimiserSettings
    >>> cosine = OptimiserSettings(warmup_steps=2)
    >>> [round(learning_rate_factor(cosine, step, 10), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    warmup = min(settings.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "linear":
        return min(1.0, (steps - step) / max(1, settings.decay_steps))
    position = (step - warmup) / (steps - warmup) * settings.cycles
    return 0.5 * (1 + math.cos(math.pi * (position % 1)))
