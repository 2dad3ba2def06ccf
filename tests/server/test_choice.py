"""Ranks, weights and caps by request: what is applied, kept, listed, and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from steermoe_local import BiasFile, ExpertMap
from steermoe_local.cli import main
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.maps.ranks import RANKS, WEIGHTS
from steermoe_local.server import registry, schemas
from steermoe_local.steering.presets import PRESETS
from steermoe_local.steering.rules import DEFAULT_CAP, EQUAL, RULES
from steermoe_local.steering.steering import Steering
from tests.support.running_server import TINY, Running, running
from tests.support.scored_maps import save_scored, scored_map
from tests.support.steered_server import post, text_of

CHOICE = {"map": "scored", "activate": 4, "deactivate": 4}
SCORED = scored_map()

CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rank": ({"rank": "effect"}, {"rank": "effect"}),
    "reversed": ({"rank": "efficiency", "reverse": True}, {"rank": "efficiency", "reverse": True}),
    "weighted": (
        {"mode": "soft", "scale": 4.0, "weights": "log-odds"},
        {"scale": 4.0, "weights": "log-odds"},
    ),
    "weights ask for the soft rule": ({"scale": 4.0, "weights": "weight"}, {"scale": 4.0, "weights": "weight"}),
    "capped": ({"mode": "capped", "cap": 3}, {"cap": 3.0}),
    "capped by default": ({"mode": "capped"}, {"cap": DEFAULT_CAP}),
    "a cap asks for the capped rule": ({"cap": "inf"}, {"cap": math.inf}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("maps")
    save_scored(path / "scored.json")
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(maps_folder=folder, maps_writable=True) as found:
        yield found


def bias_of(**fields: Any) -> BiasFile:
    made = Steering("m", SCORED, **{"activate": 4, "deactivate": 4, **fields}).build()
    assert made is not None
    return made


def test_names_are_those_of_the_package() -> None:
    named: list[tuple[Any, tuple[str, ...]]] = [
        (schemas.Preset, PRESETS),
        (schemas.RankName, RANKS),
        (schemas.WeightsName, (*WEIGHTS, EQUAL)),
        (schemas.RuleMode, RULES),
    ]
    for name, values in named:
        assert name.__args__ == values


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_applied(server: Running, name: str) -> None:
    asked, fields = CHOICES[name]
    bias = bias_of(**fields)
    answer = server.chat(steering=CHOICE | asked)
    applied = answer.json()["steering"]
    assert applied["bias_sha256"] == bias.key
    assert (applied["mode"], applied["n_active"]) == (bias.mode, bias.n_active)
    assert applied["rank"] == fields.get("rank", "rd")
    assert applied["weights"] == fields.get("weights")
    cap = fields.get("cap")
    assert applied["cap"] == ("inf" if cap == math.inf else cap)
    llama = SteeredLlama(TINY, n_ctx=512, n_threads=1)
    try:
        llama.set_bias(bias)
        question = [{"role": "user", "content": "Please count starting at eleven until fifteen."}]
        alone = llama.create_chat_completion(question, temperature=0, max_tokens=24)
    finally:
        llama.close()
    assert (
        text_of(server.chat(question[0]["content"], steering=CHOICE | asked))
        == (
            alone["choices"][0]["message"]["content"]  # type: ignore[index]
        )
    )


@pytest.mark.parametrize("name", CHOICES)
def test_the_table_of_a_choice(server: Running, name: str) -> None:
    asked, fields = CHOICES[name]
    params = {key: str(value).lower() if value is True else value for key, value in (CHOICE | asked).items()}
    del params["map"]
    table = server.client.get("/v1/steering/scored/map", params=params).json()
    bias = bias_of(**fields)
    assert np.array_equal(table["signs"], bias.signs)
    assert (table["mode"], table["rank"]) == (bias.mode, fields.get("rank", "rd"))


def test_equal_numbers_under_other_scores_are_not_the_same_bias(server: Running) -> None:
    """What is kept ready is found by all that makes the bias."""
    asked = [
        {},
        {"rank": "effect"},
        {"rank": "logit"},
        {"cap": 2},
        {"cap": 3},
        {"scale": 2.0},
        {"scale": 2.0, "weights": "logit"},
        {"scale": 2.0, "weights": "weight"},
    ]
    for _ in range(2):
        digests = [server.chat(steering=CHOICE | one).json()["steering"]["bias_sha256"] for one in asked]
        assert len(set(digests)) == len(asked)


def test_what_a_map_can_be_chosen_by(server: Running) -> None:
    entry = server.client.get("/v1/steering/scored").json()
    assert entry["ranks"] == list(RANKS)
    assert (entry["rank"], entry["weights"], entry["cap"]) == ("rd", None, None)
    assert server.client.get("/v1/steering/digits-words").json()["ranks"] == ["rd", "log-odds"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"rank": "RD"}, "steering.rank: "),
        ({"rank": 5}, "steering.rank: "),
        ({"rank": "effects\u0000"}, "steering.rank: "),
        ({"score": "effect"}, "steering.score: "),
        ({"weights": "rd", "scale": 2.0}, "steering.weights: "),
        ({"weights": "logit"}, "how strong"),
        ({"cap": 0}, "steering.cap: "),
        ({"cap": -1}, "steering.cap: "),
        ({"cap": 1e9}, "steering.cap: "),
        ({"cap": "1"}, "steering.cap: "),
        ({"cap": "Infinity"}, "steering.cap: "),
        ({"cap": True}, "steering.cap: "),
        ({"cap": [1]}, "steering.cap: "),
        ({"cap": 2, "scale": 2.0}, "scale, cap"),
        ({"cap": 2, "mode": "hard"}, "mode capped; "),
        ({"cap": 2, "mode": "soft", "scale": 1.0}, "mode capped; "),
        ({"weights": "logit", "mode": "capped"}, "mode soft; "),
    ],
)
def test_refused(server: Running, asked: dict[str, Any], words: str) -> None:
    for steering in (CHOICE | asked, {"map": "digits-words"} | asked):
        response = server.chat(steering=steering)
        assert response.status_code == 400, response.text
        assert words in response.json()["error"]["message"]
    named = {**CHOICE, **asked, "name": "bad"}
    refused = post(server, **named)
    assert refused.status_code == 400, refused.text
    assert server.client.get("/v1/steering/bad").status_code == 404


@pytest.mark.parametrize("asked", [{"rank": "effect"}, {"scale": 2.0, "weights": "weight"}])
def test_a_map_without_the_data(server: Running, asked: dict[str, Any]) -> None:
    response = server.chat(steering={"map": "digits-words"} | asked)
    assert response.status_code == 400
    assert "steermoe" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "asked", [{"rank": "effect"}, {"cap": 2}, {"mode": "capped"}, {"scale": 1.0, "weights": "logit"}]
)
def test_a_preset_is_of_rd(server: Running, asked: dict[str, Any]) -> None:
    response = server.chat(steering={"map": "scored", "preset": "safe"} | asked)
    assert response.status_code == 400
    assert "preset" in response.json()["error"]["message"]


def test_registered_choices_survive_a_restart(tmp_path: Path) -> None:
    """Every kind of choice, written into the folder and read again; older servers refuse the fields by name."""
    save_scored(tmp_path / "scored.json")
    digests = {}
    with running(maps_folder=tmp_path, maps_writable=True, parallel=1) as first:
        for number, (asked, fields) in enumerate(CHOICES.values()):
            assert post(first, name=f"c{number}", **(CHOICE | asked)).status_code == 201
            digests[f"c{number}"] = bias_of(**fields).key
        own = json.loads(SCORED.to_json())
        body = {"name": "own", "map": own, "activate": 4, "deactivate": 4, "rank": "logit", "cap": "inf"}
        assert post(first, **body).status_code == 201
        digests["own"] = bias_of(rank="logit", cap=math.inf).key
        # a choice of a choice: what is left out is as it is registered
        assert post(first, name="more", map="c2", rank="effect").status_code == 201
        digests["more"] = bias_of(rank="effect", scale=4.0, weights="log-odds").key
        assert post(first, name="alike", map="c2", weights="none").status_code == 201
        digests["alike"] = bias_of(scale=4.0).key
    with running(maps_folder=tmp_path, parallel=1) as second:
        for name, digest in digests.items():
            assert second.chat(steering=name).json()["steering"]["bias_sha256"] == digest, name
        listed = {entry["name"]: entry for entry in second.client.get("/v1/steering").json()["data"]}
    assert (listed["own"]["rank"], listed["own"]["cap"]) == ("logit", "inf")
    usual = json.loads((tmp_path / "alike.choice.json").read_text("utf-8"))
    assert not {"rank", "weights", "cap"} & set(usual)


def test_damaged_choices_of_the_folder_are_left_out(tmp_path: Path) -> None:
    save_scored(tmp_path / "scored.json")
    bad: dict[str, Any] = {"rank": "x", "weights": "logit", "cap": 0, "preset": "safe"}
    for name, value in bad.items():
        more = {"rank": "effect"} if name == "preset" else {}
        numbers = {} if name == "preset" else {"activate": 1}
        choice = {"map": "scored", name: value} | more | numbers
        (tmp_path / f"{name}.choice.json").write_text(json.dumps(choice), "utf-8")
    found = registry.SteeringRegistry(folder=tmp_path)
    warnings = found.open(SCORED.identity)
    assert len(warnings) == len(bad)
    for name in bad:
        assert any(f"{name}.choice.json" in line for line in warnings)
    assert "scored" in [entry.name for entry in found.entries()]


def test_the_size_of_all_tables_counts() -> None:
    plain = ExpertMap.load(Path(__file__).parents[2] / "expert_maps" / "tiny" / "digits-words.json")
    assert registry.n_bytes(Steering("a", SCORED)) > registry.n_bytes(Steering("a", plain)) + 2 * SCORED.rd.nbytes


def test_the_servers_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve --steering MAP --rank ...`: what reaches the registry."""
    import steermoe_local.server.program as program

    def choose(*flags: str) -> Any:
        found: list[Any] = []

        def run(settings: Any, registry: Any, load: Any, *_: Any, **__: Any) -> None:
            with load():
                found.append(registry.resolve(registry.default))

        monkeypatch.setattr(program, "run_server", run)
        done = CliRunner().invoke(main, ["serve", "-m", str(TINY), "-t", "1", "--steering", *flags])
        return done, found

    path = str(folder / "scored.json")
    numbers = ("--activate", "4", "--deactivate", "4")
    for asked, fields in (
        (("--rank", "effect"), {"rank": "effect"}),
        (("--score", "log-odds", "--cap", "2"), {"rank": "log-odds", "cap": 2.0}),
        (("--mode", "capped", "--cap", "inf"), {"cap": math.inf}),
        (("--strength", "2", "--weights", "logit"), {"scale": 2.0, "weights": "logit"}),
    ):
        done, found = choose(path, *numbers, *asked)
        assert done.exit_code == 0, done.output
        assert found[0].bias.key == bias_of(**fields).key
    for asked, words in (
        (("--cap", "2", "--strength", "2"), "--strength, --cap"),
        (("--rank", "x"), "'x'"),
        (("--mode", "soft"), "how strong"),
        (("--preset", "safe", "--rank", "effect"), "--rank rd"),
        (("--cap", "2000"), "cap: "),
        (("--strength", "2000"), "scale: "),
    ):
        done, found = choose(path, *(() if "--preset" in asked else numbers), *asked)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert not found
    done = CliRunner().invoke(main, ["serve", "-m", str(TINY), "--cap", "2"])
    assert (done.exit_code, "--cap: of which map?" in done.stderr) == (2, True)
