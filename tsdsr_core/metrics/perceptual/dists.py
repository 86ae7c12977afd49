"""DISTS, deep image structure and texture similarity (Ding et al. 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import CHANNELS, check_pair, vgg16
from .weights import Weights

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's colours in 0..1."""
_EPSILON = 1e-6
"""``c_1`` and ``c_2`` of the paper."""


class Dists(nn.Module):
    """``1 - sum_ij (alpha_ij l_ij + beta_ij s_ij)`` over the channels of the image and of five stages of VGG16; 0 if equal.

    ``l`` compares the means of a channel (texture), ``s`` its variances and covariance (structure), as SSIM does but over the
    whole image.  Images are compared at their own size, as in pyiqa; the authors first reduce the shorter side to 256 pixels.
    """

    alpha: Tensor
    beta: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.stages = vgg16(L2Pool)
        self.stages.load(weights.tensors, "vgg16")
        alpha, beta = weights.tensors["dists.alpha"], weights.tensors["dists.beta"]
        total = alpha.sum() + beta.sum()
        self.register_buffer("alpha", alpha / total)
        self.register_buffer("beta", beta / total)
        self.register_buffer("mean", torch.tensor(_MEAN, dtype=torch.float32)[:, None, None])
        self.register_buffer("deviation", torch.tensor(_DEVIATION, dtype=torch.float32)[:, None, None])

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """The distance of each pair, ``(B,)``.

        Args:
            image, reference: ``(B, 3, H, W)`` in 0..1, of equal shape, at least 16x16.

        Raises:
            InputError: for other shapes.
        """
        check_pair(image, reference, "vgg16")
        x, y = image.float(), reference.float()
        sizes = (3, *CHANNELS["vgg16"])
        alphas, betas = self.alpha.split(sizes), self.beta.split(sizes)
        similarity = _similarity(x, y, alphas[0], betas[0])
        x, y = ((values - self.mean) / self.deviation for values in (x, y))
        for stage, alpha, beta in zip(self.stages, alphas[1:], betas[1:], strict=True):
            x, y = stage(x), stage(y)
            similarity = similarity + _similarity(x, y, alpha, beta)
        return 1 - similarity


class L2Pool(nn.Module):
    """Antialiased pooling: ``sqrt(g * x^2)`` with stride 2, ``g`` a 3x3 Hann window (Henaff & Simoncelli 2016)."""

    window: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float32)
        self.register_buffer("window", torch.outer(row, row).expand(channels, 1, 3, 3).contiguous())

    def forward(self, values: Tensor) -> Tensor:
        """Pool ``(B, C, H, W)`` to ``(B, C, ceil(H / 2), ceil(W / 2))``."""
        pooled = F.conv2d(values.square(), self.window, stride=2, padding=1, groups=len(self.window))
        return (pooled + 1e-12).sqrt()


def _similarity(x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Weighted sum of the similarities of the channels of ``(B, C, h, w)``, ``(B,)``."""
    mean_x, mean_y = x.mean((2, 3), keepdim=True), y.mean((2, 3), keepdim=True)
    x, y = x - mean_x, y - mean_y
    mean_x, mean_y = mean_x[:, :, 0, 0], mean_y[:, :, 0, 0]
    texture = (2 * mean_x * mean_y + _EPSILON) / (mean_x.square() + mean_y.square() + _EPSILON)
    variances = x.square().mean((2, 3)) + y.square().mean((2, 3))
    structure = (2 * (x * y).mean((2, 3)) + _EPSILON) / (variances + _EPSILON)
    return (alpha * texture + beta * structure).sum(1)
