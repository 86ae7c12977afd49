#!/usr/bin/env bash
# ComfyUI-Manager 4.3 does not recognise an installed pack from the registry whose version is a prerelease (1.2.3rc1, 1.2.3-beta) or is
# dynamic, though comfy-cli 1.23 reads all of these for publishing. Post-releases and fourth numbers are recognised.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet comfyui-manager==4.3 comfy-cli==1.23.0 aiohttp==3.14.5
mkdir -p "$folder/host/comfy" "$folder/pack"
touch "$folder/host/comfy/__init__.py" "$folder/pack/.tracking" # .tracking: what an installation from the registry leaves
echo 'from types import SimpleNamespace; args = SimpleNamespace()' > "$folder/host/comfy/cli_args.py"
echo '__version__ = "1.2.3"' > "$folder/pack/version.py"
cat > "$folder/ask.py" <<'PYTHON'
import sys
from pathlib import Path

from comfy_cli.registry.config_parser import extract_node_configuration
from comfyui_manager.common.cnr_utils import read_cnr_info

pack = Path(sys.argv[1])
known = {}
for version in ("1.2.3", "1.2.3.post1", "1.2.3.4", "1.2.3rc1", "1.2.3-beta", None):
    line = f'version = "{version}"' if version else 'dynamic = ["version"]\n[tool.comfy.version]\npath = "version.py"'
    (pack / "pyproject.toml").write_text(f'[project]\nname = "my-pack"\nlicense = "MIT"\n{line}\n')
    published = extract_node_configuration(str(pack / "pyproject.toml")).project.version
    known[version] = (read_cnr_info(str(pack)) or {}).get("version")
    print(f"{version or 'dynamic':12} comfy-cli reads {published:12} ComfyUI-Manager knows {known[version]}")
    assert published == (version or "1.2.3")
sys.exit([version for version, answer in known.items() if answer is None] != ["1.2.3rc1", "1.2.3-beta", None])
PYTHON
export COMFYUI_PATH="$folder/host" PYTHONPATH="$folder/host"
"$folder/venv/bin/python" "$folder/ask.py" "$folder/pack"
