"""Arguments, variables, configuration and names that are not UTF-8, `~`, control characters, other locales."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.cli.options import settings
from steermoe_local.models.embedded import embedded_model
from steermoe_local.steering.bias_file import read_bias
from tests.support.builders import table_map
from tests.support.paths import ROOT

BYTE = "\udcff"  # how Python has the byte 0xFF of an argument
PROGRAM = "import sys; sys.argv[0] = 'steermoe'; from steermoe_local.cli import main; main()"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")


def run(*args: Any, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], **kwargs)


def program(
    *args: str | bytes, cwd: bytes | Path = ROOT, env: dict[str, str | bytes] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The program in a process of its own, with any bytes as arguments and variables."""
    variables: dict[bytes, bytes] = {os.fsencode(k): os.fsencode(v) for k, v in os.environ.items()}
    variables |= {b"PYTHONPATH": os.fsencode(ROOT)} | {k.encode(): os.fsencode(v) for k, v in (env or {}).items()}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *args],
        cwd=cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )


#
# what is not UTF-8
#


@pytest.mark.parametrize("path", [path for path, _ in settings.commands(main)], ids=".".join)
def test_no_command_takes_what_is_not_utf_8(path: tuple[str, ...], tmp_path: Path) -> None:
    """As an argument, an option's value, or behind an equals sign: the one line names it, and nothing is done."""
    for words in ((BYTE,), ("-o", f"{tmp_path}/a{BYTE}.json"), (f"--output=b{BYTE}",)):
        result = run(*path, *words)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert "UTF-8" in result.stderr
        assert "\\xff" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["HOME", "HF_HOME", "XDG_CONFIG_HOME", "STEERMOE_BIAS", "STEERMOE_RUN_SYSTEM_PROMPT"])
def test_variables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"/tmp/m{BYTE}")
    result = run("run", "-m", "tiny", "-p", "x")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert name in result.stderr
    assert "/tmp/m\\xff" in result.stderr


def test_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"hidden{BYTE}")
    result = run("presets")
    assert (result.exit_code, "HF_TOKEN" in result.stderr, "hidden" in result.stderr) == (2, True, False)


def test_other_variables_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMETHING", BYTE)
    assert run("presets").exit_code == 0


@LINUX
def test_bytes_of_a_real_command_line(tmp_path: Path) -> None:
    done = program("pairs", "numbers", "-o", os.fsencode(tmp_path) + b"/a\xff.jsonl")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1
    assert b"a\\xff.jsonl" in done.stderr
    assert not list(tmp_path.iterdir())


@LINUX
def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    """It can be worked in; what names it in a file fails in one line, and the chat goes on."""
    folder = os.fsencode(tmp_path) + b"/d\xfc"
    os.mkdir(folder)
    table_map([[0.5, -0.5]]).save(os.fsdecode(folder + b"/map.json"))
    table_map([[0.5, -0.5]]).save(os.fsdecode(folder + b"/m\xff.json"))
    done = program("bias", "build", "map.json", "-o", "b.gguf", "--activate", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert read_bias(os.fsdecode(folder + b"/b.gguf")).n_active == 1
    done = program("map", "export", "map.json", "--format", "json", "-o", "r.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    spec = ("--spec", "s.json", "--activate", "1")
    done = program("map", "export", "map.json", "--format", "easysteer", "-o", "e.json", *spec, cwd=folder)
    assert done.returncode == 2  # before any work
    assert b"--source" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_path_in_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.toml"
    monkeypatch.setenv("STEERMOE_CONFIG", str(config))
    for text, words in ((b'[run]\nbias = "\xff"\n', "not UTF-8"), (b'[run]\nbias = "a\\u0000b"\n', "NUL")):
        config.write_bytes(text)
        result = run("run", "-m", "tiny", "-p", "x")
        assert result.exit_code == 2
        assert words in result.stderr
        assert str(config) in result.stderr
        assert result.stderr.count("\n") == 1


#
# locales
#


@LINUX
@pytest.mark.parametrize("name", ["LANG", "LC_ALL"])
def test_the_c_locale_reads_utf_8(name: str, tmp_path: Path) -> None:
    """Python takes UTF-8 for it, unless it is told not to."""
    shutil.copy(embedded_model(), tmp_path / "modèle.gguf")
    done = program("info", "modèle.gguf", "--json", cwd=tmp_path, env={name: "C", "PYTHONUTF8": ""})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["paths"] == ["modèle.gguf"]


@LINUX
def test_a_locale_that_has_only_ascii(tmp_path: Path) -> None:
    """What is asked in ASCII is answered, with escapes for the rest; another argument gets the cure."""
    ascii_only: dict[str, str | bytes] = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    expert_map = table_map([[0.5, -0.5]], behaviour="façade", positive="naïve")
    expert_map.save(tmp_path / "m.json")
    done = program("map", "show", "m.json", "--json", cwd=tmp_path, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("ascii"))["behaviour"] == "façade"
    done = program("map", "show", "m.json", cwd=tmp_path, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"fa\\xe7ade" in done.stdout
    done = program("map", "show", "modèle.json", cwd=tmp_path, env=ascii_only)
    assert done.returncode == 2
    assert b"PYTHONUTF8=1" in done.stderr
    assert done.stderr.count(b"\n") == 1
    (tmp_path / "c.toml").write_text('map = "modèle.json"\n[run]\nactivate = 1\n', "utf-8")
    asked = ("run", "-m", "tiny", "-p", "x")
    done = program(*asked, cwd=tmp_path, env=ascii_only | {"STEERMOE_CONFIG": str(tmp_path / "c.toml")})
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"Traceback" not in done.stderr


#
# control characters
#


def test_names_with_control_characters_stay_on_one_line(tmp_path: Path) -> None:
    name = "a\nb\x1b[2J\r.json"
    result = run("map", "show", tmp_path / name)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert not {"\x1b", "\r"} & set(result.stderr)
    (tmp_path / name).write_text("{}")
    result = run("run", "-m", "tiny", "-p", "x", "--activate", 1, "--map", tmp_path / name)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    made = run("bias", "build", "x\n", "-o", "y", "--activate", 1)
    assert (made.exit_code, made.stderr.count("\n")) == (2, 1), "no file, and no map of this name"
    assert "neither a file nor a map" in made.stderr
    made = run("bias", "build", "x\n.json", "-o", "y", "--activate", 1)
    assert (made.exit_code, made.stderr.count("\n")) == (1, 1)
    table_map([[0.5, -0.5]]).save(tmp_path / name)
    made = run("map", "export", tmp_path / name, "--format", "json", "-o", tmp_path / "o\n\x1b.json")
    assert made.exit_code == 0
    assert made.stdout.count("\n") == 1
    assert "\x1b" not in made.stdout


#
# the home folder
#


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(embedded_model(), tmp_path / "m.gguf")
    table_map([[0.5, -0.5]]).save(tmp_path / "map.json")
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="HOME is not the home folder")
class TestHome:
    """`~` where no shell expands it: in the configuration, in variables, and behind an equals sign."""

    def test_in_arguments(self, home: Path) -> None:
        assert run("info", "~/m.gguf").exit_code == 0
        assert run("map", "show", "~/map.json").exit_code == 0
        made = run("bias", "build", "~/map.json", "--output=~/b.gguf", "--activate", 1)
        assert made.exit_code == 0, made.stderr
        assert (home / "b.gguf").is_file()

    @pytest.mark.parametrize("name", ["STEERMOE_MODEL", "STEERMOE_RUN_MODEL"])
    def test_a_model_by_a_variable(self, home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv(name, "~/m.gguf")
        result = run("run", "-p", "x", "-n", 1, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["model"] == str(home / "m.gguf")

    def test_a_folder_of_models(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STEERMOE_MODELS", "~")
        result = run("run", "-m", "m", "-p", "x", "-n", 1, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["model"] == str(home / "m.gguf")

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ('map = "~/none.json"\n[run]\nactivate = 1\n', "none.json"),
            ('[run]\nbias = "~/none.gguf"\n', "none.gguf"),
            ('[run]\nmodel = "~/none.gguf"\n', "none.gguf"),
        ],
    )
    def test_the_configuration(self, home: Path, monkeypatch: pytest.MonkeyPatch, text: str, named: str) -> None:
        (home / "c.toml").write_text(text)
        monkeypatch.setenv("STEERMOE_CONFIG", "~/c.toml")
        given = () if "model" in text else ("-m", "tiny")
        result = run("run", *given, "-p", "x")
        assert result.exit_code == 1
        assert f"error: {home / named}: " in result.stderr

    def test_data(self, home: Path) -> None:
        (home / "d.csv").write_text("a,b\nx,y\n")
        columns = ("--positive-column", "a", "--negative-column", "b")
        assert run("pairs", "from-csv", "~/d.csv", *columns, "-o", "~/p.jsonl").exit_code == 0
        assert (home / "p.jsonl").is_file()
