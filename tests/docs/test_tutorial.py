"""The tutorial and the page on `steermoe run`: commands for the embedded model run and print what the pages say.

A comment before each block says what is tested: `<!-- tiny -->` blocks are run, in order, in one folder; an
`<!-- output -->` block after one must be the end of its output; `<!-- olmoe -->` blocks only go through the options'
parser, because that model is not available; `<!-- not run: ... -->` blocks are skipped.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from steermoe_local.cli import main
from steermoe_local.models import local_models
from steermoe_local.models.names import short_names
from tests.support.paths import ROOT

PAGE, RUN_PAGE = ((ROOT / "docs" / name).read_text("utf-8") for name in ("tutorial.md", "run.md"))
BLOCK = re.compile(r"^( *)<!-- (.*?) -->\n\1```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    kind: str
    language: str
    text: str


def blocks_of(text: str) -> list[Block]:
    return [Block(m[2], m[3], textwrap.dedent(m[4])) for m in BLOCK.finditer(text)]


BLOCKS = blocks_of(PAGE)


def commands(script: str) -> list[list[str]]:
    """The arguments of each call of steermoe in a shell script, without variables, pipes and redirections."""
    lexer = shlex.shlex(script.replace("\\\n", " "), posix=True, punctuation_chars="|<>&;\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if set(word) <= set("|<>&;\n"):
            redirected = bool(set(word) & set("<>"))
            if not redirected:
                found.append([])
        elif not redirected:
            found[-1].append(word)
        else:
            redirected = False
    for words in found:
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
    return [words[1:] for words in found if words and words[0] == "steermoe"]


def parse(arguments: list[str]) -> list[str]:
    """Let click take the arguments without running anything; returns the names of the commands on the way."""
    command: click.Command = main
    context = click.Context(main, info_name="steermoe", **main.context_settings)
    path = []
    while isinstance(command, click.Group):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command = found
        path.append(name)
        if isinstance(command, click.Group):
            context = click.Context(command, parent=context, info_name=name)
    command.make_context(path[-1], arguments, parent=context)
    return path


def test_every_block_says_what_it_is() -> None:
    assert len(BLOCKS) == len(re.findall(r"^ *```\w", PAGE, re.MULTILINE))
    assert {block.kind.split(":")[0] for block in BLOCKS} == {"olmoe", "tiny", "output", "not run"}
    assert {block.language for block in BLOCKS if block.kind == "output"} == {"text"}
    assert {block.language for block in BLOCKS if block.kind != "output"} == {"sh"}
    assert sum(block.kind.startswith("not run") for block in BLOCKS) == 1


@pytest.mark.parametrize(("page", "made"), [(PAGE, "numbers.json"), (RUN_PAGE, "answer.json")], ids=["tutorial", "run"])
def test_the_blocks_for_tiny_run_and_print_what_they_say(page: str, made: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # nothing of the person who runs the tests: neither a configuration nor a model in a cache
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= {"PATH": path, "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "STEERMOE_THREADS": "1"}
    folder = tmp_path / "work"
    folder.mkdir()
    printed, n_run = "", 0
    for block in blocks_of(page):
        if block.kind == "output":
            assert printed.endswith(block.text), f"printed:\n{printed}\nthe page says:\n{block.text}"
        elif block.kind == "tiny":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, f"{block.text}\n{done.stderr}"
            assert "warning" not in done.stderr
            printed, n_run = done.stdout, n_run + 1
    assert n_run == page.count("<!-- tiny -->") >= 3
    assert (folder / made).is_file()


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if OLMoE had been fetched: some options look for the model while they are read."""
    monkeypatch.chdir(tmp_path)
    real = local_models.resolve_model
    known = {"olmoe-1b-7b": tmp_path / "olmoe.gguf"}
    monkeypatch.setattr(local_models, "resolve_model", lambda name, *more: known.get(str(name)) or real(name, *more))


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind in ("olmoe", "tiny")], ids=lambda b: b.text[:60])
def test_every_command_line_is_well_formed(block: Block) -> None:
    calls = commands(block.text)
    assert len(calls) == len(re.findall(r"(?<![\w/-])steermoe(?= )", block.text))
    for arguments in calls:
        parse(list(arguments))
        assert (block.kind == "tiny") <= ("olmoe-1b-7b" not in arguments)


@pytest.mark.usefixtures("fetched")
def test_each_step_stands_twice() -> None:
    """Every step with OLMoE is also done with the embedded model."""
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        blocks = blocks_of(section)
        calls = {
            kind: [parse(list(call)) for block in blocks if block.kind == kind for call in commands(block.text)]
            for kind in ("olmoe", "tiny")
        }
        if section.startswith(("1.", "Where")):
            continue
        for path in calls["olmoe"]:
            assert path in calls["tiny"] or path == ["pull"], section.splitlines()[0]


def test_the_short_name_is_known() -> None:
    assert "olmoe-1b-7b" in short_names()


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
