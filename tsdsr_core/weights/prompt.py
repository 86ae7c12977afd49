"""Prompt embeddings: the fixed text condition of the one-step model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checks import some
from ..errors import InputError
from ..system.atomic import no_file, write_tensors
from .kinds import recognise
from .reading import PICKLED, check_weights, is_finite, load_pickle, open_tensors

TOKENS_FILE, POOLED_FILE = "prompt_embeds.pt", "pool_embeds.pt"
TOKENS_KEY, POOLED_KEY = "prompt_embeds", "pooled_prompt_embeds"


@dataclass(frozen=True)
class Condition:
    """Text conditioning of each sample of a batch."""

    tokens: Tensor
    """``(B, T, D)``."""
    pooled: Tensor
    """``(B, P)``."""

    def expanded(self, count: int) -> Condition:
        """Repeat a single prompt for ``count`` samples."""
        return Condition(self.tokens.expand(count, -1, -1), self.pooled.expand(count, -1))

    def where(self, given: Tensor, other: Condition) -> Condition:
        """This condition for samples where ``given`` ``(B,)`` is true, ``other`` for the rest."""
        return Condition(
            torch.where(given[:, None, None], self.tokens, other.tokens), torch.where(given[:, None], self.pooled, other.pooled)
        )


@dataclass(frozen=True)
class PromptEmbeds:
    """SD3's text conditioning."""

    tokens: Tensor
    """``(1, tokens, width)``; 333 x 4096 in SD3 (77 CLIP and 256 T5 tokens)."""
    pooled: Tensor
    """``(1, width)``; 2048 in SD3."""

    def __post_init__(self) -> None:
        shapes = f"tokens {tuple(self.tokens.shape)} and pooled {tuple(self.pooled.shape)}"
        batches = self.tokens.ndim == 3 and self.pooled.ndim == 2 and len(self.tokens) == len(self.pooled) == 1
        if not batches or self.tokens.numel() == 0 or self.pooled.numel() == 0:
            raise InputError(f"prompt embeddings of {shapes}: expected (1, tokens, width) and (1, width)")
        if not (is_finite(self.tokens) and is_finite(self.pooled)):
            raise InputError(f"prompt embeddings of {shapes} have NaN or infinite values: the file is damaged")

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PromptEmbeds:
        """The same embeddings on another device or in another type.

        Raises:
            InputError: for values that the type cannot hold.
        """
        tokens, pooled = self.tokens.to(device, dtype), self.pooled.to(device, dtype)
        if not (is_finite(tokens) and is_finite(pooled)):
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"the prompt embeddings have values beyond {kind}: choose another dtype, fp32 or bf16")
        return PromptEmbeds(tokens, pooled)

    def condition(self, count: int = 1) -> Condition:
        """The same for ``count`` samples, without copies."""
        return Condition(self.tokens, self.pooled).expanded(count)

    def pruned(self, count: int) -> PromptEmbeds:
        """Keep at most ``count`` tokens, those that differ most: greedy k-centre selection (Gonzalez 1985) from the first one.

        SD3 pads every prompt to 333 tokens, and its transformer computes all of them in every block.

        Raises:
            InputError: for a count below 1.

        >>> tokens = torch.tensor([[[0.0], [0.1], [5.0]]])
        >>> PromptEmbeds(tokens, torch.zeros(1, 2)).pruned(2).tokens
        tensor([[[0.],
                 [5.]]])
        """
        if count < 1:
            raise InputError(f"{count} prompt tokens: expected at least 1")
        tokens = self.tokens[0].float()
        kept, distance = [0], torch.full((len(tokens),), torch.inf, dtype=torch.float32, device=tokens.device)
        while len(kept) < min(count, len(tokens)):
            distance = distance.minimum((tokens - tokens[kept[-1]]).norm(dim=1))
            distance[kept] = -1
            kept.append(int(distance.argmax()))
        return PromptEmbeds(self.tokens[:, sorted(kept)], self.pooled)


def load_prompt(path: Path) -> PromptEmbeds:
    """Read prompt embeddings from the official pair of ``.pt`` files or from a safetensors file.

    A pair is given as a folder with ``prompt_embeds.pt`` and ``pool_embeds.pt``, or as one of two files whose names end in
    these and otherwise agree.  A safetensors file has the keys ``prompt_embeds`` and ``pooled_prompt_embeds``; others are
    ignored, so that bundles work, too.  Nothing in ``.pt`` files is executed (``weights_only``).

    Raises:
        InputError: for a missing, damaged or unknown file, with its name.
    """
    if path.is_dir():
        return _load_pair(path / TOKENS_FILE, path / POOLED_FILE)
    if not path.is_file():
        raise InputError(f"{path} {no_file(path)}: expected a file, or a folder with {TOKENS_FILE} and {POOLED_FILE}")
    if path.suffix.lower() == PICKLED:
        pair = pair_of(path)
        if pair is None:
            raise InputError(f"{path}: expected a pair of files whose names end in {TOKENS_FILE} and {POOLED_FILE}")
        return _load_pair(*pair)
    with open_tensors(path) as file:
        keys = set(file.keys())
        if not {TOKENS_KEY, POOLED_KEY} <= keys:
            kind = recognise({key: file.shape(key) for key in keys})
            what = f"{path} is {kind.name}" if kind else f"{path} has the keys {some(sorted(keys))}"
            raise InputError(f"{what}: expected {TOKENS_KEY} and {POOLED_KEY}")
        tensors = {key: file.get_tensor(key) for key in (TOKENS_KEY, POOLED_KEY)}
    check_weights(path, tensors)
    return _prompt(path, tensors[TOKENS_KEY], tensors[POOLED_KEY])


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """The pair of files (tokens, pooled) that a ``.pt`` file belongs to, by its name in any case; None for other names."""
    for ending, other in ((TOKENS_FILE, POOLED_FILE), (POOLED_FILE, TOKENS_FILE)):
        if path.name.lower().endswith(ending):
            stem, found = path.name[: -len(ending)], path.name[-len(ending) :]
            partner = _beside(path, stem + (other.upper() if found.isupper() else other))
            return (path, partner) if ending == TOKENS_FILE else (partner, path)
    return None


def _beside(path: Path, name: str) -> Path:
    """The file ``name`` in the folder of ``path``, or one whose name differs only in case."""
    exact = path.with_name(name)
    if exact.is_file():
        return exact
    return next((other for other in sorted(path.parent.iterdir()) if other.name.lower() == name.lower()), exact)


def save_prompt(path: Path, prompt: PromptEmbeds) -> None:
    """Write the safetensors file that ``load_prompt`` reads, all or nothing."""
    write_tensors(path, {TOKENS_KEY: prompt.tokens, POOLED_KEY: prompt.pooled})


def _load_pair(tokens: Path, pooled: Path) -> PromptEmbeds:
    return _prompt(tokens, _load_tensor(tokens), _load_tensor(pooled))


def _prompt(path: Path, tokens: Tensor, pooled: Tensor) -> PromptEmbeds:
    try:
        return PromptEmbeds(_batched(tokens, 3), _batched(pooled, 2))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _load_tensor(path: Path) -> Tensor:
    if not path.is_file():
        raise InputError(
            f"{path} is missing: the official embeddings are a pair of files, {TOKENS_FILE} and {POOLED_FILE}, in one folder"
        )
    value = load_pickle(path)
    if not isinstance(value, Tensor):
        raise InputError(f"{path} holds a {type(value).__name__}: expected a tensor")
    check_weights(path, {path.stem: value})
    return value.detach()


def _batched(value: Tensor, dimensions: int) -> Tensor:
    return value[None] if value.ndim == dimensions - 1 else value
