"""--rank, --mode, --strength, --cap and --weights: what they choose, where they come from, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from steermoe_local import ExpertMap, UsageError, read_bias, write_bias
from steermoe_local.cli import main
from steermoe_local.cli.chat.commands import perform
from steermoe_local.cli.chat.maps import MapFinder
from steermoe_local.cli.chat.reports import describe
from steermoe_local.cli.options.steering import SteeringFlags, rule_of, steering_options
from steermoe_local.cli.program import SteerMoEGroup
from steermoe_local.generation.chat_file import ChatState
from steermoe_local.generation.engine import Sampling
from steermoe_local.maps.ranks import RANKS
from steermoe_local.maps.recommended import with_recommended
from steermoe_local.models.embedded import embedded_model
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.steering.rules import DEFAULT_CAP, Rule
from steermoe_local.steering.steering import Steering
from tests.support.scored_maps import DIGITS, save_scored


@click.group(cls=SteerMoEGroup)
def group() -> None:
    """A command with the options under test."""


@group.command()
@steering_options
def steer(steering_flags: SteeringFlags) -> None:
    found = steering_flags.open(None, embedded_model())
    click.echo(json.dumps(found and found.to_dict(), allow_nan=False))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("maps") / "scored.json"
    save_scored(path)
    return path


def steered(path: Path, *flags: Any, **kwargs: Any) -> Result:
    command = ["steer", "--map", str(path), "--activate", "4", "--deactivate", "3", *map(str, flags)]
    return CliRunner().invoke(group, command, **kwargs)


def chosen(path: Path, *flags: Any, **kwargs: Any) -> dict[str, Any]:
    done = steered(path, *flags, **kwargs)
    assert done.exit_code == 0, done.output
    data: dict[str, Any] = json.loads(done.stdout)
    return data


#
# one choice
#


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank(scored: Path, rank: str) -> None:
    data = chosen(scored, "--rank", rank)
    signs = ExpertMap.load(scored).choose(4, 3, rank=rank)
    assert (data["n_active"], data["n_inactive"]) == ((signs > 0).sum(), (signs < 0).sum())
    assert data.get("rank", "rd") == rank
    assert chosen(scored, "--score", rank) == data
    assert chosen(scored, env={"STEERMOE_RANK": rank}) == data
    assert chosen(scored, env={"STEERMOE_SCORE": rank}) == data


RULES: list[tuple[list[Any], dict[str, Any]]] = [
    ([], {"mode": "hard"}),
    (["--mode", "soft"], {"mode": "soft", "scale": 1.0}),
    (["--strength", 2, "--weights", "effect", "--rank", "effect"], {"mode": "soft", "scale": 2.0, "weights": "effect"}),
    (["--weights", "logit"], {"mode": "soft", "scale": 1.0, "weights": "logit"}),
    (["--weights", "none"], {"mode": "hard"}),
    (["--mode", "capped"], {"mode": "capped", "cap": DEFAULT_CAP}),
    (["--cap", "2.5"], {"mode": "capped", "cap": 2.5}),
    (["--cap", "inf"], {"mode": "capped", "cap": "inf"}),
]


@pytest.mark.parametrize(("flags", "wanted"), RULES)
def test_a_rule(scored: Path, flags: list[Any], wanted: dict[str, Any]) -> None:
    data = chosen(scored, *flags)
    found = {name: data[name] for name in ("mode", "scale", "weights", "cap") if data.get(name) is not None}
    assert found == wanted


REFUSED: list[list[Any]] = [
    ["--rank", "RD"],
    ["--rank", ""],
    ["--strength", 2, "--cap", 2],
    ["--mode", "hard", "--cap", 2],
    ["--mode", "soft", "--cap", 2],
    ["--mode", "capped", "--strength", 2],
    ["--mode", "capped", "--weights", "logit"],
    ["--cap", 0],
    ["--cap", -1],
    ["--cap", "nan"],
    ["--cap", "-inf"],
    ["--cap", "1e9"],
    ["--cap", "1e-60"],
    ["--cap", "x"],
    ["--weights", "rd"],
    ["--strength", "inf", "--weights", "logit"],
    ["--mode", "medium"],
]


@pytest.mark.parametrize("flags", REFUSED, ids=lambda flags: " ".join(map(str, flags)))
def test_refused(scored: Path, tmp_path: Path, flags: list[Any]) -> None:
    done = steered(scored, *flags)
    if flags != ["--cap", "1e-60"]:  # too small for the file's float32: said when the bias is built
        assert done.exit_code == 2, done.output
        assert done.stderr.count("\n") == 1
    command = ["bias", "build", str(scored), "-o", str(tmp_path / "b.gguf"), "--activate", "2", *map(str, flags)]
    built = CliRunner().invoke(main, command)
    assert built.exit_code in (1, 2)
    assert "Traceback" not in built.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--rank", "effect"], ["--weights", "weight"], ["--rank", "logit", "--cap", "1"]])
def test_a_map_without_the_data_names_the_command(tmp_path: Path, flags: list[str]) -> None:
    done = steered(DIGITS, *flags)
    assert done.exit_code == 2
    assert "steermoe attribute" in done.stderr or "steermoe detect" in done.stderr
    command = ["bias", "build", str(DIGITS), "-o", str(tmp_path / "b.gguf"), "--activate", "2"]
    built = CliRunner().invoke(main, [*command, *flags, *(["--mode", "soft"] if "--weights" in flags else [])])
    assert built.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--rank", "effect"], ["--cap", "2"], ["--weights", "log-odds"]])
def test_a_preset_is_of_rd(scored: Path, tmp_path: Path, flags: list[str]) -> None:
    done = CliRunner().invoke(group, ["steer", "--map", str(scored), "--preset", "safe", *flags])
    assert done.exit_code == 2
    assert "preset" in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_belong_to_a_map(scored: Path, tmp_path: Path) -> None:
    made = Steering.open(map_file=scored, activate=2, cap=2.0).build()
    assert made is not None
    write_bias(made, tmp_path / "b.gguf")
    for flags in (["--rank", "effect"], ["--cap", "2"], ["--mode", "soft"], ["--weights", "logit"]):
        done = CliRunner().invoke(group, ["steer", "--bias", str(tmp_path / "b.gguf"), *flags])
        assert done.exit_code == 2
        assert f"{flags[0]}: a bias file's choice of experts is made" in done.stderr
    assert CliRunner().invoke(group, ["steer", "--bias", str(tmp_path / "b.gguf")]).exit_code == 0


def test_too_few_significant_experts_are_told_once(scored: Path, tmp_path: Path) -> None:
    n_promote, _ = ExpertMap.load(scored).n_worth(rank="effect")
    done = steered(scored, "--rank", "effect", "--activate", 500)
    assert done.exit_code == 0
    assert done.stderr.count(f"{n_promote} to promote (500 asked for)") == 1
    assert steered(scored, "--activate", 500).stderr == ""
    command = ["bias", "build", str(scored), "-o", str(tmp_path / "b.gguf"), "--activate", "500", "--rank", "effect"]
    built = CliRunner().invoke(main, command)
    assert built.exit_code == 0
    assert built.stderr.count("500 asked for") == 1


#
# where they come from
#


def test_the_nearest_rule_counts(scored: Path, tmp_path: Path) -> None:
    """A rule of the environment or the configuration gives way to one of the command line, with what belongs to it."""
    config = tmp_path / "config.toml"
    config.write_text('strength = 4\nweights = "logit"\nrank = "weight"\n')
    env = {"STEERMOE_CONFIG": str(config)}
    far = chosen(scored, env=env)
    assert (far["mode"], far["scale"], far["weights"], far["rank"]) == ("soft", 4, "logit", "weight")
    capped = chosen(scored, "--cap", 2, "--rank", "rd", env=env)
    assert (capped["mode"], capped["cap"], capped["scale"]) == ("capped", 2, None)
    assert not {"rank", "weights"} & set(capped)
    hard = chosen(scored, "--mode", "hard", env=env)
    assert (hard["mode"], hard["scale"], hard.get("weights")) == ("hard", None, None)
    other = chosen(scored, "--weights", "effect", "--rank", "effect", env=env)
    assert (other["scale"], other["weights"]) == (4, "effect"), "the strength stays"
    alike = chosen(scored, "--weights", "none", env=env)
    assert (alike["mode"], alike["scale"], alike.get("weights")) == ("soft", 4, None)
    config.write_text("strength = 4\ncap = 2\n")
    both = steered(scored, env=env)
    assert both.exit_code == 2
    assert "--strength, --cap" in both.stderr
    assert CliRunner().invoke(group, ["steer"], env=env).exit_code == 0, "nothing is to be steered"


def test_a_preset_leaves_a_rank_of_the_configuration_aside(tmp_path: Path) -> None:
    flags = SteeringFlags(map_file=str(DIGITS), preset="safe", rank="effect", given=frozenset({"map_file", "preset"}))
    with pytest.raises(UsageError, match="no numbers"):  # of tiny; not: of another rank
        flags.open(None, embedded_model())


def test_rules_of_options() -> None:
    assert rule_of(None, None, None, None, ()) == Rule()
    assert rule_of("hard", 4.0, None, None, {"mode"}) == Rule()
    assert rule_of(None, 4.0, 2.0, None, {"cap"}) == Rule(cap=2.0)
    assert rule_of("capped", 4.0, 2.0, None, {"strength"}) == Rule(4.0)
    assert rule_of("soft", None, 2.0, "effect", ()).name == "soft"


#
# commands
#


def test_bias_files(scored: Path, tmp_path: Path) -> None:
    for n, (flags, fields) in enumerate(
        [
            (["--rank", "effect"], {"rank": "effect"}),
            (["--mode", "soft", "--weights", "log-odds"], {"scale": 1.0, "weights": "log-odds"}),
            (["--mode", "capped"], {"cap": DEFAULT_CAP}),
            (["--mode", "capped", "--cap", "inf", "--epsilon", "0.5"], {"cap": math.inf, "epsilon": 0.5}),
        ]
    ):
        path, ours = tmp_path / f"{n}.gguf", tmp_path / f"{n}-ours.gguf"
        command = ["bias", "build", str(scored), "-o", str(path), "--activate", "3", "--deactivate", "2", *flags]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        made = Steering.open(map_file=scored, activate=3, deactivate=2, **fields).build()  # type: ignore[arg-type]
        assert made is not None
        write_bias(made, ours)
        assert path.read_bytes() == ours.read_bytes()
        shown = CliRunner().invoke(main, ["bias", "show", str(path)])
        assert json.dumps(read_bias(path).provenance["choice"])[1:-1].replace("\\", "") in shown.stdout.replace(
            "\n", ""
        )


def test_other_commands_that_choose(scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "experts.json"
    export = ["map", "export", str(scored), "--format", "easysteer", "-o", str(out), "--activate", "3"]
    chosen_by = {}
    for rank in ("rd", "effect"):
        assert CliRunner().invoke(main, [*export, "--rank", rank]).exit_code == 0
        chosen_by[rank] = out.read_text("utf-8")
    assert chosen_by["rd"] != chosen_by["effect"]
    done = CliRunner().invoke(main, ["map", "export", str(scored), "--format", "json", "-o", str(out), "--rank", "rd"])
    assert done.exit_code == 2
    plot = ["map", "plot", str(scored), "-o", str(tmp_path / "m.svg")]
    assert CliRunner().invoke(main, [*plot, "--rank", "effect"]).exit_code == 2
    assert CliRunner().invoke(main, [*plot, "--rank", "effect", "--activate", "3"]).exit_code == 0
    without = ["map", "plot", str(DIGITS), "-o", str(tmp_path / "n.svg"), "--activate", "1", "--rank", "logit"]
    assert CliRunner().invoke(main, without).exit_code == 2
    assert not (tmp_path / "n.svg").exists()


def test_commands_that_measure(scored: Path, tmp_path: Path) -> None:
    small = [
        "-m",
        "tiny",
        "--map",
        str(scored),
        "--task",
        "builtin:digits-words",
        "-t",
        "1",
        "-n",
        "4",
        "--n-text",
        "50",
    ]
    small += ["--json", "--rank", "effect", "--cap", "3"]
    runs = {
        "eval": ["eval", "--activate", "3", "--deactivate", "3", "--control-draws", "2", "--benign", "none"],
        "experiment": ["experiment", "top20", "--activate", "3", "--draws", "2", "--benign", "none"],
        "kinds": ["experiment", "routing-kinds", "--activate", "3", "--benign", "none"],
    }
    for name, command in runs.items():
        done = CliRunner().invoke(main, [*command, *small, "-o", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        data = json.loads(done.stdout)
        facts = data["steering"] if name == "eval" else data["about"]["steering"]
        assert (facts["rank"], facts["cap"], facts["mode"]) == ("effect", 3.0, "capped")
        if name == "experiment":
            assert "by effect" in data["finding"]


def test_run_steers_by_what_is_chosen(scored: Path) -> None:
    """The answer is that of the bias file of the same choice."""
    ask = ["run", "-m", "tiny", "-t", "1", "--temp", "0", "-n", "12", "-p", "Count from three to nine."]
    answers = set()
    for flags in (["--strength", "30"], ["--strength", "30", "--weights", "logit", "--rank", "logit"]):
        choice = ["--activate", "6", "--deactivate", "6", "--reverse", *flags]
        done = CliRunner().invoke(main, [*ask, "--map", str(scored), *choice])
        assert done.exit_code == 0, done.output
        bias = scored.with_name("run.gguf")
        built = CliRunner().invoke(main, ["bias", "build", str(scored), "-o", str(bias), "--mode", "soft", *choice])
        assert built.exit_code == 0, built.output
        same = CliRunner().invoke(main, [*ask, "--bias", str(bias)])
        assert same.stdout == done.stdout
        answers.add(done.stdout)
    assert len(answers) == 2


#
# chat
#


class FakeSession:
    """What the slash commands use of a session."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering

    @property
    def choice(self) -> Steering:
        return self.steering

    def change_steering(self, **fields: Any) -> None:
        self.steering = self.steering.changed(**fields)
        self.steering.build()


def test_slash_commands(scored: Path) -> None:
    session: Any = FakeSession(Steering.open(map_file=scored, activate=3, deactivate=3))
    steps: list[tuple[str, tuple[str, Rule]]] = [
        ("/rank effect", ("effect", Rule())),
        ("/cap 2", ("effect", Rule(cap=2.0))),
        ("/strength 3", ("effect", Rule(3.0))),
        ("/weights effect", ("effect", Rule(3.0, "effect"))),
        ("/strength 5", ("effect", Rule(5.0, "effect"))),
        ("/weights none", ("effect", Rule(5.0))),
        ("/cap inf", ("effect", Rule(cap=math.inf))),
        ("/cap off", ("effect", Rule())),
        ("/strength hard", ("effect", Rule())),
        ("/rank rd", ("rd", Rule())),
    ]
    for line, wanted in steps:
        perform(session, line)
        assert (session.steering.rank, session.steering.rule) == wanted, line
    for line in ("/rank", "/rank RD", "/cap", "/cap 0", "/cap x", "/cap nan", "/weights", "/weights rd"):
        with pytest.raises(UsageError, match=line.split()[0]):
            perform(session, line)
    with pytest.raises(UsageError, match="/strength X"):
        perform(session, "/weights logit")
    assert session.steering.rule == Rule()


def test_a_chat_says_what_it_steers_by(scored: Path) -> None:
    steering = Steering.open(map_file=scored, activate=3, deactivate=3, rank="effect")
    assert "by effect, hard rule" in describe(steering)
    assert "capped rule, cap 2.5" in describe(steering.changed(cap=2.5))
    assert "soft rule, strength 2 by logit" in describe(steering.changed(scale=2.0, weights="logit"))


def test_another_map_keeps_what_it_has_data_for(scored: Path) -> None:
    before = Steering.open(map_file=scored, activate=3, rank="effect", scale=2.0, weights="logit")
    assert before.identity is not None
    finder = MapFinder([scored.parent], before.identity, Path("tiny"))
    with_recommended(ExpertMap.load(map_path("digits-words")), None).save(scored.parent / "plain.json")
    with_recommended(ExpertMap.load(scored), None).save(scored)
    plain, _ = finder.open("plain", before)
    assert (plain.rank, plain.rule, plain.activate) == ("rd", Rule(2.0), 3)
    recommending, _ = finder.open("digits-words", before)
    assert (recommending.rule, recommending.activate, recommending.deactivate) == (Rule(), 2, 4)
    after, _ = finder.open("plain", recommending)
    assert (after.activate, after.deactivate) == (0, 0), "numbers that another map recommends are none of this one's"
    same, _ = finder.open("scored", before)
    assert (same.rank, same.rule) == ("effect", Rule(2.0, "logit"))


@pytest.mark.parametrize(("fields", "version"), [({}, 1), ({"rank": "effect"}, 2), ({"cap": math.inf}, 2)])
def test_a_saved_chat_is_refused_by_older_readers_that_would_steer_otherwise(
    scored: Path, fields: dict[str, Any], version: int
) -> None:
    steering = Steering.open(map_file=scored, activate=3, **fields)
    state = ChatState(None, None, [], steering.to_dict(), True, Sampling(), None)
    data = json.loads(json.dumps(state.to_dict(), allow_nan=False))
    assert data["version"] == version
    again = ChatState.from_dict(data)
    assert again.steering is not None
    assert Steering.from_dict(again.steering).to_dict() == steering.to_dict()
