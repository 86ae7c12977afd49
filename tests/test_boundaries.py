"""The house rules: which module may import which, and how large files and functions grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "tsdsr_core"
NODES = ROOT / "nodes"
MODULES = sorted(CORE.rglob("*.py"))
HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server", "execution", "nodes"}
INFERENCE = {
    "geometry",
    "tile_plan",
    "tile_blend",
    "flow",
    "restore",
    "official",
    "colour",
    "lora",
    "prompt",
    "bundle",
    "eight_bit",
    "memory",
    "files",
    "vae_keys",
    "vae_mover",
    "vae_plan",
    "vae_program",
    "vae_tiled",
}
"""What a host application loads: none of it may need diffusers or the command line's libraries."""
MEASURES = {"metrics", "spectrum"}
"""What training measures itself with, too: no command line and no extras either."""
EXTRAS = {"diffusers", "accelerate", "peft", "transformers", "cv2", "tifffile", "tqdm", "pyiqa", "skimage"}


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, name) of every import in a file, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CORE)))
def test_arrows_run_down(path):
    for level, name in imports(path):
        top = name.split(".")[0]
        assert level or top not in HOST | {"tsdsr_core"}, f"{path} imports {name}"
        inside_train = "train" in path.relative_to(CORE).parts
        assert inside_train or not (level and top == "train"), f"inference imports training in {path}"
        if path.parent == CORE and path.stem in INFERENCE | MEASURES:
            assert top not in EXTRAS | ({"diffusers_models", "image_io", "cli", "commands"} if level else set()), (
                f"{path}: {name}"
            )
        if path.stem in ("tile_plan", "geometry", "vae_plan"):
            assert top != "torch", f"{path} is whole numbers only"


@pytest.mark.parametrize("path", sorted(NODES.rglob("*.py")), ids=lambda path: str(path.relative_to(NODES)))
def test_nodes_lean_on_the_core_and_touch_the_host_in_one_place(path):
    for level, name in imports(path):
        top = name.split(".")[0]
        assert level or top not in EXTRAS | {"tsdsr_core", "nodes"}, f"{path} imports {name}"
        assert not (level and name.startswith(("tsdsr_core.diffusers_models", "tsdsr_core.train", "tsdsr_core.commands"))), name
        in_host = path.parent == NODES / "host"
        assert level or top not in HOST - {"comfy_api"} or in_host, f"{path} imports {name}: that belongs into nodes/host"


@pytest.mark.parametrize("path", [*MODULES, *sorted(NODES.rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_the_core_of_the_method_loads_without_the_extras():
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r})); "
    code += "; ".join(f"import tsdsr_core.{name}" for name in sorted(INFERENCE | MEASURES))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_asks_no_device():
    names = [f"tsdsr_core.{name}" for name in sorted({*INFERENCE, *MEASURES, "cli", "device", "image_io", "jobs"})]
    code = (
        "import importlib, torch\n"
        "def asked(*_, **__): raise AssertionError('a device was asked at import')\n"
        "for part in (torch.cuda, torch.xpu, torch.backends.mps): part.is_available = asked\n"
        f"for name in {names!r}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
