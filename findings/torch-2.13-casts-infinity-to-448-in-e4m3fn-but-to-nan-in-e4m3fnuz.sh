#!/usr/bin/env bash
# torch 2.13.0 saturates when it casts to float8_e4m3fn: infinity and all that is too large become 448, so a check for NaN and infinity
# after the cast finds nothing. In float8_e4m3fnuz and float8_e5m2fnuz the same values become NaN, in float8_e5m2 infinity.
# torch 2.9.1 gives NaN in float8_e4m3fn too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch

print("torch", torch.__version__)
values = torch.tensor([math.inf, -math.inf, 1e6, math.nan])
found = {}
for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"):
    found[name] = [str(value) for value in values.to(getattr(torch, name)).float().tolist()]
    print(name, found[name])
assert found["float8_e4m3fn"] == ["448.0", "-448.0", "448.0", "nan"]
assert found["float8_e5m2"] == ["inf", "-inf", "inf", "nan"]
assert found["float8_e4m3fnuz"] == found["float8_e5m2fnuz"] == ["nan"] * 4
PYTHON
