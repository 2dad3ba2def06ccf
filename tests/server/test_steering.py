"""Steering by request: what is named is applied, nothing is shared between steerings, names are checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ExpertMap, SteeredLlama
from steermoe_local.models.shipped_maps import shipped_maps
from tests.support.running_server import TINY, Running, running
from tests.support.steered_server import DIGITS, DOCUMENT, WORDS, bias_of, post, text_of

QUESTIONS = (
    "Which number comes after three?",
    "Please count starting at eleven until fifteen.",
    "Add 4 and 6.",
    "Which number comes before eleven?",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


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
        assert response.json()["error"]["param"] == "steering"
        assert "'tiny:digits-words'" in response.json()["error"]["message"]


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
    ("steering", "status", "code", "words"),
    [
        ("faithful", 404, "steering_not_found", "digits-words, document-memory, none"),
        ({"map": "faithful"}, 404, "steering_not_found", "steering 'faithful'"),
        ({"map": "../tiny/digits-words"}, 400, "invalid_value", "steering.map: "),
        ({"map": "/etc/passwd"}, 400, "invalid_value", "steering.map: "),
        ("../digits-words", 400, "invalid_value", "steering: "),
        ("", 400, "invalid_value", "steering: "),
        ("x" * 65, 400, "invalid_value", "steering: "),
        ({}, 400, "missing_field", "steering.map: "),
        ({"map": "digits-words", "strength": 2}, 400, "unknown_field", "steering.strength: "),
        ({"map": "digits-words", "activate": -1}, 400, "invalid_value", "steering.activate: "),
        ({"map": "digits-words", "activate": 1e99}, 400, "invalid_value", "steering.activate: "),
        ({"map": "digits-words", "activate": 0, "deactivate": 0}, 400, "no_numbers", "steering 'digits-words'"),
        ({"map": "digits-words", "layers": "7"}, 400, "impossible_choice", "layer 7"),
        ({"map": "digits-words", "layers": "x"}, 400, "invalid_value", "layers: 'x'"),
        ({"map": "digits-words", "mode": "soft"}, 400, "invalid_value", "mode soft: "),
        ({"map": "digits-words", "scale": 2, "mode": "hard"}, 400, "invalid_value", "mode soft; "),
        ({"map": "digits-words", "scale": 1e9}, 400, "invalid_value", "steering.scale: "),
        ({"map": "digits-words", "mode": "medium"}, 400, "invalid_value", "steering.mode: "),
        (5, 400, "invalid_value", "steering: "),
    ],
)
def test_steerings_that_are_refused(server: Running, steering: Any, status: int, code: str, words: str) -> None:
    response = server.chat(steering=steering)
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code
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
