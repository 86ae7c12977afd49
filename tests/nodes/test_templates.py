"""The templates in the real frontend, classic and Nodes 2.0: opened, run, found, and the first run of a new user."""

import contextlib
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..comfyui import frontend
from ..comfyui import host as host_module
from ..comfyui.frontend import FOLDER, SAME_TYPES, VIEWS, WAIT, WORKFLOWS, drop, run_in_page, show, types_of
from ..comfyui.host import Host

ACT = 5_000
"""Milliseconds to wait for an element of a dialog that may be closing."""
MISSING = """() => {
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
  const names = (store, key) => (stores.get(store)?.[key] ?? []).map(found => found.name);
  const unknown = app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type);
  const red = app.graph._nodes.filter(n => n.has_errors).map(n => n.type);
  const [models, pictures] = [names('missingModel', 'missingModelCandidates'), names('missingMedia', 'missingMediaCandidates')];
  return {unknown, red, models, pictures};
}"""
"""What the frontend draws a red frame for when it opens a workflow; older ones look for missing nodes alone."""
REPORTED = """app.graph._nodes.some(n => n.type === 'TSDSRUpscale' && n.widgets.some(w => {
  const text = String(w.value);
  return text.includes('→') && text.includes('encode');
}))"""
"""Whether the node shows sizes and seconds."""
NOTES = ".comfy-markdown-content, .comfy-markdown .tiptap, .widget-markdown"
SHOWN = """() => {
  const elements = [...document.querySelectorAll('.lg-node[data-node-id]')];
  const drawn = elements.map(e => [e.dataset.nodeId, e.getBoundingClientRect()]);
  const boxes = LiteGraph.vueNodesMode ? drawn.map(([id, r]) => [id, r.left, r.top, r.right, r.bottom])
    : app.graph._nodes.map(n => [n.id, n.boundingRect]).map(([id, r]) => [id, r[0], r[1], r[0] + r[2], r[1] + r[3]]);
  const apart = (a, b) => a[3] <= b[1] + 1 || b[3] <= a[1] + 1 || a[4] <= b[2] + 1 || b[4] <= a[2] + 1;
  const overlapping = boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => !apart(a, b)).map(b => `${a[0]} and ${b[0]}`));
  const texts = [...document.querySelectorAll('NOTES')];
  const cut = texts.filter(e => e.scrollHeight > e.clientHeight + 1).map(e => e.textContent.slice(0, 30));
  return {nodes: boxes.length, overlapping, notes: texts.length > 0, cut};
}""".replace("NOTES", NOTES)
"""How many nodes are drawn, which of them overlap as drawn, and which notes do not fit into theirs."""
SAVED = "JSON.stringify(app.graph.serialize())"
NOTHING = {"unknown": [], "red": [], "models": [], "pictures": []}
by_name = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
in_each_view = pytest.mark.parametrize("view", VIEWS)
on_a_host = pytest.mark.parametrize("page", frontend.ON_A_HOST, indirect=True)


KNOWN = "Object.fromEntries(app.graph._nodes.map(n => [n.id, [...(n.inputs ?? []), ...(n.widgets ?? [])].map(i => i.name)]))"
"""Names of the inputs of each node."""


def alike(prompt: dict, twin: dict, known: dict) -> tuple[dict, dict]:
    """Both without titles, with whole numbers written one way.

    Of ComfyUI's own nodes only what the twin gives and this release knows: widgets that only show something, and inputs that
    newer releases added, stand in a page's prompt too; the twin gives the inputs of older and newer ones.
    """
    number = lambda value: float(value) if type(value) in (int, float) else value  # noqa: E731
    plain = [
        {name: (n["class_type"], {k: number(v) for k, v in n["inputs"].items()}) for name, n in p.items()}
        for p in (prompt, twin)
    ]
    for name, (kind, inputs) in plain[0].items():
        if not kind.startswith("TSDSR"):
            for key in inputs.keys() - twin[name]["inputs"].keys():
                del inputs[key]
            for key in plain[1][name][1].keys() - set(known[name]):
                del plain[1][name][1][key]
    return plain[0], plain[1]


@by_name
@in_each_view
def test_a_template_opens_by_drop_and_is_its_twin(view, path, page):
    show(page, view)
    drop(page, path)
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    known = page.evaluate(KNOWN)
    found, twin = alike(prompt, json.loads((FOLDER / "api" / path.name).read_text(encoding="utf-8")), known)
    assert found == twin
    values = {
        node["id"]: node["widgets_values"] for node in json.loads(page.evaluate(SAVED))["nodes"] if node["type"][:5] == "TSDSR"
    }
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    assert values == {node["id"]: node["widgets_values"] for node in nodes if node["id"] in values}, "each widget has its value"
    missing = page.evaluate(MISSING)
    assert missing["unknown"] == missing["pictures"] == []
    page.wait_for_selector(NOTES, state="attached", timeout=WAIT)
    assert page.evaluate(SHOWN) == {"nodes": len(nodes), "overlapping": [], "notes": True, "cut": []}
    assert page.errors == []


@pytest.mark.parametrize("window", [(1366, 650), (1536, 730)], ids=lambda window: "x".join(map(str, window)))
@by_name
def test_a_template_is_readable_in_a_small_window(path, window, page):
    """The classic view draws no texts where they would be smaller than it likes."""
    show(page, VIEWS[0])
    before = page.viewport_size
    page.set_viewport_size({"width": window[0], "height": window[1]})
    drop(page, path)
    page.wait_for_selector(NOTES, state="attached", timeout=WAIT)
    drawn, low_quality = page.evaluate(SHOWN), page.evaluate("app.canvas.low_quality")
    page.set_viewport_size(before)
    assert drawn["cut"] == drawn["overlapping"] == []
    assert not low_quality


APPS = [path for path in WORKFLOWS if path.stem[:2] in ("01", "02", "05")]


@pytest.mark.parametrize("newest", [False, True], ids=["recorded", "newest"])
@pytest.mark.parametrize("path", APPS, ids=lambda path: path.stem)
def test_a_template_is_an_app(path, newest, browser):
    """In app mode a page shows what to choose and the result, nothing else."""
    if newest and not frontend.NEWEST:
        pytest.skip("no newer frontend: set NEWEST_FRONTEND_PATH")
    page = frontend.open_page(browser, None, newest)
    drop(page, path)
    linear = json.loads(path.read_text(encoding="utf-8"))["extra"]["linearData"]
    kinds = {node["id"]: node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    assert [kinds[node] for node in linear["outputs"]] == ["SaveImage", "PreviewImage"]
    page.evaluate("app.extensionManager.command.execute('Comfy.ToggleLinear')")
    for _, name in linear["inputs"]:
        page.get_by_text(name.split(".")[-1], exact=True).locator("visible=true").first.wait_for(timeout=WAIT)
    assert page.get_by_text("color_fix", exact=True).locator("visible=true").count() == 0
    assert [error for error in page.errors if "Jobs API" not in error] == [], "recorded answers know no pages of a list"
    page.close()


@by_name
@on_a_host
def test_the_template_browser_opens_each_template(path, page, host):
    page.errors.clear()
    page.evaluate("app.graph.clear()")
    open_template(page, path.stem)
    dialog = page.get_by_role("dialog")
    assert dialog.count() == 0 or not dialog.first.is_visible()
    assert page.errors == []


def open_template(page, name: str) -> None:
    """Through the browser of templates, as a user does."""
    card = page.get_by_role("dialog").get_by_text(name, exact=True).first
    browse_until(page, card, choose_pack)
    card.evaluate("card => card.click()", timeout=WAIT)  # a pointer would wait until every thumbnail has stopped moving
    page.wait_for_function(SAME_TYPES, arg=types_of((FOLDER / f"{name}.json").read_text(encoding="utf-8")), timeout=WAIT)
    page.wait_for_timeout(500)


def choose_pack(dialog) -> None:
    """Show the pack's own templates."""
    dialog.get_by_text(host_module.PACK).first.evaluate("entry => entry.click()", timeout=ACT)


def browse_until(page, card, act) -> None:
    """Open the browser of templates and act in it until a card is there.

    The dialog is drawn again while its list loads, and the one before may still be closing: what was done then is lost.
    """
    from playwright.sync_api import TimeoutError as TooLong

    deadline = time.monotonic() + WAIT / 1000
    while time.monotonic() < deadline:
        if not page.get_by_role("dialog").first.is_visible():
            page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        with contextlib.suppress(TooLong):  # in a dialog that was closing
            act(page.get_by_role("dialog"))
        for _ in range(20):
            if card.is_visible():
                return
            page.wait_for_timeout(250)
    pytest.fail("the template does not appear")


@on_a_host
def test_the_template_browser_has_them_in_order(page):
    """Whatever the order of the files."""
    names = page.evaluate("async name => (await app.api.getWorkflowTemplates())[name]", host_module.PACK)
    assert names == [path.stem for path in WORKFLOWS]


@pytest.mark.parametrize("query", ["restore", "upscale", "old photo", "grainy", "noisy", "video", "folder", "TSD-SR"])
@on_a_host
def test_the_template_browser_finds_them(query, page):
    dialog = page.get_by_role("dialog")
    search = dialog.get_by_role("textbox").first
    expected = next(path.stem for path in WORKFLOWS if query.lower() in path.stem.lower())
    browse_until(page, dialog.get_by_text(expected, exact=True).first, lambda _: search.fill(query, timeout=ACT))
    page.wait_for_timeout(500)
    titles = page.evaluate("[...document.querySelectorAll('[role=dialog] h3')].map(e => e.textContent.trim())")
    first = next(title for title in titles if title in {path.stem for path in WORKFLOWS})
    assert "TSDSRLoadCheckpoint" in types_of((FOLDER / f"{first}.json").read_text(encoding="utf-8")), "it needs no weights"
    assert first == expected or query in ("upscale", "TSD-SR"), "of these, the first has the shortest name"
    search.fill("")
    box, height = dialog.first.bounding_box(), page.viewport_size["height"]
    below = (box["y"] + box["height"] + height) / 2
    page.mouse.click(box["x"] + box["width"] / 2, below)  # a click outside closes it; Escape does not in ComfyUI 0.9.0
    dialog.first.wait_for(state="hidden", timeout=WAIT)


def quick(path: Path) -> str:
    """A template, with less to do: one step for a small picture, frames that are not enlarged, and SD3 at the result's size."""
    drawn = json.loads(path.read_text(encoding="utf-8"))
    of_type = {node["type"]: node for node in drawn["nodes"]}
    if "EmptySD3LatentImage" in of_type:
        of_type["EmptySD3LatentImage"]["widgets_values"][:2] = [64, 64]
        of_type["KSampler"]["widgets_values"][2] = 1
    if "LoadVideo" in of_type:
        of_type["TSDSRUpscale"]["widgets_values"][1] = 1
    if {"TSDSRLoadLora", "TSDSRUpscale"} <= of_type.keys():
        _put_before(drawn, of_type["TSDSRUpscale"], "model", "TestSmallModel")
    return json.dumps(drawn)


def _put_before(drawn: dict, node: dict, name: str, kind: str) -> None:
    """Put a node of one input and one output before an input of ``node``, far from the others."""
    entry = next(entry for entry in node["inputs"] if entry["name"] == name)
    link = next(link for link in drawn["links"] if link[0] == entry["link"])
    number, after = 1 + max(each["id"] for each in drawn["nodes"]), 1 + max(link[0] for link in drawn["links"])
    drawn["nodes"].append({
        "id": number, "type": kind, "pos": [-2000, -2000], "size": [200, 60], "flags": {}, "order": 0, "mode": 0,
        "inputs": [{"name": name, "type": link[5], "link": link[0]}],
        "outputs": [{"name": name, "type": link[5], "links": [after]}], "properties": {},
    })  # fmt: skip
    drawn["links"].append([after, number, 0, *link[3:]])
    link[3:5] = number, 0
    entry["link"] = after
    drawn["last_node_id"], drawn["last_link_id"] = number, after


@by_name
@in_each_view
@on_a_host
def test_a_template_runs_from_the_page(view, path, page, host, sd3):
    """The second view has the results of the first at hand, but sends, draws and compares all the same."""
    show(page, view)
    page.evaluate("app.refreshComboInNodes()")  # the models were written after the page had opened
    drop(page, path, quick(path))
    assert page.evaluate(MISSING) == NOTHING
    result = run_in_page(page, host)
    assert result.status == "success"
    assert page.errors == []
    kinds = {str(node["id"]): node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    shown = {kinds[node]: result.outputs[node] for node in result.outputs}
    if "LoadVideo" in kinds.values():
        assert shown["SaveVideo"]["images"]
    else:
        pictures = len(shown["SaveImage"]["images"])
        assert len(shown["ImageCompare"]["a_images"]) == len(shown["ImageCompare"]["b_images"]) == pictures
        assert len(shown["PreviewImage"]["images"]) == pictures
    if "TSDSRUpscale" in kinds.values() and view == VIEWS[0]:  # which runs it
        page.wait_for_function(REPORTED, timeout=WAIT)
    if view == VIEWS[0]:  # Nodes 2.0 of older frontends draws even Load Image larger than its size
        assert page.evaluate(SHOWN)["overlapping"] == [], "images and texts of the results have room"


def last_preview(page) -> Image.Image:
    """The image in the last binary message with a JPEG after its header; the node's text is a binary message too."""
    frame = [frame for frame in page.received if isinstance(frame, bytes) and b"\xff\xd8\xff" in frame][-1]
    return Image.open(io.BytesIO(frame[frame.index(b"\xff\xd8") :]))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A host whose folders are empty, as after its installation."""
    if (found := host_module.find()) is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH")
    server = Host(*found, tmp_path_factory.mktemp("fresh"))
    yield server
    server.close()


@in_each_view
def test_the_first_run_restores_a_photo(view, fresh, browser):
    """Start, templates, the first of the pack, Run, compare; nothing chosen, nothing downloaded."""
    fresh.post("/settings", {**frontend.SETTINGS, "Comfy.VueNodes.Enabled": view != VIEWS[0]})
    page = frontend.open_page(browser, f"http://127.0.0.1:{fresh.port}/")
    open_template(page, WORKFLOWS[0].stem)
    assert page.evaluate(MISSING) == NOTHING
    result = run_in_page(page, fresh)
    assert result.status == "success"
    assert page.errors == []
    picture = Image.fromarray(result.pictures("5")[0])
    before = Image.open(host_module.ROOT / "docs" / "examples" / "lighthouse.png")
    assert picture.size == (4 * before.width, 4 * before.height)
    side_by_side = {Image.open(path).size for path in (fresh.base / "temp").glob("ComfyUI_temp_*.png")}
    assert side_by_side == {(2 * picture.width + 8, picture.height)}
    if view == VIEWS[0]:  # the second run has the result at hand
        assert page.evaluate(SHOWN)["overlapping"] == []
        preview = last_preview(page)
        small = picture.resize(preview.size, Image.Resampling.BOX)
        assert np.corrcoef(np.asarray(small).ravel(), np.asarray(preview.convert("RGB")).ravel())[0, 1] > 0.9, "colours"
    else:
        page.get_by_alt_text("After image").first.wait_for(timeout=WAIT)  # the slider
    page.close()


def test_the_first_template_in_chinese(fresh, browser):
    """Titles and settings are Chinese, the note explains itself in Chinese, and it runs.

    After the test that waits for previews, since its results are at hand here.
    """
    fresh.post("/settings", {**frontend.SETTINGS, "Comfy.VueNodes.Enabled": False, "Comfy.Locale": "zh"})
    page = frontend.open_page(browser, f"http://127.0.0.1:{fresh.port}/")
    open_template(page, WORKFLOWS[0].stem)
    assert page.evaluate(MISSING) == NOTHING
    names = json.loads((host_module.ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    shown = dict(page.evaluate("app.graph._nodes.map(n => [n.type, n.title])"))
    for name in ("TSDSRUpscale", "TSDSRLoadCheckpoint"):
        assert shown[name] == names[name]["display_name"]
    inputs = {key: entry["name"] for key, entry in names["TSDSRUpscale"]["inputs"].items()}
    labels = page.evaluate("app.graph._nodes.find(n => n.type === 'TSDSRUpscale').widgets.map(w => w.label ?? w.name)")
    assert {inputs[key] for key in ("size", "strength", "color_fix")} <= set(labels)
    page.get_by_text("修复照片并放大 4 倍").first.wait_for(timeout=WAIT)
    result = run_in_page(page, fresh)
    assert result.status == "success"
    assert page.errors == []
    page.close()
    fresh.post("/settings", {"Comfy.Locale": "en"})
