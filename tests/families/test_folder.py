"""SD3 folders as people have them: variants, shards, ``.bin``; ``tsdsr info`` and ``tsdsr upscale`` read them alike."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.families.folder import check_folder, find_weights, load_part
from tsdsr_core.images.files import Picture, write_picture

from ..support.tiny import Published, photo

CLASSES = {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL}
FORMS = {
    "plain": {},
    "fp16": {"variant": "fp16"},
    "odd variant": {"variant": "non_ema"},
    "bin": {"safe_serialization": False},
    "bin fp16": {"safe_serialization": False, "variant": "fp16"},
    "sharded": {"max_shard_size": "100KB"},
    "sharded fp16": {"max_shard_size": "100KB", "variant": "fp16"},
    "sharded bin": {"max_shard_size": "100KB", "safe_serialization": False},
}


def save(published: Published, folder, **form):
    for part, kind in CLASSES.items():
        kind.from_pretrained(published.sd3 / part).save_pretrained(folder / part, **form)
    return folder


def commands(published: Published, folder, tmp_path) -> list[int]:
    """Exit codes of info and of a command that loads the model as upscale does; 1 of info says that this is not SD3 medium."""
    loras = ["--lora-dir", str(published.loras), "--embedding-dir", str(published.embeddings)]
    bundle = ["bundle", "--merge", "--model", str(folder), *loras, "-o", str(tmp_path / "b.safetensors")]
    return [main(["info", str(folder)]), main(bundle)]


def test_a_picture_is_restored_from_the_variant_alone(published, tmp_path):
    folder = save(published, tmp_path / "sd3", variant="fp16")
    write_picture(tmp_path / "in.png", Picture(photo(16, 16)))
    loras = ["--lora-dir", str(published.loras), "--embedding-dir", str(published.embeddings), "--model", str(folder)]
    assert main(["upscale", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png"), "--scale", "1", *loras]) == 0


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_the_weights_loads(form, published, tmp_path):
    folder = save(published, tmp_path / "sd3", **form)
    assert commands(published, folder, tmp_path) == [1, 0]
    for part in CLASSES:
        found = load_part(folder, part, torch.float32).state_dict()
        expected = load_part(published.sd3, part, torch.float32).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.safetensors", "a.fp16.safetensors", "a.bin"], ("a.safetensors", "")),
        (["a.fp16.safetensors", "a.bf16.safetensors", "a.bin"], ("a.fp16.safetensors", "fp16")),
        (["a.bf16.safetensors", "a.ema.safetensors"], ("a.bf16.safetensors", "bf16")),
        (["a.fp16.bin", "a.bin", "other.safetensors"], ("a.bin", "")),
        (["a.fp16.bin"], ("a.fp16.bin", "fp16")),
    ],
)
def test_the_plain_safetensors_come_first(names, expected, tmp_path):
    for name in names:
        (tmp_path / name.replace("a.", "diffusion_pytorch_model.", 1)).touch()
    found = find_weights(tmp_path)
    assert [path.name for path in found.files] == [expected[0].replace("a.", "diffusion_pytorch_model.", 1)]
    assert found.variant == expected[1]
    assert found.safetensors == expected[0].endswith("safetensors")


def test_the_part_that_has_a_variant_alone_takes_it(published, tmp_path):
    folder = save(published, tmp_path / "sd3")
    shutil.rmtree(folder / "vae")
    AutoencoderKL.from_pretrained(published.sd3 / "vae").save_pretrained(folder / "vae", variant="fp16")
    assert commands(published, folder, tmp_path) == [1, 0]


def web_page(folder):
    next((folder / "vae").glob("*.safetensors")).write_bytes(b"<html>")


def truncated(folder):
    file = next((folder / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])


def nan(folder):
    file = next((folder / "vae").glob("*.safetensors"))
    weights = load_file(file)
    weights["decoder.conv_in.bias"][0] = torch.nan
    save_file(weights, file, {"format": "pt"})


def no_weights(folder):
    next((folder / "vae").glob("*.safetensors")).unlink()


def pointer_bin(folder):
    file = next((folder / "vae").glob("*.safetensors"))
    file.with_suffix(".bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    file.unlink()


def foreign_bin(folder):
    file = next((folder / "vae").glob("*.safetensors"))
    torch.save([1, 2], file.with_suffix(".bin"))
    file.unlink()


def lost_shard(folder):
    index = {"weight_map": {"x": "gone.safetensors"}}
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def odd_index(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": [1]}')


def whole_numbers(folder):
    file = next((folder / "vae").glob("*.safetensors"))
    weights = load_file(file)
    weights["decoder.conv_in.bias"] = weights["decoder.conv_in.bias"].to(torch.int32)
    save_file(weights, file, {"format": "pt"})


def patch_of_nothing(folder):
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "patch_size": 0}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (web_page, "is a web page"), (truncated, "is damaged"), (nan, "NaN or infinite values in decoder.conv_in.bias"),
        (no_weights, "has no weights"), (pointer_bin, "Git LFS pointer"), (foreign_bin, "does not hold weights"),
        (lost_shard, "missing files: gone.safetensors"), (odd_index, "is not a valid index"),
        (whole_numbers, "int32 numbers in decoder.conv_in.bias"), (patch_of_nothing, "patch_size = 0"),
    ],
)  # fmt: skip
def test_both_refuse_the_same(damage, message, published, tmp_path, capsys):
    folder = save(published, tmp_path / "sd3")
    damage(folder)
    assert commands(published, folder, tmp_path) == [2, 2]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all(message in line for line in lines), lines


INDEX = "diffusion_pytorch_model.safetensors.index.{}json"


@pytest.mark.parametrize("form", ["plain", "fp16", "bin", "sharded"])
@pytest.mark.parametrize("content", ['{"weight_map": {"x": "gone.safetensors"}}', "[]"])
def test_a_stray_index_costs_no_other_weights(content, form, published, tmp_path):
    folder = save(published, tmp_path / "sd3", **FORMS[form])
    for part in CLASSES:
        (folder / part / INDEX.format("fp32." if form in ("plain", "sharded") else "")).write_text(content)
    assert commands(published, folder, tmp_path) == [1, 0]


def test_an_index_of_which_a_part_is_there_is_no_stray_one(tmp_path):
    for name in ("diffusion_pytorch_model.bin", "a.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / INDEX.format("")).write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    with pytest.raises(ValueError, match=r"lists missing files: b\.safetensors; download them"):
        find_weights(tmp_path)


def test_weights_beyond_a_type_are_no_damage(published, tmp_path):
    folder = save(published, tmp_path / "sd3")
    file = next((folder / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    weights["proj_out.bias"][0] = 1e6
    save_file(weights, file, {"format": "pt"})
    assert load_part(folder, "transformer", torch.bfloat16).proj_out.bias[0] > 9e5
    with pytest.raises(
        ValueError,
        match=r"transformer has weights that exceed the range of torch\.float16 in proj_out\.bias: choose bf16 or fp32",
    ):
        load_part(folder, "transformer", torch.float16)


def test_the_shapes_come_from_every_form(published, tmp_path):
    folder = save(published, tmp_path / "sd3", safe_serialization=False)
    for part in CLASSES:
        check_folder(folder, part)
    weights = torch.load(folder / "vae" / "diffusion_pytorch_model.bin", weights_only=True)
    del weights["decoder.conv_in.bias"]
    torch.save(weights, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights that are missing, unexpected or of other shapes: decoder\.conv_in\.bias"):
        check_folder(folder, "vae")
