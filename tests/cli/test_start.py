"""``tsdsr upscale`` starts without the packages that the built-in model does not need."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tsdsr_core.cli import arguments, main
from tsdsr_core.system.imports import hidden

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib.util, json, sys
{before}
from tsdsr_core.cli import main
code = main()
left_out = ("accelerate", "av", "peft", "scipy", "tensorboard", "torch._dynamo", "transformers")
loaded = [name for name in left_out if name in sys.modules]
found = [name for name in ("peft", "transformers", "torch.distributed.fsdp") if importlib.util.find_spec(name)]
print(json.dumps({{"code": code, "loaded": loaded, "found": found}}))
"""


def start(tmp_path: Path, *given: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command on a small picture in a process of its own, as from a shell."""
    Image.new("RGB", (24, 16), (90, 120, 60)).save(tmp_path / "in.png")
    command = ["upscale", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png"), "--device", "cpu", *given]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before), *command], capture_output=True, text=True, cwd=ROOT
    )  # fmt: skip


def test_the_built_in_model_loads_nothing_that_it_does_not_need(tmp_path):
    for name in ("peft", "scipy", "transformers"):
        pytest.importorskip(name, reason="what is not installed is not loaded in any case")
    ended = start(tmp_path)
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report == {"code": 0, "loaded": [], "found": ["peft", "transformers", "torch.distributed.fsdp"]}, ended.stderr
    assert ended.stderr == "", "nor does anything complain"
    assert Image.open(tmp_path / "out.png").size == (96, 64)


def test_a_missing_package_is_named_when_it_is_needed(tmp_path):
    ended = start(tmp_path, before="sys.modules['diffusers'] = None")
    assert json.loads(ended.stdout.splitlines()[-1])["code"] == 2
    assert ended.stderr.startswith("tsdsr upscale: error: diffusers is not installed: pip install -e '.[cli]'")
    assert ended.stderr.count("\n") == 1


def broken(folder: Path, name: str, error: str) -> str:
    """The code that finds a package which is installed in ``folder`` and does not load."""
    (folder / f"{name}.py").write_text(f"raise {error}")
    information = folder / f"{name}-0.28.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.28.0\n")
    return f"sys.path.insert(0, {str(folder)!r})"


NO_OPERATOR = "RuntimeError('operator torchvision::nms does not exist')"
"""What torchvision for another build of torch raises."""


def test_a_torchvision_that_does_not_load_is_not_needed(tmp_path):
    """As after installing pyiqa beside a PyTorch for the CPU; diffusers and transformers import torchvision if it is there."""
    before = broken(tmp_path, "torchvision", NO_OPERATOR)
    ended = start(tmp_path, before=before)
    assert json.loads(ended.stdout.splitlines()[-1])["code"] == 0, ended.stderr
    program = (
        f"import sys\n{before}\nfrom tsdsr_core.cli import main\nassert main() == 0\n"
        "import diffusers.loaders.peft, transformers.image_utils, transformers.modeling_utils"
    )
    Image.new("RGB", (512, 512)).save(tmp_path / "photo.png")
    given = ["evalset", str(tmp_path / "photo.png"), "--out", str(tmp_path / "set")]
    subprocess.run([sys.executable, "-c", program, "train", *given], check=True, cwd=ROOT)


def test_pyiqa_says_what_its_torchvision_needs(tmp_path):
    """Where torchvision is needed, it is imported, and its error explained."""
    before = broken(tmp_path, "torchvision", NO_OPERATOR)
    (tmp_path / "pyiqa.py").write_text("import torchvision")
    Image.new("RGB", (24, 16)).save(tmp_path / "in.png")
    program = f"import sys\n{before}\nfrom tsdsr_core.cli import main\nsys.exit(main())"
    given = ["eval", "--lq", str(tmp_path), "--hq", str(tmp_path), "--metrics", "musiq"]
    ended = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert "it does not load: operator torchvision::nms does not exist; torch and torchvision must be" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["upscale", "in.png", "-o", "out.png"], ["train", "--help"]])
@pytest.mark.parametrize("error", ["ImportError('no such name')", "RuntimeError('Failed to import it: no such name')"])
def test_a_package_that_does_not_load_is_one_line(command, error, tmp_path):
    before = broken(tmp_path, "diffusers", error)
    Image.new("RGB", (24, 16)).save(tmp_path / "in.png")
    program = f"import sys\n{before}\nfrom tsdsr_core.cli import main\nsys.exit(main())"
    given = [str(tmp_path / part) if part.endswith(".png") else part for part in command]
    ended = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"tsdsr {command[0]}: error: an installed package does not load (")
    assert "no such name). To install versions that fit each other: pip install" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(("alone", "loaded"), [(True, True), (False, False), (False, True)])
def test_a_program_that_goes_on_keeps_all_packages(alone, loaded, monkeypatch):
    """The program may use diffusers with peft next."""
    monkeypatch.setitem(sys.modules, "diffusers", sys) if loaded else monkeypatch.delitem(
        sys.modules, "diffusers", raising=False
    )
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    with arguments._quickly(argparse.Namespace(alone=alone)):
        assert "peft" not in sys.modules


def test_the_compiler_that_was_left_out_still_works():
    """Also where something needs more of it than its marks while it is left out."""
    code = (
        "import sys, torch\n"
        "from tsdsr_core.system.imports import without_compiler\n"
        "with without_compiler():\n"
        "    marked = torch.compiler.disable(lambda x: x + 1)\n"
        "    assert 'torch._dynamo.eval_frame' not in sys.modules\n"
        "assert torch.compile(marked, backend='eager')(torch.ones(1)) == 2\n"
        "assert torch._dynamo.__file__ and 'torch._dynamo.eval_frame' in sys.modules\n"
        "with without_compiler():\n"
        "    assert sys.modules['torch._dynamo'].__file__, 'what is loaded stays'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    code = (
        "import sys, torch\n"
        "from tsdsr_core.system.imports import without_compiler\n"
        "with without_compiler():\n"
        "    assert torch._dynamo.config.cache_size_limit\n"
        "    assert sys.modules['torch._dynamo'].__file__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_hidden_packages_are_found_again(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with hidden("colorsys", "json"):
        assert sys.modules["json"] is json, "what is loaded stays"
        with pytest.raises(ModuleNotFoundError, match="colorsys"):
            import colorsys
    import colorsys

    assert colorsys.rgb_to_hsv(1, 1, 1) == (0, 0, 1)


@pytest.mark.parametrize("command", ["train", "train run", "train prepare", "train evalset", "train export", "bench"])
def test_help_needs_no_package_of_the_extras(command):
    program = (
        "import sys\n"
        "for name in ('peft', 'tensorboard', 'transformers'): sys.modules[name] = None\n"
        "from tsdsr_core.cli import main\n"
        "main(sys.argv[1:])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *command.split(), "--help"], capture_output=True, text=True, cwd=ROOT
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"usage: tsdsr {command}")


@pytest.mark.parametrize("command", ["upscale", "bundle", "info", "eval", "bench", "perceptual-weights", "train prepare"])
def test_help_is_plain_text(command, capsys):
    """Sentences with an end, no markup, and no default that says nothing."""
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    description = shown.split("\n\n")[1]
    assert description.rstrip().endswith(".")
    assert description[0].isupper()
    for said in ("``", "default: None", "default: []", "default: False", "(default: )"):
        assert said not in shown
