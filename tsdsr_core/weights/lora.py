"""LoRA files of TSD-SR: reading, checking and merging (Hu et al. 2021: ``W' = W + alpha / r B A``).

Keys are PEFT's: ``transformer.<module>.lora_A.weight``, ``.lora_B.weight`` and optionally ``.alpha``.  The published files
of the transformer and of the VAE both have the prefix ``transformer.``, so they are told apart by the module names.  Alpha may
also be in the file's header (see ``lora_alpha``); if it is nowhere, it is the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import some
from ..errors import InputError
from ..system.atomic import no_file
from .kinds import recognise
from .lora_alpha import Alphas, has_alpha, header_alphas
from .lora_keys import factor_shapes, split_key, target_of
from .peft_config import read_peft_config
from .reading import check_weights, is_finite, read_tensors

TRANSFORMER_FILE, VAE_FILE = "transformer.safetensors", "vae.safetensors"


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
    def scale(self) -> float:
        """``alpha / r``, the strength of the pair as it is published."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that the pair changes."""
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
    """Factors by module name in diffusers' layout."""
    alpha_source: str = field(default="", compare=False)
    """Where alpha comes from, for people; "" if the file does not give it."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by PEFT's keys without a prefix; the inverse of ``parse_lora``."""
        tensors = {}
        for name, pair in self.pairs.items():
            tensors[f"{name}.lora_A.weight"] = pair.down
            tensors[f"{name}.lora_B.weight"] = pair.up
            if pair.alpha != pair.rank:
                tensors[f"{name}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
        return tensors


def load_lora(path: Path, expected: str | None = None) -> Lora:
    """Read a LoRA from a safetensors file.

    Args:
        expected: "transformer" or "vae" to accept only a LoRA for that part.

    Raises:
        InputError: for a missing, damaged or unknown file, or a LoRA for the other part.
    """
    if not path.is_file():
        raise InputError(f"{path} {no_file(path)}: the official LoRAs are {TRANSFORMER_FILE} and {VAE_FILE} in one folder")
    tensors, metadata = read_tensors(path)
    tensors = {key: tensor.float() if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}  # may be int
    check_weights(path, tensors)
    shapes = factor_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    own = [module for _, module, part in map(split_key, tensors) if part == "alpha"]
    try:
        lora = parse_lora(tensors, metadata, read_peft_config(path, shapes, has_alpha(metadata, own, shapes)))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if expected and lora.target != expected:
        raise InputError(f"{path} is a LoRA for the {lora.target}, not for the {expected}: are the two files swapped?")
    return lora


def parse_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, peft: str | None = None) -> Lora:
    """Parse a LoRA state dict: pair its factors and find out its target.

    Args:
        tensors: by PEFT's keys, with or without a prefix.
        metadata: the file's header, which may contain alpha.
        peft: text of PEFT's ``adapter_config.json``, which may contain alpha, too.

    Raises:
        InputError: for keys that are not PEFT's or occur twice, factors that are missing or do not match, modules of both
            parts, or contradictory values of alpha.

    >>> lora = parse_lora({"proj_out.lora_A.weight": torch.ones(2, 8), "proj_out.lora_B.weight": torch.ones(4, 2)})
    >>> lora.target, lora.pairs["proj_out"].rank, lora.pairs["proj_out"].weight_shape
    ('transformer', 2, (4, 8))
    """
    parts: dict[str, dict[str, Tensor]] = {}
    foreign, again, prefixes = [], [], set()
    for key, tensor in tensors.items():
        prefix, module, part = split_key(key)
        if part is None:
            foreign.append(key)
        elif parts.setdefault(module, {}).setdefault(part, tensor) is not tensor:
            again.append(key)
        else:
            prefixes.add(prefix)
    if foreign or not parts:
        raise InputError(_foreign(tensors, foreign) if foreign else "the LoRA is empty")
    if again:
        raise InputError(f"the LoRA has some modules twice, under different prefixes: {some(again)}")
    broken = [name for name, found in parts.items() if not _multiplies(found)]
    if broken:
        raise InputError(f"the LoRA factors of {some(broken)} are incomplete or do not match")
    targets = {target_of(name) for name in parts}
    if len(targets) > 1:
        raise InputError("the LoRA has modules of both the transformer and the VAE: expected one file for each")
    alphas = _alphas(parts, metadata or {}, prefixes.pop() if len(prefixes) == 1 else "", peft)
    pairs = {name: LoraPair(found["down"], found["up"], alphas.values[name]) for name, found in parts.items()}
    return Lora(targets.pop(), pairs, alphas.source)


def misfits(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Modules of ``lora`` that a model does not have, or has with another shape, each with the reason.

    Args:
        shapes: the model's weight shapes by module name, as ``weight_shapes`` returns them.
    """
    found = []
    for name, pair in lora.pairs.items():
        if name not in shapes:
            found.append(f"{name} (not in the model)")
        elif shapes[name] != pair.weight_shape:
            found.append(f"{name} (LoRA {pair.weight_shape}, model {shapes[name]})")
    return found


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of all linear layers and convolutions by module name; works on the meta device."""
    return {
        name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


def check_fit(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``InputError`` with the modules of ``lora`` that do not fit a model with these weight shapes."""
    found = misfits(lora, shapes)
    if found:
        raise InputError(
            f"the {lora.target} LoRA does not fit this model: {len(found)} of {len(lora.pairs)} modules do not match: "
            f"{some(found)}. Is it for another base model?"
        )


@torch.no_grad()
def merge_lora(model: nn.Module, lora: Lora, strength: float = 1.0) -> int:
    """Add ``lora`` to the weights of ``model`` in place, in fp32, rounding once to each weight's type.

    Returns:
        The number of changed modules.

    Raises:
        InputError: if a module does not fit; nothing is changed then. Also if the result exceeds the range of a weight's type;
            the model is of no use then.

    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> before = model[0].weight.clone()
    >>> lora = parse_lora({"0.lora_A.weight": torch.ones(2, 8), "0.lora_B.weight": torch.ones(4, 2)})
    >>> merge_lora(model, lora, strength=0.5)
    1
    >>> torch.allclose(model[0].weight, before + 1)
    True
    """
    check_fit(lora, weight_shapes(model))
    for name, pair in lora.pairs.items():
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        weight.copy_(weight.float() + pair.delta(strength).to(weight.device))
        if not is_finite(weight):
            kind = str(weight.dtype).removeprefix("torch.")
            raise InputError(
                f"the {lora.target} LoRA at strength {strength:g} takes {name} beyond the range of {kind}: lower its strength "
                f"(the file gives {pair.scale:g}), or choose bf16 or fp32"
            )
    return len(lora.pairs)


def _foreign(tensors: Mapping[str, Tensor], keys: list[str]) -> str:
    kind = recognise({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    if kind is None or kind.fits:
        return f"not a PEFT LoRA: unexpected keys {some(keys)}" + (f"; this is {kind.name}: {kind.use}" if kind else "")
    return f"this is {kind.name} ({some(keys)}), which is not supported: {kind.use}"


def _multiplies(found: Mapping[str, Tensor]) -> bool:
    if not {"down", "up"} <= set(found):
        return False
    down, up = found["down"], found["up"]
    convolution = down.ndim == 4 and up.ndim == 4 and tuple(up.shape[2:]) == (1, 1)
    linear = down.ndim == 2 and up.ndim == 2
    return (linear or convolution) and up.shape[1] == down.shape[0] > 0


def _alphas(parts: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str], prefix: str, peft: str | None) -> Alphas:
    """Alpha of each module: from its tensor, otherwise from the header, otherwise the rank."""
    own = {}
    for name, found in parts.items():
        if "alpha" in found:
            if found["alpha"].numel() != 1:
                raise InputError(f"{name}.alpha has the shape {tuple(found['alpha'].shape)}: expected one number")
            own[name] = float(found["alpha"])
    shapes = {name: tuple(found["down"].shape) for name, found in parts.items()}
    given = header_alphas(metadata, prefix, shapes, own, peft)
    return Alphas({name: float(shape[0]) for name, shape in shapes.items()} | dict(given.values), given.source)
