"""Every family's record, and a new one from end to end: a UNet in the manner of Stable Diffusion 2.1."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from tsdsr_core import families, load
from tsdsr_core.cli import main
from tsdsr_core.families import FAMILIES, family_of
from tsdsr_core.families.bundle import BUILTIN, read_bundle, write_bundle
from tsdsr_core.families.load import merged_bundle
from tsdsr_core.families.record import Family, Geometry, Part
from tsdsr_core.pipeline import from_pixels, plan_size, to_pixels
from tsdsr_core.weights.prompt import PromptEmbeds

from ..support.tiny import VAE, photo

SIGNAL = 0.0047**0.5
"""Square root of the signal's share at t = 999 of Stable Diffusion 2.1's schedule."""
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
    "cross_attention_dim": 32, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip


def velocity(unet, z, timestep, prompt):
    """``z - z_0`` of a network that predicts the noise: ``z_0 = (z - sqrt(1 - a) e) / sqrt(a)``."""
    noise = unet(z, timestep.clamp(max=999), prompt.tokens, return_dict=False)[0]
    return z - (z - (1 - SIGNAL**2) ** 0.5 * noise) / SIGNAL


SD21 = Family(
    name="sd21",
    title="Stable Diffusion 2.1",
    matches=lambda configs: "cross_attention_dim" in configs.get("transformer", {}),
    parts={
        "transformer": Part("UNet2DConditionModel", lambda: UNet2DConditionModel, {"in_channels": (1, 64)}, folder="unet"),
        "vae": Part("AutoencoderKL", lambda: AutoencoderKL, {"latent_channels": (1, 64)}),
    },
    geometry=lambda configs: Geometry(0.18215, 8, 2, None, 0),
    velocity=velocity,
    tile_bytes=lambda config, height, width, tokens, itemsize: 0,
    prompt_widths=lambda config: (config["cross_attention_dim"], 1),
    base_restores=True,
)


@pytest.fixture
def sd21(tmp_path, monkeypatch):
    """A folder of random weights of the new family, its networks and its prompt."""
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, SD21))
    unet, vae = UNet2DConditionModel(**UNET).eval(), AutoencoderKL(**{**VAE, "latent_channels": 4}).eval()
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.01)
    unet.save_pretrained(tmp_path / "sd21" / "unet")
    vae.save_pretrained(tmp_path / "sd21" / "vae")
    prompt = PromptEmbeds(torch.randn(1, 7, 32), torch.zeros(1, 1))
    return SimpleNamespace(path=tmp_path / "sd21", unet=unet, vae=vae, prompt=prompt)


def test_a_new_family_equals_plain_diffusers(sd21):
    restorer, image = load(sd21.path, prompt=sd21.prompt, device="cpu"), photo(57, 83)
    found = restorer.restore(image, scale=1, colour_fix="none", process_size=0)
    size = plan_size((57, 83), 1, 16, 0)
    with torch.no_grad():
        z = 0.18215 * sd21.vae.encode(to_pixels(image, size)).latent_dist.mode()
        noise = sd21.unet(z, 999, sd21.prompt.tokens).sample
        z = (z - (1 - SIGNAL**2) ** 0.5 * noise) / SIGNAL
        expected = from_pixels(sd21.vae.decode(z / 0.18215).sample, size)
    assert restorer.family is SD21
    assert (found - expected).abs().max() < 1e-5


def test_a_new_family_restores_an_odd_size_in_tiles(sd21):
    restorer, ticks = load(sd21.path, prompt=sd21.prompt, device="cpu"), []
    options = {"scale": 3, "tile": 16, "tile_overlap": 4, "process_size": 0}
    found = restorer.restore(photo(57, 83), progress=lambda *tick: ticks.append(tick), **options)
    assert found.shape == (1, 3, 171, 249)
    assert max(total for stage, _, total in ticks if stage == "step") > 1
    whole = restorer.restore(photo(57, 83), scale=3, tile=64, process_size=0)
    assert (found - whole).abs().mean() < 0.05


def test_a_new_family_goes_into_a_bundle_and_back(sd21, tmp_path, capsys):
    restorer, image = load(sd21.path, prompt=sd21.prompt, device="cpu"), photo(32, 24)
    path = tmp_path / "sd21.safetensors"
    write_bundle(path, merged_bundle(restorer.transformer, restorer.vae, restorer.prompt, torch.float32, {}, {}))
    again = load(path, device="cpu")
    assert again.family is SD21
    assert torch.equal(again.restore(image, scale=2), restorer.restore(image, scale=2))
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "Stable Diffusion 2.1"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_published_configuration_is_of_its_own_family_and_can_be_built(family):
    configs = {name: part.published for name, part in family.parts.items()}
    if not family.published:
        assert not any(configs.values())
        return
    assert family_of(configs) is family
    geometry = family.geometry(configs)
    assert geometry.vae_factor >= 1
    assert (
        family.tile_bytes(configs["transformer"], 64, 64, 10, 4) > family.tile_bytes(configs["transformer"], 32, 32, 10, 4) > 0
    )
    with torch.device("meta"):
        for part in family.parts.values():
            assert type(part.model_class()(**part.published)).__name__ == part.class_name


def test_names_of_families_differ():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert family_of(read_bundle(BUILTIN).configs).name == "small"


def test_the_users_options_are_above_the_models_defaults():
    restorer = load("builtin", device="cpu")
    assert restorer.options(scale=2).wavelet_levels == 6
    assert restorer.options(scale=2, wavelet_levels=3).wavelet_levels == 3
    with pytest.raises(ValueError, match="unknown option 'sacle': expected one of scale, colour_fix"):
        restorer.options(sacle=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "nowhere"}, "nowhere .*: expected builtin, a bundle file or a model folder"),
        ({"loras": "somewhere"}, "builtin has LoRAs and prompt merged: LoRAs go with a model folder only"),
        ({"lora_strength": 0.5}, "LoRA strengths go with a model folder only"),
        ({"lora_strength": float("nan")}, "strength nan of the transformer's LoRA"),
        ({"dtype": "fp64"}, "unknown number type 'fp64'"),
    ],
)
def test_what_cannot_be_loaded_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"device": "cpu", **arguments})


def test_a_base_model_alone_is_refused(published):
    with pytest.raises(ValueError, match="needs LoRAs: the base model alone cannot restore images"):
        load(published.sd3, prompt=published.embeddings, device="cpu")


def test_another_autoencoder_takes_the_place_of_the_folders_own(published, tmp_path):
    vae = AutoencoderKL(**VAE)
    vae.save_pretrained(tmp_path / "vae")
    given = {"loras": published.loras, "prompt": published.embeddings, "device": "cpu"}
    found = load(published.sd3, vae=tmp_path / "vae", **given).vae.decoder.conv_in.weight
    assert torch.equal(found, vae.decoder.conv_in.weight)
    assert not torch.equal(found, load(published.sd3, **given).vae.decoder.conv_in.weight)
