"""Bias files: golden bytes, round trips and hostile files."""

from __future__ import annotations

import contextlib
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.errors import FormatError, ModelMismatchError, UsageError
from steermoe_local.steering import old_digests
from steermoe_local.steering.bias_file import BiasFile, none_if_empty, read_bias, write_bias
from tests.support.builders import HEX, hard_bias, identity, write_gguf
from tests.support.hostile import CAPPED, FIELDS, ROW
from tests.support.paths import GOLDEN


def soft_bias() -> BiasFile:
    return BiasFile.from_soft([[0.0] * 4, [0.5, -1.5, 0.0, 8.0], [0.0] * 4], identity())


def empty_bias() -> BiasFile:
    return BiasFile.from_signs(np.zeros((3, 4)), identity())


def capped_bias() -> BiasFile:
    hard = hard_bias()
    return BiasFile.from_capped(hard.signs, hard.identity, 1.5, provenance=hard.provenance)


CASES = {"hard": hard_bias, "soft": soft_bias, "empty": empty_bias, "capped": capped_bias}


def same(one: BiasFile, two: BiasFile) -> bool:
    plain = ("identity", "mode", "epsilon", "cap", "provenance", "layers")
    return all(getattr(one, n) == getattr(two, n) for n in plain) and np.array_equal(one.dense(), two.dense())


@pytest.mark.parametrize("name", CASES)
def test_golden_bytes(tmp_path: Path, name: str) -> None:
    write_bias(CASES[name](), tmp_path / "bias.gguf")
    assert (tmp_path / "bias.gguf").read_bytes() == (GOLDEN / f"{name}.gguf").read_bytes()
    assert same(read_bias(GOLDEN / f"{name}.gguf"), CASES[name]())
    assert [p.name for p in tmp_path.iterdir()] == ["bias.gguf"]


KEYS = {
    "hard": "87c9ac085ef0e6283d775f0ce3c17288656c41a89231815744ddda7baf40b72a",
    "soft": "c50fe9a2531a965a966f730bc49ce71b070a97b9cc25dab11d976fab84fe3cbc",
    "capped": "01d56638ec5596d5e41e0c820a3ecc1632a954b4a134ff4a8a9b518da7a1cf14",
}


@pytest.mark.parametrize("name", KEYS)
def test_golden_keys(name: str) -> None:
    """Chat and record files hold keys, so they stay the same from version to version."""
    assert CASES[name]().key == read_bias(GOLDEN / f"{name}.gguf").key == KEYS[name]


@pytest.mark.parametrize(
    ("name", "chat", "record"),
    [
        ("hard", "54e8b63279c7f54e3a769ffdd26b6a7bcccd16658b1b72e86444e1a551c8c90c", "ee5626ce39a1a0ae"),
        ("soft", "5d1f4a442bbf109b35de8a26654a14e7d7b4bf9241b0b5271da9a124d2ebbc7b", "563807de13462579"),
    ],
)
def test_digests_of_earlier_versions(name: str, chat: str, record: str) -> None:
    """As version 0.1 wrote them."""
    assert (old_digests.chat_digest(CASES[name]()), old_digests.record_name(CASES[name]())) == (chat, record)


def test_the_key_is_what_a_bias_does() -> None:
    hard, soft = hard_bias(), soft_bias()
    rows = dict(hard.values)
    same_key = [
        replace(hard, provenance={}),
        replace(hard, values={0: np.zeros(4), **rows}),
        replace(hard, values={layer: np.where(row == 0, np.float32(-0.0), row) for layer, row in rows.items()}),
        replace(hard, epsilon=np.float64(np.float32(hard.epsilon))),
    ]
    assert {bias.key for bias in same_key} == {hard.key}
    assert replace(soft, epsilon=0.5).key == soft.key, "the soft rule has no epsilon"
    capped = capped_bias()
    assert replace(capped, cap=np.float64(1.5)).key == capped.key
    assert replace(capped, cap=-0.0).key == replace(capped, cap=0).key
    others = [
        hard,
        soft,
        capped,
        replace(capped, cap=0),
        replace(capped, cap=2),
        replace(capped, cap=float("inf")),
        replace(capped, epsilon=0.5),
        replace(hard, epsilon=0.5),
        replace(hard, mode="soft"),
        replace(hard, values={2: rows[2]}),
        replace(hard, values={1: rows[2], 2: rows[1]}),
        replace(hard, values={0: rows[1], 2: rows[2]}),
        replace(hard, identity=identity(4)),
        replace(hard, identity=identity(router_sha256="1" * 64)),
        replace(hard, identity=identity(k=1)),
        replace(hard, identity=identity(architecture="other")),
        empty_bias(),
    ]
    assert len({bias.key for bias in others}) == len(others)


def test_the_key_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = hard_bias()
    key = bias.key
    monkeypatch.setattr(type(bias), "dense", None)
    monkeypatch.setattr("steermoe_local.steering.bias_file.hashlib", None)
    assert bias.key == key


def test_a_bias_is_immutable() -> None:
    bias = hard_bias()
    with pytest.raises(AttributeError):
        bias.epsilon = 0.5  # type: ignore[misc]
    for mapping in (bias.values, bias.provenance):
        with pytest.raises(TypeError):
            mapping["x"] = "y"  # type: ignore[index]
    with pytest.raises(ValueError, match="read-only"):
        bias.values[1][0] = 0


def test_a_bias_that_changes_nothing_is_none() -> None:
    nothing = [
        empty_bias(),
        BiasFile(identity(), "hard", {0: np.zeros(4)}),
        BiasFile(identity(), "soft", {1: -np.zeros(4)}),
        BiasFile.from_capped(np.zeros((3, 4)), identity(), 1.0),
        replace(capped_bias(), cap=0),
    ]
    for bias in nothing:
        assert bias.is_empty
        assert none_if_empty(bias) is None
    assert none_if_empty(None) is None
    for bias in (hard_bias(), soft_bias(), capped_bias(), replace(capped_bias(), cap=float("inf"))):
        assert not bias.is_empty
        assert none_if_empty(bias) is bias


def test_what_gguf_py_reads() -> None:
    reader = gguf.GGUFReader(GOLDEN / "hard.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if "." in key}
    assert values["general.architecture"] == "expertbias"
    assert values["expertbias.version"] == 1
    assert values["expertbias.model_hint"] == "olmoe"
    assert values["expertbias.layer_count"] == 3
    assert values["expertbias.expert_count"] == 4
    assert values["expertbias.expert_used_count"] == 2
    assert values["expertbias.mode"] == "hard"
    assert values["expertbias.epsilon"] == np.float32(0.01)
    assert values["expertbias.router_sha256"] == HEX
    assert values["expertbias.behaviour"] == "digits-words"
    tensors = {tensor.name: tensor.data.tolist() for tensor in reader.tensors}
    assert tensors == {"bias.1": [1, 0, -1, 0], "bias.2": [-1, 0, 0, -1]}


def test_only_capped_files_have_version_2() -> None:
    """Readers of version 1 alone look at the version first: they refuse the rule that they do not know."""
    found = {}
    for name in CASES:
        fields = gguf.GGUFReader(GOLDEN / f"{name}.gguf").fields
        cap = fields.get("expertbias.cap")
        found[name] = (fields["expertbias.version"].contents(), cap and (cap.types[0], cap.contents()))
    plain = (1, None)
    assert found == {
        "hard": plain,
        "soft": plain,
        "empty": plain,
        "capped": (2, (gguf.GGUFValueType.FLOAT32, 1.5)),
    }


def test_properties() -> None:
    bias = hard_bias()
    assert bias.layers == (1, 2)
    assert (bias.n_active, bias.n_inactive) == (1, 3)
    assert bias.signs.tolist() == [[0, 0, 0, 0], [1, 0, -1, 0], [-1, 0, 0, -1]]
    assert bias.dense().dtype == np.float32
    assert soft_bias().signs.tolist()[1] == [1, -1, 0, 1]
    assert not empty_bias().layers
    assert bias.check(identity(), "b.gguf", "m.gguf") == []
    with pytest.raises(ModelMismatchError, match=r"b\.gguf: .* m\.gguf "):
        bias.check(identity(4), "b.gguf", "m.gguf", force=True)


@given(st.data())
def test_round_trip(tmp_path: Path, data: Any) -> None:
    model = identity(data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6)), 1)
    row = st.lists(st.floats(-1e4, 1e4, width=32), min_size=model.n_expert, max_size=model.n_expert)
    table = data.draw(st.lists(row, min_size=model.n_layer, max_size=model.n_layer))
    scale = data.draw(st.floats(0.001, 100))
    epsilon = data.draw(st.floats(0.001, 20))
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
    scaled = BiasFile.from_soft(table, model, scale).values
    bias = BiasFile(model, "soft", scaled, epsilon, {"note": text})
    assert np.array_equal(bias.dense(), np.float32(scale) * np.array(table, dtype=np.float32))
    write_bias(bias, tmp_path / "b.gguf")
    assert same(read_bias(tmp_path / "b.gguf"), bias)
    assert read_bias(tmp_path / "b.gguf").key == bias.key


@given(
    st.floats(0, 1e6, width=32) | st.just(float("inf")), st.lists(st.sampled_from((-1, 0, 1)), min_size=4, max_size=4)
)
def test_round_trip_of_capped_files(tmp_path: Path, cap: float, signs: list[int]) -> None:
    model = identity(1, 4, 1)
    if not (signs.count(1) <= 1 <= 4 - signs.count(-1)):
        with pytest.raises(FormatError, match=r"bias\.0"):
            BiasFile.from_capped([signs], model, cap)
        return
    bias = BiasFile.from_capped([signs], model, cap)
    assert bias.cap == cap
    assert bias.is_empty == (cap == 0 or not any(signs))
    write_bias(bias, tmp_path / "b.gguf")
    assert same(read_bias(tmp_path / "b.gguf"), bias)
    assert read_bias(tmp_path / "b.gguf").key == bias.key


@pytest.mark.parametrize("text", ["\0", "a\0b", "\0a"])
def test_a_text_with_nul_is_not_written(text: str) -> None:
    with pytest.raises(FormatError, match="provenance: note: a NUL"):
        BiasFile(identity(), "hard", {}, provenance={"note": text})
    with pytest.raises(FormatError, match="architecture: "):
        replace(identity(), architecture=text)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1, 1, 1, 0], "bias.0: activates 3 "),
        ([-1, -1, -1, 0], "bias.0: leaves 1 "),
        ([0.5, 0, 0, 0], "bias.0: a hard bias"),
        ([float("nan"), 0, 0, 0], "bias.0: NaN or infinity"),
        ([float("inf"), 0, 0, 0], "bias.0: NaN or infinity"),
        ([1, 0, 0], "bias.0: shape (3,)"),
    ],
)
def test_impossible_rows(row: list[float], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        BiasFile(identity(), "hard", {0: np.asarray(row, np.float32)})
    assert words in str(caught.value)


def test_impossible_fields() -> None:
    row = np.zeros(4, np.float32)
    for epsilon in (0, -1, float("nan"), float("inf"), 20.001, 1e-60):
        with pytest.raises(FormatError, match="epsilon"):
            BiasFile(identity(), "hard", {}, epsilon)
    for cap in (None, -1, float("nan"), float("-inf"), 1.1e6, 1e-60):
        with pytest.raises(FormatError, match="cap"):
            BiasFile(identity(), "capped", {}, cap=cap)
    for mode in ("hard", "soft"):
        with pytest.raises(FormatError, match=f"cap: .* not to {mode}"):
            BiasFile(identity(), mode, {}, cap=1.0)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="a capped bias has only"):
        BiasFile(identity(), "capped", {0: row + 0.5}, cap=1.0)
    with pytest.raises(FormatError, match="mode: 'x'"):
        BiasFile(identity(), "x", {})  # type: ignore[arg-type]
    for layer in (-1, 3):
        with pytest.raises(FormatError, match=f"bias.{layer}: "):
            BiasFile(identity(), "hard", {layer: row})
    with pytest.raises(FormatError, match="lower the scale"):
        BiasFile(identity(), "soft", {0: row + 2e6})
    for key in ("mode", "cap", "A", "a b", ""):
        with pytest.raises(FormatError, match="provenance"):
            BiasFile(identity(), "hard", {}, provenance={key: "x"})
    with pytest.raises(FormatError, match="too many"):
        BiasFile(identity(), "hard", {}, provenance={f"a{i}": "x" for i in range(60)})
    with pytest.raises(UsageError, match="shape"):
        BiasFile.from_signs([[1]], identity())


@pytest.mark.parametrize(
    ("fields", "tensors", "words"),
    [
        ({"expertbias.version": 3}, {}, "version 3"),
        ({"expertbias.version": 2}, {}, "expertbias.cap: missing"),
        ({"expertbias.version": 2, "expertbias.cap": 1.0}, {}, "mode 'hard' in a file of version 2"),
        (CAPPED | {"expertbias.version": 1}, {}, "expertbias.cap: unknown field"),
        (CAPPED | {"expertbias.cap": 1}, {}, "expertbias.cap: a UINT32"),
        (CAPPED | {"expertbias.cap": -1.0}, {}, "cap: -1.0"),
        (CAPPED, {"bias.0": ROW + 0.5}, "bias.0: a capped bias"),
        ({"expertbias.version": "1"}, {}, "version '1'"),
        ({"expertbias.mode": 1}, {}, "expertbias.mode: a UINT32"),
        ({"expertbias.mode": "firm"}, {}, "mode: 'firm'"),
        ({"expertbias.epsilon": 1}, {}, "expertbias.epsilon: a UINT32"),
        ({"expertbias.epsilon": float("nan")}, {}, "epsilon: nan"),
        ({"expertbias.layer_count": ...}, {}, "expertbias.layer_count: missing"),
        ({"expertbias.layer_count": 0}, {}, "n_layer: 0"),
        ({"expertbias.layer_count": (1 << 32) - 1}, {}, "n_layer: 4294967295"),
        ({"expertbias.expert_count": 1}, {}, "n_expert_used: 2"),
        ({"expertbias.router_sha256": HEX.upper()}, {}, "router_sha256"),
        ({"expertbias.colour": 1}, {}, "expertbias.colour: "),
        ({"general.name": "x"}, {}, "general.name: "),
        ({"expertbias.list": [1, 2]}, {}, "an array"),
        ({}, {"bias.3": ROW}, "bias.3: "),
        ({}, {"bias.01": ROW}, "'bias.01'"),
        ({}, {"blk.0.x": ROW}, "'blk.0.x'"),
        ({}, {"bias.0": np.zeros(5, np.float32)}, "bias.0: shape [5]"),
        ({}, {"bias.0": np.zeros((1, 4), np.float32)}, "bias.0: shape [4, 1]"),
        ({}, {"bias.0": np.zeros(4, np.float16)}, "bias.0: type F16"),
        ({}, {"bias.0": ROW + np.float32("nan")}, "bias.0: NaN"),
        ({}, {"bias.0": ROW + 1}, "bias.0: activates 4 "),
    ],
)
def test_read_refuses(tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Any], words: str) -> None:
    merged = {k: v for k, v in (FIELDS | fields).items() if v is not ...}
    path = write_gguf(tmp_path / "b.gguf", "expertbias", merged, tensors)
    with pytest.raises(FormatError) as caught:
        read_bias(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "olmoe", {}, {})
    with pytest.raises(FormatError, match="this is a GGUF model"):
        read_bias(path)
    path.write_bytes(b"PK" * 100)
    with pytest.raises(FormatError, match="no GGUF magic"):
        read_bias(path)
    for bad in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(FormatError, match=re.escape(f"{bad}: ")):
            read_bias(bad)
    with open(path, "wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(FormatError, match="256 MiB"):
        read_bias(path)


def test_trailing_bytes(tmp_path: Path) -> None:
    path = tmp_path / "b.gguf"
    path.write_bytes((GOLDEN / "hard.gguf").read_bytes() + b"\0")
    with pytest.raises(FormatError, match="after the last"):
        read_bias(path)


@pytest.mark.parametrize("name", ["hard", "capped"])
def test_truncated_at_every_length(tmp_path: Path, name: str) -> None:
    data = (GOLDEN / f"{name}.gguf").read_bytes()
    path = tmp_path / "b.gguf"
    needed = len(data) - 16  # the last tensor's 16 bytes are padded to 32
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError) if length < needed else contextlib.nullcontext():
            read_bias(path)


def header(n_tensors: int, n_fields: int, rest: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_fields) + rest


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HUGE = (1 << 64) - 1
TENSOR = string(b"bias.0")


@pytest.mark.parametrize(
    "data",
    [
        header(HUGE, 0),
        header(0, HUGE),
        header(1 << 20, 0),
        header(0, 1, string(b"a", HUGE)),
        header(0, 1, string(b"a", 1 << 15)),
        header(0, 1, string(b"\xff") + struct.pack("<I", 4)),
        header(0, 1, string(b"a") + struct.pack("<I", 99)),
        header(0, 1, string(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60)),
        header(0, 1, string(b"a") + struct.pack("<IIQ", 9, 9, 1) * 50),
        header(0, 2, (string(b"a") + struct.pack("<IB", 0, 1)) * 2),
        header(0, 1, string(b"general.alignment") + struct.pack("<II", 4, 3)),
        header(0, 1, string(b"general.alignment") + struct.pack("<II", 4, 0)),
        header(1, 0, TENSOR + struct.pack("<I", 1 << 31)),
        header(1, 0, TENSOR + struct.pack("<I", 0)),
        header(1, 0, TENSOR + struct.pack("<IQQIQ", 2, 1 << 32, 1 << 32, 0, 0)),
        header(1, 0, TENSOR + struct.pack("<IQIQ", 1, HUGE, 0, 0)),
        header(1, 0, TENSOR + struct.pack("<IQIQ", 1, 0, 0, 0)),
        header(1, 0, TENSOR + struct.pack("<IQIQ", 1, 4, 77, 0)),
        header(1, 0, TENSOR + struct.pack("<IQIQ", 1, 4, 0, HUGE - 31)),
        header(1, 0, TENSOR + struct.pack("<IQIQ", 1, 4, 0, 0)),
        header(1, 0, TENSOR + struct.pack("<IQIQ", 1, 5, 2, 0)),
        header(1, 0, string(b"b" * 64)),
        b"GGUF" + struct.pack("<I", 1) + bytes(40),
        b"GGUF" + struct.pack(">I", 3) + bytes(40),
        b"GGUF" + bytes(40),
    ],
)
def test_forged_headers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "b.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_bias(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray((GOLDEN / "hard.gguf").read_bytes())
    for at, value in edits:
        data[at % len(data)] = value
    path = tmp_path / "b.gguf"
    path.write_bytes(data)
    with contextlib.suppress(FormatError):
        read_bias(path)


@given(st.binary(max_size=300))
def test_random_bytes_after_the_magic(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "b.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + tail)
    with pytest.raises(FormatError):
        read_bias(path)
