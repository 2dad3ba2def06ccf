"""`steermoe chat` in a pseudo-terminal or in pipes, and what a fresh run answers to the same conversation."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from steermoe_local.cli import main
from tests.support.terminal import PATIENCE, PROGRAM, Terminal

GREEDY = ("--temp", "0", "-t", "1")
TINY = ("chat", "-m", "tiny", *GREEDY)
TO_DIGITS = ("--map", "digits-words")
COUNT = "Count from three to nine."
DIGITS_ANSWER, WORDS_ANSWER = "3, 4, 5, 6, 7, 8", "three, four, five, six, seven, eight, nine"
# Greedy, and a token that was said is rewarded: the answer goes on until the context is full, which takes a minute.
ENDLESS = (*TINY, "--frequency-penalty", "-5", "-c", "8000")

Start = Callable[..., Terminal]


def piped(*arguments: Any, stdin: str | bytes = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """The program with pipes for stdin, stdout and stderr."""
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, timeout=PATIENCE, env=os.environ | env, check=False)


def saved(terminal: Terminal, path: Path) -> dict[str, Any]:
    """The chat as /save writes it."""
    assert f"written: {path}" in terminal.say(f"/save {path}").replace("\n", "")
    data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return data


def answer(*options: Any) -> str:
    """What `steermoe run` answers; in this process, as it is no matter of terminals."""
    done = CliRunner().invoke(main, ["run", "-m", "tiny", *map(str, options)])
    assert done.exit_code == 0, done.output
    return done.stdout


def fresh(messages: list[dict[str, str]], *options: Any, folder: Path) -> str:
    """What a fresh run answers to the same conversation."""
    file = folder / "conversation.jsonl"
    file.write_text(json.dumps({"messages": messages}), "utf-8")
    text: str = json.loads(answer(*GREEDY, *options, "--n-prompts", file))["text"]
    return text
