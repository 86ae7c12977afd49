// Shows on a node what it reports: while it runs, and with its result, also where the result was at hand.  A widget of our own,
// since newer frontends remove the texts of all nodes as a job ends, and draw a result's text on few nodes only.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NAME = "tsdsr_report";
const HEIGHT = 72; // three lines, with margins
const STYLE = "font: 12px/16px sans-serif; white-space: pre-line; overflow: auto; user-select: text; color: var(--input-text)";

function addWidget(node) {
  const element = document.createElement("div");
  element.style.cssText = STYLE;
  const widget = node.addDOMWidget(NAME, NAME, element, {
    getValue: () => element.textContent,
    setValue: (text) => (element.textContent = text),
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
    hideInPanel: true,
    hideOnZoom: false,
    serialize: false, // in prompts
  });
  widget.serialize = false; // in workflows
  return widget;
}

function show(node, text) {
  const widget = node.widgets?.find((widget) => widget.name === NAME) ?? addWidget(node);
  widget.value = text;
  node.setDirtyCanvas(true, true);
}

function showOutput(node, output) {
  if (output?.text) show(node, [output.text].flat().join("\n"));
}

/** A node by its number, after those of the subgraph nodes around it or the id of its subgraph. */
function find(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph ?? app.graph;
  for (const part of path.slice(0, -1)) graph = graph?.subgraphs?.get(part) ?? graph?.getNodeById(part)?.subgraph;
  const node = graph?.getNodeById(path.at(-1));
  return node?.type?.startsWith("TSDSR") ? node : undefined;
}

app.registerExtension({
  name: "TSDSR.Report",
  setup() {
    api.addEventListener("tsdsr.text", ({ detail }) => {
      const node = find(detail.node);
      if (node) show(node, detail.text);
    });
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("TSDSR")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      showOutput(this, output);
    };
  },
  // Results that are opened with a workflow, from the queue or another tab.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs ?? {})) {
      const node = find(id);
      if (node) showOutput(node, output);
    }
  },
});
