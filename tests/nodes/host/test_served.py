"""What the pack hands to a real ComfyUI: nodes, help, languages, workflows."""

import json
import re
import urllib.parse

import pytest

from ...comfyui import host as host_module
from ...comfyui.graphs import all_inputs, frozen
from ...nodes.test_schemas import told


def test_the_pack_is_imported_without_a_word_and_fast(host):
    log = host.log.read_text().partition("To see the GUI")[0]
    assert not [line for line in log.splitlines() if "IMPORT FAILED" in line and host_module.PACK in line]
    seconds = float(re.search(rf"([\d.]+) seconds: .*{host_module.PACK}", log)[1])
    assert seconds < 0.5
    assert "installed twice" not in log
    assert not [
        line for line in log.splitlines() if "tsd" in line.lower() and ("warn" in line.lower() or "error" in line.lower())
    ]


def own_nodes(host) -> dict:
    return {name: node for name, node in host.get("/object_info").items() if name.startswith("TSDSR")}


def test_every_node_and_input_is_described(host):
    nodes = own_nodes(host)
    assert len(nodes) == 10
    for name, node in nodes.items():
        assert node["category"] == "image/upscaling/TSD-SR"
        assert node["description"]
        assert node["display_name"].startswith("TSD-SR ")
        for key, _, options in all_inputs(node):
            assert options.get("tooltip"), (name, key)


def test_saved_workflows_stay_valid(host):
    """What people's workflows refer to, in its order: only ever add to this file, and never narrow a range in it."""
    found = {name: frozen(node) for name, node in own_nodes(host).items()}
    assert found == json.loads((host_module.ROOT / "tests" / "data" / "nodes.json").read_text())


def test_the_recording_is_what_this_host_answers(host):
    """The recorded answers that the browser tests use where there is no host."""
    answers = json.loads((host_module.ROOT / "tests" / "data" / "frontend.json").read_text())
    recorded = {path: json.loads(body) for path, _, kind, body in answers if "json" in kind}
    version = recorded["/api/system_stats"]["system"]["comfyui_version"]
    if host.get("/system_stats")["system"]["comfyui_version"] != version:
        pytest.skip(f"recorded with {version}")
    stand = {name: told(node) for name, node in own_nodes(host).items()}
    assert stand == {name: told(node) for name, node in recorded["/api/object_info"].items() if name.startswith("TSDSR")}


def test_help_workflows_and_languages_are_served(host):
    names = own_nodes(host)
    docs = f"/extensions/{host_module.PACK}/docs"
    for name in names:
        page = host.read(f"{docs}/{name}.md").decode()
        assert page.startswith(f"# {names[name]['display_name']}\n")
        for picture in re.findall(r"\]\((images/[^)]*)\)", page):
            assert host.read(f"{docs}/{picture}").startswith(b"\x89PNG")
    blueprints = {entry["name"] for entry in host.get("/global_subgraphs").values()}
    assert {path.stem for path in (host_module.ROOT / "subgraphs").glob("*.json")} <= blueprints
    templates = host.get("/workflow_templates")[host_module.PACK]
    assert set(templates) == {path.stem for path in (host_module.ROOT / "workflows").glob("*.json")}
    for template in templates:
        address = f"/api/workflow_templates/{host_module.PACK}/{urllib.parse.quote(template)}"
        assert host.get(f"{address}.json")["nodes"]
        assert host.read(f"{address}.jpg").startswith(b"\xff\xd8")


@pytest.mark.parametrize("language", ["en", "zh", "ja", "ko"])
def test_the_nodes_speak_the_language(language, host):
    said = host.get("/i18n")[language]["nodeDefs"]
    for name, node in own_nodes(host).items():
        inputs = {key.replace(".", "_"): options for key, _, options in all_inputs(node)}
        assert said[name]["inputs"].keys() == inputs.keys()
        assert all(entry["name"] and entry["tooltip"] for entry in said[name]["inputs"].values()), name
        if language == "en":
            assert {key: entry["tooltip"] for key, entry in said[name]["inputs"].items()} == {
                key: options["tooltip"] for key, options in inputs.items()
            }
            assert (said[name]["display_name"], said[name]["description"]) == (node["display_name"], node["description"])
