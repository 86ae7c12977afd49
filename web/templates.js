// The host lists a pack's templates as the file system has them, which on some is no order at all.  Their numbers give one.
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
