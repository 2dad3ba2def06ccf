"""What leaves for a terminal: no way passes by the filter, and no text of a file comes out as what a terminal obeys."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from steermoe_local._util.visible import HarmlessStream, harmless, shortened, visible, visible_json
from steermoe_local.cli import failures, output, streams
from steermoe_local.cli.options.completion import starting
from tests.support.hostile import ESCAPES, OBEYED, obeyed
from tests.support.paths import ROOT

CLI = ROOT / "steermoe_local"
# what writes to a stream or makes one that does, and where that is right
PRINTS = re.compile(
    r"^(click|sys|logging|rich|warnings)\.?.*\b(echo|secho|confirm|prompt|pause|stdout|stderr|basicConfig|StreamHandler|"
    r"Console|rich\.print)$|^(print|input|Console|StreamHandler|echo|secho|pprint)$"
)
RIGHT = {
    "cli/streams.py": "the boundary itself",
    "cli/chat/screen.py": "calls the boundary's echo",
    "cli/output.py": "calls the boundary's echo",
    "_util/import_path.py": "a constant, before there is a command line",
    "cli/failures.py": "its log goes through the boundary's sys.stderr, every line filtered",
    "llama/quantizer.py": "a child, whose stderr is a file that its parent reads",
    "evaluation/tasks/safe_regex.py": "a child, whose stdout is a pipe to its parent",
    "_util/child_start.py": "a child",
    "_util/children.py": "a child",
    "llama/template_child.py": "a child",
}
# of a stream, these write nothing
ASKS = {"isatty", "encoding", "fileno", "buffer", "reconfigure", "errors", "closed", "readline", "flush"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def printing(source: str) -> list[tuple[int, str]]:
    """(line, call) of everything in a module that prints by itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rpartition(".")[2]
            of_stream = re.match(r"sys\.(__)?(stdout|stderr)(__)?\.", name) and last not in ASKS
            if PRINTS.search(name) or of_stream:
                found.append((node.lineno, name))
            if name in ("os.write", "os.fdopen") and node.args and isinstance(node.args[0], ast.Constant):
                found.append((node.lineno, name))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import click; click.echo(a)",
        "print(a)",
        "sys.stdout.write(a)",
        "sys.stderr.writelines(a)",
        "sys.stdout.buffer.write(a)",
        "Console().print(a)",
        "rich.console.Console()",
        "logging.basicConfig()",
        "logging.StreamHandler()",
        "click.confirm(a)",
        "os.write(2, a)",
    ],
)
def test_the_search_sees(line: str) -> None:
    assert printing(line)


def test_nothing_passes_the_boundary_by() -> None:
    for path in sorted(CLI.rglob("*.py")):
        name = path.relative_to(CLI).as_posix()
        if name not in RIGHT:
            assert printing(path.read_text("utf-8")) == [], f"{path}: print by cli/streams.py or cli/output.py"


# without width, and needed: soft hyphen, mark of Arabic letters, blank of Thai and Khmer, marks of Hebrew, word joiner
MARKS = "\xad\u061c\u200b\u200e\u200f\u2060"
# letters that are never seen
FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"


def test_the_set_is_that_of_unicode() -> None:
    """Every control, format and surrogate character, and both separators of lines; but not what is to be seen."""
    seen = {*"\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"}
    for code in range(0x110000):
        character = chr(code)
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            if character not in seen | {"\u200c", "\u200d"}:
                assert visible(character) != character, hex(code)
                assert (harmless(character) == character) == (character in "\n\t" + MARKS), hex(code)
                assert character not in visible_json(json.dumps(character, ensure_ascii=False))
        elif unicodedata.category(character) != "Cn":  # some that are not assigned yet are reserved for these
            assert harmless(character) == character, hex(code)
            selector = unicodedata.name(character, "").startswith("VARIATION SELECTOR")
            assert (visible(character) == character) != (selector or character in FILLERS), hex(code)


HONEST = [
    "schön 漢字 👍🏽 👩‍👩‍👧 می‌خواهم क्‍ष ❤️ 🇩🇪",
    "שלום עולם",
    "a b",
    "👩🏽‍❤️‍💋‍👨 👁️‍🗨️ 🏳️‍🌈 1️⃣ #️⃣ e\u0301 葛\U000e0100 한글",
    *(
        f"\U0001f3f4{''.join(chr(0xE0000 + ord(letter)) for letter in name)}\U000e007f."
        for name in ("gbeng", "gbsct", "gbwls")
    ),
]


@pytest.mark.parametrize("text", HONEST)
def test_letters_and_emoji_stay(text: str) -> None:
    assert visible(text) == visible(text, marks=True) == harmless(text) == text
    assert json.loads(visible_json(json.dumps(text, ensure_ascii=False))) == text


@pytest.mark.parametrize(
    "text", [*HONEST, "a\r\nb", "ab\u200fג!", "Wort\xadtrennung", "ไทย\u200bภาษา", "a\U0001f3f4", "b\r"]
)
def test_an_answer_in_pieces_is_shown_like_the_whole(text: str) -> None:
    parts = HarmlessStream()
    assert "".join([*map(parts.feed, text), parts.end()]) == harmless(text)
    assert parts.end() == ""


@pytest.mark.parametrize(
    "text",
    [
        *("a\u200db", "a\u200cb", "\u200d"),
        *("a\ufe0f", "\ufe0f", "a\U000e0101", "漢\U000e0101\U000e0102", "❤\ufe0f\ufe0f"),  # bytes hide as selectors
        *("\U0001f3f4\U000e0061\U000e0062\U000e007f", "\U0001f3f4\U000e0067"),  # no flags
    ],
)
def test_what_hides_behind_a_letter_is_seen(text: str) -> None:
    assert "\ufffd" in visible(text)


@pytest.mark.parametrize("text", ESCAPES)
def test_json_means_the_same(text: str) -> None:
    document = visible_json(json.dumps([text], ensure_ascii=False))
    assert json.loads(document) == [text]
    assert not obeyed(document)


def test_long_texts_are_cut() -> None:
    assert shortened("x" * 10, 10) == "x" * 10
    assert shortened("x" * 1_000_005 + "a cure", 10) == "xxxxx... (1,000,001 characters left out) ... cure"
    assert shortened("x" * 10, 10) == "x" * 10


class Screen(io.TextIOWrapper):
    """A terminal that keeps what is written to it."""

    def __init__(self) -> None:
        self.kept = io.BytesIO()
        super().__init__(self.kept, "utf-8", "backslashreplace")

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        self.flush()
        return self.kept.getvalue().decode("utf-8")


def take_screens(monkeypatch: pytest.MonkeyPatch) -> tuple[Screen, Screen]:
    """(stdout, stderr), both terminals from now on."""
    out, err = Screen(), Screen()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    streams.settle_streams()
    return out, err


EVIL = "".join(ESCAPES) + "[bold]x[/bold][link=http://evil]y[/link]:smiley:"


def everything() -> None:
    """Print a hostile text in every way that there is."""
    out = output.console()
    table = Table(title=EVIL, caption=EVIL)
    table.add_column(EVIL, header_style="bold")
    table.add_column(Text(EVIL))
    table.add_row(EVIL, Text(EVIL, style="link http://evil"))
    out.print(table, EVIL, Text(EVIL, style="red"), sep="\n")
    out.print(output.facts_table([(EVIL, EVIL)]))
    out.print(Text.from_markup("[link=http://evil;\x1b\\\\]z[/link]"))
    output.say(EVIL)
    output.warn(EVIL)
    output.print_lines(EVIL)
    output.say_written(EVIL)
    output.print_json({EVIL: EVIL})
    output.print_left_out({EVIL: 1})
    streams.put(EVIL, dim=True)
    streams.ask(EVIL)
    streams.ask(EVIL, stderr=True)
    with output.progress_bar() as show:
        show(EVIL, 1, 2)
        print(EVIL)
        print(EVIL, file=sys.stderr)
        output.say(EVIL)
    with Progress(TextColumn("{task.description}", markup=False), console=output.console(stderr=True)) as bar:
        bar.add_task(EVIL)
    print(EVIL)
    sys.stderr.writelines([EVIL, EVIL])
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    print(EVIL)


def test_a_terminal_gets_nothing_to_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    screens = take_screens(monkeypatch)
    everything()
    for screen in screens:
        shown = screen.shown()
        assert "\u241b" in shown
        assert "\x1b" in shown, "colours of this program, or the lines of its bar"
        # select graphic rendition, and what a bar needs: cursor up, erase line, hide and show the cursor
        own = re.sub(r"\x1b\[(?:[0-9;]*m|[0-9]*A|[0-9]*K|\?25[hl])|\r", "", shown)
        own = own.replace("\n", "").replace("\t", "")
        # renderables other than str may be pieces of an answer, in which these stay; commands show names as str
        own = re.sub(f"[{MARKS}]", "", own)
        assert not (found := OBEYED.search(own)), own[max(found.start() - 100, 0) : found.end() + 100]
        assert "evil]y" in shown, "markup is text"


def test_a_pipe_gets_answers_as_they_are_and_tables_filtered(capsys: pytest.CaptureFixture[str]) -> None:
    streams.put(EVIL.encode("utf-8", "replace").decode())
    assert capsys.readouterr().out == EVIL.encode("utf-8", "replace").decode() + "\n"
    output.console().print(output.facts_table([("a", EVIL)]))
    output.say(EVIL)
    output.print_lines(EVIL)
    output.print_json(EVIL)
    captured = capsys.readouterr()
    assert not obeyed((captured.out + captured.err).replace("\n", ""))


def test_a_guarded_stream_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    screens = take_screens(monkeypatch)
    before = sys.stdout
    streams.settle_streams()
    assert sys.stdout is before
    assert isinstance(before, streams.GuardedStream)
    assert before.write("a\x1b\r\nb\tc") == 7
    assert screens[0].shown() == "a\u241b\nb\tc"


@pytest.mark.parametrize("wanted", [False, True])
def test_a_record_of_the_log_is_one_line(
    wanted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path of a request, or an exception's message, forges no second line."""
    monkeypatch.setattr(failures, "_wanted", wanted)
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        failures.log_to_stderr("%(asctime)s %(message)s")
        failures.log_to_stderr("%(asctime)s %(message)s")  # again: no second copy of each line
        log = logging.getLogger("steermoe.test")
        evil = EVIL.encode("utf-8", "replace").decode()  # pytest keeps what is logged, and sends it as UTF-8
        log.warning("GET %s", evil)
        try:
            raise ValueError(evil + "x" * 10_000)
        except ValueError:
            log.exception("failed\nhere")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert not obeyed("".join(lines))
    assert "failed\u240ahere: ValueError: " in lines[1]
    assert max(map(len, lines[:2])) < 5_000
    if wanted:
        assert "  Traceback (most recent call last):" in lines
        assert all(line.startswith("  ") for line in lines[2:])
    else:
        assert len(lines) == 2


def test_warnings_of_python_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = failures._python_warning
        warnings.warn(EVIL, UserWarning, stacklevel=1)
    line = capsys.readouterr().err
    assert line.startswith("warning: UserWarning: ")
    assert line.count("\n") == 1
    assert not obeyed(line.rstrip("\n"))


def test_completions_of_names_that_no_terminal_should_get(tmp_path: Path) -> None:
    assert [item.value for item in starting("a", ["a\nplain,b", "a\x1b[2J", "a\u202eb", "abc"])] == ["abc"]


def test_the_texts_are_hostile() -> None:
    assert all(obeyed(text) for text in ESCAPES)
    assert not obeyed("plain ⏎ text")
    assert OBEYED
