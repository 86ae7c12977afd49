"""The example workflows: whole, described, each with a twin in API format."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ..support.node_scanner import node_ids

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
NOTES = {"MarkdownNote", "Note"}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_is_one_for_each_way_of_working():
    used = {node["type"] for path in WORKFLOWS for node in read(path)["nodes"]}
    everything = {"Upscale", "LoadCheckpoint", "LoadLora", "LoadPrompt", "Encode", "OneStep", "Decode", "ColorFix", "Sampler"}
    assert {f"TSDSR{name}" for name in everything} <= used


PACK, CARD = " TSD-SR", 29
"""What every name ends with, and how many characters of a name a card of the template browser shows at its narrowest."""


def test_their_order_is_in_their_names():
    """The host sorts them by name, or another lists them as its file system has them; then the numbers still say the order."""
    names = [path.stem for path in WORKFLOWS]
    assert [name.split()[0] for name in names] == [f"{number:02}" for number in range(1, len(names) + 1)]
    assert names[0] == next(name for name in names if "old photo" in name.lower())
    assert "SD3" in names[1]
    for searched in ("restore", "upscale", "old photo", "TSD-SR"):
        assert 0 <= names[0].lower().find(searched.lower()) <= 33, "older frontends look no further for its beginning"


def test_their_names_can_be_told_apart_where_they_are_cut():
    names = [path.stem for path in WORKFLOWS]
    assert all(name.endswith(PACK) for name in names), "so that they are found, and are the names of no other pack"
    assert all(len(name.removesuffix(PACK)) <= CARD for name in names)
    assert len({name.split()[1] for name in names}) == len(names), "the differing word is the first"


def missing(wanted: dict, given: dict, prefix: str = "") -> list[str]:
    """The required inputs that are not given, also those of chosen options."""
    found = []
    for name, (kind, *options) in ((prefix + name, entry) for name, entry in wanted.get("required", {}).items()):
        if name not in given:
            found.append(name)
        elif kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = next(option for option in options[0]["options"] if option["key"] == given[name])
            found += missing(chosen["inputs"], given, f"{name}.")
    return found


@pytest.mark.parametrize("path", sorted((FOLDER / "api").glob("*.json")), ids=lambda path: path.stem)
def test_the_api_format_gives_every_input_that_a_host_requires(path):
    """Tools that check a file before they send it want them all, though the host itself fills in defaults."""
    recorded = {answer[0]: answer[-1] for answer in read(ROOT / "tests" / "data" / "frontend.json")}
    nodes = json.loads(recorded["/api/object_info"])
    for node in read(path).values():
        assert missing(nodes[node["class_type"]]["input"], node["inputs"]) == []


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
        if node["type"] in ("CheckpointLoaderSimple", "TSDSRLoadLora", "TSDSRLoadPrompt"):
            files = [value for value in node["widgets_values"] if str(value).endswith((".safetensors", ".pt"))]
            told = {model["name"]: model for model in node["properties"]["models"]}
            assert told.keys() == set(files), "what the panel of missing models shows"
            assert all(model["directory"] and model["url"].startswith("https://") for model in told.values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_of_images_compares_before_and_after(path):
    twin = read(FOLDER / "api" / path.name)
    saved = [node["inputs"]["images"] for node in twin.values() if node["class_type"] == "SaveImage"]
    if any(node["class_type"] == "SaveVideo" for node in twin.values()):
        return
    (slider,) = (node["inputs"] for node in twin.values() if node["class_type"] == "ImageCompare")
    (joined,) = (node["inputs"] for node in twin.values() if node["class_type"] == "ImageStitch")
    assert saved == [slider["image_b"]] == [joined["image1"]]
    assert slider["image_a"] == joined["image2"]
    assert joined["direction"] == "left", "before on the left, enlarged to the size of the result"
    assert twin[slider["image_a"][0]]["class_type"] in ("LoadImage", "LoadImageDataSetFromFolder", "VAEDecode")


TITLE, SMALLEST, FONT, FILLED, MARGIN, TABS = 30, 8, 14, 0.75, 10, 38
"""Height of a node's title; font size in pixels under which the frontend draws no texts at all, and the one of its texts; share
of the canvas that it fills when it opens a template, with a margin; height of the tabs above the canvas."""
WINDOWS = [(1366, 650), (1440, 780), (1536, 730), (1440, 900), (1920, 1080)]


def boxes_of(path: Path) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of each node, without its title; of a collapsed one nothing but its title is left."""
    return [
        (*node["pos"], *(node["size"] if not node["flags"].get("collapsed") else (node["size"][0], 0)))
        for node in read(path)["nodes"]
    ]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_is_readable_as_it_opens(path):
    """All of it is shown, without texts where they would be small: not so in the windows of laptops."""
    assert "ds" not in read(path)["extra"], "a view of its own would show a part of it in older frontends"
    boxes = boxes_of(path)
    width = max(x + w for x, _, w, _ in boxes) - min(x for x, *_ in boxes) + 2 * MARGIN
    height = max(y + h for _, y, _, h in boxes) - min(y for _, y, *_ in boxes) + TITLE + 2 * MARGIN
    for across, down in WINDOWS:
        assert FONT * FILLED * min(across / width, (down - TABS) / height) >= SMALLEST


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_two_nodes_overlap(path):
    boxes = [(x, y - TITLE, width, height + TITLE) for x, y, width, height in boxes_of(path)]
    for index, (x, y, width, height) in enumerate(boxes):
        for left, top, other_width, other_height in boxes[index + 1 :]:
            apart = x + width <= left or left + other_width <= x or y + height <= top or top + other_height <= y
            assert apart


def test_each_workflow_has_a_thumbnail_of_its_own():
    thumbnails = [path.with_suffix(".jpg") for path in WORKFLOWS]
    for path in thumbnails:
        with Image.open(path) as image:
            assert image.size == (512, 512)
    assert len({path.read_bytes() for path in thumbnails}) == len(thumbnails)
    assert len(list(FOLDER.glob("*.jpg"))) == len(thumbnails)


def test_every_node_has_a_help_page():
    used = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    names = node_ids(ROOT / "nodes")
    assert len(names) == 10
    assert used == names
    for name in names:
        text = (ROOT / "web" / "docs" / f"{name}.md").read_text()
        assert text.startswith("# TSD-SR ")
        pictures = re.findall(r"\]\((images/[^)]*)\)", text)
        assert pictures
        assert all((ROOT / "web" / "docs" / picture).is_file() for picture in pictures)


IN_WORDS = {"1", "2", "3", "90"}
"""Figures of the translations that the English help pages write in words: "one image", "a third", "quarter turns"."""


@pytest.mark.parametrize("language", ["zh", "ja", "ko"])
@pytest.mark.parametrize("node", sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md")))
def test_help_in_another_language_says_the_same(node, language):
    english, page = (
        (ROOT / "web" / "docs" / path).read_text(encoding="utf-8") for path in (f"{node}.md", f"{node}/{language}.md")
    )
    for pattern in (r"^(#+|-) ", r"\*\*`(\w+)`\*\*", r"\]\(([^)]*)\)"):  # headings and items, settings, pictures and links
        assert re.findall(pattern, page, re.M) == re.findall(pattern, english, re.M)
    assert sorted(re.findall(r"`([^`]+)`", page)) == sorted(re.findall(r"`([^`]+)`", english))
    figures, told = (Counter(re.findall(r"(?<![A-Za-z.\d])\d+(?:\.\d+)?", text)) for text in (english, page))
    assert not figures - told
    assert set(told - figures) <= figures.keys() | IN_WORDS
    assert not re.search(r"(?<!\\)~", page), "two of them would strike out what is between"

    names, own = (read(ROOT / "locales" / each / "nodeDefs.json") for each in ("en", language))
    assert page.startswith(f"# {own[node]['display_name']}\n")
    named = [other for other, entry in names.items() if f"**{entry['display_name']}**" in english]
    assert all(f"**{own[other]['display_name']}**" in page for other in named)
    for name, (_, *options) in read(ROOT / "tests" / "data" / "nodes.json")[node]["inputs"].items():
        shown = re.escape(own[node]["inputs"][name.replace(".", "_")]["name"])
        assert re.search(rf"{shown} (\*\*)?`{name.split('.')[-1]}`", page), name
        for choice in options[0].get("choices", ()) if options else ():
            assert f"*{choice}*" in page, choice
