#!/usr/bin/env bash
# ComfyUI-Manager 4.3 does not recognise a pack from the registry whose pyproject.toml has dependency groups (PEP 735) that include
# one another. It reads the file with the package toml 0.10, which refuses arrays of mixed types (valid since TOML 1.0), and takes the
# error for "not from the registry": the pack is not listed with its version, not updated and not removed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet comfyui-manager==4.3 toml==0.10.2 aiohttp==3.14.5
mkdir -p "$folder/host/comfy" "$folder/pack"
touch "$folder/host/comfy/__init__.py" "$folder/pack/.tracking" # .tracking: what an installation from the registry leaves
echo 'from types import SimpleNamespace; args = SimpleNamespace()' > "$folder/host/comfy/cli_args.py"
cat > "$folder/ask.py" <<'PYTHON'
import sys
import tomllib
from pathlib import Path

from comfyui_manager.common.cnr_utils import read_cnr_info

pack = Path(sys.argv[1])
plain = '[project]\nname = "my-pack"\nversion = "1.2.3"\n[dependency-groups]\nlint = ["ruff"]\n'
including = plain + 'test = ["pytest", {include-group = "lint"}]\n'
answers = []
for text in (plain, including):
    tomllib.loads(text)  # both are valid
    (pack / "pyproject.toml").write_text(text)
    answers.append(read_cnr_info(str(pack)))
print("groups that stand alone:", answers[0])
print("a group that includes another:", answers[1])
sys.exit(answers[0] is None or answers[1] is not None)
PYTHON
export COMFYUI_PATH="$folder/host" PYTHONPATH="$folder/host"
"$folder/venv/bin/python" "$folder/ask.py" "$folder/pack"
