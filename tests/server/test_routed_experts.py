"""return_routed_experts: the experts of every token, in SGLang's form, and what all traces may take."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from steermoe_local import ExpertMap
from steermoe_local.generation.engine import FinishEvent, Request
from steermoe_local.server import routed_experts
from steermoe_local.server.api_errors import ApiError
from steermoe_local.server.routed_experts import MAX_BYTES, MAX_BYTES_AT_ONCE, ExpertTraces, sglext
from tests.support.low_level import F32
from tests.support.running_server import Running, asking, running, unending, until
from tests.support.steered_server import messages

COUNT = "Please count starting at eleven until fifteen."
TRACED = {"return_routed_experts": True, "max_tokens": 24, "temperature": 0}
N_LAYER, N_USED = 5, 4  # of the embedded model

Experts = npt.NDArray[np.int32]


@pytest.fixture(scope="module")
def server(tiny_f32_path: Path) -> Iterator[Running]:
    with running(model=tiny_f32_path, type_kv=F32) as found:
        yield found
        assert found.registry.default is None


def experts_of(told: dict[str, Any]) -> Experts:
    """The array of an answer or a choice, as SGLang's clients read it."""
    data = base64.b64decode(told["sglext"]["routed_experts"], validate=True)
    return np.frombuffer(data, dtype="<i4").reshape(-1, N_LAYER, N_USED)


def chat(server: Running, **fields: Any) -> dict[str, Any]:
    response = server.chat(COUNT, **TRACED | fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def counted(experts: Experts) -> npt.NDArray[np.int64]:
    return np.stack([np.bincount(experts[:, layer].ravel(), minlength=24) for layer in range(N_LAYER)])


@pytest.mark.parametrize(
    "steering", [None, "digits-words", "answer: digits-words", ["answer every 2: document-memory"]]
)
@pytest.mark.parametrize("max_tokens", [1, 5, 24])
def test_the_tokens_of_an_answer_are_those_that_were_counted(server: Running, steering: Any, max_tokens: int) -> None:
    body = chat(server, steering=steering, routing=True, return_tokens=True, max_tokens=max_tokens)
    experts, n_prompt = experts_of(body), body["usage"]["prompt_tokens"]
    # SGLang: the whole sequence but its last token; a token that ends the generation is one of them
    choice = body["choices"][0]
    n_sequence = n_prompt + len(choice["tokens"]) + (choice["finish_reason"] == "stop")
    assert len(experts) == n_sequence - 1
    assert np.array_equal(counted(experts[n_prompt - 1 :]), body["routing"])
    assert all(len(set(row)) == N_USED for token in experts for row in token.tolist())
    assert (experts.min(), experts.max()) >= (0, 0)
    assert experts.max() < 24


def test_steered_tokens_alone_have_other_experts(server: Running, digits: ExpertMap) -> None:
    plain = experts_of(chat(server))
    body = chat(server, steering="answer[0:3]: digits-words +8 -8")
    n_prompt, steered = body["usage"]["prompt_tokens"], experts_of(body)
    first = n_prompt - 1  # the row that draws the answer's first token
    assert np.array_equal(steered[:first], plain[:first]), "the prompt was not steered"
    signs = digits.choose(8, 8)
    for layer in range(N_LAYER):
        suppressed = np.flatnonzero(signs[layer] < 0)
        assert not np.isin(steered[first : first + 3, layer], suppressed).any()
    assert np.isin(plain[:, 1], np.flatnonzero(signs[1] < 0)).any(), "nothing to suppress"


def test_nothing_of_a_cached_prompt_is_missing(server: Running) -> None:
    first = experts_of(chat(server))
    server.chat(COUNT)
    body = chat(server)
    assert np.array_equal(experts_of(body), first)
    assert "sglext" not in server.chat(COUNT).json()
    assert "sglext" not in chat(server, return_routed_experts=False)


def test_the_first_token_that_is_wanted(server: Running) -> None:
    whole, n_prompt = experts_of(chat(server)), chat(server)["usage"]["prompt_tokens"]
    for start in (0, 3, n_prompt):
        assert np.array_equal(experts_of(chat(server, routed_experts_start_len=start)), whole[start:])
    for bad in (n_prompt + 1, -1, 2**31, "1", 1.5):
        response = server.chat(COUNT, **TRACED, routed_experts_start_len=bad)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "routed_experts_start_len"


def test_streams_end_with_it(server: Running) -> None:
    whole = experts_of(chat(server))
    body = {"messages": messages(COUNT), "stream_options": {"include_usage": True}} | TRACED
    events = server.events("/v1/chat/completions", body)
    (found,) = (event for event in events if "sglext" in event)
    assert found["choices"] == []
    assert found is events[-2]
    assert "completion_tokens" in events[-1]["usage"]
    assert np.array_equal(experts_of(found), whole)
    # several answers: that of the first, as SGLang has it, and each with its choice
    events = server.events("/v1/chat/completions", body | {"n": 2})
    ends = [choice for event in events for choice in event["choices"] if "seed" in choice]
    (found,) = (event for event in events if "sglext" in event)
    assert {choice["index"] for choice in ends} == {0, 1}
    for told in (found, *ends):
        assert np.array_equal(experts_of(told), whole)


def test_several_answers_and_prompts(server: Running) -> None:
    body = chat(server, n=3, temperature=1.5, seed=3, routing=True, return_tokens=True)
    assert body["sglext"] == body["choices"][0]["sglext"]
    n_prompt = body["usage"]["prompt_tokens"]
    for choice in body["choices"]:
        assert np.array_equal(counted(experts_of(choice)[n_prompt - 1 :]), choice["routing"])
    prompts = ["one, two, three,", "ten, nine, eight, seven,"]
    both = server.complete(prompts, **TRACED).json()
    for prompt, choice in zip(prompts, both["choices"], strict=True):
        assert np.array_equal(experts_of(choice), experts_of(server.complete(prompt, **TRACED).json()))


def test_responses_have_it_and_do_not_keep_it(server: Running) -> None:
    body = {"input": COUNT, "return_routed_experts": True, "max_output_tokens": 24, "temperature": 0}
    told = server.client.post("/v1/responses", json=body).json()
    assert np.array_equal(experts_of(told), experts_of(chat(server)))
    kept = server.client.get(f"/v1/responses/{told['id']}").json()
    assert "sglext" not in kept
    assert kept | {"sglext": told["sglext"]} == told


#
# what it may take
#


def requests(n: int, n_prompt: int, max_tokens: int | None) -> list[Request]:
    return [Request([0] * n_prompt, max_tokens=max_tokens) for _ in range(n)]


def engine(n_layer: int, n_ctx: int = 32768, n_used: int = 8) -> Any:
    return SimpleNamespace(n_ctx=n_ctx, identity=SimpleNamespace(n_layer=n_layer, n_expert_used=n_used))


@pytest.mark.parametrize(
    ("n", "n_prompt", "max_tokens", "n_bytes"),
    [
        (1, 100, 28, 4 * 128 * 24 * 8),
        (3, 100, 28, 3 * 4 * 128 * 24 * 8),
        (1, 32767, 5000, 4 * 32768 * 24 * 8),  # no more than the context holds
        (1, 10, None, 4 * 32768 * 24 * 8),
        (1, 10, 0, 4 * 10 * 24 * 8),
    ],
)
def test_what_is_reserved(n: int, n_prompt: int, max_tokens: int | None, n_bytes: int) -> None:
    traces = ExpertTraces()
    give_back = traces.reserve(requests(n, n_prompt, max_tokens), engine(24))
    assert traces.n_bytes == n_bytes
    give_back()
    give_back()
    assert traces.n_bytes == 0


def test_what_is_refused() -> None:
    traces = ExpertTraces()
    with pytest.raises(ApiError, match="ask for fewer tokens") as caught:
        traces.reserve(requests(2, 10, None), engine(48))
    assert (caught.value.status, caught.value.param) == (400, "return_routed_experts")
    assert "96 MiB" in str(caught.value)
    assert "32 are the most" in str(caught.value)
    with pytest.raises(ApiError, match="no experts"):
        traces.reserve(requests(1, 10, None), SimpleNamespace(n_ctx=10, identity=None))  # type: ignore[arg-type]
    assert traces.n_bytes == 0
    n_tokens = MAX_BYTES // (4 * 48 * 8)
    backs = [traces.reserve(requests(1, n_tokens - 1, 0), engine(48)) for _ in range(MAX_BYTES_AT_ONCE // MAX_BYTES)]
    with pytest.raises(ApiError) as caught:
        traces.reserve(requests(1, 1000, 0), engine(48))
    assert (caught.value.status, caught.value.code) == (429, "too_many_traces")
    assert "Retry-After" in caught.value.headers
    backs[0]()
    traces.reserve(requests(1, 1000, 0), engine(48))


def test_what_is_reserved_is_given_back(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of an answer, whole or streamed, after an error, and when a client is gone; and refused till then."""
    one = 4 * 512 * N_LAYER * N_USED  # of an answer without a limit
    monkeypatch.setattr(routed_experts, "MAX_BYTES_AT_ONCE", one + one // 2)
    endless = {"messages": messages(COUNT), "return_routed_experts": True, "max_tokens": -1, "logit_bias": {"0": -100}}

    def free() -> bool:
        response = server.chat(COUNT, **TRACED | {"max_tokens": -1})
        assert response.status_code in (200, 429), response.text
        return response.status_code == 200

    for fields in ({}, {"stream": True}):
        with unending(server, others=True), asking(server, "/v1/chat/completions", endless | fields):
            until(lambda: server.worker.n_running)
            response = server.chat(COUNT, **TRACED | {"max_tokens": -1})
            assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_traces")
            assert server.chat(COUNT).status_code == 200
            assert chat(server, max_tokens=4), "half of it is free"
        until(free)
    for _ in range(3):
        assert free()
        server.events("/v1/chat/completions", {"messages": messages(COUNT), "max_tokens": -1} | TRACED)
        assert server.chat(COUNT, **TRACED | {"max_tokens": -1, "logit_bias": {"999999": 1}}).status_code == 400
        assert server.chat("a " * 600, **TRACED).status_code == 400
    monkeypatch.setattr(routed_experts, "MAX_BYTES", one - 1)
    assert server.chat(COUNT, **TRACED | {"max_tokens": -1}).json()["error"]["code"] == "too_large"
    assert chat(server)


def test_the_form() -> None:
    """Little-endian whatever the machine, without copying what was not asked for; -1: the layer has no router."""
    experts = np.array([[[-1, -1], [1, 2]], [[-1, -1], [258, 0]], [[-1, -1], [4, 5]]], dtype=">i4")
    finish = FinishEvent("stop", 2, 0, 1, 0.0, 0.0, 0, None, experts=experts.astype(np.int32))
    (told,) = sglext(finish, 1).values()
    assert base64.b64decode(told["routed_experts"])[:16] == b"\xff" * 8 + b"\x02\x01\0\0" + bytes(4)
    assert len(base64.b64decode(told["routed_experts"])) == 4 * 2 * 2 * 2
    assert sglext(FinishEvent("cancelled", 2, 0, 1, 0.0, 0.0, 0, None), None) == {}
