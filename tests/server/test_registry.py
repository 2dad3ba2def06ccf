"""The registry of steerings: what can be registered, replaced and deleted, limits, the maps folder, and its cache."""

from __future__ import annotations

import base64
import gc
import json
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ExpertMap, UsageError, model_info, write_bias
from steermoe_local.llama import steered_llama
from steermoe_local.maps.recommended import Recommended, with_recommended
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.server import SteeringRegistry, metrics, registry
from steermoe_local.server.api_errors import ApiError
from steermoe_local.server.registered import n_bytes
from steermoe_local.server.schemas import RegisterRequest, SteeringChoice
from steermoe_local.steering.steering import Steering
from tests.support.running_server import TINY, Running, running
from tests.support.steered_server import DIGITS, WORDS, bias_of, post, text_of

NUMBERS = {name: value for name, value in WORDS.items() if name != "map"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


#
# registering
#


def test_what_is_registered(server: Running, digits: ExpertMap) -> None:
    listed = server.client.get("/v1/steering").json()
    assert [entry["name"] for entry in listed["data"]] == ["digits-words", "document-memory"]
    entry = listed["data"][0]
    assert entry == server.client.get("/v1/steering/digits-words").json()
    assert (entry["kind"], entry["source"], entry["usable_by_name"]) == ("map", "ships", True)
    assert (entry["activate"], entry["deactivate"], entry["map_sha256"]) == (2, 4, digits.sha256)
    assert listed["model"]["router_sha256"] == digits.identity.router_sha256
    assert server.client.get("/v1/steering/nothing").status_code == 404


def test_the_table_for_the_page(server: Running, digits: ExpertMap) -> None:
    table = server.client.get("/v1/steering/digits-words/map").json()
    assert np.allclose(table["rd"], digits.rd, atol=1e-6)
    assert np.array_equal(table["signs"], digits.choose(2, 4))
    changed = {"activate": 3, "deactivate": 1, "reverse": True, "layers": "1-3", "scale": 2.5}
    other = server.client.get("/v1/steering/digits-words/map", params=changed).json()
    assert np.array_equal(other["signs"], digits.choose(3, 1, reverse=True, layers=range(1, 4)))
    assert (other["n_active"], other["n_inactive"], other["mode"]) == (3, 1, "soft")
    nothing = server.client.get("/v1/steering/digits-words/map", params={"activate": 0, "deactivate": 0}).json()
    assert nothing["signs"] is None
    for bad in ({"activate": "x"}, {"activate": -1}, {"layers": "9"}, {"scale": "nan"}):
        assert server.client.get("/v1/steering/digits-words/map", params=bad).status_code == 400
    assert server.client.get("/v1/steering/no/map").status_code == 404


def test_register_a_choice_a_map_and_a_bias(server: Running, digits: ExpertMap, tmp_path: Path) -> None:
    data = json.loads(digits.to_json())
    bias_path = tmp_path / "b.gguf"
    write_bias(bias_of(WORDS), bias_path)
    bias = base64.b64encode(bias_path.read_bytes()).decode()
    made = {
        "words": {"map": "digits-words", "activate": 2, "deactivate": 2, "reverse": True},
        "own-map": {"map": data, "activate": 2, "deactivate": 2, "reverse": True},
        "own-bias": {"bias": bias},
    }
    for name, body in made.items():
        response = post(server, name=name, **body)
        assert response.status_code == 201, response.text
        assert (response.json()["name"], response.json()["source"]) == (name, "request")
        answer = server.chat(steering=name)
        assert text_of(answer) == "four"
        assert answer.json()["steering"]["name"] == name
    digests = {server.chat(steering=name).json()["steering"]["bias_sha256"] for name in made}
    assert len(digests) == 1, "three ways to say the same"
    assert "tiny:own-bias" in [model["id"] for model in server.client.get("/v1/models").json()["data"]]
    assert text_of(server.chat(steering={"map": "words", "reverse": False})) == "4"
    response = server.chat(steering={"map": "own-bias", "activate": 3})
    assert response.status_code == 400
    assert "own-bias: " in response.json()["error"]["message"]
    table = server.client.get("/v1/steering/own-bias/map").json()
    assert table["rd"] is None
    assert np.array_equal(table["signs"], bias_of(WORDS).signs)
    assert post(server, name="words", map="digits-words").status_code == 409
    assert post(server, name="words", map="digits-words", replace=True).status_code == 201
    assert text_of(server.chat(steering="words")) == "4", "the old one is still applied"
    for name in made:
        assert server.client.delete(f"/v1/steering/{name}").status_code == 204
        assert server.client.delete(f"/v1/steering/{name}").status_code == 404
        assert server.chat(steering=name).status_code == 404


def test_a_map_without_numbers(server: Running, digits: ExpertMap) -> None:
    assert post(server, name="bare", map=json.loads(digits.to_json())).status_code == 201
    assert not server.client.get("/v1/steering/bare").json()["usable_by_name"]
    assert "tiny:bare" not in server.client.get("/v1/models").text
    response = server.chat(steering="bare")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_numbers"
    assert server.chat(steering={"map": "bare", "activate": 1}).status_code == 200
    assert server.client.delete("/v1/steering/bare").status_code == 204


def test_a_map_is_registered_with_what_it_recommends(digits: ExpertMap, tmp_path: Path) -> None:
    """Its own file, and a learnt steering by the name of its folder; those of other models are left aside."""
    choice = {"activate": 3, "layers": "1-3", "cap": 2.0}
    told = with_recommended(digits, Recommended(choice, unsteered=0.3, steered=0.8, n_items=50))
    (tmp_path / "formal").mkdir()
    told.save(tmp_path / "formal" / "map.json")
    told.save(tmp_path / "own.json")
    (tmp_path / "own.choice.json").write_text(json.dumps({"deactivate": 1}))
    (tmp_path / "other").mkdir()
    foreign = replace(digits.identity, router_sha256="0" * 63 + "1")
    replace(told, identity=foreign).save(tmp_path / "other" / "map.json")
    found = SteeringRegistry(folder=tmp_path)
    assert found.open(digits.identity) == []
    entry = found.entry("formal").to_dict()
    assert {name: entry[name] for name in choice} == choice
    assert (entry["usable_by_name"], entry["recommended"]) == (
        True,
        told.recommended.to_dict() if told.recommended else 0,
    )
    own = found.entry("own").to_dict()
    assert (own["activate"], own["deactivate"], own["cap"]) == (0, 1, None), "numbers are instead of recommended ones"
    assert "other" not in {entry.name for entry in found.entries()}
    with pytest.raises(ApiError, match="did you mean formal"):
        found.entry("fromal")


def damaged(digits: ExpertMap, tmp_path: Path) -> dict[str, tuple[dict[str, Any], int, str | None, str]]:
    data = json.loads(digits.to_json())
    foreign = replace(digits.identity, router_sha256="0" * 63 + "1")
    lonely = {key: data[key] for key in ("format", "version", "model", "behaviour")} | {"rd": [[-0.5] * 24] * 5}
    path = tmp_path / "foreign.gguf"
    write_bias(BiasFile.from_signs(digits.choose(2, 2), foreign), path)
    foreign_bias = base64.b64encode(path.read_bytes()).decode()
    return {
        "no source": ({}, 400, "invalid_value", "map and bias"),
        "two sources": ({"map": "digits-words", "bias": ""}, 400, "invalid_value", "map and bias"),
        "no map": ({"map": {"format": "x"}}, 400, "invalid_file", "x.json: "),
        "no json of a map": ({"map": data | {"rd": [[1]]}}, 400, "invalid_file", "rd: not a table"),
        "too large numbers": ({"map": data | {"rd": [[2] * 24] * 5}}, 400, "invalid_file", "rd: values"),
        "unknown field": ({"map": data | {"evil": 1}}, 400, "invalid_file", "evil: "),
        "foreign map": ({"map": data | {"model": foreign.to_dict()}}, 400, "model_mismatch", "router 00000000"),
        "foreign bias": ({"bias": foreign_bias}, 400, "model_mismatch", "router 00000000"),
        "no base64": ({"bias": "%%%"}, 400, "invalid_file", "bias: "),
        "no bias": ({"bias": base64.b64encode(b"GGUF" + bytes(40)).decode()}, 400, "invalid_file", "x.gguf: "),
        "numbers for a bias": ({"bias": foreign_bias, "activate": 1}, 400, "invalid_value", "a bias file"),
        "impossible": ({"map": lonely, "deactivate": 21}, 400, "impossible_choice", "deactivating 21 "),
        "unknown map": ({"map": "nothing"}, 404, "steering_not_found", "steering 'nothing'"),
        "shipped name": (
            {"name": "digits-words", "map": "document-memory", "replace": True},
            409,
            "name_taken",
            "digits-words: ",
        ),
        "none": ({"name": "none", "map": "digits-words"}, 400, None, "name: 'none'"),
        "path": ({"name": "../x", "map": "digits-words"}, 400, "invalid_value", "name: "),
        "dots": ({"name": "..", "map": "digits-words"}, 400, "invalid_value", "name: "),
        "capitals": ({"name": "X", "map": "digits-words"}, 400, "invalid_value", "name: "),
        "long": ({"name": "x" * 65, "map": "digits-words"}, 400, "invalid_value", "name: "),
        "unknown": ({"map": "digits-words", "path": "/etc"}, 400, "unknown_field", "path: "),
    }


def test_what_cannot_be_registered(server: Running, digits: ExpertMap, tmp_path: Path) -> None:
    before = server.client.get("/v1/steering").json()
    for case, (body, status, code, words) in damaged(digits, tmp_path).items():
        response = post(server, **({"name": "x"} | body))
        assert response.status_code == status, (case, response.text)
        error = response.json()["error"]
        assert error["code"] == code, case
        assert words in error["message"], case
        assert "/tmp" not in error["message"], "the message contains a path of this machine"
    assert server.client.get("/v1/steering").json() == before


def test_how_many_can_be_registered() -> None:
    with running(parallel=1) as server:
        statuses = [post(server, name=f"n{i}", map="digits-words", activate=1).status_code for i in range(260)]
        assert statuses.count(201) == 256 - 2
        assert statuses[-1] == 409
        # what steers equally is built once, whatever its names are
        assert len(server.registry._built) == 1
        for i in range(20):
            assert server.chat(steering=f"n{i}", max_tokens=1).status_code == 200
            assert server.client.delete(f"/v1/steering/n{i}").status_code == 204
        server.chat(steering="n100", max_tokens=1)
        assert len(server.registry._built) == 1


def test_how_much_can_be_registered(digits: ExpertMap, monkeypatch: pytest.MonkeyPatch) -> None:
    size = n_bytes(Steering("x", digits))
    monkeypatch.setattr(registry, "_MAX_BYTES", 2 * size)
    data = json.loads(digits.to_json())
    with running(parallel=1) as server:
        assert [post(server, name=name, map=data).status_code for name in "ab"] == [201, 201]
        response = post(server, name="c", map=data)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "full")
        assert post(server, name="b", map=data, replace=True).status_code == 201, "it takes the place of its own"
        assert server.client.delete("/v1/steering/a").status_code == 204
        assert post(server, name="c", map=data).status_code == 201


def test_the_metrics_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names come and go; what is counted by them must not pile up."""
    monkeypatch.setattr(metrics, "_MAX_STEERINGS", 3)
    with running(parallel=1) as server:
        for number in range(6):
            assert post(server, name=f"n{number}", map="digits-words").status_code == 201
            assert server.chat(steering=f"n{number}", max_tokens=1).status_code == 200
            assert server.client.delete(f"/v1/steering/n{number}").status_code == 204
        text = server.client.get("/metrics").text
    found = re.findall(r'steermoe_requests_total\{.*steering="([^"]*)".*\} (\S+)', text)
    assert found == [("n0", "1.0"), ("n1", "1.0"), ("n2", "1.0"), ("other", "3.0")]


def test_the_cache_of_biases_is_bounded() -> None:
    with running(parallel=1) as server:
        for n in range(140):
            scale = {"mode": "soft", "scale": n / 10 + 0.1}
            assert server.chat(steering=DIGITS | scale, max_tokens=1).status_code == 200
        assert len(server.registry._built) <= 128


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads in which native biases are built."""
    found: list[str] = []
    real = steered_llama._build

    def build(bias: BiasFile) -> Any:
        found.append(threading.current_thread().name)
        return real(bias)

    monkeypatch.setattr(steered_llama, "_build", build)
    return found


def test_the_engine_and_the_event_loop_build_no_bias(threads: list[str], tmp_path: Path) -> None:
    """Neither when a steering is registered nor when a choice is asked for the first time."""
    write_bias(BiasFile.from_signs(bias_of(WORDS).signs, bias_of(WORDS).identity, 0.02), tmp_path / "b.gguf")
    data = base64.b64encode((tmp_path / "b.gguf").read_bytes()).decode()
    with running(parallel=2) as server:
        del threads[:]
        assert post(server, name="file", bias=data).status_code == 201
        assert post(server, name="numbers", map="digits-words", activate=3, reverse=True).status_code == 201
        assert len(threads) == 2, "registering builds"
        for n in (1, 2, 3, 1, 2, 3):
            assert server.chat(steering=DIGITS | {"activate": n, "deactivate": 5}, max_tokens=2).status_code == 200
            assert server.chat(steering="file", max_tokens=2).status_code == 200
            assert server.chat(steering="numbers", max_tokens=2).status_code == 200
        assert len(threads) == 2 + 3, "each once"
        engine = server.worker._thread.name
    assert engine not in threads
    assert all(name.startswith("asyncio_") for name in threads), "in threads of their own, not on the event loop"


def test_names_that_change_hands(digits: ExpertMap, tmp_path: Path) -> None:
    """Register, replace, delete and use at random: a name is never answered by what it stood for before."""
    rng = random.Random(5)
    data = json.loads(digits.to_json())
    path = tmp_path / "b.gguf"
    found = SteeringRegistry()
    found.open(digits.identity)
    stands_for: dict[str, str] = {}

    def body() -> tuple[dict[str, Any], str]:
        """A way to register something, and the key of its bias."""
        choice = {"activate": rng.randrange(1, 5), "deactivate": rng.randrange(1, 5), "reverse": rng.random() < 0.5}
        key = bias_of({"map": "digits-words"} | choice).key
        kind = rng.randrange(4)
        if kind == 0:
            write_bias(replace(bias_of({"map": "digits-words"} | choice), provenance={"n": str(rng.random())}), path)
            return {"bias": base64.b64encode(path.read_bytes()).decode()}, key
        if kind == 1 and (free := [name for name in stands_for if found.entry(name).is_map]):
            return {"map": rng.choice(free)} | choice, key
        return {"map": "digits-words" if kind == 2 else data} | choice, key

    for _ in range(600):
        name = rng.choice("abcd")
        if name in stands_for and rng.random() < 0.4:
            found.remove(name)
            del stands_for[name]
        else:
            wanted, key = body()
            found.register(RegisterRequest.model_validate({"name": name, "replace": True} | wanted))
            stands_for[name] = key
        gc.collect(0)  # ids of what is gone are given to something else
        for known, key in stands_for.items():
            bias = found.resolve(known).bias
            assert bias is not None
            assert bias.key == key
            assert found.ready(known) is not None


def test_a_name_that_changes_hands_while_it_is_looked_up(digits: ExpertMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is steered by what the name stood for at one moment, never by half of both."""
    data = json.loads(digits.to_json())
    found = SteeringRegistry()
    found.open(digits.identity)
    found.register(RegisterRequest.model_validate({"name": "a", "map": data} | NUMBERS))
    found._built.clear()
    content, replaced = Steering.content.fget, []
    assert content is not None

    def replacing(steering: Steering) -> Any:
        if not replaced:
            replaced.append(True)
            found.register(RegisterRequest.model_validate({"name": "a", "map": data, "replace": True}))  # no numbers
        return content(steering)

    monkeypatch.setattr(Steering, "content", property(replacing))
    applied = found.resolve("a")
    assert replaced
    assert applied.bias is not None, "it runs unsteered"
    assert applied.bias.key == bias_of(WORDS).key
    with pytest.raises(ApiError) as caught:
        found.resolve("a")
    assert caught.value.code == "no_numbers"


def test_a_name_that_is_deleted_while_it_is_registered(digits: ExpertMap, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SteeringRegistry()
    found.open(digits.identity)
    keep = found._keep

    def deleting(steering: Steering, bias: BiasFile | None) -> BiasFile | None:
        found.remove("a")
        return keep(steering, bias)

    monkeypatch.setattr(found, "_keep", deleting)
    request = RegisterRequest.model_validate({"name": "a", "map": "digits-words"} | NUMBERS)
    assert found.register(request).name == "a"
    assert "a" not in [entry.name for entry in found.entries()]


@pytest.mark.parametrize("then", ["replaced", "deleted"])
def test_a_running_answer_keeps_its_steering(server: Running, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends under the bias that it began under, and says so, whatever becomes of the name meanwhile."""
    body = {"prompt": "one, two,", "max_tokens": 60, "logit_bias": [[0, False]]}
    expected = server.client.post("/v1/completions", json=body | {"steering": WORDS}).json()["choices"][0]["text"]
    assert post(server, name="name", map="digits-words", **NUMBERS).status_code == 201
    engine = server.worker.engine
    assert engine is not None
    step, begun, changed = engine.step, threading.Event(), threading.Event()

    def held() -> Any:
        if begun.is_set() and not changed.wait(0.001):
            return []
        begun.set()  # the prompt and the first token are computed, and no more until the name has changed
        return step()

    monkeypatch.setattr(engine, "step", held)
    asked = body | {"steering": "name", "stream": True}
    with server.client.stream("POST", "/v1/completions", json=asked) as response:
        lines = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
        chunks = [next(lines)]
        if then == "replaced":
            assert post(server, name="name", map="document-memory", activate=20, replace=True).status_code == 201
        else:
            assert server.client.delete("/v1/steering/name").status_code == 204
        changed.set()
        chunks += lines
    told = [chunk["steering"]["bias_sha256"] for chunk in chunks if "steering" in chunk]
    assert told == [bias_of(WORDS).key] * 2, "in the first chunk and in the last"
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == expected
    after = server.complete("one, two,", max_tokens=1, steering="name")
    if then == "deleted":
        assert after.status_code == 404
    else:
        assert after.json()["steering"]["bias_sha256"] not in (None, bias_of(WORDS).key)
        assert server.client.delete("/v1/steering/name").status_code == 204


#
# the maps folder
#


@pytest.fixture
def folder(tmp_path: Path, digits: ExpertMap) -> Path:
    maps = tmp_path / "maps"
    maps.mkdir()
    digits.save(maps / "My Digits.json")
    write_bias(bias_of(WORDS), maps / "words.gguf")
    (maps / "words2.choice.json").write_text(json.dumps(WORDS))
    (maps / "my-digits.choice.json").write_text('{"activate": 2, "deactivate": 2}')
    (maps / "notes.txt").write_text("no map")
    (maps / ".hidden.json").write_text("{}")
    (maps / "broken.json").write_text("{")
    (maps / "bad.choice.json").write_text('{"map": "words", "strength": 3}')
    (maps / "lost.choice.json").write_text('{"map": "not-there"}')
    other = replace(digits.identity, router_sha256="1" * 64)
    replace(digits, identity=other).save(maps / "other.json")
    return maps


def test_the_folder(folder: Path) -> None:
    with running(maps_folder=folder, parallel=1) as server:
        names = {entry["name"]: entry for entry in server.client.get("/v1/steering").json()["data"]}
        assert set(names) == {"digits-words", "document-memory", "my-digits", "words", "words2"}
        assert names["my-digits"]["source"] == "folder"
        assert (names["my-digits"]["activate"], names["words"]["kind"]) == (2, "bias")
        assert text_of(server.chat(steering="my-digits")) == "4"
        assert text_of(server.chat(steering="words")) == text_of(server.chat(steering="words2")) == "four"
        assert server.client.delete("/v1/steering/words").status_code == 403
        assert post(server, name="words", map="digits-words", replace=True).status_code == 409
        assert post(server, name="new", map="digits-words").status_code == 201
        assert not list(folder.glob("new*")), "a folder that is not writable was written to"
        for path in ("other", "broken", "notes", "My Digits", ".hidden"):
            assert server.chat(steering=path).status_code in (400, 404)


def test_warnings_of_the_folder(folder: Path) -> None:

    warnings = SteeringRegistry(folder=folder).open(model_info(TINY).require_moe())
    text = "\n".join(warnings)
    assert len(warnings) == 4
    assert "other.json: made for olmoe" in text
    assert "broken.json: not an expert map" in text
    assert "bad.choice.json: strength: Extra inputs" in text
    assert "lost.choice.json: steering 'not-there' is not registered" in text


def test_a_writable_folder(folder: Path, digits: ExpertMap, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("mine")
    (folder / "link.json").symlink_to(outside)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    path = tmp_path / "b.gguf"
    write_bias(bias_of(WORDS), path)
    bias = base64.b64encode(path.read_bytes()).decode()
    with running(maps_folder=folder, maps_writable=True, parallel=1) as server:
        made = {
            "a": {"map": "digits-words", "reverse": True},
            "b": {"map": json.loads(digits.to_json()), "activate": 2, "deactivate": 2},
            "c": {"bias": bias},
        }
        for name, body in made.items():
            assert post(server, name=name, **body).status_code == 201
        texts = {name: text_of(server.chat(steering=name)) for name in made}
        assert texts == {"a": "four", "b": "4", "c": "four"}
        for name in ("link", "broken2", "other"):
            body = {"name": name, "map": json.loads(digits.to_json())}
            response = post(server, **body)
            assert response.status_code == (201 if name == "broken2" else 409), response.text
        body = {"name": "my-digits", "map": "words2", "replace": True}
        assert post(server, **body).status_code == 409, "it stands in My Digits.json"
        assert server.client.delete("/v1/steering/my-digits").status_code == 403
        for name in ("nul", "com1", "x.choice"):
            assert post(server, name=name, map="digits-words").status_code == 400
        assert server.client.delete("/v1/steering/broken2").status_code == 204
    written = {path.name for path in folder.iterdir()} - set(before)
    assert written == {"a.choice.json", "b.json", "b.choice.json", "c.gguf"}
    assert outside.read_text() == "mine"
    assert {name: (folder / name).read_bytes() for name in before} == before
    with running(maps_folder=folder, maps_writable=True, parallel=1) as server:
        assert {name: text_of(server.chat(steering=name)) for name in made} == texts
        assert post(server, name="b", map="digits-words", reverse=True, replace=True).status_code == 201
        assert text_of(server.chat(steering="b")) == "four"
        assert server.client.delete("/v1/steering/a").status_code == 204
    assert {path.name for path in folder.iterdir()} - set(before) == {"b.choice.json", "c.gguf"}


def test_a_restart_steers_by_nothing_else(digits: ExpertMap, tmp_path: Path) -> None:
    """Registered, replaced, deleted at random: what the folder then holds is what the names stood for, or refused."""
    rng = random.Random(7)
    maps = [json.loads(digits.to_json()), json.loads(ExpertMap.load(shipped_maps()["document-memory"]).to_json())]
    n_kept = n_refused = 0
    for round_ in range(12):
        (folder := tmp_path / str(round_)).mkdir()
        found = SteeringRegistry(folder=folder, writable=True)
        found.open(digits.identity)
        for _ in range(12):
            name = rng.choice("abcd")
            known = [entry.name for entry in found.entries() if entry.source == "request"]
            if name in known and rng.random() < 0.3:
                found.remove(name)
                continue
            choice: dict[str, Any] = {"activate": rng.randrange(3), "deactivate": rng.randrange(1, 4)}
            choice |= {"reverse": rng.random() < 0.5} if rng.random() < 0.7 else {}
            choice |= {"mode": "soft", "scale": rng.randrange(1, 4)} if rng.random() < 0.3 else {}
            source = rng.choice([*maps, *known, "digits-words"])
            body = {"name": name, "replace": True, "map": source} | choice
            found.register(RegisterRequest.model_validate(body))
        found.close()  # what ends with its process: it alone writes into the folder
        again = SteeringRegistry(folder=folder, writable=True)
        warnings = again.open(digits.identity)
        names = {entry.name for entry in again.entries()}
        for entry in found.entries():
            if entry.name in names:
                assert again.resolve(entry.name).info == found.resolve(entry.name).info, (round_, entry.name)
                n_kept += entry.source == "request"
            else:
                assert f"{entry.name}.choice.json" in "".join(warnings)
                n_refused += 1
    assert n_kept > n_refused > 0


def _reopened(folder: Path, digits: ExpertMap) -> SteeringRegistry:
    again = SteeringRegistry(folder=folder, writable=True)
    assert again.open(digits.identity) == []
    return again


def test_no_experts_are_none_after_a_restart(digits: ExpertMap, tmp_path: Path) -> None:
    """0 and 0 of a map that recommends a choice are no recommended choice, not at the next start either."""
    told = json.loads(with_recommended(digits, Recommended({"activate": 3})).to_json())
    found = _reopened(tmp_path, digits)
    none = {"activate": 0, "deactivate": 0}
    for name, of, numbers in (("own", told, none), ("of-it", "own", none), ("x", told, {}), ("of-x", "x", none)):
        found.register(RegisterRequest.model_validate({"name": name, "map": of} | numbers))
    expected = {entry.name: entry.to_dict()["activate"] for entry in found.entries() if entry.source == "request"}
    assert expected == {"own": 0, "of-it": 0, "x": 3, "of-x": 0}
    found.close()
    again = _reopened(tmp_path, digits)
    assert {name: again.entry(name).to_dict()["activate"] for name in expected} == expected
    with pytest.raises(ApiError, match="send"):
        again.resolve("own")


def test_fitted_values_are_kept(digits: ExpertMap, tmp_path: Path) -> None:
    values = ((0, 1, 2.0), (2, 3, -1.0), (4, 0, 0.5))
    told = json.loads(with_recommended(digits, Recommended({"reverse": True}, values=values)).to_json())
    found = _reopened(tmp_path, digits)
    bodies: list[dict[str, Any]] = [
        {"name": "own", "map": told},
        {"name": "doubled", "map": told, "scale": 2},
        {"name": "of-it", "map": "own", "scale": 3, "reverse": False},
        {"name": "numbers", "map": "own", "activate": 2},
        {"name": "plan", "rules": ["answer: own", "thinking: own scale=2 reverse=false", "prompt: own +1"]},
    ]
    for body in bodies:
        found.register(RegisterRequest.model_validate(body))
    entry = found.entry("own").to_dict()
    assert (entry["fitted"], entry["mode"], entry["scale"], entry["side"], entry["usable_by_name"]) == (
        (3, "soft", 1.0, "words", True)
    )
    assert entry["recommended"]["values"] == [list(row) for row in values]
    assert found.entry("numbers").to_dict()["fitted"] is None
    info = {name: found.resolve(name).info for name in ("own", "doubled", "of-it", "numbers", "plan")}
    assert info["own"] is not None
    assert info["own"]["fitted"] == 3
    assert (info["own"]["n_active"], info["own"]["n_inactive"]) == (1, 2)
    found.close()
    again = _reopened(tmp_path, digits)
    assert {name: again.resolve(name).info for name in info} == info
    with pytest.raises(UsageError, match="give numbers of experts"):
        again.chosen(SteeringChoice(map="own", rank="log-odds"))
    assert again.chosen(SteeringChoice(map="own", activate=1)).mode == "hard"


def test_a_default_that_is_a_file(tmp_path: Path, digits: ExpertMap) -> None:

    registry = SteeringRegistry()
    registry.open(model_info(TINY).require_moe())
    digits.save(tmp_path / "Some Map.json")
    name, warnings = registry.add_file(tmp_path / "Some Map.json", activate=3)
    assert (name, warnings) == ("some-map", [])
    assert registry.resolve(name).info["n_active"] == Steering("x", digits, activate=3).build().n_active  # type: ignore[index, union-attr]
