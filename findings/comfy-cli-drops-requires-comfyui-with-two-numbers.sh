#!/usr/bin/env bash
# comfy-cli 1.23 publishes a pack without any requirement on ComfyUI's version where requires-comfyui is not written with three
# numbers: ">=0.9" and ">=0.9.0,<1" are valid specifiers, but become nothing (a warning is printed, publishing goes on), so that the
# pack is offered to releases that cannot run it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet comfy-cli==1.23.0 packaging==26.4
cat > "$folder/ask.py" <<'PYTHON'
import sys
from pathlib import Path

from comfy_cli.registry.config_parser import extract_node_configuration
from packaging.specifiers import SpecifierSet

path = Path(sys.argv[1])
found = {}
for wanted in (">=0.9.0", ">=0.9", ">=0.9.0,<1", "==0.9.*", ">=0.9.0rc1"):
    SpecifierSet(wanted)  # all are valid
    path.write_text(
        f'[project]\nname = "my-pack"\nversion = "1.2.3"\nlicense = "MIT"\n[tool.comfy]\nrequires-comfyui = "{wanted}"\n'
    )
    found[wanted] = extract_node_configuration(str(path)).project.supported_comfyui_version
print(found)
sys.exit(found != {">=0.9.0": ">=0.9.0", ">=0.9": "", ">=0.9.0,<1": "", "==0.9.*": "", ">=0.9.0rc1": ""})
PYTHON
"$folder/venv/bin/python" "$folder/ask.py" "$folder/pyproject.toml"
