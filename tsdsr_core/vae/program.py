"""The two halves of an autoencoder as a neutral list of passes that hold the autoencoder's own modules.

Takes diffusers' ``AutoencoderKL`` and the original layout that hosts use (CompVis LDM: ``encoder.down``, ``decoder.up``).
Both are recognised by their attributes; neither library is imported. Nothing of the autoencoder is changed. Parts that went
through ``torch.compile`` count as what they were made of: the passes need their modules one by one.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from .passes import PassSpec


class Replaced(InputError):
    """A part of a supported kind that calculates something else, because its padding or a method of it was replaced."""


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution; where there is a norm, of the normalised input after SiLU."""

    name: str
    spec: PassSpec
    module: nn.Module
    norm: nn.GroupNorm | None = None
    shortcut: nn.Module | None = None
    """1x1 convolution through which x goes before the result is added to it."""


@dataclass(frozen=True, eq=False)
class KeyValue:
    """Keys and values of an attention with one head; the projections are linear or 1x1 convolutions."""

    name: str
    spec: PassSpec
    norm: nn.GroupNorm
    key: nn.Module
    value: nn.Module


@dataclass(frozen=True, eq=False)
class Attention:
    """Queries, attention and its output projection, added to x."""

    name: str
    spec: PassSpec
    norm: nn.GroupNorm
    query: nn.Module
    out: nn.Module


Op = Conv | KeyValue | Attention
Program = tuple[Op, ...]


@dataclass(frozen=True)
class _Layout:
    """Names of the parts of an encoder or decoder."""

    levels: dict[str, str]
    resnets: str
    resample: dict[str, str]
    mid: tuple[str, str, str]
    """Residual block, attention, residual block."""
    projections: tuple[str, str, str, str, str]
    """Norm, queries, keys, values and output of the attention."""
    shortcut: str
    norm_out: str
    reversed_up: bool
    """Whether the decoder's levels are listed from the finest on."""


_WHOLE = "the autoencoder"
_LAYOUTS = (
    _Layout(
        {"encoder": "down_blocks", "decoder": "up_blocks"}, "resnets",
        {"encoder": "downsamplers.0", "decoder": "upsamplers.0"},
        ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        ("group_norm", "to_q", "to_k", "to_v", "to_out.0"), "conv_shortcut", "conv_norm_out", False,
    ),
    _Layout(
        {"encoder": "down", "decoder": "up"}, "block", {"encoder": "downsample", "decoder": "upsample"},
        ("mid.block_1", "mid.attn_1", "mid.block_2"), ("norm", "q", "k", "v", "proj_out"), "nin_shortcut", "norm_out", True,
    ),
)  # fmt: skip
_EXPECTED: dict[str, Any] = {
    "time_emb_proj": None, "upsample": None, "downsample": None, "output_scale_factor": 1.0, "tanh_out": False, "heads": 1,
    "residual_connection": True, "rescale_output_factor": 1.0, "interpolate": True, "use_conv_transpose": False,
    "scale_factor": 2.0, "spatial_norm": None, "norm_q": None, "norm_k": None, "norm_cross": None, "carried": False,
}  # fmt: skip
"""What settings of blocks must be, where a block has them."""


def decoder_program(vae: Any, patched: bool = False) -> Program:
    """Latents to pixels, as ``vae.decode``.

    Args:
        patched: whether a host will change weights before it runs them: what adds nothing now may then.

    Raises:
        InputError: names the first module that is not supported.
    """
    return _measured([*_pointwise(vae, "post_quant_conv"), *_half(vae, "decoder", patched)])


def encoder_program(vae: Any, patched: bool = False) -> Program:
    """Pixels to the posterior's mean and log-variance, one after the other along the channels; the mean is the mode.

    Args:
        patched: as for ``decoder_program``.

    Raises:
        InputError: names the first module that is not supported.
    """
    return _measured([*_half(vae, "encoder", patched), *_pointwise(vae, "quant_conv")])


def plain(module: Any) -> Any:
    """``module``, or what it was before ``torch.compile``."""
    while isinstance(module, nn.Module) and "_orig_mod" in dict(module.named_children()):
        module = module._orig_mod
    return module


def _measured(ops: list[Op]) -> Program:
    """Ask each pass for mean and variance of its result where the next one normalises that."""
    wanted = [*(op.spec.normalised for op in ops[1:]), False]
    return tuple(
        replace(op, spec=replace(op.spec, measured=want and op.spec.kind != "keys"))
        for op, want in zip(ops, wanted, strict=True)
    )


def _pointwise(vae: Any, name: str) -> list[Op]:
    module = _find(vae, name)
    return [] if module is None else [_conv(name, module, 1)]


def _half(vae: Any, half: Literal["encoder", "decoder"], patched: bool) -> list[Op]:
    vae = plain(vae)
    _check(_WHOLE, vae, ("encoder", "decoder", "quant_conv", "post_quant_conv", "regularization"))
    root = _child(vae, _WHOLE, half)
    layout = next((layout for layout in _LAYOUTS if hasattr(root, layout.levels[half])), None)
    if layout is None:
        raise _unsupported(half, root, "it has no levels of a known name")
    levels, mid = layout.levels[half], layout.mid[0].partition(".")[0]
    _check(half, root, ("conv_in", levels, mid, layout.norm_out, "conv_act", "conv_out"))
    middle = _middle(root, half, layout, patched)
    finer = []
    blocks = [(index, plain(block)) for index, block in enumerate(_child(root, half, levels))]
    for index, block in reversed(blocks) if half == "decoder" and layout.reversed_up else blocks:
        finer += _level(f"{half}.{levels}.{index}", block, layout, half, patched)
    first = _conv(f"{half}.conv_in", _child(root, half, "conv_in"))
    norm = _norm(f"{half}.{layout.norm_out}", _child(root, half, layout.norm_out))
    last = _conv(f"{half}.conv_out", _child(root, half, "conv_out"), norm=norm)
    return [first, *middle, *finer, last] if half == "decoder" else [first, *finer, *middle, last]


def _middle(root: Any, half: str, layout: _Layout, patched: bool) -> list[Op]:
    before, attention, after = layout.mid
    parent = before.partition(".")[0]
    allowed = {name.removeprefix(f"{parent}.").partition(".")[0] for name in layout.mid}
    middle = _child(root, half, parent)
    _check(f"{half}.{parent}", middle, allowed)
    for name in allowed & {"resnets", "attentions"}:
        if len(getattr(middle, name)) != {"resnets": 2, "attentions": 1}[name]:
            raise _unsupported(f"{half}.{parent}.{name}", middle, f"it has {len(getattr(middle, name))} parts")
    return [
        *_resnet(f"{half}.{before}", _child(root, half, before), layout, patched),
        *_attention(f"{half}.{attention}", _find(root, attention), layout, patched),
        *_resnet(f"{half}.{after}", _child(root, half, after), layout, patched),
    ]


def _level(name: str, block: Any, layout: _Layout, half: Literal["encoder", "decoder"], patched: bool) -> list[Op]:
    resample = layout.resample[half]
    _check(name, block, (layout.resnets, resample.partition(".")[0]))
    ops = []
    for index, resnet in enumerate(_child(block, name, layout.resnets)):
        ops += _resnet(f"{name}.{layout.resnets}.{index}", plain(resnet), layout, patched)
    sampler = _find(block, resample)
    if sampler is not None:
        _check(f"{name}.{resample}", sampler, ("conv", "Conv2d_0"))
        conv = _child(sampler, f"{name}.{resample}", "conv")
        if half == "encoder":
            op = _conv(f"{name}.{resample}.conv", conv, stride=2, padding=0)
            ops.append(replace(op, spec=replace(op.spec, rescale="down")))
        else:
            op = _conv(f"{name}.{resample}.conv", conv)
            ops.append(replace(op, spec=replace(op.spec, rescale="up")))
    return ops


def _resnet(name: str, block: Any, layout: _Layout, patched: bool) -> list[Op]:
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))`` in two passes; none where ``conv2`` is zero, since it then is ``x``."""
    _check(name, block, ("norm1", "conv1", "norm2", "conv2", layout.shortcut, "dropout", "nonlinearity", "swish"))
    shortcut = _find(block, layout.shortcut)
    if shortcut is not None:
        _conv(f"{name}.{layout.shortcut}", shortcut, 1)
    norms = [_norm(f"{name}.{part}", _child(block, name, part)) for part in ("norm1", "norm2")]
    first = _conv(f"{name}.conv1", _child(block, name, "conv1"), norm=norms[0])
    second = _conv(f"{name}.conv2", _child(block, name, "conv2"), norm=norms[1])
    if shortcut is None and not patched and is_zero(second.module):
        return []
    return [
        replace(first, spec=replace(first.spec, kind="residual_start")),
        replace(
            second, spec=replace(second.spec, kind="residual_end", residual_channels=first.spec.in_channels), shortcut=shortcut
        ),
    ]


def _attention(name: str, attention: Any, layout: _Layout, patched: bool) -> list[Op]:
    """``x + out(attention(norm(x)))``; nothing where the output projection is zero, since it then adds nothing."""
    if attention is None:
        return []
    _check(name, attention, [part.partition(".")[0] for part in layout.projections])
    norm, query, key, value, out = (_child(attention, name, part) for part in layout.projections)
    if not patched and is_zero(out):
        return []
    norm = _norm(f"{name}.{layout.projections[0]}", norm)
    for part, module in zip(layout.projections[1:], (query, key, value, out), strict=True):
        _check_methods(f"{name}.{part}", module)
        if not isinstance(module, nn.Linear):
            _conv(f"{name}.{part}", module, 1)
    width = norm.num_channels
    spec = PassSpec("keys", width, width, halo=0, normalised=True)
    return [KeyValue(name, spec, norm, key, value), Attention(name, replace(spec, kind="attention"), norm, query, out)]


def _conv(
    name: str, module: Any, kernel: int = 3, stride: int = 1, padding: int | None = None, norm: nn.GroupNorm | None = None
) -> Conv:
    """A pass over x; checks that the convolution has this geometry and takes zeros beyond the border."""
    padding = kernel // 2 if padding is None else padding
    if not isinstance(module, nn.Conv2d):
        raise _unsupported(name, module, "expected a Conv2d")
    _check_methods(name, module)
    found = module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode
    if found != ((kernel, kernel), (stride, stride), (padding, padding), (1, 1), "zeros"):
        raise _unsupported(name, module, f"kernel, stride, padding, dilation and padding mode are {found}")
    spec = PassSpec("conv", module.in_channels, module.out_channels, halo=kernel // 2, normalised=norm is not None)
    return Conv(name, spec, module, norm)


def _norm(name: str, module: Any) -> nn.GroupNorm:
    if not isinstance(module, nn.GroupNorm):
        raise _unsupported(name, module, "expected a GroupNorm")
    _check_methods(name, module)
    return module


_nonzero: MutableMapping[nn.Module, list[tuple[int, int]]] = weakref.WeakKeyDictionary()
"""Projections that were not zero, with the state of their parameters then. Asking a device waits for it, and running one that
has become zero unnoticed is no fault."""


def is_zero(module: nn.Module) -> bool:
    """Whether a projection always gives 0; not where a host adds patches to its weights or has not loaded them yet."""
    if getattr(module, "weight_function", ()) or getattr(module, "bias_function", ()):
        return False
    smallest_first = sorted(module.parameters(), key=lambda p: p.numel())  # a bias tells soonest that it is not
    state = [(id(p), 0 if p.is_inference() else p._version) for p in smallest_first]
    if any(p.is_meta for p in smallest_first) or _nonzero.get(module) == state:
        return False
    if any(bool(p.any()) for p in smallest_first):
        _nonzero[module] = state
        return False
    return True


def _check(name: str, module: Any, parts: Any) -> None:
    """Raise ``InputError`` where ``module`` has parts or settings that would be left out."""
    if not isinstance(module, nn.Module):
        raise _unsupported(name, module, "expected a module")
    _check_methods(name, module)
    for part, child in module.named_children():
        child = plain(child)
        if isinstance(child, nn.ModuleList) and not len(child):
            continue
        if part not in parts:
            raise _unsupported(f"{name}.{part}", child, "there is no place for it")
        if part in ("nonlinearity", "swish", "conv_act") and not isinstance(child, nn.SiLU):
            raise _unsupported(f"{name}.{part}", child, "expected SiLU")
    for setting, value in _EXPECTED.items():
        found = getattr(module, setting, value)
        if found != value and not isinstance(found, nn.Module):
            raise _unsupported(name, module, f"{setting} is {found!r}")


def _check_methods(name: str, module: nn.Module) -> None:
    """Raise ``Replaced`` where a method of this one module is not its class's; libraries may wrap the whole autoencoder."""
    for method in {"forward", "_conv_forward"} & vars(module).keys():
        found = vars(module)[method]
        found = inspect.unwrap(found) if hasattr(found, "_torchdynamo_orig_callable") else found  # what was compiled
        same = getattr(found, "__func__", found) is getattr(type(module), method) or name == _WHOLE
        if not same and not (method == "_conv_forward" and _pads_zeros(module)):
            raise Replaced(f"the tiled VAE does not support {name}: its {method} was replaced")
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise Replaced(f"the tiled VAE does not support {name}: its padding is {module.padding_mode}")


def _pads_zeros(conv: Any) -> bool:
    """Whether a replaced ``_conv_forward`` does the same all the same, as those for seamless tiling do when it is off."""
    x, weight = (torch.ones(1, 1, *side, dtype=torch.float32, device="cpu") for side in ((4, 4), conv.kernel_size))
    try:
        return torch.equal(conv._conv_forward(x, weight, None), F.conv2d(x, weight, None, conv.stride, conv.padding))
    except Exception:  # whatever it needs, it is not the plain one
        return False


def _find(module: Any, path: str) -> Any:
    """The part of ``module`` at a dotted path, or None."""
    module = plain(module)
    for name in path.split("."):
        module = plain(getattr(module, name, None))
    return module


def _child(module: Any, owner: str, path: str) -> Any:
    found = _find(module, path)
    if found is None:
        raise _unsupported(f"{owner}.{path}", found, "it is missing")
    return found


def _unsupported(name: str, module: Any, why: str) -> InputError:
    kind = "" if module is None else f" ({type(module).__name__})"
    return InputError(f"the tiled VAE does not support {name}{kind}: {why}")
