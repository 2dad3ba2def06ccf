"""One whole message of each class of error, as Python, the command line and the server give it.

All other tests look at the class, the offending value and the status, so a change of wording is seen here alone.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from steermoe_local import ExpertMap, errors, model_info
from steermoe_local._util import disk
from steermoe_local._util.locks import OutputLock
from steermoe_local.cli import main
from steermoe_local.evaluation.studies.transfer import quantize
from steermoe_local.llama import library, quantizer
from steermoe_local.llama.sampling import Sampling
from steermoe_local.models.embedded import data_folder
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.pairs.pairs import load_pairs
from steermoe_local.server.api_errors import as_api_error
from steermoe_local.steering.bias_file import BiasFile
from tests.support.builders import identity
from tests.support.running_server import running, unending


def of_format(folder: Path) -> None:
    (folder / "m.json").write_text("{}")
    ExpertMap.load(folder / "m.json")


def of_pairs(folder: Path) -> None:
    (folder / "p.jsonl").write_text('{"id": "1"}\n')
    load_pairs(folder / "p.jsonl")


def of_a_model(folder: Path) -> None:
    model_info(folder / "m.gguf")


def of_another_model(_: Path) -> None:
    BiasFile.from_signs(np.zeros((3, 4)), identity()).check(identity(4), "b.gguf", "m.gguf")


def of_a_choice(_: Path) -> None:
    ExpertMap.load(map_path("digits-words")).choose(1, 0, layers="9")


def of_usage(_: Path) -> None:
    Sampling(temperature=-1)


def of_resources(folder: Path) -> None:
    made = quantize.Quantizer(model_info(data_folder() / "tiny-moe.gguf"), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
        made.check_room([quantize.file_type("Q8_0")], keep=False)


def of_a_full_disk(folder: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk.os, "fsync", full)
        ExpertMap.load(map_path("digits-words")).save(folder / "m.json")


def of_another_process(folder: Path) -> None:
    with OutputLock(folder / "m.json"), OutputLock(folder / "m.json"):
        pass


def of_the_native_side(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "")
        quantizer.quantize_file(folder / "a.gguf", folder / "b.gguf", 7)


def of_a_version(_: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda _: "0.0.1")
        patch.setattr(library, "pinned_version", lambda: "0.0.2")
        patch.setattr(sys, "executable", "/bin/python3")
        library.llama_cpp.__wrapped__()


CAUSES: dict[type[errors.SteerMoEError], tuple[Callable[[Path], None], str]] = {
    errors.FormatError: (
        of_format,
        '{folder}/m.json: not an expert map (no "format": "steermoe-expert-map" in it); run steermoe detect again',
    ),
    errors.PairsError: (
        of_pairs,
        "{folder}/p.jsonl:1: positive: missing; a pair needs positive, negative, positive_target, negative_target",
    ),
    errors.ModelError: (
        of_a_model,
        "{folder}/m.gguf: cannot be read as GGUF: No such file or directory; check the path",
    ),
    errors.ModelMismatchError: (
        of_another_model,
        "b.gguf: made for olmoe (3 layers, 4 experts, top-2, router 01234567), "
        "but m.gguf is olmoe (4 layers, 4 experts, top-2, router 01234567); run steermoe detect on this model",
    ),
    errors.ChoiceError: (of_a_choice, "layers: there is no layer 9; olmoe has layers 0 to 4"),
    errors.UsageError: (of_usage, "temperature: -1 is not >= 0"),
    errors.ResourceError: (
        of_resources,
        "{folder}: Q8_0 takes about 5.4 MB, but 0.0 MB of the disk are free; "
        "free some, leave some out, or take a folder on another disk",
    ),
    errors.StorageError: (
        of_a_full_disk,
        "{folder}/m.json: cannot be written: No space left on device; free some room there, then run the command again",
    ),
    errors.BusyError: (
        of_another_process,
        f"{{folder}}/m.json: this process, pid {os.getpid()}, is writing this already; wait until it is done",
    ),
    errors.NativeError: (
        of_the_native_side,
        "no Python to start a child process with (sys.executable); install the package with pip",
    ),
    errors.VersionError: (
        of_a_version,
        "llama-cpp-python 0.0.1 is installed, but this steermoe-local was built for 0.0.2; "
        "run CMAKE_ARGS=-DLLAMA_BUILD=OFF python3 -m pip install llama-cpp-python==0.0.2",
    ),
}
# exit status of the command line; status, type and code of the server
EFFECTS: dict[type[errors.SteerMoEError], tuple[int, int, str, str]] = {
    errors.FormatError: (1, 400, "invalid_request_error", "invalid_file"),
    errors.PairsError: (1, 400, "invalid_request_error", "invalid_messages"),
    errors.ModelError: (1, 400, "invalid_request_error", "model_unsuitable"),
    errors.ModelMismatchError: (1, 400, "invalid_request_error", "model_mismatch"),
    errors.ChoiceError: (1, 400, "invalid_request_error", "impossible_choice"),
    errors.UsageError: (2, 400, "invalid_request_error", "invalid_value"),
    errors.ResourceError: (1, 503, "server_error", "out_of_memory"),
    errors.StorageError: (1, 500, "server_error", "storage_failed"),
    errors.BusyError: (1, 503, "server_error", "busy"),
    errors.NativeError: (1, 500, "server_error", "native_error"),
    errors.VersionError: (1, 500, "server_error", "version_error"),
}
# where the server says something else: the message has a path
SERVER_SAYS: dict[type[errors.SteerMoEError], str] = {
    errors.StorageError: (
        "the server cannot write its files, so nothing was changed; its operator finds the reason in its log"
    ),
}


def test_every_class_is_here() -> None:
    classes = {
        found
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, errors.SteerMoEError) and found is not errors.SteerMoEError
    }
    assert classes == set(CAUSES) == set(EFFECTS)


@pytest.mark.parametrize("kind", CAUSES)
def test_messages(kind: type[errors.SteerMoEError], tmp_path: Path) -> None:
    cause, message = CAUSES[kind]
    with pytest.raises(errors.SteerMoEError) as caught:
        cause(tmp_path)
    assert type(caught.value) is kind
    assert str(caught.value) == message.replace("{folder}", str(tmp_path))


@pytest.mark.parametrize("kind", CAUSES)
def test_the_command_line_and_the_server(
    kind: type[errors.SteerMoEError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause, message = CAUSES[kind]
    message = message.replace("{folder}", str(tmp_path))
    exit_status, status, its_type, code = EFFECTS[kind]
    monkeypatch.setattr(main.commands["presets"], "callback", lambda **_: cause(tmp_path))
    done = CliRunner().invoke(main, ["presets"])
    assert (done.exit_code, done.stdout, done.stderr) == (exit_status, "", f"error: {message}\n")
    response = as_api_error(kind(message))
    body = {"error": {"message": SERVER_SAYS.get(kind, message), "type": its_type, "param": None, "code": code}}
    assert (response.status, response.body()) == (status, body)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory; close other programs, or take a smaller model or context (-c)"),
        (
            OSError(2, "No such file or directory", "gone"),
            1,
            "gone: No such file or directory; check the path, and the room on the disk",
        ),
    ],
)
def test_other_ends_of_a_command(
    error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(main.commands["presets"], "callback", fail)
    done = CliRunner().invoke(main, ["presets"])
    assert (done.exit_code, done.stderr) == (status, f"error: {message}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["detct"], "no such command 'detct'; did you mean detect?"),
        (["presets", "--jsn"], "no such option '--jsn'; did you mean --json?"),
        (["run"], "which model? give -m MODEL (a GGUF file, tiny) or -hf USER/REPO[:QUANT]"),
    ],
)
def test_wrong_command_lines(words: list[str], message: str) -> None:
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stderr) == (2, f"error: {message}\n")


def test_the_server_by_status() -> None:
    """The whole body of an error of each status that is the server's own."""
    invalid = "invalid_request_error"
    with running(parallel=1, n_ctx=1024, queue_limit=0, api_key="k", body_limit=1 << 20) as server:
        post, get = server.client.post, server.client.get
        endless = {"prompt": "one,", "logit_bias": {"0": -100}, "max_tokens": 900, "stream": True}  # 0 is the end
        with unending(server), server.client.stream("POST", "/v1/completions", json=endless):
            busy = server.chat()
        twice = post("/tokenize", content=b'{"a": 1, "a": 1}', headers={"Content-Type": "application/json"})
        cases = [
            (
                twice,
                400,
                "the body is not valid JSON: the key 'a' stands twice in one object",
                invalid,
                None,
                "invalid_json",
            ),
            (
                post("/tokenize", json={"contnt": "a"}),
                400,
                "contnt: unknown field; /docs lists the known ones",
                invalid,
                "contnt",
                "unknown_field",
            ),
            (
                get("/v1/models", headers={"Authorization": "Bearer x"}),
                401,
                "no valid API key; send the header Authorization: Bearer KEY",
                "authentication_error",
                None,
                "invalid_api_key",
            ),
            (
                get("/v1/models", headers={"Host": "evil.example"}),
                403,
                "host 'evil.example' is not a name of this server; "
                "use its address, or start it with --allowed-host NAME",
                "permission_error",
                None,
                "unknown_host",
            ),
            (
                get("/v1/nothing"),
                404,
                "no such address: /v1/nothing; there are: POST /v1/chat/completions, POST /v1/responses, "
                "POST /v1/responses/input_tokens, GET/DELETE /v1/responses/{response_id}, POST /v1/completions, "
                "GET /health, GET /metrics, GET /v1/models, GET /v1/models/{model_id}, POST /tokenize, "
                "POST /detokenize, GET /tokenizer_info, GET/POST /v1/steering, GET/DELETE /v1/steering/{name}, "
                "GET /v1/steering/{name}/map, GET/POST /v1/learn, GET/DELETE /v1/learn/{job_id}, "
                "GET /v1/behaviours; /docs describes them",
                "not_found_error",
                None,
                None,
            ),
            (
                server.chat(model="gpt-4:safe"),
                404,
                "model 'gpt-4:safe' is not served; there are: tiny, tiny:digits-words, tiny:document-memory, tiny:none",
                "not_found_error",
                "model",
                "model_not_found",
            ),
            (get("/tokenize"), 405, "/tokenize does not take GET; send POST", invalid, None, None),
            (
                post("/v1/steering", json={"name": "digits-words", "map": "document-memory"}),
                409,
                "digits-words: taken (source: ships); choose another name",
                invalid,
                None,
                "name_taken",
            ),
            (
                post("/tokenize", json={"content": "x" * (1 << 20)}),
                413,
                "the body is larger than 1 MiB",
                invalid,
                None,
                "body_too_large",
            ),
            (
                post("/tokenize", content=b"{}"),
                415,
                "the body is JSON; send the header Content-Type: application/json",
                invalid,
                None,
                "content_type",
            ),
            (busy, 429, "0 requests wait already; come again later", "rate_limit_error", None, "queue_full"),
        ]
        server.worker.stop()
        cases.append((server.chat(), 503, "the server is stopping", "server_error", None, "stopped"))
    for response, status, message, its_type, param, code in cases:
        body = {"error": {"message": message, "type": its_type, "param": param, "code": code}}
        assert (response.status_code, response.json()) == (status, body)


def test_what_the_server_did_not_expect() -> None:
    """The text of such an error may hold secrets, so it is not sent."""
    response = as_api_error(RuntimeError("a secret"))
    body = {"message": "the server failed; its log says why", "type": "server_error", "param": None}
    assert (response.status, response.body()) == (500, {"error": body | {"code": "internal_error"}})
