"""What scripts and other nodes may hand to an input, for the real host."""

import json

import numpy as np
import torch

import nodes

NUMBERS = {
    "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "-1": -1, "huge": 10**9, "text": "4", "True": True,
    "None": None, "list": [1], "tensor": torch.ones(1),
}  # fmt: skip
IMAGES = {
    "None": None,
    "number": 3,
    "no batch": torch.rand(8, 8, 3),
    "2 channels": torch.rand(1, 8, 8, 2),
    "5 channels": torch.rand(1, 8, 8, 5),
    "no image": torch.rand(0, 8, 8, 3),
    "no rows": torch.rand(1, 0, 8, 3),
    "video": torch.rand(1, 2, 8, 8, 3),
    "bytes": torch.full((1, 8, 8, 3), 128, dtype=torch.uint8),
    "whole numbers": torch.ones(1, 8, 8, 3, dtype=torch.int64),
    "nan": torch.full((1, 8, 8, 3), torch.nan),
    "infinite": torch.full((2, 8, 8, 4), torch.inf),
    "0 to 255": 255 * torch.rand(1, 8, 8, 3),
    "8-bit floats": torch.rand(1, 8, 8, 3).to(torch.float8_e4m3fn),
    "sparse": torch.rand(1, 8, 8, 3).to_sparse(),
    "nested": torch.nested.nested_tensor([torch.rand(8, 8, 3)]),
    "meta": torch.rand(1, 8, 8, 3, device="meta"),
    "beyond fp32": torch.full((1, 8, 8, 3), 1e300, dtype=torch.float64),
}
TENSORS = {
    "text": "x", "numbers": [1.0], "array": np.zeros((1, 16, 4, 4)), "empty": torch.zeros(1, 16, 0, 4),
    "whole numbers": torch.ones(1, 16, 4, 4, dtype=torch.int64), "complex": torch.zeros(1, 16, 4, 4, dtype=torch.complex64),
    "8-bit floats": torch.zeros(1, 16, 4, 4).to(torch.float8_e4m3fn), "sparse": torch.ones(1, 16, 4, 4).to_sparse(),
    "nested": torch.nested.nested_tensor([torch.ones(16, 4, 4)]), "meta": torch.ones(1, 16, 4, 4, device="meta"),
}  # fmt: skip
PROMPTS = {
    **{f"tokens {name}": (value, torch.zeros(1, 64)) for name, value in TENSORS.items()},
    **{f"pooled {name}": (torch.zeros(1, 8, 64), value) for name, value in TENSORS.items()},
    "flat tokens": (torch.zeros(8, 64), torch.zeros(1, 64)), "flat pooled": (torch.zeros(1, 8, 64), torch.zeros(64)),
    "nan": (torch.full((1, 8, 64), torch.nan), torch.zeros(1, 64)),
}  # fmt: skip
OBJECTS = {"None": None, "number": 3, "dictionary": {}, "text": "x", "list": [3]}
BAD = {
    "INT": {**NUMBERS, "1.5": 1.5},
    "FLOAT": NUMBERS,
    "COMBO": {"misspelt": "nothing like it", "number": 3, "None": None, "list": []},
    "STRING": {"number": 3, "None": None},
    "BOOLEAN": {"number": 1, "text": "true", "None": None, "list": []},
    "IMAGE": IMAGES,
    **dict.fromkeys(("MODEL", "VAE"), OBJECTS),
    "CONDITIONING": {**OBJECTS, **{name: [[tokens, {"pooled_output": pooled}]] for name, (tokens, pooled) in PROMPTS.items()}},
    "LATENT": {**OBJECTS, **{f"samples {name}": {"samples": value} for name, value in TENSORS.items()}},
}
"""By type, under a name for reports."""
MISSING = object()


def cases(fields, given, prefix=""):
    """(input's full name, what is bad, arguments) for each bad value of each input."""
    for field in fields:
        name, kind = f"{prefix}{field.id}", field.get_io_type()
        if not field.optional:
            yield name, "missing", {key: value for key, value in given.items() if key != field.id}
        if kind != "COMFY_DYNAMICCOMBO_V3":
            for label, value in BAD[kind].items():
                yield name, label, {**given, field.id: value}
            continue
        for label, value in {"misspelt": "misspelt", "None": None, "inside": {field.id: "misspelt"}, "empty": {}}.items():
            yield name, label, {**given, field.id: value}
        for option in field.options:
            chosen = {field.id: option.key, **valid(option.inputs, {})}
            for inner, label, values in cases(option.inputs, chosen, f"{name}."):
                yield inner, label, {**given, field.id: values}


def valid(fields, linked):
    """Arguments that a node takes."""
    found = {}
    for field in fields:
        kind = field.get_io_type()
        if kind == "COMFY_DYNAMICCOMBO_V3":
            found[field.id] = {field.id: field.options[0].key, **valid(field.options[0].inputs, {})}
        elif kind in linked:
            found[field.id] = linked[kind]
        else:
            found[field.id] = field.options[0] if kind == "COMBO" else field.default
    return found


class BadValues:
    """Calls every node of the pack with every bad value, one at a time, and says how each call ended."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"model": ("MODEL",), "vae": ("VAE",), "conditioning": ("CONDITIONING",)}}
    )
    RETURN_TYPES = ()
    FUNCTION = "call"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def call(self, model, vae, conditioning):
        latent, image = {"samples": torch.zeros(1, 16, 4, 4)}, torch.rand(1, 8, 8, 3)
        linked = {"MODEL": model, "VAE": vae, "CONDITIONING": conditioning, "LATENT": latent, "IMAGE": image}
        found = []
        for node, kind in nodes.NODE_CLASS_MAPPINGS.items():
            if not node.startswith("TSDSR"):
                continue
            fields = kind.GET_SCHEMA().inputs
            for name, label, given in cases(fields, valid(fields, linked)):
                try:
                    kind.execute(**given)
                    ended = "success", ""
                except Exception as error:
                    ended = type(error).__name__, str(error)
                found.append([node, name, label, *ended])
        return {"ui": {"text": [json.dumps(found)]}}


class Value:
    """A value of any type over a connection, which the host does not check."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"kind": (sorted(BAD),), "name": ("STRING", {})}})
    RETURN_TYPES = ("*",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, kind, name):
        return (BAD[kind][name],)


class Text:
    """A text of any type, as nodes give it that choose a file."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"text": ("STRING", {})}})
    RETURN_TYPES = ("*",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, text):
        return (text,)


class Disc:
    """A white disc with alpha over a hidden colour."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"soft": ("FLOAT", {"default": 0.0}), "hidden": ("FLOAT", {})}})
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, soft, hidden):
        middle = torch.arange(48) - 23.5
        distance = torch.hypot(middle[:, None], middle)
        alpha = ((16 - distance) / soft + 0.5).clamp(0, 1) if soft else (distance < 16).float()
        alpha = (alpha * 255).round()[None, ..., None] / 255
        return (torch.cat((torch.where(alpha > 0, 1.0, hidden).expand(-1, -1, -1, 3), alpha), -1),)
