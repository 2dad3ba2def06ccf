"""OpenAI's API: what is answered is what the model says, whole, streamed, scored, bound to a format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import SteeredLlama
from tests.support import rounding
from tests.support.gguf_copy import copy_model
from tests.support.low_level import F32
from tests.support.running_server import TINY, Running, running

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


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def log_softmax(logits: Any) -> Any:
    wide = np.asarray(logits, dtype=np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


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
    ("fields", "words"),
    [
        ({"suffix": "end"}, "suffix: text between a prompt and a suffix is not offered"),
        ({"best_of": 2}, "best_of:"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1280]}, "prompt: token 1280, but the vocabulary has 0 to 1279"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 200, "n": 2}, "400 answers are asked for; at most 256"),
        ({"prompt": "one, " * 600}, "tokens, but the context of an answer is 512"),
        ({"prompt": "x" * 200_000}, "200000 characters, which cannot fit a context of 512"),
        ({"logit_bias": {"1280": 1}}, "logit_bias: token 1280"),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is not the number of a token"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_a_completion_refuses(server: Running, fields: dict[str, Any], words: str) -> None:
    response = server.client.post("/v1/completions", json={"prompt": "one", "max_tokens": 1} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long_has_openais_code(server: Running) -> None:
    error = server.chat("one, " * 600).json()["error"]
    assert error["code"] == "context_length_exceeded"


#
# formats and tools
#

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "word": {"enum": ["one", "two"]}},
    "required": ["n", "word"],
}
TOOL = {"type": "function", "function": {"name": "put", "description": "Put it.", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}


def fits(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"n", "word"}
    assert isinstance(value["n"], int)
    assert value["word"] in ("one", "two")


def test_a_json_schema_binds_the_answer(server: Running, llama: SteeredLlama) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    text = text_of(server.chat(LONG, response_format=format_, max_tokens=64))
    fits(text)
    own = llama.create_chat_completion(
        messages(LONG), temperature=0, response_format={"type": "json_object", "schema": SCHEMA}, max_tokens=64
    )
    fits(own["choices"][0]["message"]["content"])
    fits(text_of(server.chat(LONG, response_format={"type": "json_object", "schema": SCHEMA}, max_tokens=64)))
    assert text_of(server.chat(LONG, response_format={"type": "text"})) == text_of(server.chat(LONG))


def test_a_json_object(server: Running) -> None:
    body = server.chat(LONG, response_format={"type": "json_object"}, max_tokens=60, temperature=1.0, seed=4).json()
    text = body["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{")
    if body["choices"][0]["finish_reason"] == "stop":
        json.loads(text)


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "put"}}, "required"])
def test_a_forced_call(server: Running, choice: Any) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 64}
    body = server.chat(LONG, **fields).json()["choices"][0]
    assert body["finish_reason"] == "tool_calls"
    assert body["message"]["content"] is None
    call = body["message"]["tool_calls"][0]
    assert (call["type"], call["function"]["name"]) == ("function", "put")
    fits(call["function"]["arguments"])
    chunks = server.events("/v1/chat/completions", {"messages": messages(LONG), **fields})
    calls = [c for chunk in chunks for d in chunk["choices"] for c in d["delta"].get("tool_calls", [])]
    assert (calls[0]["function"]["name"], calls[0]["index"]) == ("put", 0)
    assert calls[0]["id"].startswith("call_")
    assert "".join(c["function"]["arguments"] for c in calls) == call["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_of_one_of_several(server: Running) -> None:
    fields = {"tools": [TOOL, OTHER], "tool_choice": "required", "max_tokens": 80}
    body = server.chat(LONG, **fields).json()
    call = body["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] in ("put", "stop")
    json.loads(call["function"]["arguments"])
    chunks = server.events("/v1/chat/completions", {"messages": messages(LONG), **fields})
    calls = [c for chunk in chunks for d in chunk["choices"] for c in d["delta"].get("tool_calls", [])]
    assert [c["function"] for c in calls] == [call["function"]]
    for n in (2, body["usage"]["completion_tokens"] - 1):
        cut = server.chat(LONG, **(fields | {"max_tokens": n})).json()["choices"][0]
        assert cut["finish_reason"] == "length"
        started = cut["message"]["tool_calls"][0]["function"]
        assert started["name"] in ("", call["function"]["name"])
    assert started["name"], "what came of a call that was cut off is told"


def test_tools_that_are_not_forced(server: Running) -> None:
    for choice in ("auto", "none", None):
        assert server.chat(LONG, tools=[TOOL], tool_choice=choice).status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "none of the tools"),
        ({"response_format": {"type": "json_schema"}}, "json_schema goes with"),
        ({"response_format": {"type": "json_object", "schema": {"type": "nonsense"}}}, "cannot be made a grammar"),
        ({"response_format": {"type": "json_object", "schema": {"$ref": "#/no"}}}, "cannot be made a grammar"),
        ({"response_format": {"type": "json_object", "schema": {"$ref": "https://a.b/c"}}}, "not allowed"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"functions": []}, "functions: not offered; send tools"),
        ({"function_call": "auto"}, "function_call: not offered; send tool_choice"),
        ({"tools": [{"type": "web"}]}, "tools[0]"),
    ],
)
def test_formats_and_tools_that_are_refused(server: Running, fields: dict[str, Any], words: str) -> None:
    response = server.chat(**fields)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


#
# reasoning and templates
#

THINKS = (
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}<|end|>{%- endfor -%}"
    "<|assistant|>{% if enable_thinking %}<think>{% else %}{{ note }}{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("thinker") / "thinker.gguf"
    copy_model(TINY, path, template=THINKS + "{# <think> </think> #}")
    with running(model=path, parallel=2) as found:
        yield found


def test_reasoning_is_told_from_the_answer(thinker: Running) -> None:
    """The template opens the reasoning; this model never closes it, so all it says is reasoning."""
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    message = thinker.chat(LONG, **on).json()["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"]
    assert "reasoning_content" not in thinker.chat(LONG).json()["choices"][0]["message"]
    assert thinker.chat(LONG, reasoning_effort="high").json()["choices"][0]["message"] == message
    chunks = thinker.events("/v1/chat/completions", {"messages": messages(LONG), "max_tokens": 24, **on})
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert not any(delta.get("content") for delta in deltas)
    bound = thinker.chat(LONG, reasoning_effort="high", response_format={"type": "json_object", "schema": SCHEMA})
    assert bound.json()["choices"][0]["message"]["content"].startswith("{"), "a format leaves no room to think"


def test_a_format_goes_into_the_final_channel(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model of harmony's format opens a channel first, which a grammar would not let it do."""
    path = tmp_path_factory.mktemp("harmony") / "harmony.gguf"
    turns = "{%- for m in messages -%}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endfor -%}"
    copy_model(TINY, path, template=turns + "<|start|>assistant{# <|channel|> #}")
    with running(model=path, parallel=1) as harmony:
        free = harmony.chat(LONG).json()
        format_ = {"type": "json_object", "schema": SCHEMA}
        bound = harmony.chat(LONG, response_format=format_, max_tokens=64).json()
        fits(bound["choices"][0]["message"]["content"])
        opening = harmony.client.post("/tokenize", json={"content": "<|channel|>final<|message|>"}).json()["tokens"]
        assert bound["usage"]["prompt_tokens"] == free["usage"]["prompt_tokens"] + len(opening)


def test_variables_of_the_template(thinker: Running) -> None:
    plain = thinker.chat("one").json()["usage"]["prompt_tokens"]
    longer = thinker.chat("one", chat_template_kwargs={"note": "one two three"}).json()["usage"]["prompt_tokens"]
    assert longer > plain
    for variables in ({"messages": []}, {"tools": []}, {"not a name": 1}):
        assert thinker.chat("one", chat_template_kwargs=variables).status_code == 400


def test_a_model_without_a_template(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    copy_model(TINY, path, template="")
    with running(model=path, parallel=1) as plain:
        response = plain.chat()
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]
        assert plain.complete().status_code == 200


def test_a_template_that_refuses(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("picky") / "picky.gguf"
    copy_model(TINY, path, template="{{ raise_exception('only one message') if messages | length > 1 }}x")
    with running(model=path, parallel=1) as picky:
        assert picky.chat().status_code == 200
        error = picky.chat(messages=messages("a") + messages("b")).json()["error"]
        assert error["message"] == "the model's chat template refuses this conversation: only one message"


#
# the rest
#


def test_models(server: Running) -> None:
    body = server.client.get("/v1/models").json()
    ids = {model["id"]: model["steering"] for model in body["data"]}
    assert ids == {
        "tiny": None,
        "tiny:digits-words": "digits-words",
        "tiny:document-memory": "document-memory",
        "tiny:none": None,
    }
    assert all(model["object"] == "model" and model["meta"]["n_ctx"] == 512 for model in body["data"])
    assert server.client.get("/v1/models/tiny:digits-words").json() == body["data"][1]
    response = server.client.get("/v1/models/gpt-4")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_tokens(server: Running, llama: SteeredLlama) -> None:
    post = server.client.post
    text = "one two<|end|> é"
    tokens = post("/tokenize", json={"content": text}).json()["tokens"]
    assert tokens == llama.tokenize(text.encode(), add_bos=False, special=True)
    plain = post("/tokenize", json={"content": text, "parse_special": False}).json()["tokens"]
    assert plain == llama.tokenize(text.encode(), add_bos=False, special=False) != tokens
    pieces = post("/tokenize", json={"content": "one two", "with_pieces": True}).json()["tokens"]
    assert "".join(item["piece"] for item in pieces) == "one two"
    assert post("/detokenize", json={"tokens": tokens}).json() == {"content": text, "prompt": text}
    for bad in ([1280], [-1], [2**40], "x"):
        assert post("/detokenize", json={"tokens": bad}).status_code == 400


def test_tokens_under_vllms_names(server: Running, llama: SteeredLlama) -> None:
    """Evaluation harnesses use the server's tokenizer by them."""
    post = server.client.post
    info = server.client.get("/tokenizer_info").json()
    assert info["chat_template"] == llama.metadata["tokenizer.chat_template"]
    assert (info["eos_token"], info["model_max_length"], info["vocab_size"]) == ("<|end|>", 512, 1280)
    (eos,) = post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert eos == llama.token_eos()
    found = post("/tokenize", json={"model": "tiny", "prompt": "one two<|end|>"}).json()
    tokens = llama.tokenize(b"one two<|end|>", add_bos=True, special=True)
    assert found == {"tokens": tokens, "count": len(tokens), "max_model_len": 512}
    for body in ({}, {"content": "a", "prompt": "a"}):
        assert "one of content and prompt" in post("/tokenize", json=body).json()["error"]["message"]


def test_words_that_no_tokenizer_takes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """llama.cpp's tokenizers with std::regex recurse as deep as a word is long: 30,000 letters crash 8 MB of stack."""
    path = tmp_path_factory.mktemp("bloom") / "bloom.gguf"
    copy_model(TINY, path, pre="bloom")
    with running(model=path, parallel=1) as bloom:

        def status(text: str) -> int:
            return bloom.client.post("/tokenize", json={"content": text}).status_code

        assert status("x" * 60_000) == 200
        for text in ("x" * 600_000, "a " + " " * 600_000, "é" * 600_000, "a\x1c" * 300_000):
            assert status(text) == 400


def test_health_and_metrics(server: Running) -> None:
    assert server.client.get("/health").json() == {"status": "ok", "slots": {"total": 4, "busy": 0}, "waiting": 0}

    def metric(name: str, **labels: str) -> float:
        for line in server.client.get("/metrics").text.splitlines():
            if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        return 0.0

    labels = {"endpoint": "chat/completions", "steering": "document-memory"}
    names = ("steermoe_prompt_tokens_total", "steermoe_generated_tokens_total", "steermoe_cached_prompt_tokens_total")
    before = [metric(name, **labels) for name in names]
    answers = [server.chat(QUESTION, steering="document-memory").json()["usage"] for _ in range(2)]
    after = [metric(name, **labels) for name in names]
    assert after[0] - before[0] == sum(usage["prompt_tokens"] for usage in answers)
    assert after[1] - before[1] == sum(usage["completion_tokens"] for usage in answers)
    assert after[2] - before[2] == sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in answers) > 0
    assert metric("steermoe_requests_total", **labels, status="ok") >= 2
    assert metric("steermoe_request_seconds_count", **labels) >= 2
    assert metric("steermoe_first_token_seconds_count", **labels) >= 2
    server.chat(steering={"map": "digits-words", "activate": 1})
    assert metric("steermoe_requests_total", steering="digits-words:changed", status="ok") >= 1
    assert "steermoe_waiting 0.0" in server.client.get("/metrics").text


def test_the_document(server: Running) -> None:
    document = server.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    paths = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/steering", "/v1/steering/{name}"}
    paths |= {
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/metrics",
        "/v1/models/{model_id}",
        "/v1/steering/{name}/map",
    }
    assert set(document["paths"]) == paths
    operations = [o for methods in document["paths"].values() for o in methods.values()]
    assert not any("422" in operation["responses"] for operation in operations)
    references = json.dumps(document).split('"$ref": "#/components/schemas/')[1:]
    assert {reference.partition('"')[0] for reference in references} <= set(document["components"]["schemas"])
    page = server.client.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "POST /v1/chat/completions" in page.text
    assert "http://" not in page.text, "nothing is loaded from elsewhere"
    assert "https://" not in page.text


OPENAIS: dict[str, Any] = dict.fromkeys(("user", "service_tier", "safety_identifier", "verbosity"), "low")
OPENAIS |= {"reasoning_effort": "low", "prompt_cache_key": "a", "prompt_cache_retention": "24h", "store": False}
OPENAIS |= {"metadata": {"a": "b"}, "parallel_tool_calls": True, "modalities": ["text"], "prompt_cache_options": {}}
OPENAIS |= {"prediction": {"type": "content", "content": "one"}, "logit_bias": {}, "stop": None, "n": 1}


@pytest.mark.parametrize("field", OPENAIS)
def test_fields_of_openai_clients(server: Running, field: str) -> None:
    response = server.chat(max_tokens=1, **{field: OPENAIS[field]})
    assert response.status_code == 200, response.text
    assert server.chat(max_tokens=1, **{field: None}).status_code == 200


def test_fields_that_ask_for_what_there_is_not(server: Running) -> None:
    """They would change the answer, so they are not dropped; null asks for nothing."""
    asked = {"functions": [{"name": "a"}], "audio": {"voice": "a", "format": "wav"}, "web_search_options": {}}
    for field, value in (asked | {"function_call": "none", "moderation": {"model": "a"}}).items():
        response = server.chat(max_tokens=1, **{field: value})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == field
        assert error["message"].startswith(f"{field}: not offered")
        assert server.chat(max_tokens=1, **{field: None}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temprature": 1}, "temprature", "unknown_field"),
        ({"grammar": 'root ::= "a"'}, "grammar", "unknown_field"),
        ({"stream_options": {"include": True}, "stream": True}, "stream_options.include", "unknown_field"),
        ({"Foo": 1}, "Foo", "unknown_field"),
        ({"a b[0]": 1}, "a b[0]", "unknown_field"),
        ({"x\n\x1b[31m": 1}, "x??[31m", "unknown_field"),
        ({"steering": {"map": "digits-words", "": 1}}, "steering.", "unknown_field"),
        ({"temperature": "0.5"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight", "unknown_field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "invalid_value",
        ),
        ({"seed": 2**63}, "seed", "invalid_value"),
    ],
)
def test_what_a_chat_refuses(server: Running, fields: dict[str, Any], param: str, code: str) -> None:
    response = server.chat(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert error["message"].startswith(param)


def test_an_unknown_model(server: Running) -> None:
    for name in ("gpt-4", "tiny:", "tiny:x", "x:digits-words", ""):
        response = server.chat(model=name)
        assert response.status_code == (404 if name else 200), response.text
    assert "tiny:digits-words" in server.chat(model="gpt-4").json()["error"]["message"]


def test_addresses_that_are_not_there(server: Running) -> None:
    response = server.client.get("/v1/embeddings")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"
    assert server.client.get("/v1/chat/completions").status_code == 405
    assert "error" in server.client.get("/v1/chat/completions").json()
