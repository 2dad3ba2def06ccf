"""OpenAI's API: what is answered is what the model says, whole, streamed and scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import SteeredLlama
from tests.support import rounding
from tests.support.low_level import F32
from tests.support.running_server import Running, running
from tests.support.steered_server import messages, text_of

QUESTION = "Which number comes after three?"
LONG = "Please count starting at eleven until fifteen."  # eleven, twelve, thirteen, fourteen, fifteen


@pytest.fixture(scope="module")
def server(tiny_f32_path: Path) -> Iterator[Running]:
    with running(model=tiny_f32_path, type_kv=F32) as found:
        yield found


@pytest.fixture(scope="module")
def llama(tiny_f32_path: Path) -> Iterator[SteeredLlama]:
    """The judge: llama-cpp-python's own path, and the logits of every token."""
    model = SteeredLlama(tiny_f32_path, n_ctx=512, n_threads=1, logits_all=True, type_k=F32, type_v=F32)
    yield model
    model.close()


def log_softmax(logits: Any) -> Any:
    wide = np.asarray(logits, dtype=np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


#
# chat
#


@pytest.mark.parametrize("text", [QUESTION, LONG, "Document: The zinc is red. Question: Which colour is the zinc?"])
def test_chat_is_what_llama_cpp_python_says(server: Running, llama: SteeredLlama, text: str) -> None:
    expected = llama.create_chat_completion(messages(text), temperature=0, max_tokens=24)
    response = server.chat(text)
    body = response.json()
    assert text_of(response) == expected["choices"][0]["message"]["content"]
    assert body["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
    usage = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == expected["usage"]
    assert (body["object"], body["model"], body["steering"]) == ("chat.completion", "tiny", None)
    assert body["id"].startswith("chatcmpl-")
    assert isinstance(body["created"], int)


def test_the_form_of_an_answer(server: Running) -> None:
    body = server.chat().json()
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "4", "refusal": None}
    assert {"index": 0, "finish_reason": "stop", "logprobs": None}.items() <= choice.items()
    assert set(body["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}
    assert body["timings"]["predicted_n"] == body["usage"]["completion_tokens"] == 1


def test_roles_and_parts(server: Running) -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text} for text in ("Which number", "comes after three?")]
    parts[0] |= {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "explicit"}}
    as_parts = server.chat(messages=[{"role": "user", "content": parts}])
    as_text = server.chat(messages=messages("Which number\ncomes after three?"))
    assert text_of(as_parts) == text_of(as_text)
    system = server.chat(messages=[{"role": "system", "content": "Be brief."}, *messages(LONG)])
    developer = server.chat(messages=[{"role": "developer", "content": "Be brief."}, *messages(LONG)])
    assert text_of(system) == text_of(developer), "a template without developers reads them as the system"
    turns = [*messages("Which number comes after one?"), {"role": "assistant", "content": "2"}, *messages(QUESTION)]
    assert server.chat(messages=turns).status_code == 200


def test_a_conversation_with_a_tool(server: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        *messages("Add."),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    assert server.chat(messages=turns).status_code == 200
    # as a client sends an answer back
    answer = server.chat().json()["choices"][0]["message"]
    assert server.chat(messages=[*messages(QUESTION), answer, *messages(LONG)]).status_code == 200


def test_lengths(server: Running) -> None:
    body = server.chat(LONG, max_tokens=3).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    newer = server.chat(LONG, max_completion_tokens=3, max_tokens=None)
    assert text_of(newer) == body["choices"][0]["message"]["content"]
    assert server.chat(LONG, max_completion_tokens=3, max_tokens=4).status_code == 400
    endless = server.complete("one", max_tokens=100_000, logit_bias={"0": -100}).json()
    assert endless["choices"][0]["finish_reason"] == "length"
    assert endless["usage"]["total_tokens"] == 512, "the context is the end of every answer"


@pytest.mark.parametrize(
    "stop", [",", [","], ["zz", ", thirteen"], ["four"], ["n, twelve, thirteen"], ["nothing of it"]]
)
def test_stop_strings(server: Running, stop: Any) -> None:
    whole = text_of(server.chat(LONG))
    assert ", thirteen, fourteen" in whole
    stops = [stop] if isinstance(stop, str) else stop
    found = [place for one in stops if (place := whole.find(one)) >= 0]
    expected = whole[: min(found)] if found else whole
    assert text_of(server.chat(LONG, stop=stop)) == expected
    chunks = server.events("/v1/chat/completions", {"messages": messages(LONG), "max_tokens": 24, "stop": stop})
    assert joined(chunks)[0] == expected


def test_seeds_and_choices(server: Running) -> None:
    fields = {"temperature": 1.5, "top_p": 1, "min_p": 0, "top_k": 0, "n": 3, "max_tokens": 12}
    first, again, other = (server.chat("zinc", seed=seed, **fields).json()["choices"] for seed in (7, 7, 8))
    texts = [choice["message"]["content"] for choice in first]
    assert texts == [choice["message"]["content"] for choice in again]
    assert texts != [choice["message"]["content"] for choice in other]
    assert len(set(texts)) > 1, "n answers with one seed are n different ones"
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert [choice["seed"] for choice in first] == [7, 8, 9]
    fields |= {"n": 1}
    drawn = server.chat("zinc", seed=-1, **fields).json()["choices"][0]
    repeated = server.chat("zinc", **fields, seed=drawn["seed"]).json()["choices"][0]
    assert drawn["message"] == repeated["message"], "the seed that was drawn gives the answer again"
    assert server.chat("zinc", seed=-(2**63), max_tokens=1).status_code == 200


def test_sampling_fields_reach_the_sampler(server: Running) -> None:
    greedy = text_of(server.chat(LONG))
    first = server.client.post("/tokenize", json={"content": greedy}).json()["tokens"][0]
    banned = text_of(server.chat(LONG, logit_bias={str(first): -100}))
    assert banned
    assert not banned.startswith(greedy[:1])
    penalised = text_of(server.chat(LONG, repeat_penalty=10.0))
    assert penalised != greedy
    endless = {"logit_bias": {"0": -100}, "max_tokens": 60}  # no end: it repeats itself
    plain, presence, frequency = (
        server.complete("one, two,", **endless, **fields).json()["choices"][0]["text"]
        for fields in ({}, {"presence_penalty": 2}, {"frequency_penalty": 2})
    )
    assert len({plain, presence, frequency}) == 3
    # each of these leaves nothing but the likeliest token
    for fields in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}):
        assert text_of(server.chat(LONG, temperature=2, **fields)) == greedy


#
# streams
#


def joined(chunks: list[dict[str, Any]], index: int = 0) -> tuple[str, list[Any], str | None]:
    """(content, logprobs, finish_reason) of the chunks of an answer."""
    text, entries, reason = "", [], None
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice.get("delta")
            text += (delta.get("content") or "") if delta is not None else choice["text"]
            entries += (choice["logprobs"] or {}).get("content", []) if delta is not None else []
            assert reason is None, "something follows the end"
            reason = choice["finish_reason"]
    return text, entries, reason


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": True, "top_logprobs": 3},
        {"logprobs": True, "stop": [", fif"]},
        {"n": 2, "temperature": 1.0, "seed": 3},
        {"steering": {"map": "digits-words", "reverse": True}, "routing": True},
    ],
)
def test_a_stream_joins_to_the_whole(server: Running, fields: dict[str, Any]) -> None:
    server.chat(LONG, **fields)  # now the prompt is in memory for both
    whole = server.chat(LONG, **fields).json()
    chunks = server.events("/v1/chat/completions", {"messages": messages(LONG), "max_tokens": 24, **fields})
    for choice in whole["choices"]:
        text, entries, reason = joined(chunks, choice["index"])
        assert text == choice["message"]["content"]
        assert reason == choice["finish_reason"]
        if fields.get("logprobs"):
            assert entries == choice["logprobs"]["content"]
            assert "".join(entry["token"] for entry in entries) == text
    assert len(chunks) > 5, "nothing was streamed"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "usage" not in chunks[-1]
    ends = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert [chunk for chunk in chunks if "steering" in chunk] == [chunks[0], *ends]
    if "steering" in fields:
        assert chunks[0]["steering"].items() <= whole["steering"].items()
        assert chunks[-1]["steering"] == whole["steering"]
        assert chunks[-1]["routing"] == whole["routing"]


def test_usage_in_a_stream(server: Running) -> None:
    body = {"messages": messages(LONG), "max_tokens": 24, "stream_options": {"include_usage": True}}
    chunks = server.events("/v1/chat/completions", body)
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    whole = server.chat(LONG).json()["usage"]
    assert {**chunks[-1]["usage"], "prompt_tokens_details": 0} == {**whole, "prompt_tokens_details": 0}
    assert server.chat(LONG, stream_options={"include_usage": True}).status_code == 400, "only streams have it"


#
# log probabilities
#


@pytest.mark.numeric
def test_chat_logprobs_are_the_models(server: Running, llama: SteeredLlama) -> None:
    body = server.chat(LONG, logprobs=True, top_logprobs=4, temperature=0.7, seed=1).json()
    entries = body["choices"][0]["logprobs"]["content"]
    prompt = llama.tokenize(f"<|user|>{LONG}<|end|><|assistant|>".encode(), add_bos=False, special=True)
    answer = llama.tokenize(body["choices"][0]["message"]["content"].encode(), add_bos=False)
    assert len(prompt) == body["usage"]["prompt_tokens"]
    assert [entry["token"] for entry in entries] == [piece(llama, token) for token in answer]
    expected = next_token_logprobs(llama, prompt + answer)[len(prompt) - 1 : -1]
    allowance = rounding.logprobs(expected, **rounding.TINY)
    for entry, token, row in zip(entries, answer, expected, strict=True):
        assert entry["logprob"] == pytest.approx(row[token], rel=0, abs=allowance)
        assert bytes(entry["bytes"]).decode() == entry["token"]
        best = np.argsort(-row)[:4]
        assert [top["token"] for top in entry["top_logprobs"]] == [piece(llama, int(token)) for token in best]
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(
            row[best].tolist(), rel=0, abs=allowance
        )


def next_token_logprobs(llama: SteeredLlama, tokens: list[int]) -> Any:
    """[n, n_vocab]: row i is about what follows token i."""
    llama.reset()
    llama.eval(tokens)
    return log_softmax(llama.scores[: len(tokens)])


def piece(llama: SteeredLlama, token: int) -> str:
    return llama.detokenize([token], special=True).decode()


def test_logprobs_without_others(server: Running) -> None:
    entries = server.chat(LONG, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert entries
    assert all(entry["top_logprobs"] == [] and entry["logprob"] <= 0 for entry in entries)
    assert server.chat(LONG, top_logprobs=2).status_code == 400
    assert server.chat(LONG, logprobs=True, top_logprobs=21).status_code == 400


@pytest.mark.numeric
@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_an_echoed_prompt_is_scored(server: Running, llama: SteeredLlama, as_tokens: bool, max_tokens: int) -> None:
    """As lm-evaluation-harness asks for it: echo, logprobs, max_tokens 0 or 1."""
    text = "one, two, three, four, five. " * 12  # more tokens than are scored in one decode
    tokens = llama.tokenize(text.encode(), add_bos=False)
    assert len(tokens) > 64
    fields = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "seed": 1234, "temperature": 0}
    body = server.complete(tokens if as_tokens else text, **fields).json()
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    n = len(tokens)
    assert choice["text"].startswith(text)
    assert logprobs["tokens"][:n] == [piece(llama, token) for token in tokens]
    assert "".join(logprobs["tokens"]) == choice["text"] or choice["finish_reason"] == "stop"
    expected = next_token_logprobs(llama, tokens)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    scored = [float(expected[i - 1][tokens[i]]) for i in range(1, n)]
    allowance = rounding.logprobs(expected, **rounding.TINY)
    assert logprobs["token_logprobs"][1:n] == pytest.approx(scored, rel=0, abs=allowance)
    for i in range(1, n):
        best = piece(llama, int(np.argmax(expected[i - 1])))
        top = logprobs["top_logprobs"][i]
        assert max(top, key=top.__getitem__) == best
        assert top[piece(llama, tokens[i])] == logprobs["token_logprobs"][i], "the token itself is named"
    for place, token in zip(logprobs["text_offset"][:n], logprobs["tokens"], strict=False):
        assert choice["text"][place : place + len(token)] == token
    assert len(logprobs["tokens"]) == n + max_tokens or choice["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens"] == n
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_end_is_a_token_of_a_completion(server: Running) -> None:
    """An evaluation drops the last token of echo + max_tokens 1; it must not drop one of the prompt's."""
    prompt = f"<|user|>{QUESTION}<|end|><|assistant|>4"
    logprobs = server.complete(prompt, echo=True, logprobs=1, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][-2:] == ["4", "<|end|>"]
    assert logprobs["token_logprobs"][-1] > -0.1
    plain = server.complete(prompt, max_tokens=1).json()["choices"][0]
    assert (plain["text"], plain["finish_reason"]) == ("", "stop")


def test_bytes_that_are_no_text(server: Running, llama: SteeredLlama) -> None:
    tokens = llama.tokenize("é€".encode(), add_bos=False)
    assert len(tokens) > 2, "the vocabulary has grown: take another character"
    logprobs = server.complete(tokens, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][0].startswith("bytes:\\x")
    assert logprobs["text_offset"][-1] == 1, "offsets count characters that are whole"


#
# completions
#


def test_completion_is_what_llama_cpp_python_says(server: Running, llama: SteeredLlama) -> None:
    expected = llama.create_completion("one, two, three,", temperature=0, max_tokens=8)
    body = server.complete().json()
    assert body["choices"][0]["text"] == expected["choices"][0]["text"]
    assert body["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
    assert body["object"] == "text_completion"
    assert server.complete(max_tokens=None).json()["usage"]["completion_tokens"] <= 16, "OpenAI's default"


def test_the_kinds_of_prompts(server: Running, llama: SteeredLlama) -> None:
    texts = ["one, two, three,", "1, 2, 3,", ""]
    tokens = [llama.tokenize(text.encode(), add_bos=False) for text in texts[:2]]
    alone = [server.complete(text).json()["choices"][0]["text"] for text in texts]
    together = server.complete(texts).json()
    assert [choice["text"] for choice in together["choices"]] == alone
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    assert together["usage"]["prompt_tokens"] == sum(map(len, tokens)) + 1, "an empty prompt is the BOS token"
    assert server.complete(tokens[0]).json()["choices"][0]["text"] == alone[0]
    assert [choice["text"] for choice in server.complete(tokens).json()["choices"]] == alone[:2]
    twice = server.complete(texts[:2], n=2, seed=5).json()
    assert [choice["text"] for choice in twice["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
    assert twice["usage"]["prompt_tokens"] == sum(map(len, tokens)), "a prompt counts once"
    assert server.complete("one,", echo=True).json()["choices"][0]["text"].startswith("one,")


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1}, {"n": 2}])
def test_a_streamed_completion_joins_to_the_whole(server: Running, fields: dict[str, Any]) -> None:
    body = {"prompt": ["one, two,", "1, 2,"], "max_tokens": 6, "stop": ["six"], **fields}
    whole = server.client.post("/v1/completions", json=body).json()
    chunks = server.events("/v1/completions", body)
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        if "logprobs" in fields:
            for name in ("tokens", "text_offset"):
                assert [x for c in mine if c["logprobs"] for x in c["logprobs"][name]] == choice["logprobs"][name]


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"suffix": "end"}, "invalid_value", "suffix: "),
        ({"best_of": 2}, "invalid_value", "best_of: "),
        ({"prompt": []}, "invalid_value", "prompt: "),
        ({"prompt": [[]]}, "invalid_value", "prompt[0]: "),
        ({"prompt": [1, "a"]}, "invalid_value", "prompt[0]: "),
        ({"prompt": [1280]}, None, "prompt: token 1280"),
        ({"prompt": [-1]}, "invalid_value", "prompt[0]: "),
        ({"prompt": ["a"] * 257}, "invalid_value", "prompt[0]: "),
        ({"prompt": ["a"] * 200, "n": 2}, None, "400 answers"),
        ({"prompt": "one, " * 600}, "context_length_exceeded", " 512"),
        ({"prompt": "x" * 200_000}, "context_length_exceeded", "200000 characters"),
        ({"logit_bias": {"1280": 1}}, None, "logit_bias: token 1280"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias: 'x'"),
        ({"logprobs": 21}, "invalid_value", "logprobs: "),
    ],
)
def test_what_a_completion_refuses(server: Running, fields: dict[str, Any], code: str | None, words: str) -> None:
    response = server.client.post("/v1/completions", json={"prompt": "one", "max_tokens": 1} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


def test_a_prompt_that_is_too_long_has_openais_code(server: Running) -> None:
    error = server.chat("one, " * 600).json()["error"]
    assert error["code"] == "context_length_exceeded"
