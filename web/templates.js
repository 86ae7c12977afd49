// ComfyUI lists a pack's templates in the order of the file system, which can be any order. This sorts them by number.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const getWorkflowTemplates = api.getWorkflowTemplates;
if (getWorkflowTemplates) {
  api.getWorkflowTemplates = async function () {
    const templates = await getWorkflowTemplates.apply(this, arguments);
    for (const names of Object.values(templates)) {
      if (names.every((name) => name.startsWith("TSD-SR "))) names.sort();
    }
    return templates;
  };
}
app.registerExtension({ name: "TSDSR.Templates" });
