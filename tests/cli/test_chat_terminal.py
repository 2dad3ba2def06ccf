"""`steermoe chat` as a person meets it: the real program in a pseudo-terminal."""

from __future__ import annotations

import os
import re
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from steermoe_local import BiasFile, write_bias
from steermoe_local.steering.steering import Steering
from tests.support.gguf_copy import copy_model
from tests.support.held import HELD, hold
from tests.support.paths import ROOT
from tests.support.random_models import RandomModel, write_random_model

if sys.platform == "win32":
    pytest.skip("pseudo-terminals", allow_module_level=True)

import termios

from steermoe_local.cli.chat.commands import COMMANDS
from tests.support.chat_program import (
    COUNT,
    DIGITS_ANSWER,
    ENDLESS,
    GREEDY,
    TINY,
    TO_DIGITS,
    WORDS_ANSWER,
    Start,
    answer,
    fresh,
    saved,
)
from tests.support.terminal import PATIENCE, Terminal, plain

BLANK = str.maketrans("", "", " >\n\b")
"""Takes a prompt away."""
DIGITS = ROOT / "expert_maps" / "tiny" / "digits-words.json"


#
# every command
#


def test_every_command(start: Start, tmp_path: Path) -> None:
    """A command that this test does not know fails it."""
    tried: set[str] = set()
    terminal = start(*TINY, "--maps", DIGITS.parent, "--system-prompt", "Use digits.", columns=110)
    terminal.prompt()

    def command(line: str, *expected: str) -> str:
        tried.add(line[1:].split()[0])
        shown = " ".join(terminal.say(line).split())
        assert "error" not in shown or any(words.startswith("error") for words in expected), shown
        for words in expected:
            assert words in shown, shown
        return shown

    help_page = command("/help", "Ctrl-D leaves", "Alt-Enter")
    assert all(f"/{name} " in help_page for name in COMMANDS)

    # nothing is there yet
    command("/experts", "error: there is no answer yet")
    command("/why", "error: there is no answer yet")
    command("/speed", "error: there is no answer yet")
    command("/regenerate", "error: there is no answer yet")
    command("/activate 4", "error: no steering is chosen; /steer NAME takes one of digits-words")
    command("/compare", "error: no steering is chosen")
    command("/steer", "steering: off", "digits-words", "document-memory")
    command("/steer digits-word", "error: digits-word: no such file", "did you mean digits-words?")
    command("/steer on", "error: no steering is chosen")

    # choose and change
    command(
        "/steer digits-words", "steering: digits-words: 2 experts promoted, 4 suppressed, towards digits, hard rule"
    )
    command("/deactivate 5", "2 experts promoted, 5 suppressed")
    command("/activate 6", "experts promoted, 5 suppressed")
    assert DIGITS_ANSWER in terminal.say(COUNT)
    shown = command("/reverse", "towards words", "the chat so far", "is recomputed under it")
    assert re.search(r"the chat so far \(\d\d tokens\)", shown)
    command("/reverse on", "towards words")
    assert WORDS_ANSWER in terminal.say(COUNT)
    command("/layers 1-2", "layers 1-2")
    command("/layers 7", "error: layers: there is no layer 7")
    command("/layers", "error: /layers: give layers")
    command("/layers all", "all layers")
    command("/strength 2.5", "soft rule, strength 2.5")
    command("/strength much", "error: /strength much: give the logits to add")
    command("/weights log-odds", "soft rule, strength 2.5", "log-odds")
    command("/weights length", "error: /weights length: give one of")
    command("/cap 2", "capped rule")
    command("/cap much", "error: /cap much: give the most logits")
    command("/cap off", "hard rule")
    command("/rank log-odds", "log-odds")
    command("/rank effect", "error:", "steermoe attribute")
    command("/rank size", "error: /rank size: give one of")
    command("/rank rd", "5 suppressed")
    command("/strength hard", "hard rule")
    command("/activate -1", "error: /activate -1: give a number of experts")
    command("/steer off", "steering: off; /steer on goes back to digits-words")
    command("/steer on", "experts promoted, 5 suppressed, towards words")

    # what the last answer did
    command("/experts", "The last answer: 14 tokens", "The most used", "100%", "/experts all shows every layer")
    command("/experts all", "The last answer: 14 tokens", "layer expert", "+2: 100% -1.00")
    command("/experts some", "error: /experts some: give all")
    command("/why", "steering changed", "forced in", "5 experts", "Most changed: layer", "/why full shows every layer")
    command("/why full", "steering changed", "Promoted:", "forced in", "Suppressed:", "5 experts", "layer promoted")

    # sampling
    command("/temp 0.5", "temp: 0.5")
    command("/temp 0", "temp: 0")
    command("/seed 7", "seed: 7")
    command("/set", "seed: 7", "top-k: 40")
    command("/set top_k 20", "top-k: 20")
    command("/speed", "prompt tokens", "t/s")
    command("/speed on", "shown after every answer")
    assert "t/s" in terminal.say("Add 4 and 6.")
    command("/speed off", "not shown")
    assert " ten" in " " + command("/regenerate")
    command("/reasoning hide", "reasoning: hidden")
    command("/reasoning", "reasoning: shown")
    command("/reasoning loud", "error: /reasoning loud: give show or hide")

    # side by side
    command("/compare on", "compare: on", "same seed")
    shown = " ".join(terminal.say("Which number comes after three?").split())
    assert re.search(r"unsteered\s+│ steered", shown), shown
    command("/compare", "compare: off")
    command("/compare", "compare: on")
    command("/steer off", "compare: off, as nothing steers")
    command("/compare", "error: nothing steers")
    command("/steer on", "5 suppressed, towards words")
    command("/compare off", "compare: off")
    command("/compare perhaps", "error: /compare perhaps: give on or off")

    # the conversation
    data = saved(terminal, tmp_path / "chat.json")
    tried.add("save")
    assert [m["role"] for m in data["messages"]] == ["user", "assistant"] * 4
    assert data["system"] == "Use digits."
    assert data["steering"]["reverse"] is True
    command("/save", "error: /save: name a file")
    command("/save /no/such/folder/x.json", "error:", "does not exist")
    command("/reset", "the chat begins anew")
    assert saved(terminal, tmp_path / "empty.json")["messages"] == []
    command("/steer off", "steering: off")
    command(f"/load {tmp_path / 'chat.json'}", "8 messages", "experts promoted, 5 suppressed, towards words")
    assert saved(terminal, tmp_path / "again.json")["messages"] == data["messages"]
    command("/load nothing.json", "error: nothing.json: cannot be read")
    command("/system", "system prompt: Use digits.")
    command("/system Use words.", "system prompt: Use words.", "recomputed")
    command("/system off", "system prompt: none")

    # another model, and back
    other = write_random_model(tmp_path / "other.gguf", RandomModel("olmoe", n_layer=2))
    command(f"/model {other}", "error:", "no tokenizer")  # found out when it is loaded: the old one comes back
    assert WORDS_ANSWER in terminal.say(COUNT)
    command("/model nothing.gguf", "error:", "nothing.gguf")
    command("/model tiny", "model:", "tiny-moe.gguf", "recomputed by it", "5 suppressed, towards words")
    assert WORDS_ANSWER in terminal.say(COUNT)

    n_messages = len(saved(terminal, tmp_path / "before.json")["messages"])
    for line, meant in (
        ("/stear off", "did you mean /steer?"),
        ("/exi", "did you mean /exit?"),
        ("/xyzzy", "/help lists them"),
    ):
        shown = " ".join(terminal.say(line).split())
        assert f"error: {line.split()[0]}: no such command" in shown
        assert meant in shown
    assert "error: /help takes nothing behind" in terminal.say("/help me")
    terminal.say("//help")
    after = saved(terminal, tmp_path / "after.json")["messages"]
    assert len(after) == n_messages + 2, "an unknown command is never a message"
    assert after[-2]["content"] == "/help"

    tried.add("quit")
    terminal.child.send("/quit\r")
    assert terminal.end() == 0
    assert tried == set(COMMANDS)
    assert "Traceback" not in terminal.raw


def test_a_bias_file_has_no_numbers_to_change(start: Start, tmp_path: Path) -> None:
    steering = Steering.open(map_file=DIGITS, activate=4, deactivate=4, reverse=True)
    bias = steering.build()
    assert isinstance(bias, BiasFile)
    write_bias(bias, tmp_path / "words.gguf")
    terminal = start(*TINY, "--bias", "words.gguf", "--maps", ".")
    terminal.prompt()
    assert "words: 4 experts promoted, 4 suppressed, hard rule" in terminal.text
    assert WORDS_ANSWER in terminal.say(COUNT)
    assert "error: activate: words is a bias" in terminal.say("/activate 3")
    assert "error: reverse: words is a bias" in terminal.say("/reverse")
    assert "towards digits" in terminal.say("/steer digits-words")
    assert "words: 4 experts promoted" in terminal.say("/steer words")
    assert "/steer on goes back to words" in terminal.say("/steer off")


#
# answers
#


def test_an_answer_streams_and_ctrl_c_stops_it(start: Start, tmp_path: Path) -> None:
    terminal = start(*ENDLESS, program=HELD, env=hold(tokens=60))
    terminal.prompt()

    def stream(message: str) -> None:
        """Read some pieces of the answer; at its end there would be another prompt."""
        begin, n_prompts = len(terminal.raw), terminal.n_prompts
        terminal.child.send(message + "\r")
        terminal.until(lambda: "," * 40 in plain(terminal.raw[begin:]))
        for n_commas in (61, 62, 63):  # piece by piece
            terminal.until(lambda n=n_commas: plain(terminal.raw[begin:]).count(",") >= n)
        assert terminal.n_prompts == n_prompts, "the answer ended before it was stopped"

    begin = len(terminal.raw)
    stream(COUNT)
    n = terminal.n_prompts
    terminal.child.sendintr()
    terminal.prompt(n + 1)
    shown = plain(terminal.raw[begin:])
    assert "stopped" in shown

    # Ctrl-C at a line drops it, at an empty one it says how to leave
    terminal.type("not sent")
    n = terminal.n_prompts
    terminal.child.send("\x03")
    terminal.prompt(n + 1)
    assert "Ctrl-D or /quit leaves" not in terminal.text
    n = terminal.n_prompts
    terminal.child.send("\x03")
    terminal.prompt(n + 1)
    assert "Ctrl-D or /quit leaves" in terminal.text

    # the chat goes on with what was said
    first = saved(terminal, tmp_path / "one.json")["messages"]
    assert [m["role"] for m in first] == ["user", "assistant"]
    said = "".join(shown.split("stopped")[0].split())
    assert "".join(first[1]["content"].split()) in said
    assert first[1]["content"].startswith("3, 4, 5, 6")
    stream(COUNT)
    n = terminal.n_prompts
    terminal.child.sendintr()
    terminal.prompt(n + 1)
    second = saved(terminal, tmp_path / "two.json")["messages"]
    assert second[:2] == first
    assert [m["role"] for m in second] == ["user", "assistant"] * 2
    terminal.child.send("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.raw


def test_what_is_typed_ahead_waits_for_its_turn(start: Start, tmp_path: Path) -> None:
    terminal = start(*ENDLESS, "-n", 400, program=HELD, env=hold(tokens=60, until=tmp_path / "typed"))
    terminal.prompt()
    terminal.child.send(COUNT + "\r")
    terminal.until(lambda: ",,,," in plain(terminal.raw))
    terminal.child.send("Add 4 and 6.\r/help")
    (tmp_path / "typed").touch()
    terminal.until(lambda: terminal.n_prompts == 3 and terminal.line == "> /help")
    answer = plain(terminal.raw).split(",,,,", 1)[1]
    assert "Add" not in answer.split("stopped after -n 400 tokens")[0]
    assert answer.count("stopped after -n 400 tokens") == 2


def test_a_steered_chat_equals_a_fresh_run_of_its_transcript(start: Start, tmp_path: Path) -> None:
    """Three turns under three steerings: nothing that an older steering computed is used."""
    questions = ("Add 4 and 6.", "Which number comes after three?", COUNT)
    to_words = (*TO_DIGITS, "--activate", 4, "--deactivate", 4, "--reverse")
    steerings: tuple[tuple[Any, ...], ...] = ((), (*TO_DIGITS, "--activate", 4, "--deactivate", 4), to_words)
    commands = ([], ["/steer digits-words", "/activate 4", "/deactivate 4"], ["/reverse"])
    terminal = start(*TINY)
    terminal.prompt()
    for lines, question in zip(commands, questions, strict=True):
        for line in lines:
            shown = terminal.say(line)
            assert "is recomputed under it" in " ".join(shown.split()), shown
        terminal.say(question)
    messages = saved(terminal, tmp_path / "chat.json")["messages"]
    assert [m["content"] for m in messages[::2]] == list(questions)
    for turn, options in enumerate(steerings):
        transcript = messages[: 2 * turn + 1]
        assert fresh(transcript, *options, folder=tmp_path) == messages[2 * turn + 1]["content"], f"turn {turn + 1}"
    assert messages[-1]["content"] != fresh(messages[:-1], *steerings[1], folder=tmp_path), "it shows nothing"


def test_compare_answers_both_with_the_same_seed(start: Start, tmp_path: Path) -> None:
    warm = ("--temp", "1.5", "-s", "7", "-t", "1")
    question = "Which number comes after three?"
    steering = (*TO_DIGITS, "--reverse")
    sides = [answer(*warm, *options, "-p", question).strip() for options in ((), steering)]
    assert sides[0] != sides[1]

    def columns(terminal: Terminal) -> tuple[str, str]:
        terminal.prompt()
        terminal.say("/compare")
        terminal.say(question)
        rows = terminal.text.split("unsteered", 2)[-1].splitlines()
        pairs = [row.split("│") for row in rows[1:] if "│" in row]
        return (" ".join(" ".join(p[0].split()) for p in pairs).strip(), " ".join(p[1].strip() for p in pairs).strip())

    wide = start("chat", "-m", "tiny", *warm, *steering, columns=80)
    assert columns(wide) == tuple(sides)
    assert saved(wide, tmp_path / "chat.json")["messages"][-1]["content"].strip() == sides[1], "steered goes on"

    narrow = start("chat", "-m", "tiny", *warm, *steering, columns=79)
    narrow.prompt()
    narrow.say("/compare")
    shown = narrow.say(question)
    assert "│" not in shown
    for heading, side in (("unsteered", sides[0]), ("steered", sides[1])):
        assert re.search(rf"^{heading}\n{re.escape(side)}$", shown, re.MULTILINE), shown


def test_reasoning_is_dim_or_hidden(start: Start, tiny_path: Path, tmp_path: Path) -> None:
    """A template that leaves the model in the middle of its reasoning: all that it says is that."""
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|><think>"
    (thinker,) = copy_model(tiny_path, tmp_path / "thinker.gguf", template=template)
    terminal = start("chat", "-m", thinker, *GREEDY, "-n", 8)
    terminal.prompt()
    shown = terminal.say(COUNT)
    content = saved(terminal, tmp_path / "chat.json")["messages"][-1]
    reasoning = " ".join(content["reasoning_content"].split())
    assert content["content"] == ""
    assert reasoning in " ".join(shown.split())
    assert re.search(r"\x1b\[2;3m" + re.escape(reasoning.split()[0]), terminal.raw), "dim"
    terminal.say("/reasoning hide")
    shown = terminal.say(COUNT)
    assert reasoning not in " ".join(shown.split())
    assert "thinking ..." in shown


#
# what is typed
#


def test_several_lines_history_and_completion(start: Start, tmp_path: Path) -> None:
    terminal = start(*TINY, "-n", 4)
    terminal.prompt()
    for keys in ("one\x1b\rtwo", "one\ntwo", "one\\\rtwo", '"""\rone\rtwo\r"""'):
        terminal.say(keys)
    terminal.say("\x1b[200~/one\rtwo\x1b[201~")  # pasted: lines are not sent one by one, and this is no command
    messages = saved(terminal, tmp_path / "chat.json")["messages"]
    assert [m["content"] for m in messages[::2]] == ["one\ntwo"] * 4
    assert "error: /one: no such command" in terminal.text

    # completion: one candidate, then an argument
    terminal.type("/regen")
    terminal.child.send("\t")
    terminal.until(lambda: terminal.line == "> /regenerate")
    terminal.child.send("\x15")  # Ctrl-U drops the line
    terminal.until(lambda: terminal.line == "> ")
    terminal.type("/steer document-m")
    terminal.child.send("\t")
    terminal.until(lambda: terminal.line == "> /steer document-memory")
    n = terminal.n_prompts
    terminal.child.send("\r")
    terminal.prompt(n + 1)
    assert "steering: document-memory" in terminal.text
    terminal.child.send("\x04")
    assert terminal.end() == 0

    # the arrow brings it back in another chat; nobody else can read the file
    (history,) = (tmp_path / "home").rglob("chat_history")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    again = start(*TINY, "-n", 4)
    again.prompt()
    again.child.send("\x1b[A")
    again.until(lambda: again.line == "> /steer document-memory")
    before = history.read_bytes()
    unkept = start(*TINY, "-n", 4, "--no-history")
    unkept.prompt()
    unkept.say("/help")
    unkept.child.send("\x04")
    assert unkept.end() == 0
    assert history.read_bytes() == before


def test_the_first_message_may_be_given(start: Start) -> None:
    terminal = start(*TINY, *TO_DIGITS, "-p", COUNT, "--show-speed")
    terminal.prompt()
    assert f"> {COUNT}\n{DIGITS_ANSWER}\n" in terminal.text
    assert "t/s" in terminal.text


#
# how it ends
#


def terminal_state(terminal: Terminal) -> list[Any]:
    state: list[Any] = termios.tcgetattr(terminal.child.child_fd)
    return state[:4]


LOAD = """
import sys, time
from steermoe_local.cli.chat.terminal_state import TerminalState
with TerminalState() as state:
    state.load(lambda: (print("loading", flush=True), time.sleep(600)))
"""


@pytest.mark.parametrize(
    ("number", "status", "words"), [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_while_a_model_is_loaded(number: int, status: int, words: str, tmp_path: Path) -> None:
    with Terminal("-c", LOAD, program=[sys.executable], cwd=tmp_path) as terminal:
        before = terminal_state(terminal)
        terminal.until(lambda: "loading" in terminal.raw)
        terminal.child.kill(number)
        assert terminal.end() == status
        assert words in terminal.raw
        assert "Traceback" not in terminal.raw
        assert terminal_state(terminal) == before


def test_ctrl_c_as_early_as_can_be(start: Start) -> None:
    """While the real model is loaded, or just after it: it ends, or stays; never a traceback."""
    terminal = start(*TINY)
    terminal.until(lambda: "loading" in terminal.raw)
    terminal.child.sendintr()
    terminal.child.send("\x04")
    assert terminal.end() in (0, 130)
    assert "Traceback" not in terminal.raw


@pytest.mark.parametrize("busy", [False, True], ids=["at the prompt", "in an answer"])
def test_sigterm_restores_the_terminal(start: Start, busy: bool) -> None:
    terminal = start(*ENDLESS, program=HELD, env=hold(tokens=60))
    before = terminal_state(terminal)
    terminal.prompt()
    assert terminal_state(terminal) != before
    if busy:
        terminal.child.send(COUNT + "\r")
        terminal.until(lambda: "," * 40 in plain(terminal.raw))
    terminal.child.kill(signal.SIGTERM)
    assert terminal.end() == 128 + signal.SIGTERM
    assert "Traceback" not in terminal.raw
    assert terminal_state(terminal) == before


def test_the_terminal_is_closed(start: Start) -> None:
    terminal = start(*TINY)
    terminal.prompt()
    process = terminal.child.ptyproc
    process.fileobj.close()
    waiting = threading.Thread(target=process.wait, daemon=True)
    waiting.start()
    waiting.join(PATIENCE)
    assert not waiting.is_alive(), "it is still there"
    assert process.exitstatus == 128 + signal.SIGHUP


def test_sigterm_while_the_history_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """The signal comes in a task of prompt_toolkit, which logs what it catches."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from steermoe_local.cli.chat.prompt import CommandCompleter, PromptReader

    class Signalled(InMemoryHistory):
        def load_history_strings(self) -> list[str]:
            os.kill(os.getpid(), signal.SIGTERM)
            return ["one"]

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        reader = PromptReader(CommandCompleter({}, lambda name, typed: ()), Signalled())
        before = signal.getsignal(signal.SIGTERM)
        keys.send_text("not reached\r")
        with pytest.raises(SystemExit) as ended:
            reader.read()
    assert ended.value.code == 128 + signal.SIGTERM
    assert not caplog.records
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_empty_line_asks_again_after_a_change_of_steering(start: Start, tmp_path: Path) -> None:
    terminal = start(*TINY)
    terminal.prompt()
    offer = "an empty line (or /regenerate) asks its question again"
    assert offer not in terminal.say("/steer digits-words"), "there is no question yet"
    assert terminal.say("").translate(BLANK) == ""
    first = terminal.say(COUNT)
    assert DIGITS_ANSWER in first
    assert terminal.say("").translate(BLANK) == "", "nothing has changed"
    assert offer not in " ".join(terminal.say("/reverse off").split())
    assert offer in " ".join(terminal.say("/reverse").split())
    assert WORDS_ANSWER in terminal.say("   ")
    assert terminal.say("").translate(BLANK) == "", "it was asked again"
    assert offer in " ".join(terminal.say("/steer off").split())
    terminal.say("/reset")
    assert terminal.say("").translate(BLANK) == "", "the question is gone"
    assert saved(terminal, tmp_path / "chat.json")["messages"] == []
