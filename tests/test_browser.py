"""The example workflows in the real frontend: served by a real host, and from its package with recorded answers."""

import importlib.util
import io
import json
import mimetypes
import os
import shutil
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from . import host as host_module
from .host import Graph
from .host_graphs import builtin_graph, load_sd3

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


SAME_TYPES = "types => JSON.stringify(app.graph._nodes.map(n => n.type).sort()) === types"


def types_of(path: Path) -> str:
    """The types of a workflow's nodes, as ``SAME_TYPES`` compares them."""
    return json.dumps(sorted(node["type"] for node in json.loads(path.read_text())["nodes"]), separators=(",", ":"))


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
    page.evaluate(DROP, [path.read_text(), path.name])
    page.wait_for_function(SAME_TYPES, arg=types_of(path), timeout=WAIT)
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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
@pytest.mark.parametrize("page", ["host"], indirect=True)
def test_the_template_browser_opens_each_workflow(path, page, host):
    page.errors.clear()
    page.evaluate("app.graph.clear()")
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(host_module.PACK).first.click(timeout=20_000)
    card = dialog.get_by_text(path.stem, exact=True).first
    card.wait_for(timeout=20_000)
    card.evaluate("card => card.click()")  # a pointer would wait until every thumbnail has stopped moving
    page.wait_for_function(SAME_TYPES, arg=types_of(path), timeout=20_000)
    page.wait_for_timeout(500)
    assert dialog.count() == 0 or not dialog.first.is_visible()
    assert page.errors == []


def run_in_page(page, host, seconds=120):
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


def last_preview(page) -> Image.Image:
    """The picture in the last binary message: some header, then a JPEG."""
    frame = [frame for frame in page.received if isinstance(frame, bytes)][-1]
    return Image.open(io.BytesIO(frame[frame.index(b"\xff\xd8") :]))


def progress_of(page) -> list[tuple[int, int]]:
    """(value, max) of each progress message that the page received."""
    messages = [json.loads(frame) for frame in page.received if isinstance(frame, str)]
    return [(m["data"]["value"], m["data"]["max"]) for m in messages if m["type"] == "progress"]


@pytest.mark.parametrize("name", ["built-in model", "a whole folder", "step by step", "as a sampler"])
@pytest.mark.parametrize("page", ["host"], indirect=True)
def test_a_workflow_runs_from_the_page(name, page, host, sd3):
    path = FOLDER / f"TSD-SR {name}.json"
    page.evaluate(DROP, [path.read_text(), path.name])
    page.wait_for_function(SAME_TYPES, arg=types_of(path), timeout=20_000)
    result = run_in_page(page, host)
    assert result.status == "success"
    assert page.errors == []
    preview = last_preview(page)
    if name == "built-in model":
        save = next(node for node in result.outputs if "images" in result.outputs[node])
        picture = Image.fromarray(result.pictures(save)[0]).resize(preview.size, Image.Resampling.BOX)
        alike = np.corrcoef(np.asarray(picture).ravel(), np.asarray(preview.convert("RGB")).ravel())[0, 1]
        assert alike > 0.9, "the preview has the colours of the result"


@pytest.mark.parametrize("page", ["host"], indirect=True)
def test_progress_counts_the_tiles_of_all_stages(page, host):
    graph, _ = builtin_graph("large.png", **{"size.factor": 1.0, "tile": 48, "tile_batch": 1})
    page.evaluate("graph => app.loadApiJson(graph, 'tiles')", graph.nodes)
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRUpscale')", timeout=20_000)
    assert run_in_page(page, host).status == "success"
    found = progress_of(page)
    values = [value for value, _ in found]
    assert {total for _, total in found} == {9 + 2 * 16}, "3x3 tiles, and 16 each to encode and decode"
    assert values == sorted(values)
    assert values[-1] == 41
    assert len(set(values)) >= 5, "the page sees it move; messages that come too fast are dropped"


@pytest.mark.parametrize("page", ["host"], indirect=True)
def test_the_page_shows_what_is_wrong(page, host, sd3):
    graph = Graph()
    lora, _ = load_sd3(graph, transformer_lora="tsdsr/vae.safetensors")
    graph.add("PreviewAny", source=(lora, 0))
    page.evaluate("graph => app.loadApiJson(graph, 'wrong')", graph.nodes)
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRLoadLora')", timeout=20_000)
    assert run_in_page(page, host).status == "error"
    details = page.get_by_test_id("error-overlay-see-errors")  # newer frontends first show only which node failed
    message = page.get_by_text("are the two files swapped?").first
    details.or_(message).first.wait_for(timeout=20_000)
    if details.count():
        details.first.click()
    message.wait_for(timeout=20_000)
    page.keyboard.press("Escape")


@pytest.mark.parametrize("page", ["host"], indirect=True)
def test_the_help_of_a_node_opens_with_its_picture(page, host):
    graph, _ = builtin_graph()
    page.evaluate("graph => app.loadApiJson(graph, 'help')", graph.nodes)
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRUpscale')", timeout=20_000)
    page.evaluate("app.canvas.selectNode(app.graph._nodes.find(n => n.type === 'TSDSRUpscale'))")
    page.wait_for_timeout(1000)
    button = page.locator("[data-testid='info-button'], .help-button")
    button.first.evaluate("button => button.click()")
    shown = "[...document.querySelectorAll('img')].some(i => i.src.endsWith('/TSDSRUpscale.png') && i.naturalWidth > 100)"
    page.wait_for_function(shown, timeout=20_000)
    assert page.get_by_text("Sides are met to the pixel").first.is_visible()
