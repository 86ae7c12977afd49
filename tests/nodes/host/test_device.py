"""The nodes on a CUDA device without data, in a real host's Python: every tensor is where it has to be."""

import subprocess

import pytest

from ...comfyui import host as host_module


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What ``tests/comfyui/fake_cuda.py`` prints."""
    found = host_module.find()
    if found is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, and COMFYUI_PYTHON where it has no .venv")
    folder, python = found
    script = host_module.ROOT / "tests" / "comfyui" / "fake_cuda.py"
    done = subprocess.run(
        [python, script, host_module.ROOT], cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_all_nodes_keep_their_tensors_together(said):
    """With pictures in host memory between nodes, as usual, and on the device, as with ``--gpu-only``."""
    expected = []
    for place in ("cpu", "cuda:0"):
        expected += ["loads on cuda:0 cuda:0", *(f"{name} on {place}" for name in ("encoded", "stepped", "decoded"))]
        expected += [f"upscaled on {place} (1, 80, 112, 3)", f"fixed on {place}"] * 2
    assert said[: len(expected)] == expected
    astray = next(line for line in said if line.startswith("astray:"))
    assert "two devices" in astray or "two different devices" in astray, "a tensor astray is found"


def test_pictures_are_worked_on_beside_the_model(said):
    """Where they are resized, where the colour fix filters, and where the result is; by the CPU where there is no room."""
    assert [line.removeprefix("pictures ") for line in said if line.startswith("pictures")] == [
        "upscaled ['cuda'] ['cuda'] cpu",
        "fixed ['cuda'] ['cuda'] cpu",
        "out of memory ['cpu', 'cuda'] ['cpu'] cpu",
        "fixed where there is no room ['cpu'] ['cpu'] cpu",
    ]


def test_attention_follows_the_hosts_choice(said):
    """On the CPU it is known; of other devices than NVIDIA's, torch's kernel is taken to keep the scores."""
    assert [line for line in said if line.startswith("attention")] == [
        "attention True cuda 13.0 fused",
        "attention True cuda None scored",
        "attention True xpu None scored",
        "attention True cpu None fused",
        "attention False cuda 13.0 streamed",
        "attention False cuda None streamed",
        "attention False xpu None streamed",
        "attention False cpu None fused",
    ]


def test_the_host_is_asked_what_running_out_is(said):
    """By its own test, and by its exception where it is too old to have one; and we know other words."""
    lines = [line.removeprefix("out of memory ") for line in said if line.startswith("out of memory")]
    assert lines == ["True True", "True True", "True False", "False False"]


def test_the_host_gives_back_what_it_keeps_where_memory_is_short(said):
    """Nothing where there is enough; then what is cached and, where that is too little, what is pinned."""
    assert "free [3000000000, 5000000000, 8000000000]" in said
