"""What each distillation residual would make of a student's pictures: PSNR-Y and sharpness after one small step against it.

    python docs/residuals.py runs/student/last.pt --base builtin --teacher runs/teacher.safetensors --photos FOLDER ...

For small models.  Student and phi are those of the checkpoint; the step is ``--step`` long (root mean square; latents have a
deviation of about 1) and taken at one noise level at a time, the residual being the mean over ``--draws`` draws of noise.
A residual that raises neither figure teaches the student nothing good, whatever its weight.  The last number is the cosine
between the step and the way back to the latent that the encoder gives the low quality: at 1 the step undoes the restoration.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tsdsr_core.colour import wavelet
from tsdsr_core.families.bundle import bundle_path
from tsdsr_core.flow import schedule
from tsdsr_core.metrics.fidelity import psnr_y
from tsdsr_core.metrics.spectrum import sharpness
from tsdsr_core.train.checkpoint import read_checkpoint
from tsdsr_core.train.data.batch import Batch
from tsdsr_core.train.data.dataset import Mixture, Pairs
from tsdsr_core.train.networks.build import Sources, build_networks
from tsdsr_core.train.networks.roles import FAKE, STUDENT, TEACHER, set_parameters
from tsdsr_core.train.objectives import losses
from tsdsr_core.train.objectives.trajectory import plan
from tsdsr_core.train.trainers import latent_of, restored_latent

INDICES = (200, 500, 700, 850, 950)
RESIDUALS = {"VSD": (1.0, False), "TSM, velocities": (0.0, False), "TSM, scores": (0.0, True)}
"""``lambda``, and whether scores are matched."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--base", type=bundle_path, required=True)
    parser.add_argument("--teacher", type=bundle_path, required=True)
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--step", type=float, default=0.2)
    options = parser.parse_args()
    checkpoint = read_checkpoint(options.checkpoint)
    config = checkpoint.config
    networks = build_networks(config, Sources(options.base, options.teacher), torch.device("cpu"))
    for role in (STUDENT, FAKE):
        set_parameters(networks.parameters(role), checkpoint.weights[role], "the checkpoint")
    mixture = Mixture(config.data.crop, config.data.scale, tuple(config.data.presets.items()), 0.0, config.data.candidates)
    pairs = Pairs(options.photos, mixture, config.run.seed)
    numbers = range(options.pictures)
    low, high = (torch.stack([pairs[number][name] for number in numbers]) for name in ("low", "high"))
    batch = Batch(low, high, numbers, config.run.seed)
    levels = config.objective.wavelet_levels

    @torch.no_grad()
    def figures(z: Tensor) -> str:
        decoded = networks.decode(z)
        picture = (wavelet(decoded, low, levels) if levels else decoded).clamp(0, 1)
        return f"{psnr_y(picture, high).mean():.2f} dB, {sharpness(picture).nanmean():.1f}"

    with torch.no_grad():
        z = latent_of(batch, networks)
        z_low = networks.encode(low, student=True)
        z_hat = restored_latent(networks, low)
    for name, latent in (("restored", z_hat), ("low-quality", z_low)):
        apart = F.mse_loss(latent, z) / z.var()
        print(f"mean square between {name} latents and those of the photographs: {apart:.2f} of the latters' variance")
    print(f"the student's pictures: {figures(z_hat)}; the photographs through the autoencoder: {figures(z)}")
    for index, (name, (share, as_scores)) in itertools.product(INDICES, RESIDUALS.items()):
        trajectory = plan(1, 1, 1.0, index, index)
        found = torch.zeros_like(z)
        for draw in range(options.draws):
            shifted = Batch(low, high, [number + draw * options.pictures for number in numbers], config.run.seed)
            found += losses.distribution_gradient(
                z_hat, z, shifted.noise(z, "residuals"), shifted.starts(trajectory), schedule(), trajectory,
                lambda z_t, sigma: networks.velocity(TEACHER, z_t, sigma, networks.prompt.expanded(len(z_t))),
                lambda z_t, sigma: networks.velocity(FAKE, z_t, sigma, networks.prompt.expanded(len(z_t))), share, as_scores,
            )  # fmt: skip
        step = options.step / found.square().mean().sqrt()
        back = F.cosine_similarity((z_hat - z_low).flatten(), found.flatten(), 0)
        print(f"sigma {float(schedule()[index]):.2f}  {name:16} {figures(z_hat - step * found)}, {back:.2f}")


if __name__ == "__main__":
    main()
