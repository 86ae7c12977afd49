"""The nodes as they are now, without a host, against what was recorded of them and what workflows rely on."""

import json

import pytest

from ..comfyui import host as host_module
from ..comfyui.graphs import all_inputs, frozen
from ..comfyui.stub_host import imported, schemas

DATA = host_module.ROOT / "tests" / "data"
LISTS = {"transformer_lora", "vae_lora", "prompt", "checkpoint"}
"""Inputs whose choices are the files of one machine."""


@pytest.fixture
def nodes(monkeypatch) -> dict[str, dict]:
    return schemas(monkeypatch)


def told(node: dict) -> dict:
    """What the frontend makes of a node, without the files that a machine has."""
    inputs = {
        name: (kind, {key: value for key, value in options.items() if name not in LISTS or key not in ("options", "default")})
        for name, kind, options in all_inputs(node)
    }
    for kind, options in inputs.values():
        for own in ("multiselect", "multiline", "dynamicPrompts"):  # what the host adds
            options.pop(own, None)
        if kind == "COMFY_DYNAMICCOMBO_V3":
            options["options"] = [choice["key"] for choice in options["options"]]
    rest = {key: node[key] for key in ("display_name", "category", "description", "output", "output_node")}
    return {"inputs": inputs, **rest, "search_aliases": node.get("search_aliases")}


def test_the_recording_shows_the_nodes_as_they_are(nodes):
    """Else the frontend would be tested with nodes that are no more; then run tests.comfyui.record_frontend again."""
    answers = json.loads((DATA / "frontend.json").read_text())
    recorded = json.loads(next(body for path, _, _, body in answers if path == "/api/object_info"))
    assert {name: told(node) for name, node in nodes.items()} == {
        name: told(node) for name, node in recorded.items() if name.startswith("TSDSR")
    }


def test_saved_workflows_stay_valid(nodes):
    assert {name: frozen(node) for name, node in nodes.items()} == json.loads((DATA / "nodes.json").read_text())


def test_every_node_and_setting_explains_itself(nodes):
    for name, node in nodes.items():
        assert node["description"]
        assert node["search_aliases"]
        for key, kind, options in all_inputs(node):
            assert options.get("tooltip"), (name, key)
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"], (name, key)


@pytest.mark.parametrize("language", ["en", "zh", "ja", "ko"])
def test_every_language_says_what_the_nodes_say(language, nodes):
    """Choices are shown untranslated, which the host's locale files cannot change: their tooltips name and explain each."""
    said = json.loads((host_module.ROOT / "locales" / language / "nodeDefs.json").read_text())
    assert said.keys() == nodes.keys()
    for name, node in nodes.items():
        inputs = {key.replace(".", "_"): (kind, options) for key, kind, options in all_inputs(node)}
        assert said[name]["inputs"].keys() == inputs.keys()
        assert said[name]["display_name"].startswith("TSD-SR ")
        for key, (kind, options) in inputs.items():
            entry = said[name]["inputs"][key]
            assert entry["name"]
            if language == "en":
                assert entry["tooltip"] == options["tooltip"], (name, key)
            elif kind == "COMFY_DYNAMICCOMBO_V3":
                assert all(choice["key"] in entry["tooltip"] for choice in options["options"]), (name, key)
            elif key in ("dtype", "vae_precision"):
                assert all(choice in entry["tooltip"] for choice in options["options"]), (name, key)
        if language == "en":
            assert (said[name]["display_name"], said[name]["description"]) == (node["display_name"], node["description"])


def test_what_few_people_need_is_folded_away(nodes):
    """Of TSDSRUpscale the size, the strength and the colour fix stay in sight; the rest chooses itself."""
    settings = {
        key: options
        for key, kind, options in all_inputs(nodes["TSDSRUpscale"])
        if kind not in ("IMAGE", "MODEL", "VAE", "CONDITIONING")
    }
    shown = [key for key, options in settings.items() if not options.get("advanced")]
    assert shown == ["size", "size.factor", "size.pixels", "strength", "color_fix"]
    assert (settings["tile"]["default"], settings["tile_batch"]["default"]) == (0, 0)
    assert settings["color_fix.wavelet_levels"]["default"] == 0


def test_an_old_host_gets_the_same_nodes_without_the_options_that_it_lacks(nodes, monkeypatch):
    old = schemas(monkeypatch, old=True)
    assert {name: frozen(node) for name, node in old.items()} == {name: frozen(node) for name, node in nodes.items()}
    assert not any(node["search_aliases"] for node in old.values())
    assert not any("advanced" in options for node in old.values() for _, _, options in all_inputs(node))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("misspelt", ["search_alias", "is_output", "tooltips"])
def test_a_misspelt_option_is_refused(old, misspelt, monkeypatch):
    with imported(monkeypatch, old) as package:
        schema = package.host.schema
        with pytest.raises(TypeError, match=misspelt):
            schema.Schema(node_id="A", display_name="B", description="C", inputs=[], outputs=[], **{misspelt: ""})
        with pytest.raises(TypeError, match=misspelt):
            schema.field(schema.io.Int, "x", **{misspelt: ""})
