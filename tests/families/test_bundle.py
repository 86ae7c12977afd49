import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import METADATA_KEY, Bundle, is_bundle, read_bundle, read_description, vae_weights, write_bundle
from tsdsr_core.families.load import from_bundle, load, merged_bundle
from tsdsr_core.pipeline import Options, restore
from tsdsr_core.weights.lora import load_lora
from tsdsr_core.weights.prompt import PromptEmbeds, load_prompt

from ..support.tiny import Published, photo

CPU = torch.device("cpu")


def loras_of(published: Published):
    return load_lora(published.loras / "transformer.safetensors"), load_lora(published.loras / "vae.safetensors")


@pytest.fixture(scope="module")
def lora_bundle(published: Published) -> Bundle:
    transformer, vae = loras_of(published)
    return Bundle("lora", load_prompt(published.embeddings), transformer.state_dict(), vae.state_dict(), notes={"a": "b"})


@pytest.fixture(scope="module")
def merged(published: Published, tmp_path_factory):
    model = load(
        published.sd3, loras=loras_of(published), prompt=load_prompt(published.embeddings), device=CPU, dtype=torch.float32
    )
    path = tmp_path_factory.mktemp("bundle") / "merged.safetensors"
    write_bundle(
        path, merged_bundle(model.transformer, model.vae, model.prompt, torch.float32, model.defaults, {"license": "test"})
    )
    return model, path


def test_a_lora_bundle_gives_its_loras_back(lora_bundle, published, tmp_path):
    write_bundle(tmp_path / "b.safetensors", lora_bundle)
    again = read_bundle(tmp_path / "b.safetensors")
    assert (again.kind, again.notes) == ("lora", {"a": "b"})
    assert torch.equal(again.prompt.tokens, published.tokens)
    assert torch.equal(load_prompt(tmp_path / "b.safetensors").tokens, published.tokens)
    for found, original in zip(again.loras(), loras_of(published), strict=True):
        assert found.target == original.target
        assert found.pairs.keys() == original.pairs.keys()
        assert all(torch.equal(found.pairs[name].delta(), pair.delta()) for name, pair in original.pairs.items())


@pytest.mark.parametrize("rows", [[[0.0, 0.0, 0.0]] * 16, [[0.0, 0.0]] * 17, "no rows", [["x", 0.0, 0.0]] * 17])
def test_a_preview_of_other_channels_is_refused(rows, merged, tmp_path):
    bundle = read_bundle(merged[1])
    write_bundle(tmp_path / "good.safetensors", replace(bundle, preview=[[0.5, -0.5, 0.0]] * 17))
    assert read_bundle(tmp_path / "good.safetensors").preview == [[0.5, -0.5, 0.0]] * 17
    write_bundle(tmp_path / "bad.safetensors", replace(bundle, preview=rows))
    with pytest.raises(ValueError, match="preview: expected rows of 3 numbers"):
        read_bundle(tmp_path / "bad.safetensors")


def test_a_merged_bundle_restores_as_the_folder_it_came_from(merged):
    model, path = merged
    again = from_bundle(read_bundle(path), CPU, torch.float32)
    low, options = photo(30, 20), Options(process_size=0)
    difference = restore(low, again.model(), options) - restore(low, model.model(), options)
    assert difference.abs().max() <= 1e-5


def test_bf16_keeps_a_small_lora_of_the_vae(published, tmp_path):
    """As trained ones are; rounding the merged weights to bf16 would lose most of it."""
    prompt, exact = load_prompt(published.embeddings), torch.float32
    base = load(published.sd3, loras=(), prompt=prompt, device=CPU, dtype=exact).vae.state_dict()
    model = load(published.sd3, loras=loras_of(published), prompt=prompt, device=CPU, dtype=exact, vae_lora_strength=0.003)
    write_bundle(tmp_path / "b.safetensors", merged_bundle(model.transformer, model.vae, prompt, torch.bfloat16, {}, {}))
    bundle = read_bundle(tmp_path / "b.safetensors")
    assert {weight.dtype for weight in bundle.transformer.values()} == {torch.bfloat16}
    stored = from_bundle(bundle, CPU, torch.bfloat16).vae.state_dict()
    merged = model.vae.state_dict()
    adapted = [f"{name}.weight" for name in loras_of(published)[1].pairs]
    change = torch.cat([(merged[name] - base[name]).flatten() for name in adapted])

    def lost(weights):
        """The share of the LoRA's change that is not in ``weights``."""
        left = torch.cat([(weights[name].float() - merged[name]).flatten() for name in adapted])
        return (left.norm() / change.norm()).item()

    assert lost(stored) < 0.1
    assert lost({name: weight.bfloat16() for name, weight in merged.items()}) > 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_beyond_16_bits_is_stored_in_32(dtype):
    large, small = torch.tensor([65504.0]), torch.tensor([0.1])
    fitting, beyond = vae_weights({"a": large, "b": small}, dtype), vae_weights({"a": 2 * large, "b": small}, dtype)
    assert {weight.dtype for weight in fitting.values()} == {torch.float16}
    assert beyond == {"a": 2 * large, "b": small}
    assert {weight.dtype for weight in beyond.values()} == {torch.float32}


def test_kinds_are_not_mixed_up(merged, lora_bundle):
    with pytest.raises(ValueError, match="holds only LoRAs"):
        from_bundle(lora_bundle, CPU, torch.float32)
    with pytest.raises(ValueError, match="holds merged weights, not LoRAs"):
        read_bundle(merged[1]).loras()


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "header"])
def test_damaged_files_are_named(damage, merged, tmp_path):
    path = tmp_path / "bad.safetensors"
    whole = merged[1].read_bytes()
    content = {"empty": b"", "text": b"hello, I am a file", "truncated": whole[:-10], "header": whole[:40]}.get(damage)
    if content is not None:
        path.write_bytes(content)
    assert not is_bundle(path)
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        read_bundle(path)


def rewrite(source, target, change):
    """Copy a bundle with its description changed."""
    with safe_open(source, framework="pt") as file:
        description = json.loads(file.metadata()[METADATA_KEY])
    change(description)
    save_file(load_file(source), target, {METADATA_KEY: json.dumps(description)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=6), "version 6, this program reads up to version 5: update"),
        (lambda d: d.update(version="new"), "no version"),
        (lambda d: d.update(kind="zip"), "kind 'zip'"),
        (lambda d: d.pop("vae_config"), "vae_config is missing"),
        (lambda d: d["defaults"].update(wavelet_levels="five"), "default wavelet_levels = 'five'"),
        (lambda d: d["defaults"].update(shell="rm"), "default shell"),
    ],
)
def test_foreign_metadata_is_refused(change, message, merged, tmp_path):
    rewrite(merged[1], tmp_path / "b.safetensors", change)
    with pytest.raises(ValueError, match=message):
        read_description(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["transformer_config"].update(num_layers=3),
        lambda d: d["transformer_config"].update(num_attention_heads=3),
        lambda d: d["vae_config"].update(block_out_channels=[8, 16]),
        lambda d: d["vae_config"].update(down_block_types=["os.system"]),
    ],
)
def test_weights_that_do_not_match_the_configuration_are_refused(change, merged, tmp_path):
    rewrite(merged[1], tmp_path / "b.safetensors", change)
    with pytest.raises(ValueError, match=r"b\.safetensors.* does not match its configuration: [^\n]+$"):
        from_bundle(read_bundle(tmp_path / "b.safetensors"), CPU, torch.float32)


def test_info_shows_notes_escaped(merged, tmp_path, capsys):
    rewrite(merged[1], tmp_path / "b.safetensors", lambda d: d["notes"].update(a="\x1b[2J\nfits False"))
    assert main(["info", str(tmp_path / "b.safetensors")]) == 0
    assert "a \\x1b[2J\\nfits False" in capsys.readouterr().out


def test_a_bundle_with_foreign_embeddings_is_named(merged, tmp_path):
    tensors = load_file(merged[1])
    tensors["prompt_embeds"] = tensors["prompt_embeds"][..., 1:].contiguous()
    with safe_open(merged[1], framework="pt") as file:
        save_file(tensors, tmp_path / "b.safetensors", file.metadata())
    with pytest.raises(ValueError, match=r"b\.safetensors: prompt embeddings of widths \(23, 20\) do not fit"):
        from_bundle(read_bundle(tmp_path / "b.safetensors"), CPU, torch.float32)


def test_other_safetensors_are_no_bundles(published):
    path = published.loras / "vae.safetensors"
    assert not is_bundle(path)
    with pytest.raises(ValueError, match="is not a TSD-SR bundle"):
        read_bundle(path)


def test_missing_parts_are_damage(merged, tmp_path):
    with safe_open(merged[1], framework="pt") as file:
        metadata = file.metadata()
    tensors = {key: value for key, value in load_file(merged[1]).items() if not key.startswith("vae.")}
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    with pytest.raises(ValueError, match="is damaged: expected prompt embeddings, a transformer, a VAE and nothing else"):
        read_bundle(tmp_path / "b.safetensors")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, lora_bundle):
    path = tmp_path / "b.safetensors"
    write_bundle(path, lora_bundle)
    before = path.read_bytes()
    prompt = PromptEmbeds(torch.zeros(1, 2, 3), torch.zeros(1, 4))
    with pytest.raises(TypeError):
        write_bundle(path, Bundle("lora", prompt, {}, {}, notes={1j: "not valid JSON"}))
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError):  # tensors that share memory cannot be written
        write_bundle(path, Bundle("lora", prompt, {"a": shared, "b": shared}, {}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
