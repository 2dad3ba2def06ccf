"""Presets in requests, in the registry, in the maps folder and at the start: the paper's numbers by their name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from steermoe_local import BiasFile, ExpertMap, model_info
from steermoe_local.server import SteeringRegistry
from steermoe_local.server.schemas import Preset
from steermoe_local.steering.presets import PRESETS
from tests.support.paper_models import paper_model, ranking
from tests.support.running_server import Running, running

NUMBERS = {"faithful": (0, 50), "safe": (5, 0)}


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the layers, experts and top-k of OLMoE, and the embedded model's vocabulary."""
    return paper_model(tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def faithful(olmoe: Path) -> ExpertMap:
    return ranking(olmoe, "faithfulness")


@pytest.fixture(scope="module")
def maps(olmoe: Path, faithful: ExpertMap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    faithful.save(folder / "authors.json")
    ranking(olmoe, "safety").save(folder / "safety.json")
    ranking(olmoe, "something").save(folder / "unnamed.json")
    (folder / "chosen.choice.json").write_text(json.dumps({"map": "authors", "preset": "faithful"}))
    return folder


@pytest.fixture(scope="module")
def server(olmoe: Path, maps: Path) -> Iterator[Running]:
    with running(model=olmoe, n_ctx=64, parallel=1, maps_folder=maps, maps_writable=True) as found:
        yield found


def wanted(expert_map: ExpertMap, preset: str) -> str:
    """The key of the bias that a preset means."""
    return BiasFile.from_signs(expert_map.choose(*NUMBERS[preset]), expert_map.identity).key


def ask(server: Running, steering: Any) -> Any:
    return server.complete([1, 2, 3], max_tokens=1, steering=steering)


def test_every_preset_can_be_named() -> None:
    assert get_args(Preset) == PRESETS


def test_a_request_names_a_preset(server: Running, faithful: ExpertMap) -> None:
    applied = ask(server, {"map": "authors", "preset": "faithful"}).json()["steering"]
    assert (applied["activate"], applied["deactivate"], applied["preset"]) == (0, 50, "faithful")
    assert applied["bias_sha256"] == wanted(faithful, "faithful")
    soft = ask(server, {"map": "authors", "preset": "faithful", "mode": "soft", "scale": 2.0, "layers": "0-7"}).json()
    assert (soft["steering"]["mode"], soft["steering"]["layers"], soft["steering"]["n_inactive"]) == ("soft", "0-7", 50)
    by_name = ask(server, "chosen").json()["steering"]
    assert by_name["bias_sha256"] == applied["bias_sha256"]
    assert by_name["preset"] == "faithful"
    other = ask(server, {"map": "chosen", "activate": 3}).json()["steering"]
    assert (other["activate"], other["deactivate"], other.get("preset")) == (3, 50, None), "other numbers are no preset"


def test_what_goes_with_no_preset(server: Running) -> None:
    for field, value in (("activate", 1), ("deactivate", 0), ("reverse", True)):
        response = ask(server, {"map": "authors", "preset": "faithful", field: value})
        assert response.status_code == 400
        assert field in response.json()["error"]["message"]
        params = {"preset": "faithful", field: value}
        assert server.client.get("/v1/steering/authors/map", params=params).status_code == 400
    assert ask(server, {"map": "authors", "preset": "unsafe"}).status_code == 400
    assert ask(server, {"map": "chosen", "reverse": True}).status_code == 400, "a preset has one side"
    with running(n_ctx=64, parallel=1) as tiny:
        response = tiny.complete(steering={"map": "digits-words", "preset": "safe"})
        assert response.status_code == 400
        assert "has no numbers" in response.json()["error"]["message"]


def test_the_registry_tells_the_presets_that_fit(server: Running) -> None:
    entries = {entry["name"]: entry for entry in server.client.get("/v1/steering").json()["data"]}
    assert entries["authors"]["presets"] == {"faithful": {"activate": 0, "deactivate": 50}}
    assert entries["safety"]["presets"] == {"safe": {"activate": 5, "deactivate": 0}}
    assert set(entries["unnamed"]["presets"]) == {"faithful", "safe"}, "words that are nobody's say nothing"
    assert not entries["authors"]["usable_by_name"]
    assert entries["chosen"]["preset"] == "faithful"


def test_registering_a_preset(server: Running, faithful: ExpertMap, maps: Path) -> None:
    def post(**body: Any) -> Any:
        return server.client.post("/v1/steering", json=body)

    made = {"by-name": {"map": "authors"}, "by-map": {"map": json.loads(faithful.to_json())}}
    for name, body in made.items():
        response = post(name=name, preset="faithful", **body)
        assert response.status_code == 201, response.text
        assert response.json()["preset"] == "faithful"
        assert ask(server, name).json()["steering"]["bias_sha256"] == wanted(faithful, "faithful")
        kept = json.loads((maps / f"{name}.choice.json").read_text())
        assert kept["preset"] == "faithful"
        assert "activate" not in kept
    again = SteeringRegistry(folder=maps)
    again.open(faithful.identity)
    assert again.entry("by-name").steering.preset == again.entry("by-map").steering.preset == "faithful"
    for name in made:
        assert server.client.delete(f"/v1/steering/{name}").status_code == 204
    assert post(name="x", map="authors", preset="faithful", activate=1).status_code == 400
    assert post(name="x", bias="", preset="faithful").status_code == 400


def test_the_table_of_a_preset(server: Running, faithful: ExpertMap) -> None:
    table = server.client.get("/v1/steering/authors/map", params={"preset": "faithful"}).json()
    assert np.array_equal(table["signs"], faithful.choose(0, 50))
    assert (table["n_active"], table["n_inactive"], table["preset"]) == (0, 50, "faithful")


def test_the_default_of_a_server(olmoe: Path, faithful: ExpertMap, maps: Path) -> None:
    """What `steermoe serve --steering authors --preset faithful` does."""
    registry = SteeringRegistry(folder=maps)
    registry.open(model_info(olmoe).require_moe())
    registry.choose("authors", {"preset": "faithful"})
    applied = registry.resolve("authors")
    assert applied.bias is not None
    assert applied.bias.key == wanted(faithful, "faithful")
