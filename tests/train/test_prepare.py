"""Prepared training sets: crops with cached latents, degradations and embeddings."""

import argparse
import itertools
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from tsdsr_core import cli
from tsdsr_core.cli import prepare
from tsdsr_core.families.bundle import BUILTIN, Bundle, read_bundle, write_bundle
from tsdsr_core.families.load import from_bundle
from tsdsr_core.images.files import Picture, write_picture
from tsdsr_core.pipeline import bicubic
from tsdsr_core.system import atomic
from tsdsr_core.train.data import dataset as data
from tsdsr_core.train.data.dataset import Mixture, Pairs
from tsdsr_core.train.data.loader import loader
from tsdsr_core.train.data.prepared import INDEX, NULL_FILE, PROMPT_FILE, SAMPLES
from tsdsr_core.train.networks.roles import fingerprint
from tsdsr_core.train.networks.text import read_captions
from tsdsr_core.weights.prompt import load_prompt

from ..support.tiny import photo
from ..support.tiny_texts import clip_tokenizer, make_texted, t5_tokenizer

MIXTURE = Mixture(32, 4, (("light", 1.0),), 0.0)


@pytest.fixture(scope="module")
def texted(published, tmp_path_factory):
    return make_texted(tmp_path_factory.mktemp("texted"), published.sd3)


@pytest.fixture
def photos(tmp_path):
    for index in range(3):
        write_picture(tmp_path / "photos" / f"{index}.png", Picture(photo(100, 120, index)))
    return tmp_path / "photos"


def run(*arguments):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    defaults = ["--crop", "32", "--workers", "0", "--device", "cpu"]
    return prepare.run(parser.parse_args([*defaults, *(str(argument) for argument in arguments)]))


def samples(folder):
    return {path.name: load_file(path) for path in sorted((folder / SAMPLES).iterdir())}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / SAMPLES).iterdir())}


def place_in(picture, crop):
    """(top, left) of a uint8 crop in the picture number ``picture``."""
    whole = (photo(100, 120, picture)[0] * 255).round().byte()
    ((top, left),) = (whole.unfold(1, 32, 1).unfold(2, 32, 1) == crop[:, None, None]).all((0, 3, 4)).nonzero().tolist()
    return top, left


def test_latents_are_the_modes_of_the_vae_for_crops_of_the_pictures(published, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, "-o", out, "--base", published.sd3, "--crops", "2", "--dtype", "fp32") == 0
    assert f"{out}  6 crops; 3 of 3 images read" in capsys.readouterr().out
    vae = AutoencoderKL.from_pretrained(published.sd3 / "vae")
    made = samples(out)
    assert list(made) == [f"{index}.png-{crop}.safetensors" for index in range(3) for crop in range(2)]
    for sample in made.values():
        assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
            "high": (torch.uint8, (3, 32, 32)),
            "latent": (torch.float32, (16, 4, 4)),
        }
        with torch.no_grad():
            expected = vae.encode(sample["high"][None] / 255 * 2 - 1).latent_dist.mode()[0]
        assert torch.allclose(sample["latent"], expected, atol=1e-5)
    places = {place_in(int(name[0]), sample["high"]) for name, sample in made.items()}
    assert len(places) == 6
    run(photos, "-o", tmp_path / "other", "--base", published.sd3, "--crops", "2", "--seed", "1")
    assert not places & {place_in(int(name[0]), sample["high"]) for name, sample in samples(tmp_path / "other").items()}
    index = json.loads((out / INDEX).read_text())
    assert index["files"] == list(made)
    assert index["shapes"] == {"latent": [16, 4, 4]}
    assert (index["settings"]["crop"], index["settings"]["captions"], index["settings"]["variants"]) == (32, False, 0)


def test_a_merged_bundle_serves_as_the_base(photos, tmp_path):
    run(photos, "-o", tmp_path / "out", "--base", BUILTIN, "--dtype", "fp32")
    vae = from_bundle(read_bundle(BUILTIN), torch.device("cpu"), torch.float32).vae
    for sample in samples(tmp_path / "out").values():
        expected = vae.encode(sample["high"][None] / 255 * 2 - 1).latent_dist.mode()[0]
        assert torch.allclose(sample["latent"], expected, atol=1e-5)
    with pytest.raises(ValueError, match="has no text_encoder, text_encoder_2, tokenizer, tokenizer_2"):
        run("-o", tmp_path / "out", "--base", BUILTIN, "--null")
    loras = tmp_path / "loras.safetensors"
    factors = [{"a.lora_A.weight": torch.ones(1, 1)} for _ in range(2)]
    write_bundle(loras, Bundle("lora", read_bundle(BUILTIN).prompt, *factors))
    with pytest.raises(ValueError, match="holds only LoRAs"):
        run(photos, "-o", tmp_path / "lora", "--base", loras)


def test_pairs_read_prepared_folders_with_their_latents(published, photos, tmp_path):
    run(photos, "-o", tmp_path / "out", "--base", published.sd3, "--crops", "2")
    stored = list(samples(tmp_path / "out").values())
    dataset = Pairs([tmp_path / "out"], MIXTURE, seed=0)
    assert dataset.has_latents
    seen, lows = set(), []
    for index in range(12):
        sample = dataset[index]
        assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
            "low": (torch.float32, (3, 32, 32)),
            "high": (torch.float32, (3, 32, 32)),
            "latent": (torch.float32, (16, 4, 4)),
        }
        (which,) = [i for i, s in enumerate(stored) if torch.equal(s["high"] / 255, sample["high"])]
        assert torch.equal(sample["latent"], stored[which]["latent"].float())
        assert 0.001 < (sample["low"] - sample["high"]).abs().mean() < 0.2
        seen.add(which)
        lows.append((which, sample["low"]))
    assert len(seen) >= 4
    for (which, low), (other, another) in itertools.combinations(lows, 2):
        assert which != other or not torch.equal(low, another), "degraded anew each time"
    batch = next(loader(dataset, 3, 0, 0, 1, workers=1))
    assert torch.equal(batch["latent"][2], dataset[2]["latent"])


def test_without_latents_prepared_crops_are_turned(published, photos, tmp_path):
    run(photos, "-o", tmp_path / "out", "--base", published.sd3, "--degrade", "light")
    stored = [sample["high"] / 255 for sample in samples(tmp_path / "out").values()]
    for folders, latents in (([tmp_path / "out"], False), ([(photos, 0.01), (tmp_path / "out", 99.0)], True)):
        dataset = Pairs(folders, MIXTURE, seed=0, latents=latents)
        assert not dataset.has_latents
        upright = 0
        for index in range(24):
            sample = dataset[index]
            assert sample.keys() == {"low", "high"}
            both = torch.stack((sample["low"].flatten(), sample["high"].flatten()))
            assert torch.corrcoef(both)[0, 1] > 0.5, "turned together"
            upright += any(torch.equal(high, sample["high"]) for high in stored)
        assert 0 < upright < 12, "an eighth is left as it is"


def test_cached_degradations_reach_beyond_their_crops(published, photos, tmp_path, monkeypatch):
    """The degradation is a plain average here, so what is expected can be cut from the photograph."""
    monkeypatch.setattr(prepare, "degrade", lambda image, scale, preset, _: torch.nn.functional.avg_pool2d(image, scale))
    arguments = ["--base", published.sd3, "--degrade", "heavy", "--variants", "2"]
    run(photos, "-o", tmp_path / "out", *arguments)
    for name, sample in samples(tmp_path / "out").items():
        assert sample["low_0"].shape == sample["low_1"].shape == (3, 24, 24)
        picture = (photo(100, 120, int(name[0]))[0] * 255).round().byte()
        top, left = place_in(int(name[0]), sample["high"])
        around = picture[:, top - 32 : top + 64, left - 32 : left + 64] / 255
        expected = torch.nn.functional.avg_pool2d(around, 4)
        assert (sample["low_0"] / 255 - expected).abs().max() < 0.51 / 255


def test_cached_degradations_are_used_and_all_of_them(published, photos, tmp_path, monkeypatch):
    arguments = ["--base", published.sd3, "--degrade", "heavy", "--variants", "3", "--scale", "2"]
    run(photos / "0.png", "-o", tmp_path / "out", *arguments)
    (stored,) = samples(tmp_path / "out").values()
    variants = [bicubic(stored[f"low_{k}"][None] / 255, (64, 64))[0, :, 16:48, 16:48] for k in range(3)]
    monkeypatch.delattr(data, "degrade")
    dataset = Pairs([tmp_path / "out"], Mixture(32, 2, (("light", 1.0),), 0.0), seed=0)
    used = [next(k for k, low in enumerate(variants) if torch.equal(low, dataset[index]["low"])) for index in range(24)]
    assert set(used) == {0, 1, 2}
    with pytest.raises(ValueError, match="degradations of scale 2, not 4"):
        Pairs([tmp_path / "out"], MIXTURE, seed=0)


def test_an_interrupted_preparation_leaves_no_half_file_and_goes_on(published, photos, tmp_path, monkeypatch):
    arguments = ["--base", published.sd3, "--crops", "2"]
    run(photos, "-o", tmp_path / "straight", *arguments)
    written, save = [], atomic.save_file

    def save_half(tensors, path, metadata):
        save(tensors, path, metadata)
        written.append(path)
        if len(written) == 4:
            path.write_bytes(path.read_bytes()[:500])
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "save_file", save_half)
    with pytest.raises(KeyboardInterrupt):
        run(photos, "-o", tmp_path / "out", *arguments)
    straight = contents(tmp_path / "straight")
    assert contents(tmp_path / "out") == dict(list(straight.items())[:3])
    with pytest.raises(ValueError, match="interrupted; run it again"):
        Pairs([tmp_path / "out"], MIXTURE, seed=0)
    written.clear()
    monkeypatch.setattr(atomic, "save_file", lambda *values: written.append(values[1]) or save(*values))
    run(photos, "-o", tmp_path / "out", *arguments)
    assert [path.name[1:6] for path in written] == ["1.png", "1.png", "2.png", "2.png"], "the first picture was complete"
    assert contents(tmp_path / "out") == straight
    assert (tmp_path / "out" / INDEX).read_text() == (tmp_path / "straight" / INDEX).read_text()


def test_other_pictures_are_added_and_do_not_change_those_there(published, photos, tmp_path):
    out, arguments = tmp_path / "out", ["--base", published.sd3, "--degrade", "light"]
    run(photos / "1.png", "-o", out, *arguments)
    before = contents(out)
    run(photos / "0.png", photos / "2.png", "-o", out, *arguments)
    assert before.items() < contents(out).items()
    assert len(Pairs([out], MIXTURE, seed=0).sources[0].paths) == 3
    run(photos, "-o", tmp_path / "together", *arguments)
    assert contents(tmp_path / "together") == contents(out)


def test_a_folder_is_gone_on_with_only_by_the_same_settings_and_pictures(published, photos, tmp_path):
    out, arguments = tmp_path / "out", ["--base", published.sd3]
    run(photos, "-o", out, *arguments)
    with pytest.raises(ValueError, match=r"prepared.json was prepared with seed = 0, now 1: use the same options"):
        run(photos, "-o", out, *arguments, "--seed", "1")
    (out / INDEX).unlink()
    with pytest.raises(ValueError, match=r"0\.png-0\.safetensors was prepared with dtype = 'fp16', now 'fp32'"):
        run(photos, "-o", out, *arguments, "--dtype", "fp32")
    shutil.copytree(photos, tmp_path / "others")
    with pytest.raises(ValueError, match=r"was prepared from .*photos.0\.png, not .*others.0\.png"):
        run(tmp_path / "others", "-o", out, *arguments)
    with pytest.raises(ValueError, match=r"have the same name: prepare them in two output folders"):
        run(photos, tmp_path / "others", "-o", tmp_path / "new", *arguments)


def test_workers_prepare_the_same(published, photos, tmp_path):
    arguments = ["--base", published.sd3, "--degrade", "realesrgan", "--variants", "2"]
    run(photos, "-o", tmp_path / "out", *arguments)
    run(photos, "-o", tmp_path / "parallel", *arguments, "--workers", "2")
    assert contents(tmp_path / "parallel") == contents(tmp_path / "out")


def test_damaged_pictures_are_reported_once_and_left_out(published, photos, tmp_path, caplog):
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:-1000])
    assert run(photos, "-o", tmp_path / "out", "--base", published.sd3) == 1, "some inputs failed"
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "1.png" in record.getMessage()
    assert list(samples(tmp_path / "out")) == ["0.png-0.safetensors", "2.png-0.safetensors"]
    for name in ("0.png", "2.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:-1000])
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        run(photos, "-o", tmp_path / "none", "--base", published.sd3)


def test_damaged_samples_are_reported_once_and_replaced(published, photos, tmp_path, caplog):
    run(photos, "-o", tmp_path / "out", "--base", published.sd3)
    sample = tmp_path / "out" / SAMPLES / "1.png-0.safetensors"
    sample.write_bytes(sample.read_bytes()[:-10])
    (tmp_path / "out" / SAMPLES / "2.png-0.safetensors").unlink()
    expected = load_file(tmp_path / "out" / SAMPLES / "0.png-0.safetensors")["high"] / 255
    dataset = Pairs([tmp_path / "out"], MIXTURE, seed=0)
    assert all(torch.equal(dataset[index]["high"], expected) for index in range(12))
    assert sorted(name for record in caplog.records for name in ("1.png-0", "2.png-0") if name in record.getMessage()) == [
        "1.png-0",
        "2.png-0",
    ]
    run(photos, "-o", tmp_path / "out", "--base", published.sd3)
    assert len(samples(tmp_path / "out")) == 3, "made again"


@pytest.mark.parametrize("change", [
    {"high": torch.zeros(3, 31, 32, dtype=torch.uint8)}, {"high": torch.zeros(3, 32, 32)}, {"high": None},
    {"latent": torch.zeros(16, 5, 4)}, {"latent": torch.zeros(16, 4, 4, dtype=torch.int32)},
    {"low_0": torch.zeros(3, 9, 9, dtype=torch.uint8)}, {"low_0": None},
])  # fmt: skip
def test_samples_of_odd_content_are_left_out_by_name(change, published, photos, tmp_path, caplog):
    run(photos, "-o", tmp_path / "out", "--base", published.sd3, "--degrade", "light")
    path = tmp_path / "out" / SAMPLES / "1.png-0.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}, path, header)
    pairs = Pairs([tmp_path / "out"], MIXTURE, seed=0)
    assert all(pairs[index]["low"].shape == (3, 32, 32) for index in range(12))
    assert f"{path}: {next(iter(change))} missing, or of another shape or type" in caplog.text


@pytest.mark.parametrize("text", ["{bad", "[1]", "{}", '{"settings": 3, "source": ""}'])
def test_a_sample_whose_header_is_damaged_is_made_again(text, published, photos, tmp_path):
    run(photos, "-o", tmp_path / "out", "--base", published.sd3)
    before, path = contents(tmp_path / "out"), tmp_path / "out" / SAMPLES / "1.png-0.safetensors"
    save_file(load_file(path), path, {"tsdsr_prepared": text})
    run(photos, "-o", tmp_path / "out", "--base", published.sd3)
    assert contents(tmp_path / "out") == before


def oracle(folder, text, with_t5=True):
    """SD3's text condition (Esser et al. 2024, sec. 4), from the encoders themselves."""
    tokens, pooled = [], []
    for part in ("text_encoder", "text_encoder_2"):
        encoder = CLIPTextModelWithProjection.from_pretrained(folder / part).eval()
        ids = clip_tokenizer()(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        tokens.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    both = torch.zeros(1, 77, 24)
    both[:, :, :20] = torch.cat(tokens, -1)
    ids = t5_tokenizer()(text, padding="max_length", max_length=256, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_3").eval()
        rest = encoder(ids)[0] if with_t5 else torch.zeros(1, 256, 24)
    return torch.cat((both, rest), 1), torch.cat(pooled, -1)


def close(found, expected):
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_captions_and_prompts_are_embedded_as_sd3_does(texted, photos, tmp_path):
    texts = {"0": "a cat", "1": "a dog, " * 40, "2": "no caption"}
    for name in ("0", "1"):
        (photos / f"{name}.txt").write_text(texts[name] + "\n")
    out = tmp_path / "out"
    arguments = ["--base", texted, "--captions", "--caption-default", texts["2"], "--prompt", "sharp", "--dtype", "fp32"]
    run(photos, "-o", out, *arguments)
    stored = samples(out)
    for name, text in texts.items():
        sample = stored[f"{name}.png-0.safetensors"]
        assert close((sample["tokens"][None], sample["pooled"][None]), oracle(texted, text.strip())), text
    for file, text in ((NULL_FILE, ""), (PROMPT_FILE, "sharp")):
        prompt = load_prompt(out / file)
        assert close((prompt.tokens, prompt.pooled), oracle(texted, text)), text
    dataset = Pairs([out], MIXTURE, seed=0, captions=True)
    for index in range(6):
        sample = dataset[index]
        assert sample.keys() == {"low", "high", "latent", "tokens", "pooled"}
        (which,) = [s for s in stored.values() if torch.equal(s["high"] / 255, sample["high"])]
        assert torch.equal(sample["tokens"], which["tokens"])
        assert torch.equal(sample["pooled"], which["pooled"])
    shapes = {"tokens": prompt.tokens.shape[1:], "pooled": prompt.pooled.shape[1:]}
    own = fingerprint(AutoencoderKL.from_pretrained(texted / "vae"))
    dataset.check_model(own, shapes)
    with pytest.raises(ValueError, match="has captions of shapes"):
        dataset.check_model(own, {**shapes, "tokens": (77, 4096)})
    upright = Pairs([out], MIXTURE, seed=0, captions=True, latents=False)
    assert all(torch.equal(upright[index]["high"], dataset[index]["high"]) for index in range(6)), "captions know up and left"
    with pytest.raises(ValueError, match=r"synthetic_share = 0.5: synthetic images have no captions"):
        Pairs([out], Mixture(32, 4, (("light", 1.0),), 0.5), seed=0, captions=True)


def test_without_t5_its_tokens_are_zeros(texted, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(texted, base)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(base / part)
    run("-o", tmp_path / "out", "--base", base, "--prompt", "sharp", "--dtype", "fp32")
    prompt = load_prompt(tmp_path / "out" / PROMPT_FILE)
    assert close((prompt.tokens, prompt.pooled), oracle(texted, "sharp", with_t5=False))
    assert not (tmp_path / "out" / INDEX).exists()
    shutil.rmtree(base / "transformer")
    with pytest.raises(ValueError, match="no text_encoder_3, and no transformer configuration"):
        run("-o", tmp_path / "out", "--base", base, "--null")


def test_damaged_text_encoders_are_named(texted, tmp_path):
    shutil.copytree(texted, tmp_path / "base")
    (tmp_path / "base" / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"the text encoders of .*base cannot be loaded"):
        run("-o", tmp_path / "out", "--base", tmp_path / "base", "--null")


def test_missing_captions_are_one_error(published, photos, tmp_path, monkeypatch):
    (photos / "1.txt").write_text("a dog")
    monkeypatch.chdir(tmp_path)  # a message lists fewer names if they are long
    with pytest.raises(ValueError, match=r"2 of 3 captions are missing: .*0\.txt, .*2\.txt; .*--caption-default TEXT"):
        run("photos", "-o", tmp_path / "out", "--base", published.sd3, "--captions")
    assert not (tmp_path / "out").exists()
    many = [Path(f"{index}.png") for index in range(9)]
    with pytest.raises(ValueError, match=r"9 of 9 captions .*7\.txt and 1 more;") as caught:
        read_captions(many, None)
    assert "8.txt" not in str(caught.value)
    (tmp_path / "0.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"0\.txt cannot be read as a caption: it is not UTF-8 text"):
        read_captions(many, "any")
    run(photos, "-o", tmp_path / "plain", "--base", published.sd3)
    with pytest.raises(ValueError, match=r"no captions in .*plain"):
        Pairs([tmp_path / "plain"], MIXTURE, seed=0, captions=True)


def test_folders_that_do_not_fit_are_named(published, photos, tmp_path):
    run(photos, "-o", tmp_path / "one", "--base", published.sd3)
    run(photos, "-o", tmp_path / "two", "--base", BUILTIN)
    with pytest.raises(ValueError, match=r"one is prepared with crop 32, not 64"):
        Pairs([tmp_path / "one"], Mixture(64, 4, (("light", 1.0),), 0.0), seed=0)
    with pytest.raises(ValueError, match=r"latent has different shapes, .*\[16, 4, 4\].*\[16, 8, 8\]"):
        Pairs([tmp_path / "one", tmp_path / "two"], MIXTURE, seed=0)
    assert Pairs([tmp_path / "one", tmp_path / "two"], MIXTURE, seed=0, latents=False)[0]["high"].shape == (3, 32, 32)
    own = fingerprint(AutoencoderKL.from_pretrained(published.sd3 / "vae"))
    Pairs([tmp_path / "one"], MIXTURE, seed=0).check_model(own, {})
    with pytest.raises(ValueError, match=r"two has latents of another autoencoder \(.*builtin.* than that of --base"):
        Pairs([tmp_path / "two"], MIXTURE, seed=0).check_model(own, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "damaged"), ("[]", "damaged"), ('{"version": 1, "settings": {}}', "damaged"), ('{"version": 9}', "of version 9")],
)
def test_odd_indices_are_named(text, message, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=rf"prepared\.json is {message}"):
        Pairs([tmp_path], MIXTURE, seed=0)


@pytest.mark.parametrize("change", [
    {"files": "x"}, {"files": [1]}, {"files": []}, {"shapes": {}}, {"shapes": {"latent": "x"}}, {"settings": [1]},
    {"settings": {"crop": "32"}}, {"settings": {"captions": True}}, {"version": 0},
])  # fmt: skip
def test_indices_of_odd_content_are_named(change, published, photos, tmp_path):
    run(photos, "-o", tmp_path / "out", "--base", published.sd3)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    if isinstance(change.get("settings"), dict):
        change = {"settings": index["settings"] | change["settings"]}
    (tmp_path / "out" / INDEX).write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=r"prepared\.json is damaged: .*prepare the folder again"):
        Pairs([tmp_path / "out"], MIXTURE, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop", "40"], "--crop 40: expected a multiple of 16"),
        (["--crop", "16", "--degrade", "light", "--scale", "3"], "--crop 16: expected a multiple of 48"),
        (["--crop", "128"], "no colour image of at least 128x128"),
        (["--crop", "48", "--degrade", "light"], "no colour image of at least 112x112"),
        (["--crop", "0"], "--crop 0"),
        (["--crops", "0"], "--crops 0"),
        (["--variants", "2"], "--variants 2: cached degradations need --degrade"),
        (["--caption-default", "x"], "--caption-default needs --captions"),
        (["--captions", "--caption-default", "x"], "has no text_encoder"),
    ],
)
def test_impossible_options_are_named(arguments, message, published, photos, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(photos, "-o", tmp_path / "out", "--base", published.sd3, *arguments)


def test_inputs_that_are_not_there_are_named(published, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for inputs, base, message in (
        ([tmp_path / "empty"], published.sd3, "empty: no images in this folder"),
        ([], published.sd3, "nothing to prepare"),
        (["--captions"], published.sd3, "nothing to prepare"),
        ([photos], tmp_path / "none", "none does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*inputs, "-o", tmp_path / "out", "--base", base)


def test_crops_lie_apart_and_no_more_than_there_is_room_for(published, tmp_path, monkeypatch):
    def overlaps():
        total = 0
        for seed in range(20):
            places = prepare.crop_positions(96, 128, 32, 4, torch.Generator().manual_seed(seed))
            assert all(0 <= top <= 64 and 0 <= left <= 96 for top, left in places)
            total += sum(prepare._overlap(one, other, 32) for one, other in itertools.combinations(places, 2))
        return total

    apart = overlaps()
    monkeypatch.setattr(prepare, "_CANDIDATES", 1)
    assert apart < 0.1 * overlaps()
    write_picture(tmp_path / "photos" / "a.png", Picture(photo(40, 64)))
    write_picture(tmp_path / "photos" / "b.png", Picture(photo(33, 33)))
    run(tmp_path / "photos", "-o", tmp_path / "out", "--base", published.sd3, "--crops", "9")
    assert list(samples(tmp_path / "out")) == ["a.png-0.safetensors", "a.png-1.safetensors", "b.png-0.safetensors"]


def test_samples_say_what_they_were_made_of(published, photos, tmp_path):
    run(photos / "0.png", "-o", tmp_path / "out", "--base", published.sd3, "--seed", "4")
    with safe_open(tmp_path / "out" / SAMPLES / "0.png-0.safetensors", framework="pt") as file:
        made_of = json.loads(file.metadata()["tsdsr_prepared"])
    assert made_of["settings"]["seed"] == 4
    assert made_of["source"] == str((photos / "0.png").resolve())


def test_a_name_too_long_for_its_samples_is_refused_before_any_work(tmp_path, capsys):
    for name in ("a", "n" * 245):
        write_picture(tmp_path / "in" / f"{name}.png", Picture(photo(80, 80)))
    out = tmp_path / "out"
    assert cli.main(["train", "prepare", str(tmp_path / "in"), "-o", str(out), "--base", "builtin", "--crop", "64"]) == 2
    assert "nnn.png: expected a name of at most 235 bytes" in capsys.readouterr().err
    assert not list(out.rglob("*.safetensors"))
