"""Torch's kernels for synchronised batch norms, which only GPUs have, on the CPU by their definition."""

import functools

import torch
from torch import Tensor


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return mean.float(), (variance + eps).rsqrt().float()


def gathered(
    x: Tensor, mean: Tensor, inverse: Tensor, running_mean: None, running_var: None, momentum: float, eps: float, counts: Tensor
) -> tuple[Tensor, Tensor]:
    assert counts.dtype == x.dtype, "the kernel reads one as the other"
    mean, share = mean.double(), (counts.double() / counts.double().sum())[:, None]
    whole = (share * mean).sum(0)
    variance = (share * (inverse.double().pow(-2) - eps + (mean - whole).square())).sum(0)
    return whole.float(), (variance + eps).rsqrt().float()


@functools.cache
def install() -> torch.library.Library:
    """For the rest of the process."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("batch_norm_stats", stats)
    library.impl("batch_norm_gather_stats_with_counts", gathered)
    return library
