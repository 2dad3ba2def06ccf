"""With all, some and none of the layers on a device: the promise, the logits, the recorder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, RoutingCounts, write_bias
from steermoe_local.llama import backends, capi
from tests.support import rounding
from tests.support.fused_routing import fused_routers, graphs_by_rule
from tests.support.low_level import identity_of, native_bias, random_signs
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
    N_VOCAB,
    OLMOE,
    QWEN3MOE,
    SELECTION_BIAS,
    SIGMOID,
    STEERABLE,
    TOP_1,
    RandomModel,
    write_random_model,
)

pytestmark = pytest.mark.device

DEVICE = os.environ.get("STEERMOE_TEST_DEVICE", "")

# CUDA has one kernel for experts of such widths, whatever the number of tokens, and captures graphs with it. Others go
# through cuBLAS or another kernel as an expert has many or few tokens, so that steering a token changes others' bits.
N_FF = 32
# Seeds: of a thousand those under which experts tie least, with the tokens and signs of these tests.
MODELS = {
    "olmoe": replace(OLMOE, n_ff=N_FF, seed=722),
    "qwen3moe": replace(QWEN3MOE, n_ff=N_FF, seed=595),
    "gpt-oss": replace(GPT_OSS, n_ff=N_FF, seed=984),
    "sigmoid": replace(SIGMOID, n_ff=N_FF, seed=825),
    "bias": replace(SELECTION_BIAS, n_ff=N_FF, seed=745),
}
STEERED = {name: MODELS.get(name, replace(TOP_1, n_ff=N_FF, seed=928)) for name in STEERABLE}
N_SINGLE = 4  # tokens that follow the prompt one by one

# exp in a shader: Vulkan asks for 3 + 2 |x| units in the last place, and logits here differ by less than 30. CUDA's
# __expf (ggml-cuda is built with -use_fast_math) has 2 + 1.2 |x|.
EXP = 2 * (3 + 2 * 30) * rounding.F32

PathOf = Callable[[str], Path]


def offloads(name: str) -> list[int]:
    """None, the output layer, all but the first of the others, all."""
    return [0, 1, MODELS[name].n_layer - 1, ALL]


def n_prompt(ngl: int) -> int:
    """From 32 tokens on, llama.cpp computes products of host weights on the device (op_offload); slow on lavapipe."""
    return 34 if ngl == 1 else 6


CASES = [(name, ngl) for name in MODELS for ngl in offloads(name)]
by_case = pytest.mark.parametrize(("name", "ngl"), CASES, ids=[f"{n}-{'all' if g == ALL else g}" for n, g in CASES])


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> PathOf:
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> Path:
        return write_random_model(folder / f"{name}.gguf", (MODELS | STEERED)[name])

    return make


@pytest.fixture(scope="module", autouse=True)
def _a_device() -> None:
    assert DEVICE in backends.device_names(), f"no device {DEVICE}; run by make test-vulkan or make test-cuda"


def tokens_of(ngl: int) -> list[int]:
    return np.random.default_rng(3).integers(0, N_VOCAB, n_prompt(ngl) + N_SINGLE).tolist()


def signs_of(model: RandomModel, n_plus: int = 1, n_minus: int | None = None, seed: int = 7) -> dict[int, Any]:
    rng = np.random.default_rng(seed)
    n_minus = model.n_expert // 2 if n_minus is None else n_minus
    return {
        layer: random_signs(rng, model.n_expert, model.k, n_plus, n_minus)
        for layer in range(model.n_dense, model.n_layer)
    }


def decode_all(context: Any, tokens: list[int]) -> Any:
    start = len(tokens) - N_SINGLE
    parts = [context.fresh(tokens[:start])]
    parts += [context.decode([tokens[i]], i) for i in range(start, len(tokens))]
    return np.concatenate(parts)


def allowance(wanted: Any, model: RandomModel) -> float:
    """Of logits [tokens, vocabulary]: products on the device may round their factors and partial sums to F16."""
    return rounding.logits(wanted, model.n_layer, max(N_EMBD, len(wanted)), rounding.F16, rounding.F16)


def assert_close(found: Any, wanted: Any, model: RandomModel) -> None:
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= allowance(wanted, model)


def choices(loaded: Any, model: RandomModel, parts: list[tuple[capi.NativeBias | None, list[int]]]) -> Any:
    """The experts of each token in each layer [tokens, layers, k], of parts of a text that are steered apart."""
    with DeviceContext(loaded, capture=True) as context:
        place = 0
        for bias, tokens in parts:
            capi.attach(context.ctx, bias) if bias else capi.detach(context.ctx)
            context.decode(tokens, place)
            place += len(tokens)
        moe = range(model.n_dense, model.n_layer)
        found = [np.sort(rows_of(context.seen, "ffn_moe_topk", layer, model.k), axis=1) for layer in moe]
        return np.stack(found, axis=1)


def n_alike(one: Any, other: Any) -> int:
    """How many tokens from the first on have the same experts in both.

    All; but CUDA rounds factors to TF32, which may part experts that all but tie. Later tokens attend to such a token.
    """
    differs = (one != other).any(axis=(1, 2))
    n = int(np.argmax(differs)) if differs.any() else len(one)
    least = len(one) / 2 if DEVICE == "CUDA0" else len(one)
    assert n >= least, f"another routing than on the CPU from token {n} of {len(one)} on"
    return n


def bias_of(path: Path, rows: dict[int, Any], mode: str = "hard") -> capi.NativeBias:
    return native_bias(identity_of(path), rows, mode)


#
# logits
#


@by_case
def test_logits_are_those_of_the_cpu(path_of: PathOf, name: str, ngl: int) -> None:
    """Unsteered and steered; and with zeros bit for bit as without a bias."""
    path, model = path_of(name), MODELS[name]
    tokens = tokens_of(ngl)
    found, chosen = {}, {}
    for where, layers, devices in (("cpu", 0, ()), ("device", ngl, None)):
        with model_on(path, layers, devices=devices) as loaded:
            with DeviceContext(loaded) as context:
                plain = decode_all(context, tokens)
                zeros = {layer: np.zeros(model.n_expert) for layer in range(model.n_dense, model.n_layer)}
                capi.attach(context.ctx, bias_of(path, zeros))
                assert decode_all(context, tokens).tobytes() == plain.tobytes(), "a bias of zeros changes the bits"
                capi.attach(context.ctx, bias_of(path, signs_of(model)))
                steered = decode_all(context, tokens)
                capi.detach(context.ctx)
                assert decode_all(context, tokens).tobytes() == plain.tobytes(), "steering does not end"
            found[where] = plain, steered
            biases = (None, bias_of(path, signs_of(model)))
            chosen[where] = [choices(loaded, model, [(bias, tokens)]) for bias in biases]
    for on_device, on_cpu, *experts in zip(found["device"], found["cpu"], chosen["device"], chosen["cpu"], strict=True):
        n = n_alike(*experts)
        assert_close(on_device[:n], on_cpu[:n], model)
    assert np.abs(found["cpu"][1] - found["cpu"][0]).max() > 3 * allowance(found["cpu"][0], model), (
        "steering moves the logits too little for this test to see"
    )


#
# the promise
#


def run_captured(
    path: Path,
    loaded: Any,
    model: RandomModel,
    rows: dict[int, Any],
    mode: str = "hard",
    tokens: Any = None,
    cap: float = float("inf"),
) -> set[bool]:
    tokens = tokens or tokens_of(ALL)
    n_ubatch = 4 if len(tokens) < 32 else 512
    with DeviceContext(loaded, capture=True, n_ubatch=n_ubatch) as context:
        capi.attach(context.ctx, native_bias(identity_of(path), rows, mode, cap=cap))
        decode_all(context, tokens)
        for layer, row in rows.items():
            info = capi.layer_info(context.ctx, layer)
            assert info.steered
            check_promise(context.seen, layer, info, row, mode, exp=EXP, cap=cap)
        return context.hosts


HARD = {
    "mixed": lambda m: signs_of(m),
    "k on, the rest off": lambda m: signs_of(m, m.k, m.n_expert - m.k),
    "all but k off": lambda m: signs_of(m, 0, m.n_expert - m.k),
    "k on": lambda m: signs_of(m, m.k, 0),
}


@by_case
def test_hard_rule(path_of: PathOf, name: str, ngl: int) -> None:
    path, model = path_of(name), MODELS[name]
    with model_on(path, ngl) as loaded:
        for make in HARD.values():
            hosts = run_captured(path, loaded, model, make(model), tokens=tokens_of(ngl))
        if ngl in (0, ALL):
            assert hosts == {ngl == 0}, "layers are not where they should be"


@pytest.mark.parametrize("ngl", [2, ALL])
@pytest.mark.parametrize("name", MODELS)
def test_soft_rule(path_of: PathOf, name: str, ngl: int) -> None:
    path, model = path_of(name), MODELS[name]
    rng = np.random.default_rng(5)
    rows = {layer: rng.normal(scale=3, size=model.n_expert) for layer in range(model.n_dense, model.n_layer)}
    with model_on(path, ngl) as loaded:
        run_captured(path, loaded, model, rows, "soft")


@pytest.mark.parametrize("ngl", [2, ALL])
@pytest.mark.parametrize("name", MODELS)
def test_capped_rule(path_of: PathOf, name: str, ngl: int) -> None:
    path, model = path_of(name), MODELS[name]
    with model_on(path, ngl) as loaded:
        for cap in (0.25, 3.0):
            run_captured(path, loaded, model, signs_of(model), "capped", cap=cap)


@by_case
def test_sequences(path_of: PathOf, name: str, ngl: int) -> None:
    """Differently steered sequences in one batch."""
    path, model = path_of(name), MODELS[name]
    with model_on(path, ngl) as loaded, DeviceContext(loaded, capture=True) as context:
        check_sequences(context, identity_of(path), range(model.n_dense, model.n_layer), EXP)


@by_case
def test_token_rows(path_of: PathOf, name: str, ngl: int) -> None:
    """Differently steered tokens in one prompt."""
    path, model = path_of(name), MODELS[name]
    with model_on(path, ngl) as loaded, DeviceContext(loaded, capture=True) as context:
        check_token_rows(context, identity_of(path), range(model.n_dense, model.n_layer), EXP)


@pytest.mark.parametrize("ngl", [2, ALL])
@pytest.mark.parametrize("name", MODELS)
def test_set_swap_and_clear(path_of: PathOf, name: str, ngl: int) -> None:
    """In one context, with another topology each time, as in a context of its own."""
    path, model = path_of(name), MODELS[name]
    tokens = tokens_of(ngl)
    one = signs_of(model)
    same_places = {layer: -row if (row > 0).sum() == 0 else np.roll(row, 1) for layer, row in one.items()}
    last_alone = {model.n_layer - 1: one[model.n_layer - 1]}
    steps = [one, same_places, None, last_alone, one]
    with model_on(path, ngl) as loaded:
        alone = []
        for rows in steps:
            with DeviceContext(loaded) as context:
                if rows:
                    capi.attach(context.ctx, bias_of(path, rows))
                alone.append(decode_all(context, tokens))
        with DeviceContext(loaded) as context:
            for rows, wanted in zip(steps, alone, strict=True):
                capi.attach(context.ctx, bias_of(path, rows)) if rows else capi.detach(context.ctx)
                assert decode_all(context, tokens).tobytes() == wanted.tobytes()
        assert not np.array_equal(alone[0], alone[1])
        assert not np.array_equal(alone[0], alone[3])


#
# where tensors lie
#


@pytest.mark.parametrize("name", MODELS)
def test_experts_on_the_cpu(path_of: PathOf, name: str) -> None:
    """--n-cpu-moe: the experts' weights on the CPU, everything else on the device; routing and steering as before."""
    path, model = path_of(name), MODELS[name]
    tokens, rows = tokens_of(ALL), signs_of(model)
    found = {}
    for n_cpu in (0, 2, None):
        with model_on(path, ALL, overrides=backends.cpu_moe_patterns(n_cpu)) as loaded:
            run_captured(path, loaded, model, rows)
            with DeviceContext(loaded) as context:
                logits = decode_all(context, tokens)
            found[n_cpu] = logits, choices(loaded, model, [(None, tokens)])
    for n_cpu in (2, None):
        n = n_alike(found[n_cpu][1], found[0][1])
        assert_close(found[n_cpu][0][:n], found[0][0][:n], model)


#
# the recorder
#


@by_case
@pytest.mark.parametrize("stop", [False, True], ids=["", "stop"])
def test_recorder(path_of: PathOf, name: str, ngl: int, stop: bool) -> None:
    """Counts equal the choices of the same configuration, and nearly the CPU's; what follows a stop is right."""
    path, model = path_of(name), MODELS[name]
    tokens, shape, start = tokens_of(ngl), (model.n_layer, model.n_expert), n_prompt(ngl)
    mask = np.random.default_rng(1).integers(-1, 2, start).tolist()
    steered = signs_of(model, seed=8)
    with model_on(path, ngl) as loaded:
        wanted = counts_by_capture(path, loaded, model, tokens, mask, {})
        wanted_steered = counts_by_capture(path, loaded, model, tokens, mask, steered)
        with DeviceContext(loaded) as plain:
            logits = decode_all(plain, tokens)
        recorder = capi.NativeRecorder(loaded.model, 2, shape)
        with DeviceContext(loaded, recorder=recorder, n_ubatch=4 if start < 32 else 512) as context:
            recorder.bind(context.ctx)
            recorder.set_stop(stop)
            for rows, expected in (({}, wanted), (steered, wanted_steered)):
                if rows:
                    capi.attach(context.ctx, bias_of(path, rows))
                recorder.reset()
                recorder.set_mask(mask)
                recorder.set_trace([bin_ >= 0 for bin_ in mask], weights=True, logits=True)
                context.fresh(tokens[:start])
                counts, seen = recorder.counts()
                check_trace(recorder.trace(), [bin_ for bin_ in mask if bin_ >= 0], expected)
                assert np.array_equal(np.array(counts).reshape(2, *shape), expected)
                per_bin = [mask.count(0), mask.count(1)]
                moe = range(model.n_dense, model.n_layer)
                assert np.array(seen).reshape(2, -1)[:, moe].tolist() == [[n] * len(moe) for n in per_bin]
            # the memory that a stopped graph wrote serves a whole one
            capi.detach(context.ctx)
            recorder.set_mask(mask)
            context.fresh(tokens[:start])
            recorder.set_stop(False)
            rest = np.concatenate([context.decode([tokens[i]], i) for i in range(start, len(tokens))])
            assert np.isfinite(rest).all()
            assert np.abs(rest - logits[start:]).max() <= allowance(logits, model)
        recorder.close()
        with DeviceContext(loaded) as plain:
            assert decode_all(plain, tokens).tobytes() == logits.tobytes(), "a later context is not right"
    with model_on(path, 0, devices=()) as loaded:
        on_cpu = counts_by_capture(path, loaded, model, tokens, mask, {})
    assert np.abs(wanted - on_cpu).sum() <= 0.02 * on_cpu.sum(), "another routing than on the CPU"


def check_trace(trace: capi.Trace, bins: list[int], counts: Any) -> None:
    """The traced tokens are the counted ones."""
    assert trace.weights is not None
    assert trace.logits is not None
    n_layer, n_expert = counts.shape[1:]
    for bin_ in (0, 1):
        for layer in range(n_layer):
            experts = trace.experts[np.array(bins) == bin_, layer]
            found = np.bincount(experts[experts >= 0], minlength=n_expert)
            assert np.array_equal(found, counts[bin_, layer])
    routed = trace.experts >= 0
    assert (trace.weights[routed] > 0).all()
    assert np.isfinite(trace.logits[routed.any(axis=2)]).all()


def counts_by_capture(
    path: Path, loaded: Any, model: RandomModel, tokens: list[int], mask: list[int], rows: dict[int, Any]
) -> Any:
    counts = np.zeros((2, model.n_layer, model.n_expert), np.int64)
    with DeviceContext(loaded, capture=True, n_ubatch=4 if len(mask) < 32 else 512) as context:
        if rows:
            capi.attach(context.ctx, bias_of(path, rows))
        context.fresh(tokens[: len(mask)])
        for layer in range(model.n_dense, model.n_layer):
            topk = rows_of(context.seen, "ffn_moe_topk", layer, model.k)
            for bin_, chosen in zip(mask, topk, strict=True):
                if bin_ >= 0:
                    counts[bin_, layer, chosen] += 1
    return counts


#
# fused top-k and captured graphs: only without a callback, so another process, whose graphs nobody looks into
#


@dataclass(frozen=True)
class Backend:
    """What a backend's log says of its nodes, and the variables that it reads."""

    name: str
    fused: str  # a pattern that the log has where a router was fused
    unfused: dict[str, str]
    log: dict[str, str]


OF_DEVICE = {
    "Vulkan0": Backend("Vulkan", "TOPK_MOE", {"GGML_VK_DISABLE_FUSION": "1"}, {"GGML_VK_PERF_LOGGER": "1"}),
    # built with -DGGML_CUDA_DEBUG=on
    # (not the weighted sum of the experts, nor their gates, which it fuses, too)
    "CUDA0": Backend(
        "CUDA",
        r"nodes_fused: \d+, first: (?:SOFT_MAX|UNARY|ARGSORT) \(ffn_moe_(?:probs|argsort)-",
        {"GGML_CUDA_DISABLE_FUSION": "1"},
        {},
    ),
}
# CUDA fuses powers of two alone
FUSED = MODELS | {
    "gpt-oss of 8": replace(MODELS["gpt-oss"], n_expert=8, k=2),
    "sigmoid norm": replace(MODELS["sigmoid"], norm=True),
    "sigmoid bias norm": replace(MODELS["bias"], gating=2, norm=True),
}


def drive(output: Path, model: Path, bias: Path | None, *later: Path, **env: str) -> tuple[Any, str]:
    """Logits of driver.py with all layers on the device, and what the backend says of its nodes."""
    environment = {k: v for k, v in os.environ.items() if k != "STEERMOE_BIAS"} | env
    if bias:
        environment["STEERMOE_BIAS"] = str(bias)
    code = f"import sys; sys.path.append({str(ROOT)!r}); from tests.integration.devices.driver import main; main()"
    done = python(code, model, output, *later, env=environment, folder=output.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(output), done.stderr + done.stdout


def python(code: str, *args: Any, folder: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder,
    )


def write_signs(path: Path, model: Path, rows: dict[int, Any]) -> Path:
    identity = identity_of(model)
    signs = np.zeros(identity.shape)
    for layer, row in rows.items():
        signs[layer] = row
    write_bias(BiasFile.from_signs(signs, identity), path)
    return path


@pytest.mark.parametrize("name", FUSED)
def test_fused_top_k(tmp_path: Path, name: str) -> None:
    """The backend fuses the routers that tests/support/fused_routing.py says, with the same result."""
    backend, model = OF_DEVICE[DEVICE], FUSED[name]
    path = write_random_model(tmp_path / "model.gguf", model)
    with model_on(path, 0, devices=()) as loaded:
        graphs = graphs_by_rule(loaded, identity_of(path), n_tokens=(6,))
    wanted = [any(fused_routers(graphs[rule, 6], backend.name).values()) for rule in ("none", "hard")]
    bias = write_signs(tmp_path / "b.gguf", path, signs_of(model))
    plain, plain_log = drive(tmp_path / "p.npy", path, None, **backend.log)
    fused, fused_log = drive(tmp_path / "f.npy", path, bias, **backend.log)
    apart, apart_log = drive(tmp_path / "a.npy", path, bias, **backend.log, **backend.unfused)
    found = [re.search(backend.fused, log) is not None for log in (plain_log, fused_log, apart_log)]
    assert found == [*wanted, False]
    assert np.abs(fused - apart).max() <= allowance(apart, model)
    assert np.abs(fused - plain).max() > 3 * allowance(plain, model), "not steered"


@pytest.mark.skipif(DEVICE != "CUDA0", reason="only CUDA captures graphs")
@pytest.mark.parametrize("name", STEERED)
def test_captured_graphs(path_of: PathOf, name: str, tmp_path: Path) -> None:
    """A graph that CUDA captured follows a change of steering, and has the bits of operations one by one."""
    path, model = path_of(name), STEERED[name]
    one = write_signs(tmp_path / "one.gguf", path, signs_of(model))
    two = write_signs(tmp_path / "two.gguf", path, {layer: np.roll(row, 1) for layer, row in signs_of(model).items()})
    captured, log = drive(tmp_path / "c.npy", path, one, two)
    launched, other_log = drive(tmp_path / "l.npy", path, one, two, GGML_CUDA_DISABLE_GRAPHS="1")
    assert ["CUDA graph warmup complete" in text for text in (log, other_log)] == [True, False]
    assert captured.tobytes() == launched.tobytes()
    tokens = np.random.default_rng(3).integers(0, N_VOCAB, len(captured)).tolist()
    parts = [
        (capi.NativeBias.load(one), tokens[:12]),
        (capi.NativeBias.load(two), tokens[12:18]),
        (None, tokens[18:]),
    ]
    with model_on(path, ALL) as loaded:
        on_device = choices(loaded, model, parts)
    with model_on(path, 0, devices=()) as loaded:
        n = n_alike(on_device, choices(loaded, model, parts))
        with DeviceContext(loaded) as context:
            found = []
            for bias, some in parts:
                capi.attach(context.ctx, bias) if bias else capi.detach(context.ctx)
                found.append(context.decode(some, sum(map(len, found))))
    assert_close(captured[:n], np.concatenate(found)[:n], model)


#
# the embedded model through the command line
#


def test_detect_and_steer(tmp_path: Path) -> None:
    def steermoe(*args: Any) -> str:
        done = python("from steermoe_local.cli import main; main(prog_name='steermoe')", *args, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pairs, question = ROOT / "examples" / "pairs" / "numbers.jsonl", "Which number comes after three?"
    map_, bias, counts_file = (tmp_path / name for name in ("m.json", "b.gguf", "c.npz"))
    found = {}
    for where in (("-dev", "none"), ("-ngl", "all", "-ncmoe", "2"), ("-ngl", "3")):
        steermoe("detect", "-m", "tiny", "--pairs", pairs, "-o", map_, "--counts", counts_file, "-t", 1, *where)
        found[where] = RoutingCounts.load(counts_file)
        for extra, expected in (((), str.isdigit), (("--reverse",), str.isalpha)):
            steermoe("bias", "build", map_, "-o", bias, "--activate", 8, "--deactivate", 8, *extra)
            answer = steermoe(
                "run", "-m", "tiny", "--bias", bias, "--temp", 0, "-t", 1, "-c", 256, "-p", question, *where
            )
            assert expected(answer.strip()), (where, extra, answer)
    cpu = found[("-dev", "none")]
    for counts in found.values():
        assert (counts.n1, counts.n2) == (cpu.n1, cpu.n2)
        for one, two in ((counts.a1, cpu.a1), (counts.a2, cpu.a2)):
            assert np.abs(one - two).sum() <= 0.02 * two.sum(), "another routing than on the CPU"
