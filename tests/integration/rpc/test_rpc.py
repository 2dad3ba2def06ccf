"""The model spread over two ggml-rpc-server processes on the loopback, against one process without them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import NativeError, RoutingCounts, load_pairs, save_pairs
from steermoe_local.llama import backends, capi
from steermoe_local.llama.library import library_folder
from tests.support import rounding
from tests.support.low_level import F32, identity_of, lib, native_bias, random_signs
from tests.support.near_ties import near_ties_of_pairs
from tests.support.on_device import (
    ALL,
    DeviceContext,
    check_promise,
    check_sequences,
    check_token_rows,
    model_on,
    rows_of,
)
from tests.support.paths import ROOT
from tests.support.random_models import (
    GPT_OSS,
    N_EMBD,
    OLMOE,
    QWEN3MOE,
    SELECTION_BIAS,
    SIGMOID,
    RandomModel,
    write_random_model,
)

pytestmark = pytest.mark.rpc

PROGRAM = library_folder() / "ggml-rpc-server"  # built beside the libraries (make test-rpc)
MODELS = {"olmoe": OLMOE, "qwen3moe": QWEN3MOE, "gpt-oss": GPT_OSS, "sigmoid": SIGMOID, "bias": SELECTION_BIAS}
TOKENS = np.random.default_rng(3).integers(0, 64, 40).tolist()
N_PROMPT = 36
N_SUM = max(N_EMBD, len(TOKENS))  # products in the longest sum, that of a matrix or of the mixture of values
CACHE = {"type_kv": F32}  # with F32 weights nothing rounds in a coarser format

PathOf = Callable[[str], Path]


@contextmanager
def server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A ggml-rpc-server on a free port of the loopback, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [PROGRAM, "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=PROGRAM.parent,
    )
    try:
        for _ in range(100):
            assert process.poll() is None, "ggml-rpc-server ended"
            try:
                backends._greet("127.0.0.1", port)
                break
            except NativeError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def servers() -> Iterator[list[str]]:
    """Addresses of two servers, whose devices this process has, too."""
    with server() as (one, _), server() as (two, _):
        backends.add_rpc_servers([one, two])
        yield [one, two]


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> PathOf:
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> Path:
        return write_random_model(folder / f"{name}.gguf", MODELS[name])

    return make


@contextmanager
def spread(path: Path) -> Iterator[Any]:
    """The model, half of its layers on each server."""
    with model_on(path, ALL, devices=["RPC0", "RPC1"], tensor_split=[1, 1]) as model:
        yield model


def decode_all(context: Any) -> Any:
    parts = [context.fresh(TOKENS[:N_PROMPT])]
    parts += [context.decode([token], N_PROMPT + i) for i, token in enumerate(TOKENS[N_PROMPT:])]
    return np.concatenate(parts)


def signs_of(model: RandomModel) -> dict[int, Any]:
    rng = np.random.default_rng(7)
    return {
        layer: random_signs(rng, model.n_expert, model.k, 1, model.n_expert // 2)
        for layer in range(model.n_dense, model.n_layer)
    }


def bias_of(path: Path, rows: dict[int, Any], mode: str = "hard") -> capi.NativeBias:
    return native_bias(identity_of(path), rows, mode)


def test_devices(servers: list[str]) -> None:
    assert backends.device_names()[-2:] == ["RPC0", "RPC1"]
    backends.add_rpc_servers(servers)  # again
    assert backends.device_names()[-2:] == ["RPC0", "RPC1"]


@pytest.mark.parametrize("name", MODELS)
def test_logits(path_of: PathOf, servers: list[str], name: str) -> None:
    """Unsteered, steered, and not any more; zeros change no bit."""
    path, model = path_of(name), MODELS[name]
    found = []
    with model_on(path, 0, devices=()) as alone, spread(path) as both:
        for loaded in (alone, both):
            with DeviceContext(loaded, **CACHE) as context:
                plain = decode_all(context)
                zeros = {layer: np.zeros(model.n_expert) for layer in range(model.n_dense, model.n_layer)}
                capi.attach(context.ctx, bias_of(path, zeros))
                assert decode_all(context).tobytes() == plain.tobytes()
                capi.attach(context.ctx, bias_of(path, signs_of(model)))
                steered = decode_all(context)
                capi.detach(context.ctx)
                assert decode_all(context).tobytes() == plain.tobytes()
                found.append((plain, steered))
    for one, two in zip(*found, strict=True):
        assert np.abs(one - two).max() <= rounding.logits(one, model.n_layer, N_SUM)
    plain, steered = found[1]
    assert np.abs(steered - plain).max() > 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("mode", ["hard", "soft", "capped"])
@pytest.mark.parametrize("name", MODELS)
def test_promise(path_of: PathOf, servers: list[str], name: str, mode: str) -> None:
    path, model = path_of(name), MODELS[name]
    rows = {layer: 3 * row for layer, row in signs_of(model).items()} if mode == "soft" else signs_of(model)
    cap = 1.5
    with spread(path) as loaded, DeviceContext(loaded, capture=True, n_ubatch=16) as context:
        capi.attach(context.ctx, native_bias(identity_of(path), rows, mode, cap=cap))
        decode_all(context)
        for layer, row in rows.items():
            check_promise(context.seen, layer, capi.layer_info(context.ctx, layer), row, mode, cap=cap)
        assert context.hosts == {False}
        assert {place for place in context.places if any(address in place for address in servers)} == context.places
        assert len(context.places) == 2, "the layers are not on both servers"


@pytest.mark.parametrize("name", MODELS)
def test_sequences(path_of: PathOf, servers: list[str], name: str) -> None:
    """Differently steered sequences in one batch, half of the layers on each server."""
    path, model = path_of(name), MODELS[name]
    with spread(path) as loaded, DeviceContext(loaded, capture=True) as context:
        check_sequences(context, identity_of(path), range(model.n_dense, model.n_layer))
        assert context.hosts == {False}
        assert len(context.places) == 2, "the layers are not on both servers"


@pytest.mark.parametrize("name", MODELS)
def test_token_rows(path_of: PathOf, servers: list[str], name: str) -> None:
    """Differently steered tokens in one prompt, half of the layers on each server."""
    path, model = path_of(name), MODELS[name]
    with spread(path) as loaded, DeviceContext(loaded, capture=True) as context:
        check_token_rows(context, identity_of(path), range(model.n_dense, model.n_layer))
        assert context.hosts == {False}


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss", "sigmoid"])
def test_tensor_parallel(path_of: PathOf, servers: list[str], name: str) -> None:
    """-sm tensor: every layer's weights split over both servers, which llama.cpp cannot do for every architecture."""
    path, model, rows = path_of(name), MODELS[name], signs_of(MODELS[name])
    found = []
    for split_mode in (lib().LLAMA_SPLIT_MODE_LAYER, lib().LLAMA_SPLIT_MODE_TENSOR):
        with model_on(path, ALL, devices=["RPC0", "RPC1"], split_mode=split_mode) as loaded:
            params = capi.parallel_context_params(64, 64, 1, 1)
            params.flash_attn_type = backends.FLASH_ATTN["on"]  # it needs that
            ctx = capi.new_context(loaded.model, params)
            batch = lib().llama_batch_init(64, 0, 1)
            memory = lib().llama_get_memory(ctx)
            try:
                for signs in (None, rows):
                    if signs:
                        capi.attach(ctx, bias_of(path, signs))
                    lib().llama_memory_clear(memory, True)
                    capi.decode(ctx, batch, [(token, i, 0, True) for i, token in enumerate(TOKENS)])
                    found.append(np.ctypeslib.as_array(lib().llama_get_logits(ctx), (len(TOKENS), 64)).copy())
            finally:
                lib().llama_batch_free(batch)
                lib().llama_free(ctx)
    plain, steered, plain_split, steered_split = found
    # flash attention computes with K and V, and adds, in F16; llama.cpp casts a cache in F32, too
    for one, two in ((plain, plain_split), (steered, steered_split)):
        assert np.abs(one - two).max() <= rounding.logits(one, model.n_layer, N_SUM, rounding.F16)
    assert np.abs(steered - plain).max() > 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("stop", [False, True], ids=["", "stop"])
@pytest.mark.parametrize("name", MODELS)
def test_recorder(path_of: PathOf, servers: list[str], name: str, stop: bool) -> None:
    path, model = path_of(name), MODELS[name]
    shape, mask = (model.n_layer, model.n_expert), np.random.default_rng(1).integers(-1, 2, N_PROMPT).tolist()
    found, sums, traces = [], [], []
    with model_on(path, 0, devices=()) as alone, spread(path) as both:
        for loaded in (alone, both):
            recorder = capi.NativeRecorder(loaded.model, 2, shape, sums=True)
            with DeviceContext(loaded, recorder=recorder, n_ubatch=20, **CACHE) as context:
                recorder.bind(context.ctx)
                recorder.set_stop(stop)
                recorder.set_mask(mask)
                recorder.set_trace([True] * N_PROMPT, weights=True, logits=True)
                context.fresh(TOKENS[:N_PROMPT])
                traces.append(recorder.trace())
                recorder.set_stop(False)
                rest = np.concatenate([context.decode([t], N_PROMPT + i) for i, t in enumerate(TOKENS[N_PROMPT:])])
                found.append((np.array(recorder.counts()[0]).reshape(2, *shape), rest))
                sums.append([np.array(table).reshape(2, model.n_layer, -1) for table in recorder.sums()])
            recorder.close()
        with DeviceContext(both, capture=True, n_ubatch=20, **CACHE) as context:
            context.fresh(TOKENS[:N_PROMPT])
            chosen = {layer: rows_of(context.seen, "ffn_moe_topk", layer, model.k) for layer in signs_of(model)}
    expected = np.zeros((2, *shape), np.int64)
    for layer, topk in chosen.items():
        for bin_, experts in zip(mask, topk, strict=True):
            if bin_ >= 0:
                expected[bin_, layer, experts] += 1
        assert np.array_equal(traces[1].experts[:, layer], topk)
    assert np.array_equal(found[1][0], expected)
    assert np.array_equal(found[0][0], found[1][0]), "other counts than in one process"
    # of one token and expert, in units of its layer's deviation; a weight is off by at most twice as much, of 1
    off = N_PROMPT * rounding.logits([-1.0, 1.0], model.n_layer, N_SUM)
    for one, two, size in zip(*sums, (sums[0][0], sums[0][1], np.ones(1)), strict=True):
        assert one.any()
        assert np.abs(one - two).max() <= 2 * off * np.abs(size).max()
    assert np.nanmax(np.abs(traces[0].logits - traces[1].logits)) <= 2 * off * np.abs(sums[0][0]).max()
    assert np.abs(traces[0].weights - traces[1].weights).max() <= 2 * off
    assert np.abs(found[0][1] - found[1][1]).max() <= rounding.logits(found[0][1], model.n_layer, N_SUM)


def python(code: str, *args: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=folder,
        env=os.environ | {"STEERMOE_BIAS": ""},
    )


def steermoe(*args: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    return python("from steermoe_local.cli import main; main(prog_name='steermoe')", *args, folder=folder)


def test_command_line(servers: list[str], tiny_f32_path: Path, tmp_path: Path) -> None:
    """Detect, build and run the embedded model, all in F32, over both servers, and in one process."""
    f32 = ("-m", tiny_f32_path, "-ctk", "f32", "-ctv", "f32", "-t", 1)
    pairs, question = tmp_path / "p.jsonl", "Which number comes after three?"
    numbers = load_pairs(ROOT / "examples" / "pairs" / "numbers.jsonl")
    save_pairs([pair for pair in numbers if not near_ties_of_pairs(tiny_f32_path, [pair])], pairs)
    map_, bias, counts_file = (tmp_path / name for name in ("m.json", "b.gguf", "c.npz"))
    found: dict[str, Any] = {}
    for name, flags in (("alone", ()), ("spread", ("--rpc", ",".join(servers), "-ngl", "all", "-ts", "1,1"))):
        done = steermoe(
            *("detect", *f32, "--pairs", pairs, "-o", map_, "--counts", counts_file, *flags),
            folder=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        answers = []
        for extra in ((), ("--reverse",)):
            steermoe("bias", "build", map_, "-o", bias, "--activate", 8, "--deactivate", 8, *extra, folder=tmp_path)
            for steering in (("--bias", bias), ()):
                done = steermoe(
                    *("run", *f32, *steering, "--temp", 0, "-c", 256, "-p", question, *flags),
                    folder=tmp_path,
                )
                assert done.returncode == 0, done.stderr
                answers.append(done.stdout.strip())
        found[name] = RoutingCounts.load(counts_file), answers
    (one, answers), (two, spread_answers) = found["alone"], found["spread"]
    assert spread_answers == answers
    assert answers[0].isdigit()
    assert answers[2].isalpha()
    assert (one.n1, one.n2) == (two.n1, two.n2)
    for a, b in ((one.a1, two.a1), (one.a2, two.a2)):
        assert np.array_equal(a, b)


WENT_AWAY = """
import sys
from steermoe_local import NativeError, SteeredLlama
path, address = sys.argv[1:]
options = {"n_ctx": 64, "n_threads": 1, "n_gpu_layers": -1}
SteeredLlama(path, rpc_servers=[address], **options).close()
print("loaded", flush=True)
sys.stdin.readline()
SteeredLlama(path, **options).close()  # without the server, which this process still knows
try:
    SteeredLlama(path, rpc_servers=[address], **options)
except NativeError as error:
    print(error)
"""


def test_a_server_that_went_away(tiny_path: Path, tmp_path: Path) -> None:
    """One line, where llama.cpp would end the process; and other models still load."""
    with server() as (address, _):
        program = subprocess.Popen(
            [sys.executable, "-c", WENT_AWAY, str(tiny_path), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        assert program.stdout is not None
        assert program.stdout.readline() == "loaded\n"
    out, _ = program.communicate("\n", timeout=60)
    assert program.returncode == 0
    assert out.startswith(f"RPC server {address} cannot be reached")


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = steermoe("run", "-m", "tiny", "-p", "x", "--rpc", f"127.0.0.1:{port}", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: RPC server 127.0.0.1:{port} cannot be reached")
    assert done.stderr.count("\n") == 1
