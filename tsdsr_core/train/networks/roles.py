"""The networks of TSD-SR's training: student, teacher (psi), fake model (phi) and the autoencoder.

On a large base model the roles are adapters on shared weights, one active at a time; in a small model each role has its own
weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...families import family_of
from ...flow import TIMESTEP
from ...weights.prompt import Condition

STUDENT, TEACHER, FAKE = "student", "teacher", "fake"


class Networks:
    """Transformers by role and autoencoders, all on one device."""

    def __init__(
        self, transformers: Mapping[str, Any], vae: Any, student_vae: Any, prompt: Condition, null: Condition,
        adapters: bool,
    ) -> None:  # fmt: skip
        """Combine loaded models.

        Args:
            transformers: ``SD3Transformer2DModel`` by role; with ``adapters`` the same model, with an adapter for each role.
            vae: ``AutoencoderKL`` that encodes photographs and decodes; trained only in stage pretrain.
            student_vae: ``AutoencoderKL`` with the student's encoder; with ``adapters`` the same object as ``vae``, with an
                adapter called "student".
            prompt: the student's prompt, one sample.
            null: the empty prompt for classifier-free guidance, one sample.
            adapters: whether roles are adapters on shared weights.
        """
        self.transformers, self.vae, self.student_vae = dict(transformers), vae, student_vae
        self.prompt, self.null, self.adapters = prompt, null, adapters
        configs = {"transformer": next(iter(self.transformers.values())).config, "vae": vae.config}
        self.family = family_of(configs)
        self.geometry = self.family.geometry(configs)
        self.scaling_factor = float(self.geometry.scaling_factor)
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        """Mixed precision of the transformers. Losses stay in fp32, as does an autoencoder with an adapter."""
        self._active: dict[int, str | None] = {}
        """The active adapter of each model, by ``id``."""

    @property
    def device(self) -> torch.device:
        """Device of all networks."""
        return self.prompt.tokens.device

    def check_side(self, name: str, side: int) -> None:
        """Raise ``InputError`` if images whose longest side has ``side`` pixels are too large for the transformers' positions.

        Args:
            name: of what has this side, for the message.
        """
        longest = (self.geometry.longest_side or side) * self.geometry.vae_factor
        if side > longest:
            raise InputError(f"{name} = {side}: this model is trained and validated on at most {longest} pixels a side")

    def velocity(self, role: str, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity ``v(z_t, sigma)`` of a role's network, in the shape of ``z``.

        Args:
            z: scaled latents ``(B, C, h, w)``.
            sigma: noise levels ``(B,)`` in 0..1.
        """
        self.activate(role)
        transformer = self.transformers[role]
        dtype = transformer.dtype
        with self.autocast():
            given = Condition(condition.tokens.to(dtype), condition.pooled.to(dtype))
            velocity = self.family.velocity(transformer, z.to(dtype), sigma.float() * TIMESTEP, given)
        return velocity.to(z.dtype)

    def encode(self, pixels: Tensor, student: bool) -> Tensor:
        """Encode pixels ``(B, 3, H, W)`` in 0..1 to scaled latents, the mode of the posterior."""
        vae = self.student_vae if student else self.vae
        if self.adapters:
            self._switch(vae, STUDENT if student else None)
        return vae.encode(pixels * 2 - 1).latent_dist.mode() * self.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Decode scaled latents to pixels in about 0..1; the decoder has no adapters."""
        return self.vae.decode(z / self.scaling_factor, return_dict=False)[0] / 2 + 0.5

    def activate(self, role: str) -> None:
        """Activate a role's adapter; needed before its network runs and again before the backward pass."""
        if self.adapters:
            self._switch(self.transformers[role], role)
            if role == STUDENT:
                self._switch(self.student_vae, role)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The trained parameters of a role by name: its transformer's and, for the student, its encoder's."""
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
        """Fingerprint of the frozen autoencoder, which prepared latents must match; empty if the autoencoder is trained."""
        if not self.adapters and any(parameter.requires_grad for parameter in self.vae.parameters()):
            return ""
        return fingerprint(self.vae)

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Fingerprints by name of everything that is not trained and must be the same when a run is resumed.

        Precision may change between runs, so base models are compared in bf16.
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
        """Activate one adapter of a diffusers model; if it has none of that name, the base model runs without adapters."""
        known = getattr(model, "peft_config", {})
        role = role if role in known else None
        if not known or self._active.get(id(model), "unknown") == role:  # switching visits all layers, which is slow
            return
        if role is None:
            model.disable_adapters()
        else:
            model.enable_adapters()
            model.set_adapter(role)
        self._active[id(model)] = role


def fingerprint(model: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """Hash of a model's weights in ``dtype``, without its adapters, as 16 hexadecimal digits."""
    weights = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if ".lora_" not in name}
    return _digest(weights, dtype)


def _digest(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().to("cpu", dtype).flatten().view(torch.uint8).numpy().data)  # numpy has no bf16
    return digest.hexdigest()[:16]


@torch.no_grad()
def set_parameters(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], what: str) -> None:
    """Copy ``values`` into the parameters of the same names.

    Args:
        what: name of the values for the error message.

    Raises:
        InputError: if names or shapes differ; nothing is changed then.
    """
    check_same_shapes(values, parameters, what)
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def check_same_shapes(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], what: str) -> None:
    """Raise ``InputError`` unless ``values``, called ``what`` in the message, have the names and shapes of ``parameters``."""
    wrong = sorted(
        name for name in parameters.keys() | values.keys()
        if name not in parameters or name not in values or parameters[name].shape != values[name].shape
    )  # fmt: skip
    if wrong:
        raise InputError(f"{what} belongs to another model: {len(wrong)} weights differ, such as {', '.join(wrong[:4])}")
