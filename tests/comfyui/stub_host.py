"""The nodes' schemas without a host: stands in for ComfyUI's modules just far enough that ``nodes`` can be imported."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from . import host as host_module

TYPES = {
    "Image": "IMAGE", "Model": "MODEL", "Vae": "VAE", "Conditioning": "CONDITIONING", "Latent": "LATENT",
    "Sampler": "SAMPLER", "Int": "INT", "Boolean": "BOOLEAN", "Float": "FLOAT", "String": "STRING", "Combo": "COMBO",
    "DynamicCombo": "COMFY_DYNAMICCOMBO_V3",
}  # fmt: skip
_NEEDED = (
    "comfy", "comfy.lora", "comfy.model_base", "comfy.model_detection", "comfy.model_management", "comfy.model_patcher",
    "comfy.ops", "comfy.patcher_extension", "comfy.quant_ops", "comfy.samplers", "comfy.sd", "comfy.taesd",
    "comfy.taesd.taesd", "comfy.utils", "comfy_api", "latent_preview", "folder_paths",
)  # fmt: skip


class Anything(ModuleType):
    """A module that has every class one asks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Kind:
    """``io.Float`` and the like: inputs are (name, type, options)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def Input(self, id, tooltip=None, default=None, min=None, max=None, step=None, options=None, advanced=None):
        given = {"tooltip": tooltip, "default": default, "min": min, "max": max, "step": step, "advanced": advanced,
                 "options": options}  # fmt: skip
        return id, self.kind, {key: value for key, value in given.items() if value is not None}

    def Output(self):
        return self.kind

    @staticmethod
    def Option(key, inputs):
        return {"key": key, "inputs": {"required": as_required(inputs)}}


def as_required(inputs) -> dict:
    """Inputs as ``/object_info`` tells of them."""
    return {name: [kind, options] for name, kind, options in inputs}


def make_schema(node_id, display_name, category, description, search_aliases, inputs, outputs, is_output_node=False,
                essentials_category=None, accept_all_inputs=False, hidden=()):  # fmt: skip
    """``io.Schema`` as ``/object_info`` tells of it."""
    return {
        "name": node_id, "display_name": display_name, "category": category, "description": description,
        "search_aliases": search_aliases, "input": {"required": as_required(inputs)}, "output": outputs,
        "output_node": is_output_node,
    }  # fmt: skip


def schemas(monkeypatch) -> dict[str, dict]:
    """All nodes by id."""
    io = Anything("io")
    io.Schema, io.ComfyNode, io.Hidden = make_schema, object, SimpleNamespace(unique_id="UNIQUE_ID")
    for name, kind in TYPES.items():
        setattr(io, name, Kind(kind))
    latest = Anything("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, object
    for module in (*(Anything(name) for name in _NEEDED), latest):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)
    sys.modules["folder_paths"].get_filename_list = lambda folder: []
    place = host_module.ROOT / "__init__.py"
    spec = importlib.util.spec_from_file_location("pack_in_a_host", place, submodule_search_locations=[str(place.parent)])
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pack_in_a_host", pack)
    try:
        spec.loader.exec_module(pack)
        nodes = sys.modules["pack_in_a_host.nodes"].NODES
        return {(schema := node.define_schema())["name"]: schema for node in nodes}
    finally:
        for name in [name for name in sys.modules if name.startswith("pack_in_a_host.")]:
            del sys.modules[name]
