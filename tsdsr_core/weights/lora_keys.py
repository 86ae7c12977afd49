"""Keys of LoRA files: PEFT's ``<module>.lora_A.weight``, ``<module>.lora_B.weight`` and ``<module>.alpha``, with prefixes."""

from __future__ import annotations

from collections.abc import Mapping

PREFIXES = ("base_model.model.", "transformer.", "vae.")
_ENDINGS = (
    (".lora_A.weight", "down"), (".lora_B.weight", "up"), (".alpha", "alpha"),
    (".lora_A.default.weight", "down"), (".lora_B.default.weight", "up"),  # a model saved with the name of its adapter
)  # fmt: skip


def split_key(key: str) -> tuple[str, str, str | None]:
    """Split a LoRA key into prefix, module name and part ("down", "up", "alpha"); the part is None for other keys.

    >>> split_key("base_model.model.transformer.proj_out.lora_A.weight")
    ('transformer', 'proj_out', 'down')
    """
    found = ""
    for prefix in PREFIXES:
        if key.startswith(prefix):
            key, found = key.removeprefix(prefix), prefix
    for ending, part in _ENDINGS:
        if key.endswith(ending):
            return found.removesuffix("."), key.removesuffix(ending), part
    return found, key, None


def factor_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of the down factor, (rank, ...), of each module of a LoRA file, from the shapes of its tensors by key."""
    split = ((split_key(key), shape) for key, shape in shapes.items())
    return {module: shape for (_, module, part), shape in split if part == "down"}


def target_of(module: str) -> str:
    """ "vae" for a module of the autoencoder, else "transformer"."""
    return "vae" if module.split(".")[0] in ("encoder", "decoder", "quant_conv", "post_quant_conv") else "transformer"
