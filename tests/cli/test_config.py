"""Defaults of options: flags before the environment before the configuration file; the file, and `steermoe config`."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import UsageError
from steermoe_local.cli import main
from steermoe_local.cli.options import settings
from steermoe_local.cli.options.config_file import (
    Commands,
    ConfigFile,
    EditError,
    OptionKind,
    config_path,
    parse,
    parse_value,
    set_value,
    unset_value,
)
from steermoe_local.cli.program import SteerMoEGroup

#
# a small program: what is found in the click tree, not in a list of ours
#


class Level(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A type of the program's own, which takes texts."""

    name = "level"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str) or not value.isdecimal():
            self.fail(f"{value!r} is no level.", param, ctx)
        return int(value)


def program() -> click.Group:
    @click.group("steermoe", cls=SteerMoEGroup)
    def root() -> None:
        """A program."""

    def show(**values: Any) -> None:
        click.echo(json.dumps(values))

    sampling = [
        click.Option(["--temp"], type=float, default=0.8),
        click.Option(["-t", "--threads"], type=click.IntRange(1)),
        click.Option(["-ngl", "--gpu-layers", "--n-gpu-layers", "n_gpu_layers"], type=Level(), default="0"),
        click.Option(["--mmap/--no-mmap"], default=True),
        click.Option(["-m", "--model"], envvar="STEERMOE_MODEL"),
        click.Option(["--stop"], multiple=True),
        click.Option(["--hf-token"]),
    ]
    root.add_command(click.Command("chat", params=sampling, callback=show))

    @root.command()
    @click.option("--temp", type=float, default=0.5)
    @click.option("--map", "map_file", type=click.Path())
    @click.option("-m", "--model", allow_from_autoenv=False)
    @click.option("--kind", type=click.Choice(["a", "b"]))
    @click.option("--verbose", is_flag=True)
    def run(**values: Any) -> None:
        """Run."""
        show(**values)

    @root.group()
    def pairs() -> None:
        """A group."""

    @pairs.command()
    @click.option("--limit", type=int)
    @click.option("--map", "map_file")
    def check(**values: Any) -> None:
        """Check."""
        show(**values)

    return root


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file, not there yet."""
    path = tmp_path / "config.toml"
    monkeypatch.setenv("STEERMOE_CONFIG", str(path))
    return path


def start(*args: Any, **env: str) -> Result:
    return CliRunner().invoke(program(), [str(arg) for arg in args], env=env)


def values(*args: Any, **env: str) -> dict[str, Any]:
    result = start(*args, **env)
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


#
# what comes before what
#


def test_flag_before_environment_before_file_before_default(file: Path) -> None:
    file.write_text("")
    assert values("chat")["temp"] == 0.8
    file.write_text("temp = 0.1\n")
    assert values("chat")["temp"] == 0.1
    file.write_text("temp = 0.1\n[chat]\ntemp = 0.2\n")
    assert values("chat")["temp"] == 0.2
    assert values("run")["temp"] == 0.1
    assert values("chat", STEERMOE_TEMP="0.3")["temp"] == 0.3
    both = {"STEERMOE_TEMP": "0.3", "STEERMOE_CHAT_TEMP": "0.4"}
    assert values("chat", **both)["temp"] == 0.4
    assert values("run", **both)["temp"] == 0.3
    assert values("chat", "--temp", "0.5", **both)["temp"] == 0.5


def test_a_nearer_table_counts_wherever_it_stands(file: Path) -> None:
    file.write_text("[pairs.check]\nlimit = 1\n[pairs]\nlimit = 2\n")
    assert values("pairs", "check")["limit"] == 1
    file.write_text("[pairs]\nlimit = 2\n")
    assert values("pairs", "check")["limit"] == 2


def test_names_are_those_of_the_options(file: Path) -> None:
    file.write_text('map = "m.json"\n')
    assert values("run")["map_file"] == values("pairs", "check")["map_file"] == "m.json"
    assert values("run", STEERMOE_MAP="n.json")["map_file"] == "n.json"
    assert values("pairs", "check", STEERMOE_PAIRS_CHECK_MAP="o.json")["map_file"] == "o.json"
    for name in ("GPU_LAYERS", "N_GPU_LAYERS", "CHAT_GPU_LAYERS"):
        assert values("chat", **{f"STEERMOE_{name}": "7"})["n_gpu_layers"] == 7
    file.write_text("n-gpu-layers = 5\n")
    assert values("chat")["n_gpu_layers"] == 5


def test_of_two_names_the_nearer_counts(file: Path) -> None:
    """Whatever the option is called there; and `config show` says so."""
    for text, value in (
        ("gpu-layers = 1\nn-gpu-layers = 2\n", "2"),
        ("n-gpu-layers = 2\ngpu-layers = 1\n", "1"),
        ("n-gpu-layers = 2\n[run]\ngpu-layers = 1\n", "1"),
        ("gpu-layers = 1\nn-gpu-layers = 2\n[run]\ngpu-layers = 3\n", "3"),
    ):
        file.write_text(text)
        assert settings.default_map(main)["run"]["n_gpu_layers"] == value, text
        shown = settings.settings(main, ConfigFile.read(file), ("run",))
        (setting,) = [setting for setting in shown if setting.option == "gpu-layers"]
        assert str(setting.value) == value, text
        line = next(n for n, line in enumerate(text.splitlines(), 1) if line.endswith(f"gpu-layers = {value}"))
        assert setting.where == f"{file}, line {line}"


def test_an_option_that_means_something_else_is_not_shared(file: Path) -> None:
    file.write_text('model = "a.gguf"\n')
    assert values("chat")["model"] == "a.gguf"
    assert values("run")["model"] is None
    assert values("run", STEERMOE_MODEL="b.gguf")["model"] is None
    assert values("run", STEERMOE_RUN_MODEL="b.gguf")["model"] == "b.gguf"
    file.write_text('[run]\nmodel = "c.gguf"\n')
    assert values("run")["model"] == "c.gguf"


def test_types(file: Path) -> None:
    file.write_text('temp = 1\nmmap = false\nstop = ["a", "b"]\ngpu-layers = 3\nverbose = true\nkind = "b"\n')
    chat, run = values("chat"), values("run")
    assert (chat["temp"], chat["mmap"], chat["stop"], chat["n_gpu_layers"]) == (1.0, False, ["a", "b"], 3)
    assert (run["verbose"], run["kind"]) == (True, "b")
    assert values("chat", "--mmap")["mmap"] is True
    assert values("chat", STEERMOE_MMAP="1")["mmap"] is True
    file.write_text('stop = "one"\n')
    assert values("chat")["stop"] == ["one"]
    shares = settings.options(main.commands["run"])["tensor-split"]
    assert settings.for_click(shares, [3, 1]) == "3,1"
    file.write_text("tensor-split = [3, 1]\n")
    assert settings.default_map(main)["run"] == {"tensor_split": "3,1"}


def test_the_library_s_variables_are_no_options(file: Path) -> None:
    names = settings.option_variables(main)
    assert {"STEERMOE_MODEL", "STEERMOE_BIAS", "STEERMOE_RUN_TEMP", "STEERMOE_THREADS"} <= names
    assert not names & {"STEERMOE_FORCE", "STEERMOE_LIB_PATH", "STEERMOE_CONFIG"}


#
# files that cannot be used
#


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("temp = \n", 1, "not TOML"),
        ("a\n", 1, "not TOML"),
        ("threads = 1\nthreads = 2\n", 2, "not TOML"),
        ('model = "a\n', 1, "not TOML"),
        ("threads = 1\ntempp = 0\n", 2, "is it temp?"),
        ("\n[chat]\ntemp = 0\nlimit = 2\n", 4, "belongs to pairs.check"),
        ("[chta]\ntemp = 0\n", 1, "is it chat?"),
        ("[pairs.chek]\nlimit = 1\n", 1, "is it check?"),
        ("[chat.deep]\n", 1, "[chat.deep]: "),
        ("zzzz = 1\n", 1, "config show COMMAND"),
        ("n_gpu_layers = 1\n", 1, "is it n-gpu-layers?"),
        ('"--temp" = 1\n', 1, "write temp"),
        ('temp = "hot"\n', 1, "temp = 'hot'"),
        ("threads = 2.5\n", 1, "threads = 2.5 "),
        ("threads = true\n", 1, "threads = true "),
        ("mmap = 1\n", 1, "mmap = 1 "),
        ("model = 7\n", 1, "model = 7 "),
        ("model = []\n", 1, "model = [] "),
        ("stop = [1]\n", 1, "stop = [1] "),
        ("stop = [[]]\n", 1, "stop = [[]] "),
        ("temp = 2020-01-01\n", 1, "temp = datetime.date(2020, 1, 1) "),
        ("hf-token = 1234567\n", 1, "hf-token = a secret "),
        ("[[chat]]\ntemp = 0\n", None, "chat: "),
        ("chat.temp = 'a'\n", 1, "[chat] temp = 'a'"),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, line: int | None, words: str, file: Path) -> None:
    file.write_text(text)
    result = start("run")
    assert result.exit_code == 2
    where = f"{file}, line {line}: " if line else f"{file}: "
    assert result.stderr.startswith(f"error: {where}"), result.stderr
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert "1234567" not in result.stderr
    assert result.stdout == ""


def test_values_that_only_the_option_can_judge(file: Path) -> None:
    for text, words in (
        ("threads = 0", "'--threads': 0 "),
        ("gpu-layers = -2", "'-2'"),
        ('gpu-layers = "x"', "'x'"),
    ):
        file.write_text(f"# a comment\n{text}\n")
        result = start("chat")
        assert result.exit_code == 2
        assert words in result.stderr
        assert f"(from {file}, line 2)" in result.stderr
        assert start("run").exit_code == 0
    file.write_text("[run]\nkind = 'c'\n")
    assert f"(from {file}, line 2)" in start("run").stderr
    file.write_text("")
    result = start("chat", STEERMOE_CHAT_THREADS="many")
    assert result.exit_code == 2
    assert "'many'" in result.stderr
    assert "(from the environment: STEERMOE_CHAT_THREADS)" in result.stderr


def test_unreadable_files(file: Path, tmp_path: Path) -> None:
    result = start("run")
    assert result.exit_code == 2
    assert "STEERMOE_CONFIG" in result.stderr
    file.write_bytes(b"temp = 1 # \xff\n")
    result = start("run")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {file}: byte 11 ")
    file.write_text("a." * 5000 + "b = 1\n")
    assert start("run").exit_code == 2
    file.write_bytes(b"#" * ((1 << 20) + 1))
    result = start("run")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {file}: larger than 1 MiB")
    result = start("run", STEERMOE_CONFIG=str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path}: ")
    file.write_text("\ufefftemp = 0.25\n", encoding="utf-8")  # as Windows' editor saves it
    assert values("run")["temp"] == 0.25


def test_help_is_to_be_had_whatever_the_file_says(file: Path) -> None:
    file.write_text("nonsense")
    assert start("run", "--help").exit_code == 0
    assert start("--help").exit_code == 0
    assert start("run").exit_code == 2


#
# where the file is
#


def test_the_platform_s_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEERMOE_CONFIG", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_path().name == "config.toml"
    assert "steermoe" in config_path().parts
    if os.name == "posix" and not os.uname().sysname.startswith("Darwin"):
        assert config_path() == tmp_path / "steermoe" / "config.toml"
        assert not ConfigFile.read(config_path()).exists
        result = CliRunner().invoke(main, ["config", "set", "threads", "3"])  # its folder is made
        assert result.exit_code == 0, result.output
        assert config_path().read_text() == "threads = 3\n"


#
# properties
#

NAMES = st.sampled_from(["temp", "threads", "run", "a b", "ü", "x.y", "top-k"])
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=3),
)
KEYS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=8))
def test_edits_change_one_value_and_nothing_else(edits: list[tuple[tuple[str, ...], Any]]) -> None:
    text = "# a comment = stays\n"
    data: dict[str, Any] = {}
    for keys, value in edits:
        try:
            text = set_value(text, keys, value)
        except EditError:
            continue
        here = data
        for name in keys[:-1]:
            here = here.setdefault(name, {})
        here[keys[-1]] = value
        assert tomllib.loads(text) == data
        assert text.startswith("# a comment = stays\n")
    for keys, _ in edits:
        try:
            text = unset_value(text, keys)
        except (KeyError, EditError):
            continue
        with pytest.raises(KeyError):
            unset_value(text, keys)


COMMANDS: Commands = {
    ("run",): {"temp": OptionKind("number"), "stop": OptionKind("text", many=True)},
    ("pairs", "check"): {"limit": OptionKind("integer"), "temp": OptionKind("number")},
}


@given(st.text(max_size=80) | st.binary(max_size=80).map(lambda data: data.decode("latin-1")))
def test_any_text_is_read_or_refused_with_one_line(text: str) -> None:
    path = Path("c.toml")
    try:
        ConfigFile(path, text, True, parse(text, path)).options(COMMANDS)
        message = "c.toml"
    except UsageError as error:
        message = str(error)
    assert message.startswith("c.toml")
    assert "\n" not in message


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["run", "temp", "stop", "x"]), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["run", "pairs", "check", "temp", "stop", "limit", "x"]), JSON_LIKE))
def test_any_data_is_taken_or_refused(data: dict[str, Any]) -> None:
    try:
        found = ConfigFile(Path("c.toml"), "", True, data).options(COMMANDS)
    except UsageError:
        return
    for path, entries in found.items():
        for name, entry in entries.items():
            assert COMMANDS[path][name].accepts(entry.value)


@given(st.text(max_size=30))
def test_values_typed_by_a_person(text: str) -> None:
    for what in ("flag", "integer", "number", "text", "any", "table"):
        for many in (False, True):
            kind = OptionKind(what, many)  # type: ignore[arg-type]
            try:
                value = parse_value(text, kind)
            except ValueError:
                continue
            assert kind.accepts(value)
            written = set_value("", ("a",), value)
            assert tomllib.loads(written)["a"] == value or value != value
