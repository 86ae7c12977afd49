"""Record what a real host answers the frontend at start, for the tests that run where no host is.

    COMFYUI_PATH=... python -m tests.comfyui.record_frontend

Writes tests/data/frontend.json: of /object_info, the nodes that the example workflows and blueprints use and this pack's.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import sync_playwright

from . import host as host_module
from .frontend import ARGUMENTS, CHROMIUM, READY, RECORDED, SETTINGS
from .host import Host


def main() -> None:
    """Run the command line."""
    found = host_module.find()
    if found is None or CHROMIUM is None:
        raise SystemExit("needs a ComfyUI (COMFYUI_PATH) and a Chromium (CHROMIUM_PATH)")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        host = Host(*found, Path(folder) / "host")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            host.post("/settings", SETTINGS)
            paths = asked(browser.new_page(), f"http://127.0.0.1:{host.port}/")
            answers = [[path, 200, "application/json", reduced(path, host.read(path).decode())] for path in sorted(paths)]
        finally:
            browser.close()
            host.close()
    RECORDED.write_text(json.dumps(answers, indent=0) + "\n")


def asked(page, address: str) -> set[str]:
    """What the page successfully asks the host's own interface for while it starts, blueprints of other packs aside."""
    paths = set()

    def keep(response) -> None:
        path = urlsplit(response.url).path
        own = path.startswith(("/api/", "/internal/")) and not path.startswith(("/api/view", "/api/global_subgraphs/"))
        if own and response.request.method == "GET" and response.status == 200:
            paths.add(path)

    page.on("response", keep)
    page.goto(address)
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(5000)
    return paths


def reduced(path: str, body: str) -> str:
    """``body`` without what no test needs, and without what belongs to one machine."""
    if path == "/api/object_info":
        folders = [host_module.ROOT / "workflows", host_module.ROOT / "subgraphs"]
        text = "".join(file.read_text() for folder in folders for file in folder.glob("*.json"))
        return json.dumps({n: v for n, v in json.loads(body).items() if f'"{n}"' in text or n.startswith("TSDSR")})
    if path == "/api/system_stats":
        said = json.loads(body)
        said["system"] = {key: value for key, value in said["system"].items() if key in ("comfyui_version", "os")}
        return json.dumps({**said, "devices": []})
    empty = {"/internal/folder_paths": "{}", "/api/i18n": "{}", "/api/global_subgraphs": "{}", "/api/experiment/models": "[]"}
    return empty.get(path, body)


if __name__ == "__main__":
    main()
