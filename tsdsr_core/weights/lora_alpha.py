"""Alpha of a LoRA from the header of its file, in addition to or instead of ``.alpha`` tensors.

Sources:

- ``lora_adapter_metadata``: PEFT's ``LoraConfig`` as JSON, written by diffusers, keys prefixed by the part of the pipeline;
- ``adapter_config.json`` beside the file (see ``peft_config``): the same, written by PEFT;
- ``ss_network_alpha`` of kohya's trainers, with ``conv_alpha`` in ``ss_network_args``; ``lora_alpha``; ``network_alpha``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import is_bounded
from ..errors import InputError
from ..system.atomic import reason
from .reading import parse_json

_PEFT = "adapter_config.json"
_DIFFUSERS = "lora_adapter_metadata"
_PLAIN = ("ss_network_alpha", "network_alpha", "lora_alpha")
_TOLERANCE = 0.01
"""Relative tolerance: an alpha stored in bf16 may be off by 0.4 %."""
_REFUSED = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "lora_bias": "a LoRA with biases", "layer_replication": "layer replication",
    "target_parameters": "a LoRA of bare parameters", "trainable_token_indices": "trained tokens",
    "alora_invocation_tokens": "aLoRA", "use_bdlora": "BD-LoRA", "arrow_config": "Arrow", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}  # fmt: skip
"""PEFT's settings for adapters that are not plain LoRAs, and the kind of adapter."""
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that also change the base model."""

FactorShapes = Mapping[str, tuple[int, ...]]
"""Shape of the down factor of each module: (rank, ...), four axes for a convolution."""


@dataclass(frozen=True)
class Alphas:
    """What a LoRA file says about alpha."""

    values: Mapping[str, float]
    """By module, so that ``W' = W + alpha / rank B A``; only for modules whose alpha is given somewhere."""
    source: str
    """Where they come from; "" if alpha is given nowhere."""


def has_alpha(metadata: Mapping[str, str], own: Collection[str], modules: Collection[str]) -> bool:
    """Whether a file gives alpha by itself: for all ``modules``, of which ``own`` have a tensor of it, or in its header."""
    return set(own) >= set(modules) or _DIFFUSERS in metadata or any(name in metadata for name in _PLAIN)


def header_alphas(
    metadata: Mapping[str, str], prefix: str, shapes: FactorShapes, own: Mapping[str, float], peft: str | None = None
) -> Alphas:
    """Alpha by module from a file's tensors, its header and PEFT's configuration.

    Args:
        metadata: the safetensors file's metadata.
        prefix: prefix of the file's keys without the dot; "" for none.
        shapes: of the down factors.
        own: values of the file's ``.alpha`` tensors, which take precedence over kohya's single alpha in the header.
        peft: text of PEFT's configuration, if there is one.

    Raises:
        InputError: for a header that cannot be read, contradicts itself or the tensors, or belongs to an unsupported adapter.
    """
    plain = {} if own.keys() >= shapes.keys() else _plain(metadata, shapes)
    alphas = plain | dict(own)
    sources = [name for name, found in (("the file's header", plain), (".alpha tensors", own)) if found]
    for name, text in ((_DIFFUSERS, metadata.get(_DIFFUSERS)), (_PEFT, peft)):
        if text is None:
            continue
        try:
            settings = _section(parse_settings(text), prefix)
            found = _configured(settings, shapes)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        _agree(alphas, found, f"{name} differs from the rest of the file")
        alphas |= found
        if found:
            sources = [f"{name}, rsLoRA: times the root of the rank" if settings.get("use_rslora") else name]
    return Alphas(alphas, " and ".join(sources))


def _agree(one: Mapping[str, float], other: Mapping[str, float], why: str) -> None:
    """Raise ``InputError`` if two sources give different alphas for a module."""
    for module in one.keys() & other.keys():
        if not math.isclose(one[module], other[module], rel_tol=_TOLERANCE):
            raise InputError(
                f"the alpha of {module} is either {one[module]:g} or {other[module]:g}: {why}, so its strength is unknown; "
                "export the LoRA again"
            )


def parse_settings(text: str) -> dict[str, Any]:
    """Settings that are written as a JSON object.

    Raises:
        InputError: for anything else.
    """
    try:
        value = parse_json(text)
    except ValueError as error:
        raise InputError(f"not valid JSON: {reason(error)}") from error
    if not isinstance(value, dict):
        raise InputError("expected a JSON object")
    return value


def _section(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The settings of the part ``prefix`` in a pipeline's metadata, or of its only part under any name."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        part, _, name = key.rpartition(".")
        sections.setdefault(part, {})[name] = value
    if prefix in sections:
        return sections[prefix]
    if len(sections) > 1:
        raise InputError(f"expected settings {f'for {prefix}' if prefix else 'without a prefix'}, "
                         f"found them for {', '.join(sorted(sections))}")  # fmt: skip
    return next(iter(sections.values()), {})


def _configured(config: Mapping[str, Any], shapes: FactorShapes) -> dict[str, float]:
    """Alpha by module, by PEFT's rules."""
    if not config:
        return {}
    if str(config.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        raise InputError(f"adapter of type {config['peft_type']}: expected LORA")
    for name, meaning in _REFUSED.items():
        if config.get(name):
            raise InputError(f"{name} makes this {meaning}, which is not supported: expected a plain LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise InputError(f"init_lora_weights {start!r} changes the base model too: convert it to a plain LoRA with PEFT")
    alphas = {}
    for module, shape in shapes.items():
        rank = rank_of(config, module)
        if rank != shape[0]:
            raise InputError(f"rank {rank:g} for {module}, but its tensors have rank {shape[0]}: they do not belong together")
        alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", module)
        alphas[module] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return alphas


def rank_of(config: Mapping[str, Any], module: str) -> float:
    """The rank that PEFT's settings give ``module``.

    Raises:
        InputError: if it is missing or no number.
    """
    return _by_pattern(config, "rank_pattern", "r", module)


def _by_pattern(config: Mapping[str, Any], patterns: str, name: str, module: str) -> float:
    """The value of the first pattern that matches the end of the module's name, as PEFT's ``get_pattern_key`` finds it."""
    given = config.get(patterns) or {}
    if not isinstance(given, dict):
        raise InputError(f"{patterns} = {given!r}: expected an object")
    for pattern, value in given.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise InputError(f"{patterns} has {pattern!r}: expected a regular expression") from error
        if matches:
            return _number(value, f"{patterns} of {pattern}")
    if name not in config:
        raise InputError(f"{name} is missing")
    return _number(config[name], name)


def _plain(metadata: Mapping[str, str], shapes: FactorShapes) -> dict[str, float]:
    """Alpha by module from headers with a single alpha; 0 and None mean the rank, as in kohya's trainers."""
    given = {name: _text_number(metadata[name], name) for name in _PLAIN if name in metadata}
    alphas: dict[str, float] = {}
    for alpha in given.values():
        if alpha:
            each = dict.fromkeys(shapes, alpha)
            _agree(alphas, each, f"the header has both, in {' and '.join(given)}")
            alphas |= each
    arguments = metadata.get("ss_network_args")
    try:
        conv = parse_settings(arguments) if arguments not in (None, "", "None", "null") else {}
    except ValueError as error:
        raise InputError(f"ss_network_args: {error}") from error
    if "conv_dim" in conv or "conv_alpha" in conv:
        alpha = _text_number(conv.get("conv_alpha", 1.0), "conv_alpha in ss_network_args")
        alphas |= {module: alpha or shape[0] for module, shape in shapes.items() if max(shape[2:], default=1) > 1}
    return alphas


def _text_number(value: Any, name: str) -> float:
    if value in (None, "", "None", "null"):
        return 0.0
    try:
        return _number(float(value), name)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} = {value!r}: expected a number") from error


def _number(value: Any, name: str) -> float:
    if not is_bounded(value):
        raise InputError(f"{name} = {value!r}: expected a finite number")
    return float(value)
