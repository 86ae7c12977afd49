"""Transformers with layers unlike the host's: folded ones (``tsdsr_core.sd3.fold``), and 8-bit and int8 weights
(``tsdsr_core.weights.float8``, ``int8``) in the host's quantised layers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.quant_ops
import comfy.utils
import torch
from torch import Tensor, nn

from ...tsdsr_core.system.atomic import reason
from ...tsdsr_core.system.memory import is_out_of_memory
from ...tsdsr_core.weights import float8, int8
from ...tsdsr_core.weights.float8 import SCALE
from ..types import HostModel

log = logging.getLogger("tsdsr")

POOLED = "tsdsr_pooled"
"""Name of the attachment with which a folded model carries the one pooled prompt that it takes."""
_TIME_CHANNELS = 256
_FLOAT8 = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
"""What the host reads beside a weight: its type, and that products are not to be rounded to 8 bits as well."""
_INT8 = "int8_tensorwise"
"""The host's name of int8 weights, rotated or not; it multiplies them with inputs that it rounds to int8 as well."""


class NoEmbedding(nn.Module):
    """Takes the place of the time embedder; the projections that read it have a weight of zero."""

    def forward(self, timestep: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
        """One zero for each sample, ``(B, 1)``."""
        return torch.zeros(len(timestep), 1, dtype=dtype, device=timestep.device)


def padded_to_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` in the shapes that the host's loader expects; what was folded away is zeros that take no memory."""
    hidden = weights["proj_out.weight"].shape[1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros((), dtype=weights["proj_out.weight"].dtype).expand(shape)

    found = dict(weights)
    for key in filter(_is_folded, weights):
        rows = len(weights[key])
        # of two rows for each channel, scale and shift, the host swaps the halves in place, which needs memory
        found[key] = zeros(rows, hidden).contiguous() if rows == 2 * hidden else zeros(rows, hidden)
    embedder = "time_text_embed.timestep_embedder"
    for name, inputs in (("linear_1", _TIME_CHANNELS), ("linear_2", hidden)):
        found[f"{embedder}.{name}.weight"] = zeros(hidden, inputs)
        found[f"{embedder}.{name}.bias"] = zeros(hidden)
    return found


def remove_padding(model: HostModel, pooled: Tensor) -> None:
    """Take the zeros out of a MODEL just loaded from ``padded_to_host`` weights; nobody else holds it yet."""
    diffusion = model.model.diffusion_model
    for module in diffusion.modules():
        if hasattr(module, "adaLN_modulation"):
            projection = module.adaLN_modulation[1]
            projection.weight = nn.Parameter(projection.weight.detach()[:, :1].clone(), requires_grad=False)
            projection.in_features = 1
    diffusion.t_embedder = NoEmbedding()
    model.model.state_dict_for_saving = _refuse_saving
    model.size = 0  # the host then measures it again
    model.set_attachments(POOLED, pooled)


def _refuse_saving(*_: Any, **__: Any) -> Any:
    raise ValueError("this model is folded, and ComfyUI cannot load such files: use the bundle that it came from instead")


def float8_for_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bundle's 8-bit transformer in the names and shapes that the host's loader knows as quantised.

    A device that cannot hold 8-bit numbers, such as Apple's, gets the weights dequantised.

    Raises:
        ValueError: where the names are not SD3's.
    """
    if not comfy.model_management.supports_cast(comfy.model_management.get_torch_device(), float8.STORED):
        return float8.dequantise(weights, weights["proj_out.weight"].dtype)
    return _marked(weights, lambda weight: _FLOAT8, lambda scales: scales[0])  # which query, key and value share


def int8_for_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for an int8 transformer; dequantised where ``multiplies_int8`` says no.

    Raises:
        ValueError: where the names are not SD3's.
    """
    if not multiplies_int8(comfy.model_management.get_torch_device()):
        return int8.dequantise(weights, weights["proj_out.weight"].dtype)
    return _marked(weights, lambda weight: _int8_layer(weight.shape[1]), lambda scales: torch.cat(scales))


def multiplies_int8(device: torch.device) -> bool:
    """Whether the host knows rotated int8 weights, and ``device`` is made for products of them, which one product shows.

    Such weights have no other use in the host, which multiplies them in int8 wherever they are: on a CPU without instructions
    for it about a hundred times more slowly than in fp32.
    """
    algorithm = comfy.quant_ops.QUANT_ALGOS.get(_INT8)
    if algorithm is None or device.type == "cpu":
        return False
    name = algorithm["comfy_tensor_layout"]
    try:
        layout: Any = comfy.quant_ops.get_layout_class(name)
        if not layout.supports_fast_matmul():
            return False
        scale = torch.full((32, 1), 1 / 127, dtype=torch.float32, device=device)
        form = {"scale": scale, "orig_dtype": torch.float16, "orig_shape": (32, 256)}
        numbers = torch.full((32, 256), 127, dtype=int8.STORED, device=device)
        weight = comfy.quant_ops.QuantizedTensor(numbers, name, layout.Params(**form, convrot=True, convrot_groupsize=256))
        product = nn.functional.linear(torch.ones(32, 256, dtype=torch.float16, device=device), weight)
        return bool(((product - 256).abs() < 1).all())  # ones stay ones when rotated
    except Exception as error:  # drivers and kernels fail in many ways
        if is_out_of_memory(error):
            raise
        log.warning("products in int8 fail here, so the weights are converted while loading: %s", reason(error))
        return False


def _int8_layer(width: int) -> dict[str, Any]:
    size = int8.group(width)
    return {"format": _INT8} if size == 1 else {"format": _INT8, "convrot": True, "convrot_groupsize": size}


def _marked(
    weights: Mapping[str, Tensor], layer: Callable[[Tensor], dict[str, Any]], join: Callable[[list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Quantised weights under the host's names, with scales and what the host reads beside a weight.

    Args:
        layer: what it reads, from the weight.
        join: the scale of a joint matrix from those of its parts.
    """
    # the host's own conversion from diffusers' names knows weights and biases, no scales
    rest = {key: weight for key, weight in weights.items() if not key.endswith(SCALE)}
    found = comfy.model_detection.convert_diffusers_mmdit(rest, "")
    if found is None or rest:
        raise ValueError(f"ComfyUI cannot load this bundle's quantised transformer as SD3; unused weights: {sorted(rest)[:8]}")
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    targets = _targets(weights)
    for key in filter(lambda key: key.endswith(SCALE), weights):
        target, start = targets[key.removesuffix(SCALE)]
        parts.setdefault(target, []).append((start, weights[key]))
    for target, scales in parts.items():
        found[target + SCALE] = join([scale for _, scale in sorted(scales, key=lambda part: part[0])])
        mark = json.dumps(layer(found[target])).encode()
        found[f"{target.removesuffix('.weight')}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    return found


def _targets(weights: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    """The host's key of each weight, and the first row it has there; query, key and value share a matrix."""
    heads = weights["pos_embed.proj.weight"].shape[0] // 64
    blocks = comfy.model_detection.count_blocks(weights, "transformer_blocks.{}.")
    names = comfy.utils.mmdit_to_diffusers({"depth": heads, "num_blocks": blocks})
    return {name: _place(target) for name, target in names.items()}


def _place(target: Any) -> tuple[str, int]:
    if isinstance(target, str):
        return target, 0
    key, offset, *_ = target
    return key, offset[1] if offset else 0


def _is_folded(key: str) -> bool:
    return key.endswith((".norm1.linear.weight", ".norm1_context.linear.weight")) or key == "norm_out.linear.weight"
