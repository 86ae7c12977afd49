"""The example workflows: whole, described, each with a twin in API format."""

import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
NOTES = {"MarkdownNote", "Note"}


def read(path: Path):
    return json.loads(path.read_text())


def test_there_is_one_for_each_way_of_working():
    used = {node["type"] for path in WORKFLOWS for node in read(path)["nodes"]}
    everything = {"Upscale", "LoadCheckpoint", "LoadLora", "LoadPrompt", "Encode", "OneStep", "Decode", "ColorFix", "Sampler"}
    assert {f"TSDSR{name}" for name in everything} <= used
    assert len(WORKFLOWS) >= 6


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_explains_itself_and_has_a_twin(path):
    nodes = {node["id"]: node for node in read(path)["nodes"]}
    assert [node for node in nodes.values() if node["type"] in NOTES and len(node["widgets_values"][0]) > 100]
    twin = read(FOLDER / "api" / path.name)
    drawn = sorted(node["type"] for node in nodes.values() if node["type"] not in NOTES)
    assert drawn == sorted(node["class_type"] for node in twin.values())
    for link in read(path)["links"]:
        _, source, output, target, entry, _ = link
        assert nodes[source]["outputs"][output]["links"]
        name = nodes[target]["inputs"][entry]["name"]
        assert twin[str(target)]["inputs"][name] == [str(source), output]
    for node in nodes.values():
        if node["type"] == "CheckpointLoaderSimple":
            assert node["properties"]["models"][0]["name"] == node["widgets_values"][0]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_two_nodes_overlap(path):
    boxes = [(*node["pos"], *node["size"]) for node in read(path)["nodes"]]
    for index, (x, y, width, height) in enumerate(boxes):
        for left, top, other_width, other_height in boxes[index + 1 :]:
            apart = x + width <= left or left + other_width <= x or y + height <= top or top + other_height <= y
            assert apart


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_a_thumbnail(path):
    with Image.open(path.with_suffix(".jpg")) as image:
        assert image.size == (640, 426)


def test_the_published_pack_holds_what_a_host_needs():
    """.comfyignore leaves out what only developers need, and nothing else."""
    lines = (ROOT / ".comfyignore").read_text().split()
    assert all(line.startswith("/") and line.strip("/") for line in lines), "a name without / would match in any folder"
    left_out = tuple(line.strip("/") for line in lines)
    needed = ["__init__.py", "nodes", "tsdsr_core/restore.py", "tsdsr_core/assets", "web", "locales", "workflows", "subgraphs",
              "pyproject.toml", "LICENSE", "README.md"]  # fmt: skip
    for name in needed:
        assert (ROOT / name).exists()
        assert not any(name == prefix or name.startswith(f"{prefix}/") or prefix.startswith(f"{name}/") for prefix in left_out)


def test_every_node_has_a_help_page():
    used = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    names = {line.split('"')[1] for path in (ROOT / "nodes").glob("*.py") for line in path.read_text().splitlines()
             if line.strip().startswith('"TSDSR')}  # fmt: skip
    assert len(names) == 10
    assert used == names
    for name in names:
        text = (ROOT / "web" / "docs" / f"{name}.md").read_text()
        assert f"](images/{name}.png)" in text
        assert (ROOT / "web" / "docs" / "images" / f"{name}.png").is_file()
