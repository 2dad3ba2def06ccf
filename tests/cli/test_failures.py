"""The last line of defence: what goes wrong unexpectedly is one line and status 1, and --debug has the traceback."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from steermoe_local.cli import failures, main
from steermoe_local.cli.options import settings
from tests.support.hostile import obeyed
from tests.support.paths import ROOT

COMMANDS = [path for path, _ in settings.commands(main)]
# `info` of a model, of which {} happens in the middle
BROKEN = """
import sys, threading, time
import steermoe_local.cli.commands.info as module
def broken(*_):
    {}
module.console = broken
from steermoe_local.cli import main
sys.argv[0] = "steermoe"
main()
"""
EVIL = "raise ValueError('two\\nlines \\x1b[2J' + 'x' * 100000)"


def program(code: str, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key != failures.VARIABLE}
    variables |= {"PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (EVIL, "ValueError: two\u240alines \u241b[2Jxxx"),
        ("raise RecursionError('deep')", "RecursionError: deep"),
        ("broken()", "RecursionError: "),
        ("raise AssertionError", "AssertionError"),
        ("raise EOFError('short')", "EOFError: short"),  # click takes it for the user's wish to end
        ("raise KeyError('\\u202e')", "KeyError: "),
        ("class Mute(Exception):\n        def __str__(self): raise ValueError\n    raise Mute", "Mute"),
        ("raise ExceptionGroup('many', [ValueError('a'), ValueError('b')])", "ExceptionGroup: many"),
    ],
)
def test_an_unexpected_error_is_one_line(fault: str, says: str) -> None:
    done = program(BROKEN.format(fault), "info", "tiny")
    assert (done.returncode, done.stdout) == (failures.EXIT_ERROR, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: unexpected: ")
    assert says in done.stderr
    assert "--debug" in done.stderr
    assert len(done.stderr) < 1_000
    assert not obeyed(done.stderr.rstrip("\n"))


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (("--debug", "info", "tiny"), {}),
        (("info", "tiny", "--debug"), {}),
        (("info", "tiny"), {"STEERMOE_DEBUG": "1"}),
    ],
)
def test_the_traceback_is_there_for_who_wants_it(args: tuple[str, ...], env: dict[str, str]) -> None:
    done = program(BROKEN.format(EVIL), *args, env=env)
    assert done.returncode == failures.EXIT_ERROR
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("in broken" in line for line in lines)
    assert lines[-1].startswith("error: unexpected: ValueError: two")
    assert not obeyed("".join(lines))
    assert len(done.stderr) < 250_000


@pytest.mark.parametrize("value", ["", "0", "false", "off"])
def test_a_variable_that_says_no(value: str) -> None:
    done = program(BROKEN.format("raise ValueError"), "info", "tiny", env={"STEERMOE_DEBUG": value})
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", COMMANDS, ids=".".join)
def test_every_command_takes_the_option(path: tuple[str, ...]) -> None:
    assert CliRunner().invoke(main, [*path, "--debug", "--help"]).exit_code == 0
    assert CliRunner().invoke(main, ["--debug", *path, "--help"]).exit_code == 0


def test_the_variable_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failures.VARIABLE, "1")
    assert failures.VARIABLE not in settings.unknown_variables(main)
    assert failures.debugging()


@pytest.mark.parametrize("name", ["STEERMOE_TEMPLATE_SECONDS", "STEERMOE_CACHE_DIR"])
def test_variables_that_no_option_reads_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert name not in settings.unknown_variables(main)


@pytest.mark.parametrize(("error", "status"), [("KeyboardInterrupt", 130), ("EOFError", 1), ("KeyError", 1)])
def test_before_the_command_starts(error: str, status: int) -> None:
    """While options get their variables and are read, which is before click says that a command is invoked."""
    code = f"""
import sys
from steermoe_local.cli import main
from steermoe_local.cli.options import settings
def broken(*_):
    raise {error}
settings.name_variables = broken
sys.argv[0] = "steermoe"
main()
"""
    done = program(code, "info", "tiny")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert done.stderr.startswith("error: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
@pytest.mark.parametrize(("args", "status"), [(["info", "tiny", "--nosuch"], 2), (["info", "nosuch.gguf"], 1)])
def test_a_message_that_cannot_be_written_changes_no_status(args: list[str], status: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from steermoe_local.cli import main; main()", *args],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=full,
            timeout=300,
            check=False,
        )
    assert done.returncode == status


def test_an_interrupt_is_130() -> None:
    done = program(BROKEN.format("raise KeyboardInterrupt"), "info", "tiny")
    assert (done.returncode, done.stdout, done.stderr) == (failures.EXIT_INTERRUPTED, "", "error: interrupted\n")


IMPORTING = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "steermoe_local.cli.group":
            {}
sys.meta_path.insert(0, Finder())
from steermoe_local.cli.start import start
start()
"""


@pytest.mark.parametrize(
    ("fault", "status", "says"),
    [
        ("raise KeyboardInterrupt", failures.EXIT_INTERRUPTED, "error: interrupted\n"),
        ("raise RuntimeError('a\\nb')", failures.EXIT_ERROR, "error: unexpected: RuntimeError: a\u240ab; "),
        ("raise ModuleNotFoundError('no rich')", failures.EXIT_ERROR, "ModuleNotFoundError: no rich; "),
    ],
)
def test_while_commands_are_imported(fault: str, status: int, says: str) -> None:
    done = program(IMPORTING.format(fault), "info", "tiny")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert says in done.stderr


def test_the_package_starts_there() -> None:
    """The installed program and `python -m` go the way that the tests above go."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'steermoe = "steermoe_local.cli.start:start"' in text
    assert "start()" in (ROOT / "steermoe_local" / "__main__.py").read_text("utf-8")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (
            "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",
            "unexpected in a thread: ZeroDivisionError",
        ),
        (
            "class A:\n        def __del__(self): raise ValueError('a\\nb')\n    A()",
            "unexpected and ignored: ValueError: a\u240ab",
        ),
        (
            "import ctypes\n    ctypes.CFUNCTYPE(None)(lambda: 1 / 0)()",
            "unexpected and ignored: ZeroDivisionError",
        ),
        ("import atexit\n    atexit.register(lambda: 1 / 0)", "ZeroDivisionError"),
        ("import warnings\n    warnings.warn('a\\nb')", "warning: UserWarning: a\u240ab"),
        ("import logging\n    logging.getLogger('x').error('a\\nb')", "error: a\u240ab"),
        (
            "import asyncio\n    async def f():\n        asyncio.get_running_loop().call_soon(lambda: 1 / 0)\n"
            "        await asyncio.sleep(0.01)\n    asyncio.run(f())",
            "ZeroDivisionError: division by zero",
        ),
    ],
    ids=["thread", "finalizer", "callback", "atexit", "warning", "log", "loop"],
)
def test_where_nobody_can_catch(fault: str, says: str) -> None:
    """Outside of the command's own thread an error is told in one line, too."""
    done = program(BROKEN.format(fault + "\n    sys.exit(3)"), "info", "tiny")
    assert (done.returncode, done.stdout) == (3, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt_in_a_finalizer_is_not_lost() -> None:
    fault = (
        "class A:\n        def __del__(self): raise KeyboardInterrupt\n    A()\n"
        "    for _ in range(1000): time.sleep(0.01)"
    )
    done = program(BROKEN.format(fault), "info", "tiny")
    assert (done.returncode, done.stderr) == (failures.EXIT_INTERRUPTED, "error: interrupted\n")


def test_a_caller_keeps_its_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started with arguments, as a function, the command line takes nothing of the process."""
    before = sys.excepthook, sys.unraisablehook, signal.getsignal(signal.SIGINT)
    CliRunner().invoke(main, ["presets"])
    assert (sys.excepthook, sys.unraisablehook, signal.getsignal(signal.SIGINT)) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_closed_pipe_is_silent(tmp_path: Path) -> None:
    command: list[Any] = [
        sys.executable,
        "-c",
        "import sys; from steermoe_local.cli import main; main()",
        "info",
        "tiny",
    ]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, cwd=ROOT)
    os.close(writing)
    assert done.returncode == failures.EXIT_ERROR
    assert done.stderr == b""


@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
@pytest.mark.parametrize("args", ["info tiny", "info tiny --json", "run -m tiny -p hi -n 1", "completion bash"])
def test_started_without_stdout(args: str) -> None:
    """The result has nowhere to go: an error, no traceback; and no file that is opened becomes stdout."""
    command = f"exec {shlex.quote(sys.executable)} -c 'from steermoe_local.cli import main; main()' {args} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert done.returncode == failures.EXIT_ERROR, done.stderr
    assert done.stderr.startswith("error: ")
    assert "stdout is closed" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "unexpected" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
def test_started_without_stderr() -> None:
    for args, status in (("info tiny", 0), ("info no-such-file.gguf", failures.EXIT_ERROR)):
        command = f"exec {shlex.quote(sys.executable)} -c 'from steermoe_local.cli import main; main()' {args} 2>&- <&-"
        done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
        assert done.returncode == status
        assert bool(done.stdout) == (status == 0)


def test_an_interrupt_of_the_first_imports() -> None:
    """Before there is a command line: the package, numpy."""
    code = (
        "import sys\nsys.argv[0] = 'bin/steermoe'\n"
        "class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'steermoe_local.maps':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\nfrom steermoe_local.cli.start import start\nstart()\n"
    )
    done = program(code)
    assert (done.stdout, done.stderr) == ("", "error: interrupted\n")
    assert done.returncode in (-signal.SIGINT, failures.EXIT_INTERRUPTED)
