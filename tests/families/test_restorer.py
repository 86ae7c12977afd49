import json
import logging
import shutil
from functools import partial

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from tsdsr_core.families import restorer
from tsdsr_core.families.folder import check_folder, folder_shapes
from tsdsr_core.families.load import load
from tsdsr_core.families.restorer import Restorer
from tsdsr_core.families.sd3.fold import fold
from tsdsr_core.pipeline import Options, restore
from tsdsr_core.weights.lora import load_lora
from tsdsr_core.weights.prompt import PromptEmbeds, load_prompt

from ..support.tiny import TRANSFORMER, Published, photo

CPU = torch.device("cpu")
SMALL = Options(process_size=0)


def loaded(published: Published, dtype=torch.float32, **strengths) -> Restorer:
    return load(published.sd3, loras=published.loras, prompt=published.embeddings, device=CPU, dtype=dtype, **strengths)


def test_geometry_comes_from_the_configuration(published):
    model = loaded(published).model()
    assert (model.vae_factor, model.patch, model.longest_side, model.scaling_factor) == (8, 2, 192, 1.5305)


@pytest.mark.rounding
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.06)])
def test_half_precision_stays_close_to_fp32(dtype, tolerance, published):
    low = photo(24, 30)
    exact = restore(low, loaded(published).model(), SMALL)
    assert (restore(low, loaded(published, dtype).model(), SMALL) - exact).abs().max() < tolerance


def test_the_vae_never_runs_in_bf16(published):
    model = loaded(published, torch.bfloat16)
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}


def memory_wanted(model: Restorer) -> float:
    """GB that the check before the work finds missing for a picture that fits nowhere."""
    with pytest.raises(MemoryError, match="the VAE needs") as caught:
        model.model().check_memory(2**20, 2**20)
    return float(str(caught.value).split()[3])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_vae_that_overflows_in_fp16_runs_in_fp32_from_then_on(part, published, caplog):
    model = loaded(published, torch.float16)
    exact = loaded(published)
    with torch.no_grad():
        for each in (model, exact):
            half = getattr(each.vae, part)
            half.conv_in.weight.mul_(1e5)  # group normalisation takes the factor out again, in fp32
    low = photo(24, 24)
    before = memory_wanted(model)
    with caplog.at_level(logging.WARNING):
        result = restore(low, model.model(), SMALL)
    assert f"the VAE {part} overflowed" in caplog.text
    expected = restore(low, exact.model(), SMALL)
    assert (result - expected).abs().max() < 0.05
    assert before < memory_wanted(model) <= memory_wanted(exact), "what is asked for before the work is what the run takes"
    caplog.clear()
    assert torch.equal(restore(low, model.model(), SMALL), result), "the second picture takes the same way, in one run"
    assert not caplog.records
    found = {name: {p.dtype for p in getattr(model.vae, name).parameters()} for name in ("encoder", "decoder")}
    assert found == {name: {torch.float32 if name == part else torch.float16} for name in found}


def test_vae_weights_beyond_fp16_stay_in_fp32(published, tmp_path, caplog):
    shutil.copytree(published.sd3, tmp_path / "sd3")
    path = tmp_path / "sd3" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.weight"] *= 1e6
    save_file(weights, path)
    prompt, low = load_prompt(published.embeddings), photo(24, 24)
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "sd3", loras=(), prompt=prompt, device=CPU, dtype=torch.float16)
    assert "the VAE decoder has weights beyond float16" in caplog.text
    exact = load(tmp_path / "sd3", loras=(), prompt=prompt, device=CPU, dtype=torch.float32)
    assert (restore(low, model.model(), SMALL) - restore(low, exact.model(), SMALL)).abs().max() < 0.05
    assert next(model.vae.encoder.parameters()).dtype == torch.float16


def test_a_sampled_posterior_follows_its_seed(published):
    low, model = photo(24, 24), loaded(published)
    first, again = (restore(low, model.model("sample", 1), SMALL) for _ in range(2))
    other = restore(low, model.model("sample", 2), SMALL)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="'mean'"):
        model.model("mean")


@pytest.mark.rounding
@pytest.mark.parametrize("folded", [False, True])
def test_torch_compiles_the_transformer(folded, published, monkeypatch):
    """By its own tracer; the graphs then run as they are, since not every machine has a compiler for them."""
    model, graphs = loaded(published), []
    if folded:
        fold(model.transformer, model.prompt.pooled)
    z = torch.randn(2, 16, 8, 12)
    expected = model.velocity(z)

    def take(graph, _):
        graphs.append([node for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=take))
    model.compile()
    for _ in range(2):
        assert (model.velocity(z) - expected).abs().max() <= 3e-6 * expected.abs().max()
    assert sum(len(graph) for graph in graphs) > 50, "the blocks went through the tracer"
    assert model.compiled is not None, "it did not fail"


def test_a_compiler_that_fails_is_done_without(published, caplog, monkeypatch):
    low, model, calls = photo(24, 24), loaded(published), []
    expected = restore(low, model.model(), SMALL)

    def fail(**given):
        calls.append(given)
        raise NotImplementedError("no compiler here\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda module: fail)
    model.compile()
    for _ in range(2):
        assert torch.equal(restore(low, model.model(), SMALL), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile failed, continuing without it: no compiler here"
    ]
    assert len(calls) == 1


def test_a_compiled_transformer_may_run_out_of_memory(published, monkeypatch):
    """Which says nothing against the compiler: smaller batches of tiles follow."""
    model = loaded(published)

    def short(**given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda module: short)
    model.compile()
    with pytest.raises(torch.OutOfMemoryError):
        model.velocity(torch.zeros(1, 16, 8, 8))
    assert model.compiled is short


def test_strengths_reach_their_own_lora(published):
    low = photo(24, 24)
    full = restore(low, loaded(published).model(), SMALL)
    for name in ("lora_strength", "vae_lora_strength"):
        assert (restore(low, loaded(published, **{name: 0.0}).model(), SMALL) - full).abs().max() > 1e-3


def test_idle_attention_is_skipped_without_a_difference(published):
    plain = load(published.sd3, loras=(), prompt=load_prompt(published.embeddings), device=CPU, dtype=torch.float32)
    zeroed = load(published.sd3, loras=(), prompt=load_prompt(published.embeddings), device=CPU, dtype=torch.float32)
    for model in (plain, zeroed):
        for half in (model.vae.encoder, model.vae.decoder):
            for parameter in half.mid_block.attentions[0].to_out.parameters():
                parameter.zero_()
    skipping = Restorer(zeroed.transformer, zeroed.vae, zeroed.prompt, CPU, torch.float32)
    skipping.vae.encoder.mid_block.attentions[0].to_q.weight.fill_(torch.nan)  # seen only if the attention ran
    low = photo(24, 24)
    assert (restore(low, skipping.model(), SMALL) - restore(low, plain.model(), SMALL)).abs().max() < 1e-6
    assert "encoder.mid_block.attentions.0.to_q.weight" in skipping.vae.state_dict()


def test_the_transformer_of_sd35_medium_runs_unchanged(published, tmp_path):
    shutil.copytree(published.sd3 / "vae", tmp_path / "vae")
    SD3Transformer2DModel(**TRANSFORMER, qk_norm="rms_norm", dual_attention_layers=(0,)).save_pretrained(
        tmp_path / "transformer"
    )
    model = load(tmp_path, loras=(), prompt=load_prompt(published.embeddings), device=CPU, dtype=torch.float32)
    assert torch.isfinite(restore(photo(24, 24), model.model(), SMALL)).all()
    loras = load_lora(published.loras / "transformer.safetensors"), load_lora(published.loras / "vae.safetensors")
    with pytest.raises(ValueError, match=r"transformer_blocks.0.norm1.linear \(LoRA \(192, 32\), model \(288, 32\)\)"):
        load(tmp_path, loras=loras, prompt=load_prompt(published.embeddings), device=CPU, dtype=torch.float32)


def test_embeddings_of_another_model_are_refused(published):
    prompt = PromptEmbeds(torch.zeros(1, 333, 4096), torch.zeros(1, 2048))
    with pytest.raises(ValueError, match=r"widths \(4096, 2048\) do not fit this transformer, which takes \(24, 20\)"):
        load(published.sd3, loras=(), prompt=prompt, device=CPU, dtype=torch.float32)


def test_swapped_or_foreign_folders_are_named(published, tmp_path):
    prompt = load_prompt(published.embeddings)
    with pytest.raises(ValueError, match="is not a model folder"):
        load(tmp_path, loras=(), prompt=prompt, device=CPU, dtype=torch.float32)
    shutil.copytree(published.sd3, tmp_path / "sd3")
    config = tmp_path / "sd3" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="is for a FluxTransformer2DModel: expected SD3Transformer2DModel"):
        load(tmp_path / "sd3", loras=(), prompt=prompt, device=CPU, dtype=torch.float32)


def test_damaged_weights_are_named(published, tmp_path):
    shutil.copytree(published.sd3, tmp_path / "sd3")
    weights = next((tmp_path / "sd3" / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="vae cannot be loaded"):
        load(tmp_path / "sd3", loras=(), prompt=load_prompt(published.embeddings), device=CPU, dtype=torch.float32)


def test_missing_and_unexpected_weights_are_named(published, tmp_path):
    prompt = load_prompt(published.embeddings)
    shutil.copytree(published.sd3, tmp_path / "sd3")
    file = next((tmp_path / "sd3" / "vae").glob("*.safetensors"))
    weights = load_file(file)
    weights["foo.weight"] = weights.pop("decoder.conv_in.bias")
    save_file(weights, file, {"format": "pt"})
    for look in (
        lambda: load(tmp_path / "sd3", loras=(), prompt=prompt, device=CPU, dtype=torch.float32),
        lambda: check_folder(tmp_path / "sd3", "vae"),
    ):
        with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias") as caught:
            look()
        assert "foo.weight" in str(caught.value)
    check_folder(tmp_path / "sd3", "transformer")


@pytest.mark.parametrize("text", ["[]", '"x"', "{", '{"_class_name": "AutoencoderKL", "layers_per_block": "two"}', "\xff"])
def test_odd_configurations_are_named(text, published, tmp_path):
    shutil.copytree(published.sd3, tmp_path / "sd3")
    (tmp_path / "sd3" / "vae" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"vae"):
        load(tmp_path / "sd3", loras=(), prompt=load_prompt(published.embeddings), device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"config\.json"):
        folder_shapes(tmp_path / "sd3", "vae")


def test_folder_shapes_come_without_weights(published):
    shapes = folder_shapes(published.sd3, "vae")
    assert shapes["encoder.conv_in"] == (8, 3, 3, 3)


def test_too_little_memory_is_said_before_any_work(published, monkeypatch):
    model = loaded(published)
    monkeypatch.setattr(restorer, "free_ram", lambda: 10**6)
    monkeypatch.setattr(Restorer, "_run_half", lambda *_: pytest.fail("there was work"))
    with pytest.raises(MemoryError, match=r"the VAE needs .* GB of memory for an image of this size, 0\.0 GB are free"):
        restore(photo(64, 64), model.model(), Options())
