"""The part of ``tsdsr bench --gpu`` in a real ComfyUI: TSD-SR Upscale with the same weights, in its ways to use GPU memory."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor

from ...errors import InputError
from ...system.atomic import reason
from .benchmark import SCALE

TAESD = "TAESD3 for previews and draft"
"""Mode with small pictures of the latent while it runs, and TAESD3 instead of the VAE's decoder."""
MODES = {
    "default": (), "no dynamic VRAM": ("--disable-dynamic-vram",), "no VRAM": ("--novram",),
    TAESD: ("--preview-method", "taesd"),
}  # fmt: skip
"""Arguments of ComfyUI by the name of the mode."""
CPU_MODES = {"CPU": ("--cpu",), TAESD: ("--cpu", *MODES[TAESD])}
PACK = Path(__file__).parents[3]
"""The folder of the node pack, which ComfyUI loads."""
_PYTHONS = (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe")
_START, _END, _PAUSE = 240, 30, 0.05
"""Seconds that the server may take to start and to end, and between two questions to it."""
_LOG = 600
"""Characters of the server's log that an error quotes."""


def check_comfyui(folder: Path) -> None:
    """Raise ``InputError`` unless ``folder`` holds a ComfyUI, and this copy of the project the nodes."""
    if not (folder / "main.py").is_file() or not (folder / "comfy" / "cli_args.py").is_file():
        raise InputError(f"--comfyui {folder}: expected the folder of a ComfyUI, with main.py in it")
    if not (PACK / "nodes").is_dir():
        raise InputError(f"--comfyui: {PACK} holds no nodes: run this from a clone of the repository")


def rows_in_comfyui(
    folder: Path, bundle: Path, sides: Sequence[int], draft_side: int, device: torch.device, end: float
) -> list[dict[str, Any]]:  # fmt: skip
    """Run TSD-SR Upscale at each side twice in each mode; the first run loads the weights. TAESD3's weights are random.

    Args:
        folder: of ComfyUI; its Python is that of a virtual environment in it, else ``COMFYUI_PYTHON``, else this one.
        bundle: a model bundle.
        sides: of the results in pixels.
        draft_side: of the result with TAESD3.
        end: of the time for this, on the clock of ``time.monotonic``.

    Returns:
        Rows with ``mode`` and ``side``, and either ``first_seconds``, ``seconds`` and ``peak_gigabytes`` (of the device, on
        the CPU of the process), or ``error``, or ``skipped``.
    """
    known = (folder / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for mode, given in (CPU_MODES if device.type == "cpu" else MODES).items():
        those = [draft_side] if mode == TAESD else sides
        if any(argument not in known for argument in given):
            rows.append({"mode": mode, "side": those[0], "skipped": f"this ComfyUI has no {' '.join(given)}"})
            continue
        try:
            with _server(folder, bundle, given) as address:
                rows.extend(_row(address, mode, side, end) for side in those)  # keeps those before one that fails
        except (OSError, RuntimeError) as error:
            rows.append({"mode": mode, "side": those[0], "error": reason(error)})
    return rows


def _row(address: str, mode: str, side: int, end: float) -> dict[str, Any]:
    graphs = [_graph(side // SCALE, color, mode == TAESD) for color in (0x808080, 0x818181)]  # a cached image would not run
    runs = [_run(address, graph, end) for graph in graphs]
    row = {"mode": mode, "side": side}
    failed = next((run for run in runs if "seconds" not in run), None)
    if failed is not None:
        return {**row, **failed}
    return {**row, "first_seconds": runs[0]["seconds"], "seconds": runs[1]["seconds"], "peak_gigabytes": runs[1]["peak"]}


def _run(address: str, graph: dict[str, Any], end: float) -> dict[str, Any]:
    """Run a graph once; ``seconds`` and ``peak``, or ``error`` or ``skipped``."""
    if time.monotonic() > end:
        return {"skipped": "no time was left"}
    prompt = _ask(address, "/prompt", {"prompt": graph})["prompt_id"]
    while not (history := _ask(address, f"/history/{prompt}")):
        if time.monotonic() > end:
            return {"skipped": "it did not end in the time that was left"}
        time.sleep(_PAUSE)
    entry = history[prompt]
    messages = dict(entry["status"]["messages"])
    if "execution_error" in messages:
        return {"error": messages["execution_error"]["exception_message"].strip()}
    milliseconds = messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]
    peak = re.search(r"peak ([\d.]+) GB", entry["outputs"]["3"]["text"][0])
    return {"seconds": milliseconds / 1e3, "peak": None if peak is None else float(peak[1])}


def _graph(side: int, color: int, draft: bool) -> dict[str, Any]:
    """An image of ``side`` enlarged by TSD-SR Upscale and saved, in ComfyUI's API format."""
    image = {"width": side, "height": side, "batch_size": 1, "color": color}
    upscale = {
        "image": ["1", 0], "model": ["2", 0], "vae": ["2", 1], "conditioning": ["2", 2], "size": "scale by",
        "size.factor": float(SCALE), "strength": 1.0, "color_fix": "wavelet", "color_fix.wavelet_levels": 0,
        "tile": 0, "tile_overlap": 8, "tile_batch": 0, "vae_tile": 0, "draft": draft,
    }  # fmt: skip
    return {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "TSDSRLoadCheckpoint", "inputs": {"checkpoint": "bench.safetensors", "vae_precision": "auto"}},
        "3": {"class_type": "TSDSRUpscale", "inputs": upscale},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "bench"}},
    }


@contextmanager
def _server(folder: Path, bundle: Path, given: Sequence[str]) -> Iterator[str]:
    """A ComfyUI with folders of its own that hold the pack and the bundle; gives its address."""
    with TemporaryDirectory(prefix="tsdsr-bench-") as temporary:
        base = Path(temporary)
        for name in ("custom_nodes", "input", "models/tsdsr", "models/vae_approx", "output", "temp", "user"):
            (base / name).mkdir(parents=True)
        (base / "custom_nodes" / "ComfyUI-TSD-SR").symlink_to(PACK, target_is_directory=True)
        (base / "models" / "tsdsr" / "bench.safetensors").symlink_to(bundle.resolve())
        save_file(_random_taesd3(), base / "models" / "vae_approx" / "taesd3_decoder.safetensors")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [_python(folder), "main.py", "--base-directory", str(base), "--port", str(port), "--disable-api-nodes"]
        command += ["--database-url", f"sqlite:///{base}/user/comfyui.db", *given]
        log, address = base / "server.log", f"http://127.0.0.1:{port}"
        with log.open("w") as stream:
            process = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT)
        try:
            _wait(process, address, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _random_taesd3() -> dict[str, Tensor]:
    """Weights in the layout of TAESD3's decoder, whose layers are those of diffusers after one that has no weights."""
    state = AutoencoderTiny(latent_channels=16).decoder.state_dict()
    found = {re.sub(r"^layers\.(\d+)", lambda match: str(int(match[1]) + 1), name): state[name] for name in state}
    return {name: value.contiguous() for name, value in found.items()}


def _python(folder: Path) -> str:
    found = next((folder / name for name in _PYTHONS if (folder / name).is_file()), None)
    return str(found or os.environ.get("COMFYUI_PYTHON") or sys.executable)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + _START
    while True:
        try:
            _ask(address, "/system_stats")
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                said = " ".join(log.read_text(encoding="utf-8", errors="replace")[-_LOG:].split())
                raise RuntimeError(f"ComfyUI did not start: {said}") from None
            time.sleep(_PAUSE)


def _ask(address: str, path: str, data: Any = None) -> Any:
    """The JSON that the server answers."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"ComfyUI refuses the graph: {error.read().decode(errors='replace')[:_LOG]}") from error
