// The classic view draws inputs that a node declares as advanced like all others.  It folds away, and offers as "Show Advanced"
// in the node's menu, only widgets that carry the mark themselves; Nodes 2.0 reads the declaration.
import { app } from "../../scripts/app.js";

const marked = new WeakSet();

function mark(widget) {
  if (!widget.options?.advanced || marked.has(widget)) return;
  marked.add(widget); // once, so that it stays as others set it afterwards
  widget.advanced = true;
}

app.registerExtension({
  name: "TSDSR.Advanced",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("TSDSR")) return;
    // Before each look, since some widgets are made again when a choice changes.  Newer frontends ask for rows as they draw.
    for (const question of ["isWidgetVisible", "isWidgetRowVisible"]) {
      const answer = nodeType.prototype[question];
      if (!answer) continue;
      nodeType.prototype[question] = function (widget) {
        mark(widget);
        return answer.call(this, widget);
      };
    }
  },
});
