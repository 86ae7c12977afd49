#!/usr/bin/env bash
# safetensors 0.8.0 knows the types F6_E2M3 and F6_E3M2: it opens such a file, lists its tensors and gives their shapes, and only
# reading one fails, without the tensor's name. A file with a type that it does not know cannot be opened at all, not even for its
# other tensors, and is called invalid JSON.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import struct

import safetensors
from safetensors import SafetensorError, safe_open

print("safetensors", safetensors.__version__)


def write(kind, bits):
    """A file with 16 numbers of this type, and one ordinary tensor."""
    size = 16 * bits // 8
    header = {
        "odd": {"dtype": kind, "shape": [16], "data_offsets": [0, size]},
        "plain": {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]},
    }
    text = json.dumps(header).encode()
    with open("x.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + bytes(size + 4))


for kind in ("F6_E2M3", "F6_E3M2"):
    write(kind, 6)
    with safe_open("x.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["odd", "plain"]
        assert file.get_slice("odd").get_shape() == [16] and file.get_slice("odd").get_dtype() == kind
        assert file.get_tensor("plain").shape == (1,)
        try:
            file.get_tensor("odd")
        except SafetensorError as error:
            said = str(error)
        else:
            raise SystemExit(f"{kind} is read now")
        print(f"{kind}: opened, shape [16]; reading: {said}")
        assert "not understood" in said and "odd" not in said

write("F8_E3M4", 8)
try:
    safe_open("x.safetensors", "numpy").__enter__()
except SafetensorError as error:
    print("F8_E3M4:", str(error).split(", expected")[0])
    assert "invalid JSON in header" in str(error)
else:
    raise SystemExit("F8_E3M4 is opened now")
PYTHON
