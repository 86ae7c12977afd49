"""8-bit weights: the rounding itself, their bundles, and what they change in the result."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import read_bundle, read_description, write_bundle
from tsdsr_core.families.load import from_bundle
from tsdsr_core.families.sd3.config import TRANSFORMER_CONFIG
from tsdsr_core.families.sd3.fold import FoldedEmbedding, fold_structure
from tsdsr_core.pipeline import Options, restore
from tsdsr_core.weights.float8 import SCALE, STORED, dequantise, is_matrix, quantise

from ..support.bundles import merged_bundles, rewrite
from ..support.tiny import TRANSFORMER, photo

CPU = torch.device("cpu")
KEY = "transformer_blocks.0.ff.net.2.weight"
QUERY, REST = "transformer_blocks.0.attn.to_q.weight", ("to_k", "to_v")
TYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("largest", "scale"), [(896.0, 2.0), (897.0, 4.0), (448.0, 1.0), (225.0, 1.0), (224.0, 0.5), (0.0, 2**-15), (1e-9, 2**-15)]
)
def test_the_scale_is_the_smallest_power_of_two_that_fits(largest, scale):
    stored = quantise({KEY: torch.tensor([[-largest, 0.0]])}, torch.float32)
    assert stored[KEY + SCALE].item() == scale
    assert stored[KEY + SCALE].dtype == torch.float32


def test_rounding_by_hand():
    """With a scale of 2: 3.3 / 2 has steps of 1/8, 100 / 2 steps of 4 (a tie, to the even one), 0.001 / 2 steps of 1/512."""
    stored = quantise({KEY: torch.tensor([[896.0, 3.3, -100.0, 0.001, 0.007]])}, torch.float32)
    assert stored[KEY].dtype == STORED
    assert stored[KEY].float().tolist() == [[448, 1.625, -48, 0, 2 / 512]]
    assert dequantise(stored, torch.float32)[KEY].tolist() == [[896, 3.25, -96, 0, 4 / 512]]


@pytest.mark.parametrize("size", [1e-5, 0.02, 3.0, 500.0])
def test_the_error_is_half_a_step_and_rounding_happens_once(size):
    torch.manual_seed(0)
    weight = size * torch.randn(200, 300)
    stored = quantise({KEY: weight}, torch.float32)
    exact = dequantise(stored, torch.float32)[KEY]
    assert ((exact - weight).abs() <= torch.maximum(weight.abs() / 16, stored[KEY + SCALE] / 1024)).all()
    for dtype in TYPES:
        found = dequantise(stored, dtype)[KEY]
        assert found.dtype == dtype
        assert torch.equal(found.float(), exact), "nothing is lost in a smaller type"
    assert torch.equal(dequantise(quantise({KEY: exact}, torch.float32), torch.float32)[KEY], exact)


def test_query_key_and_value_share_the_scale_that_fits_all():
    weights = {QUERY.replace("to_q", name): torch.full((2, 2), 10.0**power) for power, name in enumerate(("to_q", *REST))}
    weights |= {key.replace(".to_", ".add_").replace(".weight", "_proj.weight"): 8 * w for key, w in weights.items()}
    stored = quantise(weights, torch.float32)
    scales = {key: stored[key + SCALE].item() for key in weights}
    assert set(scales.values()) == {0.25, 2.0}
    assert [scale for key, scale in scales.items() if ".to_" in key] == [0.25] * 3, "100 / 448"


def test_the_matrices_are_all_of_attention_and_feed_forward():
    """Of SD3.5 medium as well, which has a second attention."""
    model = SD3Transformer2DModel(**TRANSFORMER, dual_attention_layers=(0,), qk_norm="rms_norm")
    weights = model.state_dict()
    parts = ("attn", "attn2", "ff", "ff_context")
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {key for key in linear if any(f".{part}." in key for part in parts)}
    assert {key for key in weights if is_matrix(key)} == expected
    stored = quantise(weights, torch.float16)
    assert {key.removesuffix(SCALE) for key in stored if key.endswith(SCALE)} == expected
    others = weights.keys() - expected
    assert all(torch.equal(stored[key], weights[key].half()) for key in others)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_values_that_8_bits_cannot_hold_are_named(value):
    keys = [QUERY.replace("to_q", name) for name in ("to_q", *REST)]
    weights = {key: torch.tensor([[1.0, value if key == keys[1] else 2.0]]) for key in keys}
    with pytest.raises(ValueError, match=rf"NaN or infinite values in {keys[1]}: the model is damaged"):
        quantise(weights, torch.float16)


def test_a_folded_sd3_medium_is_about_half_of_its_fp16():
    with torch.device("meta"):
        model = SD3Transformer2DModel(**TRANSFORMER_CONFIG)
    fold_structure(model)
    sizes = {key: weight.numel() for key, weight in model.state_dict().items()}
    eight = sum(size * (1 if is_matrix(key) else 2) for key, size in sizes.items())
    assert (round(2 * sum(sizes.values()) / 1e6), round(eight / 1e6)) == (2805, 1467)


@pytest.fixture(scope="module")
def bundles(published, tmp_path_factory):
    """The paths of one model's bundles in fp16, whole and folded, with and without 8-bit weights."""
    return merged_bundles(published, tmp_path_factory.mktemp("eight"), "eight-bit")


@pytest.mark.parametrize("name", ["whole", "fold"])
def test_only_the_transformers_matrices_are_in_8_bits(name, bundles):
    plain, eight = (read_bundle(bundles[key]) for key in (name, f"{name} eight-bit"))
    assert (plain.eight_bit, eight.eight_bit) == (False, True)
    assert (plain.folded, eight.folded) == (name == "fold", name == "fold")
    assert {key: tensor.dtype == STORED for key, tensor in eight.transformer.items() if not key.endswith(SCALE)} == {
        key: is_matrix(key) for key in plain.transformer
    }
    assert all(torch.equal(plain.vae[key], eight.vae[key]) for key in plain.vae), "the encoder LoRA's change is small"
    assert all(torch.equal(plain.transformer[k], eight.transformer[k]) for k in plain.transformer if not is_matrix(k))
    assert [read_description(bundles[key])["version"] for key in bundles] == [1, 2, 3, 3]


def test_a_bundle_is_read_as_it_was_written(bundles, tmp_path):
    first = read_bundle(bundles["fold eight-bit"])
    write_bundle(tmp_path / "b.safetensors", first)
    again = read_bundle(tmp_path / "b.safetensors")
    assert again.transformer.keys() == first.transformer.keys()
    assert all(torch.equal(again.transformer[key].float(), first.transformer[key].float()) for key in first.transformer)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["whole", "fold"])
def test_the_result_is_that_of_weights_dequantised_by_hand(name, dtype, bundles):
    low, options = photo(30, 20), Options(process_size=0)
    raw = load_file(bundles[f"{name} eight-bit"])
    by_hand = from_bundle(read_bundle(bundles[name]), CPU, dtype)
    changed = 0
    for key, parameter in by_hand.transformer.named_parameters():
        scale = raw.get(f"transformer.{key}_scale")
        if scale is not None:
            parameter.copy_(raw[f"transformer.{key}"].float() * scale)
            changed += 1
    assert changed == sum(map(is_matrix, read_bundle(bundles[name]).transformer))
    model = from_bundle(read_bundle(bundles[f"{name} eight-bit"]), CPU, dtype)
    assert {parameter.dtype for parameter in model.transformer.parameters()} == {dtype}
    assert torch.equal(restore(low, model.model(), options), restore(low, by_hand.model(), options))


def test_the_result_stays_close(bundles):
    low, options = photo(30, 20), Options(process_size=0)
    results = {name: restore(low, from_bundle(read_bundle(path), CPU, torch.float32).model(), options)
               for name, path in bundles.items()}  # fmt: skip
    difference = results["whole eight-bit"] - results["whole"]
    assert 0 < difference.abs().max() < 0.1, "random weights, whose rounding errors do not average out"
    assert difference.square().mean().sqrt() < 0.02
    assert (results["whole eight-bit"] - results["fold eight-bit"]).abs().max() < 5e-3, "folded constants in fp16"


def test_a_bundle_becomes_8_bit_later(bundles, tmp_path):
    """Folding an 8-bit bundle changes none of its 8-bit weights."""
    arguments = ["bundle", "--merge", "--eight-bit", "-o", tmp_path / "a.safetensors", "--model", bundles["whole"]]
    assert main([str(argument) for argument in arguments]) == 0
    assert read_bundle(tmp_path / "a.safetensors").eight_bit
    arguments = ["bundle", "--merge", "--fold", "--eight-bit", "-o", tmp_path / "b.safetensors", "--model"]
    assert main([str(argument) for argument in [*arguments, bundles["whole eight-bit"]]]) == 0
    first, later = (read_bundle(path) for path in (bundles["whole eight-bit"], tmp_path / "b.safetensors"))
    assert isinstance(from_bundle(later, CPU, torch.float32).transformer.time_text_embed, FoldedEmbedding)
    weights = [dequantise(bundle.transformer, torch.float32) for bundle in (first, later)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1] if is_matrix(key))


def test_8_bits_need_merged_weights(published, tmp_path, capsys):
    arguments = ["bundle", "--eight-bit", "--lora-dir", published.loras, "--embedding-dir", published.embeddings]
    assert main([str(argument) for argument in [*arguments, "-o", tmp_path / "x.safetensors"]]) == 2
    assert "--eight-bit needs --merge" in capsys.readouterr().err


def test_info_says_so(bundles, capsys):
    facts = []
    for name in ("fold", "fold eight-bit"):
        assert main(["info", str(bundles[name]), "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    assert "weights" not in facts[0]
    assert facts[1]["weights"].startswith("8-bit")
    assert facts[0]["parameters"] == facts[1]["parameters"]


def test_info_finds_damaged_8_bit_weights(bundles, tmp_path, capsys):
    weight = load_file(bundles["whole eight-bit"])[f"transformer.{KEY}"].float()
    weight[0, 0] = torch.nan
    path = rewrite(bundles["whole eight-bit"], tmp_path / "x.safetensors", {f"transformer.{KEY}": weight.to(STORED)})
    assert main(["info", str(path)]) == 2
    assert f"NaN or infinite values in {KEY}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({KEY + SCALE: None}, f"do not match: {KEY}"),
        ({KEY: torch.zeros(32, 128)}, f"do not match: {KEY}"),
        ({"proj_out.weight": torch.zeros(64, 32).to(STORED), "proj_out.weight_scale": torch.tensor(1.0)}, "match: proj_out"),
        ({KEY + SCALE: torch.tensor(-1.0)}, f"the scale of {KEY}: expected one finite fp32 number above 0"),
        ({KEY + SCALE: torch.tensor([1.0, 2.0])}, f"the scale of {KEY}: expected one"),
        ({KEY + SCALE: torch.tensor(1.0).half()}, f"the scale of {KEY}: expected one"),
        ({QUERY + SCALE: torch.tensor(3.0)}, r"to_k.weight and .*to_q.weight and .*to_v.weight: expected one"),
    ],
)
def test_damaged_scales_are_named(changes, message, bundles, tmp_path):
    changes = {f"transformer.{key}": tensor for key, tensor in changes.items()}
    path = rewrite(bundles["whole eight-bit"], tmp_path / "x.safetensors", changes)
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}"):
        read_bundle(path)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"eight_bit": "yes"}, "eight_bit = 'yes' in a bundle of kind merged"),
        ({"eight_bit": True, "kind": "lora"}, "eight_bit = True in a bundle of kind lora"),
        ({"eight_bit": True}, "do not match: there are none"),
    ],
)
def test_damaged_metadata_is_named(description, message, bundles, tmp_path):
    path = rewrite(bundles["whole"], tmp_path / "x.safetensors", **description)
    with pytest.raises(ValueError, match=message):
        read_bundle(path)
