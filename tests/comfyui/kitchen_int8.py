"""The int8 weights of ComfyUI's own library, comfy-kitchen: run by a real host's Python.

Usage: python kitchen_int8.py IN OUT

IN holds matrices by the size of the groups to rotate; OUT has for each its int8 numbers, scales and the matrix they give.
"""

import sys

from comfy_kitchen.tensor import TensorWiseINT8Layout
from safetensors.torch import load_file, save_file

found = {}
for name, weight in load_file(sys.argv[1]).items():
    rotated = {"convrot": True, "convrot_groupsize": int(name)} if int(name) > 1 else {}
    numbers, parameters = TensorWiseINT8Layout.quantize(weight, is_weight=True, per_channel=True, **rotated)
    found |= {f"{name}.numbers": numbers, f"{name}.scale": parameters.scale}
    found[f"{name}.weight"] = TensorWiseINT8Layout.dequantize(numbers, parameters).contiguous()
save_file(found, sys.argv[2])
