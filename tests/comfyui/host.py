"""A real ComfyUI: found through COMFYUI_PATH, started on the CPU with a folder of its own, asked over HTTP."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
PACK = "ComfyUI-TSD-SR"
"""The pack's folder in the host: with a dash, as people clone it."""


def find() -> tuple[Path, Path] | None:
    """ComfyUI's folder and its Python, or None."""
    folder = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
    python = folder / ".venv" / "bin" / "python"
    if not python.is_file():
        python = Path(os.environ.get("COMFYUI_PYTHON", ""))
    return (folder, python) if (folder / "main.py").is_file() and python.is_file() else None


@dataclass
class Result:
    """What became of a prompt."""

    status: str
    """ "success", "error" or "interrupted"."""
    error: str
    outputs: dict[str, Any]
    host: Host

    def pictures(self, node: str) -> list[np.ndarray]:
        """The pictures that a SaveImage node wrote."""
        folder = self.host.base / "output"
        return [np.array(Image.open(folder / i["subfolder"] / i["filename"])) for i in self.outputs[node]["images"]]


class Host:
    """A running server."""

    def __init__(self, folder: Path, python: Path, base: Path, packs: tuple[str, ...] = (PACK,)) -> None:
        """Start ComfyUI in ``folder`` with the pack in folders of these names."""
        self.base = base
        self.passes_all_inputs = "ACCEPT_ALL_INPUTS" in (folder / "execution.py").read_text(encoding="utf-8")
        """Whether a node that asks for it is given inputs that its schema does not know."""
        for name in (
            "input",
            "output",
            "temp",
            "user",
            "models/loras",
            "models/diffusion_models",
            "models/vae",
            "models/tsdsr",
        ):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes").mkdir()
        for pack in packs:
            (base / "custom_nodes" / pack).symlink_to(ROOT)
        shutil.copytree(ROOT / "tests" / "comfyui" / "pack", base / "custom_nodes" / "host_pack")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = base / "server.log"
        command = [python, "main.py", "--cpu", "--base-directory", base, "--port", self.port, "--disable-api-nodes"]
        command += ["--database-url", f"sqlite:///{base}/user/comfyui.db", "--preview-method", "latent2rgb"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + 240
        while True:
            try:
                self.get("/system_stats")
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.3)

    def close(self) -> None:
        """End the server."""
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str) -> Any:
        """The JSON that a GET request answers."""
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        """What a GET request answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def post(self, path: str, data: Any) -> Any:
        """The JSON that a POST request answers, also where it is an error."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else {}

    def start(self, graph: Graph) -> str:
        """Queue a prompt; returns its id."""
        answer = self.post("/prompt", {"prompt": graph.nodes})
        assert not answer.get("node_errors", answer.get("error")), json.dumps(answer, indent=1)
        return answer["prompt_id"]

    def wait(self, prompt: str, seconds: float = 300) -> Result:
        """Wait for the end of a prompt."""
        deadline = time.monotonic() + seconds
        while not (history := self.get(f"/history/{prompt}")):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, "the prompt takes too long"
            time.sleep(0.05)
        entry = history[prompt]
        messages = dict(entry["status"]["messages"])
        error = messages.get("execution_error", {}).get("exception_message", "")
        status = "interrupted" if "execution_interrupted" in messages else entry["status"]["status_str"]
        return Result(status, error, entry["outputs"], self)

    def run(self, graph: Graph, seconds: float = 300) -> Result:
        """Run a prompt to its end."""
        return self.wait(self.start(graph), seconds)

    def memory(self) -> int:
        """Resident bytes of the server."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


class Graph:
    """An API-format prompt; ``add`` returns the new node's id, ``graph[id, 1]`` is its second output."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}
        self._ids = itertools.count(1)

    def add(self, node: str, /, **inputs: Any) -> str:
        """Add a node; tuples are links."""
        name = str(next(self._ids))
        links = {key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()}
        self.nodes[name] = {"class_type": node, "inputs": links}
        return name
