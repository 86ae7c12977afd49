"""Values that a type cannot hold, and tensors that are no arrays, are one error before anything is written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.errors import InputError
from tsdsr_core.families.bundle import BUILTIN, read_bundle
from tsdsr_core.weights.prompt import PromptEmbeds


def enlarged(path, place=0) -> None:
    """Put a value beyond fp16 into the first matrix of a weight file."""
    tensors = load_file(path)
    key = sorted(key for key, tensor in tensors.items() if tensor.ndim == 2)[place]
    tensors[key][0, 0] = 1e5
    save_file(tensors, path)


@pytest.mark.parametrize("kind", ["LoRA", "merged", "folded"])
def test_a_bundle_with_values_beyond_fp16_is_not_written(kind, published, tmp_path, capsys):
    shutil.copytree(published.sd3, tmp_path / "sd3")
    shutil.copytree(published.loras, tmp_path / "tsdsr")
    enlarged(
        tmp_path
        / ("tsdsr/transformer.safetensors" if kind == "LoRA" else "sd3/transformer/diffusion_pytorch_model.safetensors")
    )
    options = ["--lora-dir", str(tmp_path / "tsdsr"), "--embedding-dir", str(published.embeddings)]
    if kind != "LoRA":
        options += ["--merge", "--model", str(tmp_path / "sd3"), *(["--fold"] if kind == "folded" else [])]
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"before")
    assert main(["bundle", "-o", str(out), "--existing", "overwrite", *options]) == 2
    assert "would be infinite or NaN in float16: choose another dtype, fp32 or bf16" in capsys.readouterr().err
    assert out.read_bytes() == b"before"
    assert main(["bundle", "-o", str(out), "--existing", "overwrite", "--dtype", "bf16", *options]) == 0
    assert main(["info", str(out)]) in (0, 1)


def test_a_prompt_beyond_the_type_is_not_called_damaged():
    prompt = PromptEmbeds(torch.full((1, 2, 3), 1e5), torch.zeros(1, 4))
    with pytest.raises(InputError, match="values beyond float16: choose another dtype"):
        prompt.to("cpu", torch.float16)


@pytest.mark.parametrize("options", [["--fold"], ["--int8"], ["--eight-bit"], ["--fold", "--note", "license=mine"]])
def test_a_bundle_of_a_bundle_keeps_its_notes_and_preview(options, tmp_path):
    out = tmp_path / "out.safetensors"
    assert main(["bundle", "--merge", "--model", "builtin", "-o", str(out), *options]) == 0
    before, after = read_bundle(BUILTIN), read_bundle(out)
    assert after.preview == before.preview
    assert len(after.preview) > 0
    assert after.notes == {**before.notes, **({"license": "mine"} if "--note" in options else {})}


def test_a_note_given_twice_is_refused(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["bundle", "--merge", "--fold", "--model", "builtin", "-o", str(out), "--note", "a=1", "--note", "a=2"]) == 2
    assert "a is given twice" in capsys.readouterr().err


ODD = {
    "sparse": lambda: torch.ones(4, 4).to_sparse(), "compressed": lambda: torch.ones(4, 4).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(9, 24)]), "meta": lambda: torch.ones(4, 4, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4, 4), 1.0, 0, torch.qint8),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_arrays_are_one_sentence(kind, published, tmp_path, capsys):
    """In a prompt file, and in a ``.bin`` file of a model folder, for ``info`` and ``upscale`` alike."""
    torch.save(ODD[kind](), tmp_path / "prompt_embeds.pt")
    torch.save(torch.ones(1, 20), tmp_path / "pool_embeds.pt")
    assert main(["info", str(tmp_path)]) == 2
    assert "expected" in (said := capsys.readouterr().err)
    assert "Internal error" not in said
    folder = tmp_path / "sd3"
    shutil.copytree(published.sd3, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors: dict = load_file(file)
    tensors[next(iter(tensors))] = ODD[kind]()
    torch.save(tensors, file.with_suffix(".bin"))
    file.unlink()
    for command in (
        ["info", str(folder)],
        [
            "upscale",
            "docs/examples/lighthouse.png",
            "-o",
            str(tmp_path / "o.png"),
            "--model",
            str(folder),
            "--lora-dir",
            str(published.loras),
            "--embedding-dir",
            str(published.embeddings),
        ],
    ):
        assert main(command) == 2
        assert "sparse, nested, quantised or empty tensors" in capsys.readouterr().err


def test_a_model_that_is_none_is_an_error_of_info(published, tmp_path, capsys):
    assert main(["info", str(published.loras), "--model", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
