"""What another program in the same process has set as torch's default number type changes nothing, to the bit."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FLOATS = {
    "tensor", "as_tensor", "zeros", "ones", "full", "empty", "eye", "arange", "linspace", "logspace", "rand", "randn", "normal",
    "scalar_tensor", "hann_window", "fftfreq", "rfftfreq", "complex",
}  # fmt: skip
"""Functions of torch whose result has the default number type where none is named."""
OWN_PROCESS = ROOT / "tsdsr_core" / "train", ROOT / "tsdsr_core" / "cli"
MODULES = [path for folder in ("tsdsr_core", "nodes") for path in sorted((ROOT / folder).rglob("*.py"))]
SHARED = [path for path in MODULES if not any(path.is_relative_to(folder) for folder in OWN_PROCESS)]
"""Modules that may run in the process of another program."""
RESTORE = """
import sys, torch
from safetensors.torch import save_file
torch.set_default_dtype(getattr(torch, sys.argv[1]))
import tsdsr_core
from tsdsr_core.alpha import enlarge_alpha, spread_colours
from tsdsr_core.colour import METHODS
from tsdsr_core.weights import int8
from tsdsr_core.weights.prompt import PromptEmbeds

draw = torch.Generator().manual_seed(0)
image = torch.rand(1, 3, 21, 30, generator=draw, dtype=torch.float32)
alpha = torch.rand(1, 1, 21, 30, generator=draw, dtype=torch.float32).round()
matrix = torch.randn(64, 64, generator=draw, dtype=torch.float32)
found = {"alpha": enlarge_alpha(alpha, (84, 119)), "under": spread_colours(image, alpha), "rotated": int8.rotate(matrix)}
model = tsdsr_core.load("builtin", device=torch.device("cpu"), dtype=torch.float32)
for colour_fix in METHODS:
    found[colour_fix] = tsdsr_core.restore(image, model.model(), tsdsr_core.Options(process_size=0, colour_fix=colour_fix))
found["tiles"] = model.restore(torch.cat((image, image.flip(3))), scale=4, tile=16, tile_overlap=4, process_size=0)
tokens, pooled = (matrix[None], matrix[:1])
found["pruned"] = PromptEmbeds(tokens, pooled).pruned(5).tokens
save_file({name: value.contiguous() for name, value in found.items()}, sys.argv[2])
"""


@pytest.mark.parametrize("path", SHARED, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_new_tensor_has_its_number_type_named(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] == "torch":
            named = any(keyword.arg in ("dtype", None) for keyword in node.keywords)
            assert named or ast.unparse(node.func).split(".")[-1] not in FLOATS, f"line {node.lineno}: {ast.unparse(node)}"


def run(dtype: str, folder: Path) -> dict[str, torch.Tensor]:
    subprocess.run([sys.executable, "-c", RESTORE, dtype, folder / dtype], check=True, cwd=ROOT)
    return load_file(folder / dtype)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return run("float32", tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_default_number_type_changes_nothing(dtype, expected, tmp_path):
    for name, value in run(dtype, tmp_path).items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
