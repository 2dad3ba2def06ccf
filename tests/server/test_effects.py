"""Maps with effects of interventions on the server: registered, kept in the folder, told to the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from steermoe_local import ExpertMap
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.server import routes_steering
from steermoe_local.server.registered import n_bytes
from steermoe_local.steering.steering import Steering
from tests.support.random_effects import random_effects
from tests.support.running_server import Running, running
from tests.support.steered_server import post


@pytest.fixture(scope="module")
def tried() -> ExpertMap:
    made = ExpertMap.load(shipped_maps()["digits-words"])
    return replace(made, effects=random_effects(made.rd.shape), logit=made.rd * 2, weight=made.rd / 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("maps")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(parallel=1, maps_folder=folder, maps_writable=True) as found:
        yield found


def test_the_table_tells_effects(server: Running, tried: ExpertMap) -> None:
    response = post(server, name="tried", map=json.loads(tried.to_json()), activate=2, deactivate=2)
    assert response.status_code == 201, response.text
    assert response.json()["map_sha256"] == tried.sha256
    table = server.client.get("/v1/steering/tried/map").json()
    effects = tried.effects
    assert effects is not None
    assert table["effects"]["attribution"] == effects.facts.to_dict()
    rows = table["effects"]["rows"]
    assert [row.pop("significant") for row in rows] == effects.significant.tolist()
    for row, wanted in zip(rows, effects.rows(), strict=True):
        assert set(row) == set(wanted)
        for name, value in wanted.items():
            assert row[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
    assert server.client.get("/v1/steering/digits-words/map").json()["effects"] is None
    for params in ({"activate": 1}, {"reverse": True}):
        assert server.client.get("/v1/steering/tried/map", params=params).json()["effects"] == table["effects"] | {
            "rows": [row | {"significant": s} for row, s in zip(rows, effects.significant.tolist(), strict=True)]
        }


def test_the_table_is_made_beside_the_event_loop(
    server: Running, tried: ExpertMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map with 24,000 effects would hold up all streams for half a second."""
    make, made = routes_steering._json, []

    def followed(data: object) -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        made.append(data)
        return make(data)

    monkeypatch.setattr(routes_steering, "_json", followed)
    table = server.client.get("/v1/steering/digits-words/map").json()
    assert made[0] == table


def test_the_folder_keeps_them(server: Running, folder: Path, tried: ExpertMap) -> None:
    assert post(server, name="kept", map=json.loads(tried.to_json()), activate=1).status_code == 201
    assert (folder / "kept.json").read_text("utf-8") == tried.to_json()
    assert ExpertMap.load(folder / "kept.json").sha256 == tried.sha256


def test_damaged_effects_are_refused(server: Running, folder: Path, tried: ExpertMap) -> None:
    before = sorted(path.name for path in folder.iterdir())
    for change in ({"version": 1}, {"effects": []}, {"effects": [{}]}, {"attribution": None}, {"weight": None}):
        response = post(server, name="bad", map=json.loads(tried.to_json()) | change, activate=1)
        assert response.status_code == 400, change
        assert "bad.json: " in response.json()["error"]["message"]
    data = json.loads(tried.to_json())
    data["effects"][0]["layer"] = 99
    assert post(server, name="bad", map=data, activate=1).status_code == 400
    assert server.client.get("/v1/steering/bad").status_code == 404
    assert sorted(path.name for path in folder.iterdir()) == before


def test_effects_count_towards_the_limit_of_memory(tried: ExpertMap) -> None:
    assert tried.effects is not None
    bare = replace(tried, effects=None, logit=None, weight=None)
    added = n_bytes(Steering("x", tried)) - n_bytes(Steering("x", bare))
    n = len(tried.effects.layer)
    assert added == 2 * tried.rd.nbytes + n * (8 + 8 + 1 + 7 * 8 + 1)
