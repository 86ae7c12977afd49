"""The networks of TSD-SR's training under one roof: student, teacher (psi) and LoRA model (phi), and the autoencoder.

With a large base they are adapters on one set of weights, of which one is active at a time; small models have weights of
their own each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..flow import TIMESTEP

STUDENT, TEACHER, FAKE = "student", "teacher", "fake"


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told of each sample of a batch."""

    tokens: Tensor
    """``(B, T, D)``."""
    pooled: Tensor
    """``(B, P)``."""

    def expanded(self, count: int) -> Condition:
        """One prompt for ``count`` samples."""
        return Condition(self.tokens.expand(count, -1, -1), self.pooled.expand(count, -1))

    def where(self, given: Tensor, other: Condition) -> Condition:
        """This where ``given`` ``(B,)`` is true, else ``other``."""
        return Condition(
            torch.where(given[:, None, None], self.tokens, other.tokens), torch.where(given[:, None], self.pooled, other.pooled)
        )


class Networks:
    """Transformers by role and autoencoders, all on one device."""

    def __init__(
        self, transformers: Mapping[str, Any], vae: Any, student_vae: Any, prompt: Condition, null: Condition,
        adapters: bool,
    ) -> None:  # fmt: skip
        """Take ready models.

        Args:
            transformers: ``SD3Transformer2DModel`` by role; with ``adapters`` one model, with an adapter of each role's name.
            vae: ``AutoencoderKL`` that encodes photographs and decodes; never trained.
            student_vae: the student's encoder; with ``adapters`` the same object, with an adapter called "student".
            prompt: what the student is told; null: what guidance leads away from; of one sample each.
        """
        self.transformers, self.vae, self.student_vae = dict(transformers), vae, student_vae
        self.prompt, self.null, self.adapters = prompt, null, adapters
        self.scaling_factor = float(vae.config["scaling_factor"])
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        """Mixed precision of the transformers; losses stay in fp32, and so does an autoencoder whose adapter changes little."""
        self._active: dict[int, str | None] = {}
        """The adapter that each model runs with, by ``id``."""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.prompt.tokens.device

    def velocity(self, role: str, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """``v(z_t, sigma)`` of the network with a role; scaled latents, noise levels ``(B,)``."""
        self.activate(role)
        transformer = self.transformers[role]
        dtype = transformer.dtype
        with self.autocast():
            velocity = transformer(
                hidden_states=z.to(dtype), timestep=sigma.float() * TIMESTEP,
                encoder_hidden_states=condition.tokens.to(dtype), pooled_projections=condition.pooled.to(dtype),
                return_dict=False,
            )[0]  # fmt: skip
        return velocity.to(z.dtype)

    def encode(self, pixels: Tensor, student: bool) -> Tensor:
        """Scaled latents, the posterior's mode, of pixels ``(B, 3, H, W)`` in 0..1."""
        vae = self.student_vae if student else self.vae
        if self.adapters:
            self._switch(vae, STUDENT if student else None)
        return vae.encode(pixels * 2 - 1).latent_dist.mode() * self.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Pixels in about 0..1 of scaled latents; the decoder has no adapters."""
        return self.vae.decode(z / self.scaling_factor, return_dict=False)[0] / 2 + 0.5

    def activate(self, role: str) -> None:
        """Make a role's adapter the active one: before it runs, and again before gradients flow back through it."""
        if self.adapters:
            self._switch(self.transformers[role], role)
            if role == STUDENT:
                self._switch(self.student_vae, role)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """What a role trains, by name: its transformer's and, for the student, its encoder's."""
        parts = {"transformer": self.transformers[role]}
        if role == STUDENT:
            parts["vae"] = self.student_vae
        found = {}
        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                own = f".{role}." in name if self.adapters else parameter.requires_grad
                if own:
                    found[f"{part}.{name}"] = parameter
        return found

    @cached_property
    def autoencoder(self) -> str:
        """Fingerprint of the autoencoder that is not trained, by which latents are known as its own; empty where it is."""
        if not self.adapters and any(parameter.requires_grad for parameter in self.vae.parameters()):
            return ""
        return fingerprint(self.vae)

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Fingerprints, by name, of what is not trained and must be the same where a run goes on.

        Precision may change in between: bases that are read in 16 bits are compared in 16.
        """
        found = {"autoencoder": self.autoencoder, "prompt": _digest(vars(self.prompt))}
        if self.adapters:
            found["transformer"] = fingerprint(self.transformers[STUDENT], torch.bfloat16)
        if any(role in self.transformers and self.parameters(role) for role in (TEACHER, FAKE)):
            found["null prompt"] = _digest(vars(self.null))
        if FAKE in self.transformers and self.parameters(FAKE):
            psi = self.transformers[TEACHER]
            found["teacher"] = _digest(self.parameters(TEACHER)) if self.adapters else fingerprint(psi)
        return found

    def _switch(self, model: Any, role: str | None) -> None:
        """Make one adapter of a diffusers model the active one; where it has none of that name, the plain base runs."""
        known = getattr(model, "peft_config", {})
        role = role if role in known else None
        if not known or self._active.get(id(model), "unknown") == role:  # walking through all layers takes its time
            return
        if role is None:
            model.disable_adapters()
        else:
            model.enable_adapters()
            model.set_adapter(role)
        self._active[id(model)] = role


def fingerprint(model: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """16 hexadecimal digits that tell a model's weights in ``dtype``, its adapters left out, from any others."""
    weights = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if ".lora_" not in name}
    return _digest(weights, dtype)


def _digest(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().to("cpu", dtype).flatten().view(torch.uint8).numpy().data)  # numpy knows no bf16
    return digest.hexdigest()[:16]


@torch.no_grad()
def set_parameters(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], what: str) -> None:
    """Copy ``values`` into the parameters of the same names; ``what`` they are, for the error.

    Raises:
        ValueError: where names or shapes differ; nothing is changed then.
    """
    wrong = sorted(
        name for name in parameters.keys() | values.keys()
        if name not in parameters or name not in values or parameters[name].shape != values[name].shape
    )  # fmt: skip
    if wrong:
        raise ValueError(f"{what} is of another model: {len(wrong)} weights differ, such as {', '.join(wrong[:4])}")
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
