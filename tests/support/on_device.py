"""Contexts whose layers lie on any device: tensors are copied out by ggml, wherever they are."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import backends, capi
from tests.support import oracle
from tests.support.low_level import (
    F32,
    I32,
    Context,
    GGMLTensor,
    internals,
    lib,
    native_bias,
    random_signs,
    set_verbose,
)

ALL = 0x7FFFFFFF

Seen = dict[str, list[npt.NDArray[Any]]]


@contextmanager
def model_on(
    path: Path,
    n_gpu_layers: int,
    *,
    devices: Sequence[str] | None = None,
    overrides: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    tensor_split: Sequence[float] = (),
    split_mode: int = 1,
    verbose: bool = False,
) -> Iterator[Any]:
    """llama_cpp's `LlamaModel` with some layers offloaded; no devices (empty): the CPU alone.

    `verbose`: llama.cpp's log goes to stderr.
    """
    params = lib().llama_model_default_params()
    placement = backends.Placement.of(devices, overrides, sorted(backends._rpc_servers))
    placement.apply(params)
    params.n_gpu_layers, params.split_mode = n_gpu_layers, split_mode
    shares = (ctypes.c_float * lib().LLAMA_MAX_DEVICES)(*tensor_split)
    if tensor_split:
        params.tensor_split = shares
    native = internals()
    set_verbose(verbose)
    model = native.LlamaModel(path_model=str(path), params=params, verbose=verbose)
    try:
        yield model
    finally:
        model.close()
        del placement, shares  # the library reads them as long as the model lives


class DeviceContext(Context):
    """A context whose captured tensors may lie in a device's memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.hosts: set[bool] = set()  # were the captured tensors in the host's memory
        self.places: set[str] = set()  # names of their buffers
        super().__init__(*args, **kwargs)

    def _see(self, tensor: int, ask: bool, _: object) -> bool:
        t = GGMLTensor.from_address(tensor)
        wanted: bool = t.name.startswith(b"ffn_moe_") and t.type in (F32, I32) and t.ne[3] == 1
        if wanted and not ask:
            self.seen.setdefault(t.name.decode(), []).append(self._values(t, tensor))
        return True if not ask else wanted

    def _values(self, t: GGMLTensor, address: int) -> npt.NDArray[Any]:
        base = backends.function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
        get = backends.function(
            "ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
        )
        is_host = backends.function("ggml_backend_buffer_is_host", ctypes.c_bool, ctypes.c_void_p)
        name = backends.function("ggml_backend_buffer_name", ctypes.c_char_p, ctypes.c_void_p)
        owner = GGMLTensor.from_address(t.view_src) if t.view_src else t
        self.hosts.add(is_host(owner.buffer))
        self.places.add(name(owner.buffer).decode())
        memory = ctypes.create_string_buffer(base(address))
        get(address, memory, 0, len(memory))
        dtype = {F32: np.float32, I32: np.int32}[t.type]
        return np.ndarray(tuple(t.ne[::-1]), dtype, memory, strides=tuple(t.nb[::-1])).copy()


def rows_of(seen: Seen, name: str, layer: int, width: int) -> npt.NDArray[Any]:
    """Values of all ubatches, one row of `width` a token."""
    return np.concatenate([part.reshape(-1, width) for part in seen[f"{name}-{layer}"]])


def check_promise(
    seen: Seen,
    layer: int,
    info: capi.LayerInfo,
    row: Any,
    mode: str,
    epsilon: float = 0.01,
    exp: float = oracle.EXP,
    cap: float = float("inf"),
) -> None:
    """The edit of a steered layer against the NumPy oracle, the choice and the weights that follow, as captured.

    `exp` is the relative error of the device's exponential function.
    """
    n, k = info.n_expert, info.n_expert_used
    biased = f"ffn_moe_logits_biased-{layer}" in seen
    z = rows_of(seen, "ffn_moe_logits_biased" if biased else "ffn_moe_logits", layer, n)
    # where the logits themselves are what top-k sees, llama.cpp gives them another name
    last = "ffn_moe_logits_steered" if f"ffn_moe_logits_steered-{layer}" in seen else "ffn_moe_probs"
    edited = rows_of(seen, last, layer, n)
    signs = np.asarray(row)
    expected = oracle.steer(z, mode, row, epsilon, cap)
    # + 0.0: the sign of a zero logit is not promised
    assert (edited + np.float32(0)).tobytes() == (expected + np.float32(0)).tobytes(), "edited logits differ"

    topk = rows_of(seen, "ffn_moe_topk", layer, k)
    assert topk.shape == (len(z), k)
    assert all(len(set(chosen)) == k for chosen in topk.tolist()), "an expert was chosen twice"
    if mode != "soft":
        untouched = signs == 0
        assert edited[:, untouched].tobytes() == z[:, untouched].tobytes(), "untouched logits changed"
    if mode == "hard":
        for expert in np.flatnonzero(signs > 0):
            assert (topk == expert).any(axis=1).all(), f"expert {expert} is +1, but not always chosen"
        assert not np.isin(topk, np.flatnonzero(signs < 0)).any(), "an expert with -1 was chosen"
    if not (info.selection_bias or info.expert_groups):
        wanted = oracle.chosen(expected, k)
        assert np.array_equal(np.sort(topk, axis=1), np.sort(wanted, axis=1)), "another choice of experts"

    names = ("ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights")
    weights = rows_of(seen, next(name for name in names if f"{name}-{layer}" in seen), layer, k).astype(np.float64)
    from_logits = oracle.selected_weights(expected, topk, info.gating)
    # normalised on both sides, as far as the model has not done it
    for values in (weights, from_logits):
        values /= values.sum(axis=1, keepdims=True)
    off = oracle.weight_allowance(expected, topk, info.gating, norm=True, exp=exp)
    # weights that the model left as they are we divide in float64: their own error counts, that of their sum less
    assert (np.abs(weights - from_logits) <= off).all(), f"weights: {np.abs(weights - from_logits).max()}"


Given = tuple[dict[int, Any], str, float, float]  # rows by layer, mode, epsilon, cap


def steerings_of(identity: ModelIdentity, layers: Sequence[int]) -> list[Given]:
    """Steerings by all rules and none, in all layers and in some."""
    rng = np.random.default_rng(19)
    n, k = identity.n_expert, identity.n_expert_used
    one, other = ({layer: random_signs(rng, n, k, 1, n // 2) for layer in layers} for _ in range(2))
    inf = float("inf")
    return [
        (one, "hard", 0.01, inf),
        ({layer: 3 * row for layer, row in other.items()}, "soft", 0.01, inf),
        ({}, "hard", 0.01, inf),
        ({layers[0]: other[layers[0]]}, "hard", 2.5, inf),
        (one, "capped", 0.01, 1.5),
        ({layers[-1]: other[layers[-1]]}, "capped", 2.5, 0.25),
    ]


def check_parts(
    context: DeviceContext,
    identity: ModelIdentity,
    layers: Sequence[int],
    under: list[Given],
    parts: list[Seen],
    exp: float,
) -> None:
    """The promise of each steering for its part of the captured rows."""
    zeros = np.zeros(identity.n_expert, np.float32)
    for (rows, mode, epsilon, cap), mine in zip(under, parts, strict=True):
        for layer in layers:
            info = capi.layer_info(context.ctx, layer)
            check_promise(mine, layer, info, rows.get(layer, zeros), mode, epsilon, exp, cap)


def deal(seen: Seen, parts: list[Seen], of_rows: npt.NDArray[Any]) -> None:
    """Give each part its rows of the tensors of one ubatch; of_rows [tokens]: the part that each is of."""
    for name, arrays in seen.items():
        if name.endswith(")"):
            continue  # a view of what has a name of its own
        assert len(arrays) == 1, name
        values = arrays[0].reshape(len(of_rows), -1)
        for number, mine in enumerate(parts):
            mine.setdefault(name, []).append(values[of_rows == number])


def check_sequences(
    context: DeviceContext, identity: ModelIdentity, layers: Sequence[int], exp: float = oracle.EXP
) -> None:
    """Sequences under all rules and under none in one batch: each token's edit is that of its own steering."""
    under = steerings_of(identity, layers)
    for sequence, (rows, mode, epsilon, cap) in enumerate(under):
        bias = native_bias(identity, rows, mode, epsilon, cap) if rows else None
        capi.attach_sequence(context.ctx, sequence, bias)
    parts: list[Seen] = [{} for _ in under]
    for start, end in ((0, 6), (6, 7), (7, 8)):
        context.seen.clear()
        batch = [(7 * i + s, i, s, True) for i in range(start, end) for s in range(len(under))]
        context.decode_rows(batch)
        deal(context.seen, parts, np.array([row[2] for row in batch]))
    check_parts(context, identity, layers, under, parts, exp)


def check_token_rows(
    context: DeviceContext, identity: ModelIdentity, layers: Sequence[int], exp: float = oracle.EXP
) -> None:
    """The same of the tokens of one prompt; those before the first steered one have the bits of an unsteered run."""
    under = steerings_of(identity, layers)
    tokens = [(7 * i + 1) % 64 for i in range(24)]
    plain = context.fresh(tokens)
    for number, (rows, mode, epsilon, cap) in enumerate(under):
        capi.attach_row(context.ctx, number, native_bias(identity, rows, mode, epsilon, cap))
    of_tokens = np.array([2] * 4 + [place % len(under) for place in range(20)])
    context.clear()
    context.seen.clear()
    capi.set_token_rows(context.ctx, of_tokens)
    found = context.decode(tokens)
    parts: list[Seen] = [{} for _ in under]
    deal(context.seen, parts, of_tokens)
    check_parts(context, identity, layers, under, parts, exp)
    assert found[:4].tobytes() == plain[:4].tobytes()
    assert not np.array_equal(found[4], plain[4])
    # where the last token alone is an output, the last layer routes it alone
    context.clear()
    capi.set_token_rows(context.ctx, of_tokens)
    (last,) = context.decode_rows([(token, i, 0, i == 23) for i, token in enumerate(tokens)])
    assert np.abs(last - found[-1]).max() < np.abs(last - plain[-1]).max() / 4, "not under its own row"
