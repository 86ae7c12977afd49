"""The house rules: which folder may import which, and how large files, functions and folders grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "tsdsr_core"
NODES = ROOT / "nodes"
MODULES = sorted(path for folder in (CORE, NODES) for path in folder.rglob("*.py"))
HOST = {
    "aiohttp",
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
}
BASE = {"checks", "colour", "errors", "flow", "image_size", "system"}
"""Modules at the top of the core, and ``system``, that every other one may use; they use each other alone."""
FOLDING = ("families", "sd3", "fold")
"""Needs diffusers, so that no node may import it."""
PIPELINE = {"alpha", "official", "pipeline"}
MAY_IMPORT = {
    "base": {"base"},
    "tiles": {"base", "tiles"},
    "vae": {"base", "vae"},
    "weights": {"base", "weights"},
    "images": {"base", "images"},
    "video": {"base", "video"},
    "metrics": {"base", "metrics", "weights"},
    "pipeline": {"base", "pipeline", "tiles"},
    "folding": {"base", "families"},
    "families": {"base", "families", "folding", "pipeline", "tiles", "vae", "weights"},
    "train": {"base", "images", "metrics", "pipeline", "families", "tiles", "train", "vae", "weights"},
    "cli": {"base", "cli", "families", "folding", "images", "metrics", "pipeline", "tiles", "train", "vae", "video", "weights"},
    "nodes": {"base", "families", "nodes", "pipeline", "tiles", "vae", "weights"},
    "public": {"base", "families", "images", "pipeline"},
}
"""The arrows between the folders; ``public`` is what ``tsdsr_core`` itself offers its users, and no part of it uses."""
PACKAGES = {
    "images": {"PIL", "cv2", "pillow_heif", "pillow_jxl", "tifffile"},
    "video": {"av"},
    "pipeline": {"PIL"},
    "families": {"diffusers"},
    "folding": {"diffusers"},
    "vae": {"triton"},
    "train": {"PIL", "accelerate", "diffusers", "peft", "pyiqa", "tensorboard", "tqdm", "transformers"},
    "cli": {"accelerate", "diffusers", "peft", "pyiqa", "tqdm", "transformers"},
    "nodes": {"comfy_api"},
}
"""What a folder may import beside Python's own library and ``EVERYWHERE``."""
EVERYWHERE = {"numpy", "psutil", "safetensors", "torch"}
"""Brought by ComfyUI and by the plain installation alike."""
EXTRAS = set().union(*PACKAGES.values()) - {"PIL", "comfy_api"}
WHOLE_NUMBERS = {CORE / "image_size.py", CORE / "tiles" / "plan.py", CORE / "vae" / "passes.py", CORE / "vae" / "plan.py"}
LIGHT = BASE | PIPELINE | {"families", "metrics", "tiles", "vae", "weights"}
"""What needs no extra: a host application loads it."""
OPTIONAL = {"tsdsr_core.families.sd3.fold", "tsdsr_core.vae.triton_norms"}
"""But for what is loaded only where it is used: folding needs diffusers, the norms' kernels Triton."""


def room(parts: tuple[str, ...]) -> str:
    """The room of a module by its path from the root, without suffix."""
    if parts[0] == "nodes":
        return "nodes"
    if parts[1:4] == FOLDING:
        return "folding"
    first = parts[1] if len(parts) > 1 else "__init__"
    if first in PIPELINE:
        return "pipeline"
    return {"__init__": "public", "__version__": "base", "__main__": "cli"}.get(first, "base" if first in BASE else first)


def imports(path: Path, root: Path = ROOT) -> list[tuple[str, ...]]:
    """The parts of every name that a file imports, also inside functions; those of the project from its root on."""
    package = path.relative_to(root).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            inside = (*above, *(node.module or "").split(".")) if node.module else above
            whole = node.module and inside != ("tsdsr_core",)
            names = [inside] if whole else [(*inside, alias.name) for alias in node.names]
            found += [("project", *name) if node.level else name for name in names]
    return found


def forbidden(path: Path, root: Path = ROOT) -> list[str]:
    """What a file imports against the rules."""
    here = room(path.relative_to(root).with_suffix("").parts)
    allowed = EVERYWHERE | PACKAGES.get(here, set()) | set(sys.stdlib_module_names)
    if path.parent == root / "nodes" / "host":
        allowed |= HOST
    wrong = []
    for name in imports(path, root):
        if name[0] == "project":
            if room(name[1:]) not in MAY_IMPORT[here]:
                wrong.append(f"{here} -> {room(name[1:])} ({'.'.join(name[1:])})")
        elif name[0] not in allowed:
            wrong.append(f"{here} -> {'.'.join(name)}")
        elif name[0] == "torch" and path in WHOLE_NUMBERS:
            wrong.append(f"{path.stem} -> torch")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_down(path):
    assert forbidden(path) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("tsdsr_core/flow.py", "from .pipeline import restore"),
        ("tsdsr_core/tiles/plan.py", "from ..pipeline import Options"),
        ("tsdsr_core/vae/plan.py", "from ..weights.lora import Lora"),
        ("tsdsr_core/weights/lora.py", "import diffusers"),
        ("tsdsr_core/weights/lora.py", "from ..families import FAMILIES"),
        ("tsdsr_core/images/files.py", "from ..families.load import load"),
        ("tsdsr_core/images/jobs.py", "from ..video.formats import is_video"),
        ("tsdsr_core/video/reading.py", "from ..pipeline import restore"),
        ("tsdsr_core/cli/upscale.py", "import av"),
        ("tsdsr_core/metrics/niqe.py", "import transformers"),
        ("tsdsr_core/pipeline.py", "from .families import load"),
        ("tsdsr_core/pipeline.py", "import comfy.sd"),
        ("tsdsr_core/pipeline.py", "from tsdsr_core.colour import wavelet"),
        ("tsdsr_core/families/load.py", "from ..train.trainers import Trainer"),
        ("tsdsr_core/train/loop.py", "from ..cli import main"),
        ("nodes/upscale.py", "from ..tsdsr_core.families.sd3.fold import fold"),
        ("nodes/upscale.py", "from ..tsdsr_core import load"),
        ("nodes/upscale.py", "from ..tsdsr_core.images.files import read_picture"),
        ("nodes/upscale.py", "from ..tsdsr_core.train.config import Config"),
        ("nodes/upscale.py", "import comfy.sd"),
        ("nodes/upscale.py", "import diffusers"),
        ("nodes/host/vae.py", "import tsdsr_core.vae"),
    ],
)
def test_forbidden_arrows_are_found(place, line, tmp_path):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert forbidden(path, tmp_path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda path: str(path.relative_to(ROOT)))
def test_folders_stay_small_and_say_what_they_hold(folder):
    modules = [path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")]
    assert len(modules) <= 13
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def light_modules() -> list[str]:
    found = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.is_relative_to(CORE)]
    return [name for name in found if name.split(".")[1] in LIGHT and not name.endswith("__init__") and name not in OPTIONAL]


def test_the_core_of_the_method_loads_without_the_extras():
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r})); import importlib; "
    code += f"[importlib.import_module(name) for name in {light_modules()!r}]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_asks_no_device():
    code = (
        "import importlib, torch\n"
        "def asked(*_, **__): raise AssertionError('a device was asked at import')\n"
        "for part in (torch.cuda, torch.xpu, torch.backends.mps): part.is_available = asked\n"
        f"for name in {[*light_modules(), 'tsdsr_core.cli']!r}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_names_load_on_first_use_alone():
    code = (
        "import sys, tsdsr_core\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
        "tsdsr_core.restore, tsdsr_core.read_picture, tsdsr_core.read_bundle\n"
        "assert 'diffusers' not in sys.modules\n"
        "assert all(callable(getattr(tsdsr_core, name)) for name in tsdsr_core.__all__)\n"
        "assert not hasattr(tsdsr_core, 'restorer')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
