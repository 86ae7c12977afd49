"""A folded transformer gives what the whole one gives."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import METADATA_KEY, read_bundle, read_description
from tsdsr_core.families.load import from_bundle, load
from tsdsr_core.families.sd3.config import TRANSFORMER_CONFIG
from tsdsr_core.families.sd3.fold import FoldedEmbedding, fold, fold_structure
from tsdsr_core.pipeline import Options, restore

from ..support.tiny import photo

CPU = torch.device("cpu")


def loaded(published):
    return load(published.sd3, loras=published.loras, prompt=published.embeddings, device=CPU, dtype=torch.float32)


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.rounding
def test_the_velocity_stays_the_same(published):
    model = loaded(published)
    z = torch.randn(3, 16, 12, 10)
    whole, before = model.velocity(z), parameters(model.transformer)
    fold(model.transformer, model.prompt.pooled)
    assert (model.velocity(z) - whole).abs().max() <= 3e-6 * whole.abs().max(), "fp32 gives 3e-7, constants in fp16 3e-5"
    assert parameters(model.transformer) < 0.8 * before


def test_it_is_a_third_of_sd3_medium():
    with torch.device("meta"):
        model = SD3Transformer2DModel(**TRANSFORMER_CONFIG)
    before = parameters(model)
    fold_structure(model)
    assert round(before / 1e6) == 2028
    assert round((before - parameters(model)) / 1e6) == 683


@pytest.mark.rounding
def test_dual_attention_and_its_norms_are_folded_too():
    """As in SD3.5 medium."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip
    z, tokens, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.randn(1, 10)
    given = {"hidden_states": z, "timestep": torch.tensor([1000.0]), "encoder_hidden_states": tokens,
             "pooled_projections": pooled, "return_dict": False}  # fmt: skip
    with torch.no_grad():
        whole = model(**given)[0]
        fold(model, pooled)
        assert (model(**given)[0] - whole).abs().max() <= 3e-6 * whole.abs().max()


@pytest.fixture(scope="module")
def bundles(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fold")
    source = ["--model", published.sd3, "--lora-dir", published.loras, "--embedding-dir", published.embeddings]
    for name, more in (("whole", []), ("folded", ["--fold"])):
        arguments = ["bundle", "--merge", *more, *source, "--dtype", "fp32", "-o", folder / f"{name}.safetensors"]
        assert main([str(argument) for argument in arguments]) == 0
    return folder / "whole.safetensors", folder / "folded.safetensors"


@pytest.mark.rounding
def test_a_folded_bundle_restores_like_the_whole_one(bundles):
    image, options = photo(40, 48), Options(scale=2, process_size=0)
    whole, folded = (from_bundle(read_bundle(path), CPU, torch.float32) for path in bundles)
    assert isinstance(folded.transformer.time_text_embed, FoldedEmbedding)
    difference = restore(image, folded.model(), options) - restore(image, whole.model(), options)
    assert difference.abs().max() < 1e-5
    assert bundles[1].stat().st_size < bundles[0].stat().st_size


def test_only_folded_bundles_need_a_newer_program(bundles):
    assert [read_description(path)["version"] for path in bundles] == [1, 2]


def test_a_bundle_can_be_folded_later_and_only_once(bundles, tmp_path, capsys):
    arguments = ["bundle", "--merge", "--fold", "--dtype", "fp32", "-o", str(tmp_path / "later.safetensors"), "--model"]
    assert main([*arguments, str(bundles[0])]) == 0
    first, later = read_bundle(bundles[1]), read_bundle(tmp_path / "later.safetensors")
    assert all(torch.allclose(first.transformer[key], later.transformer[key], atol=1e-6) for key in first.transformer)
    assert main([*arguments, str(bundles[1]), "--existing", "overwrite"]) == 2
    assert "is folded already" in capsys.readouterr().err


def test_folding_needs_merged_weights(published, tmp_path, capsys):
    arguments = ["bundle", "--fold", "--lora-dir", published.loras, "--embedding-dir", published.embeddings]
    assert main([str(argument) for argument in [*arguments, "-o", tmp_path / "x.safetensors"]]) == 2
    assert "--fold needs --merge" in capsys.readouterr().err


def test_damaged_metadata_is_named(bundles, tmp_path):
    description = {**read_description(bundles[0]), "folded": "yes"}
    save_file(load_file(bundles[0]), tmp_path / "x.safetensors", {METADATA_KEY: json.dumps(description)})
    with pytest.raises(ValueError, match="folded = 'yes'"):
        read_bundle(tmp_path / "x.safetensors")
