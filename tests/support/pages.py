"""Reads and runs what a page of the documentation shows, as a reader would.

In the pages with marked blocks a comment before each block says what is tested: `<!-- tiny -->` blocks are run, in
order, in one folder; an `<!-- output -->` block after one must be the end of its output; others are for the test of
their page.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click

from steermoe_local.cli import main
from tests.support.scripts import load_script

BLOCK = re.compile(r"^( *)<!-- (.*?) -->\n\1```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SHELL = ["bash", "-euo", "pipefail", "-c"]


@dataclass(frozen=True)
class Block:
    """A marked block of a page: what the comment before it says, its language, its text."""

    kind: str
    language: str
    text: str


def blocks_of(text: str) -> list[Block]:
    return [Block(m[2], m[3], textwrap.dedent(m[4])) for m in BLOCK.finditer(text)]


def own_programs() -> dict[str, str]:
    """The environment with this interpreter's programs before others."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints in `folder`; it must end with status 0, without a warning in what it says."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=own_programs() if environment is None else environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"
    assert "warning" not in done.stderr, f"{command[-1]}\n{done.stderr}"
    return done.stdout


def run_blocks(blocks: Iterable[Block], folder: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run the blocks for the embedded model and compare what they print; how many were run."""
    printed, n = "", 0
    for block in blocks:
        if block.kind == "output":
            assert printed.endswith(block.text), f"printed:\n{printed}\nthe page says:\n{block.text}"
        elif block.kind == "tiny":
            command = [sys.executable, "-c"] if block.language == "python" else _SHELL
            printed, n = run([*command, block.text], folder, environment), n + 1
    return n


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


def load_generate() -> ModuleType:
    """docs/generate.py, which writes the generated pages, as a module."""
    return load_script("docs/generate.py")
