// The classic view draws inputs that a node declares as advanced like all others.  It folds away, and offers as "Show Advanced"
// in the node's menu, only widgets that carry the mark themselves; Nodes 2.0 reads the declaration.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "TSDSR.Advanced",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("TSDSR")) return;
    const isWidgetVisible = nodeType.prototype.isWidgetVisible;
    nodeType.prototype.isWidgetVisible = function (widget) {
      widget.advanced ??= widget.options?.advanced; // here, since some widgets are made again when a choice changes
      return isWidgetVisible.call(this, widget);
    };
  },
});
