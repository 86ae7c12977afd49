"""The example workflows in the real frontend: served by a real host, and from its package with recorded answers."""

import importlib.util
import json
import mimetypes
import os
import shutil
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from . import host as host_module

CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("chromium-browser")
PACKAGES = [name for name in ("playwright", "comfyui_frontend_package") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or bool(PACKAGES), reason=f"no Chromium (CHROMIUM_PATH) or not installed: {PACKAGES}"
)
FOLDER = host_module.ROOT / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
RECORDED = host_module.ROOT / "tests" / "data" / "frontend.json"
"""What a real host (0.33.0) answered the frontend at start, /object_info cut down to the nodes that the workflows use."""
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
READY = "!!(window.app && window.app.graph && LiteGraph.registered_node_types.TSDSRUpscale)"
STATUS = {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "recorded"}}
WAIT = 120_000

DROP = """async ([text, name]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name, {type: 'application/json'}));
  const event = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
  document.dispatchEvent(event);
}"""


class Recorded:
    """Answers the browser in the host's place."""

    def __init__(self) -> None:
        answers = json.loads(RECORDED.read_text())
        self.answers = {path: (status, kind, body) for path, status, kind, body in answers}
        found = importlib.util.find_spec("comfyui_frontend_package")
        self.static = Path(found.submodule_search_locations[0]) / "static"

    def __call__(self, route) -> None:
        path = urlsplit(route.request.url).path
        file = self.static / (unquote(path).lstrip("/") or "index.html")
        if path in self.answers:
            status, kind, body = self.answers[path]
            route.fulfill(status=status, content_type=kind, body=body)
        elif path == "/api/view":
            route.fulfill(path=host_module.ROOT / "docs" / "examples" / "lighthouse.png")
        elif path.startswith("/api/") or not file.is_file():
            route.fulfill(status=404 if route.request.method == "GET" else 200, body="{}")
        else:
            route.fulfill(content_type=mimetypes.guess_type(file.name)[0] or "application/octet-stream", body=file.read_bytes())


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["recorded", "host"])
def page(request, browser):
    """The frontend, ready; ``errors`` collects what the console says is wrong, ``received`` what the host sends."""
    page = browser.new_page(viewport={"width": 1800, "height": 900})
    page.errors, page.received = [], []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: page.received.append(frame)))
    if request.param == "recorded":
        page.route("**/*", Recorded())
        page.route_web_socket("**/*", lambda socket: socket.send(json.dumps(STATUS)))
        address = "http://localhost/"
    else:
        if host_module.find() is None:
            pytest.skip("no ComfyUI: set COMFYUI_PATH")
        server = request.getfixturevalue("host")
        server.post("/settings", SETTINGS)
        address = f"http://127.0.0.1:{server.port}/"
    page.on("console", lambda message: page.errors.append(message.text) if is_error(message) else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address)
    page.wait_for_function(READY, timeout=WAIT)
    page.wait_for_timeout(3000)
    yield page
    page.close()


def is_error(message) -> bool:
    """Whether a console message tells of a fault; that model files of the workflow are missing here is none."""
    return message.type == "error" and "huggingface.co" not in message.text


def plain(prompt: dict) -> dict:
    """A prompt without what may differ: titles, and whole numbers written as such or with a point."""
    number = lambda value: float(value) if type(value) in (int, float) else value  # noqa: E731
    return {
        name: (node["class_type"], {key: number(value) for key, value in node["inputs"].items()})
        for name, node in prompt.items()
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_opens_by_drop_and_is_its_twin(path, page):
    page.errors.clear()
    drawn = json.loads(path.read_text())
    page.evaluate(DROP, [path.read_text(), path.name])
    types = json.dumps(sorted(node["type"] for node in drawn["nodes"]), separators=(",", ":"))
    page.wait_for_function(
        "types => JSON.stringify(app.graph._nodes.map(n => n.type).sort()) === types", arg=types, timeout=WAIT
    )
    page.wait_for_timeout(500)
    missing = page.evaluate("app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)")
    assert missing == []
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert plain(prompt) == plain(json.loads((FOLDER / "api" / path.name).read_text()))
    assert page.errors == []


@pytest.mark.parametrize("path", sorted((host_module.ROOT / "subgraphs").glob("*.json")), ids=lambda path: path.stem)
def test_a_blueprint_opens_with_its_stages_and_dials(path, page):
    page.errors.clear()
    page.evaluate(DROP, [path.read_text(), path.name])
    page.wait_for_function("app.graph._nodes.length === 1 && !!app.graph._nodes[0].subgraph", timeout=WAIT)
    page.wait_for_timeout(500)
    kinds = [node["class_type"] for node in page.evaluate("async () => (await app.graphToPrompt()).output").values()]
    assert sorted(kinds) == ["ImageScaleBy", "TSDSRColorFix", "TSDSRDecode", "TSDSREncode", "TSDSROneStep"]
    dials = page.evaluate("app.graph._nodes[0].widgets.map(w => w.name)")
    assert [name.split(": ")[-1] for name in dials] == ["scale_by", "strength", "color_fix"], "0.8.0 puts the inner id first"
    assert page.errors == []


@pytest.mark.parametrize("page", ["host"], indirect=True)
def test_the_template_browser_shows_the_pack_and_opens_a_workflow(page, host):
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(host_module.PACK).first.click(timeout=20_000)
    dialog.get_by_text("TSD-SR a whole folder").first.click(timeout=20_000)
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'LoadImageDataSetFromFolder')", timeout=20_000)
    assert dialog.count() == 0 or not dialog.first.is_visible()


@pytest.mark.parametrize("page", ["host"], indirect=True)
def test_the_built_in_workflow_runs_from_the_page(page, host):
    path = FOLDER / "TSD-SR built-in model.json"
    page.evaluate(DROP, [path.read_text(), path.name])
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRUpscale')", timeout=20_000)
    before = set(host.get("/history"))
    page.received.clear()
    page.evaluate("app.queuePrompt(0)")
    deadline = time.monotonic() + 120
    while not (new := set(host.get("/history")) - before):
        assert time.monotonic() < deadline
        page.wait_for_timeout(300)
    assert host.wait(new.pop()).status == "success"
    page.wait_for_timeout(500)
    messages = [json.loads(frame) for frame in page.received if isinstance(frame, str)]
    progress = [m["data"] for m in messages if m["type"] == "progress"]
    assert progress[-1]["value"] == progress[-1]["max"] == 3, "one tile each to encode, step and decode"
    assert [frame for frame in page.received if isinstance(frame, bytes)], "a preview of the finished tile"
