"""Random generators that depend only on their purpose, not on what was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def generator_for(seed: int, number: int, stream: str) -> torch.Generator:
    """A CPU generator that is a function of its arguments.

    Args:
        seed: of the run.
        number: of the sample or step.
        stream: the purpose, so that different uses draw independent numbers; file names in it may have any bytes.

    >>> first, again = (torch.rand(1, generator=generator_for(1, 7, "noise")) for _ in range(2))
    >>> bool(first == again)
    True
    """
    digest = hashlib.blake2b(f"{seed} {number} {stream}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def random_index(count: int, generator: torch.Generator) -> int:
    """A uniform random number from 0 to ``count - 1``."""
    return int(torch.randint(count, (1,), generator=generator))


def weighted_index(weights: Sequence[float], generator: torch.Generator) -> int:
    """A random index into ``weights``, drawn in proportion to them."""
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float32), 1, generator=generator))
