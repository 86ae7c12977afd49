"""The documentation: its links resolve, and what it says of commands, folders and installation is so."""

import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tsdsr_core.cli.command import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "web" / "docs").rglob("*.md")])
TRAIN = ("run", "prepare", "export", "evalset")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+(?!\w)")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", CODE.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", LINK.sub("]", heading).lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere; the frontend shows help pages of every language from one address."""
    help_pages = ROOT / "web" / "docs"
    folder = help_pages if page.is_relative_to(help_pages) else page.parent
    found = []
    for link in LINK.findall(CODE.sub("", text_of(page))):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = folder / unquote(parts.path) if parts.path else page
        missing = not target.resolve().is_relative_to(ROOT) or not target.exists()
        if missing or (parts.fragment and parts.fragment not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page):
    assert broken(page) == []


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# One `two`: three\n```\n# no heading\n```\n", encoding="utf-8")
    (tmp_path / "a.md").write_text(
        "[a](b.md) [b](b.md#one-two-three) [c](b.md#no-heading) ![d](none.png) [e](#here) [f](../x.md) [g](https://x.org/y)",
        encoding="utf-8",
    )
    assert broken(tmp_path / "a.md") == ["b.md#no-heading", "none.png", "#here", "../x.md"]


def test_the_readme_is_short_and_has_the_commands_of_the_gate():
    readme, gate = text_of(ROOT / "README.md"), text_of(ROOT / ".ci" / "run")
    assert readme.count("\n") <= 135
    lines = [line.replace(" --quiet", "") for line in gate.splitlines()]
    commands = [line for line in lines if line.startswith("pip install -c")] + ["pytest -n 2"]
    assert len(commands) == 3
    for command in commands:
        assert re.search(f"^{re.escape(command)}$", readme, re.MULTILINE), command
    start = "tsdsr upscale docs/examples/lighthouse.png -o "
    assert any(line.startswith(start) for line in lines)
    assert f"\n{start}" in readme


def test_the_public_address_has_one_placeholder_at_most():
    pages = [ROOT / "pyproject.toml", *PAGES]
    assert sum(text_of(page).count("github.com/OWNER") for page in pages) <= 1


def options_of(capsys, *command: str) -> set[str]:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return set(OPTION.findall(capsys.readouterr().out)) - {"--help", "--debug"}


def sections(page: Path, level: int) -> dict[str, str]:
    """The text below each heading of a level, by heading, up to the next one of that level or above."""
    parts = re.split(rf"^(#{{1,{level}}}) (.+)$", text_of(page), flags=re.MULTILINE)[1:]
    return {parts[i + 1]: parts[i + 2] for i in range(0, len(parts), 3) if len(parts[i]) == level}


def test_the_command_reference_has_every_option_and_no_other(capsys):
    page = ROOT / "docs" / "commands.md"
    told = sections(page, 2)
    for command in COMMANDS:
        if command == "train":
            continue
        assert set(OPTION.findall(told[f"tsdsr {command}"])) == options_of(capsys, command), command
    told = sections(page, 3)
    for command in TRAIN:
        heading = "tsdsr train CONFIG.toml" if command == "run" else f"tsdsr train {command}"
        assert set(OPTION.findall(told[heading])) == options_of(capsys, "train", command), command


def test_the_map_shows_every_folder():
    block = CODE.search(text_of(ROOT / "CONTRIBUTING.md"))
    assert block
    shown, above = set(), []
    for line in block[0].splitlines()[1:-1]:
        indent = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split(", ")
        above = [*above[:indent], names[0]]
        shown |= {"".join(above[:indent]) + name for name in names}
    for name in shown:
        assert (ROOT / name).exists(), name
        assert (ROOT / name).is_dir() == name.endswith("/"), name
    for top in ("nodes", "tsdsr_core", "docs", "tests", "workflows", "subgraphs"):
        folders = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / top).rglob("*.*")}
        unlisted = ("tests/data/", "tests/typings/")
        assert {name for name in folders if "__pycache__" not in name and not name.startswith(unlisted)} <= shown
