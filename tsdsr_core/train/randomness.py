"""Random numbers as a function of what they are for, not of what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, number: int, stream: str) -> torch.Generator:
    """A CPU generator that is a function of its arguments alone: a run's seed, a sample or step, and a purpose."""
    digest = hashlib.blake2b(f"{seed} {number} {stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
