"""One model, many quantizations: the same router hash, the same bias file, the same promise; and no other model's bias.

The files are made by llama.cpp's own quantizer, `llama_model_quantize`; llama-quantize is its command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ModelIdentity, model_info, read_bias, write_bias
from steermoe_local.errors import ModelMismatchError
from steermoe_local.llama import capi
from steermoe_local.model_files.header import read_header
from tests.support.low_level import Context, identity_of, internals, lib, open_model, random_signs
from tests.support.wide_models import GPT_OSS, OLMOE, QWEN3MOE, SIGMOID_BIAS, write_wide_model

pytestmark = pytest.mark.numeric

# name: (llama.h: enum llama_ftype, type of most weights, its replacement in rows that are no multiple of 256)
KINDS = {
    "F32": (0, "F32", "F32"),
    "BF16": (32, "BF16", "BF16"),
    "F16": (1, "F16", "F16"),
    "Q8_0": (7, "Q8_0", "Q8_0"),
    "Q6_K": (18, "Q6_K", "Q8_0"),
    "Q5_K_M": (17, "Q5_K", "Q5_1"),
    "Q4_K_M": (15, "Q4_K", "Q5_0"),
    "Q4_0": (2, "Q4_0", "Q4_0"),
    "IQ4_XS": (30, "IQ4_XS", "IQ4_NL"),
    "MXFP4_MOE": (38, "MXFP4", "MXFP4"),
}
RANDOM = {"olmoe": OLMOE, "qwen3moe": QWEN3MOE, "gpt-oss": GPT_OSS, "dots1": SIGMOID_BIAS}
# MXFP4 is how gpt-oss is published: its experts, and Q8_0 for the rest
CASES = [(model, kind) for model in ("tiny", *RANDOM) for kind in KINDS if kind != "MXFP4_MOE" or model == "gpt-oss"]
PROMPT, REPLY = list(range(3, 27)), [5, 40, 17]


@dataclass(frozen=True)
class Base:
    """A model before it is quantized, a bias file made for it, and one for a model that differs in one weight."""

    path: Path
    identity: ModelIdentity
    bias: Path
    foreign: Path


@dataclass(frozen=True)
class Case:
    """One quantization of a base, loaded."""

    base: Base
    kind: str
    path: Path
    model: Any


@pytest.fixture(scope="module")
def bases(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("quantization")
    paths = {"tiny": tiny_path}
    for name, description in RANDOM.items():
        paths[name] = write_wide_model(folder / f"{name}.gguf", description)
    bases = {}
    for name, path in paths.items():
        other = identity_of(with_another_weight(path, folder / "other.gguf"))
        identity, bias, foreign = identity_of(path), folder / f"{name}.bias.gguf", folder / f"{name}.foreign.gguf"
        write_bias(BiasFile.from_signs(signs_for(path), identity), bias)
        write_bias(BiasFile.from_signs(signs_for(path), other), foreign)
        bases[name] = Base(path, identity, bias, foreign)
    return bases


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, bases: dict[str, Base], tmp_path_factory: Any) -> Iterator[Case]:
    name, kind = request.param
    path = tmp_path_factory.mktemp("quantized") / f"{name}-{kind}.gguf"
    quantize(bases[name].path, path, kind)
    model = open_model(path)
    yield Case(bases[name], kind, path, model)
    model.close()
    path.unlink()


def quantize(source: Path, target: Path, kind: str) -> None:
    internals()  # llama.cpp's log off
    params = lib().llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, KINDS[kind][0]
    assert lib().llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


def with_another_weight(path: Path, copy: Path) -> Path:
    """A model with the same everything but the lowest bit of one router weight, in the last layer."""
    data = bytearray(path.read_bytes())
    layer = model_info(path).moe_layers[-1]
    data[read_header(path).tensors[f"blk.{layer}.ffn_gate_inp.weight"].offset] ^= 1
    copy.write_bytes(data)
    return copy


def signs_for(path: Path) -> Any:
    """Signs for every MoE layer: some of both kinds, and at least one expert left alone."""
    info = model_info(path)
    k, n = info.n_expert_used, info.n_expert
    rng = np.random.default_rng(12)
    signs = np.zeros((info.n_layer, n), np.float32)
    for layer in info.moe_layers:
        signs[layer] = random_signs(rng, n, k, k // 2, min(n - k, n // 3))
    return signs


def selected(case: Case, *biases: capi.NativeBias) -> dict[int, Any]:
    """The experts of each MoE layer, [tokens, k]: of a prompt in one batch, then of single tokens."""
    with Context(case.model, capture=True, n_ctx=64) as context:
        for bias in biases:
            capi.attach(context.ctx, bias)
        logits = [context.decode(PROMPT)]
        logits += [context.decode([token], len(PROMPT) + i) for i, token in enumerate(REPLY)]
        assert all(np.isfinite(part).all() for part in logits)
        layers = [layer for layer in range(case.base.identity.n_layer) if f"ffn_moe_topk-{layer}" in context.seen]
        k = case.base.identity.n_expert_used
        topk = {il: np.concatenate([t.reshape(-1, k) for t in context.seen[f"ffn_moe_topk-{il}"]]) for il in layers}
    assert all(rows.shape == (len(PROMPT) + len(REPLY), k) for rows in topk.values())
    return topk


def broken(topk: dict[int, Any], signs: Any) -> int:
    """How often the promise is broken: +1 experts that a token does not select, -1 experts that it does."""
    count = 0
    for layer, rows in topk.items():
        for expert in np.flatnonzero(signs[layer]):
            chosen = (rows == expert).any(axis=1)
            count += int((chosen != (signs[layer, expert] > 0)).sum())
    return count


def test_the_weights_have_the_type(case: Case) -> None:
    """Else the other tests would say nothing about it."""
    _, kind, fallback = KINDS[case.kind]
    tensors = read_header(case.path).tensors.values()
    weights = Counter[str]()
    for tensor in tensors:
        if tensor.name.endswith("_exps.weight"):
            weights[tensor.type.name] += tensor.n_bytes
            if "down" not in tensor.name:
                assert tensor.type.name == kind
            elif tensor.shape[0] % 256:
                assert tensor.type.name in (fallback, "Q8_0")  # Q8_0: the finer one of a mixture
    assert weights.most_common(1)[0][0] == kind
    assert model_info(case.path).file_type == case.kind
    assert {tensor.type.name for tensor in tensors if "ffn_gate_inp" in tensor.name} == {"F32"}


def test_the_router_hash_stays(case: Case) -> None:
    assert model_info(case.path).require_moe() == case.base.identity
    assert capi.router_sha256(case.model.model) == case.base.identity.router_sha256


def test_the_bias_is_accepted_and_keeps_its_promise(case: Case) -> None:
    bias = read_bias(case.base.bias)
    assert bias.check(model_info(case.path).require_moe(), str(case.base.bias), str(case.path)) == []
    plain = selected(case)
    assert sorted(plain) == list(model_info(case.path).moe_layers)
    assert broken(plain, bias.dense()) > len(PROMPT), "the unsteered model routes this way by itself"
    steered = selected(case, capi.NativeBias.load(case.base.bias))
    assert broken(steered, bias.dense()) == 0


def test_the_bias_of_another_model_is_refused(case: Case) -> None:
    """The other model has the same shape; one bit of one router weight is another."""
    bias, identity = read_bias(case.base.foreign), model_info(case.path).require_moe()
    assert bias.identity != identity
    with pytest.raises(ModelMismatchError, match=r"another .*; run steermoe"):
        bias.check(identity, "b.gguf", "m.gguf")
    with (
        Context(case.model, n_ctx=64) as context,
        pytest.raises(ModelMismatchError, match=rf"{case.base.foreign.name}: made for {identity.architecture} \("),
    ):
        capi.attach(context.ctx, capi.NativeBias.load(case.base.foreign))


def test_the_program_writes_the_same_file(tool: Any, bases: dict[str, Base], tmp_path: Path) -> None:
    """So what is shown of the function's files holds for llama-quantize's."""
    quantize(bases["qwen3moe"].path, tmp_path / "function.gguf", "Q4_K_M")
    done = tool("llama-quantize", bases["qwen3moe"].path, tmp_path / "program.gguf", "Q4_K_M", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "function.gguf").read_bytes() == (tmp_path / "program.gguf").read_bytes()
