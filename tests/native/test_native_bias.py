"""Bias files through the C interface: golden files, hostile files, wrong models, wrong arguments."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from steermoe_local import BiasFile, FormatError, ModelInfo, model_info, read_bias, write_bias
from steermoe_local.errors import ModelMismatchError, NativeError
from steermoe_local.llama import capi as native
from steermoe_local.llama.signatures import BiasStruct, LayerStruct, check, lib
from tests.support import hostile
from tests.support.builders import HEX, hard_bias
from tests.support.low_level import Context, identity_of, native_bias, open_model
from tests.support.random_models import OLMOE, STEERABLE, write_random_model

OK, IO, FORMAT, MISMATCH, ARGUMENT, STATE = 0, 1, 2, 3, 5, 6


@pytest.fixture(scope="module")
def c() -> Any:
    """The functions of steermoe.h, `load_buffer` and `bias_layer` included."""
    functions = lib()
    buffer = functions.steermoe_bias_load_buffer
    buffer.restype = ctypes.c_int
    buffer.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
    functions.steermoe_bias_layer.restype = ctypes.POINTER(ctypes.c_float)
    functions.steermoe_bias_layer.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    functions.steermoe_bias_check.restype = ctypes.c_int
    functions.steermoe_bias_check.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32]
    return functions


def load(c: Any, data: bytes) -> tuple[int, str, native.NativeBias | None]:
    handle = ctypes.c_void_p(1)
    status = c.steermoe_bias_load_buffer(data, len(data), b"b.gguf", ctypes.byref(handle))
    message = c.steermoe_last_error().decode("utf-8", "replace")
    if status != OK:
        assert not handle.value, "a handle after a failure"
        assert message.startswith("b.gguf: "), message
        assert message.isprintable()
        return status, message, None
    return status, "", native.NativeBias(handle)


def values(c: Any, bias: native.NativeBias) -> dict[int, list[float]]:
    info = bias.info()
    rows = {layer: c.steermoe_bias_layer(bias._handle, layer) for layer in range(info["n_layer"])}
    return {layer: row[: info["n_expert"]] for layer, row in rows.items() if row}


def assert_same(c: Any, bias: native.NativeBias, expected: BiasFile) -> None:
    info, identity = bias.info(), expected.identity
    assert info["architecture"] == identity.architecture
    assert info["router_sha256"] == identity.router_sha256
    assert info["mode"] == ("hard", "soft", "capped").index(expected.mode)
    assert info["epsilon"] == expected.epsilon
    assert info["cap"] == (expected.cap or 0)
    assert (info["n_layer"], info["n_expert"], info["n_expert_used"]) == (*identity.shape, identity.n_expert_used)
    assert (info["n_active"], info["n_inactive"]) == (expected.n_active, expected.n_inactive)
    assert info["n_steered"] == sum(bool(row.any()) for row in expected.values.values() if expected.cap != 0)
    assert values(c, bias) == {layer: row.tolist() for layer, row in expected.values.items()}


@pytest.mark.parametrize("name", ["hard", "soft", "empty", "capped"])
def test_golden_files(c: Any, name: str) -> None:
    path = hostile.GOLDEN / f"{name}.gguf"
    assert_same(c, native.NativeBias.load(path), read_bias(path))
    _, _, from_buffer = load(c, path.read_bytes())
    assert from_buffer is not None
    assert_same(c, from_buffer, read_bias(path))


def test_from_values_equals_the_file(c: Any) -> None:
    bias = hard_bias()
    assert_same(c, native_bias(bias.identity, dict(bias.values)), bias)
    assert not c.steermoe_bias_layer(native_bias(bias.identity, {})._handle, 0)
    for layer in (-1, 3, 1 << 30):
        assert not c.steermoe_bias_layer(native_bias(bias.identity, dict(bias.values))._handle, layer)


def python_reads(path: Path, data: bytes) -> BiasFile | FormatError:
    path.write_bytes(data)
    try:
        return read_bias(path)
    except FormatError as error:
        return error


# Where Python refuses and the library reads on, on purpose (see hostile.LENIENT): fields that it does not need, texts
# that are not UTF-8 (they can match no model), bytes behind the last tensor.
ONLY_PYTHON_REFUSES = ("unknown field", "an array, where", "not UTF-8", "bytes after the last tensor", "shape [4, 1]")


def test_both_readers_agree(c: Any, tmp_path: Path) -> None:
    accepted = 0
    lenient = set()
    for name, data in hostile.corpus(tmp_path).items():
        found = python_reads(tmp_path / "b.gguf", data)
        status, message, bias = load(c, data)
        if bias is not None and isinstance(found, BiasFile):
            accepted += 1
            assert_same(c, bias, found)
        elif bias is not None:
            words = next((words for words in ONLY_PYTHON_REFUSES if words in str(found)), None)
            assert words, f"{name}: the library accepts what Python refuses: {found}"
            lenient.add(words)
        else:
            assert status == FORMAT, f"{name}: {message}"
            assert isinstance(found, FormatError), f"{name}: Python accepts what the library refuses: {message}"
    assert accepted >= len(hostile.LEGAL), "the corpus has no legal files to tell apart"
    assert lenient == set(ONLY_PYTHON_REFUSES), "a difference between the readers that no longer exists is still listed"


@pytest.mark.parametrize("name", hostile.LEGAL)
def test_legal_files(c: Any, tmp_path: Path, name: str) -> None:
    data = hostile.forge(tmp_path, {name: hostile.LEGAL[name]})[name]
    assert load(c, data)[:2] == (OK, "")
    assert isinstance(python_reads(tmp_path / "b.gguf", data), BiasFile)


@pytest.mark.parametrize("name", hostile.FORGED)
def test_forged_files(c: Any, tmp_path: Path, name: str) -> None:
    data = hostile.forge(tmp_path, {name: hostile.FORGED[name]})[name]
    assert load(c, data)[0] == FORMAT
    assert isinstance(python_reads(tmp_path / "b.gguf", data), FormatError)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("version-3", "format version 3, this library reads versions 1 and 2; use a matching steermoe-local"),
        ("version-1-capped", 'rule "capped" in a file of version 1'),
        ("version-1-hard-with-cap", 'expertbias.cap belongs to the rule "capped", not to "hard"'),
        ("no-cap", "key expertbias.cap is missing"),
        ("cap-negative", "expertbias.cap must be 0 to 1e6, or infinite"),
        ("no-mode", "key expertbias.mode is missing; build the file again"),
        ("mode-number", "key expertbias.mode has the type u32, not str"),
        ("layers-above-the-bound", "expertbias.layer_count is 4097, outside 1 to 4096"),
        ("top-5-of-4", "expertbias.expert_used_count is 5, outside 1 to 4"),
        ("three-on", "layer 0 activates 3 experts, its router selects only 2"),
        ("three-off", "layer 0 deactivates 3 of 4 experts; 2 must remain, deactivate fewer"),
        ("nan", "layer 0, expert 0: not a finite number"),
        ("soft-too-large", "lower the scale"),
        ("five-values", "tensor bias.0 is not one row of 4 values"),
    ],
)
def test_messages(c: Any, tmp_path: Path, name: str, words: str) -> None:
    assert words in load(c, hostile.forge(tmp_path, hostile.FORGED | hostile.LEGAL)[name])[1]


def test_other_kinds_of_files(c: Any, tmp_path: Path, tiny_path: Path) -> None:
    cases = {
        tmp_path: "",
        tmp_path / "missing.gguf": "cannot be opened; check the path",
        tiny_path: 'its general.architecture is "olmoe", not "expertbias"',
    }
    for path, words in cases.items():
        with pytest.raises(FormatError) as caught:
            native.NativeBias.load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert words in str(caught.value)
    large = tmp_path / "large.gguf"
    with large.open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(FormatError, match="larger than 256 MiB"):
        native.NativeBias.load(large)
    assert c.steermoe_bias_load(bytes(tmp_path), ctypes.byref(ctypes.c_void_p())) == IO


def test_a_long_path_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        native.NativeBias.load(str(tmp_path) + "/x" * 3000)
    assert 100 < len(str(caught.value)) < 2048, "cut, not overrun"


def test_values_are_checked_one_by_one() -> None:
    identity = hard_bias().identity
    for row in ([2, 0, 0, 0], [1, 1, 1, 0], [np.nan, 0, 0, 0], [0, 0, 0]):
        with pytest.raises(FormatError, match="layer 1"):
            native_bias(identity, {1: row})
    for layer in (-1, 3):
        with pytest.raises(FormatError, match="does not exist"):
            native_bias(identity, {layer: [0] * 4})
    for changes in ({"epsilon": 0}, {"epsilon": float("nan")}, {"epsilon": 2000}):
        with pytest.raises(FormatError, match="epsilon"):
            native_bias(identity, {}, **changes)
    for cap in (-1.0, float("nan"), 2e6, float("-inf")):
        with pytest.raises(FormatError, match="cap"):
            native_bias(identity, {}, "capped", cap=cap)
        assert native_bias(identity, {}, "hard", cap=cap).info()["cap"] == 0, "only the capped rule reads it"


NULL = None


def test_null_arguments(c: Any, tiny_model: Any) -> None:
    handle = ctypes.c_void_p()
    out = ctypes.byref(handle)
    bias = native_bias(hard_bias().identity, {})._handle
    text = ctypes.create_string_buffer(65)
    info = LayerStruct()
    row = (ctypes.c_float * 4)()
    mask = (ctypes.c_int32 * 4)()
    with Context(tiny_model) as context:
        ctx, model = context.ctx, tiny_model.model
        recorder = native.NativeRecorder(model, 1, (1, 1))
        calls = {
            "bias": [
                c.steermoe_bias_load(b"x", NULL),
                c.steermoe_bias_load_buffer(b"x", 1, b"x", NULL),
                c.steermoe_bias_init(BiasStruct(), NULL),
                c.steermoe_bias_set_layer(NULL, 0, row, 4),
                c.steermoe_bias_check(NULL, model, 0),
                c.steermoe_attach(ctx, NULL, 0),
            ],
            "path": [c.steermoe_bias_load(NULL, out)],
            "data": [c.steermoe_bias_load_buffer(NULL, 5, b"x", out)],
            "info": [c.steermoe_bias_init(NULL, out), c.steermoe_get_layer_info(ctx, 0, NULL)],
            "values": [c.steermoe_bias_set_layer(bias, 0, NULL, 4)],
            "model": [
                c.steermoe_model_router_sha256(NULL, text),
                c.steermoe_bias_check(bias, NULL, 0),
                c.steermoe_recorder_init(NULL, 1, out),
            ],
            "sha256": [c.steermoe_model_router_sha256(model, NULL)],
            "ctx": [
                c.steermoe_attach(NULL, bias, 0),
                c.steermoe_detach(NULL),
                c.steermoe_get_layer_info(NULL, 0, info),
                c.steermoe_recorder_bind(recorder._handle, NULL),
            ],
            "recorder": [
                c.steermoe_recorder_init(model, 1, NULL),
                c.steermoe_recorder_bind(NULL, ctx),
                c.steermoe_recorder_set_mask(NULL, mask, 4),
                c.steermoe_recorder_counts(NULL, NULL, NULL),
                c.steermoe_recorder_set_sums(NULL, True),
                c.steermoe_recorder_sums(NULL, 0, NULL, NULL, NULL),
            ],
            "bins": [c.steermoe_recorder_set_mask(recorder._handle, NULL, 4)],
            "range": [c.steermoe_get_layer_info(ctx, layer, info) for layer in (-1, 10**6)],
        }
        for what, statuses in calls.items():
            assert statuses == [ARGUMENT] * len(statuses), what
        assert c.steermoe_recorder_set_mask(recorder._handle, NULL, 0) == OK
        assert c.steermoe_recorder_set_mask(recorder._handle, mask, -1) == ARGUMENT
        assert c.steermoe_recorder_counts(recorder._handle, NULL, NULL) == OK
        assert c.steermoe_recorder_sums(recorder._handle, 0, NULL, NULL, NULL) == STATE
        assert c.steermoe_recorder_set_sums(recorder._handle, True) == OK
        assert c.steermoe_recorder_sums(recorder._handle, 1, NULL, NULL, NULL) == OK
        for n_bins in (-1, 2):
            assert c.steermoe_recorder_sums(recorder._handle, n_bins, NULL, NULL, NULL) == ARGUMENT
        assert c.steermoe_bias_load(NULL, out) == ARGUMENT
        assert c.steermoe_last_error() == b"path must not be NULL"
    recorder.close()
    c.steermoe_bias_free(NULL)
    c.steermoe_recorder_free(NULL)


def test_does_the_bias_belong_to_the_model(c: Any, tiny_path: Path, tiny_model: Any) -> None:
    identity = identity_of(tiny_path)
    other_router = type(identity)(**(identity.to_dict() | {"router_sha256": HEX}))
    other_shape = type(identity)(**(identity.to_dict() | {"n_layer": identity.n_layer + 1}))

    def check(bias: native.NativeBias, force: int = 0) -> int:
        return int(c.steermoe_bias_check(bias._handle, tiny_model.model, force))

    assert check(native_bias(identity, {})) == OK
    assert check(native_bias(identity, {}), 1) == OK
    assert check(native_bias(other_router, {})) == MISMATCH
    assert b"made for olmoe" in c.steermoe_last_error()
    assert b"force it" in c.steermoe_last_error()
    assert check(native_bias(other_router, {}), 1) == OK
    assert check(native_bias(other_shape, {})) == MISMATCH
    assert check(native_bias(other_shape, {}), 1) == MISMATCH
    assert b"run steermoe detect" in c.steermoe_last_error()


def assert_same_hash(path: Path, info: ModelInfo) -> None:
    model = open_model(path)
    try:
        assert native.router_sha256(model.model) == info.require_moe().router_sha256
    finally:
        model.close()


def test_router_hash_of_the_embedded_model(tiny_path: Path) -> None:
    assert_same_hash(tiny_path, model_info(tiny_path))


@pytest.mark.parametrize("name", STEERABLE)
def test_router_hash(random_model: Any, name: str) -> None:
    path = random_model(STEERABLE[name])
    assert_same_hash(path, model_info(path))


def test_router_hash_of_half_precision_routers(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", OLMOE, GGMLQuantizationType.F16)
    info = model_info(path)
    assert info.router_types == ("F16",)
    assert_same_hash(path, info)
    full = write_random_model(tmp_path / "full.gguf", OLMOE)
    assert info.require_moe().router_sha256 != model_info(full).require_moe().router_sha256


def test_errors_by_status(c: Any) -> None:
    with pytest.raises(NativeError) as caught:
        check(c.steermoe_detach(None))
    assert caught.value.code == ARGUMENT
    with pytest.raises(ModelMismatchError):
        check(MISMATCH)


def test_a_file_made_in_python_steers(tmp_path: Path, tiny_path: Path, tiny_model: Any) -> None:
    identity = identity_of(tiny_path)
    signs = np.zeros(identity.shape, np.float32)
    signs[-1, 0] = 1
    write_bias(BiasFile.from_signs(signs, identity), tmp_path / "b.gguf")
    with Context(tiny_model) as context:
        native.attach(context.ctx, native.NativeBias.load(tmp_path / "b.gguf"))
        steered = [native.layer_info(context.ctx, layer).steered for layer in range(identity.n_layer)]
        assert steered == [False] * (identity.n_layer - 1) + [True]
