"""Number types that safetensors has and torch cannot calculate with, or that nobody knows yet: one sentence, everywhere."""

import json
import math
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import BUILTIN, read_bundle
from tsdsr_core.families.load import from_bundle
from tsdsr_core.weights import float8, int8
from tsdsr_core.weights.lora import merge_lora, parse_lora
from tsdsr_core.weights.prompt import load_prompt

from ..support.bundles import rewrite

BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "I4": 4, "F8_E3M4": 8, "C64": 64, "U16": 16, "BOOL": 8}


def retyped(source, target, kind, key):
    """A copy of a safetensors file whose tensor ``key`` has another type and zeros, as the format defines it."""
    content = source.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    found, body = {}, b""
    for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0]):
        if name == "__metadata__":
            found[name] = entry
            continue
        piece = data[slice(*entry["data_offsets"])]
        if name == key:
            entry["dtype"], piece = kind, bytes(math.prod(entry["shape"]) * BITS[kind] // 8)
        found[name] = {**entry, "data_offsets": [len(body), len(body) + len(piece)]}
        body += piece
    text = json.dumps(found).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("what", ["LoRA", "prompt", "bundle", "folder"])
@pytest.mark.parametrize("kind", BITS)
def test_a_type_that_no_weights_have_is_named_with_its_tensor(kind, what, published, tmp_path, capsys):
    for name, source in (("sd3", published.sd3), ("tsdsr", published.loras)):
        shutil.copytree(source, tmp_path / name)
    prompt = tmp_path / "prompt.safetensors"
    save_file({"prompt_embeds": torch.ones(1, 8, 24), "pooled_prompt_embeds": torch.ones(1, 20)}, prompt)
    source = {
        "LoRA": tmp_path / "tsdsr" / "transformer.safetensors", "prompt": prompt, "bundle": BUILTIN,
        "folder": tmp_path / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors",
    }[what]  # fmt: skip
    key = max((key for key, value in load_file(source).items() if value.numel() % 8 == 0), key=str)
    path = tmp_path / "bundle.safetensors" if what == "bundle" else source
    retyped(source, path, kind, key)
    if what == "bundle":
        options = ["--model", str(path)]
    else:
        options = ["--model", str(tmp_path / "sd3"), "--lora-dir", str(tmp_path / "tsdsr"), "--embedding-dir", str(prompt)]
    info = tmp_path / "sd3" if what == "folder" else path
    for command in (["info", str(info)], ["upscale", "docs/examples/lighthouse.png", "-o", str(tmp_path / "o.png"), *options]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        shown = {"C64": "complex64", "U16": "uint16", "BOOL": "bool"}.get(kind, kind)
        assert f"{path} holds {shown} numbers in {key.removeprefix('vae.')}" in line.replace(" vae.", " ")
        assert "expected floating-point weights" in line
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3"])
def test_a_tensor_that_is_not_used_may_have_any_type(kind, tmp_path):
    source, path = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {"prompt_embeds": torch.ones(1, 8, 24), "pooled_prompt_embeds": torch.ones(1, 20), "x": torch.ones(8)}
    save_file(tensors, source)
    retyped(source, path, kind, "x")
    assert load_prompt(path).pooled.shape == (1, 20)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats_are_weights(kind, tmp_path):
    tensors = {"prompt_embeds": torch.ones(1, 8, 24), "pooled_prompt_embeds": torch.full((1, 20), 3.0)}
    save_file({key: value.to(getattr(torch, kind)) for key, value in tensors.items()}, tmp_path / "x.safetensors")
    assert load_prompt(tmp_path / "x.safetensors").pooled.float().mean() == 3


@pytest.mark.parametrize("kind", ["float8_e8m0fnu", "float4_e2m1fn_x2"])
def test_the_same_types_in_files_of_torch_are_refused(kind, tmp_path):
    torch.save(torch.zeros(1, 8, 24, dtype=torch.uint8).view(getattr(torch, kind)), tmp_path / "prompt_embeds.pt")
    torch.save(torch.ones(1, 20), tmp_path / "pool_embeds.pt")
    with pytest.raises(ValueError, match=rf"holds {kind} numbers in prompt_embeds: expected floating-point"):
        load_prompt(tmp_path)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("store", [float8.quantise, int8.quantise])
def test_what_is_not_finite_is_found_before_the_cast_that_hides_it(store, value):
    """In e4m3fn infinity may become 448."""
    weights = {"transformer_blocks.0.attn.to_q.weight": torch.ones(16, 16)}
    weights["transformer_blocks.0.attn.to_q.weight"][3, 4] = value
    with pytest.raises(ValueError, match=r"NaN or infinite values in transformer_blocks\.0\.attn\.to_q\.weight"):
        store(weights, torch.float16)


@pytest.mark.parametrize("option", ["--eight-bit", "--int8"])
def test_scales_that_lead_beyond_a_type_are_named(option, tmp_path):
    bundle = tmp_path / "b.safetensors"
    assert main(["bundle", "--merge", option, "--model", "builtin", "-o", str(bundle)]) == 0
    scales = {key: value for key, value in load_file(bundle).items() if key.endswith("proj_out_scale") or "_scale" in key}
    large = {key: torch.full_like(value, 2.0**12) for key, value in scales.items()}
    found = read_bundle(rewrite(bundle, tmp_path / "large.safetensors", large))
    from_bundle(found, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"large\.safetensors has .* exceed the range of torch\.float16 in transformer_b"):
        from_bundle(found, torch.device("cpu"), torch.float16)
    beyond = {key: torch.full_like(value, 2.0**126) for key, value in scales.items()}
    found = read_bundle(rewrite(bundle, tmp_path / "beyond.safetensors", beyond))
    with pytest.raises(ValueError, match=r"exceed the range of torch\.float32 in transformer_b"):
        from_bundle(found, torch.device("cpu"), torch.float32)


def test_a_bundle_in_fp32_with_values_beyond_fp16_is_named(tmp_path):
    key = "transformer.proj_out.weight"
    weight = load_file(BUILTIN)[key].float()
    weight[0, 0] = 1e5
    bundle = read_bundle(rewrite(BUILTIN, tmp_path / "x.safetensors", {key: weight}))
    from_bundle(bundle, torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match=r"x\.safetensors .* exceed the range of torch\.float16 in proj_out\.weight: choose"):
        from_bundle(bundle, torch.device("cpu"), torch.float16)


@pytest.mark.parametrize(("dtype", "strength"), [(torch.float16, 1e6), (torch.float32, 1e39)])
def test_a_strength_that_leads_beyond_a_type_is_named(dtype, strength):
    lora = parse_lora({"0.lora_A.weight": torch.ones(2, 8), "0.lora_B.weight": torch.ones(4, 2)})
    model = torch.nn.Sequential(torch.nn.Linear(8, 4)).to(dtype)
    with pytest.raises(ValueError, match=r"takes 0 beyond the range of float\d+: lower its strength"):
        merge_lora(model, lora, strength)
