"""llama.cpp's flags for devices, attention and the KV cache: they reach its structs, and nonsense does not."""

from __future__ import annotations

import ctypes
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local import NativeError, SteeredLlama, UsageError
from steermoe_local.cli import main
from steermoe_local.llama import backends
from tests.support.low_level import lib
from tests.support.paths import ROOT

PAIRS = ROOT / "examples" / "pairs" / "numbers.jsonl"
RUN = ("run", "-m", "tiny", "-p", "one, two", "--raw", "--temp", "0", "-n", "2", "-c", "64", "-t", "1")
F16, Q8_0, Q4_0 = 1, 8, 2

Seen = dict[str, Any]


def invoke(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the last model and context were made with, copied from the structs as they went to C."""
    module, values = lib().llama_cpp, {}
    load, init = module.llama_model_load_from_file, module.llama_init_from_model

    def copy(params: Any, names: str) -> None:
        values.update({name: getattr(params, name) for name in names.split()})

    def load_and_see(path: bytes, params: Any) -> Any:
        copy(params, "n_gpu_layers split_mode main_gpu load_mode devices")
        values["tensor_split"] = params.tensor_split[:3] if params.tensor_split else None
        values["overrides"] = overrides_of(params)
        return load(path, params)

    def init_and_see(model: Any, params: Any) -> Any:
        copy(params, "flash_attn_type type_k type_v n_batch n_ubatch n_threads n_threads_batch")
        return init(model, params)

    monkeypatch.setattr(module, "llama_model_load_from_file", load_and_see)
    monkeypatch.setattr(module, "llama_init_from_model", init_and_see)
    monkeypatch.setattr(lib(), "llama_init_from_model", init_and_see)  # the recorder's name for it
    return values


def overrides_of(params: Any) -> list[str]:
    """Patterns of llama_model_params.tensor_buft_overrides, up to the closing NULL."""
    patterns: list[str] = []
    if params.tensor_buft_overrides:
        row = ctypes.cast(params.tensor_buft_overrides, ctypes.POINTER(backends._Override))
        while row[len(patterns)].pattern is not None:
            assert row[len(patterns)].buft, "a pattern without a buffer type"
            patterns.append(row[len(patterns)].pattern.decode())
    return patterns


EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
FLAGS: list[tuple[list[str], Seen]] = [
    (
        [],
        {
            "n_gpu_layers": 0,
            "split_mode": 1,
            "main_gpu": 0,
            "tensor_split": None,
            "devices": None,
            "overrides": [],
            "flash_attn_type": 0,
            "type_k": F16,
            "type_v": F16,
        },
    ),
    (["-ngl", "3"], {"n_gpu_layers": 3}),
    (["-ngl", "all"], {"n_gpu_layers": 0x7FFFFFFF}),
    (["--gpu-layers", "-1"], {"n_gpu_layers": 0x7FFFFFFF}),
    (["-sm", "none", "-mg", "2"], {"split_mode": 0, "main_gpu": 2}),
    (["-sm", "row"], {"split_mode": 2}),
    (["-ts", "3,1"], {"tensor_split": [3, 1, 0]}),
    (["--tensor-split", "1/2/0.5"], {"tensor_split": [1, 2, 0.5]}),
    (["-cmoe"], {"overrides": [EXPERTS]}),
    (["-ncmoe", "2"], {"overrides": [rf"blk\.0{EXPERTS}", rf"blk\.1{EXPERTS}"]}),
    (["-ot", "attn_k=CPU,_q=CPU", "-ot", "out=CPU", "-cmoe"], {"overrides": ["attn_k", "_q", "out", EXPERTS]}),
    (["-fa", "on"], {"flash_attn_type": 1}),
    (["-fa", "auto"], {"flash_attn_type": -1}),
    (["-ctk", "q8_0"], {"type_k": Q8_0, "type_v": F16}),
    (["-fa", "on", "-ctv", "q4_0"], {"type_k": F16, "type_v": Q4_0}),
    (["-b", "32", "-ub", "16"], {"n_batch": 32, "n_ubatch": 16}),
]


def flag_ids(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else ""


@pytest.mark.parametrize(("flags", "wanted"), FLAGS, ids=flag_ids)
def test_run_hands_them_over(flags: list[str], wanted: Seen, seen: Seen) -> None:
    result = invoke(*RUN, *flags)
    assert result.exit_code == 0, result.output
    assert {name: seen[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [(f, w) for f, w in FLAGS if f and f != ["-fa", "auto"]],
    ids=flag_ids,
)
def test_detect_hands_them_over(flags: list[str], wanted: Seen, seen: Seen, tmp_path: Path) -> None:
    result = invoke("detect", "-m", "tiny", "--pairs", PAIRS, "-o", tmp_path / "m.json", "-t", 1, *flags)
    assert result.exit_code == 0, result.output
    assert {name: seen[name] for name in wanted} == wanted


def test_load_modes(seen: Seen) -> None:
    modes = {}
    for flags in ((), ("--no-mmap",), ("--mlock",), ("--no-mmap", "--mlock")):
        assert invoke(*RUN, *flags).exit_code == 0
        modes[flags] = seen["load_mode"]
    names = ("MMAP", "NONE", "MMAP_MLOCK", "MLOCK")
    assert list(modes.values()) == [getattr(lib(), f"LLAMA_LOAD_MODE_{name}") for name in names]


def test_device_none_is_an_empty_list(seen: Seen) -> None:
    assert invoke(*RUN, "-dev", "none").exit_code == 0
    assert ctypes.cast(seen["devices"], ctypes.POINTER(ctypes.c_void_p))[0] is None


def test_threads_of_both_kinds(seen: Seen) -> None:
    assert invoke(*RUN[:-1], "3").exit_code == 0
    assert (seen["n_threads"], seen["n_threads_batch"]) == (3, 3)


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["-ngl", "many"], 2, "'many'"),
        (["-ts", "a,b"], 2, "'a,b'"),
        (["-ts", "0,0"], 2, "'0,0'"),
        (["-ts", "1,-1"], 2, "'1,-1'"),
        (["-sm", "columns"], 2, "'columns'"),
        (["-mg", "-1"], 2, "-mg"),
        (["-ncmoe", "-1"], 2, "-ncmoe"),
        (["-ot", "exps"], 2, "PATTERN=BUFFER"),
        (["-ot", "exps=Moon"], 2, "'Moon' (-ot)"),
        (["-ot", "(=CPU"], 1, "regular expression"),
        (["-dev", "Moon0"], 2, "'Moon0' (-dev)"),
        (["-dev", "a,,b"], 2, "-dev"),
        (["-fa", "perhaps"], 2, "'perhaps'"),
        (["-ctk", "q3_k"], 2, "'q3_k'"),
        (["-ctv", "q8_0"], 2, "-fa on"),
        (["--rpc", "somewhere"], 2, "'somewhere'"),
        (["--rpc", "127.0.0.1:99999"], 2, "'127.0.0.1:99999'"),
        (["--rpc", "127.0.0.1:0"], 2, "'127.0.0.1:0'"),
    ],
)
def test_nonsense_is_one_line(flags: list[str], status: int, words: str) -> None:
    result = invoke(*RUN, *flags)
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    if result.stderr.startswith("error:"):
        assert result.stderr.count("\n") == 1


#
# what they do
#


def logits(path: Path, **options: Any) -> Any:
    llama = SteeredLlama(path, n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, **options)
    tokens = llama.tokenize(b"one, two, three, four, five, six")
    llama.eval(tokens)
    found = np.array(llama.scores[: len(tokens)])
    llama.close()
    return found


def test_the_cache_type_rounds(tiny_path: Path) -> None:
    plain = logits(tiny_path)
    rounded = logits(tiny_path, type_k=Q8_0)
    assert not np.array_equal(rounded, plain)
    assert np.abs(rounded - plain).max() < 0.1 * np.abs(plain).max()


def test_overrides_to_the_cpu_change_nothing_on_the_cpu(tiny_path: Path) -> None:
    plain = logits(tiny_path, use_mmap=False)
    for options in ({"cpu_moe": True}, {"n_cpu_moe": 2}, {"tensor_buft_overrides": {"attn": "CPU"}}, {"devices": ()}):
        assert np.array_equal(logits(tiny_path, use_mmap=False, **options), plain), options


def test_the_patterns_name_the_experts_alone(tiny_path: Path) -> None:
    names = [tensor.name for tensor in gguf.GGUFReader(tiny_path).tensors]
    experts = [name for name in names if "_exps" in name]
    assert experts

    def matched(n_layer: int | None) -> list[str]:
        patterns = [pattern for pattern, _ in backends.cpu_moe_patterns(n_layer)]
        return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]

    assert matched(None) == experts
    assert matched(2) == [name for name in experts if name.startswith(("blk.0.", "blk.1."))]
    assert matched(0) == []
    assert re.search(backends.cpu_moe_patterns(2)[1][0], "blk.11.ffn_up_exps.weight") is None


def test_a_changed_load_is_not_left_behind(tiny_path: Path) -> None:
    before = lib().llama_cpp.llama_model_load_from_file, lib().llama_cpp.llama_init_from_model
    with pytest.raises(UsageError):
        SteeredLlama(tiny_path, n_cpu_moe=-1)
    SteeredLlama(tiny_path, n_ctx=64, flash_attn="auto").close()
    assert (lib().llama_cpp.llama_model_load_from_file, lib().llama_cpp.llama_init_from_model) == before


def test_a_change_is_this_threads_own() -> None:
    """Another thread that loads a model meanwhile gets what it asked for."""
    module, calls = lib().llama_cpp, []
    with backends.parameters(lambda _: calls.append("model"), lambda _: calls.append("context")):
        thread = threading.Thread(
            target=module.llama_model_load_from_file, args=(b"none.gguf", lib().llama_model_default_params())
        )
        thread.start()
        thread.join()
        assert calls == []
        module.llama_model_load_from_file(b"none.gguf", lib().llama_model_default_params())
        assert calls == ["model"]


#
# RPC without a server: what is there is asked before llama.cpp, which would end the process
#


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something that listens on a free port of the loopback and serves one client."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            client, _ = listening.accept()
            with client:
                answer(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def test_a_library_without_rpc(tiny_path: Path) -> None:
    if lib().llama_supports_rpc():
        pytest.skip("this library has RPC")
    with pytest.raises(NativeError, match="CMAKE_ARGS=-DGGML_RPC=on"):
        SteeredLlama(tiny_path, rpc_servers=["127.0.0.1:50052"])


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(NativeError, match=rf"127\.0\.0\.1:{port} cannot be reached"):
        backends._greet("127.0.0.1", port)


def test_a_busy_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_RPC_TIMEOUT", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,  # nobody accepts
        pytest.raises(NativeError, match="does not answer"),
    ):
        backends._greet("127.0.0.1", listening.getsockname()[1])


def hello(major: int, size: int = 4 + backends.RPC_CONN_CAPS_SIZE) -> bytes:
    return struct.pack("<QBBBB", size, major, 0, 0, 0) + bytes(backends.RPC_CONN_CAPS_SIZE)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64), "does not speak"),
        (b"", "does not speak"),
        (hello(backends.RPC_PROTO_MAJOR + 1), f"version {backends.RPC_PROTO_MAJOR + 1} "),
        (hello(backends.RPC_PROTO_MAJOR, size=4), "another version"),
    ],
)
def test_another_server(answer: bytes, words: str) -> None:
    def reply(client: socket.socket) -> None:
        client.recv(64)
        client.sendall(answer)

    with server(reply) as port, pytest.raises(NativeError, match=re.escape(words)):
        backends._greet("127.0.0.1", port)


def test_a_server_of_this_version() -> None:
    received = []

    def reply(client: socket.socket) -> None:
        received.append(client.recv(64))
        client.sendall(hello(backends.RPC_PROTO_MAJOR))

    with server(reply) as port:
        backends._greet("127.0.0.1", port)
    assert received[0][0] == backends.RPC_CMD_HELLO
    assert len(received[0]) == 1 + 8 + backends.RPC_CONN_CAPS_SIZE


def test_the_constants_of_the_tree() -> None:
    """What the handshake takes from the tree is what the tree has."""
    source = ROOT / "build" / "native" / "llama.cpp" / "ggml"
    if not source.is_dir():
        pytest.skip("no tree in build/native")
    header = (source / "include" / "ggml-rpc.h").read_text("utf-8")
    assert f"RPC_PROTO_MAJOR_VERSION    {backends.RPC_PROTO_MAJOR}\n" in header
    code = (source / "src" / "ggml-rpc" / "ggml-rpc.cpp").read_text("utf-8")
    assert f"RPC_CMD_HELLO == {backends.RPC_CMD_HELLO}," in code
    transport = (source / "src" / "ggml-rpc" / "transport.h").read_text("utf-8")
    assert f"RPC_CONN_CAPS_SIZE = {backends.RPC_CONN_CAPS_SIZE};" in transport
    common = (source.parent / "common" / "common.h").read_text("utf-8")
    assert json.dumps(backends._EXPERTS) in common, "llama.cpp names the experts' tensors otherwise now"
