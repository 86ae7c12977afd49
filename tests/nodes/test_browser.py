"""The nodes in the real frontend: blueprint, search, progress, errors, help."""

import json

import pytest

from ..comfyui import host as host_module
from ..comfyui.frontend import DROP, ON_A_HOST, VIEWS, WAIT, run_in_page, show
from ..comfyui.graphs import builtin_graph, load_sd3
from ..comfyui.host import Graph

on_a_host = pytest.mark.parametrize("page", ON_A_HOST, indirect=True)


@pytest.mark.parametrize("path", sorted((host_module.ROOT / "subgraphs").glob("*.json")), ids=lambda path: path.stem)
def test_a_blueprint_opens_with_its_stages_and_dials(path, page):
    page.errors.clear()
    page.evaluate(DROP, [path.read_text(), path.name])
    page.wait_for_function("app.graph._nodes.length === 1 && !!app.graph._nodes[0].subgraph", timeout=WAIT)
    page.wait_for_timeout(500)
    kinds = [node["class_type"] for node in page.evaluate("async () => (await app.graphToPrompt()).output").values()]
    assert sorted(kinds) == ["ImageScaleBy", "TSDSRColorFix", "TSDSRDecode", "TSDSREncode", "TSDSROneStep"]
    dials = page.evaluate("app.graph._nodes[0].widgets.map(w => w.name)")
    assert [name.split(": ")[-1] for name in dials] == ["scale_by", "strength", "color_fix"], (
        "older frontends put the inner id first"
    )
    assert page.errors == []


VISIBLE = """() => {
  const node = app.graph._nodes.find(n => n.type === 'TSDSRUpscale');
  const drawn = node.isWidgetRowVisible ?? node.isWidgetVisible;
  return node.widgets.filter(w => drawn.call(node, w)).map(w => w.name);
}"""
"""What the classic view asks of each widget before it draws it; newer frontends have a method of its own for it."""


def test_the_classic_view_folds_away_what_few_people_need(page):
    graph, _ = builtin_graph()
    page.evaluate("graph => app.loadApiJson(graph, 'advanced')", graph.nodes)
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRUpscale')", timeout=WAIT)
    if not page.evaluate("app.graph._nodes.some(n => n.widgets?.some(w => w.options.advanced))"):
        pytest.skip("this ComfyUI does not know advanced inputs")
    shown = ["size", "size.factor", "strength", "color_fix"]
    assert page.evaluate(VISIBLE) == shown
    node = "app.graph._nodes.find(n => n.type === 'TSDSRUpscale')"
    choose = f"name => {{ {node}.widgets.find(w => w.name === 'color_fix').value = name }}"
    page.evaluate(choose, "adain")
    page.evaluate(choose, "wavelet")
    assert page.evaluate(VISIBLE) == shown, "the number of levels is a new widget"
    page.evaluate(f"{node}.toggleAdvanced()")
    folded = ["color_fix.wavelet_levels", "tile", "tile_overlap", "tile_batch", "vae_tile", "draft"]
    assert page.evaluate(VISIBLE) == [*shown, *folded]


SEARCH = """query => document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('nodeDef')
  .nodeSearchService.searchNode(query, [], {limit: 64}).map(node => node.name)"""
ALIASES = "async () => (await app.api.getNodeDefs()).TSDSRUpscale.search_aliases ?? []"
WISHES = ["old photo", "enhance", "denoise", "sharpen", "restoration", "jpeg artifacts", "face", "upscale", "restore", "grain"]


WISHES += ["老照片", "修复", "放大", "超分辨率", "降噪"]
WISHES += ["古い写真", "修復", "拡大", "超解像", "高画質", "오래된 사진", "복원", "업스케일", "화질"]


@pytest.mark.parametrize("query", [*WISHES, "tsdsr", "tsd-sr"])
def test_the_node_search_finds_the_upscaler(query, page):
    """By the frontend's own search, which ranks matches of names, short ones first, before those of aliases."""
    if query in WISHES and not page.evaluate(ALIASES):
        pytest.skip("this ComfyUI knows no search aliases")
    found = page.evaluate(SEARCH, query)
    assert "TSDSRUpscale" in found
    parts = [name for name in found if name.startswith("TSDSR")]
    if query in WISHES:
        assert parts[0] == "TSDSRUpscale"
        assert query.isascii() or found[0] == "TSDSRUpscale", "nothing else is called so"
    else:
        assert len(parts) == 10
        assert parts.index("TSDSRUpscale") < 3


def progress_of(page) -> list[tuple[int, int]]:
    """(value, max) of each progress message that the page received."""
    messages = [json.loads(frame) for frame in page.received if isinstance(frame, str)]
    return [(m["data"]["value"], m["data"]["max"]) for m in messages if m["type"] == "progress"]


@on_a_host
def test_progress_counts_the_tiles_of_all_stages(page, host):
    graph, _ = builtin_graph("large.png", **{"size.factor": 1.0, "tile": 48, "tile_batch": 1})
    page.evaluate("graph => app.loadApiJson(graph, 'tiles')", graph.nodes)
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRUpscale')", timeout=WAIT)
    assert run_in_page(page, host).status == "success"
    found = progress_of(page)
    values = [value for value, _ in found]
    assert {total for _, total in found} == {9 + 2 * 16}, "3x3 tiles, and 16 each to encode and decode"
    assert values == sorted(values)
    assert values[-1] == 41
    assert len(set(values)) >= 5, "the page sees it move; messages that come too fast are dropped"


REPORTS = """() => [...document.querySelectorAll('div')]
  .filter(e => e.childElementCount === 0 && e.textContent.includes(' s; peak'))
  .filter(e => e.checkVisibility() && e.clientHeight >= 16 && e.scrollHeight <= e.clientHeight + 1).map(e => e.textContent)"""
"""The reports that the page draws, whole."""


WIDE = "app.graph._nodes.find(n => n.type === 'TSDSRUpscale').setSize([390, 620])"
"""As wide as in the templates."""


def open_graph(page, graph: Graph, name: str) -> None:
    page.evaluate("app.graph.clear()")
    page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [graph.nodes, name])
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRUpscale')", timeout=WAIT)


@pytest.mark.parametrize("view", VIEWS)
@on_a_host
def test_the_report_stays_and_comes_with_a_result_at_hand(view, page, request, host):
    """After the end of the job, at which newer frontends clear what the host itself shows; and in a graph opened anew."""
    show(page, view)
    graph, _ = builtin_graph(strength=0.5 + 0.01 * len(request.node.name))  # a result of its own for each case
    open_graph(page, graph, request.node.name)
    page.evaluate(WIDE)
    assert page.evaluate(REPORTS) == []
    assert run_in_page(page, host).status == "success"
    page.wait_for_function(f"({REPORTS})().length === 1", timeout=WAIT)
    page.wait_for_timeout(1500)
    (text,) = page.evaluate(REPORTS)
    assert "→" in text
    assert "encode" in text
    workflow = page.evaluate("JSON.stringify(app.graph.serialize())")
    assert "encode" not in workflow, "it is no value of the node"
    if not host.get("/object_info/TSDSRUpscale")["TSDSRUpscale"].get("has_intermediate_output"):
        pytest.skip("this ComfyUI does not tell what nodes said whose results are at hand")
    open_graph(page, graph, f"{request.node.name} again")
    page.evaluate(WIDE)
    assert run_in_page(page, host).status == "success"
    page.wait_for_timeout(1500)
    assert page.evaluate(REPORTS) == [text]


@on_a_host
def test_no_text_is_sent_as_a_picture(page, host):
    """Scripts take any binary message that is no picture for one; a text of the host's has the type 3."""
    graph, _ = builtin_graph(strength=0.33)
    (upscale,) = (node for node in graph.nodes.values() if node["class_type"] == "TSDSRUpscale")
    images = graph.add("RepeatImageBatch", image=tuple(upscale["inputs"]["image"]), amount=2)
    upscale["inputs"]["image"] = [images, 0]
    open_graph(page, graph, "two")
    page.evaluate(WIDE)
    assert run_in_page(page, host).status == "success"
    assert [frame for frame in page.received if isinstance(frame, bytes) and frame[:4] == bytes([0, 0, 0, 3])] == []
    messages = [json.loads(frame) for frame in page.received if isinstance(frame, str)]
    assert [m["data"]["text"] for m in messages if m["type"] == "tsdsr.text"] == ["1/2 images", "2/2 images"]
    page.wait_for_function(f"({REPORTS})().some(text => text.startsWith('2 images'))", timeout=WAIT)


@on_a_host
def test_the_page_shows_what_is_wrong(page, host, sd3):
    graph = Graph()
    lora, _ = load_sd3(graph, transformer_lora="tsdsr/vae.safetensors")
    graph.add("PreviewAny", source=(lora, 0))
    page.evaluate("graph => app.loadApiJson(graph, 'wrong')", graph.nodes)
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRLoadLora')", timeout=WAIT)
    assert run_in_page(page, host).status == "error"
    details = page.get_by_test_id("error-overlay-see-errors")  # newer frontends first show only which node failed
    message = page.get_by_text("are the two files swapped?").first
    details.or_(message).first.wait_for(timeout=WAIT)
    if details.count():
        details.first.click()
    message.wait_for(timeout=WAIT)
    page.keyboard.press("Escape")


@on_a_host
def test_the_help_of_a_node_opens_with_its_picture(page, host):
    graph, _ = builtin_graph()
    page.evaluate("graph => app.loadApiJson(graph, 'help')", graph.nodes)
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRUpscale')", timeout=WAIT)
    page.evaluate("app.canvas.selectNode(app.graph._nodes.find(n => n.type === 'TSDSRUpscale'))")
    page.wait_for_timeout(1000)
    button = page.locator("[data-testid='info-button'], .help-button")
    button.first.evaluate("button => button.click()")
    shown = "[...document.querySelectorAll('img')].some(i => i.src.endsWith('/strength.png') && i.naturalWidth > 100)"
    page.wait_for_function(shown, timeout=WAIT)
    assert page.get_by_text("exactly the requested size").first.is_visible()
