"""Bundles whose header cannot be true, and what is read of a bundle at all."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import BUILTIN, METADATA_KEY, Bundle, find_lora, read_bundle, read_description, write_bundle
from tsdsr_core.families.load import load_loras_and_prompt
from tsdsr_core.weights import reading
from tsdsr_core.weights.lora import load_lora
from tsdsr_core.weights.prompt import load_prompt

from ..support.tiny import Published


def change(name, **values):
    """Change a part of the description."""
    return lambda d: d[name].update(values)


IMPOSSIBLE = [
    (change("transformer_config", patch_size=0), "transformer_config patch_size = 0: expected a whole number from 1"),
    (change("transformer_config", patch_size=-2), "patch_size = -2"),
    (change("transformer_config", patch_size=10**9), "patch_size = 1000000000"),
    (change("transformer_config", patch_size="2"), "patch_size = '2'"),
    (change("transformer_config", patch_size=2.0), r"patch_size = 2\.0"),
    (change("transformer_config", patch_size=None), "patch_size = None"),
    (change("transformer_config", patch_size=True), "patch_size = True"),
    (change("transformer_config", num_layers=10**12), "num_layers"),
    (change("transformer_config", attention_head_dim=-64), "attention_head_dim = -64"),
    (change("transformer_config", pos_embed_max_size=10**6), "pos_embed_max_size"),
    (change("transformer_config", pos_embed_max_size=16384), "does not match its configuration: .*pos_embed"),
    (change("transformer_config", in_channels=4), "the transformer has 4 channels, the VAE's latents 16"),
    (change("transformer_config", patch_size=1), "does not match its configuration: .*patch|does not match.*proj"),
    (change("vae_config", norm_num_groups=0), "norm_num_groups = 0"),
    (change("vae_config", layers_per_block=-1), "layers_per_block = -1"),
    (change("vae_config", latent_channels=0), "latent_channels = 0"),
    (change("vae_config", block_out_channels=[]), r"block_out_channels = \[\]"),
    (change("vae_config", block_out_channels=[64, 0, 64]), "block_out_channels"),
    (change("vae_config", block_out_channels="64"), "block_out_channels"),
    (change("vae_config", block_out_channels=[64] * 100), "block_out_channels"),
    (change("vae_config", block_out_channels=[64, 64]), "does not match its configuration: 3 levels of the VAE"),
    (change("vae_config", scaling_factor=0), "scaling_factor = 0: expected a number"),
    (change("vae_config", scaling_factor=10**400), "scaling_factor = 1000"),
    (change("vae_config", scaling_factor="big"), "scaling_factor = 'big'"),
    (change("vae_config", scaling_factor=None), "scaling_factor = None"),
    (change("vae_config", shift_factor=[1]), "shift_factor"),
    (lambda d: d.update(vae_config=[]), "vae_config is missing"),
    (lambda d: d.pop("transformer_config"), "transformer_config is missing"),
    (lambda d: d["transformer_config"].clear(), "the model.s kind is not known: expected the small model, Stable Diffusion 3"),
    (lambda d: d.update(notes={"license": 3}), "note license = 3"),
    (lambda d: d.update(folded="yes"), "folded = 'yes'"),
    (lambda d: d.update(eight_bit=1), "eight_bit = 1"),
    (lambda d: d.update(defaults={"process_size": -1}), "default process_size = -1"),
    (lambda d: d.update(preview=[[1.0, 2.0, float("1e999")]] * 17), "Infinity is not a number"),
    (change("vae_config", scaling_factor=float("nan")), "NaN is not a number"),
]


def rewrite(target, description: str):
    save_file(load_file(BUILTIN), target, {METADATA_KEY: description})
    return target


@pytest.mark.parametrize(("edit", "message"), IMPOSSIBLE)
def test_impossible_metadata_is_one_error_before_any_work(edit, message, tmp_path, capsys, monkeypatch):
    with safe_open(BUILTIN, "pt") as file:
        description = json.loads(file.metadata()[METADATA_KEY])
    edit(description)
    path = rewrite(tmp_path / "bad.safetensors", json.dumps(description))
    monkeypatch.setattr("tsdsr_core.families.bundle._read", None)  # no tensor is read
    with pytest.raises(ValueError, match=message) as caught:
        read_bundle(path)
    assert str(path) in str(caught.value)
    shutil.copy(BUILTIN.parent.parent.parent / "docs" / "examples" / "lighthouse.png", tmp_path / "in.png")
    for command in (
        ["info", str(path)],
        ["upscale", str(tmp_path / "in.png"), "-o", str(tmp_path / "x.png"), "--model", str(path)],
    ):
        assert main(command) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "NaN", '"x"', '{"version": 1' + "0" * 5000 + "}", "[" * 100_000, '{"version": 1e999}']
)
def test_metadata_that_is_no_object_is_damaged(text, tmp_path):
    path = rewrite(tmp_path / "bad.safetensors", text)
    with pytest.raises(ValueError, match=r"bad\.safetensors has damaged bundle metadata"):
        read_description(path)


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Keys of the tensors that are read from now on."""
    keys = []

    class Counting:
        def __init__(self, *given, **options):
            self.file = safe_open(*given, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, key):
            keys.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(reading, "safe_open", Counting)
    return keys


@pytest.fixture
def lora_bundle(published: Published, tmp_path):
    transformer, vae = (load_lora(published.loras / f"{part}.safetensors") for part in ("transformer", "vae"))
    path = tmp_path / "loras.safetensors"
    write_bundle(path, Bundle("lora", load_prompt(published.embeddings), transformer.state_dict(), vae.state_dict()))
    return path


def test_both_loras_of_a_bundle_read_each_tensor_once(lora_bundle, counted):
    found = [find_lora(lora_bundle, target).target for target in ("transformer", "vae")]
    assert found == ["transformer", "vae"]
    assert sorted(counted) == sorted(key for key in load_file(lora_bundle) if "embeds" not in key)


def test_the_official_options_read_a_bundle_once(lora_bundle, counted):
    load_loras_and_prompt(lora_bundle, None)
    assert sorted(counted) == sorted(load_file(lora_bundle))


def test_a_bundle_of_the_other_kind_is_refused_by_its_header(lora_bundle, counted, published, tmp_path):
    for read in (
        lambda: find_lora(BUILTIN, "vae"),
        lambda: load_loras_and_prompt(BUILTIN, None),
        lambda: read_bundle(BUILTIN, "lora"),
    ):
        with pytest.raises(ValueError, match=r"builtin\.safetensors: this bundle holds merged weights, not LoRAs"):
            read()
    with pytest.raises(ValueError, match="this bundle holds only LoRAs"):
        read_bundle(lora_bundle, "merged")
    assert main(["upscale", str(tmp_path), "-o", str(tmp_path / "out"), "--model", str(lora_bundle)]) == 2
    assert counted == []


def test_the_built_in_model_passes():
    assert read_bundle(BUILTIN, "merged").kind == "merged"
    assert torch.isfinite(read_bundle(BUILTIN).prompt.tokens).all()
