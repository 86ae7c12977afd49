"""The terms of TSD-SR's training (Dong et al., CVPR 2025, sec. 3) as functions of tensors.

Names follow the paper: ``psi`` is the teacher, ``phi`` the LoRA model that learns the student's outputs, ``z_hat`` the
student's latent and ``z`` that of the photograph.  All latents are scaled, ``(B, C, h, w)``; noise levels are ``(B,)``,
one for each sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flow import add_noise
from .dasm import Trajectory

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``v(z_t, sigma)``: noised latents and noise levels ``(B,)`` to velocities."""


def variational_score_distillation(psi_hat: Tensor, phi_hat: Tensor) -> Tensor:
    """VSD residual ``v_psi(z_hat_t) - v_phi(z_hat_t)`` (Wang et al. 2023, in velocities)."""
    return psi_hat - phi_hat


def target_score_matching(psi_hat: Tensor, psi: Tensor) -> Tensor:
    """TSM residual ``v_psi(z_hat_t) - v_psi(z_t)``: both noised alike, so it is what the teacher sees of the difference."""
    return psi_hat - psi


def target_score_distillation(psi_hat: Tensor, phi_hat: Tensor, psi: Tensor, sigma: Tensor, vsd_share: float) -> Tensor:
    """Gradient ``sigma^2 [lambda VSD + (1 - lambda) TSM]`` with respect to ``z_hat``.

    Args:
        sigma: ``(B,)``, each sample's own.
        vsd_share: ``lambda``; 1 is VSD alone.
    """
    vsd = variational_score_distillation(psi_hat, phi_hat)
    mixed = vsd_share * vsd + (1 - vsd_share) * target_score_matching(psi_hat, psi)
    return per_sample(sigma).square() * mixed


@torch.no_grad()
def distribution_gradient(
    z_hat: Tensor, z: Tensor, noise: Tensor, starts: Tensor, levels: Tensor, trajectory: Trajectory, psi: Denoiser,
    phi: Denoiser, vsd_share: float, as_scores: bool = False,
) -> Tensor:  # fmt: skip
    """Gradient with respect to ``z_hat``, summed along a trajectory (DASM; one level is plain TSD).

    The student's and the photograph's latent are noised alike; the one then follows ``phi`` to less noise, the other ``psi``.

    Args:
        starts: ``(B,)`` int64, where each sample starts in ``levels``.
        levels: noise levels, falling, ``(n,)``.
        as_scores: match the teacher's scores (``with_the_score_of``); the paper's residual is of velocities.
    """
    sigma = levels[starts]
    path_hat, path = (add_noise(latent, noise, per_sample(sigma)) for latent in (z_hat, z))
    gradient = torch.zeros_like(z_hat)
    following = (*trajectory.offsets[1:], None)
    for weight, offset in zip(trajectory.weights, following, strict=True):
        psi_hat, psi_real, phi_hat = psi(path_hat, sigma), psi(path, sigma), phi(path_hat, sigma)  # psi's adapter once
        target = with_the_score_of(psi_real, path, path_hat, sigma) if as_scores else psi_real
        gradient += weight * target_score_distillation(psi_hat, phi_hat, target, sigma, vsd_share)
        if offset is not None:
            lower = levels[starts + offset]
            step = per_sample(lower - sigma)
            path_hat, path, sigma = path_hat + step * phi_hat, path + step * psi_real, lower
    return gradient


def with_the_score_of(velocity: Tensor, z_t: Tensor, other: Tensor, sigma: Tensor) -> Tensor:
    """The velocity at ``other`` of which the score is that of ``velocity`` at ``z_t``.

    The score is ``-E[e] / s`` (Song et al. 2021) and ``e = z_t + (1 - s) v``.  Velocities at two places differ even where the
    scores are one: a teacher that sees every detail through little noise gives ``v_psi(z_hat_t) - v_psi(z_t) = z - z_hat``,
    which drives the student away from the photograph.
    """
    return velocity - (other - z_t) / (1 - per_sample(sigma))


def cut(latent: Tensor, shifts: Tensor, patch: int) -> Tensor:
    """``(B, C, h, w)`` without ``patch`` of its rows and columns, each sample from its own place on.

    A transformer's errors repeat with its patches.  Scored at random places of that grid, they average out over the steps
    instead of teaching the student a grid of its own.

    Args:
        shifts: ``(B, 2)`` int64, first row and column of each sample, 0 to ``patch - 1``.
    """
    height, width = (side - patch for side in latent.shape[2:])
    pairs = zip(latent, shifts.tolist(), strict=True)
    return torch.stack([part[:, top : top + height, left : left + width] for part, (top, left) in pairs])


def put_back(gradient: Tensor, shifts: Tensor, patch: int) -> Tensor:
    """What was ``cut`` at its place again, with zeros around it."""
    pairs = zip(gradient, shifts.tolist(), strict=True)
    return torch.stack([F.pad(part, (left, patch - left, top, patch - top)) for part, (top, left) in pairs])


def surrogate(z_hat: Tensor, gradient: Tensor) -> Tensor:
    """``0.5 mse(z_hat, sg(z_hat - gradient))``: its gradient with respect to ``z_hat`` is ``gradient / z_hat.numel()``."""
    return 0.5 * F.mse_loss(z_hat.float(), (z_hat - gradient).detach().float())


def flow_matching(denoiser: Denoiser, z: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``mse(v(z_t), e - z)``: the diffusion loss of rectified flow (Esser et al. 2024, eq. 13), weight 1 at every level.

    Levels drawn as the logit-normal of that paper weigh the middle more (``logit_normal``).
    """
    return F.mse_loss(denoiser(add_noise(z, noise, per_sample(sigma)), sigma).float(), (noise - z).float())


def logit_normal(normal: Tensor) -> Tensor:
    """Noise levels in 0..1 from standard normal numbers: ``sigmoid(n)`` (Esser et al. 2024, sec. 3.1)."""
    return torch.sigmoid(normal)


def guided(denoiser: Callable[[Tensor, Tensor, bool], Tensor], guidance: float) -> Denoiser:
    """Classifier-free guidance ``v_0 + w (v - v_0)`` (Ho & Salimans 2022); 1 asks for the prompt alone.

    Args:
        denoiser: also takes whether the prompt is given, or the null prompt.
    """
    if guidance == 1:
        return lambda z, sigma: denoiser(z, sigma, True)

    def run(z: Tensor, sigma: Tensor) -> Tensor:
        null = denoiser(z, sigma, False)
        return null + guidance * (denoiser(z, sigma, True) - null)

    return run


def per_sample(sigma: Tensor) -> Tensor:
    """``(B,)`` as ``(B, 1, 1, 1)``."""
    return sigma[:, None, None, None]
