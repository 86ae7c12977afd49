"""Take the pictures of the help pages and of the README from a running ComfyUI that has this pack.

    python docs/draw_nodes.py http://127.0.0.1:8188

Writes web/docs/images/<node id>.png for the help pages that show their node, and docs/images/workflow.png after running the
first template. Needs Playwright, a Chromium (CHROMIUM_PATH) and fonts for Chinese, Japanese and Korean, such as Debian's
fonts-noto-cjk; the lists of files show what that ComfyUI has.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import urllib.request
from pathlib import Path

from playwright.sync_api import FloatRect, Page, sync_playwright

ROOT = Path(__file__).parent.parent
MARGIN, TITLE = 12, 30
READY = "!!(window.app && window.app.graph && LiteGraph.registered_node_types.TSDSRUpscale)"
QUIET = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
ONLY_THE_GRAPH = """
  #vue-app * { visibility: hidden }
  #graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important }
"""
ALONE = """async type => {
  for (const other of [...app.graph._nodes]) app.graph.remove(other);  // clear() would give the next one its number again
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  node.pos = [0, 0];
  await new Promise(done => setTimeout(done, 300));
  node.size = [Math.max(300, node.computeSize()[0]), node.computeSize()[1]];
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [400, 200];
  app.canvas.draw(true, true);
  return [...node.size];
}"""
OPEN = """async ([text, name]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name, {type: 'application/json'}));
  document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
}"""
FIT = """() => {
  const boxes = app.graph._nodes.map(n => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
  const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
  const right = Math.max(...boxes.map(b => b[2])), bottom = Math.max(...boxes.map(b => b[3]));
  const scale = Math.min(1, 1500 / (right - left), 760 / (bottom - top));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [-left + 90 / scale, -top + 90 / scale];
  app.canvas.draw(true, true);
  return [90, 90, (right - left) * scale, (bottom - top) * scale];
}"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    address = parser.parse_args().address.rstrip("/")
    chromium = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("chromium-browser")
    post(f"{address}/settings", json.dumps(QUIET).encode(), "application/json")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1800, "height": 1000}, device_scale_factor=1.5)
        page.goto(address)
        page.wait_for_function(READY, timeout=120_000)
        page.wait_for_timeout(3000)
        page.add_style_tag(content=ONLY_THE_GRAPH)
        for help_page in sorted((ROOT / "web" / "docs").glob("*.md")):
            picture = f"images/{help_page.stem}.png"
            if f"]({picture})" in help_page.read_text():
                draw_node(page, help_page.stem, help_page.parent / picture)
        draw_workflow(page, ROOT / "docs" / "images" / "workflow.png")
        browser.close()


def draw_node(page: Page, name: str, path: Path) -> None:
    """One node on its own."""
    width, height = page.evaluate(ALONE, name)
    page.wait_for_timeout(500)
    height += TITLE
    clip: FloatRect = {"x": 400 - MARGIN, "y": 200 - TITLE - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    page.screenshot(path=path, clip=clip)


def draw_workflow(page: Page, path: Path) -> None:
    """The first workflow, after a run."""
    workflow = min((ROOT / "workflows").glob("*.json"))
    page.evaluate(OPEN, [workflow.read_text(encoding="utf-8"), workflow.name])
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'TSDSRUpscale')")
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function("app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.length > 0", timeout=600_000)
    page.wait_for_timeout(1500)
    left, top, width, height = page.evaluate(FIT)
    page.wait_for_timeout(1000)
    page.screenshot(path=path, clip={"x": left - 20, "y": top - 20, "width": width + 40, "height": height + 40})


def post(address: str, body: bytes, kind: str) -> None:
    """A POST request."""
    urllib.request.urlopen(urllib.request.Request(address, body, {"Content-Type": kind}), timeout=60).close()


if __name__ == "__main__":
    main()
