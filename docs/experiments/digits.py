"""VSD, TSD and TSD + DASM on drawn digits: small enough for two CPU cores, with the project's own losses, trainer and loop.

    python docs/experiments/digits.py --out runs/digits    # the whole table and the picture: 31 minutes on one core
    python docs/experiments/digits.py --out runs/digits --processes 2      # the same, 19 minutes on two cores
    python docs/experiments/digits.py --out runs/digits --seeds 1

Digits of 28x28 pixels, drawn with random shape, width and slant, are 64 numbers each (principal components).  The teacher, psi,
is a diffusion model of them that knows the label.  The student gets a blurred, four times smaller and noisy digit, enlarged
again, and is not told the label; it starts from the teacher by supervised steps.  Then each objective trains it for as many
steps, without any data term, and what it restores is compared with the digits by the Frechet distance between features of a
classifier: 0 would be the same distribution, and the digits themselves after 64 components have the distance called "bound".
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from drawn_digits import COMPONENTS, LABELS, SIDE, Basis, degrade, draw_digits
from PIL import Image
from torch import Tensor, nn

from tsdsr_core.flow import schedule
from tsdsr_core.train.config import Config, ObjectiveSettings, OptimiserSettings, RunSettings
from tsdsr_core.train.data.batch import Batch
from tsdsr_core.train.loop import Loop
from tsdsr_core.train.networks.roles import FAKE, STUDENT, TEACHER, Condition
from tsdsr_core.train.objectives import losses
from tsdsr_core.train.trainers import StudentTrainer, restored_latent

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """How much of everything; the miniature is for a test."""

    digits: int = 10000
    judged: int = 2000
    width: int = 256
    blocks: int = 5
    teacher_steps: int = 12000
    teacher_batch: int = 128
    start_steps: int = 1500
    steps: int = 500
    batch: int = 64


MINIATURE = Size(2000, 1000, 96, 3, 1500, 128, 300, 200, 64)

ARMS: dict[str, dict[str, Any]] = {
    "VSD": {"name": "vsd"},
    "TSD, velocities": {"name": "tsd", "as_scores": False},
    "TSD": {"name": "tsd"},
    "TSD + DASM": {"name": "tsd+dasm"},
    "TSD x 1.9": {"name": "tsd", "distribution_weight": 1.9},
}
"""Settings of ``objective``.  The weights of DASM's levels add up to 1.9, so the last row is what that sum alone does."""
FAST_FAKE = 1e-3
"""Learning rate of a phi that keeps up with the student."""


# --- Networks


class Velocity(nn.Module):
    """A residual network ``v(z_t, sigma, label)`` over 64 numbers; the null prompt is a label of zeros."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.inward, self.outward = nn.Linear(COMPONENTS, width), nn.Linear(width, COMPONENTS)
        self.told = nn.Sequential(nn.Linear(64 + LABELS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks: Any = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.LayerNorm(width), "told": nn.Linear(width, width),
                "body": nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)),
            }) for _ in range(size.blocks)
        )  # fmt: skip
        nn.init.zeros_(self.outward.weight)
        self.config = {"patch_size": 1}

    def forward(self, z: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        angles = sigma[:, None] * 1000 * torch.exp(torch.linspace(0, -math.log(10000), 32))
        told = self.told(torch.cat((angles.sin(), angles.cos(), tokens.flatten(1)), 1))
        h = self.inward(z.flatten(1))
        for block in self.blocks:
            h = h + block["body"](block["norm"](h) + block["told"](told))
        return self.outward(h)[:, :, None, None]


class Digits:
    """What the trainer asks of its networks (``tsdsr_core.train.networks.roles.Networks``), for digits."""

    device, scaling_factor, frozen = CPU, 1.0, {}

    def __init__(self, basis: Basis, student: Velocity, teacher: Velocity) -> None:
        self.basis = basis
        self.transformers = {STUDENT: student, TEACHER: teacher, FAKE: copy.deepcopy(teacher).requires_grad_(True)}
        self.null = self.prompt = Condition(torch.zeros(1, 1, LABELS), torch.zeros(1, 1))

    def velocity(self, role: str, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.transformers[role](z, sigma, condition.tokens)

    def encode(self, images: Tensor, student: bool) -> Tensor:
        return self.basis.encode(images)

    def activate(self, role: str) -> None:
        """Every role has a network of its own."""

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.transformers[role].named_parameters() if p.requires_grad}


def train_teacher(latents: Tensor, labels: Tensor, size: Size) -> Velocity:
    """The flow-matching loss; a tenth of the digits without their label; levels half uniform, half of the shifted schedule."""
    torch.manual_seed(0)
    teacher = Velocity(size)
    optimiser = torch.optim.AdamW(teacher.parameters(), 1e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, size.teacher_steps)
    told = F.one_hot(labels, LABELS).float()
    levels = schedule()
    for _ in range(size.teacher_steps):
        chosen = torch.randint(len(latents), (size.teacher_batch,))
        z, tokens = latents[chosen], told[chosen] * (torch.rand(size.teacher_batch, 1) > 0.1)
        shifted = levels[torch.randint(len(levels), (size.teacher_batch,))]
        sigma = torch.where(torch.rand(size.teacher_batch) < 0.5, torch.rand(size.teacher_batch), shifted)
        loss = losses.flow_matching(lambda z_t, s, t=tokens: teacher(z_t, s, t), z, torch.randn_like(z), sigma)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rates.step()
    return teacher.requires_grad_(False)


def start_student(teacher: Velocity, basis: Basis, images: Tensor, size: Size) -> Velocity:
    """The teacher after supervised steps from degraded digits to digits."""
    torch.manual_seed(1)
    student = copy.deepcopy(teacher).requires_grad_(True)
    optimiser = torch.optim.AdamW(student.parameters(), 5e-4)
    for step in range(size.start_steps):
        chosen = torch.randint(len(images), (size.batch,))
        z_low, z = basis.encode(degrade(images[chosen], 10**6 + step)), basis.encode(images[chosen])
        restored = z_low - student(z_low, torch.ones(len(z)), torch.zeros(len(z), 1, LABELS))
        optimiser.zero_grad()
        F.mse_loss(restored, z).backward()
        optimiser.step()
    return student


# --- Training of the student


def batches(images: Tensor, labels: Tensor, size: Size, seed: int) -> Iterator[Batch]:
    """Endless batches; which digits and which noise hang on the seed alone."""
    draw = torch.Generator().manual_seed(seed)
    step = 0
    while True:
        chosen = torch.randint(len(images), (size.batch,), generator=draw)
        high = images[chosen]
        numbers = range(step * size.batch, (step + 1) * size.batch)
        caption = Condition(F.one_hot(labels[chosen], LABELS).float()[:, None], torch.zeros(size.batch, 1))
        yield Batch(degrade(high, seed * 10**6 + step), high, numbers, seed, caption)
        step += 1


def train_student(start: Velocity, teacher: Velocity, basis: Basis, data: tuple[Tensor, Tensor], size: Size, seed: int,
                  objective: Mapping[str, Any], fake_rate: float, out: Path) -> Digits:  # fmt: skip
    """Run one objective through ``StudentTrainer`` and ``Loop``; the networks hold the averaged student."""
    networks = Digits(basis, copy.deepcopy(start), teacher)
    plain = ObjectiveSettings(
        guidance=1.0, latent_weight=0.0, pixel_weight=0.0, perceptual="gradients", perceptual_weight=0.0,
        perceptual_weight_end=0.0,
    )  # fmt: skip
    rates = OptimiserSettings(1e-4, fake_rate, warmup_steps=50, schedule="linear", weight_decay=0.0)
    run = RunSettings(size.steps, size.batch, ema_decay=0.99, save_every=10**9, validate_every=10**9, seed=seed)
    config = Config(stage="student", objective=replace(plain, **objective), optimiser=rates, run=run)
    loop = Loop(StudentTrainer(networks, config), config, Accelerator(cpu=True), out)  # type: ignore[arg-type]
    loop.run(batches(*data, size, seed), {}, lambda restore, step: {})
    with torch.no_grad():
        for name, parameter in loop.first.items():
            parameter.copy_(loop.average[name])
    return networks


# --- Judging


def train_classifier(images: Tensor, labels: Tensor) -> nn.Sequential:
    """A small convolutional classifier; its last hidden layer gives 64 features."""
    torch.manual_seed(2)
    classifier = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(32 * 49, 64),
        nn.SiLU(), nn.Linear(64, LABELS),
    )  # fmt: skip
    optimiser = torch.optim.AdamW(classifier.parameters(), 1e-3)
    for _ in range(600):
        chosen = torch.randint(len(images), (128,))
        loss = F.cross_entropy(classifier(images[chosen] + 0.1 * torch.randn(128, 1, SIDE, SIDE)), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return classifier.requires_grad_(False)


def frechet(a: Tensor, b: Tensor) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` of two sets of features ``(N, D)`` (Heusel et al. 2017)."""
    a, b = a.double(), b.double()
    one, other = a.T.cov(), b.T.cov()
    roots = torch.linalg.eigvals(one @ other).real.clamp_min(0).sqrt()
    return float((a.mean(0) - b.mean(0)).square().sum() + one.trace() + other.trace() - 2 * roots.sum())


@dataclass(frozen=True)
class Judge:
    """The digits that were not trained on, and the classifier."""

    basis: Basis
    images: Tensor
    low: Tensor
    classifier: nn.Sequential

    def distance(self, images: Tensor) -> float:
        """Frechet distance from the digits."""
        features = self.classifier[:-1]
        return frechet(features(images), features(self.images))

    @torch.no_grad()
    def restored(self, networks: Any) -> Tensor:
        """What a student makes of the degraded digits."""
        return self.basis.decode(restored_latent(networks, self.low)).clamp(-1, 1)


@dataclass(frozen=True)
class Problem:
    """What all students share: the digits, the teacher, where they start and who judges them."""

    size: Size
    data: tuple[Tensor, Tensor]
    teacher: Velocity
    start: Velocity
    judge: Judge

    @classmethod
    def of(cls, size: Size) -> Problem:
        """Draw the digits and train the teacher, the start and the classifier."""
        images, labels = draw_digits(size.digits, 0)
        judged = draw_digits(size.judged, 1)[0]
        basis = Basis.of(images)
        judge = Judge(basis, judged, degrade(judged, 2), train_classifier(images, labels))
        teacher = train_teacher(basis.encode(images), labels, size)
        return cls(size, (images, labels), teacher, start_student(teacher, basis, images, size), judge)

    def run(self, objective: Mapping[str, Any], fake_rate: float, seed: int, out: Path) -> Tensor:
        """What one student restores after its training."""
        size, basis = self.size, self.judge.basis
        networks = train_student(self.start, self.teacher, basis, self.data, size, seed, objective, fake_rate, out)
        return self.judge.restored(networks)


def experiment(
    size: Size, seeds: int, out: Path, more: bool = True, processes: int = 1
) -> tuple[dict[str, list[float]], Tensor]:
    """Distances by arm, one for each seed, and a picture ``(1, H, W)`` in -1..1: a row for each arm.

    Args:
        more: also run the objectives with a phi that keeps up, and supervised training.
        processes: students that are trained at the same time, each on one thread.
    """
    problem = Problem.of(size)
    judge, basis = problem.judge, problem.judge.basis
    began = judge.restored(Digits(basis, problem.start, problem.teacher))
    found = {"digits in 64 components (bound)": [judge.distance(basis.decode(basis.encode(judge.images)).clamp(-1, 1))]}
    found["where the student starts"] = [judge.distance(began)]
    arms = [(name, settings, 2e-5) for name, settings in ARMS.items()]
    if more:
        arms += [(f"{name}, fast phi", ARMS[name], FAST_FAKE) for name in ("VSD", "TSD", "TSD + DASM")]
        arms.append(("supervised", {"name": "supervised", "latent_weight": 1.0}, 2e-5))
    runs = [(settings, rate, 10 + seed, out) for _, settings, rate in arms for seed in range(seeds)]
    rows = [judge.images, judge.low.clamp(-1, 1), began]
    with _workers(problem, processes) as run:
        results = iter(run(runs))
        for name, *_ in arms:
            restored = [next(results) for _ in range(seeds)]
            found[name] = [judge.distance(each) for each in restored]
            rows.append(restored[-1])
            print(f"{name:36} {'  '.join(f'{value:6.1f}' for value in found[name])}", flush=True)
    return found, torch.cat([torch.cat(list(row[:20]), 2) for row in rows], 1)


@contextmanager
def _workers(problem: Problem, processes: int) -> Iterator[Callable[[Iterable[tuple]], Iterator[Tensor]]]:
    """A function that maps ``Problem.run`` over its arguments, in order."""
    if processes == 1:
        yield lambda runs: (problem.run(*each) for each in runs)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield lambda runs: pool.map(problem.run, *zip(*runs, strict=True))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for digits.json and digits.png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="students trained at the same time, each on one thread")
    parser.add_argument("--miniature", action="store_true", help="about a minute")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # products as small as these gain nothing from more
    size = MINIATURE if options.miniature else Size()
    found, picture = experiment(size, options.seeds, options.out, processes=options.processes)
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |")
    (options.out / "digits.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    array = ((picture[0] + 1) * 127.5).clamp(0, 255).byte().numpy()
    Image.fromarray(array).resize((2 * array.shape[1], 2 * array.shape[0]), Image.Resampling.NEAREST).save(
        options.out / "digits.png"
    )


if __name__ == "__main__":
    main()
