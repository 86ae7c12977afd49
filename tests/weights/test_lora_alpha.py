"""The strength of a LoRA as its file gives it, against diffusers and PEFT loading the same file."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import find_lora
from tsdsr_core.weights.lora import load_lora, merge_lora, parse_lora

from ..support.tiny import RANK, TRANSFORMER_TARGETS, VAE_TARGETS, Published, randomised_lora

PATTERNS = {
    "plain": {"lora_alpha": 2},
    "patterns": {
        "lora_alpha": 3, "rank_pattern": {"to_q": 2, r"transformer_blocks\.1\..*to_k": 6},
        "alpha_pattern": {"to_q": 8, "transformer_blocks.1.attn.to_k": 1, "proj_out": 4},
    },
    "rslora": {"lora_alpha": 5, "use_rslora": True, "rank_pattern": {"proj": 2}},
}  # fmt: skip


def adapted(published: Published, part: str, **config):
    """The base model with a random adapter of its own rank and alpha."""
    kind, targets = {
        "transformer": (SD3Transformer2DModel, TRANSFORMER_TARGETS), "vae": (AutoencoderKL, VAE_TARGETS),
    }[part]  # fmt: skip
    model = kind.from_pretrained(published.sd3 / part)
    model.add_adapter(LoraConfig(r=RANK, init_lora_weights="gaussian", target_modules=targets, **config))
    randomised_lora(model)
    return model


def fused(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.fuse_lora()
    return {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if ".lora_" not in name}


def check_merged(published: Published, part: str, path, expected: dict[str, torch.Tensor]) -> None:
    ours = (SD3Transformer2DModel if part == "transformer" else AutoencoderKL).from_pretrained(published.sd3 / part)
    merge_lora(ours, load_lora(path, part))
    for name, value in ours.state_dict().items():
        assert (value - expected[name]).abs().max() <= 2e-5, name


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
def test_a_models_own_file_is_merged_as_diffusers_does(config, part, published, tmp_path):
    if part == "vae":
        config = {key: value for key, value in config.items() if not key.endswith("_pattern")}
        config |= {"alpha_pattern": {"conv_in": 1, "mid_block.attentions.0.to_q": 9}}
    model = adapted(published, part, **config)
    model.save_lora_adapter(tmp_path, weight_name="x.safetensors")
    check_merged(published, part, tmp_path / "x.safetensors", fused(copy.deepcopy(model)))
    oracle = type(model).from_pretrained(published.sd3 / part)
    oracle.load_lora_adapter(tmp_path, weight_name="x.safetensors", prefix=None)
    check_merged(published, part, tmp_path / "x.safetensors", fused(oracle))


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
def test_a_pipelines_file_is_merged_as_diffusers_does(config, published, tmp_path):
    model = adapted(published, "transformer", **config)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(), weight_name="transformer.safetensors",
    )  # fmt: skip
    path = tmp_path / "transformer.safetensors"
    with safe_open(path, "pt") as file:
        assert "transformer.lora_alpha" in json.loads(file.metadata()["lora_adapter_metadata"])
    weights, metadata = StableDiffusion3Pipeline.lora_state_dict(path, return_lora_metadata=True)
    oracle = SD3Transformer2DModel.from_pretrained(published.sd3 / "transformer")
    oracle.load_lora_adapter(weights, prefix="transformer", metadata=metadata)
    check_merged(published, "transformer", path, fused(oracle))


def test_a_folder_of_peft_is_merged_by_its_configuration(published, tmp_path):
    model = adapted(published, "transformer", lora_alpha=1, alpha_pattern={"to_v": 7})
    factors = {f"base_model.model.{key}": value for key, value in get_peft_model_state_dict(model).items()}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path)
    check_merged(published, "transformer", tmp_path / "adapter_model.safetensors", fused(model))


def pair(rank: int = 4, convolution: bool = False, **extra) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (3, 3) if convolution else ()
    one = (1, 1) if convolution else ()
    return {
        "transformer.a.lora_A.weight": torch.randn(rank, 5, *size, generator=generator),
        "transformer.a.lora_B.weight": torch.randn(6, rank, *one, generator=generator),
        **extra,
    }


@pytest.mark.parametrize(
    ("header", "alpha"),
    [
        ({}, 4),
        ({"format": "pt"}, 4),
        ({"ss_network_alpha": "1", "ss_network_dim": "4"}, 1),
        ({"ss_network_alpha": "0.5"}, 0.5),
        ({"ss_network_alpha": "None"}, 4),
        ({"ss_network_alpha": "0"}, 4),
        ({"lora_alpha": "2"}, 2),
        ({"network_alpha": "2", "ss_network_alpha": "2.0"}, 2),
        ({"ss_network_alpha": "1", "ss_network_args": '{"conv_dim": "4", "conv_alpha": "3"}'}, 1),
        ({"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 8}'}, 8),
        ({"lora_adapter_metadata": '{"r": 4, "lora_alpha": 8}'}, 8),
        ({"lora_adapter_metadata": '{"text_encoder.r": 9, "transformer.r": 4, "transformer.lora_alpha": 3}'}, 3),
        ({"lora_adapter_metadata": '{"r": 4, "lora_alpha": 8, "use_rslora": true}'}, 16),
    ],
)
def test_every_header_that_gives_alpha_is_honoured(header, alpha, tmp_path):
    tensors = pair()
    save_file(tensors, tmp_path / "x.safetensors", header)
    (found,) = load_lora(tmp_path / "x.safetensors").pairs.values()
    product = tensors["transformer.a.lora_B.weight"] @ tensors["transformer.a.lora_A.weight"]
    assert torch.allclose(found.delta(), alpha / 4 * product, atol=1e-6)


def test_convolutions_have_an_alpha_of_their_own_in_kohyas_headers(tmp_path):
    header = {"ss_network_alpha": "1", "ss_network_args": '{"conv_dim": "4", "conv_alpha": "3"}'}
    save_file(pair(convolution=True), tmp_path / "x.safetensors", header)
    assert load_lora(tmp_path / "x.safetensors").pairs["a"].alpha == 3


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0, dtype=torch.bfloat16)])
def test_alpha_tensors_go_before_the_one_alpha_of_the_header(alpha, tmp_path):
    save_file(pair(**{"transformer.a.alpha": alpha}), tmp_path / "x.safetensors", {"ss_network_alpha": "8"})
    assert load_lora(tmp_path / "x.safetensors").pairs["a"].alpha == 2


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"ss_network_args": "{'conv_dim': 4}"}, "ss_network_args: not valid JSON"),
        ({"ss_network_args": "[1]"}, "ss_network_args: expected a JSON object"),
        ({"ss_network_alpha": "four"}, "ss_network_alpha = 'four': expected a number"),
    ],
)
def test_a_malformed_header_of_kohya_matters_only_where_it_is_needed(header, message, tmp_path):
    save_file(pair(**{"transformer.a.alpha": torch.tensor(2.0)}), tmp_path / "x.safetensors", header)
    assert load_lora(tmp_path / "x.safetensors").pairs["a"].alpha == 2
    save_file(pair(), tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=rf"x\.safetensors: {message}"):
        load_lora(tmp_path / "x.safetensors")


CONFIG = {"r": 4, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "use_dora": True}, "use_dora makes this DoRA"),
        ({**CONFIG, "lora_bias": True}, "lora_bias"),
        ({**CONFIG, "init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base model"),
        ({**CONFIG, "peft_type": "LOHA"}, "type LOHA: expected LORA"),
        ({"r": 8, "lora_alpha": 8}, "rank 8 for a, but its tensors have rank 4"),
        ({**CONFIG, "rank_pattern": {"a": 2}}, "rank 2 for a"),
        ({"r": 4}, "lora_alpha is missing"),
        ({"r": 4, "lora_alpha": "4"}, "lora_alpha = '4': expected a finite number"),
        ({"r": 4, "lora_alpha": 10**400}, "expected a finite number"),
        ({**CONFIG, "alpha_pattern": {"(": 2}}, r"expected a regular expression"),
        ({**CONFIG, "alpha_pattern": ["a"]}, "expected an object"),
        ({"x.r": 4, "y.r": 4}, "expected settings for transformer, found them for x, y"),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"r": 4, "lora_alpha": NaN}', "NaN is not a number"),
    ],
)
def test_a_header_that_cannot_be_honoured_is_refused(config, message, tmp_path):
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(pair(), tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(tmp_path / "x.safetensors")
    assert "x.safetensors: lora_adapter_metadata" in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "header"),
    [
        ({"transformer.a.alpha": torch.tensor(2.0)}, {"lora_adapter_metadata": json.dumps(CONFIG)}),
        ({}, {"lora_adapter_metadata": json.dumps(CONFIG), "ss_network_alpha": "2"}),
        ({}, {"ss_network_alpha": "2", "lora_alpha": "4"}),
    ],
)
def test_sources_that_contradict_each_other_are_refused(extra, header, tmp_path):
    save_file(pair(**extra), tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=r"the alpha of a is either 2 or 4: .*so its strength is unknown"):
        load_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("transformer.a.lora_magnitude_vector", "DoRA"),
        ("lora_unet_a.dora_scale", "DoRA"),
        ("lora_unet_a.hada_w1_a", "LoHa"),
        ("transformer.a.lokr_w1", "LoKr"),
        ("lora_unet_a.oft_blocks", "OFT"),
        ("lora_unet_a.lora_mid.weight", "Tucker"),
        ("transformer.a.lora_B.bias", "a LoRA with biases"),
        ("lora_unet_a.lora_down.weight", "kohya"),
        ("transformer.a.lora.up.weight", "old diffusers"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(key, kind):
    with pytest.raises(ValueError, match=rf"this is .*{kind}.* is not supported"):
        parse_lora(pair(**{key: torch.ones(4)}))


@pytest.mark.parametrize("alpha", [torch.tensor(torch.nan), torch.ones(2)])
def test_an_impossible_alpha_is_refused(alpha, tmp_path):
    save_file(pair(**{"transformer.a.alpha": alpha}), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"a\.alpha"):
        load_lora(tmp_path / "x.safetensors")


def test_whole_numbers_in_place_of_factors_are_refused(tmp_path):
    save_file({key: value.to(torch.int8) for key, value in pair().items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors holds int8 numbers in .*lora_A"):
        load_lora(tmp_path / "x.safetensors")


def test_a_bundle_keeps_what_the_header_gave(published, tmp_path):
    folder = tmp_path / "loras"
    for part in ("transformer", "vae"):
        adapted(published, part, lora_alpha=1, use_rslora=True).save_lora_adapter(folder, weight_name=f"{part}.safetensors")
    arguments = ["--lora-dir", str(folder), "--embedding-dir", str(published.embeddings), "--dtype", "fp16"]
    assert main(["bundle", *arguments, "-o", str(tmp_path / "b.safetensors")]) == 0
    for part in ("transformer", "vae"):
        for name, found in find_lora(tmp_path / "b.safetensors", part).pairs.items():
            assert found.alpha == pytest.approx(RANK**0.5, rel=1e-6), name
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert any(key.endswith(".alpha") for key in file.keys())  # noqa: SIM118
    assert load_file(folder / "vae.safetensors").keys() == {f"{name}.lora_{x}.weight" for name in VAE_TARGETS for x in "AB"}
