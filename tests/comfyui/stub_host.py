"""The nodes' schemas without a host: stands in for ComfyUI's modules just far enough that ``nodes`` can be imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    """``io.Float`` and the like: inputs are (name, type, options), also optional ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def Input(self, id, tooltip=None, default=None, min=None, max=None, step=None, options=None, optional=False,
              advanced=None):  # fmt: skip
        given = {"tooltip": tooltip, "default": default, "min": min, "max": max, "step": step, "advanced": advanced,
                 "options": options}  # fmt: skip
        return id, self.kind, {key: value for key, value in given.items() if value is not None}

    def Output(self):
        return self.kind

    @staticmethod
    def Option(key, inputs):
        return {"key": key, "inputs": {"required": as_required(inputs)}}


class OldKind(Kind):
    """The same in the oldest host."""

    def Input(self, id, tooltip=None, default=None, min=None, max=None, step=None, options=None, optional=False):
        return super().Input(id, tooltip, default, min, max, step, options, optional)


def as_required(inputs) -> dict:
    """Inputs as ``/object_info`` tells of them."""
    return {name: [kind, options] for name, kind, options in inputs}


class Schema(dict):
    """``io.Schema`` as ``/object_info`` tells of it."""

    def __init__(self, node_id, display_name, category, description, inputs, outputs, search_aliases=(), is_output_node=False,
                 essentials_category=None, accept_all_inputs=False, has_intermediate_output=False, hidden=()):  # fmt: skip
        super().__init__(
            name=node_id, display_name=display_name, category=category, description=description, output=outputs,
            search_aliases=search_aliases, input={"required": as_required(inputs)}, output_node=is_output_node,
        )  # fmt: skip


class OldSchema(Schema):
    """The same in the oldest host."""

    def __init__(self, node_id, display_name, category, description, inputs, outputs, is_output_node=False, hidden=()):
        super().__init__(node_id, display_name, category, description, inputs, outputs, is_output_node=is_output_node)


@contextmanager
def imported(monkeypatch, old: bool = False) -> Iterator[ModuleType]:
    """The package ``nodes`` of the pack, as the newest or the oldest host imports it."""
    io = Anything("io")
    io.ComfyNode, io.Hidden = object, SimpleNamespace(unique_id="UNIQUE_ID")
    io.Schema, make_kind = (OldSchema, OldKind) if old else (Schema, Kind)
    for name, kind in TYPES.items():
        setattr(io, name, make_kind(kind))
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
        yield sys.modules["pack_in_a_host.nodes"]
    finally:
        for name in [name for name in sys.modules if name.startswith("pack_in_a_host.")]:
            del sys.modules[name]


def schemas(monkeypatch, old: bool = False) -> dict[str, dict]:
    """All nodes by id, in the newest or the oldest host."""
    with imported(monkeypatch, old) as nodes:
        return {(schema := node.define_schema())["name"]: schema for node in nodes.NODES}
