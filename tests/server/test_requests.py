"""Models, tokens, health and metrics; fields and addresses that the server accepts and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from steermoe_local import SteeredLlama
from tests.support.gguf_copy import copy_model
from tests.support.running_server import TINY, Running, running

QUESTION = "Which number comes after three?"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def llama() -> Iterator[SteeredLlama]:
    """The judge: llama-cpp-python's own path, and the logits of every token."""
    model = SteeredLlama(TINY, n_ctx=512, n_threads=1, logits_all=True)
    yield model
    model.close()


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
        response = post("/tokenize", json=body)
        assert response.status_code == 400
        assert "content and prompt" in response.json()["error"]["message"]


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
    paths |= {"/v1/responses", "/v1/responses/input_tokens", "/v1/responses/{response_id}"}
    paths |= {
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/metrics",
        "/v1/models/{model_id}",
        "/v1/steering/{name}/map",
        "/v1/behaviours",
        "/v1/learn",
        "/v1/learn/{job_id}",
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
        assert (error["param"], error["code"]) == (field, "invalid_value")
        assert error["message"].startswith(f"{field}: ")
        assert server.chat(max_tokens=1, **{field: None}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temprature": 1}, "temprature", "unknown_field"),
        ({"grammar": 'root ::= "a"'}, "grammar", "invalid_value"),
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


def test_names_of_the_model(server: Running) -> None:
    """One model is loaded: any name is its, but what stands behind a colon names a steering."""
    for name in ("gpt-4", "org/model", "tiny", "", None):
        response = server.chat(model=name, max_tokens=1)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == "tiny", "the answer names the model that is loaded"
    assert server.complete(model="gpt-4").json()["model"] == "tiny"
    for name in ("tiny:", "tiny:x", "x:digits-words", "llama3:8b"):
        response = server.chat(model=name)
        assert response.status_code == 404, response.text
    assert "tiny:digits-words" in server.chat(model="llama3:8b").json()["error"]["message"]
    assert server.chat(model="tiny:digits-words", max_tokens=1).json()["model"] == "tiny:digits-words"


def test_a_steering_with_any_name_of_the_model(server: Running) -> None:
    response = server.chat(model="gpt-4", steering="digits-words", max_tokens=1)
    assert response.json()["steering"]["name"] == "digits-words"


@pytest.mark.parametrize(
    "path",
    [
        "/chat/completions",
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/v1//chat//completions//",
        "/v1/v1/chat/completions",
        "/v1/v1/v1/chat/completions/",
        "//chat/completions",
    ],
)
def test_addresses_as_clients_write_them(server: Running, path: str) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1}
    response = server.client.post(server.url + path, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["object"] == "chat.completion"


def test_other_addresses_as_clients_write_them(server: Running) -> None:
    def get(path: str) -> Any:
        response = server.client.get(server.url + path)
        assert response.status_code == 200, (path, response.text)
        return response.json()

    models = get("/v1/models")
    for path in ("/models", "/models/", "/v1/models/", "//models", "/v1/v1/models"):
        assert get(path)["data"] == models["data"]
    assert get("/models/tiny:none") == get("/v1/models/tiny:none/")
    for path in ("/v1/health", "/health/", "//health"):
        assert get(path)["status"] == "ok"
    assert get("/steering")["object"] == get("/v1/steering/")["object"] == "list"
    for path in ("/completions", "/v1/completions/"):
        response = server.client.post(server.url + path, json={"prompt": "one,", "max_tokens": 1})
        assert response.json()["object"] == "text_completion"
    assert server.client.post(server.url + "/v1/tokenize", json={"content": "one"}).status_code == 200


def test_addresses_that_are_not_there(server: Running) -> None:
    for path in ("/v1/embeddings", "/api/chat", "/v1", "/v1/", "/v2/models", "/nothing%1b%5b31m"):
        response = server.client.get(server.url + path)
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("not_found_error", None)
        assert "POST /v1/chat/completions" in error["message"], "it says what is there"
        assert "GET /v1/models/{model_id}" in error["message"]
        assert error["message"].isprintable()


def test_methods_that_an_address_does_not_take(server: Running) -> None:
    for method, path, allowed in (
        ("GET", "/v1/chat/completions", "POST"),
        ("GET", "/chat/completions/", "POST"),
        ("PUT", "/v1/steering", "GET, POST"),
        ("POST", "/v1/models", "GET"),
    ):
        response = server.client.request(method, server.url + path)
        assert response.status_code == 405
        assert response.headers["allow"] == allowed
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", None)
        assert allowed.replace(", ", " or ") in error["message"]
