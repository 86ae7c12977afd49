"""PEFT's configuration beside a LoRA of any name, against PEFT itself, and whose configuration it is."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import find_lora
from tsdsr_core.weights.lora import load_lora, merge_lora

CONFIGS = {
    "alpha": {"r": 2, "lora_alpha": 8, "target_modules": ["to_q", "proj_out"]},
    "fraction": {"r": 4, "lora_alpha": 1, "target_modules": ["to_q"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["to_k", "to_v"]},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "proj_out"],
        "rank_pattern": {"to_q": 2, r"transformer_blocks\.1\..*to_k": 6}, "alpha_pattern": {"^proj_out": 32, "1.attn.to_k": 3},
    },
    "regex": {"r": 2, "lora_alpha": 6, "target_modules": r"transformer_blocks\.0\..*\.(to_q|to_out\.0)"},
    "fan_in_fan_out": {"r": 2, "lora_alpha": 4, "fan_in_fan_out": True, "target_modules": ["to_q"]},
    "one layer": {"r": 2, "lora_alpha": 8, "target_modules": ["to_q"], "layers_to_transform": [1],
                  "layers_pattern": "transformer_blocks"},
    "bias of no module": {"r": 2, "lora_alpha": 8, "target_modules": ["to_q"], "exclude_modules": ["to_k"]},
}  # fmt: skip
"""Settings of PEFT that a renamed file has to keep."""
NAMES = ["adapter_model.safetensors", "transformer.safetensors", "my lora.SAFETENSORS"]


def save_adapter(published, folder, **config):
    """What PEFT writes, with random factors."""
    torch.manual_seed(1)
    model = get_peft_model(SD3Transformer2DModel.from_pretrained(published.sd3 / "transformer"), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


def merged_by_peft(published, folder) -> dict[str, torch.Tensor]:
    base = SD3Transformer2DModel.from_pretrained(published.sd3 / "transformer")
    return PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_a_lora_of_any_name_is_as_strong_as_in_peft(config, name, published, tmp_path):
    save_adapter(published, tmp_path, **config)
    expected = merged_by_peft(published, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
    ours = SD3Transformer2DModel.from_pretrained(published.sd3 / "transformer")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    merge_lora(ours, find_lora(tmp_path / name, "transformer"))
    largest = max(float((expected[key] - value).abs().max()) for key, value in before.items())
    error = max(float((expected[key] - value).abs().max()) for key, value in ours.state_dict().items())
    assert error <= 2e-5
    assert largest > 1e-2


def write(path, rank=2, modules=("proj_out",), header=None):
    tensors = {}
    for module in modules:
        tensors[f"transformer.{module}.lora_A.weight"] = torch.ones(rank, 8)
        tensors[f"transformer.{module}.lora_B.weight"] = torch.ones(4, rank)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, header)
    return path


def write_config(folder, **config):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}))


def scale(path) -> float:
    (found,) = {pair.scale for pair in load_lora(path).pairs.values()}
    return found


@pytest.mark.parametrize(
    ("targets", "scales"),
    [
        (["proj_out"], (4, 1)), (["conv_in"], (1, 4)), (r"encoder\..*", (1, 4)), (r"transformer\.proj_out", (4, 1)),
        (["proj_out", "to_q"], (4, 1)), (["roj_out", "conv_in"], (1, 4)),
    ],
)  # fmt: skip
def test_the_configuration_of_one_of_two_files_is_not_the_others(targets, scales, tmp_path, caplog):
    transformer = write(tmp_path / "transformer.safetensors")
    vae = write(tmp_path / "vae.safetensors", modules=["encoder.conv_in"])
    write_config(tmp_path, target_modules=targets)
    assert (scale(transformer), scale(vae)) == scales
    assert not caplog.records


def test_the_rank_tells_where_the_modules_do_not(tmp_path):
    transformer = write(tmp_path / "transformer.safetensors", modules=["transformer_blocks.0.attn.to_q"])
    vae = write(tmp_path / "vae.safetensors", rank=3, modules=["encoder.mid_block.attentions.0.to_q"])
    write_config(tmp_path, target_modules=["to_q"])
    assert (scale(transformer), scale(vae)) == (4, 1)


def test_a_configuration_that_describes_both_parts_is_used_for_both_and_said(tmp_path, caplog):
    transformer = write(tmp_path / "transformer.safetensors", modules=["transformer_blocks.0.attn.to_q"])
    vae = write(tmp_path / "vae.safetensors", modules=["encoder.mid_block.attentions.0.to_q"])
    write_config(tmp_path, target_modules=["to_q"])
    with caplog.at_level(logging.WARNING, "tsdsr"):
        assert (scale(transformer), scale(vae)) == (4, 4)
    assert "describes both transformer.safetensors and vae.safetensors" in caplog.text


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        ({"r": 3, "target_modules": ["proj_out"]}, "rank 3 for proj_out"),
        ({"rank_pattern": {"proj_out": 5}, "target_modules": ["proj_out"]}, "rank 5 for proj_out"),
        ({"r": 3}, "rank 3 for proj_out"),
        ({"r": "2"}, "r = '2': expected a finite number"),
        ({"target_modules": "("}, "expected a regular expression"),
        ({"target_modules": [1]}, "expected text or a list of texts"),
    ],
)
def test_a_configuration_that_contradicts_the_only_lora_is_refused(config, difference, tmp_path):
    path = write(tmp_path / "transformer.safetensors")
    write_config(tmp_path, **config)
    with pytest.raises(ValueError, match=r"adapter_config\.json") as caught:
        load_lora(path)
    assert difference in str(caught.value)
    assert "transformer.safetensors" in str(caught.value) or "adapter_config.json: " in str(caught.value)


def test_a_configuration_of_a_lora_that_is_no_longer_there_is_refused_where_it_matters(tmp_path):
    """It targets some of the modules: whether it is this file's cannot be known."""
    write_config(tmp_path, target_modules=["proj_out"])
    path = write(tmp_path / "transformer.safetensors", modules=["proj_out", "transformer_blocks.0.attn.to_q"])
    with pytest.raises(ValueError, match=r"does not target transformer_blocks\.0\.attn\.to_q.*strength is unknown"):
        load_lora(path)
    assert scale(write(path, modules=["proj_out", "a"], header={"ss_network_alpha": "1"})) == 0.5
    write(tmp_path / "other.safetensors")
    assert scale(write(path, modules=["proj_out", "a"])) == 1


@pytest.mark.parametrize("text", ['{"peft_type": "LOHA", "r": 2, "target_modules": ["conv_in"]}', '{"peft_type": "IA3"}'])
def test_the_configuration_of_another_kind_of_adapter_stays_out_of_it(text, tmp_path):
    path = write(tmp_path / "transformer.safetensors", header={"lora_alpha": "1"})
    (tmp_path / "adapter_config.json").write_text(text)
    assert scale(path) == 0.5


def test_settings_that_are_no_plain_lora_are_refused_under_any_name(tmp_path):
    path = write(tmp_path / "transformer.safetensors")
    write_config(tmp_path, target_modules=["proj_out"], use_dora=True)
    with pytest.raises(ValueError, match=r"transformer\.safetensors: adapter_config\.json: use_dora makes this DoRA"):
        load_lora(path)


@pytest.mark.parametrize(
    ("extra", "name"),
    [("transformer.proj_out.bias", "or bias"), ("base_model.model.norm_out.linear.weight", "modules_to_save")],
)
def test_weights_and_biases_beside_the_factors_are_named(extra, name, tmp_path):
    path = write(tmp_path / "transformer.safetensors")
    save_file(load_file(path) | {extra: torch.ones(4)}, path)
    with pytest.raises(ValueError, match=f"a LoRA with whole weights or biases, .*{name}.*{extra}.*not supported"):
        load_lora(path)


@pytest.mark.linux
def test_a_link_to_an_adapter_has_its_configuration(tmp_path):
    target = write(tmp_path / "peft" / "adapter_model.safetensors")
    write_config(target.parent, target_modules=["proj_out"])
    link = tmp_path / "transformer.safetensors"
    link.symlink_to(target)
    assert scale(link) == 4


def test_info_shows_rank_alpha_and_strength(published, tmp_path, capsys):
    shutil.copy(published.loras / "vae.safetensors", tmp_path / "vae.safetensors")
    write_config(tmp_path, target_modules=["proj_out"], use_rslora=True)
    write(tmp_path / "transformer.safetensors")
    main(["info", str(tmp_path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["transformer"] == "1 modules of rank 2"
    assert facts["transformer alpha"] == "11.3137 (adapter_config.json, rsLoRA: times the root of the rank)"
    assert facts["transformer strength"] == "5.65685 (alpha / rank)"
    assert facts["vae alpha"] == "4 (the rank, since the file gives none)"
    assert facts["vae strength"] == "1 (alpha / rank)"


def test_info_reads_a_folder_of_peft(tmp_path, capsys):
    write_config(tmp_path, target_modules=["proj_out"])
    write(tmp_path / "adapter_model.safetensors")
    assert main(["info", str(tmp_path)]) == 1
    assert "transformer strength 4 (alpha / rank)" in capsys.readouterr().out
