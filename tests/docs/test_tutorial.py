"""The tutorial, the pages on the steps and on `steermoe run`: their commands for the embedded model run and print what
the pages say.

`<!-- hub -->` blocks only go through the options' parser, because their models are not available; `<!-- not run: ...
-->` blocks are skipped. The others: tests/support/pages.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from steermoe_local.models import local_models
from steermoe_local.models.names import short_names
from tests.support.pages import Block, blocks_of, commands, own_programs, parse, run_blocks
from tests.support.paths import ROOT

MADE = {"tutorial": "maps/numbers/map.json", "how-it-works": "numbers.json", "run": "answer.json"}
"""The pages, and a file that each makes."""
HUB = ("olmoe-1b-7b", "granite-1b-a400m")
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in MADE}
STEPS = PAGES["how-it-works"]


def blocks_for(*kinds: str) -> list[Block]:
    pages = (PAGES["tutorial"], STEPS)
    return [block for page in pages for block in blocks_of(page) if block.kind in kinds]


@pytest.mark.parametrize("name", ["tutorial", "how-it-works"])
def test_every_block_says_what_it_is(name: str) -> None:
    page = PAGES[name]
    blocks = blocks_of(page)
    assert len(blocks) == len(re.findall(r"^ *```\w", page, re.MULTILINE))
    assert {block.kind.split(":")[0] for block in blocks} == {"hub", "tiny", "output", "not run"}
    assert {block.language for block in blocks if block.kind == "output"} == {"text"}
    assert {block.language for block in blocks if block.kind != "output"} == {"sh"}
    assert sum(block.kind.startswith("not run") for block in blocks) == 1


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_for_tiny_run_and_print_what_they_say(name: str, tmp_path: Path) -> None:
    # nothing of the person who runs the tests: neither a configuration nor a model in a cache
    environment = {key: text for key, text in own_programs().items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "STEERMOE_THREADS": "1"}
    folder = tmp_path / "work"
    environment["STEERMOE_MAPS"] = str(folder / "maps")
    folder.mkdir()
    assert run_blocks(blocks_of(PAGES[name]), folder, environment) == PAGES[name].count("<!-- tiny -->") >= 3
    assert (folder / MADE[name]).is_file()


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the hub's models had been fetched: some options look for the model while they are read."""
    monkeypatch.chdir(tmp_path)
    real = local_models.resolve_model
    known = {name: tmp_path / f"{name}.gguf" for name in HUB}
    monkeypatch.setattr(local_models, "resolve_model", lambda name, *more: known.get(str(name)) or real(name, *more))


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize("block", blocks_for("hub", "tiny"), ids=lambda b: b.text[:60])
def test_every_command_line_is_well_formed(block: Block) -> None:
    calls = commands(block.text)
    assert len(calls) == len(re.findall(r"(?<![\w/-])steermoe(?= )", block.text))
    for arguments in calls:
        parse(list(arguments))
        assert (block.kind == "tiny") <= (not set(HUB) & set(arguments))


@pytest.mark.usefixtures("fetched")
def test_each_step_stands_twice() -> None:
    """Every step with a model of the hub is also done with the embedded one."""
    for page in (PAGES["tutorial"], STEPS):
        for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
            blocks = blocks_of(section)
            calls = {
                kind: [parse(list(call)) for block in blocks if block.kind == kind for call in commands(block.text)]
                for kind in ("hub", "tiny")
            }
            if section.startswith(("1.", "Where")):
                continue
            for path in calls["hub"]:
                assert path in calls["tiny"] or path == ["pull"], section.splitlines()[0]


def test_the_short_names_are_known() -> None:
    assert set(HUB) <= set(short_names())


def test_the_parser_is_strict() -> None:
    """A lenient parser would hide mistakes in the pages from the tests above."""
    for wrong in (["run", "-m", "x", "--activat"], ["map", "show"], ["run", "--top-p", "2"], ["chat", "--compare"]):
        with pytest.raises(click.ClickException):
            parse(wrong)
    with pytest.raises(AssertionError):
        parse(["rum"])
    assert commands("A=b steermoe run -m x \\\n  -p 'a | b' | cat > out\necho steermoe") == [
        ["run", "-m", "x", "-p", "a | b"]
    ]
