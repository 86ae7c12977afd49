"""What the trainers tell the networks, and what they weigh, against hand calculations on networks that record."""

import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn

from tsdsr_core.flow import add_noise, schedule
from tsdsr_core.images.files import Picture, write_picture
from tsdsr_core.metrics.perceptual import Dists, Lpips, read_weights
from tsdsr_core.train.config import Config
from tsdsr_core.train.config_file import from_dict
from tsdsr_core.train.data.batch import Batch
from tsdsr_core.train.loop import Loop
from tsdsr_core.train.networks.roles import FAKE, STUDENT, TEACHER, Condition, Networks
from tsdsr_core.train.objectives import perceptual
from tsdsr_core.train.trainers import StudentTrainer, TeacherTrainer, caption_of, diffusion_loss, latent_of

from ..support.tiny import photo
from .test_train_command import BUILTIN, LORA, lora_arguments, smoke, weights

CPU = torch.device("cpu")
PROMPT, NULL, CAPTION = 2.0, 0.5, 3.0
"""What the pooled embeddings hold, by which a network's velocity and the tests tell them apart."""
FACTORS = {STUDENT: 0.1, TEACHER: 0.2, FAKE: -0.3}


class Recording(nn.Module):
    """A transformer of which ``v = factor * pooled * z``; notes what it is told, pooled and timesteps ``(B,)``."""

    def __init__(self, role: str, told: list) -> None:
        super().__init__()
        self.role, self.told, self.dtype = role, told, torch.float32
        self.factor = nn.Parameter(torch.tensor(FACTORS[role]))

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        assert torch.equal(encoder_hidden_states[:, 0, 0], pooled_projections[:, 0]), "tokens and pooled of one prompt"
        self.told.append((self.role, pooled_projections[:, 0].tolist(), timestep.tolist()))
        return (self.factor * pooled_projections[:, :, None, None] * hidden_states,)

    @property
    def config(self):
        return {"_class_name": "SD3Transformer2DModel", "patch_size": 2, "pos_embed_max_size": 96}


class Halving(nn.Module):
    """An autoencoder that halves the sides; its scaling factor is not 1."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"_class_name": "AutoencoderKL", "scaling_factor": 1.5, "block_out_channels": (1, 1)}
        self.gain = nn.Parameter(torch.tensor(0.8))

    def encode(self, pixels):
        latent = self.gain * nn.functional.avg_pool2d(pixels, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latent))

    def decode(self, z, return_dict):
        return (nn.functional.interpolate(z / 0.8, scale_factor=2.0),)


def condition(value: float, count: int = 1) -> Condition:
    return Condition(torch.full((count, 2, 3), value), torch.full((count, 1), value))


@pytest.fixture
def networks() -> Networks:
    told: list = []
    vae = Halving().requires_grad_(False)
    made = Networks(
        {role: Recording(role, told) for role in FACTORS}, vae, Halving(), condition(PROMPT), condition(NULL), adapters=False
    )
    made.told = told
    return made


def config(**tables) -> Config:
    values = {
        "model": {"trained": "weights"}, "data": {"crop": 32},
        "objective": {"perceptual": "gradients", "name": "tsd", **tables.get("objective", {})},
        "run": {"steps": 4, **tables.get("run", {})}, "stage": tables.get("stage", "student"),
    }  # fmt: skip
    return from_dict(values)


def batch(count: int = 2, **more) -> Batch:
    high = photo(16, 16, 1, count)
    return Batch((high + high.roll(1, 3)) / 2, high, range(count), 0, **more)


def test_shifted_patches_are_scored_each_at_its_own_place(networks):
    """These networks work cell by cell, so that a shift leaves out a rim and changes nothing else."""
    samples = batch(8)
    assert len({tuple(place) for place in samples.shifts(2).tolist()}) > 2
    z, z_hat = (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    fixed, shifted = (
        StudentTrainer(networks, config(objective={"shifted_patches": on}))._distribution_gradient(z_hat, z, samples)
        for on in (False, True)
    )
    for index, (top, left) in enumerate(samples.shifts(2).tolist()):
        inner = (index, slice(None), slice(top, top + 6), slice(left, left + 6))
        assert torch.allclose(shifted[inner], fixed[inner], atol=1e-6)
        shifted[inner] = 0
    assert not shifted.any()


def ignore(loss: torch.Tensor) -> None:
    """No gradients: the parameters stay as they are."""


@pytest.mark.parametrize("captioned", [False, True])
def test_a_tenth_of_what_a_diffusion_model_sees_is_without_its_prompt(networks, captioned):
    many = batch(600, caption=condition(CAPTION, 600) if captioned else None)
    for role in (TEACHER, FAKE):
        diffusion_loss(networks, role, latent_of(many, networks), many)
    (teacher, psi, psi_levels), (fake, phi, phi_levels) = networks.told
    assert (teacher, fake) == (TEACHER, FAKE)
    for told in (psi, phi):
        assert set(told) == {NULL, CAPTION if captioned else PROMPT}
        assert 0.06 < told.count(NULL) / len(told) < 0.14
    assert psi != phi, "each draws its own"
    assert psi_levels == pytest.approx((1000 * many.levels("teacher level")).tolist())
    assert phi_levels == pytest.approx((1000 * many.levels("fake level")).tolist())


@pytest.mark.parametrize("caption", [None, condition(CAPTION, 2)])
def test_who_is_told_which_prompt_at_which_level(networks, caption):
    settings, given = config(objective={"guidance": 2.0}), PROMPT if caption is None else CAPTION
    trainer, samples = StudentTrainer(networks, settings), batch(caption=caption)
    trainer.accumulate(samples, 0, ignore)
    levels = (1000 * schedule()[samples.starts(trainer.trajectory)]).tolist()
    assert networks.told[0] == (STUDENT, [PROMPT, PROMPT], [1000.0, 1000.0]), "the fixed prompt, captions or none"
    distilled = [(role, [value] * 2, levels) for role in (TEACHER, TEACHER, FAKE) for value in (NULL, given)]
    assert [(role, told, pytest.approx(at)) for role, told, at in networks.told[1:7]] == distilled
    assert networks.told[7][0] == FAKE, "then phi learns what the student made"
    assert len(networks.told) == 8
    assert caption_of(samples, networks).pooled.flatten().tolist() == [given] * 2


def test_the_teacher_learns_good_pictures_with_their_captions(networks):
    settings = config(stage="teacher")
    TeacherTrainer(networks, settings).accumulate(batch(60, caption=condition(CAPTION, 60)), 0, ignore)
    ((role, told, _),) = networks.told
    assert role == TEACHER
    assert set(told) == {NULL, CAPTION}
    assert told.count(CAPTION) > 40


def test_prepared_latents_are_scaled_as_encoded_ones(networks):
    plain = batch()
    prepared = networks.vae.encode(plain.high * 2 - 1).latent_dist.mode()
    expected = 1.5 * 0.8 * nn.functional.avg_pool2d(plain.high * 2 - 1, 2)
    assert torch.allclose(latent_of(plain, networks), expected)
    assert torch.allclose(latent_of(batch(latent=prepared), networks), expected)
    assert torch.equal(latent_of(batch(latent=2 * prepared), networks), 2 * latent_of(batch(latent=prepared), networks))


@pytest.mark.parametrize("as_scores", [False, True])
def test_the_distribution_gradient_by_hand(networks, as_scores):
    """Guidance leads from the null prompt to the caption, alike for psi and phi."""
    weight, share = 2.5, 0.7
    objective = {"guidance": weight, "vsd_share": share, "as_scores": as_scores}
    trainer = StudentTrainer(networks, config(objective=objective))
    samples = batch(caption=condition(CAPTION, 2))
    z, z_hat = latent_of(samples, networks), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = schedule()[samples.starts(trainer.trajectory)][:, None, None, None]
    noise = samples.noise(z, "distribution")
    psi, phi = (FACTORS[role] * (NULL + weight * (CAPTION - NULL)) for role in (TEACHER, FAKE))
    hat, real = add_noise(z_hat, noise, sigma), add_noise(z, noise, sigma)
    target_score = psi * (hat - real) + (z_hat - z if as_scores else 0)
    expected = sigma**2 * (share * (psi - phi) * hat + (1 - share) * target_score)
    assert torch.allclose(trainer._distribution_gradient(z_hat, z, samples), expected, atol=1e-5)


def test_the_students_terms_by_hand(networks):
    """Each with its weight; the perceptual one's rises on a line over the run."""
    objective = {"name": "supervised", "perceptual_weight": 1.0, "perceptual_weight_end": 3.0}
    objective |= {"latent_weight": 0.5, "pixel_weight": 4.0}
    trainer, samples = StudentTrainer(networks, config(objective=objective)), batch()
    z = latent_of(samples, networks)
    z_hat = networks.encode(samples.low, student=True) * (1 - FACTORS[STUDENT] * PROMPT)
    pixels = networks.decode(z_hat)
    distance = perceptual.gradients(pixels, samples.high)
    totals: list[torch.Tensor] = []
    for step, weight in enumerate((1.0, 1.5, 2.0, 2.5)):
        parts = trainer.accumulate(samples, step, totals.append)
        assert parts["perceptual"] == pytest.approx(weight * distance.item(), rel=1e-5)
        assert parts["pixel"] == pytest.approx(4 * (pixels - samples.high).abs().mean().item(), rel=1e-5)
        assert parts["latent"] == pytest.approx(0.5 * (z_hat - z).square().mean().item(), rel=1e-5)
        assert totals[step].item() == pytest.approx(sum(map(float, parts.values())), rel=1e-6), "their sum is what is trained"


def test_the_average_by_hand(networks, tmp_path):
    """Its memory is short at first, so that the start is soon forgotten: s / (9 + s) up to the configured decay."""
    loop = Loop(
        StudentTrainer(networks, config(run={"ema_decay": 0.5, "steps": 20})), config(run={"ema_decay": 0.5}),
        Accelerator(cpu=True), tmp_path,
    )  # fmt: skip
    parameter, expected = loop.first["transformer.factor"], FACTORS[STUDENT]
    for step, decay in ((1, 1 / 10), (2, 2 / 11), (8, 8 / 17), (9, 0.5), (18, 0.5)):
        with torch.no_grad():
            parameter.fill_(float(step))
        loop.step = step
        loop._update_average()
        expected = decay * expected + (1 - decay) * step
        assert loop.average["transformer.factor"].item() == pytest.approx(expected)


PYIQA = """
import torch

def create_metric(name, device, as_loss):
    assert (device, as_loss) == (torch.device("cpu"), True)
    factor = {"lpips-vgg": 1, "lpips": 2, "dists": 3}[name]
    def metric(image, reference):
        assert image.min() >= 0 and image.max() <= 1
        return factor * (image - reference).abs().mean((1, 2, 3), keepdim=True)
    return metric
"""


def test_without_a_file_networks_are_those_of_pyiqa(tmp_path, monkeypatch):
    (tmp_path / "pyiqa.py").write_text(PYIQA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    for name, factor in (("lpips", 1), ("lpips-alex", 2), ("dists", 3)):
        perceptual.check_distance(name, None)
        reference, image = photo(16, 16), (photo(16, 16) + 0.1).requires_grad_(True)
        found = perceptual.distance(name, CPU)(image, reference)
        assert found.item() == pytest.approx(factor * (image.clamp(0, 1) - reference).abs().mean().item())
        found.backward()
        assert image.grad.abs().max() > 0
    del sys.modules["pyiqa"]  # imported from a folder that goes with the test


def test_with_a_file_networks_are_those_of_the_file(perceptual_weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    weights, reference = read_weights(perceptual_weights), photo(40, 40, 1, 2)
    networks = {"lpips": Lpips(weights, "vgg16"), "lpips-alex": Lpips(weights, "alexnet"), "dists": Dists(weights)}
    for name, network in networks.items():
        image = (photo(40, 40, 2, 2) + 0.2).requires_grad_(True)
        found = perceptual.distance(name, CPU, perceptual_weights)(image, reference)
        assert found.item() == pytest.approx(network(image.clamp(0, 1), reference).mean().item(), rel=1e-6)
        found.backward()
        assert image.grad.abs().max() > 0


@pytest.fixture
def photos(tmp_path):
    for index in range(2):
        write_picture(tmp_path / "photos" / f"{index}.png", Picture(photo(128, 128, index)))
    return tmp_path / "photos"


@pytest.mark.parametrize("stage", ["student", "pretrain"])
def test_a_perceptual_term_without_its_network_is_one_line_before_models_are_loaded(
    stage, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    settings = [f"stage={stage}", "objective.perceptual=lpips", "pretrain.perceptual_weight=1.0", "data.crop=48"]
    for more, message in (
        ([], "perceptual = 'lpips' needs --perceptual-weights FILE (docs/evaluation.md explains how to make one), or pyiqa:"),
        (
            ["--perceptual-weights", tmp_path / "no.safetensors"],
            "no.safetensors does not exist: expected a file of perceptual weights",
        ),
    ):
        assert smoke(photos, tmp_path / "run", "--base", tmp_path / "none.safetensors", *more, settings=settings) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


@pytest.fixture
def own_precision():
    """accelerate keeps one precision for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize("trained", ["weights", "lora"])
def test_bf16_is_that_of_the_transformers_alone(trained, photos, tmp_path, published):
    """As the command runs them; what is trained, and saved, stays in fp32."""
    arguments = ["--base", "builtin", "--teacher", BUILTIN] if trained == "weights" else lora_arguments(published)
    settings = ["run.steps=1", "run.precision=bf16", *(LORA if trained == "lora" else [])]
    found: dict[type, set[torch.dtype]] = {SD3Transformer2DModel: set(), Encoder: set(), Decoder: set()}

    def note(module, _, output) -> None:
        if type(module) in found:
            found[type(module)].add((output[0] if isinstance(output, tuple) else output).dtype)

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        assert smoke(photos, tmp_path / "run", *arguments, settings=settings) == 0
    finally:
        hook.remove()
    assert found == {SD3Transformer2DModel: {torch.bfloat16}, Encoder: {torch.float32}, Decoder: {torch.float32}}
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}
