"""OpenAI's own Python client against the server: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from steermoe_local import BiasFile, ExpertMap, SteeredLlama
from steermoe_local.models.shipped_maps import shipped_maps
from tests.support import rounding
from tests.support.low_level import F32
from tests.support.running_server import Running, running, unending, until

QUESTION = "Which number comes after three?"
LONG = "Please count starting at eleven until fifteen."
WORDS = {"map": "digits-words", "activate": 2, "deactivate": 2, "reverse": True}
ENDLESS: dict[str, Any] = {"logit_bias": {"0": -100}, "max_tokens": 900, "temperature": 0}  # 0 is the end
LOOSE: dict[str, Any] = {"_strict_response_validation": False}
KEY = "a-key-of-32-characters-or-so-1234"


@pytest.fixture(scope="module")
def server(tiny_f32_path: Path) -> Iterator[Running]:
    with running(model=tiny_f32_path, type_kv=F32, n_ctx=1024) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with client_of(server) as found:
        yield found


@pytest.fixture(scope="module")
def legacy(server: Running) -> Iterator[OpenAI]:
    """For completions: their description has no null, which OpenAI sends in chunks and before an echoed prompt."""
    with client_of(server, **LOOSE) as found:
        yield found


@pytest.fixture(scope="module")
def llama(tiny_f32_path: Path) -> Iterator[SteeredLlama]:
    """The judge: llama-cpp-python's own path, and the logits of every token."""
    model = SteeredLlama(tiny_f32_path, n_ctx=512, n_threads=1, logits_all=True, type_k=F32, type_v=F32)
    yield model
    model.close()


def client_of(server: Running, **options: Any) -> OpenAI:
    """A client that refuses answers which are not as OpenAI's description of them says, and asks once."""
    options = {"api_key": "none", "max_retries": 0, "timeout": 30, "_strict_response_validation": True} | options
    return OpenAI(base_url=f"{server.url}/v1", http_client=openai.DefaultHttpxClient(trust_env=False), **options)


def asked(text: str, **fields: Any) -> Any:
    """A question, greedily."""
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 24,
    } | fields


def bias_of(choice: dict[str, Any]) -> BiasFile:
    """The bias that a choice means, built without the server."""
    expert_map = ExpertMap.load(shipped_maps()[choice["map"]])
    signs = expert_map.choose(choice["activate"], choice["deactivate"], reverse=choice.get("reverse", False))
    return BiasFile.from_signs(signs, expert_map.identity)


def alone(llama: SteeredLlama, text: str, bias: BiasFile | None = None, **fields: Any) -> Any:
    """What llama-cpp-python answers, by itself."""
    llama.set_bias(bias)
    messages = [{"role": "user", "content": text}]
    return llama.create_chat_completion(messages, temperature=0, max_tokens=24, **fields)["choices"][0]


#
# chat
#


@pytest.mark.numeric
@pytest.mark.parametrize("choice", [None, WORDS])
@pytest.mark.parametrize("text", [QUESTION, LONG, "Add 4 and 6."])
def test_chat(client: OpenAI, llama: SteeredLlama, text: str, choice: dict[str, Any] | None) -> None:
    expected = alone(llama, text, bias_of(choice) if choice else None)
    answer = client.chat.completions.create(**asked(text), extra_body={"steering": choice})
    assert answer.choices[0].message.content == expected["message"]["content"]
    assert answer.choices[0].finish_reason == expected["finish_reason"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra is not None
    applied = answer.model_extra["steering"]
    assert (applied and (applied["name"], applied["n_active"], applied["n_inactive"])) == (
        choice and ("digits-words", 2, 2)
    )


def test_steering_by_the_models_name(client: OpenAI) -> None:
    by_model = client.chat.completions.create(**asked(QUESTION, model="tiny:digits-words"))
    by_field = client.chat.completions.create(**asked(QUESTION), extra_body={"steering": "digits-words"})
    assert by_model.model == "tiny:digits-words"
    assert by_model.choices[0].message.content == by_field.choices[0].message.content
    for answer in (by_model, by_field):
        assert answer.model_extra is not None
        assert answer.model_extra["steering"]["name"] == "digits-words"


def test_models(client: OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids[0] == "tiny"
    assert {"tiny:digits-words", "tiny:none"} <= set(ids)
    for id_ in ids:
        assert client.models.retrieve(id_).id == id_
    assert client.chat.completions.create(**asked(QUESTION, model="tiny:none")).model_extra["steering"] is None


@pytest.mark.parametrize(
    "steering",
    [
        "answer[0:3]: digits-words +8 -8",
        [
            "thinking: none",
            {"phase": "answer", "tokens": [0, 3], "map": "digits-words", "activate": 8, "deactivate": 8},
        ],
        {"rules": ["answer[0:3]: digits-words +8 -8"]},
    ],
)
def test_plans(client: OpenAI, steering: Any) -> None:
    """The client's own models keep what they do not know: marks, experts and what steered."""
    wanted = {"steering": steering, "return_steered": True, "return_routed_experts": True, "return_tokens": True}
    whole = client.chat.completions.create(**asked(LONG), extra_body=wanted)
    choice = whole.choices[0]
    assert choice.message.content is not None
    assert whole.model_extra is not None
    assert choice.model_extra is not None
    rule = len(whole.model_extra["steering"]["rules"]) - 1
    assert whole.model_extra["steering"]["n_steered"] == 3
    (span,) = choice.model_extra["steered"]
    assert (span["rule"], span["start"]) == (rule, 0)
    assert choice.model_extra["token_rules"] == [rule] * 3 + [None] * (len(choice.model_extra["tokens"]) - 3)
    assert whole.model_extra["sglext"]["routed_experts"]
    chunks = list(client.chat.completions.create(**asked(LONG), stream=True, extra_body=wanted))
    steered = [
        one.delta.content for chunk in chunks for one in chunk.choices if (one.model_extra or {})["rule"] == rule
    ]
    assert "".join(filter(None, steered)) == choice.message.content[: span["end"]]
    assert [chunk.model_extra for chunk in chunks if chunk.model_extra and "sglext" in chunk.model_extra] == [
        {"sglext": whole.model_extra["sglext"]}
    ]
    with client.chat.completions.stream(**asked(LONG), extra_body=wanted) as stream:
        assert stream.get_final_completion().choices[0].message.content == choice.message.content


@pytest.mark.parametrize("steering", [None, WORDS])
def test_streams_of_chats(client: OpenAI, steering: Any) -> None:
    whole = client.chat.completions.create(**asked(LONG), extra_body={"steering": steering})
    options: Any = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"steering": steering}}
    chunks = list(client.chat.completions.create(**asked(LONG), **options))
    assert len(chunks) > 5
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_helper_for_streams(client: OpenAI) -> None:
    """It puts the chunks together again, and is strict about what they hold."""
    whole = client.chat.completions.create(**asked(LONG), logprobs=True, top_logprobs=2)
    with client.chat.completions.stream(**asked(LONG), logprobs=True, top_logprobs=2) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"
    tokens, expected = (answer.choices[0].logprobs for answer in (final, whole))
    assert tokens is not None
    assert expected is not None
    assert tokens.content is not None
    assert expected.content is not None
    assert [token.token for token in tokens.content] == [token.token for token in expected.content]


def test_a_stream_that_is_left(server: Running, legacy: OpenAI) -> None:
    with unending(server):
        stream = legacy.completions.create(model="tiny", prompt="one, two,", stream=True, **ENDLESS)
        for _ in range(3):
            next(stream)
        assert server.worker.n_running == 1
        stream.close()
        until(lambda: server.worker.n_running == 0)


def test_what_may_be_asked_of_an_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(**asked(LONG, temperature=1.0), n=3, seed=7, top_p=0.9)
    again = client.chat.completions.create(**asked(LONG, temperature=1.0), n=3, seed=7, top_p=0.9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [c.message.content for c in answer.choices] == [c.message.content for c in again.choices]
    cut = client.chat.completions.create(**asked(LONG), stop=[", thirteen"])
    assert cut.choices[0].message.content == "eleven, twelve"
    short = client.chat.completions.create(**asked(LONG, max_tokens=openai.omit), max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length"
    known: dict[str, Any] = {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    known |= {"parallel_tool_calls": False, "safety_identifier": "x", "prompt_cache_key": "y"}
    assert client.chat.completions.create(**asked(QUESTION), **known).choices[0].message.content == "4"


def test_parsed_answers(client: OpenAI) -> None:
    class Number(BaseModel):
        number: int

    answer = client.chat.completions.parse(**asked(QUESTION, max_tokens=64), response_format=Number)
    message = answer.choices[0].message
    assert message.parsed is not None
    assert message.content is not None
    assert Number.model_validate_json(message.content) == message.parsed


def test_a_forced_tool(client: OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    tool: Any = {"type": "function", "function": {"name": "paint", "strict": True, "parameters": parameters}}
    choice: Any = {"type": "function", "function": {"name": "paint"}}
    options = asked("Paint it red.", max_tokens=64, tools=[tool], tool_choice=choice)
    call = client.chat.completions.parse(**options).choices[0].message.tool_calls
    assert call is not None
    assert call[0].function.name == "paint"
    assert call[0].function.parsed_arguments in ({"colour": "red"}, {"colour": "blue"})
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed is not None
    assert streamed[0].function.parsed_arguments == call[0].function.parsed_arguments


#
# completions and log probabilities
#


def log_softmax(logits: Any) -> Any:
    wide = np.asarray(logits, dtype=np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("choice", [None, WORDS])
def test_completions(legacy: OpenAI, llama: SteeredLlama, choice: dict[str, Any] | None) -> None:
    prompt = "one, two, three,"
    steering = {"extra_body": {"steering": choice}}
    llama.set_bias(bias_of(choice) if choice else None)
    expected = llama.create_completion(prompt, temperature=0, max_tokens=8)["choices"][0]["text"]
    fields: Any = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 8}
    assert legacy.completions.create(**fields, **steering).choices[0].text == expected
    chunks = legacy.completions.create(**fields, stream=True, **steering)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    tokens = legacy.completions.create(**fields | {"prompt": [llama.tokenize(prompt.encode())] * 2}, **steering)
    assert [choice.text for choice in tokens.choices] == [expected] * 2


@pytest.mark.numeric
@pytest.mark.parametrize("choice", [None, WORDS])
def test_log_probabilities_of_a_prompt(legacy: OpenAI, llama: SteeredLlama, choice: dict[str, Any] | None) -> None:
    """What evaluations ask for: echo, logprobs, no answer."""
    prompt = "one, two, three, four, five"
    llama.set_bias(bias_of(choice) if choice else None)
    llama.reset()
    tokens = llama.tokenize(prompt.encode())
    llama.eval(tokens)
    table = log_softmax(np.array(llama.scores[: len(tokens)]))
    answer = legacy.completions.create(
        model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1, extra_body={"steering": choice}
    )
    assert answer.choices[0].text == prompt
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.tokens is not None
    assert "".join(found.tokens) == prompt
    assert found.token_logprobs[0] is None
    expected = [table[i, token] for i, token in enumerate(tokens[1:])]
    allowance = rounding.logprobs(table, **rounding.TINY)
    np.testing.assert_allclose(np.array(found.token_logprobs[1:], float), expected, rtol=0, atol=allowance)


@pytest.mark.numeric
def test_log_probabilities_of_a_chat(client: OpenAI, llama: SteeredLlama) -> None:
    expected = alone(llama, LONG, logprobs=True, top_logprobs=3)["logprobs"]["content"]
    answer = client.chat.completions.create(**asked(LONG), logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.token for token in logprobs.content[: len(expected)]] == [token["token"] for token in expected]
    allowance = rounding.logprobs(llama.scores[: llama.n_tokens], **rounding.TINY)
    for found, wanted in zip(logprobs.content, expected, strict=False):
        assert found.logprob == pytest.approx(wanted["logprob"], rel=0, abs=allowance)
        assert len(found.top_logprobs) == 3
        assert found.top_logprobs[0].logprob == pytest.approx(found.logprob), "greedy takes the likeliest"


#
# errors
#


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"temperature": 99}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"extra_body": {"stering": None}}, openai.BadRequestError, "unknown_field", "stering"),
        ({"extra_body": {"steering": {"map": "../x"}}}, openai.BadRequestError, "invalid_value", None),
        ({"extra_body": {"steering": "faithful"}}, openai.NotFoundError, "steering_not_found", "steering"),
        ({"model": "gpt-5:x"}, openai.NotFoundError, "model_not_found", "model"),
        ({"model": "tiny:faithful"}, openai.NotFoundError, "steering_not_found", "steering"),
        ({"messages": [{"role": "user", "content": "one " * 2000}]}, openai.BadRequestError, None, None),
        ({"max_tokens": "many"}, openai.BadRequestError, "invalid_value", "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(client: OpenAI, fields: Any, kind: Any, code: str | None, param: str | None, stream: bool) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked(QUESTION, **fields), stream=stream)
    error = caught.value
    assert type(error) is kind
    assert error.type == ("not_found_error" if kind is openai.NotFoundError else "invalid_request_error")
    assert error.code == (code or "context_length_exceeded")
    if param is not None:
        assert error.param == param
    assert "\n" not in error.message


def test_what_is_not_offered(client: OpenAI) -> None:
    for ask in (
        lambda: client.embeddings.create(model="tiny", input="a"),
        lambda: client.images.generate(model="tiny", prompt="a"),
        lambda: client.moderations.create(input="a"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert (caught.value.code, caught.value.param) == (None, None), "an address, not a name, is unknown"


def test_keys() -> None:
    with running(api_key=KEY, parallel=1, body_limit=4096) as guarded:
        with client_of(guarded, api_key=KEY) as right:
            assert right.chat.completions.create(**asked(QUESTION)).choices[0].message.content == "4"
            with pytest.raises(openai.APIStatusError) as caught:
                right.chat.completions.create(**asked("x" * 5000))
            assert caught.value.status_code == 413
        with client_of(guarded) as wrong, pytest.raises(openai.AuthenticationError) as refused:
            wrong.models.list()
        assert refused.value.code == "invalid_api_key"


def test_busy_and_late() -> None:
    with running(n_ctx=1024, parallel=1, queue_limit=0) as small, client_of(small, **LOOSE) as client:
        with unending(small):
            stream = client.completions.create(model="tiny", prompt="one,", stream=True, **ENDLESS)
            next(stream)
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**asked(QUESTION))
            assert caught.value.code == "queue_full"
            with ThreadPoolExecutor(1) as pool:  # it comes again when Retry-After says so
                again = pool.submit(client.with_options(max_retries=3).chat.completions.create, **asked(QUESTION))
                stream.close()
                assert again.result().choices[0].message.content == "4"
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.2).completions.create(model="tiny", prompt="one,", **ENDLESS)
        small.worker.stop()
        with pytest.raises(openai.InternalServerError) as caught_503:
            client.chat.completions.create(**asked(QUESTION))
        assert caught_503.value.status_code == 503


def test_an_error_in_a_stream(server: Running, legacy: OpenAI) -> None:
    with unending(server):
        stream = legacy.completions.create(model="tiny", prompt="one,", stream=True, **ENDLESS)
        next(stream)
        entry = next(iter(server.worker._running.values()))
        entry.ticket.deadline = 0.0
        with pytest.raises(openai.APIError, match="--timeout") as caught:
            list(stream)
    assert caught.value.code == "timeout"


#
# many at once
#


def test_the_asynchronous_client(server: Running, client: OpenAI) -> None:
    steerings: tuple[Any, ...] = (None, "digits-words", WORDS, {"map": "document-memory", "mode": "soft", "scale": 2.0})
    pairs = [(text, steering) for text in (QUESTION, LONG, "Add 4 and 6.") for steering in steerings]
    expected = [
        client.chat.completions.create(**asked(text), extra_body={"steering": steering}).choices[0].message.content
        for text, steering in pairs
    ]

    async def all_of_them() -> list[str]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http) as many:

            async def one(text: str, steering: Any) -> str:
                stream = await many.chat.completions.create(
                    **asked(text), stream=True, extra_body={"steering": steering}
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(text, steering) for text, steering in pairs))

    assert asyncio.run(all_of_them()) == expected
