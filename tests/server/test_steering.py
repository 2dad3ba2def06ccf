"""Steering by request: what is named is applied, nothing is shared between steerings, names are checked."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ExpertMap, SteeredLlama, write_bias
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.server import metrics, registered, registry
from steermoe_local.steering.steering import Steering
from tests.support.running_server import TINY, Running, running

QUESTIONS = (
    "Which number comes after three?",
    "Please count starting at eleven until fifteen.",
    "Add 4 and 6.",
    "Which number comes before eleven?",
)
DIGITS = {"map": "digits-words", "activate": 2, "deactivate": 2}
WORDS = DIGITS | {"reverse": True}
DOCUMENT = {"map": "document-memory", "activate": 4, "deactivate": 4}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def digits() -> ExpertMap:
    return ExpertMap.load(shipped_maps()["digits-words"])


@pytest.fixture(scope="module")
def alone(digits: ExpertMap) -> Iterator[Any]:
    """What SteeredLlama says under a bias, by itself."""
    llama = SteeredLlama(TINY, n_ctx=512, n_threads=1)

    def answer(question: str, bias: BiasFile | None) -> str:
        llama.set_bias(bias)
        body = llama.create_chat_completion([{"role": "user", "content": question}], temperature=0, max_tokens=24)
        return str(body["choices"][0]["message"]["content"])

    yield answer
    llama.close()


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def bias_of(choice: dict[str, Any]) -> BiasFile:
    """The bias that a choice means, built without the server."""
    expert_map = ExpertMap.load(shipped_maps()[choice["map"]])
    layers = None
    if "layers" in choice:
        first, last = choice["layers"].split("-")
        layers = range(int(first), int(last) + 1)
    signs = expert_map.choose(
        choice["activate"], choice["deactivate"], reverse=choice.get("reverse", False), layers=layers
    )
    if choice.get("mode") == "soft":
        return BiasFile.from_soft(signs, expert_map.identity, choice["scale"])
    return BiasFile.from_signs(signs, expert_map.identity)


CHOICES: dict[str, dict[str, Any]] = {
    "digits": DIGITS,
    "words": WORDS,
    "document": DOCUMENT,
    "soft": DIGITS | {"mode": "soft", "scale": 3.5},
    "layers": WORDS | {"layers": "1-3"},
    "many": WORDS | {"activate": 6, "deactivate": 9},
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_what_steered_llama_says(server: Running, alone: Any, name: str) -> None:
    choice, bias = CHOICES[name], bias_of(CHOICES[name])
    for question in QUESTIONS:
        response = server.chat(question, steering=choice)
        assert text_of(response) == alone(question, bias)
        applied = response.json()["steering"]
        assert (applied["n_active"], applied["n_inactive"]) == (bias.n_active, bias.n_inactive)
        assert (applied["name"], applied["mode"]) == (choice["map"], choice.get("mode", "hard"))
        assert applied["map_sha256"] == ExpertMap.load(shipped_maps()[choice["map"]]).sha256
        assert len(applied["bias_sha256"]) == 64
    stated = {"activate", "deactivate", "reverse", "layers", "scale"} & set(choice)
    assert {key: applied[key] for key in stated} == {key: choice[key] for key in stated}


def test_completions_are_steered_too(server: Running) -> None:
    prompt = "<|user|>Which number comes after three?<|end|><|assistant|>"
    texts = [server.complete(prompt, steering=choice).json()["choices"][0]["text"] for choice in (DIGITS, WORDS)]
    assert texts == ["4", "four"]


def test_the_ways_to_name_a_steering(server: Running) -> None:
    by_name = server.chat(steering="digits-words").json()
    by_model = server.chat(model="tiny:digits-words").json()
    by_choice = server.chat(steering={"map": "digits-words"}).json()
    for body in (by_model, by_choice):
        assert body["steering"] | {"n_cached": 0} == by_name["steering"] | {"n_cached": 0}
    assert by_model["model"] == "tiny:digits-words"
    assert by_name["steering"]["side"] == "digits"
    for fields in ({"steering": None}, {"steering": "none"}, {"model": "tiny:none"}, {}):
        assert server.chat(**fields).json()["steering"] is None
    assert server.chat(model="tiny:digits-words", steering="digits-words").status_code == 200
    for other in ("document-memory", None, DIGITS):
        response = server.chat(model="tiny:digits-words", steering=other)
        assert response.status_code == 400
        assert "both choose" in response.json()["error"]["message"]


def test_the_servers_default() -> None:
    with running(steering="digits-words", parallel=1) as steered:
        assert steered.chat().json()["steering"]["name"] == "digits-words"
        assert steered.chat(steering=None).json()["steering"] is None
        assert steered.chat(model="tiny:none").json()["steering"] is None
        assert steered.chat(steering=DOCUMENT).json()["steering"]["name"] == "document-memory"
        assert steered.client.get("/v1/steering").json()["default"] == "digits-words"
        assert steered.client.get("/v1/models").json()["data"][0]["steering"] == "digits-words"
        assert steered.client.delete("/v1/steering/digits-words").status_code == 409


def test_the_default_stays(digits: ExpertMap, tmp_path: Path) -> None:
    """Who asks cannot change what others get without asking."""
    digits.save(tmp_path / "mine.json")
    (tmp_path / "mine.choice.json").write_text('{"activate": 2, "deactivate": 2}')
    with running(steering="mine", maps_folder=tmp_path, maps_writable=True, parallel=1) as steered:
        for response in (
            steered.client.delete("/v1/steering/mine"),
            post(steered, name="mine", map="digits-words", reverse=True, replace=True),
        ):
            assert response.status_code == 409
            assert response.json()["error"]["code"] == "in_use"
        assert text_of(steered.chat()) == "4"
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "mine.choice.json"}


@pytest.mark.parametrize(
    ("steering", "status", "words"),
    [
        ("faithful", 404, "there are: digits-words, document-memory, none"),
        ({"map": "faithful"}, 404, "steering 'faithful' is not registered"),
        ({"map": "../tiny/digits-words"}, 400, "steering"),
        ({"map": "/etc/passwd"}, 400, "steering"),
        ("../digits-words", 400, "steering"),
        ("", 400, "steering"),
        ("x" * 65, 400, "steering"),
        ({}, 400, "steering.map"),
        ({"map": "digits-words", "strength": 2}, 400, "steering.strength: unknown field"),
        ({"map": "digits-words", "activate": -1}, 400, "activate"),
        ({"map": "digits-words", "activate": 1e99}, 400, "activate"),
        ({"map": "digits-words", "activate": 0, "deactivate": 0}, 400, "has no numbers of experts"),
        ({"map": "digits-words", "layers": "7"}, 400, "there is no layer 7"),
        ({"map": "digits-words", "layers": "x"}, 400, "layers: 'x'"),
        ({"map": "digits-words", "mode": "soft"}, 400, "how strong?"),
        ({"map": "digits-words", "scale": 2, "mode": "hard"}, 400, "scale goes with mode soft"),
        ({"map": "digits-words", "scale": 1e9}, 400, "scale"),
        ({"map": "digits-words", "mode": "medium"}, 400, "mode"),
        (["digits-words"], 400, "steering"),
        (5, 400, "steering"),
    ],
)
def test_steerings_that_are_refused(server: Running, steering: Any, status: int, words: str) -> None:
    response = server.chat(steering=steering)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]


#
# what is in memory
#


def test_a_prefix_is_found_under_its_own_steering_only() -> None:
    with running(parallel=2) as server:
        first = "Please count starting at eleven until fifteen."

        def cached(turns: list[dict[str, str]], steering: Any) -> int:
            body = server.chat(messages=turns, steering=steering).json()
            n_cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert steering is None or body["steering"]["n_cached"] == n_cached
            assert body["timings"]["cache_n"] == n_cached
            return int(n_cached)

        turns = [{"role": "user", "content": first}]
        answer = text_of(server.chat(first, steering=DIGITS))
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Add 4 and 6."}]
        n_first = len(tokens(server, f"<|user|>{first}<|end|><|assistant|>{answer}"))
        assert cached(turns, WORDS) == 0
        assert cached(turns, None) == 0
        assert cached(turns, DOCUMENT) == 0
        with_numbers = DIGITS | {"activate": 3}
        assert cached(turns, with_numbers) == 0
        again = text_of(server.chat(first, steering=DIGITS))  # the other steerings took both slots
        assert again == answer
        assert cached(turns, DIGITS) == n_first, "a follow-up computes what is new, no more"
        # the same numbers under another name do the same, and so share what is in memory
        same = {"name": "same", "map": "digits-words", "activate": 2, "deactivate": 2}
        assert server.client.post("/v1/steering", json=same).status_code == 201
        assert cached(turns, "same") > n_first


def tokens(server: Running, text: str) -> list[int]:
    return list(server.client.post("/tokenize", json={"content": text}).json()["tokens"])


def test_conversations_keep_their_slots(server: Running) -> None:
    """Four chats in turns, four slots: each follow-up finds its own."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    steerings = (DIGITS, WORDS, DOCUMENT, None)
    for turn in range(3):
        for chat, steering in zip(chats, steerings, strict=True):
            body = server.chat(messages=chat, steering=steering).json()
            usage = body["usage"]
            if turn:
                assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 25
            chat += [body["choices"][0]["message"], {"role": "user", "content": "Add 4 and 6."}]


#
# routing
#


def test_routing(server: Running, digits: ExpertMap) -> None:
    body = server.chat(QUESTIONS[1], routing=True).json()
    counts = np.array(body["routing"])
    identity = digits.identity
    assert counts.shape == identity.shape
    n_rows = body["usage"]["completion_tokens"] + 1  # the one that drew the end as well
    assert (counts.sum(axis=1) == n_rows * identity.n_expert_used).all()
    steered = np.array(server.chat(QUESTIONS[1], routing=True, steering=WORDS).json()["routing"])
    signs = digits.choose(2, 2, reverse=True)
    assert (steered[signs < 0] == 0).all(), "a suppressed expert was selected"
    rows = steered.sum(axis=1)[0] // identity.n_expert_used
    assert (steered[signs > 0] == rows).all(), "a promoted expert was left out"
    assert "routing" not in server.chat().json()
    both = server.chat(QUESTIONS[1], routing=True, n=2).json()
    assert both["routing"] == both["choices"][0]["routing"]
    assert both["choices"][1]["routing"] is not None


#
# registering
#


def test_what_is_registered(server: Running, digits: ExpertMap) -> None:
    listed = server.client.get("/v1/steering").json()
    assert [entry["name"] for entry in listed["data"]] == ["digits-words", "document-memory"]
    entry = listed["data"][0]
    assert entry == server.client.get("/v1/steering/digits-words").json()
    assert (entry["kind"], entry["source"], entry["usable_by_name"]) == ("map", "ships", True)
    assert (entry["activate"], entry["deactivate"], entry["map_sha256"]) == (2, 2, digits.sha256)
    assert listed["model"]["router_sha256"] == digits.identity.router_sha256
    assert server.client.get("/v1/steering/nothing").status_code == 404


def test_the_table_for_the_page(server: Running, digits: ExpertMap) -> None:
    table = server.client.get("/v1/steering/digits-words/map").json()
    assert np.allclose(table["rd"], digits.rd, atol=1e-6)
    assert np.array_equal(table["signs"], digits.choose(2, 2))
    changed = {"activate": 3, "deactivate": 1, "reverse": True, "layers": "1-3", "scale": 2.5}
    other = server.client.get("/v1/steering/digits-words/map", params=changed).json()
    assert np.array_equal(other["signs"], digits.choose(3, 1, reverse=True, layers=range(1, 4)))
    assert (other["n_active"], other["n_inactive"], other["mode"]) == (3, 1, "soft")
    nothing = server.client.get("/v1/steering/digits-words/map", params={"activate": 0, "deactivate": 0}).json()
    assert nothing["signs"] is None
    for bad in ({"activate": "x"}, {"activate": -1}, {"layers": "9"}, {"scale": "nan"}):
        assert server.client.get("/v1/steering/digits-words/map", params=bad).status_code == 400
    assert server.client.get("/v1/steering/no/map").status_code == 404


def post(server: Running, **body: Any) -> Any:
    return server.client.post("/v1/steering", json=body)


def test_register_a_choice_a_map_and_a_bias(server: Running, digits: ExpertMap, tmp_path: Path) -> None:
    data = json.loads(digits.to_json())
    bias_path = tmp_path / "b.gguf"
    write_bias(bias_of(WORDS), bias_path)
    bias = base64.b64encode(bias_path.read_bytes()).decode()
    made = {
        "words": {"map": "digits-words", "reverse": True},
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
    assert "own-bias: a bias file" in response.json()["error"]["message"]
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


def damaged(digits: ExpertMap, tmp_path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    data = json.loads(digits.to_json())
    foreign = replace(digits.identity, router_sha256="0" * 63 + "1")
    lonely = {key: data[key] for key in ("format", "version", "model", "behaviour")} | {"rd": [[-0.5] * 24] * 5}
    path = tmp_path / "foreign.gguf"
    write_bias(BiasFile.from_signs(digits.choose(2, 2), foreign), path)
    foreign_bias = base64.b64encode(path.read_bytes()).decode()
    return {
        "no source": ({}, "give one of map and bias"),
        "two sources": ({"map": "digits-words", "bias": ""}, "give one of map and bias"),
        "no map": ({"map": {"format": "x"}}, "x.json: not an expert map"),
        "no json of a map": ({"map": data | {"rd": [[1]]}}, "rd: not a table"),
        "too large numbers": ({"map": data | {"rd": [[2] * 24] * 5}}, "rd: values that are not within -1 to 1"),
        "unknown field": ({"map": data | {"evil": 1}}, "evil: unknown field"),
        "foreign map": ({"map": data | {"model": foreign.to_dict()}}, "made for olmoe"),
        "foreign bias": ({"bias": foreign_bias}, "made for olmoe"),
        "no base64": ({"bias": "%%%"}, "bias: not base64"),
        "no bias": ({"bias": base64.b64encode(b"GGUF" + bytes(40)).decode()}, "x.gguf: "),
        "numbers for a bias": ({"bias": foreign_bias, "activate": 1}, "a bias file's choice of experts is made"),
        "impossible": ({"map": lonely, "deactivate": 21}, "would leave fewer than the 4 experts"),
        "unknown map": ({"map": "nothing"}, "steering 'nothing' is not registered"),
        "shipped name": ({"name": "digits-words", "map": "document-memory", "replace": True}, "taken (source: ships)"),
        "none": ({"name": "none", "map": "digits-words"}, "stands for no steering"),
        "path": ({"name": "../x", "map": "digits-words"}, "name: "),
        "dots": ({"name": "..", "map": "digits-words"}, "name: "),
        "capitals": ({"name": "X", "map": "digits-words"}, "name: "),
        "long": ({"name": "x" * 65, "map": "digits-words"}, "name: "),
        "unknown": ({"map": "digits-words", "path": "/etc"}, "path: unknown field"),
    }


def test_what_cannot_be_registered(server: Running, digits: ExpertMap, tmp_path: Path) -> None:
    before = server.client.get("/v1/steering").json()
    for case, (body, words) in damaged(digits, tmp_path).items():
        response = post(server, **({"name": "x"} | body))
        assert response.status_code in (400, 404, 409), (case, response.text)
        message = response.json()["error"]["message"]
        assert words in message, case
        assert "/tmp" not in message, "a path of this machine is told"
    assert server.client.get("/v1/steering").json() == before


def test_how_many_can_be_registered() -> None:
    with running(parallel=1) as server:
        statuses = [post(server, name=f"n{i}", map="digits-words", activate=1).status_code for i in range(260)]
        assert statuses.count(201) == 256 - 2
        assert statuses[-1] == 409
        # what was built for deleted names is not kept
        for i in range(20):
            assert server.chat(steering=f"n{i}", max_tokens=1).status_code == 200
            assert server.client.delete(f"/v1/steering/n{i}").status_code == 204
        server.chat(steering="n100", max_tokens=1)
        assert len(server.registry._cache.built) <= 2


def test_how_much_can_be_registered(digits: ExpertMap, monkeypatch: pytest.MonkeyPatch) -> None:
    size = registered.size(Steering("x", digits))
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
        assert len(server.registry._cache.built) <= 128


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
    from steermoe_local import model_info
    from steermoe_local.server import SteeringRegistry

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


def test_a_default_that_is_a_file(tmp_path: Path, digits: ExpertMap) -> None:
    from steermoe_local import model_info
    from steermoe_local.server import SteeringRegistry

    registry = SteeringRegistry()
    registry.open(model_info(TINY).require_moe())
    digits.save(tmp_path / "Some Map.json")
    name, warnings = registry.add_file(tmp_path / "Some Map.json", activate=3)
    assert (name, warnings) == ("some-map", [])
    assert registry.resolve(name).info["n_active"] == Steering("x", digits, activate=3).build().n_active  # type: ignore[index, union-attr]
