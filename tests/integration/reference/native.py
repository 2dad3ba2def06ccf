"""Our side of the comparison: the embedded model as float32, its logits and the experts each token selects."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize

from steermoe_local.detection.recorder import record_counts
from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.maps.counts import RoutingCounts
from steermoe_local.pairs.pairs import Pair
from steermoe_local.steering.bias_file import BiasFile
from tests.support import rounding

F32 = 0  # GGML_TYPE_F32, for the cache
NEAR_TIE = 1e-5  # below this distance of two router logits, float noise may decide who is selected


def data_file(name: str) -> Path:
    """A file of the package's data."""
    return Path(str(resources.files("steermoe_local").joinpath("data", name)))


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_f32(source: Path, target: Path) -> Path:
    """Copy a GGUF model with every tensor as F32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = LlamaFileType.ALL_F32 if name == "general.file_type" else field.contents()
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def make_bias(mode: str, values: np.ndarray, epsilon: float, identity: ModelIdentity) -> BiasFile:
    """A bias of a whole table of values [layers, experts]."""
    if mode == "soft":
        return BiasFile.from_soft(values, identity)
    return BiasFile.from_signs(values, identity, epsilon)


def load(model: Path, n_ctx: int) -> SteeredLlama:
    """The model with everything in float32 and logits for every position."""
    return SteeredLlama(
        model,
        n_ctx=n_ctx,
        n_batch=n_ctx,
        n_ubatch=n_ctx,
        n_threads=1,
        n_threads_batch=1,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        logits_all=True,
    )


def logits(llama: SteeredLlama, tokens: Sequence[int], bias: BiasFile | None = None) -> np.ndarray:
    """Logits [T, vocab] of one prompt, steered by `bias`."""
    llama.set_bias(bias)
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)], dtype=np.float32)


def selected(llama: SteeredLlama, tokens: Sequence[int], bias: BiasFile | None, shape: tuple[int, int]) -> np.ndarray:
    """Experts that each token of one prompt selects, [layers, T, k], ascending.

    A recorder with one bin a token, in a context of its own with the weights of `llama`.
    """
    lib, model = capi.llama_cpp(), llama._model
    n_tokens = len(tokens)
    recorder = capi.NativeRecorder(model.model, n_tokens, shape)
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
    params.type_k = params.type_v = F32
    params.flash_attn_type = 0
    params.n_threads = params.n_threads_batch = 1
    recorder.install(params)
    context = lib._internals.LlamaContext(model=model, params=params, verbose=False)
    batch = lib.llama_batch_init(n_tokens, 0, 1)
    try:
        recorder.bind(context.ctx)
        if bias is not None:
            rows = {layer: row.tolist() for layer, row in bias.values.items()}
            fields = bias.identity.to_dict()
            native_bias = capi.NativeBias.from_values(**fields, mode=bias.mode, epsilon=bias.epsilon, layers=rows)
            capi.attach(context.ctx, native_bias)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
            batch.seq_id[i][0] = 0
        batch.n_tokens = n_tokens
        recorder.set_mask(range(n_tokens))
        assert lib.llama_decode(context.ctx, batch) == 0
        counts: ctypes.Array[ctypes.c_int64] = recorder.counts()[0]
    finally:
        lib.llama_batch_free(batch)
        context.close()
        recorder.close()
    table = np.ctypeslib.as_array(counts).reshape(n_tokens, *shape)  # [T, layers, experts], 0 or 1
    assert table.max() == 1
    experts = np.nonzero(table)[2].reshape(n_tokens, shape[0], -1)
    return experts.transpose(1, 0, 2)


def count(model: Path, pairs: Sequence[Pair]) -> RoutingCounts:
    """Routing counts with everything in float32; flash attention would round to F16."""
    return record_counts(model, pairs, n_threads=1, type_k=F32, type_v=F32, flash_attn=False)


def worst_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest |ours - reference| of logits [..., vocabulary], as a share of what rounding in F32 allows."""
    return float(np.abs(ours - reference).max() / rounding.logits(reference, **rounding.TINY))
