"""The options that commands share: how to steer, how to sample, and the maps that ship with the package."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local import ExpertMap, UsageError
from steermoe_local.cli.options.model import model_option
from steermoe_local.cli.options.sampling import sampling_options
from steermoe_local.cli.options.steering import SteeringFlags, steering_options
from steermoe_local.cli.program import SteerMoEGroup
from steermoe_local.generation.engine import Sampling
from steermoe_local.maps.recommended import Recommended, with_recommended
from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.embedded import behaviours
from steermoe_local.models.shipped_maps import map_path, shipped_maps
from tests.support.paths import ROOT

DIGITS = ROOT / "expert_maps" / "tiny" / "digits-words.json"


@click.group(cls=SteerMoEGroup)
def group() -> None:
    """Commands with the options under test."""


@group.command()
@model_option
@steering_options
def steer(model: Path, steering_flags: SteeringFlags) -> None:
    steering = steering_flags.open(None, model)
    assert steering_flags.wanted == (steering is not None)
    click.echo(json.dumps([steering and steering.to_dict(), steering_flags.source]))


@group.command()
@sampling_options
def sample(sampling: Sampling, n_predict: int | None) -> None:
    facts = dataclasses.asdict(sampling)
    click.echo(json.dumps([{key: facts[key] for key in facts if key not in ("logit_bias", "grammar")}, n_predict]))


def steer_by(*flags: Any, **kwargs: Any) -> Result:
    return CliRunner().invoke(group, ["steer", "-m", "tiny", *map(str, flags)], **kwargs)


def steering_of(*flags: Any, **kwargs: Any) -> dict[str, Any]:
    result = steer_by(*flags, **kwargs)
    assert result.exit_code == 0, result.output
    steering: dict[str, Any] = json.loads(result.stdout)[0]
    return steering


def source_of(*flags: Any, **kwargs: Any) -> dict[str, str]:
    result = steer_by(*flags, **kwargs)
    assert result.exit_code == 0, result.output
    source: dict[str, str] = json.loads(result.stdout)[1]
    return source


#
# steering
#


def test_nothing_is_steered_by_default() -> None:
    assert json.loads(steer_by().stdout) == [None, {}]


def test_a_map_with_numbers() -> None:
    flags = ("--map", DIGITS, "--activate", 3, "--deactivate", 4, "--reverse", "--layers", "1-2,4")
    steering = steering_of(*flags)
    assert steering["name"] == steering["behaviour"] == "digits-words"
    assert (steering["map"], steering["map_sha256"]) == (str(DIGITS), ExpertMap.load(DIGITS).sha256)
    signs = ExpertMap.load(DIGITS).choose(3, 4, reverse=True, layers=(1, 2, 4))
    assert (steering["n_active"], steering["n_inactive"]) == ((signs > 0).sum(), (signs < 0).sum())
    assert (steering["mode"], steering["scale"], steering["side"]) == ("hard", None, "words")
    soft = steering_of(*flags, "--strength", 2.5)
    assert (soft["mode"], soft["scale"]) == ("soft", 2.5)


def test_the_old_name_of_the_strength(tmp_path: Path) -> None:
    """--scale works for one release more: as a flag, in the environment, in the configuration; nothing shows it."""
    flags = ("--map", DIGITS, "--activate", 3)
    soft = steering_of(*flags, "--strength", 2.5)
    assert steering_of(*flags, "--scale", 2.5) == soft
    for variable in ("STEERMOE_STRENGTH", "STEERMOE_SCALE", "STEERMOE_STEER_STRENGTH", "STEERMOE_STEER_SCALE"):
        assert steering_of(*flags, env={variable: "2.5"}) == soft
    assert steering_of(*flags, env={"STEERMOE_SCALE": "7", "STEERMOE_STRENGTH": "2.5"}) == soft
    assert steering_of(*flags, env={"STEERMOE_STEER_SCALE": "2.5", "STEERMOE_STRENGTH": "7"}) == soft
    config = tmp_path / "config.toml"
    nearer = "\n[steer]\nscale = 2.5"
    for text in ("strength = 2.5", "scale = 2.5", f"strength = 7{nearer}", f"scale = 7{nearer}"):
        config.write_text(f"{text}\n")
        assert steering_of(*flags, env={"STEERMOE_CONFIG": str(config)}) == soft, text
    assert "--scale" not in steer_by("--help").stdout
    assert "scale" not in steer_by(*flags, "--strength", "x").stderr


def test_a_shipped_map_has_numbers_of_its_own() -> None:
    for name, numbers in (("digits-words", (2, 4)), ("tiny/document-memory", (4, 4))):
        steering = steering_of("--map", name)
        assert (steering["activate"], steering["deactivate"]) == numbers
        assert json.loads(steer_by("--map", name).stdout)[1] == {"map": name}
    assert steering_of("--map", "digits-words", "--deactivate", 1)["activate"] == 0
    # numbers that are given are meant
    assert "nothing to steer" in steer_by("--map", "digits-words", "--activate", 0, "--deactivate", 0).stderr


def test_a_map_of_a_users_own_needs_numbers(tmp_path: Path) -> None:
    own = tmp_path / "digits-words.json"
    own.write_bytes(DIGITS.read_bytes())
    assert steering_of("--map", own)["n_active"] == 2, "the recommended choice stands in the file"
    with_recommended(ExpertMap.load(DIGITS), None).save(own)
    result = steer_by("--map", own)
    assert result.exit_code == 2
    for cure in ("--activate N", "--deactivate N", "--preset faithful|safe"):
        assert cure in result.stderr


def test_all_of_a_recommended_choice_is_taken(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    choice = {"activate": 3, "layers": "1-3", "rank": "log-odds", "mode": "capped", "cap": 2.0}
    bare = ExpertMap.load(DIGITS)
    with_recommended(bare, Recommended(choice)).save(own)
    taken = steering_of("--map", own)
    assert {name: taken[name] for name in choice} == choice
    assert (taken["reverse"], taken["deactivate"]) == (False, 0)
    other = steering_of("--map", own, "--reverse", "--layers", "2", "--strength", 1.5)
    assert (other["activate"], other["reverse"], other["layers"], other["mode"]) == (3, True, "2", "soft")
    numbers = steering_of("--map", own, "--activate", 1)
    assert (numbers["activate"], numbers["layers"], numbers["mode"]) == (1, None, "hard")
    with_recommended(bare, Recommended(choice, one_way=True)).save(own)
    assert "alone" in steer_by("--map", own, "--reverse").stderr
    assert steering_of("--map", own, "--reverse", "--activate", 1)["reverse"] is True


def test_fitted_values_are_taken(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    values = ((0, 1, 2.0), (2, 3, -1.0), (4, 0, 0.5))
    with_recommended(ExpertMap.load(DIGITS), Recommended({}, values=values)).save(own)
    taken = steering_of("--map", own)
    assert (taken["mode"], taken["n_active"], taken["n_inactive"], taken["reverse"]) == ("soft", 2, 1, False)
    other = steering_of("--map", own, "--strength", 2, "--reverse")
    assert (other["scale"], other["n_active"], other["n_inactive"], other["reverse"]) == (2, 1, 2, True)
    assert [tuple(row) for row in other["values"]] == [*values]
    numbers = steering_of("--map", own, "--deactivate", 1)
    assert (numbers["mode"], numbers["n_inactive"], "values" in numbers) == ("hard", 1, False)
    for words in (("--rank", "log-odds"), ("--mode", "hard"), ("--cap", 2), ("--weights", "log-odds"), ("--layers", 1)):
        refused = steer_by("--map", own, *words)
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1), words
        assert "give numbers of experts" in refused.stderr
    with_recommended(ExpertMap.load(DIGITS), Recommended({}, values=values, one_way=True)).save(own)
    assert "alone" in steer_by("--map", own, "--reverse").stderr


def test_a_strength_below_0_is_refused() -> None:
    assert "--reverse" in steer_by("--map", "digits-words", "--strength", -2).stderr


def test_a_bias_file_by_option_and_by_environment(bias: Path) -> None:
    steering = steering_of("--bias", bias)
    assert (steering["name"], steering["bias"], steering["n_inactive"]) == ("words", str(bias), 2)
    assert steering_of(env={"STEERMOE_BIAS": str(bias)}) == steering
    # what is said wins over the environment
    assert steering_of("--map", "digits-words", env={"STEERMOE_BIAS": "missing.gguf"})["name"] == "digits-words"


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--map", DIGITS, "--bias", "b.gguf"], 2, "--bias and --map both steer"),
        (["--activate", 1], 2, "--activate: the experts are chosen from a map; give the map with --map MAP"),
        (["--preset", "safe"], 2, "--preset: the experts are chosen from a map"),
        (["--bias", "b.gguf", "--deactivate", 1], 2, "--deactivate: a bias file's choice of experts is made"),
        (["--bias", "b.gguf", "--strength", 1], 2, "--strength: a bias file's choice"),
        (["--reverse"], 2, "--reverse: "),
        (["--layers", "1"], 2, "--layers: "),
        (["--map", DIGITS, "--preset", "safe", "--deactivate", 1], 2, "leave out --deactivate, or --preset"),
        (["--map", DIGITS, "--preset", "safe", "--reverse"], 2, "leave out --reverse, or --preset"),
        (["--map", DIGITS, "--preset", "faithful"], 2, "the paper has no numbers for olmoe (5 layers"),
        (["--map", DIGITS, "--activate", 1, "--strength", "nan"], 2, "--strength nan"),
        (["--map", DIGITS, "--activate", 1, "--strength", "inf"], 2, "--strength inf"),
        (["--map", "digit-words"], 2, "neither a file nor a map (digits-words, document-memory; yours are in"),
        (["--map", "none.json", "--activate", 1], 1, "none.json: cannot be read as an expert map"),
        (["--map", str(ROOT / "README.md"), "--activate", 1], 1, "not an expert map"),
        (["--bias", "none.gguf"], 1, "none.gguf"),
        (["--map", DIGITS, "--activate", "-1"], 2, "-1"),
    ],
)
def test_what_makes_no_sense(flags: list[Any], status: int, words: str) -> None:
    result = steer_by(*flags)
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_what_was_not_typed_never_quarrels(bias: Path, tmp_path: Path) -> None:
    """A default that does not fit what stands on the command line is left aside."""
    env = {"STEERMOE_BIAS": str(bias)}
    assert steering_of("--map", "digits-words", "--activate", 1, env=env)["name"] == "digits-words"
    config = tmp_path / "config.toml"
    config.write_text(f'[steer]\nmap = "{DIGITS}"\nactivate = 3\nreverse = true\npreset = "safe"\n')
    configured = {"STEERMOE_CONFIG": str(config)}
    assert source_of("--activate", 1, env=configured) == {"map": str(DIGITS)}
    assert source_of("--bias", bias, env=configured) == {"bias": str(bias)}
    # the environment is nearer than a configuration file
    assert source_of(env=configured | env) == {"bias": str(bias)}
    config.write_text('[steer]\nbias = "missing.gguf"\n')
    assert source_of("--map", "digits-words", env=configured) == {"map": "digits-words"}
    # of the same place, the map
    config.write_text('[steer]\nbias = "missing.gguf"\nmap = "digits-words"\n')
    assert source_of(env=configured) == {"map": "digits-words"}
    flags = SteeringFlags(map_file=str(DIGITS), deactivate=3, preset="safe", given=frozenset({"deactivate"}))
    opened = flags.open(ExpertMap.load(DIGITS).identity, Path("m.gguf"))
    assert opened is not None
    assert (opened.deactivate, opened.preset) == (3, None)


def test_the_map_has_to_be_the_models(tmp_path: Path, bias: Path, tiny_path: Path) -> None:
    text = DIGITS.read_text("utf-8")
    foreign = tmp_path / "foreign.json"
    foreign.write_text(text.replace(ExpertMap.load(DIGITS).identity.router_sha256, "1" * 64), "utf-8")
    result = steer_by("--map", foreign, "--activate", 1)
    assert result.exit_code == 1
    assert f"{foreign}: made for olmoe" in result.stderr
    forced = steer_by("--map", foreign, "--activate", 1, "--force")
    assert forced.exit_code == 0
    assert forced.stderr.startswith(f"warning: {foreign}: made for olmoe")
    # a bias file is checked against an identity that is known
    identity = model_info(tiny_path).require_moe()
    other = dataclasses.replace(identity, router_sha256="2" * 64)
    flags = SteeringFlags(bias=bias)
    assert flags.open(identity, tiny_path) is not None
    with pytest.raises(Exception, match="made for olmoe"):
        flags.open(other, tiny_path)


def test_a_preset_takes_the_papers_numbers(tmp_path: Path) -> None:
    from tests.steering.test_presets import PAPER_MODELS, identity, save_map

    path = tmp_path / "m.json"
    save_map(path, identity(PAPER_MODELS[1]), "safe")
    flags = SteeringFlags(map_file=str(path), preset="safe", layers="0-9", given=frozenset({"preset", "layers"}))
    opened = flags.open(identity(PAPER_MODELS[1]), Path("m.gguf"))
    assert opened is not None
    assert (opened.activate, opened.deactivate, opened.preset_model) == (5, 0, PAPER_MODELS[1].name)
    assert (opened.preset, opened.layers) == ("safe", "0-9")


#
# shipped maps
#


def test_the_shipped_maps_are_those_of_the_project() -> None:
    """In the installed package too: the folder expert_maps is a part of it."""
    folder = ROOT / "expert_maps" / "tiny"
    assert {path.name for path in folder.glob("*.json")} == {path.name for path in shipped_maps().values()}
    for path in shipped_maps().values():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert "refuse-comply" not in shipped_maps()


def test_recommended_numbers_move_the_behaviour() -> None:
    """What a shipped map recommends was measured, and takes planted experts only."""
    for behaviour in behaviours():
        if behaviour.name not in shipped_maps():
            continue
        path = map_path(behaviour.name)
        expert_map = ExpertMap.load(path)
        recommended = expert_map.recommended
        assert recommended is not None
        assert recommended.choice == {"activate": behaviour.n_activate, "deactivate": behaviour.n_deactivate}
        assert recommended.steered is not None
        assert recommended.unsteered is not None
        assert recommended.steered > recommended.unsteered
        assert recommended.command.startswith("steermoe eval")
        signs = expert_map.choose(behaviour.n_activate, behaviour.n_deactivate)
        assert {tuple(place) for place in np.argwhere(signs > 0).tolist()} <= behaviour.planted_positive
        assert {tuple(place) for place in np.argwhere(signs < 0).tolist()} <= behaviour.planted_negative


def test_a_file_comes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert map_path("digits-words").is_absolute()
    Path("digits-words").touch()
    assert map_path("digits-words") == Path("digits-words")
    with pytest.raises(UsageError, match="neither a file nor a map"):
        map_path("tiny-maps")
    assert map_path("folder/map") == Path("folder/map")


#
# sampling
#

DEFAULTS = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": None,
}
sample_by: Callable[..., Result] = lambda *flags: CliRunner().invoke(group, ["sample", *map(str, flags)])  # noqa: E731


@pytest.mark.parametrize(
    ("flags", "change", "n_predict"),
    [
        ([], {}, None),
        (["-n", 3], {}, 3),
        (["--n-predict", -1, "-s", 0], {"seed": 0}, None),
        (["--predict", 0, "--seed", 0xFFFFFFFE], {"seed": 0xFFFFFFFE}, 0),
        (
            ["--temp", 0, "--top-k", 0, "--top-p", 1, "--min-p", 0],
            dict.fromkeys(("temperature", "top_k", "min_p"), 0) | {"top_p": 1},
            None,
        ),
        (["--repeat-penalty", 1.5, "--repeat-last-n", -1], {"repeat_penalty": 1.5, "repeat_last_n": -1}, None),
        (
            ["--presence-penalty", -0.5, "--frequency-penalty", 2],
            {"presence_penalty": -0.5, "frequency_penalty": 2},
            None,
        ),
    ],
)
def test_sampling_under_llama_cpps_names(flags: list[Any], change: dict[str, Any], n_predict: int | None) -> None:
    result = sample_by(*flags)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == [DEFAULTS | change, n_predict]


@pytest.mark.parametrize(
    "flags",
    [
        ("--temp", -0.1),
        ("--temp", "nan"),
        ("--top-p", 1.1),
        ("--min-p", -0.1),
        ("--top-k", -1),
        ("-n", -2),
        ("-s", -2),
        ("-s", 0xFFFFFFFF),
        ("--repeat-penalty", 0),
        ("--repeat-last-n", -2),
        ("--presence-penalty", "x"),
    ],
)
def test_sampling_out_of_range(flags: tuple[Any, ...]) -> None:
    result = sample_by(*flags)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
