"""The loss terms of TSD-SR (Dong et al., CVPR 2025, sec. 3) as functions of tensors.

Names follow the paper: ``psi`` is the teacher, ``phi`` the fake model (the paper's "LoRA model") that is trained on the
student's outputs, ``z_hat`` the student's latent and ``z`` the photograph's.  All latents are scaled, ``(B, C, h, w)``; noise
levels are ``(B,)``, one for each sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...flow import add_noise
from .trajectory import Trajectory

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``v(z_t, sigma)``: maps noised latents and noise levels ``(B,)`` to velocities."""


def variational_score_distillation(psi_hat: Tensor, phi_hat: Tensor) -> Tensor:
    """VSD residual ``v_psi(z_hat_t) - v_phi(z_hat_t)`` (Wang et al. 2023, in velocities)."""
    return psi_hat - phi_hat


def target_score_matching(psi_hat: Tensor, psi: Tensor) -> Tensor:
    """TSM residual ``v_psi(z_hat_t) - v_psi(z_t)``, both latents with the same noise."""
    return psi_hat - psi


def target_score_distillation(psi_hat: Tensor, phi_hat: Tensor, psi: Tensor, sigma: Tensor, vsd_share: float) -> Tensor:
    """Gradient ``sigma^2 [lambda VSD + (1 - lambda) TSM]`` with respect to ``z_hat``.

    Args:
        sigma: noise level of each sample, ``(B,)``.
        vsd_share: ``lambda`` in 0..1; 1 is VSD alone.
    """
    vsd = variational_score_distillation(psi_hat, phi_hat)
    mixed = vsd_share * vsd + (1 - vsd_share) * target_score_matching(psi_hat, psi)
    return per_sample(sigma).square() * mixed


@torch.no_grad()
def distribution_gradient(
    z_hat: Tensor, z: Tensor, noise: Tensor, starts: Tensor, levels: Tensor, trajectory: Trajectory, psi: Denoiser,
    phi: Denoiser, vsd_share: float, as_scores: bool = True,
) -> Tensor:  # fmt: skip
    """Gradient with respect to ``z_hat``, summed along a trajectory (DASM; a single level is plain TSD).

    The student's and the photograph's latent get the same noise at the first level and are then denoised step by step, the
    student's by ``phi`` and the photograph's by ``psi``::

        levels[start]                levels[start + 50]           levels[start + 100]
        z_hat + noise ---- phi ----> path_hat -------- phi -----> path_hat ...        (student)
        z + noise -------- psi ----> path ------------ psi -----> path ...            (photograph)
              |                          |                            |
        weight 1 * TSD             0.3 * TSD                    0.3 * TSD             summed: the gradient

    Args:
        z_hat, z, noise: ``(B, C, h, w)``.
        starts: index of each sample's first level in ``levels``, ``(B,)`` int64.
        levels: falling noise levels ``(n,)``.
        as_scores: whether target score matching compares scores, as the paper does (see ``with_the_score_of``), or
            velocities, as the published script does.
    """
    sigma = levels[starts]
    path_hat, path = (add_noise(latent, noise, per_sample(sigma)) for latent in (z_hat, z))
    gradient = torch.zeros_like(z_hat)
    following = (*trajectory.offsets[1:], None)
    for weight, offset in zip(trajectory.weights, following, strict=True):
        psi_hat, psi_real, phi_hat = psi(path_hat, sigma), psi(path, sigma), phi(path_hat, sigma)  # fewest adapter switches
        target = with_the_score_of(psi_real, path, path_hat, sigma) if as_scores else psi_real
        gradient += weight * target_score_distillation(psi_hat, phi_hat, target, sigma, vsd_share)
        if offset is not None:
            lower = levels[starts + offset]
            step = per_sample(lower - sigma)
            path_hat, path, sigma = path_hat + step * phi_hat, path + step * psi_real, lower
    return gradient


def with_the_score_of(velocity: Tensor, z_t: Tensor, other: Tensor, sigma: Tensor) -> Tensor:
    """The velocity at ``other`` that has the same score as ``velocity`` at ``z_t``.

    The score is ``-E[e] / s`` (Song et al. 2021), with ``e = z_t + (1 - s) v``. The paper's residual is one of noise
    predictions, ``e_psi(z_hat_t) - e_psi(z_t)``: ``1 - s`` times the velocity residual against this function's result.
    Plain velocities at two points differ even where the scores are equal: a teacher that recovers every detail from little
    noise gives ``v_psi(z_hat_t) - v_psi(z_t) = z - z_hat``, which drives the student away from the photograph.
    """
    return velocity - (other - z_t) / (1 - per_sample(sigma))


def cut(latent: Tensor, shifts: Tensor, patch: int) -> Tensor:
    """Crop ``(B, C, h, w)`` to ``(B, C, h - patch, w - patch)``, each sample at its own offset.

    A transformer's errors repeat with its patches.  With random offsets against that grid they average out over the training
    steps, instead of teaching the student a grid.

    Args:
        shifts: first row and column of each sample, ``(B, 2)`` int64 from 0 to ``patch - 1``.
    """
    height, width = (side - patch for side in latent.shape[2:])
    pairs = zip(latent, shifts.tolist(), strict=True)
    return torch.stack([part[:, top : top + height, left : left + width] for part, (top, left) in pairs])


def put_back(gradient: Tensor, shifts: Tensor, patch: int) -> Tensor:
    """Pad the gradient of a ``cut`` latent with zeros to the original size, at the original offset."""
    pairs = zip(gradient, shifts.tolist(), strict=True)
    return torch.stack([F.pad(part, (left, patch - left, top, patch - top)) for part, (top, left) in pairs])


def surrogate(z_hat: Tensor, gradient: Tensor) -> Tensor:
    """A loss ``0.5 mse(z_hat, sg(z_hat - gradient))`` whose gradient with respect to ``z_hat`` is ``gradient / z_hat.numel()``.

    >>> z_hat = torch.zeros(1, 1, 1, 2, requires_grad=True)
    >>> surrogate(z_hat, torch.tensor([[[[3.0, -1.0]]]])).backward()
    >>> z_hat.grad
    tensor([[[[ 1.5000, -0.5000]]]])
    """
    return 0.5 * F.mse_loss(z_hat.float(), (z_hat - gradient).detach().float())


def flow_matching(denoiser: Denoiser, z: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Diffusion loss of rectified flow, ``mse(v(z_t), e - z)`` (Esser et al. 2024, eq. 13), with equal weight at all levels.

    Drawing the levels from a logit-normal distribution, as in that paper, emphasises the middle ones (``logit_normal``).
    """
    return F.mse_loss(denoiser(add_noise(z, noise, per_sample(sigma)), sigma).float(), (noise - z).float())


def logit_normal(normal: Tensor) -> Tensor:
    """Turn standard normal numbers into logit-normal noise levels in 0..1: ``sigmoid(n)`` (Esser et al. 2024, sec. 3.1)."""
    return torch.sigmoid(normal)


def guided(denoiser: Callable[[Tensor, Tensor, bool], Tensor], guidance: float) -> Denoiser:
    """Classifier-free guidance ``v_0 + w (v - v_0)`` (Ho & Salimans 2022).

    Args:
        denoiser: called with latents, noise levels, and whether to use the prompt (True) or the null prompt (False).
        guidance: ``w``; with 1 the null prompt is not evaluated.
    """
    if guidance == 1:
        return lambda z, sigma: denoiser(z, sigma, True)

    def run(z: Tensor, sigma: Tensor) -> Tensor:
        null = denoiser(z, sigma, False)
        return null + guidance * (denoiser(z, sigma, True) - null)

    return run


def per_sample(sigma: Tensor) -> Tensor:
    """Reshape ``(B,)`` to ``(B, 1, 1, 1)``."""
    return sigma[:, None, None, None]
