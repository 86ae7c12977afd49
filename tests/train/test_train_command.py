"""``tsdsr train`` as a person runs it: stages, resuming, exports, several processes, what goes wrong."""

import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from tsdsr_core.cli import main
from tsdsr_core.colour import match_colour
from tsdsr_core.families.bundle import read_bundle
from tsdsr_core.families.load import published_shapes
from tsdsr_core.families.sd3 import SD3
from tsdsr_core.families.sd3.config import TRANSFORMER_TARGETS, VAE_TARGETS
from tsdsr_core.images.files import Picture, read_picture, write_picture
from tsdsr_core.metrics.spectrum import grid_peaks, sharpness
from tsdsr_core.pipeline import bicubic
from tsdsr_core.train.checkpoint import read_checkpoint
from tsdsr_core.train.config_file import read_config
from tsdsr_core.train.export import adapter_files
from tsdsr_core.train.networks.build import Sources, build_networks
from tsdsr_core.train.trainers import StudentTrainer
from tsdsr_core.weights.lora import load_lora

from ..support.tiny import Published, photo
from ..support.tiny_texts import make_texted

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tsdsr_core" / "train" / "configs"
SMALL = ["model.layers=2", "data.crop=32", "run.batch=2", "run.validate_every=100", "optimiser.warmup_steps=0"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(3):
        write_picture(folder / f"{index}.png", Picture(photo(200, 240, index)))
    return folder


def train(*arguments) -> int:
    return main(["train", *map(str, arguments)])


def smoke(photos: Path, out: Path, *arguments, settings=(), config="smoke.toml") -> int:
    return train(CONFIGS / config, "--photos", photos, "--out", out, "--device", "cpu", *arguments, "--set", *SMALL, *settings)


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = read_checkpoint(out / "last.pt")
    groups = {f"{group}.{name}": value for group, values in found.weights.items() for name, value in values.items()}
    return {**groups, **{f"average.{name}": value for name, value in found.average.items()}}


def test_the_whole_chain_of_a_small_model_ends_in_a_restorer(photos, tmp_path):
    """Pretrain, teacher, student, export; each continues from the last, and tsdsr upscale takes the end."""
    few = ["run.steps=2"]
    assert smoke(photos, tmp_path / "1", settings=[*few, "stage=pretrain"]) == 0
    assert train("export", tmp_path / "1" / "last.pt", "-o", tmp_path / "base.safetensors") == 0
    base = ["--base", tmp_path / "base.safetensors"]
    assert smoke(photos, tmp_path / "2", *base, settings=[*few, "stage=teacher"]) == 0
    assert train("export", tmp_path / "2" / "last.pt", *base, "-o", tmp_path / "teacher.safetensors") == 0
    assert smoke(photos, tmp_path / "3", *base, "--teacher", tmp_path / "teacher.safetensors", settings=few) == 0
    assert train("export", tmp_path / "3" / "last.pt", *base, "-o", tmp_path / "student.safetensors") == 0
    bundles = [read_bundle(tmp_path / f"{name}.safetensors") for name in ("base", "teacher", "student")]
    assert [bundle.notes["stage"] for bundle in bundles] == ["pretrain", "teacher", "student"]
    assert [bundle.notes.get("objective") for bundle in bundles] == [None, None, "tsd+dasm"]
    decoders = [{k: v for k, v in bundle.vae.items() if k.startswith("decoder")} for bundle in bundles]
    assert all(torch.equal(decoders[2][key], decoders[0][key]) for key in decoders[0]), "the decoder is not trained"
    assert any(not torch.equal(bundles[2].vae[key], bundles[0].vae[key]) for key in bundles[0].vae), "the encoder is"
    model = ["--model", str(tmp_path / "student.safetensors"), "--scale", "1"]
    assert main(["upscale", str(photos / "0.png"), "-o", str(tmp_path / "out.png"), *model]) == 0
    assert Image.open(tmp_path / "out.png").size == (240, 200)


def test_cut_off_and_resumed_equals_straight_bit_for_bit(photos, tmp_path):
    base = ["--base", "builtin", "--teacher", BUILTIN]
    steady = "optimiser.schedule=linear", "objective.perceptual_weight_end=1.0"  # or other steps would be other schedules
    settings = ["run.save_every=2", *steady]
    assert smoke(photos, tmp_path / "straight", *base, settings=[*settings, "run.steps=4"]) == 0
    assert smoke(photos, tmp_path / "halves", *base, settings=[*settings, "run.steps=2"]) == 0
    assert smoke(photos, tmp_path / "halves", *base, "--resume", settings=[*settings, "run.steps=4"]) == 0
    expected, found = weights(tmp_path / "straight"), weights(tmp_path / "halves")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert smoke(photos, tmp_path / "halves", *base, settings=settings) == 2, "not over a run by mistake"


def test_perceptual_terms_are_trained_with_a_file_and_without_pyiqa(photos, perceptual_weights, tmp_path, monkeypatch):
    """In both stages that see pixels; without the file these runs are refused."""
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    for settings in (
        ["stage=pretrain", "pretrain.perceptual=lpips-alex", "pretrain.perceptual_weight=1.0"],
        ["stage=student", "objective.name=supervised", "objective.perceptual=dists"],
    ):
        arguments = [photos, tmp_path / settings[0], "--base", "builtin"]
        settings += ["run.steps=1", "run.batch=1", "data.crop=48"]
        assert smoke(*arguments, settings=settings) == 2
        assert smoke(*arguments, "--perceptual-weights", perceptual_weights, settings=settings) == 0


BUILTIN = ROOT / "tsdsr_core" / "assets" / "builtin.safetensors"


@pytest.mark.posix
@pytest.mark.rounding
@pytest.mark.parametrize("trained", ["weights", "lora"])
def test_two_processes_equal_one(trained, photos, tmp_path, published):
    for side in (200, 20):
        write_picture(tmp_path / "more" / f"{side}.png", Picture(photo(side, side)))
    arguments = ["--photos", photos, tmp_path / "more", "--device", "cpu"]
    arguments += ["--base", "builtin", "--teacher", BUILTIN] if trained == "weights" else lora_arguments(published)
    settings = [text for text in SMALL if not text.startswith("run.batch")] + ["run.steps=3", "objective.fake_steps=2"]
    settings += LORA if trained == "lora" else []
    for name, processes, batch in (("one", 1, 2), ("two", 2, 1)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "tsdsr_core", "train"]
        command += [CONFIGS / "smoke.toml", *arguments, "--out", tmp_path / name, "--set", *settings, f"run.batch={batch}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ended.stderr.count("left out images:") == 1, "the first process speaks for all"
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = weights_before(tmp_path / "one", lora_sources(published) if trained == "lora" else Sources(BUILTIN, BUILTIN))
    assert any("vae" in key for key in start)
    moved = torch.cat([(one[key] - start[key]).abs().flatten() for key in start]).mean()
    assert moved > 1e-5
    gradients = [mean_gradients(tmp_path / name) for name in ("one", "two")]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():  # kernels give up to 5e-5, a second process that does not step 0.07, a sum 1
        assert (gradient - gradients[1][key]).norm() <= 1e-3 * gradient.norm(), key
    differences = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    assert differences.mean() < 1e-3 * moved, "kernels give 3e-6: single weights move by the sign of next to nothing"


def mean_gradients(out: Path) -> dict[str, torch.Tensor]:
    """AdamW's averages of the gradients, by group and number of the parameter: what the processes made together."""
    groups = read_checkpoint(out / "last.pt").optimisers.items()
    return {f"{group}.{number}": own["exp_avg"] for group, state in groups for number, own in state["state"].items()}


def weights_before(out: Path, sources: Sources) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(out / "last.pt")
    networks = build_networks(checkpoint.config, sources, torch.device("cpu"))
    return {
        f"{role}.{name}": value.detach() for role in checkpoint.weights for name, value in networks.parameters(role).items()
    }


def lora_arguments(published: Published) -> list:
    prompt = published.embeddings
    return ["--base", published.sd3, "--embedding-dir", prompt, "--null", prompt]


def lora_sources(published: Published) -> Sources:
    return Sources(published.sd3, None, published.embeddings, published.embeddings)


LORA = ["model.trained=lora", "model.rank=4", "objective.wavelet_levels=0", "optimiser.learning_rate=0.01"]


@pytest.mark.rounding
def test_exported_loras_reproduce_the_trainers_validation_picture(published, photos, tmp_path):
    arguments = lora_arguments(published)
    assert smoke(photos, tmp_path / "run", *arguments, settings=[*LORA, "run.steps=3"]) == 0
    assert train("export", tmp_path / "run" / "last.pt", "-o", tmp_path / "loras") == 0
    assert sorted(path.name for path in (tmp_path / "loras").iterdir()) == [
        "pool_embeds.pt", "prompt_embeds.pt", "transformer.safetensors", "vae.safetensors",
    ]  # fmt: skip
    lora = load_lora(tmp_path / "loras" / "transformer.safetensors", "transformer")
    official = load_lora(published.loras / "transformer.safetensors", "transformer")
    assert set(lora.pairs) == set(official.pairs), "the published layers"

    write_picture(tmp_path / "low.png", Picture(photo(128, 128)))
    low = bicubic(read_picture(tmp_path / "low.png").rgb, (512, 512))
    checkpoint = read_checkpoint(tmp_path / "run" / "last.pt")
    networks = build_networks(checkpoint.config, lora_sources(published), torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in networks.parameters("student").items():
            parameter.copy_(checkpoint.average[name])
        plain = StudentTrainer(networks, checkpoint.config).restore(low)
    expected = match_colour(plain, low, "wavelet", 5).clamp(0, 1)

    def upscaled(*model) -> np.ndarray:
        arguments = ["upscale", tmp_path / "low.png", "-o", tmp_path / "out.png", "--existing", "overwrite", *model]
        assert main(list(map(str, arguments))) == 0
        return np.array(Image.open(tmp_path / "out.png")).astype(float)

    whole = 255 * expected[0].permute(1, 2, 0).numpy()
    found = upscaled("--model", published.sd3, "--lora-dir", tmp_path / "loras")
    assert np.abs(found - whole).max() <= 1
    other = upscaled("--model", published.sd3, "--lora-dir", published.loras, "--embedding-dir", published.embeddings)
    assert np.abs(other - whole).max() > 5, "other LoRAs give another picture"
    for strength in ("--lora-strength", "--vae-lora-strength"):
        without = upscaled("--model", published.sd3, "--lora-dir", tmp_path / "loras", strength, "0")
        assert np.abs(without - whole).max() > 5, f"both LoRAs were trained: {strength}"
    assert train("export", tmp_path / "run" / "last.pt", "-o", tmp_path / "lora.safetensors") == 0
    assert np.abs(upscaled("--model", published.sd3, "--lora-dir", tmp_path / "lora.safetensors") - whole).max() <= 1


@pytest.mark.posix
def test_exports_replace_nothing_unasked_and_come_whole(published, photos, tmp_path, capsys):
    """What is there already is refused before the work; a full disk leaves all files as they were."""
    arguments = lora_arguments(published)
    assert smoke(photos, tmp_path / "run", *arguments, settings=[*LORA, "run.steps=1", "objective.name=supervised"]) == 0
    command, out = ["export", tmp_path / "run" / "last.pt", "-o"], tmp_path / "loras"
    names = ["pool_embeds.pt", "prompt_embeds.pt", "transformer.safetensors", "vae.safetensors"]
    for name in names[:3]:
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(b"mine")
    (tmp_path / "lora.safetensors").write_bytes(b"mine")
    for target, message in ((out, "(and 2 more) exists already"), (tmp_path / "lora.safetensors", "lora.safetensors exists")):
        assert train(*command, target) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.endswith("add --existing overwrite\n")
    line = on_a_full_disk(60_000, *command, out, "--existing", "overwrite")  # the first file fits, the second does not
    assert f"error: {out / 'vae.safetensors'} could not be written" in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == dict.fromkeys(names[:3], b"mine")
    assert (tmp_path / "lora.safetensors").read_bytes() == b"mine"
    assert train(*command, out, "--existing", "overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(path.stat().st_size > 4 for path in out.iterdir())


def test_a_teachers_lora_becomes_psi(published, photos, tmp_path):
    arguments = lora_arguments(published)
    assert smoke(photos, tmp_path / "t", *arguments, settings=[*LORA, "run.steps=1", "stage=teacher"]) == 0
    assert train("export", tmp_path / "t" / "last.pt", "-o", tmp_path / "psi") == 0
    teacher = tmp_path / "psi" / "transformer.safetensors"
    assert smoke(photos, tmp_path / "s", *arguments, "--teacher", teacher, settings=[*LORA, "run.steps=1"]) == 0
    exported = adapter_files(read_checkpoint(tmp_path / "t" / "last.pt").average)["transformer"]
    checkpoint = read_checkpoint(tmp_path / "s" / "last.pt")
    sources = Sources(published.sd3, teacher, published.embeddings, published.embeddings)
    networks = build_networks(checkpoint.config, sources, torch.device("cpu"))
    for role in ("teacher", "fake"):
        found = networks.parameters(role)
        assert len(found) == len(exported)
        assert all(torch.equal(found["transformer." + k.replace(".weight", f".{role}.weight")], exported[k]) for k in exported)
    assert "teacher" not in checkpoint.weights, "it is not trained any more"


def test_validation_tells_figures_and_shows_pictures(photos, tmp_path, capsys):
    for index in range(2):
        write_picture(tmp_path / "hq" / f"{index}.png", Picture(photo(512, 512, index)))
    assert train("evalset", tmp_path / "hq", "--out", tmp_path / "set", "--presets", "light") == 0
    base = ["--base", "builtin", "--teacher", BUILTIN, "--validation", tmp_path / "set"]
    assert smoke(photos, tmp_path / "run", *base, settings=["run.steps=1"]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(tmp_path / "run" / "tsdsr"), size_guidance={"images": 0})
    log.Reload()
    scalars = set(log.Tags()["scalars"])
    assert {"loss/latent", "loss/distribution", "loss/fake", "validation/light/psnr_y"} <= scalars
    assert {"validation/light/sharpness", "validation/light/grid_8", "validation/light/grid_16"} <= scalars
    originals = torch.cat([photo(512, 512, index) for index in range(2)])
    for name, metric in (("sharpness", sharpness), ("grid_8", partial(grid_peaks, period=8))):
        (found,) = log.Scalars(f"validation/reference/{name}")
        assert found.value == pytest.approx(metric(originals).mean().item(), rel=1e-4), "the originals' own, once"
    assert 15 < log.Scalars("validation/light/psnr_y")[0].value < 60
    assert set(log.Tags()["images"]) == {"light/0", "light/1"}
    assert log.Images("light/0")[0].width == 3 * 512


def test_prepared_captions_and_latents_train(published, photos, tmp_path):
    """What the configuration of SD3 medium runs with."""
    sd3, out = make_texted(tmp_path / "sd3", published.sd3), tmp_path / "prepared"
    for index in range(3):
        (photos / f"{index}.txt").write_text(f"picture {index}")
    texts = ["--captions", "--prompt", "sharp", "--workers", "0", "--device", "cpu"]
    assert train("prepare", photos, "-o", out, "--base", sd3, "--crop", "32", *texts) == 0
    texts = ["--embedding-dir", out / "prompt.safetensors", "--null", out / "null.safetensors"]
    settings = [*LORA, "run.steps=2", "data.captions=true", "data.synthetic_share=0", "data.workers=1"]
    settings += ["model.gradient_checkpointing=true"]
    for stage, teacher in (("teacher", []), ("student", ["--teacher", tmp_path / "psi" / "transformer.safetensors"])):
        arguments = ["--base", sd3, *texts, *teacher]
        assert smoke(out, tmp_path / stage, *arguments, settings=[*settings, f"stage={stage}"]) == 0
        assert train("export", tmp_path / stage / "last.pt", "-o", tmp_path / ("psi" if stage == "teacher" else "loras")) == 0
    log = read_checkpoint(tmp_path / "student" / "last.pt")
    assert set(log.weights) == {"student", "fake"}


def test_a_training_that_breaks_down_ends_in_one_line(photos, tmp_path, capsys):
    arguments = ["--base", "builtin", "--teacher", BUILTIN]
    settings = ["optimiser.learning_rate=1e30", "run.save_every=1"]
    assert smoke(photos, tmp_path / "run", *arguments, settings=settings) == 1
    assert re.search(r"error: the (loss|gradient) .* at step \d", capsys.readouterr().err.strip().splitlines()[-1])
    assert (tmp_path / "run" / "last.pt").exists()


def test_another_base_is_refused_when_a_run_goes_on_or_is_exported(photos, tmp_path, capsys, caplog):
    few = ["run.steps=1"]
    assert smoke(photos, tmp_path / "1", settings=[*few, "stage=pretrain"]) == 0
    assert train("export", tmp_path / "1" / "last.pt", "-o", tmp_path / "base.safetensors") == 0
    base = ["--base", tmp_path / "base.safetensors"]
    assert smoke(photos, tmp_path / "2", *base, settings=[*few, "stage=teacher"]) == 0
    capsys.readouterr()
    assert smoke(photos, tmp_path / "2", "--base", "builtin", "--resume", settings=["run.steps=2", "stage=teacher"]) == 2
    assert "steps 1 -> 2" in caplog.text
    assert "another autoencoder than --base gives" in capsys.readouterr().err
    assert train("export", tmp_path / "2" / "last.pt", "--base", "builtin", "-o", tmp_path / "t.safetensors") == 2
    assert "with another autoencoder than --base gives" in capsys.readouterr().err
    assert not (tmp_path / "t.safetensors").exists()


def test_bad_input_is_one_line_and_nothing_is_written(photos, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = tmp_path / "bad.toml"
    bad.write_text("[run]\nstepz = 3\n")
    to = "--out", tmp_path / "x"
    cases = [
        ([bad, "--photos", photos, *to], "unknown key run.stepz; known keys:"),
        ([tmp_path / "none.toml", "--photos", photos, *to], "cannot be read as a TOML file"),
        (
            [CONFIGS / "smoke.toml", "--photos", empty, *to, "--base", "builtin", "--teacher", BUILTIN],
            "empty",
        ),
        ([CONFIGS / "smoke.toml", "--photos", photos, *to, "--set", "run.steps=0"], "run.steps = 0"),
        ([CONFIGS / "smoke.toml", "--photos", photos, *to, "--set", "steps"], "expected TABLE.KEY=VALUE"),
        ([CONFIGS / "smoke.toml", "--photos", photos, *to, "--set", "stage.x=1"], "stage is not a table"),
        ([CONFIGS / "smoke.toml", "--photos", photos, *to, "--set", "objective.wavelet_levels=11"], "expected at most 10"),
        ([CONFIGS / "smoke.toml", "--photos", photos, *to], "needs --base"),
        ([CONFIGS / "smoke.toml", "--photos", photos, *to, "--validation", empty], "expected hq/ and lq-PRESET/"),
        (
            [CONFIGS / "smoke.toml", "--photos", photos, *to, "--validation", empty, "--set", "stage=teacher"],
            "--validation does not apply to stage 'teacher'",
        ),
        (["evalset", photos, "--out", tmp_path / "x"], "an evaluation set needs at least 512x512"),
        ([CONFIGS / "smoke.toml", *to], "--photos and --out are needed"),
        ([CONFIGS / "smoke.toml", "--photos", photos, *to, "--resume"], "does not exist: expected a checkpoint"),
        (["export", tmp_path / "none.pt", "-o", tmp_path / "x.safetensors"], "does not exist: expected a checkpoint"),
    ]
    for arguments, message in cases:
        assert train(*arguments) == 2, message
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1, error
        assert not list(tmp_path.glob("x*"))


def test_running_out_of_memory_is_one_line_with_advice(photos, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB\nmore")

    monkeypatch.setattr(AutoencoderKL, "encode", full)
    prepare = ["prepare", photos, "-o", tmp_path / "p", "--base", "builtin", "--crop", "64", "--workers", "0"]
    for done, advice in (
        (lambda: smoke(photos, tmp_path / "run", "--base", "builtin", "--teacher", BUILTIN), "try a smaller run.batch"),
        (lambda: train(*prepare, "--device", "cpu"), "try a smaller --crop"),
    ):
        assert done() == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"tsdsr train: error: out of memory; {advice}" in line
        assert line.endswith("(CUDA out of memory. Tried to allocate 64 GiB)")


def on_a_full_disk(size: int, *arguments) -> str:
    """The last line of ``tsdsr train``, where no file can be larger than ``size`` bytes."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "from tsdsr_core.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "train", *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1, ended.stderr
    return ended.stderr.strip().splitlines()[-1]


@pytest.mark.posix
def test_a_full_disk_leaves_the_last_good_files(photos, tmp_path):
    base = ["--base", "builtin", "--teacher", str(BUILTIN)]
    assert smoke(photos, tmp_path / "run", *base, settings=["run.steps=1"]) == 0
    good = (tmp_path / "run" / "last.pt").read_bytes()
    arguments = [CONFIGS / "smoke.toml", "--photos", photos, "--out", tmp_path / "run", "--device", "cpu", *base]
    arguments += ["--resume", "--set", *SMALL, "run.steps=2"]
    line = on_a_full_disk(len(good) // 2, *arguments)
    assert f"{tmp_path / 'run' / 'last.pt'} could not be written" in line
    assert line.endswith("; the previous checkpoint is kept")
    assert (tmp_path / "run" / "last.pt").read_bytes() == good
    out = tmp_path / "out.safetensors"
    line = on_a_full_disk(100_000, "export", tmp_path / "run" / "last.pt", "--base", "builtin", "-o", out)
    assert f"{out} could not be written" in line
    arguments = ["prepare", photos, "-o", tmp_path / "p", "--base", "builtin", "--crop", "64", "--workers", "0"]
    assert "could not be written" in on_a_full_disk(5_000, *arguments, "--device", "cpu")
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith("events")}
    assert left == {"last.pt"}, "nothing half-written stays"


def test_every_config_that_ships_is_valid():
    for path in CONFIGS.glob("*.toml"):
        read_config(path)


def test_a_dry_run_counts_sd3_medium(capsys):
    def counted(*settings: str) -> dict[str, float]:
        quick = ["objective.name=supervised", "data.crop=64", "model.rank=4", *settings]
        assert train(CONFIGS / "sd3-medium.toml", "--dry-run", "--set", *quick) == 0
        lines = capsys.readouterr().out.strip().splitlines()
        return {line[:30].strip(): float(line[30:].split()[0]) for line in lines}

    found = counted()
    shapes = [shape for part in ("transformer", "vae") for shape in adapted_shapes(part)]
    expected = sum(4 * (shape[0] + math.prod(shape[1:])) for shape in shapes)
    assert found["trained parameters"] == pytest.approx(expected / 1e6, abs=0.06)
    assert found["weights"] == pytest.approx((2028 * 2 + 84 * 4) / 1000, rel=0.02)
    assert counted("data.crop=128")["activations"] > 1.5 * found["activations"]
    assert counted("model.gradient_checkpointing=false")["activations"] > found["activations"]
    assert train(CONFIGS / "smoke.toml", "--dry-run") == 2


def adapted_shapes(part: str) -> list[tuple[int, ...]]:
    """Shapes of the weights that the published LoRAs change."""
    shapes = published_shapes(SD3, part)
    if part == "vae":
        return [shape for name, shape in shapes.items() if re.fullmatch(VAE_TARGETS, name)]
    return [shape for name, shape in shapes.items() if name.endswith(tuple(TRANSFORMER_TARGETS))]


def test_a_run_that_is_done_says_so(photos, tmp_path, caplog):
    settings = ["stage=pretrain", "run.steps=1", "run.batch=1"]
    assert smoke(photos, tmp_path / "out", "--base", "builtin", settings=settings) == 0
    assert "nothing to do" not in caplog.text
    assert smoke(photos, tmp_path / "out", "--base", "builtin", "--resume", settings=settings) == 0
    assert "nothing to do: the checkpoint has 1 steps, run.steps is 1; raise it to continue" in caplog.text


def test_a_damaged_checkpoint_says_what_to_do(tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes(b"PK" + bytes(100))
    arguments = [CONFIGS / "smoke.toml", "--photos", tmp_path, "--out", tmp_path, "--resume"]
    assert train(*arguments) == 2
    said = capsys.readouterr().err
    assert "last.pt is damaged, " in said
    assert "download it again, or start a new run" in said


@pytest.mark.linux
def test_logs_that_cannot_be_written_are_one_line(photos, tmp_path, capfd):
    """Found before the work, or once the disk is full; the last checkpoint is kept."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tsdsr").write_text("")
    settings = ["stage=pretrain", "run.steps=3", "run.batch=1", "run.save_every=1"]
    assert smoke(photos, tmp_path / "out", "--base", tmp_path / "none", settings=settings) == 2
    assert "out/tsdsr/events could not be written: a part of its path is not a folder" in capfd.readouterr().err
    arguments = [CONFIGS / "smoke.toml", "--photos", photos, "--out", tmp_path / "full", "--device", "cpu", "--base", "builtin"]
    full = """
import sys
import tensorboard.summary.writer.record_writer as writer
from tsdsr_core.cli import main

def write(self, data, written=[]):
    written.append(data)
    if len(written) > 4:
        raise OSError(28, "No space left on device")

writer.RecordWriter.write = write
main(["train", *sys.argv[1:]])
"""
    more = ["--set", *SMALL, *settings, "run.steps=40"]
    command = [sys.executable, "-c", full, *map(str, arguments), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    errors = [line for line in done.stderr.splitlines() if not line.startswith(("step ", "left out"))]
    said = f"tsdsr train: error: the logs in {tmp_path / 'full' / 'tsdsr'} could not be written: no space left on the device"
    assert [error.partition(";")[0] for error in errors] == [said]
    assert read_checkpoint(tmp_path / "full" / "last.pt").step >= 1


def test_sides_beyond_the_positions_of_the_model_are_refused(tmp_path, capsys):
    """Of crops and of the evaluation set; and what no tensor can hold."""
    write_picture(tmp_path / "in" / "0.png", Picture(photo(600, 600)))
    settings = ["stage=pretrain", "run.steps=1", "run.batch=1"]
    assert smoke(tmp_path / "in", tmp_path / "out", "--base", "builtin", settings=[*settings, "data.crop=528"]) == 2
    assert "data.crop = 528: this model is trained and validated on at most 512 pixels a side" in capsys.readouterr().err
    for folder in ("hq", "lq-light"):
        write_picture(tmp_path / "set" / folder / "0.png", Picture(photo(600, 600)))
    more = ["--base", "builtin", "--validation", tmp_path / "set"]
    assert smoke(tmp_path / "in", tmp_path / "out", *more, settings=settings) == 2
    assert "longest side of --validation = 600: this model is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for name, value in (("data.crop", 3088), ("run.batch", 10**15), ("model.rank", 10**12)):
        assert train(CONFIGS / "smoke.toml", "--dry-run", "--set", "model.trained=lora", f"{name}={value}") == 2
        assert f"{name} = {value}: " in capsys.readouterr().err


def test_a_checkpoint_with_foreign_weights_is_one_sentence(published, photos, tmp_path, capsys):
    path = tmp_path / "out" / "last.pt"
    assert smoke(photos, path.parent, *lora_arguments(published), settings=[*LORA, "run.steps=1"]) == 0
    whole = torch.load(path, weights_only=True)
    tensor = next(iter(whole["average"].values()))
    for average, said in (
        ({**whole["average"], "foo": tensor}, "the weight 'foo'"), ({**whole["average"], 1: tensor}, "have no name"),
        ({}, "no weights of the transformer's LoRA"), ({"transformer": tensor}, "the weight 'transformer'"),
        ({**whole["average"], "x": tensor.to_sparse()}, "sparse, nested, quantised or empty"),
    ):  # fmt: skip
        torch.save({**whole, "average": average}, path)
        capsys.readouterr()
        assert main(["train", "export", str(path), "-o", str(tmp_path / "exported")]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "exported").exists()
