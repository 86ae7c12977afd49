"""LoRA files of TSD-SR: parse, recognise, check and merge (Hu et al. 2021: ``W' = W + alpha / r B A``).

Keys are PEFT's, ``transformer.<module>.lora_A.weight`` and ``.lora_B.weight`` with optional ``.alpha``; the published
transformer and VAE files both carry the prefix ``transformer.``, so only the module names tell which is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

TRANSFORMER_FILE, VAE_FILE = "transformer.safetensors", "vae.safetensors"
_PREFIXES = ("base_model.model.", "transformer.", "vae.")
_SHOWN = 8
"""Names listed in an error before "and N more"."""


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one module."""

    down: Tensor
    """A: ``(r, in)``, or ``(r, in, kh, kw)`` for a convolution."""
    up: Tensor
    """B: ``(out, r)``, or ``(out, r, 1, 1)`` for a convolution."""
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this pair changes."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, strength: float = 1.0) -> Tensor:
        """``strength alpha / r B A`` in fp32, of shape ``weight_shape``."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (strength * self.alpha / self.rank * product).reshape(self.weight_shape)


@dataclass(frozen=True)
class Lora:
    """A parsed LoRA."""

    target: str
    """ "transformer" or "vae"."""
    pairs: Mapping[str, LoraPair]
    """By module name in diffusers' layout."""

    def state_dict(self) -> dict[str, Tensor]:
        """PEFT keys without a prefix; ``parse_lora`` reads them back."""
        tensors = {}
        for name, pair in self.pairs.items():
            tensors[f"{name}.lora_A.weight"] = pair.down
            tensors[f"{name}.lora_B.weight"] = pair.up
            if pair.alpha != pair.rank:
                tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
        return tensors


def load_lora(path: Path, expected: str | None = None) -> Lora:
    """Read a safetensors LoRA; ``expected`` is "transformer" or "vae" where only one will do.

    Raises:
        ValueError: for a missing, damaged or foreign file, or the other one of the two.
    """
    if not path.is_file():
        raise ValueError(f"no LoRA at {path}: the official folder holds {TRANSFORMER_FILE} and {VAE_FILE}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    not_finite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if not_finite:
        raise ValueError(f"{path} has NaN or infinite values in {_some(not_finite)}: it is damaged")
    try:
        lora = parse_lora(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if expected and lora.target != expected:
        raise ValueError(f"{path} is a LoRA for the {lora.target}, not for the {expected}: are the two files swapped?")
    return lora


def parse_lora(tensors: Mapping[str, Tensor]) -> Lora:
    """Pair the factors of a LoRA state dict and tell its target.

    Raises:
        ValueError: for keys that are not PEFT's or stand twice, factors without a partner or that do not multiply,
            mixed targets.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    foreign, again = [], []
    for key, tensor in tensors.items():
        module, part = _split(key)
        if part is None:
            foreign.append(key)
        elif parts.setdefault(module, {}).setdefault(part, tensor) is not tensor:
            again.append(key)
    if foreign or not parts:
        raise ValueError(f"not a PEFT LoRA: unexpected keys {_some(foreign)}" if foreign else "the LoRA is empty")
    if again:
        raise ValueError(f"the LoRA has modules twice, under different prefixes: {_some(again)}")
    broken = [name for name, found in parts.items() if not _multiplies(found)]
    if broken:
        raise ValueError(f"incomplete or mismatched LoRA factors for {_some(broken)}")
    targets = {target_of(name) for name in parts}
    if len(targets) > 1:
        raise ValueError("the LoRA has modules of both the transformer and the VAE: expected one file for each")
    pairs = {name: _pair(found) for name, found in parts.items()}
    return Lora(targets.pop(), pairs)


def target_of(module: str) -> str:
    """ "vae" for a module of the autoencoder, else "transformer"."""
    return "vae" if module.split(".")[0] in ("encoder", "decoder", "quant_conv", "post_quant_conv") else "transformer"


def misfits(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Modules of ``lora`` that a model does not have, or has in another shape, each with the reason.

    Args:
        shapes: weight shapes of the model by module name, as ``weight_shapes`` gives them.
    """
    found = []
    for name, pair in lora.pairs.items():
        if name not in shapes:
            found.append(f"{name} (not in the model)")
        elif shapes[name] != pair.weight_shape:
            found.append(f"{name} (LoRA {pair.weight_shape}, model {shapes[name]})")
    return found


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all linear and convolution weights by module name; works on the meta device."""
    return {
        name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


def check_fit(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one ``ValueError`` listing every module of ``lora`` that does not fit."""
    found = misfits(lora, shapes)
    if found:
        raise ValueError(
            f"the {lora.target} LoRA does not fit this model: {len(found)} of {len(lora.pairs)} modules are left over: "
            f"{_some(found)}. Is it for another base model?"
        )


@torch.no_grad()
def merge(model: nn.Module, lora: Lora, strength: float = 1.0) -> int:
    """Add ``lora`` to the weights of ``model`` in fp32, rounding once to each weight's type.

    Returns:
        The number of modules changed.

    Raises:
        ValueError: if any module does not fit; nothing is changed then.
    """
    check_fit(lora, weight_shapes(model))
    for name, pair in lora.pairs.items():
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        weight.copy_(weight.float() + pair.delta(strength).to(weight.device))
    return len(lora.pairs)


def _split(key: str) -> tuple[str, str | None]:
    """Module name and part ("down", "up", "alpha") of a LoRA key; the part is None for any other key."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    for ending, part in ((".lora_A.weight", "down"), (".lora_B.weight", "up"), (".alpha", "alpha")):
        if key.endswith(ending):
            return key.removesuffix(ending), part
    return key, None


def _multiplies(found: Mapping[str, Tensor]) -> bool:
    if not {"down", "up"} <= set(found):
        return False
    down, up = found["down"], found["up"]
    convolution = down.ndim == 4 and up.ndim == 4 and tuple(up.shape[2:]) == (1, 1)
    linear = down.ndim == 2 and up.ndim == 2
    return (linear or convolution) and up.shape[1] == down.shape[0] > 0


def _pair(found: Mapping[str, Tensor]) -> LoraPair:
    rank = found["down"].shape[0]
    return LoraPair(found["down"], found["up"], float(found["alpha"]) if "alpha" in found else float(rank))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
