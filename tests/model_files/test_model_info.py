"""Model facts from GGUF headers, split and damaged files included."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from steermoe_local.errors import ModelError
from steermoe_local.identity import ModelIdentity
from steermoe_local.model_files.header import read_header
from steermoe_local.model_files.model_info import model_info
from tests.support.builders import model_parts, write_gguf


def make(path: Path, arch: str = "olmoe", **changes: Any) -> Path:
    fields, tensors = model_parts()
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    fields = {key: value for key, value in fields.items() if value is not ...}
    return write_gguf(path, arch, fields, tensors)


def expected_sha256() -> str:
    _, tensors = model_parts()
    digest = hashlib.sha256()
    for layer in (1, 2):
        digest.update(tensors[f"blk.{layer}.ffn_gate_inp.weight"].astype("<f4").tobytes())
    return digest.hexdigest()


def test_facts(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf")
    info = model_info(path)
    assert info.identity == ModelIdentity("olmoe", 3, 4, 2, expected_sha256())
    assert info.require_moe() is info.identity
    assert (info.name, info.file_type, info.gating) == ("Tiny", "Q4_K_M", "softmax")
    assert (info.context_length, info.embedding_length) == (512, 32)
    assert info.chat_template == "{{ messages }}"
    assert (info.moe_layers, info.dense_layers) == ((1, 2), (0,))
    assert info.router_types == ("F32",)
    assert info.size_bytes == path.stat().st_size
    assert info.n_params == 5 * 32 + 3 * 4 * 32
    assert info.is_moe
    assert not info.has_selection_bias
    data = json.loads(json.dumps(info.to_dict()))
    assert data["identity"]["router_sha256"] == expected_sha256()
    assert data["moe_layers"] == [1, 2]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_routers_of_other_types_are_hashed_as_f32(tmp_path: Path, kind: str) -> None:
    fields, tensors = model_parts()
    ggml = GGMLQuantizationType[kind]
    digest = hashlib.sha256()
    for layer in (1, 2):
        name = f"blk.{layer}.ffn_gate_inp.weight"
        data = quantize(tensors[name], ggml)
        tensors[name] = (data, ggml)
        values = data.astype(np.float32) if kind == "F16" else gguf.dequantize(data, ggml)
        digest.update(values.astype("<f4").tobytes())
    info = model_info(write_gguf(tmp_path / "m.gguf", "olmoe", fields, tensors))
    assert info.require_moe().router_sha256 == digest.hexdigest()
    assert info.router_types == (kind,)


@pytest.mark.parametrize(
    ("arch", "changes", "gating"),
    [
        ("olmoe", {}, "softmax"),
        ("llama4", {}, "sigmoid"),
        ("gpt-oss", {}, "softmax_weight"),
        ("newmoe", {}, "architecture default"),
        ("deepseek2", {"deepseek2__expert_gating_func": 2}, "sigmoid"),
        ("deepseek4", {"deepseek4__expert_gating_func": 4}, "sqrt_softplus"),
        ("x", {"x__expert_gating_func": 9}, "type 9"),
        ("olmoe", {"olmoe__expert_gating_func": 2}, "softmax"),  # its graph does not look at the number
        ("glm4moe", {}, "sigmoid"),
        ("glm4moe", {"glm4moe__expert_gating_func": 1}, "softmax"),
        ("deepseek2", {}, "softmax"),
        ("refact", {}, "none"),
    ],
)
def test_gating(tmp_path: Path, arch: str, changes: dict[str, Any], gating: str) -> None:
    path = make(tmp_path / "m.gguf", arch, **changes)
    assert model_info(path).gating == gating


def test_optional_facts(tmp_path: Path) -> None:
    fields, tensors = model_parts()
    del fields["general.file_type"], fields["tokenizer.chat_template"]
    fields |= {
        "olmoe.expert_shared_count": 1,
        "olmoe.expert_group_count": 2,
        "olmoe.expert_group_used_count": 1,
        "olmoe.nextn_predict_layers": 1,
        "olmoe.expert_used_count": [0, 2, 1],
    }
    tensors["blk.1.exp_probs_b.bias"] = np.zeros(4, np.float32)
    tensors["blk.1.ffn_gate_tid2eid.weight"] = np.zeros((5, 4), np.int32)
    info = model_info(write_gguf(tmp_path / "m.gguf", "olmoe", fields, tensors))
    assert info.file_type == "mostly F32"
    assert info.chat_template is None
    assert info.has_selection_bias
    assert (info.n_shared_experts, info.n_expert_groups) == (1, 2)
    # The last layer only predicts further tokens: llama.cpp does not count it either.
    assert (info.n_layer, info.moe_layers, info.fixed_layers) == (2, (1,), (1,))
    assert info.steerable_layers == ()
    assert info.to_dict()["steerable_layers"] == []
    model = info.require_moe()
    assert model.n_expert_used == 2
    router = tensors["blk.1.ffn_gate_inp.weight"].astype("<f4").tobytes()
    assert model.router_sha256 == hashlib.sha256(router).hexdigest()


def test_dense_model(tmp_path: Path) -> None:
    fields = {"llama.block_count": 1}
    tensors = {"blk.0.ffn_up.weight": np.zeros((4, 32), np.float32)}
    info = model_info(write_gguf(tmp_path / "m.gguf", "llama", fields, tensors))
    assert not info.is_moe
    assert info.identity is None
    assert info.to_dict()["identity"] is None
    with pytest.raises(ModelError, match=r"no layer has"):
        info.require_moe()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"olmoe__expert_used_count": [0, 1, 2]}, "different numbers of experts"),
        ({"olmoe__expert_used_count": ...}, "top-0 of 4"),
        ({"olmoe__expert_used_count": 5}, "top-5 of 4"),
        ({"olmoe__expert_count": 8}, "router of layer 1 has shape [32, 4], not 8 experts"),
    ],
)
def test_models_that_cannot_be_steered(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    info = model_info(make(tmp_path / "m.gguf", **changes))
    assert info.is_moe
    with pytest.raises(ModelError) as caught:
        info.require_moe()
    assert words in str(caught.value)


def split(folder: Path) -> list[Path]:
    fields, tensors = model_parts()
    writer = gguf.GGUFWriter(folder / "m.gguf", "olmoe", split_max_tensors=2)
    for key, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        if not isinstance(value, list):
            add(key, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


def test_split_model(tmp_path: Path) -> None:
    parts = split(tmp_path)
    assert [part.name for part in parts] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    for part in parts:
        info = model_info(part)
        assert info.paths == tuple(parts)
        assert info.size_bytes == sum(p.stat().st_size for p in parts)
        assert info.require_moe().router_sha256 == expected_sha256()
    parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"m-00001-of-00002\.gguf: missing; fetch all 2"):
        model_info(parts[1])
    with pytest.raises(ModelError, match="2 parts under another"):
        model_info(tmp_path / "other.gguf")
    parts[0].write_bytes(parts[1].read_bytes())
    with pytest.raises(ModelError, match="not part 1 of 2"):
        model_info(parts[1])


def test_missing_damaged_and_other_files(tmp_path: Path) -> None:
    for bad in (tmp_path, tmp_path / "no.gguf"):
        with pytest.raises(ModelError, match="cannot be read"):
            model_info(bad)
    path = tmp_path / "m.gguf"
    for data in (b"", b"x" * 99):
        path.write_bytes(data)
        with pytest.raises(ModelError, match="not a GGUF file"):
            model_info(path)
    for change in ({"olmoe__block_count": "3"}, {"olmoe__block_count": 1.5}):
        with pytest.raises(ModelError, match="block_count is not a whole"):
            model_info(make(path, **change))
    with pytest.raises(ModelError, match="not a text"):
        model_info(make(path, general__name=3))


def test_truncated_and_flipped(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf")
    data = path.read_bytes()
    for length in range(0, len(data), 41):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            model_info(path)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, 2200, 500).tolist():
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        with contextlib.suppress(ModelError):
            model_info(path)


def test_header_agrees_with_gguf_py(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", general__alignment=64)
    header, reader = read_header(path), gguf.GGUFReader(path)
    for name, entry in header.fields.items():
        assert reader.fields[name].types[0] == entry.type
        if entry.value is not None:
            assert reader.fields[name].contents() == pytest.approx(entry.value)
    assert [(t.name, tuple(t.shape.tolist()), t.data_offset, t.n_bytes) for t in reader.tensors] == [
        (t.name, t.shape, t.offset, t.n_bytes) for t in header.tensors.values()
    ]
    for tensor in reader.tensors:
        assert np.array_equal(header.read(header.tensors[tensor.name]), tensor.data)


def test_a_large_vocabulary_is_skipped_quickly(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", tokenizer__ggml__merges=["a b"] * 150_000)
    start = time.process_time()
    assert model_info(path).is_moe
    assert time.process_time() - start < 2
