"""The real frontend in a browser: served by a real host, or from its package with recorded answers."""

from __future__ import annotations

import importlib.util
import json
import mimetypes
import os
import shutil
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from . import host as host_module
from .host import Host, Result

CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("chromium-browser")
PACKAGES = [name for name in ("playwright", "comfyui_frontend_package") if importlib.util.find_spec(name) is None]
SKIPPED = f"no Chromium (CHROMIUM_PATH) or not installed: {PACKAGES}" if CHROMIUM is None or PACKAGES else ""
"""Why the tests of the frontend cannot run here; empty where they can."""
NEWEST = os.environ.get("NEWEST_FRONTEND_PATH", "")
"""Where a newer frontend than the recorded one is installed, with ``pip install --target``; empty without one."""
WITH_NEWEST = ", newest frontend"
PAGES = [f"{answered}{frontend}" for answered in ("recorded", "host") for frontend in ("", WITH_NEWEST)]
ON_A_HOST = PAGES[2:]
ARGUMENTS = ["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"]
"""Chromium's: it takes a page whose files ``Files`` answers for one from the Internet, which may not open a host's socket."""
FOLDER = host_module.ROOT / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
RECORDED = host_module.ROOT / "tests" / "data" / "frontend.json"
"""What a real host (0.33.0) answered the frontend at start, /object_info cut down to the nodes that the workflows use."""
OWN = f"/extensions/{host_module.PACK}/"
"""Where a host serves the pack's folder ``web``."""
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
READY = "!!(window.app && window.app.graph && LiteGraph.registered_node_types.TSDSRUpscale)"
STATUS = {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "recorded"}}
WAIT = 240_000

VIEWS = ["classic", "Nodes 2.0"]

DROP = """async ([text, name]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name, {type: 'application/json'}));
  const event = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
  document.dispatchEvent(event);
}"""


class Files:
    """Answers the browser with the files of a frontend, and leaves everything else to the host."""

    def __init__(self, newest: bool) -> None:
        if newest:
            package = Path(NEWEST) / "comfyui_frontend_package"
        else:
            package = Path(importlib.util.find_spec("comfyui_frontend_package").submodule_search_locations[0])
        self.static = package / "static"

    def file(self, path: str) -> Path:
        """Where the file of a path would be."""
        return self.static / (unquote(path).lstrip("/") or "index.html")

    def __call__(self, route) -> None:
        file = self.file(urlsplit(route.request.url).path)
        if file.is_file():
            fulfil(route, file)
        else:
            route.continue_()


def fulfil(route, file: Path) -> None:
    """Answer with a file."""
    route.fulfill(content_type=mimetypes.guess_type(file.name)[0] or "application/octet-stream", body=file.read_bytes())


class Recorded(Files):
    """Answers the browser in the host's place."""

    def __init__(self, newest: bool) -> None:
        super().__init__(newest)
        answers = json.loads(RECORDED.read_text())
        self.answers = {path: (status, kind, body) for path, status, kind, body in answers}

    def __call__(self, route) -> None:
        path = urlsplit(route.request.url).path
        file = self.file(path)
        if path.startswith(OWN):
            file = host_module.ROOT / "web" / path.removeprefix(OWN)
        if path in self.answers:
            status, kind, body = self.answers[path]
            route.fulfill(status=status, content_type=kind, body=body)
        elif path == "/api/view":
            route.fulfill(path=host_module.ROOT / "docs" / "examples" / "lighthouse.png")
        elif path.startswith("/api/") or not file.is_file():
            route.fulfill(status=404 if route.request.method == "GET" else 200, body="{}")
        else:
            fulfil(route, file)


ELSEWHERE = "huggingface.co", "drive.google.com", "api.comfy.org"
"""Where the frontend asks for sizes of missing models and for news of its own, which cannot be reached here."""


def is_error(message) -> bool:
    """Whether a console message tells of a fault here."""
    said = f"{message.text} {message.location['url']}"
    return message.type == "error" and not any(host in said for host in ELSEWHERE)


SAME_TYPES = "types => JSON.stringify(app.graph._nodes.map(n => n.type).sort()) === types"

DRAWN = """count => !LiteGraph.vueNodesMode || document.querySelectorAll('.lg-node[data-node-id]').length === count"""
"""Nodes 2.0 draws a while after a workflow is there; the classic view draws each frame as it is."""


def types_of(workflow: str) -> str:
    """The types of a workflow's nodes, as ``SAME_TYPES`` compares them."""
    return json.dumps(sorted(node["type"] for node in json.loads(workflow)["nodes"]), separators=(",", ":"))


def open_page(browser, address: str | None, newest: bool = False):
    """A page with the frontend, ready: of the host at ``address``, or with recorded answers; its own, or the ``newest``.

    ``page.errors`` collects what its console says is wrong, ``page.received`` what the host sends.
    """
    page = browser.new_page(viewport={"width": 1800, "height": 900})
    page.errors, page.received = [], []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: page.received.append(frame)))
    if address is None:
        page.route("**/*", Recorded(newest))
        page.route_web_socket("**/*", lambda socket: socket.send(json.dumps(STATUS)))
    elif newest:
        page.route("**/*", Files(newest))
    page.on(
        "console",
        lambda message: page.errors.append(f"{message.text} {message.location['url']}") if is_error(message) else None,
    )
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address or "http://localhost/")
    page.wait_for_function(READY, timeout=WAIT)
    page.wait_for_load_state("networkidle", timeout=WAIT)  # what its start asks for and does not get is no later error
    page.wait_for_timeout(2000)
    return page


def show(page, view: str) -> None:
    """Switch the page to a view."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", view != VIEWS[0])
    page.wait_for_function("on => LiteGraph.vueNodesMode === on", arg=view != VIEWS[0])


def drop(page, path: Path, text: str | None = None) -> None:
    """Open a workflow as if its file, or ``text`` in its place, were dropped onto the page."""
    text = text or path.read_text(encoding="utf-8")
    page.errors.clear()
    page.evaluate("app.graph.clear()")
    page.wait_for_function(DRAWN, arg=0, timeout=WAIT)  # else Nodes 2.0 stumbles over nodes of the same number
    page.evaluate(DROP, [text, path.name])
    page.wait_for_function(SAME_TYPES, arg=types_of(text), timeout=WAIT)
    page.wait_for_function(DRAWN, arg=len(json.loads(text)["nodes"]), timeout=WAIT)
    page.wait_for_timeout(500)


def run_in_page(page, host: Host, seconds: float = 600) -> Result:
    """Queue what the page shows and wait for its end."""
    before = set(host.get("/history"))
    page.errors.clear()
    page.received.clear()
    page.evaluate("app.queuePrompt(0)")
    deadline = time.monotonic() + seconds
    while not (new := set(host.get("/history")) - before):
        assert time.monotonic() < deadline
        page.wait_for_timeout(300)
    result = host.wait(new.pop())
    page.wait_for_timeout(500)
    return result
