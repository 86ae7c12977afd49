"""LPIPS, learned perceptual image patch similarity (Zhang et al. 2018), with version 0.1 of its linear weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import BACKBONES, CHANNELS, Name, check_pair
from .weights import Weights

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and standard deviation of ImageNet's colours in -1..1, rounded as by the authors."""
_EPSILON = 1e-10


class Lpips(nn.Module):
    """``sum_l mean_hw(w_l . (x_l / |x_l| - y_l / |y_l|)^2)`` over the five stages of a backbone; 0 if equal.

    Args:
        weights: from ``read_weights``.
        net: "alexnet", which the authors recommend for evaluation, or "vgg16", which they recommend for training.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Weights, net: Name) -> None:
        super().__init__()
        self.net: Name = net
        self.stages = BACKBONES[net]()
        self.stages.load(weights.tensors, net)
        heads = [weights.tensors[f"lpips.{net}.{index}"][:, None, None] for index in range(len(CHANNELS[net]))]
        self.heads = nn.ParameterList(nn.Parameter(head, requires_grad=False) for head in heads)
        self.register_buffer("shift", torch.tensor(_SHIFT, dtype=torch.float32)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE, dtype=torch.float32)[:, None, None])

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """The distance of each pair, ``(B,)``.

        Args:
            image, reference: ``(B, 3, H, W)`` in 0..1, of equal shape, at least 31x31 with AlexNet, 16x16 with VGG16.

        Raises:
            InputError: for other shapes.
        """
        check_pair(image, reference, self.net)
        x, y = ((2 * values.float() - 1 - self.shift) / self.scale for values in (image, reference))
        total = x.new_zeros(len(x))
        for stage, head in zip(self.stages, self.heads, strict=True):
            x, y = stage(x), stage(y)
            difference = (F.normalize(x, eps=_EPSILON) - F.normalize(y, eps=_EPSILON)).square()
            total = total + (difference * head).sum(1).mean((1, 2))
        return total
