"""`SteeredLlama`: the arguments, the KV cache, the prompt cache, the environment."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ModelError, ModelMismatchError, SteeredLlama, read_bias, write_bias
from steermoe_local.errors import FormatError
from steermoe_local.llama import steered_llama
from steermoe_local.llama.steered_llama import native_bias
from tests.support.low_level import identity_of, lib, random_signs
from tests.support.random_models import OLMOE

TEXT = "one, two, three"


@pytest.fixture(scope="module")
def biases(tiny_path: Path) -> list[BiasFile]:
    """Three biases for the embedded model: two hard ones and a soft one."""
    identity = identity_of(tiny_path)
    rng = np.random.default_rng(2)

    def signs() -> Any:
        k, n = identity.n_expert_used, identity.n_expert
        return np.stack([random_signs(rng, n, k, 2, n // 3) for _ in range(identity.n_layer)])

    soft = rng.normal(size=identity.shape)
    return [
        BiasFile.from_signs(signs(), identity),
        BiasFile.from_signs(signs(), identity),
        BiasFile.from_soft(soft, identity),
    ]


@pytest.fixture(scope="module")
def llama(tiny_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(tiny_path, n_ctx=256, n_threads=1, logits_all=True)
    yield model
    model.close()


def logits(model: Any, text: str = TEXT) -> Any:
    """Logits of a text, evaluated on an empty KV cache."""
    model.reset()
    tokens = model.tokenize(text.encode())
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def fresh(path: Path, bias: Any = None) -> Any:
    model = SteeredLlama(path, bias=bias, n_ctx=256, n_threads=1, logits_all=True)
    try:
        return logits(model)
    finally:
        model.close()


def test_set_swap_and_clear(llama: SteeredLlama, tiny_path: Path, biases: list[BiasFile]) -> None:
    plain = logits(llama)
    assert llama.bias is None
    for bias in (*biases, biases[0]):
        llama.bias = bias
        assert llama.bias is bias
        steered = logits(llama)
        assert np.array_equal(steered, fresh(tiny_path, bias))
        assert not np.array_equal(steered, plain)
    llama.bias = None
    assert np.array_equal(logits(llama), plain)
    assert np.array_equal(fresh(tiny_path), plain)


def test_equal_to_a_plain_llama(llama: SteeredLlama, tiny_path: Path) -> None:
    plain = lib().Llama(str(tiny_path), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    assert np.array_equal(logits(llama), logits(plain))
    plain.close()


def complete(model: Any, prompt: str) -> str:
    answer = model.create_completion(prompt, max_tokens=12, temperature=0)
    return str(answer["choices"][0]["text"])


def test_the_kv_cache_is_dropped(llama: SteeredLlama, biases: list[BiasFile]) -> None:
    """`Llama.generate` reuses the matching prefix of the KV cache, which the old steering filled."""
    llama.reset()
    llama.bias = None
    before = complete(llama, TEXT)
    llama.bias = biases[0]
    assert llama.n_tokens == 0, "the prefix would be reused"
    steered = complete(llama, TEXT)
    last = np.array(llama.scores[: llama.n_tokens])
    llama.bias = None
    assert complete(llama, TEXT) == before
    llama.bias = biases[0]
    assert complete(llama, TEXT) == steered
    assert np.array_equal(np.array(llama.scores[: llama.n_tokens]), last)
    llama.bias = None


def test_the_prompt_cache_is_kept_apart_by_steering(
    llama: SteeredLlama, tiny_path: Path, biases: list[BiasFile]
) -> None:
    from llama_cpp import LlamaRAMCache

    inner = LlamaRAMCache()
    tokens = llama.tokenize(TEXT.encode())
    try:
        llama.set_cache(inner)
        texts: dict[int, str] = {}
        for number, bias in enumerate([None, *biases]):
            llama.bias = bias
            assert tokens not in llama.cache, "a state of another steering is offered"
            texts[number] = complete(llama, TEXT)
            assert tokens in llama.cache
        assert len(inner.cache_state) == 4
        assert llama.cache.cache_size == inner.cache_size > 0
        for number, bias in enumerate([None, *biases]):
            llama.bias = bias
            llama.reset()
            assert complete(llama, TEXT) == texts[number]
        llama.bias = None
        with pytest.raises(KeyError):
            llama.cache[llama.tokenize(b"never seen before")[1:]]
        assert llama.tokenize(b"z")[-1:] not in llama.cache
        # an equal bias of another object is the same steering
        llama.bias = BiasFile(biases[0].identity, "hard", dict(biases[0].values))
        assert tokens in llama.cache
        llama.bias = BiasFile(biases[0].identity, "hard", dict(biases[0].values), epsilon=0.02)
        assert tokens not in llama.cache
    finally:
        llama.set_cache(None)
        llama.bias = None


def test_layer_info(llama: SteeredLlama, biases: list[BiasFile], tiny_path: Path) -> None:
    identity = identity_of(tiny_path)
    one = BiasFile(identity, "hard", {0: biases[0].values[0]})
    llama.bias = one
    infos = llama.layer_info()
    llama.bias = None
    assert [info.steered for info in infos] == [True] + [False] * (identity.n_layer - 1)
    assert all(info.steerable and info.gating == "softmax" for info in infos)
    assert {(info.n_expert, info.n_expert_used) for info in infos} == {(identity.n_expert, identity.n_expert_used)}


def test_a_path_as_bias(llama: SteeredLlama, tmp_path: Path, tiny_path: Path, biases: list[BiasFile]) -> None:
    write_bias(biases[2], tmp_path / "b.gguf")
    llama.bias = tmp_path / "b.gguf"
    assert llama.bias is not None
    assert llama.bias.mode == "soft"
    steered = logits(llama)
    llama.bias = None
    assert np.array_equal(steered, fresh(tiny_path, str(tmp_path / "b.gguf")))
    assert np.array_equal(steered, fresh(tiny_path, read_bias(tmp_path / "b.gguf")))


def test_errors(
    llama: SteeredLlama, tmp_path: Path, tiny_path: Path, biases: list[BiasFile], random_model: Any
) -> None:
    with pytest.raises(TypeError, match="'n_ctxx'"):
        SteeredLlama(tiny_path, n_ctxx=1)
    with pytest.raises(ModelError, match=r"missing\.gguf: "):
        SteeredLlama(tmp_path / "missing.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=re.escape(f"{damaged}: ")):
        SteeredLlama(damaged)
    damaged.write_bytes(b"GGUF")
    llama.bias = biases[0]
    steered = logits(llama)
    with pytest.raises(FormatError):
        llama.bias = damaged
    foreign = BiasFile.from_signs(np.eye(4, 16, dtype=np.float32), identity_of(random_model(OLMOE)))
    with pytest.raises(ModelMismatchError, match="steermoe detect"):
        llama.bias = foreign
    assert llama.bias is biases[0], "the old steering stays after an error"
    assert np.array_equal(logits(llama), steered)
    llama.bias = None
    with pytest.raises(ModelMismatchError):
        SteeredLlama(tiny_path, bias=foreign)


def test_force(tiny_path: Path, biases: list[BiasFile]) -> None:
    identity = biases[0].identity
    fields = identity.to_dict() | {"router_sha256": "0" * 64}
    other = BiasFile(type(identity)(**fields), "hard", dict(biases[0].values))
    with pytest.raises(ModelMismatchError, match="force it"):
        SteeredLlama(tiny_path, bias=other)
    model = SteeredLlama(tiny_path, bias=other, force=True, n_ctx=256, n_threads=1, logits_all=True)
    assert np.array_equal(logits(model), fresh(tiny_path, biases[0]))
    model.close()


# What the environment steers: a plain llama_cpp.Llama. What it must not: SteeredLlama and record_counts.
PROGRAM = """
import json, os, sys, numpy as np
from steermoe_local import Pair, SteeredLlama, record_counts
from steermoe_local.llama.capi import llama_cpp

path, kind = sys.argv[1:]
options = dict(n_ctx=256, n_threads=1, logits_all=True, verbose=False)
if kind == "counts":
    pair = Pair("p", "one, two", "1, 2", "two", "2")
    counts = record_counts(path, [pair], n_threads=1)
    print(json.dumps([counts.a1.tolist(), counts.a2.tolist()]))
else:
    model = (SteeredLlama if kind == "steered" else llama_cpp().Llama)(path, **options)
    tokens = model.tokenize(b"one, two, three")
    model.eval(tokens)
    scores = np.array(model.scores[: len(tokens)]).astype(float).tolist()
    print(json.dumps([scores, os.environ.get("STEERMOE_BIAS")]))
"""


def in_subprocess(path: Path, kind: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(path), kind]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)


def test_environment_steers_a_plain_llama(tiny_path: Path, tmp_path: Path, biases: list[BiasFile]) -> None:
    write_bias(biases[0], tmp_path / "b.gguf")
    variable = {"STEERMOE_BIAS": str(tmp_path / "b.gguf")}
    steered, plain = fresh(tiny_path, biases[0]), fresh(tiny_path)

    done = in_subprocess(tiny_path, "plain", **variable)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.array(json.loads(done.stdout)[0], np.float32), steered)

    done = in_subprocess(tiny_path, "steered", **variable)
    assert done.returncode == 0, done.stderr
    values, still_there = json.loads(done.stdout)
    assert np.array_equal(np.array(values, np.float32), plain), "SteeredLlama took its steering from the environment"
    assert still_there == variable["STEERMOE_BIAS"]


def test_environment_does_not_reach_a_detection(tiny_path: Path, tmp_path: Path, biases: list[BiasFile]) -> None:
    write_bias(biases[0], tmp_path / "b.gguf")
    done = [in_subprocess(tiny_path, "counts", STEERMOE_BIAS=value) for value in ("", str(tmp_path / "b.gguf"))]
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].stdout == done[0].stdout != ""


def test_a_bad_file_in_the_environment(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(20))
    for name in ("bad.gguf", "missing.gguf"):
        done = in_subprocess(tiny_path, "plain", STEERMOE_BIAS=str(tmp_path / name))
        assert done.returncode == 1, "ran unsteered"
        assert "ValueError" in done.stderr


def test_a_native_bias_is_built_once(biases: list[BiasFile], monkeypatch: pytest.MonkeyPatch) -> None:
    """For all biases of a key and all threads; it lives as long as one of these biases."""
    built: list[str] = []
    real = steered_llama._build

    def build(bias: BiasFile) -> Any:
        built.append(bias.key)
        return real(bias)

    monkeypatch.setattr(steered_llama, "_build", build)
    ours = [replace(biases[0], epsilon=0.3, provenance={"n": str(i)}) for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(native_bias, ours * 4))
    assert len({id(native) for native in found}) == 1
    assert built == [ours[0].key]
    assert native_bias(replace(biases[0], epsilon=0.25)) is not found[0]
    gone = weakref.ref(found[0])
    last = ours.pop()
    del found
    ours.clear()
    gc.collect()
    assert gone() is not None
    assert native_bias(last) is gone()
    del last
    gc.collect()
    assert gone() is None
    assert len(built) == 2
