"""Prompt embeddings: the fixed text condition of the one-step model."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import write_tensors

TOKENS_FILE, POOLED_FILE = "prompt_embeds.pt", "pool_embeds.pt"
TOKENS_KEY, POOLED_KEY = "prompt_embeds", "pooled_prompt_embeds"


@dataclass(frozen=True)
class PromptEmbeds:
    """SD3's text condition."""

    tokens: Tensor
    """``(1, tokens, width)``; 333 x 4096 in SD3 (77 CLIP and 256 T5 tokens)."""
    pooled: Tensor
    """``(1, width)``; 2048 in SD3."""

    def __post_init__(self) -> None:
        shapes = f"tokens {tuple(self.tokens.shape)} and pooled {tuple(self.pooled.shape)}"
        if self.tokens.ndim != 3 or self.pooled.ndim != 2 or len(self.tokens) != 1 or len(self.pooled) != 1:
            raise ValueError(f"prompt embeddings of {shapes}: expected (1, tokens, width) and (1, width)")
        if not (torch.isfinite(self.tokens).all() and torch.isfinite(self.pooled).all()):
            raise ValueError(f"prompt embeddings of {shapes} have NaN or infinite values: the file is damaged")

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PromptEmbeds:
        """The same embeddings elsewhere."""
        return PromptEmbeds(self.tokens.to(device, dtype), self.pooled.to(device, dtype))

    def pruned(self, count: int) -> PromptEmbeds:
        """At most ``count`` tokens, those that differ most: greedy k-centre selection (Gonzalez 1985) from the first one.

        SD3 pads every prompt to 333 tokens, and its transformer carries the padding through every block.

        Raises:
            ValueError: for a count below 1.
        """
        if count < 1:
            raise ValueError(f"{count} prompt tokens: expected at least 1")
        tokens = self.tokens[0].float()
        kept, distance = [0], torch.full((len(tokens),), torch.inf, device=tokens.device)
        while len(kept) < min(count, len(tokens)):
            distance = distance.minimum((tokens - tokens[kept[-1]]).norm(dim=1))
            distance[kept] = -1
            kept.append(int(distance.argmax()))
        return PromptEmbeds(self.tokens[:, sorted(kept)], self.pooled)


def load_prompt(path: Path) -> PromptEmbeds:
    """Read the official folder (``prompt_embeds.pt`` and ``pool_embeds.pt``) or one safetensors file.

    A safetensors file has the keys ``prompt_embeds`` and ``pooled_prompt_embeds``, and may have more, as bundles do.  The
    ``.pt`` files are read without executing anything (``weights_only``).

    Raises:
        ValueError: for a missing, damaged or foreign file, naming it.
    """
    if path.is_dir():
        return PromptEmbeds(_batched(_load_tensor(path / TOKENS_FILE), 3), _batched(_load_tensor(path / POOLED_FILE), 2))
    if not path.is_file():
        raise ValueError(f"no prompt embeddings at {path}: expected a folder with {TOKENS_FILE} and {POOLED_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if not {TOKENS_KEY, POOLED_KEY} <= keys:
                raise ValueError(f"{path} has the keys {sorted(keys)[:5]}: expected {TOKENS_KEY} and {POOLED_KEY}")
            tokens, pooled = file.get_tensor(TOKENS_KEY), file.get_tensor(POOLED_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    return PromptEmbeds(_batched(tokens, 3), _batched(pooled, 2))


def save_prompt(path: Path, prompt: PromptEmbeds) -> None:
    """Write the safetensors file that ``load_prompt`` reads, all or nothing."""
    write_tensors(path, {TOKENS_KEY: prompt.tokens, POOLED_KEY: prompt.pooled})


def _load_tensor(path: Path) -> Tensor:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the official embeddings are {TOKENS_FILE} and {POOLED_FILE} in one folder")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or holds more than a tensor: {error}") from error
    if not isinstance(value, Tensor):
        raise ValueError(f"{path} holds a {type(value).__name__}: expected one tensor")
    return value.detach()


def _batched(value: Tensor, dimensions: int) -> Tensor:
    return value[None] if value.ndim == dimensions - 1 else value
