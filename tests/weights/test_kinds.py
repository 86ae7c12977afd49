"""What a weight file is, for ``tsdsr info`` and for the readers that want another kind; and quantised folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import BUILTIN
from tsdsr_core.weights.kinds import recognise, recognise_file
from tsdsr_core.weights.lora import load_lora
from tsdsr_core.weights.prompt import load_prompt

M = "model.diffusion_model."
SD3 = f"{M}joint_blocks.0.x_block.attn.qkv.weight"
VAE = ["first_stage_model.encoder.down.0.block.0.conv1.weight", "first_stage_model.decoder.up.0.block.0.conv1.weight"]
DIFFUSERS_SD3 = ["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight", "pos_embed.pos_embed"]
FILES = {
    "sd3_medium": ([SD3, *VAE], "a Stable Diffusion 3 medium model, with VAE, without text encoders", True),
    "with clips": (
        [SD3, *VAE, "text_encoders.clip_l.transformer.text_model.encoder.layers.0.layer_norm1.weight"],
        "a Stable Diffusion 3 medium model, with VAE, with text encoders", True,
    ),
    "transformer alone": ([SD3.removeprefix(M)], "a Stable Diffusion 3 medium model, without VAE, without text encoders", True),
    "SD3.5 medium": ([SD3, f"{M}joint_blocks.0.x_block.attn2.qkv.weight", *VAE], "a Stable Diffusion 3.5 medium model", False),
    "SD3.5 large": ([SD3, f"{M}joint_blocks.0.x_block.attn.ln_q.weight", *VAE], "a Stable Diffusion 3.5 large model", False),
    "SDXL": (
        [f"{M}input_blocks.0.0.weight", f"{M}label_emb.0.0.weight", "conditioner.embedders.0.transformer.x.weight", *VAE],
        "a Stable Diffusion XL model, with VAE, with text encoders", False,
    ),
    "SD1": ([f"{M}input_blocks.0.0.weight", "cond_stage_model.transformer.x.bias", *VAE], "a Stable Diffusion 1 model", False),
    "SD2": ([f"{M}input_blocks.0.0.weight", "cond_stage_model.model.x.weight", *VAE], "a Stable Diffusion 2 model", False),
    "SDXL in diffusers' layout": (
        ["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight", "add_embedding.linear_1.weight"],
        "a Stable Diffusion XL UNet in diffusers' layout", False,
    ),
    "Flux": (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "a Flux model", False),
    "Flux in diffusers' layout": (
        ["transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.proj_mlp.weight"],
        "a Flux model in diffusers' layout", False,
    ),
    "SD3 in diffusers' layout": (DIFFUSERS_SD3, "a Stable Diffusion 3 transformer in diffusers' layout", True),
    "bitsandbytes": (
        [*DIFFUSERS_SD3, "transformer_blocks.0.attn.add_q_proj.weight.absmax"],
        "a Stable Diffusion 3 transformer in diffusers' layout, quantised (bitsandbytes, 4 bits)", False,
    ),
    "ComfyUI's 8 bits": ([SD3, f"{M}joint_blocks.0.x_block.attn.qkv.scale_weight"], "medium model, in scaled 8 bits", True),
    "T5": (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder", False),
    "CLIP": (["text_model.encoder.layers.0.mlp.fc1.weight"], "a CLIP text encoder", False),
    "ESRGAN": (["conv_first.weight", "body.0.rdb1.conv1.weight"], "a network of an ESRGAN upscaler", False),
    "ControlNet": (["controlnet_blocks.0.weight", *DIFFUSERS_SD3], "a ControlNet", False),
    "VAE": ([name.removeprefix("first_stage_model.") for name in VAE], "a VAE", False),
}  # fmt: skip


def write(path, keys):
    save_file({key: torch.zeros(4, 4) for key in keys}, path)
    return path


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_named_by_info_and_by_every_reader(case, published, tmp_path, capsys):
    keys, name, fits = FILES[case]
    path = write(tmp_path / "x.safetensors", keys)
    assert main(["info", str(path), "--json"]) == (0 if fits else 1)
    facts = json.loads(capsys.readouterr().out)
    assert name.removeprefix("a ") in facts["kind"]
    command = ["upscale", "docs/examples/lighthouse.png", "-o", str(tmp_path / "o.png"), "--model", str(path)]
    for options in ([], ["--lora-dir", str(published.loras), "--embedding-dir", str(published.embeddings)]):
        assert main([*command, *options]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{path} is not a TSD-SR bundle but " in line
        assert name in line
        assert "encoder" in case or facts["use"] in line
    for read in (load_lora, load_prompt):
        with pytest.raises(ValueError, match=r"x\.safetensors") as caught:
            read(path)
        assert name in str(caught.value)


@pytest.mark.parametrize("case", ["sd3_medium", "transformer alone", "SDXL", "SD3 in diffusers' layout"])
def test_the_message_says_which_folder_to_give(case, tmp_path, capsys):
    path = write(tmp_path / "x.safetensors", FILES[case][0])
    assert main(["upscale", "docs/examples/lighthouse.png", "-o", str(tmp_path / "o.png"), "--model", str(path)]) == 2
    assert "--model a folder with transformer/ and vae/ in diffusers' layout" in capsys.readouterr().err


def test_a_vae_is_told_by_its_latents(published):
    vae = {"encoder.down.0.block.0.conv1.weight": (1,), "decoder.up.0.block.0.conv1.weight": (1,)}
    latents = {count: recognise(vae | {"decoder.conv_in.weight": (512, count, 3, 3)}) for count in (4, 16)}
    assert [(kind.name.split(",")[0], kind.fits) for kind in latents.values() if kind] == [
        ("a VAE with 4 latent channels", False), ("a VAE with 16 latent channels", True),
    ]  # fmt: skip
    part = recognise_file(published.sd3 / "vae" / "diffusion_pytorch_model.safetensors")
    assert part is not None
    assert part.name.startswith("a VAE with 16 latent channels")
    part = recognise_file(published.sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
    assert part is not None
    assert part.name == "a Stable Diffusion 3 transformer in diffusers' layout"


def gguf(architecture: str) -> bytes:
    """The beginning of a GGUF file by its specification."""
    key, value = b"general.architecture", architecture.encode()
    entry = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + len(value).to_bytes(8, "little") + value
    return b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + entry


@pytest.mark.parametrize(
    ("name", "kind"),
    [("x.gguf", "a GGUF file (sd3), which is quantised"), ("x.ckpt", "a PyTorch file"), ("old.ckpt", "a PyTorch file"),
     ("x.pt", "a PyTorch file"), ("x.safetensors", "a PyTorch file")],
)  # fmt: skip
def test_files_of_other_formats_are_named(name, kind, tmp_path, capsys):
    path = tmp_path / name
    if name == "x.gguf":
        path.write_bytes(gguf("sd3"))
    else:
        torch.save({"state_dict": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=name != "old.ckpt")
    assert main(["info", str(path)]) == 1
    assert kind.removeprefix("a ") in capsys.readouterr().out
    assert main(["upscale", "docs/examples/lighthouse.png", "-o", str(tmp_path / "o.png"), "--model", str(path)]) == 2
    assert f"is not a TSD-SR bundle but {kind}: TSD-SR works with Stable Diffusion 3 medium: " in capsys.readouterr().err


def test_a_gguf_file_cut_short_is_still_one(tmp_path):
    for length in (4, 24, 40, 60):
        (tmp_path / "x.gguf").write_bytes(gguf("flux")[:length])
        kind = recognise_file(tmp_path / "x.gguf")
        assert kind is not None
        assert kind.name.startswith("a GGUF file")


def test_what_is_known_keeps_its_own_way(published, capsys):
    for path in (BUILTIN, published.embeddings, published.embeddings / "prompt_embeds.pt"):
        main(["info", str(path)])
        assert "use " not in capsys.readouterr().out
    assert recognise({"img_in.weight": (8, 8)}) is None


QUANTISED = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gguf": {"quant_method": "gguf", "compute_dtype": "float16"},
    "torchao": {"quant_method": "torchao", "quant_type": "int8wo"},
    "quanto": {"quant_method": "quanto", "weights_dtype": "int8"},
    "modelopt": {"quant_method": "modelopt", "quant_type": "FP8"},
    "auto-round": {"quant_method": "auto-round", "bits": 4},
    "nunchaku_lite": {"quant_method": "nunchaku_lite"},
    "sdnq": {"quant_method": "sdnq"},
    "bfl": {"quant_method": "bfl"},
    "of_tomorrow": {"quant_method": "of_tomorrow"},
    "by an unnamed method": {"bits": 4},
}
"""What diffusers writes as ``quantization_config``, by our words for it."""


@pytest.mark.parametrize("words", QUANTISED)
def test_a_quantised_folder_is_told_what_helps(words, published, tmp_path, capsys):
    shutil.copytree(published.sd3, tmp_path / "sd3")
    config = tmp_path / "sd3" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": QUANTISED[words]}))
    options = ["--lora-dir", str(published.loras), "--embedding-dir", str(published.embeddings)]
    upscale = ["upscale", "docs/examples/lighthouse.png", "-o", str(tmp_path / "o.png"), "--model", str(tmp_path / "sd3")]
    for command in (["info", str(tmp_path / "sd3")], [*upscale, *options]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"config.json is for quantised ({words}) weights" in line
        assert "give the unquantised folder" in line
        assert "install" not in line


def test_a_folder_of_gguf_is_told_what_helps(published, tmp_path, capsys):
    shutil.copytree(published.sd3, tmp_path / "sd3")
    part = tmp_path / "sd3" / "transformer"
    (part / "diffusion_pytorch_model.safetensors").unlink()
    (part / "sd3-Q4_0.gguf").write_bytes(gguf("sd3"))
    assert main(["info", str(tmp_path / "sd3")]) == 2
    assert "has only quantised weights (sd3-Q4_0.gguf): give the unquantised folder" in capsys.readouterr().err


def test_no_quantisation_is_none(published, tmp_path):
    shutil.copytree(published.sd3, tmp_path / "sd3")
    config = tmp_path / "sd3" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": None}))
    assert main(["info", str(tmp_path / "sd3")]) == 1
