"""`steermoe config`: what is set and where, and changing the file."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.cli.options import settings
from steermoe_local.cli.options.config_file import (
    is_secret,
)
from tests.support.paths import ROOT


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file, not there yet."""
    path = tmp_path / "config.toml"
    monkeypatch.setenv("STEERMOE_CONFIG", str(path))
    return path


def config(*args: Any, **env: str) -> Result:
    return CliRunner().invoke(main, ["config", *(str(arg) for arg in args)], env=env)


def test_show_says_where_each_value_comes_from(file: Path) -> None:
    file.write_text('# mine\nthreads = 3\n[run]\ntemp = 0\nmodel = "tiny"\n')
    data = json.loads(config("show", "--json", "run", "--top-k", "7", STEERMOE_TOP_P="0.5").stdout)
    found = {row["option"]: row for row in data["settings"]}
    assert data["file"] == str(file)
    assert data["exists"] is True
    assert (found["top-k"]["value"], found["top-k"]["source"]) == (7, "flag")
    assert (found["top-p"]["value"], found["top-p"]["source"], found["top-p"]["where"]) == (
        0.5,
        "environment",
        "STEERMOE_TOP_P",
    )
    assert (found["temp"]["value"], found["temp"]["source"], found["temp"]["where"]) == (0, "file", f"{file}, line 4")
    assert (found["min-p"]["value"], found["min-p"]["source"], found["min-p"]["where"]) == (0.05, "default", None)
    assert {row["command"] for row in data["settings"]} == {"run"}

    text = config("show", "run", "--top-k", "7").stdout
    assert f"file: {file}\n" in text
    assert any(line.split() == ["top-k", "7", "flag"] for line in text.splitlines())


def test_what_show_says_is_what_the_command_gets(file: Path) -> None:
    """Every option of every command, with a file and an environment that set some."""
    file.write_text("threads = 3\nverbose = true\nseed = 5\n[pairs]\nskip = 2\n")
    for path, command in settings.commands(main):
        data = json.loads(config("show", "--json", *path, STEERMOE_BATCH_SIZE="64").stdout)
        with click.Context(main, info_name="steermoe", **main.context_settings) as root:
            root.default_map = settings.default_map(main)
            parent = root
            group: Any = main
            for name in path[:-1]:
                group = group.commands[name]
                parent = click.Context(group, info_name=name, parent=parent)
            os.environ["STEERMOE_BATCH_SIZE"] = "64"
            try:
                ctx = command.make_context(path[-1], [], parent=parent, resilient_parsing=True)
            finally:
                del os.environ["STEERMOE_BATCH_SIZE"]
        options = settings.options(command)
        for row in data["settings"]:
            option = options[row["option"]]
            source = ctx.get_parameter_source(option.name or "")
            names = {"ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}
            assert source is not None
            assert row["source"] == names[source.name], (path, row)
            if row["source"] != "default":
                assert ctx.params[option.name or ""] == row["value"], (path, row)


def test_show_without_a_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STEERMOE_REQUIRE_TOOLS", "STEERMOE_REQUIRE_BROWSER"):  # the tests' own, of make test and .ci/run
        monkeypatch.delenv(name, raising=False)
    assert "nothing is set" in config().stdout
    assert "(not there)" in config("show").stdout
    file.write_text("threads = 3\n")
    _, _, after = config().stdout.partition("\nthreads")
    line, *more = after.splitlines()
    # the names of the commands may take several lines, as the file's does
    names = " ".join([line, *itertools.takewhile(lambda text: text.startswith(" "), more)])
    assert {"detect", "eval", "run", "serve"} <= set(names.replace(",", " ").split())
    assert f"{file}, line 1" in line
    result = config("show", STEERMOE_TEMPP="1")
    assert result.stderr.startswith("warning: STEERMOE_TEMPP is set")
    assert result.stderr.count("\n") == 1
    assert json.loads(config("show", "--json", STEERMOE_TEMPP="1").stdout)["unknown"] == ["STEERMOE_TEMPP"]


def test_nothing_is_loaded_to_change_a_file_until_it_is_changed() -> None:
    code = "import sys, steermoe_local.cli; assert 'tomlkit' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_show_of_something_else(file: Path) -> None:
    assert config("show", "nothing").exit_code == 2
    for words, named in ((("pairs", "nothing"), "steermoe pairs nothing: "), (("pairs",), "steermoe pairs: a group")):
        result = config("show", *words)
        assert result.exit_code == 2
        assert named in result.stderr
    assert config("show", "run", "--no-such").exit_code == 2


def test_secrets_are_masked(file: Path) -> None:
    assert [is_secret(name) for name in ("hf-token", "api-key", "token", "cache-type-k", "n-tokens", "keys")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    secret = "hf_abcdef"
    done = config("set", "hf-token", secret)
    assert secret in file.read_text()
    env = {"STEERMOE_RUN_HF_TOKEN": "hf_fromenv"}
    shown = [
        config("show", "--json").stdout,
        config("show").stdout,
        config("show", "run").stdout,
        config("show", "run", "--hf-token", "hf_typed").stdout,
        config("show", "run", **env).stdout,
        done.stdout,
    ]
    for text in shown:
        assert "********" in text
        assert "hf_" not in text


def test_set_keeps_comments_and_order(file: Path) -> None:
    file.write_text(
        "# top\nthreads = 1   # few\n\n[run]  # one command\n# cold\ntemp = 0.5\n\n[bias.build]\njson = true\n"
    )
    assert config("set", "threads", "8").exit_code == 0
    assert config("set", "run.temp", "0").stdout == f"{file}: run.temp = 0\n"
    assert config("set", "run.top-k", "5").exit_code == 0
    assert config("set", "seed", "7").exit_code == 0
    assert config("set", "detect.ctx-size", "99").exit_code == 0
    assert file.read_text() == (
        "# top\nthreads = 8   # few\nseed = 7\n\n[run]  # one command\n# cold\ntemp = 0\ntop-k = 5\n\n"
        "[bias.build]\njson = true\n\n[detect]\nctx-size = 99\n"
    )
    assert config("unset", "run.temp").exit_code == 0
    assert "temp" not in file.read_text()
    assert "# cold" in file.read_text()


def test_set_takes_what_stands_on_a_command_line(file: Path) -> None:
    for key, value, found in (
        ("mmap", "false", False),
        ("threads", "2", 2),
        ("temp", "1", 1),
        ("run.prompt", 'say "x" # no', 'say "x" # no'),
        ("run.model", "tiny", "tiny"),
        ("override-tensor", "exps=CPU", ["exps=CPU"]),
        ("gpu-layers", "all", "all"),
        ("gpu-layers", "-1", -1),
        ("run.chat-template-kwargs", '{"a": true}', '{"a": true}'),
    ):
        result = config("set", key, value)
        assert result.exit_code == 0, (key, result.output)
        data = tomllib.loads(file.read_text())
        for name in key.split("."):
            data = data[name]
        assert data == found, key
    result = config("show", "--json", "run")
    assert result.exit_code == 0
    assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 or os.name == "nt"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("set", "tempp", "1"), "is it temp?"),
        (("set", "run.limit", "1"), "steermoe run has no --limit"),
        (("set", "nothing.temp", "1"), "[nothing]: "),
        (("set", "run.", "1"), "'run.'"),
        (("set", "temp", "hot"), "temp: 'hot'"),
        (("set", "temp", "-1"), "temp: -1.0 "),
        (("set", "threads", "0"), "threads: 0 "),
        (("set", "run.cache-type-k", "f17"), "'f17'"),
        (("set", "mmap", "maybe"), "'maybe'"),
        (("set", "temp"), "missing argument"),
        (("unset", "temp"), "temp is not set"),
        (("unset", "run.temp.deep"), "run.temp.deep is not set"),
    ],
)
def test_what_config_refuses(arguments: tuple[str, ...], words: str, file: Path) -> None:
    file.write_text("threads = 1\n")
    result = config(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert file.read_text() == "threads = 1\n"
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]


def test_a_broken_file_can_be_mended(file: Path) -> None:
    file.write_text("tempp = 1\nthreads = 2\n")
    assert CliRunner().invoke(main, ["presets"]).exit_code == 2
    assert config("path").stdout == f"{file}\n"
    assert config("show").exit_code == 2
    assert config("set", "threads", "3").exit_code == 2
    assert config("unset", "tempp").exit_code == 0
    assert config("set", "threads", "3").exit_code == 0
    assert CliRunner().invoke(main, ["presets"]).exit_code == 0


def test_what_is_written_in_an_unusual_way(file: Path) -> None:
    """Texts of several lines, inline tables, dotted keys, tables in pieces: only what is asked for changes."""
    text = (
        '# top\nprompt = """\none\ntemp = 1\n""" # said\nrun = { temp = 0, stop = ["a"] } # one\n'
        "chat . temp = 1\n[pairs.check] # p\nlimit = 1\n[detect]\nshard = '1/2'\n[pairs.numbers]\nlimit = 3 # three\n"
    )
    file.write_bytes(text.encode().replace(b"\n", b"\r\n"))
    for arguments, before, after in (
        (("set", "chat.temp", "0.5"), "chat . temp = 1", "chat . temp = 0.5"),
        (("set", "run.temp", "1"), "{ temp = 0,", "{ temp = 1,"),
        (("set", "pairs.numbers.limit", "4"), "limit = 3 # three", "limit = 4 # three"),
        (("unset", "pairs.check.limit"), "limit = 1\n", ""),
        (("set", "prompt", "two"), '"""\none\ntemp = 1\n"""', '"two"'),
        (("unset", "prompt"), 'prompt = "two" # said\n', ""),
    ):
        result = config(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
        assert before in text
        text = text.replace(before, after)
        assert file.read_bytes().decode() == text.replace("\n", "\r\n"), arguments


def test_what_cannot_be_changed_is_left(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# mine\nthreads = 1\nrun.temp = 1\n"
    file.write_text(text)
    result = config("set", "run.temp.deep", "1")
    assert result.exit_code == 2
    # should the library lose or spoil something, nothing is written
    for spoilt in ("threads = 2\n", "threads = 2\nrun.temp = 1\nrun.temp = 1\n"):
        monkeypatch.setattr("tomlkit.dumps", lambda _, spoilt=spoilt: spoilt)
        for arguments in (("set", "threads", "2"), ("unset", "threads")):
            result = config(*arguments)
            assert result.exit_code == 2, arguments
            assert f"{file}: threads " in result.stderr
            assert "by hand" in result.stderr
            assert result.stderr.count("\n") == 1
    assert file.read_text() == text


def test_a_device_is_not_replaced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: Any) -> None:
        raise AssertionError("the machine's own device would be gone")

    monkeypatch.setattr(os, "replace", replace)
    result = config("set", "threads", "2", STEERMOE_CONFIG=os.devnull)
    assert result.exit_code == 2
    assert os.devnull in result.stderr
    assert not Path(os.devnull).is_file()


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("threads = 1\n")
    real.chmod(0o640)
    file.symlink_to(real)
    assert config("set", "threads", "2").exit_code == 0
    assert file.is_symlink()
    assert real.read_text() == "threads = 2\n"
    assert os.name == "nt" or stat.S_IMODE(real.stat().st_mode) == 0o640


def test_the_file_of_the_documentation(file: Path) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    file.write_text(example)
    data = json.loads(config("show", "--json").stdout)
    found = {(row["command"], row["option"]): row["value"] for row in data["settings"]}
    assert (found["chat", "temp"], found["run", "temp"], found["run", "stop"]) == (0.7, 0, ["END", "STOP"])
    for name in re.findall(r"`(STEERMOE_[A-Z_]+)(?:=[^`]*)?`", page):
        others = {f"STEERMOE_{other}" for other in ("FORCE", "LIB_PATH", "CONFIG", "JUDGE_API_KEY", "TEMPLATE_SECONDS")}
        assert name in settings.option_variables(main) | others, name
