"""`steermoe chat` in terminals that can do less, in pipes, and with other models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support import random_models
from tests.support.gguf_copy import copy_model
from tests.support.held import HELD, hold
from tests.support.paths import ROOT
from tests.support.random_models import RandomModel, write_random_model

if sys.platform == "win32":
    pytest.skip("pseudo-terminals", allow_module_level=True)


from tests.support.chat_program import (
    COUNT,
    DIGITS_ANSWER,
    ENDLESS,
    GREEDY,
    TINY,
    TO_DIGITS,
    WORDS_ANSWER,
    Start,
    piped,
)
from tests.support.terminal import PATIENCE, PROGRAM, Terminal

DIGITS = ROOT / "expert_maps" / "tiny" / "digits-words.json"


#
# terminals that can do less
#


def test_forty_columns(start: Start) -> None:
    terminal = start(*TINY, *TO_DIGITS, columns=40, rows=30)
    terminal.prompt()
    for line in (COUNT, "/reverse", COUNT, "/experts all", "/why full", "/help", "/reset", "/compare", COUNT):
        terminal.say(line)
    text = terminal.text
    joined = " ".join(text.split())
    # no word is torn apart by the edge
    for words in (
        WORDS_ANSWER,
        "the chat so far",
        "is recomputed under it with the next message",
        "switch steering, or choose a map, bias file or plan,",
    ):
        assert words in joined or all(word in joined.split() for word in words.split()), words
    assert "unsteered\n3, 4, 5, 6, 7, 8" in text
    assert f"steered\n{WORDS_ANSWER[:36]}" in text.replace("\n" + "steered", "\nsteered")
    assert "forced\nin" not in text.split("layer")[-1]
    cells = re.findall(r"[+-]?\d+: \d+% [+-]\d\.\d\d", text)
    assert len(cells) > 20, "experts stay together with their numbers"


def test_no_color(start: Start) -> None:
    def colours(raw: str) -> list[str]:
        codes = [code for group in re.findall(r"\x1b\[([0-9;]*)m", raw) for code in group.split(";")]
        return [code for code in codes if code and (30 <= int(code) <= 49 or 90 <= int(code) <= 107)]

    for env, coloured in ({"COLORTERM": "truecolor"}, True), ({"NO_COLOR": "1"}, False):
        terminal = start(*TINY, *TO_DIGITS, env=env)
        terminal.prompt()
        terminal.say(COUNT)
        terminal.say("/experts all")
        terminal.say("/nothing")
        terminal.type("/st")
        terminal.child.send("\t")
        terminal.until(lambda terminal=terminal: "/strength" in terminal.text)  # the menu
        assert bool(colours(terminal.raw)) is coloured, env


def test_a_dumb_terminal(start: Start, tmp_path: Path) -> None:
    """TERM=dumb: no escape sequence at all, lines as the system edits them."""
    terminal = start(*TINY, *TO_DIGITS, env={"TERM": "dumb"})

    def say(line: str) -> str:
        begin = len(terminal.raw)
        terminal.child.send(line + "\n")
        terminal.until(lambda: len(terminal.raw) > begin + len(line) and terminal.raw.endswith("\n> "))
        return terminal.raw[begin:].replace("\r", "")

    terminal.until(lambda: terminal.raw.endswith("\n> "))
    assert DIGITS_ANSWER in say(COUNT)
    assert "towards words" in say("/reverse")
    say("/compare")
    assert f"\nsteered\n{WORDS_ANSWER}\n" in say(COUNT)
    begin = len(terminal.raw)
    terminal.child.send("Count from three\\\n")
    terminal.until(lambda: terminal.raw.endswith("\n. "))
    terminal.child.send("to nine.\n")
    terminal.until(lambda: len(terminal.raw) > begin and terminal.raw.endswith("\n> "))
    say(f"/save {tmp_path / 'chat.json'}")
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert messages[-2]["content"] == "Count from three\nto nine."
    terminal.child.sendintr()
    terminal.until(lambda: "/quit leaves" in terminal.raw and terminal.raw.endswith("\n> "))
    terminal.child.sendeof()
    assert terminal.end() == 0
    assert "\x1b" not in terminal.raw


#
# no terminal
#


def test_without_a_terminal(tmp_path: Path) -> None:
    lines = [
        "",
        COUNT,
        "",
        "/reverse",
        "",
        "",
        COUNT,
        "/nothing",
        "//x",
        f"/save {tmp_path / 'chat.json'}",
        "/quit",
        "never read",
    ]
    done = piped(*TINY, *TO_DIGITS, "-n", 30, stdin="\n".join(lines))
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert out.splitlines()[:2] == [DIGITS_ANSWER, WORDS_ANSWER]
    assert "\x1b" not in out + err
    assert "\r" not in out
    assert "error: /nothing: no such command" in err
    assert "recomputed under" in err
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == [COUNT, COUNT, "/x"]
    assert len(out.splitlines()) == 4, "an empty line asked again once, after the change"
    assert out.splitlines()[3:] == messages[-1]["content"].strip("\n").splitlines()

    first = piped(*TINY, *TO_DIGITS, "-p", COUNT)
    assert (first.returncode, first.stdout.decode()) == (0, DIGITS_ANSWER + "\n")
    damaged = piped(*TINY, stdin=b"hello\n\xff\xfe\nhello\n/save a\0b\n")
    assert damaged.returncode == 0
    assert b"error: stdin:2: not UTF-8" in damaged.stderr
    assert b"control character" in damaged.stderr
    assert len(damaged.stdout.splitlines()) == 2
    assert b"Traceback" not in damaged.stderr


def test_errors_keep_the_chat(tmp_path: Path) -> None:
    """A full context, a damaged file, a folder that is a file: the conversation is what it was."""
    (tmp_path / "damaged.json").write_text('{"format": "steermoe-chat", "version": 1, "messages": "none"}')
    (tmp_path / "empty.gguf").touch()
    lines = [
        COUNT,
        f"/save {tmp_path / 'before.json'}",
        "/system " + "word " * 1200,
        COUNT,
        "/regenerate",
        f"/load {tmp_path / 'damaged.json'}",
        f"/load {tmp_path}",
        f"/steer {tmp_path / 'damaged.json'}",
        f"/steer {tmp_path / 'empty.gguf'}",
        f"/model {tmp_path / 'empty.gguf'}",
        f"/save {tmp_path / 'empty.gguf' / 'x.json'}",
        "/system off",
        f"/save {tmp_path / 'after.json'}",
        COUNT,
    ]
    done = piped(*TINY, *TO_DIGITS, stdin="\n".join(lines))
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert done.returncode == 0
    assert len(errors) == 8, errors
    assert sum("/reset" in line for line in errors) == 2, "the context is full"
    assert done.stdout.decode() == f"{DIGITS_ANSWER}\n" * 2
    before, after = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("before", "after"))
    assert after | {"created": before["created"]} == before


def test_ctrl_c_without_a_terminal(tmp_path: Path) -> None:
    """The answer comes while it is made, also through a pipe; Ctrl-C ends the program."""
    command = [*HELD, *map(str, ENDLESS), "-p", COUNT]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = os.environ | hold(tokens=60)
    with subprocess.Popen(command, env=env, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.read(30).startswith(b"3, 4, 5, 6,,,,")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, b"error: interrupted\n")


def test_only_one_end_is_a_terminal(start: Start, tmp_path: Path) -> None:
    shell = f"'{PROGRAM[0]}' {' '.join(TINY)} > answers.txt"
    with Terminal("-c", shell, program=["sh"], cwd=tmp_path, env={"TERM": "xterm"}) as terminal:
        terminal.until(lambda: terminal.raw.endswith("> "))
        terminal.child.send("Add 4 and 6.\n")
        terminal.until(lambda: terminal.raw.count("> ") == 2)
        terminal.child.sendeof()
        assert terminal.end() == 0
    assert (tmp_path / "answers.txt").read_text() in ("10\n", "ten\n")


def test_a_broken_pipe() -> None:
    shell = f"printf 'Add 4 and 6.\\n%.0s' 1 2 3 4 5 6 7 8 | '{PROGRAM[0]}' {' '.join(TINY)} | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout.strip() in ("10", "ten")
    assert done.stderr == ""


#
# models
#


def test_a_model_without_experts(tiny_path: Path, tmp_path: Path) -> None:
    """It chats; what has to do with steering says why it cannot."""
    with mock.patch.object(random_models, "N_VOCAB", 1280):  # of the embedded model
        plain_model = write_random_model(tmp_path / "plain.gguf", RandomModel("dots1", n_layer=2, n_dense=2))
    (dense,) = copy_model(plain_model, tmp_path / "dense.gguf", tokenizer_of=tiny_path)
    commands = ["/steer", "/steer digits-words", "/steer on", "/activate 3", "/reverse", "/compare", "/layers 1"]
    done = piped("chat", "-m", dense, *GREEDY, "-n", 4, stdin="\n".join(["Hello.", *commands, "/experts", "/why"]))
    assert done.returncode == 0
    assert done.stdout.strip()
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error:")]
    assert sum("no layer has" in line for line in errors) == len(commands)
    assert len(errors) == len(commands) + 2
    assert "Traceback" not in done.stderr.decode()
    refused = piped("chat", "-m", dense, *TO_DIGITS)
    assert refused.returncode == 1
    assert b"no layer has experts" in refused.stderr


def test_a_map_of_another_model_is_refused_before_it_is_loaded(tmp_path: Path, random_model: Any) -> None:
    other = random_model(random_models.OLMOE)
    done = piped("chat", "-m", other, *TO_DIGITS)
    assert done.returncode == 1
    assert b"steermoe detect" in done.stderr
    assert done.stderr.count(b"\n") == 1
