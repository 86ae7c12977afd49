import copy

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tsdsr_core.families.load import published_shapes
from tsdsr_core.families.sd3 import SD3
from tsdsr_core.families.sd3 import config as sd3_config
from tsdsr_core.weights.lora import check_fit, load_lora, merge_lora, misfits, parse_lora, weight_shapes

from ..support import tiny
from ..support.tiny import Published


def full_size_lora(part: str) -> dict[str, torch.Tensor]:
    """PEFT's own key list and shapes for the full-size model, rank 64 as published; nothing is allocated."""
    with torch.device("meta"):
        if part == "transformer":
            model, targets = SD3Transformer2DModel(**sd3_config.TRANSFORMER_CONFIG), tiny.TRANSFORMER_TARGETS
        else:
            model, targets = AutoencoderKL(**sd3_config.VAE_CONFIG), tiny.VAE_TARGETS
        model.add_adapter(LoraConfig(r=64, lora_alpha=64, init_lora_weights=False, target_modules=targets))
        return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize(("part", "modules"), [("transformer", 266), ("vae", 31)])
def test_every_published_module_lands_in_the_full_size_model(part, modules):
    lora = parse_lora(full_size_lora(part))
    assert lora.target == part
    assert len(lora.pairs) == modules
    assert misfits(lora, published_shapes(SD3, part)) == []
    assert {pair.rank for pair in lora.pairs.values()} == {64}


@pytest.mark.rounding
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_merged_weights_equal_pefts_merge(part, published: Published):
    kind = SD3Transformer2DModel if part == "transformer" else AutoencoderKL
    ours = kind.from_pretrained(published.sd3 / part)
    oracle = copy.deepcopy(getattr(published, part))
    oracle.fuse_lora()
    expected = {name.replace(".base_layer", ""): value for name, value in oracle.state_dict().items() if ".lora_" not in name}
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    count = merge_lora(ours, load_lora(published.loras / f"{part}.safetensors", part))
    changed = [name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == count
    for name, value in ours.state_dict().items():
        assert (value - expected[name]).abs().max() <= 1e-5, name


def test_strength_scales_the_change_and_zero_changes_nothing(published: Published):
    lora = load_lora(published.loras / "vae.safetensors")
    base = AutoencoderKL.from_pretrained(published.sd3 / "vae")
    changes = {}
    for strength in (0.0, 0.5, 1.0):
        model = copy.deepcopy(base)
        merge_lora(model, lora, strength)
        changes[strength] = model.encoder.conv_in.weight - base.encoder.conv_in.weight
    assert changes[0.0].abs().max() == 0
    assert (changes[0.5] * 2 - changes[1.0]).abs().max() < 1e-6
    assert changes[1.0].abs().max() > 0.01


def test_alpha_over_rank_scales_the_product():
    down, up = torch.randn(3, 5), torch.randn(7, 3)
    plain = parse_lora({"a.lora_A.weight": down, "a.lora_B.weight": up}).pairs["a"]
    scaled = parse_lora({"a.lora_A.weight": down, "a.lora_B.weight": up, "a.alpha": torch.tensor(1.5)}).pairs["a"]
    assert torch.allclose(plain.delta(), up @ down, atol=1e-6)
    assert torch.allclose(scaled.delta(2.0), up @ down, atol=1e-6)


@pytest.mark.rounding
def test_a_convolution_equals_the_two_convolutions_in_sequence():
    down, up = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    pair = parse_lora({"encoder.c.lora_A.weight": down, "encoder.c.lora_B.weight": up}).pairs["encoder.c"]
    x = torch.randn(1, 3, 8, 8)
    conv = torch.nn.functional.conv2d
    assert torch.allclose(conv(x, pair.delta()), conv(conv(x, down), up), atol=1e-5)


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "", "vae."])
def test_the_known_prefixes_are_understood(prefix):
    tensors = {f"{prefix}encoder.conv_in.lora_{x}.weight": torch.zeros(1, 1) for x in "AB"}
    assert list(parse_lora(tensors).pairs) == ["encoder.conv_in"]


def test_the_name_of_peft_s_adapter_is_understood():
    tensors = {f"base_model.model.proj_out.lora_{x}.default.weight": torch.ones(1, 1) for x in "AB"}
    assert list(parse_lora(tensors).pairs) == ["proj_out"]


def test_a_state_dict_round_trip_keeps_alpha():
    tensors = {"a.lora_A.weight": torch.randn(2, 3), "a.lora_B.weight": torch.randn(4, 2), "a.alpha": torch.tensor(1.0)}
    again = parse_lora(parse_lora(tensors).state_dict())
    assert again.pairs["a"].alpha == 1.0
    assert torch.equal(again.pairs["a"].delta(), parse_lora(tensors).pairs["a"].delta())


def test_leftovers_are_listed_and_change_nothing(published: Published):
    tensors = load_file(published.loras / "transformer.safetensors")
    tensors["transformer.transformer_blocks.9.attn.to_q.lora_A.weight"] = torch.zeros(4, 32)
    tensors["transformer.transformer_blocks.9.attn.to_q.lora_B.weight"] = torch.zeros(32, 4)
    tensors["transformer.proj_out.lora_B.weight"] = torch.zeros(63, 4)
    model = SD3Transformer2DModel.from_pretrained(published.sd3 / "transformer")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"2 of .* do not match") as caught:
        merge_lora(model, parse_lora(tensors))
    assert "transformer_blocks.9.attn.to_q (not in the model)" in str(caught.value)
    assert "proj_out (LoRA (63, 32), model (64, 32))" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_lora_of_another_base_does_not_fit(published: Published):
    lora = load_lora(published.loras / "transformer.safetensors")
    with pytest.raises(ValueError, match="another base model"):
        check_fit(lora, published_shapes(SD3, "transformer"))


def test_swapped_files_are_named(published: Published):
    with pytest.raises(ValueError, match=r"vae.safetensors is a LoRA for the vae, not for the transformer.*swapped"):
        load_lora(published.loras / "vae.safetensors", "transformer")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "empty"),
        ({"weight": torch.zeros(2)}, "not a PEFT LoRA: unexpected keys weight"),
        ({"a.lora_A.weight": torch.zeros(2, 3)}, "LoRA factors of a are incomplete"),
        ({"a.lora_A.weight": torch.zeros(2, 3), "a.lora_B.weight": torch.zeros(4, 3)}, "are incomplete or do not match"),
        ({"a.lora_A.weight": torch.zeros(0, 3), "a.lora_B.weight": torch.zeros(4, 0)}, "are incomplete or do not match"),
        ({"a.alpha": torch.tensor(1.0)}, "are incomplete or do not match"),
        (
            {f"{m}.lora_{x}.weight": torch.zeros(1, 1) for m in ("encoder.a", "transformer_blocks.0.b") for x in "AB"},
            "both the transformer and the VAE",
        ),
    ],
)
def test_what_is_no_lora_is_refused(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated"])
def test_damaged_files_are_named(damage, published: Published, tmp_path):
    path = tmp_path / "lora.safetensors"
    content = {"empty": b"", "text": b"<html>404</html>"}.get(damage)
    if damage == "truncated":
        content = (published.loras / "vae.safetensors").read_bytes()[:-100]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"lora\.safetensors"):
        load_lora(path)


def test_half_precision_weights_are_merged_in_fp32():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)})
    weight = model["a"].weight.detach().clone()
    lora = parse_lora({"a.lora_A.weight": torch.randn(2, 4), "a.lora_B.weight": 0.01 * torch.randn(4, 2)})
    merge_lora(model, lora)
    assert torch.equal(model["a"].weight, (weight.float() + lora.pairs["a"].delta()).to(torch.bfloat16))


def test_weight_shapes_hold_linear_and_convolution_weights_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(1, 4))
    assert weight_shapes(model) == {"0": (3, 2), "1": (4, 3, 3, 3)}


def test_a_lora_with_values_that_are_not_finite_is_damaged(published: Published, tmp_path):
    tensors = load_file(published.loras / "vae.safetensors")
    tensors["transformer.encoder.conv_in.lora_A.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"NaN or infinite values in transformer\.encoder\.conv_in\.lora_A"):
        load_lora(tmp_path / "vae.safetensors")


def test_a_module_under_two_prefixes_is_refused():
    tensors = {f"{prefix}encoder.conv_in.lora_A.weight": torch.ones(1, 3, 3, 3) for prefix in ("transformer.", "vae.")}
    with pytest.raises(ValueError, match="twice, under different prefixes"):
        parse_lora(tensors)
