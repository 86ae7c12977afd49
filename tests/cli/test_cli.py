"""The command line as a person uses it, on real files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tsdsr_core.cli import arguments as shared_arguments
from tsdsr_core.cli import main
from tsdsr_core.cli import upscale as upscale_command
from tsdsr_core.families import restorer
from tsdsr_core.families.bundle import read_bundle
from tsdsr_core.families.restorer import Restorer
from tsdsr_core.images.files import Picture, read_picture, write_picture
from tsdsr_core.vae import execute as vae_execute

from ..support import oracle
from ..support.tiny import Published, disc, photo

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "in"
    for index, (height, width) in enumerate([(24, 30), (17, 40), (32, 32)]):
        write_picture(folder / f"{index}.png", Picture(photo(height, width, index)))
    return folder


def official(published: Published) -> list[str]:
    folders = published.sd3, published.loras, published.embeddings
    return [text for pair in zip(("--model", "--lora-dir", "--embedding-dir"), map(str, folders), strict=True) for text in pair]


def upscale(*arguments) -> int:
    return main(["upscale", *map(str, arguments)])


def test_one_picture_becomes_one_file(pictures, tmp_path, capsys):
    result = tmp_path / "new" / "folder" / "out.png"
    assert upscale(pictures / "0.png", "-o", result, "--scale", "2.5") == 0
    assert Image.open(result).size == (75, 60)
    assert "75x60" in capsys.readouterr().out


def test_a_folder_becomes_a_folder_and_the_bad_file_is_reported_last(pictures, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"\x89PNG broken")
    (pictures / "notes.txt").write_text("not a picture")
    assert upscale(pictures, "-o", tmp_path / "out", "--scale", "1") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png"]
    assert "bad.png" in capsys.readouterr().err.splitlines()[-1]


def test_json_reports_every_file(pictures, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"")
    assert upscale(pictures, "-o", tmp_path / "out", "--scale", "1", "--json") == 1
    files = json.loads(capsys.readouterr().out)["files"]
    assert [file["status"] for file in files] == ["done", "done", "done", "failed"]
    assert files[0]["size"] == [30, 24]
    assert "bad.png" in files[3]["error"]


@pytest.mark.rounding
@pytest.mark.parametrize("fix", ["wavelet", "adain", "none"])
def test_the_official_recipe_writes_the_published_picture(fix, published, tmp_path):
    low = 0.1 * photo(130, 136) + 0.4 if fix == "adain" else photo(130, 136)
    write_picture(tmp_path / "in.png", Picture(low))
    low = read_picture(tmp_path / "in.png").rgb
    arguments = ["--recipe", "official", "--color", fix, "-o", tmp_path / "out.png"]
    assert upscale(tmp_path / "in.png", *official(published), *arguments) == 0
    ours = np.array(Image.open(tmp_path / "out.png"))
    expected = oracle.restore_picture(published, low, 4, fix)
    assert np.abs(ours.astype(int) - expected).max() <= 1


def test_bundles_of_both_kinds_restore_like_the_folders(published, pictures, tmp_path):
    assert main(["bundle", *official(published)[2:], "-o", str(tmp_path / "lora.safetensors"), "--dtype", "fp32"]) == 0
    assert main(["bundle", "--merge", *official(published), "-o", str(tmp_path / "all.safetensors"), "--dtype", "fp32"]) == 0
    results = []
    for index, model in enumerate(
        [
            official(published),
            ["--model", published.sd3, "--lora-dir", tmp_path / "lora.safetensors"],
            ["--model", tmp_path / "all.safetensors"],
        ]
    ):
        result = tmp_path / f"{index}.png"
        assert upscale(pictures / "0.png", *model, "-o", result, "--scale", "1.5") == 0
        results.append(np.array(Image.open(result)).astype(int))
    assert np.abs(results[0] - results[1]).max() <= 1
    assert np.abs(results[0] - results[2]).max() <= 1


def test_bundle_says_what_is_missing_and_stores_notes(published, tmp_path, capsys):
    out = str(tmp_path / "b.safetensors")
    loras = official(published)[2:]
    for arguments, message in (
        (["-o", out], "expected --lora-dir"),
        (["--merge", *loras, "-o", out], "--merge needs --model"),
        ([*loras, "-o", str(tmp_path / "b.bin")], "expected a name that ends in .safetensors"),
        ([*loras, "-o", out, "--note", "oops"], "KEY=TEXT"),
        ([*loras, "-o", out, "--lora-strength", "0.5"], "strengths"),
    ):
        assert main(["bundle", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["bundle", *loras, "-o", out, "--note", "license=NTU S-Lab"]) == 0
    assert read_bundle(Path(out)).notes == {"license": "NTU S-Lab"}
    assert main(["bundle", *loras, "-o", out]) == 2
    assert "--existing overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{in}/none.png", "-o", "{out}"], "no such file"),
        (["{in}/0.png", "-o", "{out}", "--scale", "0.5"], "scale 0.5"),
        (["{in}/0.png", "-o", "{out}", "--tile", "63"], "tile 63"),
        (["{in}/0.png", "-o", "{out}", "--tile", "512"], "tile 512"),
        (["{in}/0.png", "-o", "{out}", "--tile-overlap", "64"], "tile overlap 64"),
        (["{in}/0.png", "-o", "{out}", "--tile-batch", "0"], "tile batch 0"),
        (["{in}/0.png", "-o", "{out}", "--strength", "3"], "strength 3"),
        (["{in}/0.png", "-o", "{out}", "--vae-attention-window", "8"], "VAE attention window 8: expected a whole number"),
        (["{in}/0.png", "-o", "{out}", "--vae-tile", "8"], "VAE tile 8: expected at least 16"),
        (["{in}/0.png", "-o", "{out}", "--prompt-tokens", "0"], "0 prompt tokens"),
        (["{in}/0.png", "-o", "{out}", "--recipe", "official", "--scale", "1.5"], "whole number"),
        (["{in}/0.png", "-o", "{out}", "--device", "abacus"], "abacus"),
        (["{in}/0.png", "-o", "{out}", "--memory", "0"], "--memory 0: expected a number of GB above 0"),
        (["{in}/0.png", "-o", "{out}", "--memory", "4", "--device", "cpu"], "--memory 4 applies to GPUs only"),
        (["{in}/0.png", "-o", "{out}", "--model", "{in}/no.safetensors"], "no.safetensors"),
        (["{in}/0.png", "-o", "{out}", "--model", "{in}/0.png"], "not a safetensors file"),
        (["{in}/0.png", "-o", "{out}", "--model", "{in}"], "in is not a model folder"),
        (["{in}/0.png", "-o", "{out}", "--lora-dir", "{in}"], "need a model folder"),
        (["{in}/0.png", "{in}/1.png", "-o", "{out}/x.png"], "expected a folder"),
        (["{in}", "-o", "{in}"], "overwrite an input"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line(arguments, message, pictures, tmp_path, capsys):
    arguments = [text.replace("{in}", str(pictures)).replace("{out}", str(tmp_path / "out")) for text in arguments]
    assert upscale(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["upscale"], ["upscale", "x.png"], ["fly"], ["upscale", "x", "-o", "y", "--color", "red"]]
)
def test_argparse_ends_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_existing_results_are_refused_skipped_or_replaced(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "0.png").write_bytes(b"mine")
    assert upscale(pictures, "-o", out, "--scale", "1") == 2
    assert "--existing overwrite" in capsys.readouterr().err
    assert upscale(pictures, "-o", out, "--scale", "1", "--existing", "skip") == 0
    assert (out / "0.png").read_bytes() == b"mine"
    assert (out / "2.png").exists()
    assert upscale(pictures, "-o", out, "--scale", "1", "--existing", "overwrite") == 0
    assert Image.open(out / "0.png").size == (30, 24)


def test_running_out_of_memory_is_reported_with_advice(pictures, tmp_path, capsys, monkeypatch):
    def decode(self, z):
        raise torch.OutOfMemoryError("tried to allocate 64 GiB")

    monkeypatch.setattr(Restorer, "decode", decode)
    assert upscale(pictures / "0.png", "-o", tmp_path / "x.png") == 1
    assert "0.png: out of memory; try a smaller --scale" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_alpha_is_enlarged_and_reattached(tmp_path):
    alpha = photo(20, 26, 9)[:, :1]
    write_picture(tmp_path / "a.png", Picture(photo(20, 26), alpha=alpha))
    assert upscale(tmp_path / "a.png", "-o", tmp_path / "b.png", "--scale", "2") == 0
    result = Image.open(tmp_path / "b.png")
    assert (result.mode, result.size) == ("RGBA", (52, 40))
    shrunk = np.array(result.getchannel("A").resize((26, 20), Image.Resampling.BOX)) / 255
    assert np.abs(shrunk - alpha[0, 0].numpy()).mean() < 0.02
    assert upscale(tmp_path / "a.png", "-o", tmp_path / "b.jpg") == 1
    assert not (tmp_path / "b.jpg").exists()


@pytest.mark.parametrize("soft", [0, 1])
def test_a_transparent_edge_has_no_fringe(soft, tmp_path):
    """White over hidden black, judged over white, grey and black."""
    rgb, alpha = disc(48, soft)
    write_picture(tmp_path / "a.png", Picture(rgb, alpha=alpha))
    assert upscale(tmp_path / "a.png", "-o", tmp_path / "b.png") == 0
    result = Image.open(tmp_path / "b.png")
    for background in (255, 128, 0):
        found, wanted = (np.array(over(image, background)).astype(int) for image in (result, white_like(result)))
        assert np.abs(found - wanted).max() <= 5, background
    assert np.array(over(result, 255)).min() >= 250


def over(image: Image.Image, background: int) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, (background,) * 3 + (255,)), image)


def white_like(image: Image.Image) -> Image.Image:
    """All white, with the alpha of ``image``."""
    white = Image.new("RGBA", image.size, "white")
    white.putalpha(image.getchannel("A"))
    return white


def test_greyscale_stays_grey(tmp_path):
    Image.fromarray((photo(20, 20)[0, 0].numpy() * 255).astype(np.uint8)).save(tmp_path / "g.png")
    assert upscale(tmp_path / "g.png", "-o", tmp_path / "h.png", "--scale", "2") == 0
    assert Image.open(tmp_path / "h.png").mode == "L"


def run(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **options)


@pytest.mark.posix
def test_an_interrupt_leaves_whole_files_only(tmp_path):
    for index in range(30):
        write_picture(tmp_path / "in" / f"{index:02}.png", Picture(photo(100, 100, index)))
    process = run(
        "-m", "tsdsr_core", "upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background jobs ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("0*.png")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().strip().endswith("interrupted")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert 0 < len(names) < 30
    for name in names:
        assert Image.open(tmp_path / "out" / name).size == (400, 400), "a partial file was left"


@pytest.mark.posix
@pytest.mark.parametrize(("processes", "count"), [(2, 3), (3, 2)])
def test_processes_share_a_folder_out(processes, count, pictures, tmp_path):
    for path in sorted(pictures.iterdir())[count:]:
        path.unlink()
    process = run(
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "tsdsr_core", "upscale",
        str(pictures), "-o", str(tmp_path / "out"), "--scale", "1", "--json", stdout=subprocess.PIPE,
    )  # fmt: skip
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    reports = [line for line in output.decode().splitlines() if line.startswith('{"files"')]
    assert len(reports) == 1, "one process reports for all"
    files = json.loads(reports[0])["files"]
    assert [Path(file["output"]).name for file in files] == [f"{index}.png" for index in range(count)], "each file once"
    assert {file["status"] for file in files} == {"done"}
    assert len(list((tmp_path / "out").iterdir())) == count


def result_of(path: Path, *arguments) -> np.ndarray:
    assert upscale(*arguments, "-o", path, "--existing", "overwrite") == 0
    return np.array(Image.open(path)).astype(int)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--strength", "0"], ["--strength", "1"]),
        (["--posterior", "mode"], ["--posterior", "sample"]),
        (["--posterior", "sample", "--seed", "1"], ["--posterior", "sample", "--seed", "2"]),
        (["--tile", "32"], ["--tile", "48"]),
        (["--tile", "32", "--tile-overlap", "2"], ["--tile", "32", "--tile-overlap", "16"]),
        (["--lora-strength", "0"], ["--lora-strength", "1"]),
        (["--vae-lora-strength", "0"], ["--vae-lora-strength", "1"]),
        (["--dtype", "fp32"], ["--dtype", "bf16"]),
        (["--color", "lab"], ["--color", "adain"]),
        (["--strength", "2", "--prompt-tokens", "1"], ["--strength", "2", "--prompt-tokens", "auto"]),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_every_setting_changes_the_picture(one, other, published, pictures, tmp_path):
    arguments = [pictures / "0.png", *official(published), "--scale", "1"]
    first = result_of(tmp_path / "a.png", *arguments, *one)
    assert np.array_equal(result_of(tmp_path / "b.png", *arguments, *one), first), "the same again gives the same"
    assert not np.array_equal(result_of(tmp_path / "c.png", *arguments, *other), first)


def test_tiles_of_the_vae_change_nothing(published, pictures, tmp_path, monkeypatch):
    tiles, run = [], vae_execute.run
    monkeypatch.setattr(vae_execute, "run", lambda *given: tiles.append(given[2].tiles) or run(*given))
    arguments = [pictures / "0.png", *official(published), "--scale", "1"]
    whole = result_of(tmp_path / "a.png", *arguments)
    assert np.abs(result_of(tmp_path / "b.png", *arguments, "--vae-tile", "16") - whole).max() <= 1, "rounding to 8 bit"
    assert min(tiles[2:]) > 4 * max(tiles[:2])


def test_a_window_of_the_attention_that_holds_the_image_changes_nothing(published, pictures, tmp_path):
    arguments = [pictures / "0.png", *official(published), "--scale", "1"]
    whole = result_of(tmp_path / "a.png", *arguments)
    window = "--vae-attention-window"
    assert np.abs(result_of(tmp_path / "b.png", *arguments, window, "64") - whole).max() <= 1, "rounding to 8 bit"
    assert (result_of(tmp_path / "c.png", *arguments, window, "16") != whole).any()


def test_a_picture_beyond_the_memory_is_refused_and_the_others_are_done(pictures, tmp_path, capsys, monkeypatch):
    picture = photo(64, 96)
    write_picture(pictures / "large.png", Picture(picture))
    monkeypatch.setattr(restorer, "free_ram", lambda: 2 * 10**6)
    assert upscale(pictures, "-o", tmp_path / "out", "--scale", "1") == 1
    assert "large.png: the VAE needs" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_the_memory_that_a_person_allows_is_planned_with(published, pictures, tmp_path, monkeypatch):
    """On a device with much more; the maps then lie in host memory, and the picture stays what it is."""
    plans, asked, run = [], [], vae_execute.run
    arguments = [pictures / "0.png", *official(published), "--scale", "1", "--tile", "64"]
    whole = result_of(tmp_path / "a.png", *arguments)
    monkeypatch.setattr(vae_execute, "run", lambda *given: plans.append(given[2]) or run(*given))
    monkeypatch.setattr(upscale_command, "memory_limit", lambda options, device: int(options.memory * 1e9))
    monkeypatch.setattr(shared_arguments, "held_memory", lambda device: 10**6)
    monkeypatch.setattr(restorer, "free_memory", lambda device, limit: asked.append(limit) or min(10**9, limit - 10**6))
    for memory, place in (("0.5", "device"), ("0.002", "host")):
        result = result_of(tmp_path / f"{place}.png", *arguments, "--memory", memory)
        assert np.abs(result - whole).max() <= 1, "rounding to 8 bit"
        assert {plan.maps for plan in plans} == {place}
        assert set(asked) == {int(float(memory) * 1e9)}
        plans.clear()
        asked.clear()


def test_a_limit_below_the_weights_is_named(published, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(upscale_command, "memory_limit", lambda options, device: 4 * 10**9)
    monkeypatch.setattr(shared_arguments, "held_memory", lambda device: 4170 * 10**6)
    assert upscale(pictures / "0.png", "-o", tmp_path / "x.png", *official(published), "--memory", "4") == 2
    assert "--memory 4: the weights alone take 4.2 GB" in capsys.readouterr().err


def test_the_tile_batch_is_how_many_tiles_run_at_once(published, pictures, tmp_path, monkeypatch):
    sizes, velocity = [], Restorer.velocity
    monkeypatch.setattr(Restorer, "velocity", lambda self, z: sizes.append(len(z)) or velocity(self, z))
    arguments = [pictures / "2.png", *official(published), "--scale", "1", "--tile", "32", "--tile-overlap", "0"]
    result_of(tmp_path / "a.png", *arguments, "--tile-batch", "3")
    assert sizes == [2, 2]


def test_a_seed_and_strengths_that_cannot_be_are_refused(published, pictures, tmp_path, capsys):
    for arguments in (["--seed", "-1"], ["--seed", str(2**64)], ["--lora-strength", "nan"], ["--vae-lora-strength", "0.5"]):
        assert upscale(pictures / "0.png", "-o", tmp_path / "x.png", *arguments) == 2
        error = capsys.readouterr().err
        assert arguments[0] in error or "LoRA strengths" in error
    assert not (tmp_path / "x.png").exists()


def test_nothing_to_do_loads_no_model(pictures, tmp_path, capsys):
    (tmp_path / "x.png").touch()
    arguments = ["-o", tmp_path / "x.png", "--existing", "skip", "--model", tmp_path / "none.safetensors"]
    assert upscale(pictures / "0.png", *arguments) == 0
    assert "skipped" in capsys.readouterr().out


def test_results_too_large_for_their_format_are_refused_before_the_work(tmp_path, capsys, monkeypatch):
    write_picture(tmp_path / "long.png", Picture(photo(1, 2000)))
    monkeypatch.setattr(Restorer, "decode", None)
    assert upscale(tmp_path / "long.png", "-o", tmp_path / "x.webp", "--scale", "16") == 1
    assert "WEBP supports at most 16383 pixels a side" in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_no_traceback(published, pictures, capsys):
    target = pictures / "0.png" / "b.safetensors"  # below a file
    assert main(["bundle", *official(published)[2:], "-o", str(target)]) == 2
    assert "0.png" in capsys.readouterr().err


def test_info_tells_what_files_are(published, tmp_path, capsys):
    model = ["--model", str(published.sd3)]
    bundle = tmp_path / "b.safetensors"
    assert main(["bundle", *official(published)[2:], "-o", str(bundle)]) == 0
    capsys.readouterr()
    for path, extra, kind, fits in (
        (published.loras / "transformer.safetensors", model, "LoRA for the transformer", True),
        (published.loras / "vae.safetensors", model, "LoRA for the vae", True),
        (published.loras / "vae.safetensors", [], "LoRA for the vae", False),
        (published.loras, model, "LoRA for the transformer and the vae", True),
        (published.embeddings, [], "prompt embeddings", False),
        (published.embeddings / "pool_embeds.pt", [], "prompt embeddings", False),
        (published.sd3, [], "model folder in diffusers' layout", False),
        (bundle, model, "lora bundle", True),
        (ROOT / "tsdsr_core" / "assets" / "builtin.safetensors", [], "merged bundle", True),
    ):
        code = main(["info", str(path), *extra, "--json"])
        facts = json.loads(capsys.readouterr().out)
        assert (facts["kind"], facts["fits"], code) == (kind, fits, 0 if fits else 1), path
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for name, other in (("vae", "transformer"), ("transformer", "vae")):
        shutil.copy(published.loras / f"{name}.safetensors", swapped / f"{other}.safetensors")
    assert main(["info", str(swapped)]) == 2
    assert "swapped?" in capsys.readouterr().err
    (swapped / "vae.safetensors").unlink()
    shutil.copy(published.loras / "transformer.safetensors", swapped)
    assert main(["info", str(swapped)]) == 2
    assert "vae.safetensors" in capsys.readouterr().err
    shutil.copytree(published.sd3, tmp_path / "empty")
    for weights in (tmp_path / "empty").rglob("*.safetensors"):
        weights.unlink()
    assert main(["info", str(tmp_path / "empty")]) == 2
    assert "has no weights" in capsys.readouterr().err
    assert main(["info", str(published.loras / "vae.safetensors"), *model]) == 0
    assert "31 modules of rank 4" in capsys.readouterr().out
    for path in (tmp_path, ROOT / "pyproject.toml", tmp_path / "none"):
        assert main(["info", str(path)]) == 2
    capsys.readouterr()
    for path in (published.embeddings, published.sd3, ROOT / "tsdsr_core" / "assets" / "builtin.safetensors"):
        assert main(["info", str(path), "--model", str(tmp_path / "none")]) == 2
        assert f"--model {tmp_path / 'none'} is for LoRAs, but {path} is a " in capsys.readouterr().err


def test_python_dash_m_is_the_same_command():
    process = run("-m", "tsdsr_core", "--version", stdout=subprocess.PIPE)
    assert process.communicate(timeout=60)[0].decode().startswith("tsdsr 0.")


def test_a_bug_is_no_mistake_of_the_user(pictures, tmp_path, capsys, monkeypatch):
    """It shows where it is, costs one image alone, and the others are restored; outside of images it ends the command."""
    spread = upscale_command.spread_colours

    def broken(rgb, alpha):
        if rgb.shape[-1] == 40:
            raise ValueError("a bug")
        return spread(rgb, alpha)

    monkeypatch.setattr(upscale_command, "spread_colours", broken)
    assert upscale(pictures, "-o", tmp_path / "out", "--scale", "1") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "1.png: internal error, please report it with the lines above: ValueError('a bug')" in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]
    monkeypatch.setattr(upscale_command, "collect", lambda inputs: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        upscale(pictures, "-o", tmp_path / "out")


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_debug_shows_where_an_error_arose(debug, pictures, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"\x89PNG broken")
    assert main(["upscale", str(pictures), "-o", str(tmp_path / "out"), "--scale", "1", *debug]) == 1
    assert ("Traceback" in capsys.readouterr().err) == bool(debug)
    assert main(["info", str(pictures / "no.safetensors"), *debug]) == 2
    assert ("Traceback" in capsys.readouterr().err) == bool(debug)
    assert main(["train", *debug, str(pictures / "no.toml"), "--photos", "x", "--out", "y"]) == 2
    assert ("Traceback" in capsys.readouterr().err) == bool(debug)


@pytest.mark.parametrize(
    ("given", "command", "reason"),
    [
        (
            ["upscale", "a.png", "-o", "b.png", "--sclae", "2"],
            "upscale",
            "unrecognized arguments: --sclae 2; did you mean --scale?",
        ),
        (["eval", "--lq", "a", "--hq", "b", "--metric=niqe", "c"], "eval", "unrecognized arguments: c"),
        (["train", "evalset", "a", "-o", "b", "--preset", "light", "--zzz"], "train evalset", "unrecognized arguments: --zzz"),
    ],
)
def test_a_misspelt_option_gets_the_usage_of_its_command_and_the_right_name(given, command, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    output = capsys.readouterr().err
    assert output.startswith(f"usage: tsdsr {command} ")
    assert output.endswith(f"tsdsr {command}: error: {reason}\n")
