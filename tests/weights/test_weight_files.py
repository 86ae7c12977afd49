"""Every reader of weights, with every file that is not what its name says: one sentence, exit 2, nothing executed."""

import contextlib
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import read_bundle
from tsdsr_core.images.files import Picture, write_picture
from tsdsr_core.train.checkpoint import read_checkpoint
from tsdsr_core.weights.lora import load_lora
from tsdsr_core.weights.prompt import load_prompt
from tsdsr_core.weights.reading import is_finite, load_pickle, open_tensors

from ..support.tiny import Published, photo

RAN = []


class Foreign:
    """Tells whether it was unpickled."""

    def __reduce__(self):
        return RAN.append, (1,)


def saved(value, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("notes/readme.txt", "no weights here")
    return stream.getvalue()


def changed(whole: bytes, places: range) -> bytes:
    content = bytearray(whole)
    for place in places:
        content[place] ^= 0xFF
    return bytes(content)


DAMAGES = {
    "empty": (lambda whole: b"", "is empty, not .*: download it again"),
    "web page": (lambda whole: b"\n<!DOCTYPE html><html>404 Not Found</html>", "is a web page, not .*download it again"),
    "page with a mark": (lambda whole: b"\xef\xbb\xbf<html></html>", "is a web page, not .*download it again"),
    "answer of a server": (lambda whole: b'{"error": "gated"}', "is a text file, not .*download it again"),
    "git-lfs pointer": (
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer.*git lfs",
    ),
    "text": (lambda whole: b"Not Found", "download it again"),
    "cut to a half": (lambda whole: whole[: len(whole) // 2], "download it again"),
    "cut in its header": (lambda whole: whole[:30], "download it again"),
    "last byte missing": (lambda whole: whole[:-1], "download it again"),
    "foreign class": (lambda whole: saved(Foreign()), "download it again|a PyTorch file"),
    "foreign class, old format": (lambda whole: saved(Foreign(), _use_new_zipfile_serialization=False), "download it again"),
    "plain pickle": (lambda whole: pickle.dumps({"a": [1, 2]}, 4), "download it again"),
    "zip of something else": (lambda whole: zipped(), "download it again|a PyTorch file"),
    "noise": (lambda whole: bytes(range(256)) * 8, "download it again"),
}  # fmt: skip


@pytest.fixture(scope="module")
def originals(published: Published, tmp_path_factory) -> dict[str, Path]:
    """One good file for each reader."""
    folder = tmp_path_factory.mktemp("originals")
    save_file({"prompt_embeds": published.tokens, "pooled_prompt_embeds": published.pooled}, folder / "prompt.safetensors")
    torch.save({"version": 2, "config": "{}"}, folder / "last.pt")
    return {
        "tokens": published.embeddings / "prompt_embeds.pt",
        "pooled": published.embeddings / "pool_embeds.pt",
        "prompt": folder / "prompt.safetensors",
        "lora": published.loras / "vae.safetensors",
        "bundle": Path(__file__).parents[2] / "tsdsr_core" / "assets" / "builtin.safetensors",
        "checkpoint": folder / "last.pt",
    }


READERS = {
    "tokens": lambda path: load_prompt(path.parent),
    "pooled": load_prompt,
    "prompt": load_prompt,
    "lora": load_lora,
    "bundle": read_bundle,
    "checkpoint": read_checkpoint,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_is_something_else_is_one_sentence(kind, damage, originals, published, tmp_path):
    for file in published.embeddings.iterdir():
        shutil.copy(file, tmp_path)
    path = tmp_path / originals[kind].name
    make, message = DAMAGES[damage]
    path.write_bytes(make(originals[kind].read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        READERS[kind](path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not RAN


@pytest.mark.parametrize("old", [False, True])
def test_damage_anywhere_in_a_pickle_never_escapes(old, tmp_path):
    whole = saved(torch.arange(12.0).reshape(3, 4), _use_new_zipfile_serialization=not old)
    path, refused = tmp_path / "x.pt", 0
    step = max(len(whole) // 150, 1)
    for start in range(0, len(whole), step):
        for content in (whole[:start], changed(whole, range(start, min(start + 3, len(whole))))):
            path.write_bytes(content)
            with contextlib.suppress(ValueError):
                load_pickle(path)
                refused -= 1
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": torch.ones(1)}, "holds a dict: expected a tensor"),
        (torch.ones(1, 3, 8, dtype=torch.int64), "holds int64 numbers"),
        (torch.ones(1, 3, 8).to_sparse(), "expected dense ones"),
        (torch.ones(1, 3, 8, device="meta"), "expected dense ones"),
        (torch.full((1, 3, 8), torch.inf), "NaN or infinite values"),
        (torch.ones(1, 0, 8), "expected"),
        (torch.ones(8), "expected"),
    ],
)
def test_embeddings_that_are_no_embeddings_are_refused(value, message, tmp_path):
    torch.save(value, tmp_path / "prompt_embeds.pt")
    torch.save(torch.ones(1, 6), tmp_path / "pool_embeds.pt")
    with pytest.raises(ValueError, match=rf"prompt_embeds\.pt.*{message}"):
        load_prompt(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"student": {"a": torch.tensor(torch.nan)}}}, "NaN or infinite values in a"),
        ({"average": {"a": "x"}}, "some of its weights are not tensors"),
        ({"step": "3"}, "step is a str"),
        ({"prompt": {}}, "its prompt is incomplete"),
        ({"config": "{"}, "an invalid configuration"),
        ({"config": 3}, "an invalid configuration"),
        ({"config": '{"no such key": 1}'}, "an invalid configuration: unknown key"),
        ({"version": torch.ones(2)}, "of version"),
    ],
)
def test_a_checkpoint_of_impossible_content_is_refused(change, message, tmp_path):
    prompt = {"tokens": torch.ones(1, 2, 3), "pooled": torch.ones(1, 4)}
    values = {
        "version": 2, "config": "{}", "step": 1, "weights": {}, "average": {}, "optimisers": {}, "prompt": prompt, "samples": 1,
        "frozen": {},
    }  # fmt: skip
    torch.save(values, tmp_path / "last.pt")
    assert read_checkpoint(tmp_path / "last.pt").step == 1
    torch.save({**values, **change}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=rf"last\.pt.*{message}"):
        read_checkpoint(tmp_path / "last.pt")


def test_a_safetensors_file_under_the_other_name_says_so(originals, tmp_path):
    shutil.copy(originals["prompt"], tmp_path / "prompt_embeds.pt")
    shutil.copy(originals["pooled"], tmp_path / "pool_embeds.pt")
    with pytest.raises(ValueError, match=r"prompt_embeds\.pt is a safetensors file, .*rename it to \.safetensors"):
        load_prompt(tmp_path)
    shutil.copy(originals["tokens"], tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora\.safetensors is a PyTorch file, not a safetensors file"):
        load_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("length", [0x7B, 0x13C, 0x3C09, 0x3C20, 0x7B0A, 0x7B20, 0x200])
def test_a_header_of_any_length_is_no_text(length, tmp_path):
    """The first bytes of a safetensors file are the length of its header, and may be a space and a < or a brace."""
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip().ljust(length)
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + content[end:])
    with open_tensors(tmp_path / "x.safetensors") as file:
        assert list(file.keys()) == ["a"]


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be read: it is a folder"), open_tensors(tmp_path):
        pass


def test_the_command_line_ends_with_2(published, tmp_path, capsys):
    write_picture(tmp_path / "in.png", Picture(photo(16, 16)))
    shutil.copytree(published.embeddings, tmp_path / "e")
    (tmp_path / "e" / "pool_embeds.pt").write_bytes(b"<html>")
    (tmp_path / "last.pt").write_bytes(b"<html>")
    arguments = [str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png"), "--model", str(published.sd3)]
    arguments += ["--lora-dir", str(published.loras), "--embedding-dir", str(tmp_path / "e")]
    export = ["export", str(tmp_path / "last.pt"), "-o", str(tmp_path / "x.safetensors")]
    for command in (["upscale", *arguments], ["info", str(tmp_path / "e")], ["info", str(tmp_path / "e" / "pool_embeds.pt")],
                    ["train", *export], ["info", str(tmp_path / "last.pt")]):  # fmt: skip
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_found_in_every_type(value, dtype):
    tensor = torch.full((3, 5), 2.0)
    assert is_finite(tensor.to(dtype))
    assert is_finite(torch.full((3, 5), min(torch.finfo(dtype).max, 3e38)).to(dtype)), "large, but finite"
    assert is_finite(torch.empty(0, dtype=dtype))
    tensor[2, 3] = value
    tensor = tensor.to(dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor.float()).all()), "e4m3 has no infinity: it may become the largest"


@pytest.mark.parametrize("kind", ["lora", "prompt", "bundle", "lora bundle"])
def test_nan_is_found_by_info_and_before_any_work(kind, originals, published, tmp_path, capsys):
    write_picture(tmp_path / "in.png", Picture(photo(16, 16)))
    upscale = ["upscale", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")]
    folders = {"--model": published.sd3, "--lora-dir": tmp_path / "loras", "--embedding-dir": published.embeddings}
    shutil.copytree(published.loras, tmp_path / "loras")
    path = {"lora": tmp_path / "loras" / "vae.safetensors"}.get(kind, tmp_path / "bad.safetensors")
    source = originals.get(kind)
    if kind == "lora bundle":
        source = tmp_path / "good.safetensors"
        loras = ["--lora-dir", str(published.loras), "--embedding-dir", str(published.embeddings)]
        assert main(["bundle", *loras, "-o", str(source)]) == 0
        folders["--lora-dir"] = path
    if kind == "prompt":
        folders["--embedding-dir"] = path
    if kind == "bundle":
        folders = {"--model": path}
    with open_tensors(source) as file:
        header = file.metadata()
    tensors = load_file(source)
    key = max(tensors, key=lambda name: ("lora_B" in name or "conv_out" in name, name))
    tensors[key].view(-1)[-1] = torch.nan
    save_file(tensors, path, header)
    options = [str(text) for each in folders.items() for text in each]
    for command in (["info", str(path)], [*upscale, *options]):
        assert main(command) == 2
        assert "NaN or infinite values in" in capsys.readouterr().err


@pytest.mark.linux
def test_names_of_any_bytes_are_read(tmp_path):
    """The libraries take names of UTF-8 only."""
    path = tmp_path / os.fsdecode(b"raw \xff.safetensors")
    save_file({"a": torch.arange(3.0)}, path)
    with open_tensors(path) as file:
        assert torch.equal(file.get_tensor("a"), torch.arange(3.0))
    torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pt")
    path = (tmp_path / "x.pt").rename(tmp_path / os.fsdecode(b"raw \xff.pt"))
    assert torch.equal(load_pickle(path)["a"], torch.arange(3.0))
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"raw \udcff\.pt is damaged"):
        load_pickle(path)
