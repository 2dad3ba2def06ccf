"""Plans in requests: answers are those of the plan, alone or in a batch, and tell what was steered by which rule."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from steermoe_local import SteeredLlama
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.steering.plan import SteeringPlan
from steermoe_local.steering.steering import Steering
from tests.support.chat_templates import source
from tests.support.low_level import F32
from tests.support.running_server import Running, running
from tests.support.saying import saying
from tests.support.steered_server import messages, post, text_of

COUNT = "Please count starting at eleven until fifteen."
QUESTIONS = ("Which number comes after three?", COUNT, "Add 4 and 6.", "Tell me about the sea.")
PLANS: dict[str, list[Any]] = {
    "answer": ["answer: digits-words +8 -8"],
    "prompt": ["prompt: digits-words +8 -8"],
    "first": ["prompt[-4:]: digits-words +8 -8", "answer[0:3]: digits-words +8 -8"],
    "two voices": ["answer every 2: digits-words +2 -8", "all: document-memory +4 -4"],
    "after": ['answer after ",": digits-words +8 -8 scale=4 mode=soft', "prompt: none"],
    "routing": ["answer when digits-words > -0.3 over prompt: digits-words +8 -8", "answer: document-memory +2 -4"],
    "last": ["answer when document-memory < 0 over last 2: digits-words +8 -8 reverse"],
    "entropy": ["answer when entropy > 0.3: digits-words +8 -8"],
    "margin": ["answer when margin < 2: digits-words +8 -8", "answer: none", "all: digits-words"],
}


@pytest.fixture(scope="module")
def server(tiny_f32_path: Path) -> Iterator[Running]:
    with running(model=tiny_f32_path, type_kv=F32, parallel=8) as found:
        yield found


@pytest.fixture(scope="module")
def engine(tiny_f32_path: Path) -> Iterator[Engine]:
    llama = SteeredLlama(tiny_f32_path, n_ctx=64, n_batch=64, n_threads=1)
    with Engine(llama, n_ctx=512, n_threads=1, type_k=F32, type_v=F32) as found:
        yield found
    llama.close()


def plan_of(rules: list[Any]) -> SteeringPlan:
    def steering(name: str, choice: Any) -> Steering:
        return Steering.open(map_file=shipped_maps()[name], activate=2, deactivate=2).with_choice(choice)[0]

    def expert_map(name: str) -> tuple[ExpertMap, Path | None]:
        return ExpertMap.load(shipped_maps()[name]), None

    return SteeringPlan.open(rules, steering, expert_map)


def alone(engine: Engine, question: str, rules: list[Any], n: int) -> tuple[str, list[int | None]]:
    """What the engine says by itself, and the rule of each token."""
    renderer = engine.renderer
    prompt = renderer.rendered(renderer.chat_text(messages(question)))
    engine.forget()
    request = Request(
        prompt.tokens, plan_of(rules).build(), Sampling(temperature=0), n, style=prompt.style, special=False
    )
    text, told = "", []
    for _, event in engine.generate(request):
        if isinstance(event, TokenEvent):
            text += event.text
            told += [event.rule] if event.token >= 0 else []
    return text, told


def ask(server: Running, question: str, rules: Any, **fields: Any) -> dict[str, Any]:
    response = server.chat(question, steering=rules, return_steered=True, return_tokens=True, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_what_the_engine_says(server: Running, engine: Engine, name: str) -> None:
    rules = PLANS[name]
    for question in QUESTIONS:
        body = ask(server, question, rules)
        choice = body["choices"][0]
        text, told = alone(engine, question, rules, 24)
        assert choice["message"]["content"] == text
        assert choice["token_rules"] == told
        assert len(choice["tokens"]) == len(told)
        assert body["steering"]["n_steered"] == sum(rule is not None for rule in told)


def test_the_plans_do_something(server: Running) -> None:
    """Otherwise all answers would be equal whatever steers them."""
    texts = {name: tuple(text_of(server.chat(q, steering=rules)) for q in QUESTIONS) for name, rules in PLANS.items()}
    assert len(set(texts.values())) > 3, texts


def test_the_forms_of_a_plan(server: Running) -> None:
    text = "answer[0:2]: digits-words +8 -8"
    rule = {"phase": "answer", "tokens": [0, 2], "map": "digits-words", "activate": 8, "deactivate": 8}
    full = rule | {"every": 1, "after": None, "when": None, "reverse": False, "mode": "hard"}
    assert post(server, name="mine", rules=[rule]).status_code == 201
    forms = [text, [text], [rule], [full], {"rules": [text]}, {"rules": [rule]}, "mine"]
    told = [server.chat(COUNT, steering=form).json() for form in forms]
    told += [server.chat(COUNT, model="tiny:mine").json()]
    for body in told:
        assert body["choices"][0]["message"] == told[0]["choices"][0]["message"]
        assert body["steering"]["rules"] == [text]
        assert body["steering"]["kind"] == "plan"
        for field in ("plan_sha256", "bias_sha256", "n_steered"):
            assert body["steering"][field] == told[0]["steering"][field]
    assert [body["steering"]["name"] for body in told] == ["plan"] * 6 + ["mine"] * 2
    assert server.client.delete("/v1/steering/mine").status_code == 204
    everywhere, named = (server.chat(COUNT, steering=form).json() for form in (["digits-words"], "digits-words"))
    assert everywhere["choices"][0]["message"] == named["choices"][0]["message"]
    assert everywhere["steering"]["bias_sha256"] == named["steering"]["bias_sha256"]
    nothing = server.chat(COUNT, steering=["answer: none", "thinking: none"]).json()
    assert nothing["choices"][0]["message"] == server.chat(COUNT).json()["choices"][0]["message"]
    assert (nothing["steering"]["n_active"], nothing["steering"]["n_steered"]) == (0, 0)


def test_plans_mixed_in_one_batch(server: Running) -> None:
    """Each gives the answer that it gives alone, token by token by the same rules; some are streamed."""
    steerings: list[Any] = [None, "digits-words", {"map": "document-memory", "activate": 3}, *PLANS.values()]
    asked = [(question, steering) for steering in steerings for question in QUESTIONS]
    assert server.worker.engine is not None

    def single(question: str, steering: Any) -> tuple[Any, ...]:
        choice = ask(server, question, steering)["choices"][0]
        return choice["message"]["content"], choice["tokens"], choice["token_rules"], choice["steered"]

    def streamed(question: str, steering: Any) -> tuple[Any, ...]:
        body = {"messages": messages(question), "steering": steering, "max_tokens": 24}
        events = server.events("/v1/chat/completions", body | {"return_steered": True, "return_tokens": True})
        choices = [event["choices"][0] for event in events]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        return text, *(choices[-1][name] for name in ("tokens", "token_rules", "steered"))

    lone = [single(*one) for one in asked]
    with ThreadPoolExecutor(12) as pool:
        for _ in range(2):
            for how in (single, streamed):
                assert list(pool.map(lambda one, how=how: how(*one), asked)) == lone


def test_seeds_and_several_answers(server: Running) -> None:
    """The same request gives the same answers, and each of n is marked by itself."""
    fields = {"n": 3, "temperature": 1.2, "seed": 5}
    first, again = (ask(server, COUNT, PLANS["entropy"], **fields) for _ in range(2))
    assert first["choices"] == again["choices"]
    assert len({choice["message"]["content"] for choice in first["choices"]}) > 1
    for choice in first["choices"]:
        assert choice["steered"] == spans(choice["message"]["content"], choice["tokens"], choice["token_rules"], server)


def spans(text: str, tokens: list[int], rules: list[int | None], server: Running) -> list[dict[str, int]]:
    """The marks of a text by its tokens' texts."""
    found: list[dict[str, int]] = []
    at = 0
    for token, rule in zip(tokens, rules, strict=True):
        piece = server.client.post("/detokenize", json={"tokens": [token]}).json()
        n = len(piece.get("content", piece.get("prompt")))
        if rule is not None and found and (found[-1]["rule"], found[-1]["end"]) == (rule, at):
            found[-1]["end"] += n
        elif rule is not None:
            found.append({"rule": rule, "start": at, "end": at + n})
        at += n
    assert at == len(text)
    return found


#
# marks
#


@pytest.mark.parametrize("name", PLANS)
def test_chunks_of_a_stream_never_mix_rules(server: Running, name: str) -> None:
    whole = ask(server, COUNT, PLANS[name])["choices"][0]
    body = {"messages": messages(COUNT), "steering": PLANS[name], "max_tokens": 24, "return_steered": True}
    events = server.events("/v1/chat/completions", body)
    found: list[dict[str, int]] = []
    at = 0
    for event in events:
        (choice,) = event["choices"]
        assert "rule" in choice
        piece = choice["delta"].get("content", "")
        if choice["rule"] is not None and piece:
            if found and (found[-1]["rule"], found[-1]["end"]) == (choice["rule"], at):
                found[-1]["end"] += len(piece)
            else:
                found.append({"rule": choice["rule"], "start": at, "end": at + len(piece)})
        at += len(piece)
    assert found == whole["steered"] == events[-1]["choices"][0]["steered"]
    assert at == len(whole["message"]["content"])
    assert "rule" not in server.events("/v1/chat/completions", body | {"return_steered": False})[0]["choices"][0]
    assert "steered" not in server.chat(steering=PLANS[name]).json()["choices"][0]


def test_under_a_bias_for_all_tokens_everything_is_marked(server: Running) -> None:
    choice = ask(server, COUNT, "digits-words")["choices"][0]
    n = len(choice["message"]["content"])
    assert choice["steered"] == [{"rule": 0, "start": 0, "end": n}]
    assert ask(server, COUNT, None)["choices"][0]["steered"] == []
    assert ask(server, COUNT, ["answer: none", "all: digits-words"])["choices"][0]["steered"] == []


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"logprobs": 1}, {"echo": True, "logprobs": 1}])
def test_completions_are_marked_behind_their_prompt(server: Running, fields: dict[str, Any]) -> None:
    body: dict[str, Any] = {"steering": PLANS["two voices"], "return_steered": True, "max_tokens": 8}
    body |= {"temperature": 0, "logit_bias": {"0": -100}}  # the end never comes
    whole = server.complete("one, two, three,", **body, **fields).json()["choices"][0]
    n_echoed = len("one, two, three,") if "echo" in fields else 0
    assert whole["steered"][0]["start"] == n_echoed
    assert whole["steered"][-1]["end"] == len(whole["text"])
    assert len(whole["steered"]) > 2
    events = server.events("/v1/completions", {"prompt": "one, two, three,"} | body | fields)
    at, marks = 0, []
    for event in events:
        (choice,) = event["choices"]
        if choice["rule"] is not None:
            marks.append({"rule": choice["rule"], "start": at, "end": at + len(choice["text"])})
        at += len(choice["text"])
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
    assert marks == whole["steered"] == events[-1]["choices"][0]["steered"]
    if "logprobs" in fields:
        tokens = [token for event in events for token in (event["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
        assert tokens == whole["logprobs"]["tokens"]


def test_responses_are_marked(server: Running) -> None:
    body = {"input": COUNT, "steering": PLANS["two voices"], "return_steered": True, "max_output_tokens": 24}
    whole = server.client.post("/v1/responses", json=body | {"temperature": 0}).json()
    chat = ask(server, COUNT, PLANS["two voices"])["choices"][0]
    assert whole["output"][0]["content"][0]["text"] == chat["message"]["content"]
    assert whole["steered"] == chat["steered"]
    assert whole["steering"]["rules"] == [*PLANS["two voices"]]


def test_the_two_voices_of_a_thinking_model(tmp_path: Path) -> None:
    said = "It is Rome.\n</think>\n\nRome, of course."
    rules = ["thinking[0:3]: digits-words", "answer: document-memory", "all: none"]
    with saying(said, source("StepFun3.5-Flash"), tmp_path) as server:
        body = ask(server, "?", rules, max_tokens=200)
        choice = body["choices"][0]
        message = choice["message"]
        assert (message["reasoning_content"], message["content"]) == ("It is Rome.", "Rome, of course.")
        assert choice["steered"] == [{"rule": 1, "start": 0, "end": len("Rome, of course.")}]
        (span,) = choice["steered_reasoning"]
        assert (span["rule"], span["start"]) == (0, 0)
        assert 0 < span["end"] < len("It is Rome.")
        # the markers are of the thinking, and have no text of their own
        assert choice["token_rules"].count(0) == 3
        first_of_answer = choice["token_rules"].index(1)
        assert choice["token_rules"] == [0] * 3 + [None] * (first_of_answer - 3) + [1] * (
            len(choice["tokens"]) - first_of_answer
        )
        assert body["steering"]["n_steered"] == 3 + choice["token_rules"].count(1)
        # phases are the model's own, whatever a client wants to be separated
        raw = ask(server, "?", rules, max_tokens=200, reasoning_format="none")["choices"][0]
        assert raw["token_rules"] == choice["token_rules"]
        assert raw["message"]["content"] == said
        start = said.index("\n\n")  # behind the marker
        assert raw["steered"][0] == span
        assert raw["steered"][-1] == {"rule": 1, "start": start, "end": len(said)}


#
# memory and metrics
#


def test_the_prompt_is_shared_where_it_is_unsteered() -> None:
    """Switching what steers the answers recomputes nothing of the prompt."""
    with running(parallel=1) as server:

        def cached(steering: Any) -> int:
            body = server.chat(COUNT, steering=steering).json()
            n_cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert body["steering"] is None or body["steering"]["n_cached"] == n_cached
            return int(body["usage"]["prompt_tokens"] - n_cached)

        n_prompt = server.chat(COUNT).json()["usage"]["prompt_tokens"]
        for rule in ("answer: digits-words", "answer[0:2]: document-memory", "answer when entropy < 1: digits-words"):
            assert cached(rule) == 1
        assert cached(None) == 1
        assert cached("digits-words") == n_prompt
        assert cached(["answer: digits-words"]) == n_prompt
        assert cached(["prompt[2:]: digits-words"]) == n_prompt - 2


def test_the_labels_of_metrics() -> None:
    with running(parallel=1) as server:
        post(server, name="mine", rules=PLANS["answer"])
        server.chat(steering="mine")
        server.chat(steering=PLANS["answer"])
        server.chat(steering='answer: digits-words +1 after "secret text"')
        server.chat(steering=["answer after 'secret text': digits-words"])
        text = server.client.get("/metrics").text
        for label, n in (("mine", 1), ("unnamed:plan", 2)):
            assert (
                f'steermoe_requests_total{{endpoint="chat/completions",status="ok",steering="{label}"}} {n}.0' in text
            )
        assert "secret" not in text
        assert server.client.get("/v1/steering/unnamed:plan").status_code in (400, 404)
        assert post(server, name="unnamed:plan", rules=PLANS["answer"]).status_code == 400


def test_a_finish_without_a_plan_is_unsteered(engine: Engine) -> None:
    request = Request(engine.renderer.tokenize("one", add_special=True, parse_special=True), max_tokens=2)
    events = [event for _, event in engine.generate(request)]
    assert isinstance(events[-1], FinishEvent)
    assert events[-1].n_steered == 0
