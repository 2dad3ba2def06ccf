"""GGUF files with a vocabulary of the archive: of the vocabulary alone, or a whole model with random weights.

Vocabularies go from file to file as bytes: gguf-py takes half a minute to read the largest, string by string.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType

from steermoe_local.models.embedded import data_folder
from tests.integration.rehearsal.archive import vocabularies

TINY = data_folder() / "tiny-moe.gguf"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ARRAYS = ("tokens", "token_type", "scores")  # one entry a token


@dataclass(frozen=True)
class RawArray:
    """An array as a GGUF file holds it: type of its items, their number, their bytes."""

    kind: int
    n: int
    data: bytes

    def extended(self, items: Iterable[bytes]) -> RawArray:
        """With further items."""
        items = list(items)
        return RawArray(self.kind, self.n + len(items), self.data + b"".join(items))


class _Writer(GGUFWriter):
    """A GGUFWriter that takes arrays as they are."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if isinstance(val, RawArray):
            return struct.pack("<IIQ", GGUFValueType.ARRAY, val.kind, val.n) + val.data
        return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer fields of a file: scalars and texts by name, arrays as bytes; texts of the tokens."""

    name: str
    scalars: Mapping[str, Any]
    arrays: Mapping[str, RawArray]
    tokens: tuple[bytes, ...]

    def with_markers(self, control: Iterable[str], defined: Iterable[str] = ()) -> Vocabulary:
        """With markers as tokens: control tokens, and user-defined ones, as `<think>` is in many models."""
        known = set(self.tokens)
        found = dict.fromkeys(control, TokenType.CONTROL) | dict.fromkeys(defined, TokenType.USER_DEFINED)
        added = {text.encode(): kind for text, kind in found.items() if text.encode() not in known}
        values = {
            "tokens": [struct.pack("<Q", len(text)) + text for text in added],
            "token_type": [struct.pack("<i", kind) for kind in added.values()],
            "scores": [struct.pack("<f", 0.0)] * len(added),
        }
        arrays = dict(self.arrays)
        for field in _ARRAYS:
            if (key := f"tokenizer.ggml.{field}") in arrays:
                arrays[key] = arrays[key].extended(values[field])
        return Vocabulary(self.name, self.scalars, arrays, (*self.tokens, *added))

    @property
    def model(self) -> str:
        """Kind of tokenizer, llama.cpp's name: "llama" (SentencePiece), "gpt2" (BPE), "bert", "t5", "gemma4"."""
        return str(self.scalars["tokenizer.ggml.model"])

    def text(self, kind: str) -> str:
        """Text of the "bos" or "eos" token, "" without one."""
        token = self.scalars.get(f"tokenizer.ggml.{kind}_token_id")
        return "" if token is None else self.tokens[token].decode()


@cache
def vocabulary(name: str) -> Vocabulary:
    """Read a vocabulary of the archive; "tiny": the embedded model's."""
    path = TINY if name == "tiny" else vocabularies()[name]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(name, data)


def _read(name: str, data: mmap.mmap) -> Vocabulary:
    (n_fields,) = struct.unpack_from("<Q", data, 16)
    at = 24
    scalars: dict[str, Any] = {}
    arrays: dict[str, RawArray] = {}
    tokens: list[bytes] = []

    def text() -> bytes:
        nonlocal at
        (size,) = struct.unpack_from("<Q", data, at)
        at += 8 + size
        return data[at - size : at]

    for _ in range(n_fields):
        key = text().decode()
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        if kind == GGUFValueType.ARRAY:
            kind, n = struct.unpack_from("<IQ", data, at)
            at += 12
            start = at
            if kind == GGUFValueType.STRING:
                texts = [text() for _ in range(n)]
                tokens = texts if key == "tokenizer.ggml.tokens" else tokens
            else:
                at += n * struct.calcsize(_SCALARS[kind])
            arrays[key] = RawArray(kind, n, data[start:at])
        elif kind == GGUFValueType.STRING:
            scalars[key] = text().decode()
        else:
            (scalars[key],) = struct.unpack_from(f"<{_SCALARS[kind]}", data, at)
            at += struct.calcsize(_SCALARS[kind])
    kept = [{key: v for key, v in d.items() if key.startswith("tokenizer.")} for d in (scalars, arrays)]
    return Vocabulary(name, kept[0], kept[1], tuple(tokens))


def _add_vocabulary(writer: GGUFWriter, vocab: Vocabulary, template: str | None) -> None:
    for key, value in vocab.scalars.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            if key != "tokenizer.chat_template":
                writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for key, array in vocab.arrays.items():
        writer.add_key_value(key, array, GGUFValueType.ARRAY)
    if template is not None:
        writer.add_chat_template(template)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(path: Path, vocab: Vocabulary, template: str | None) -> Path:
    """A file without weights, for what loads the vocabulary alone. It says that it is a small OLMoE."""
    writer = _Writer(path, "olmoe")
    writer.add_context_length(4096)
    writer.add_expert_count(64)
    writer.add_expert_used_count(8)
    writer.add_block_count(2)
    _add_vocabulary(writer, vocab, template)
    _finish(writer)
    return path


N_FF = 32


def write_model(
    path: Path,
    source: Path,
    vocab: Vocabulary,
    template: str | None,
    *,
    n_expert: int,
    k: int,
    fields: Mapping[str, Any] | None = None,
    context: int = 4096,
) -> Path:
    """A model of random weights: `source` of test-llama-archs with a vocabulary and numbers of experts.

    `fields` are further values of its architecture, such as `expert_group_count`. Layers have narrow feed-forward
    networks, so that hundreds of experts are a few megabytes.
    """
    reader = GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    changed = {"vocab_size": len(vocab.tokens), "context_length": context} | dict(fields or {})
    changed |= {"expert_count": n_expert, "expert_used_count": k, "feed_forward_length": N_FF}
    writer = _Writer(path, arch)
    for key, entry in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture", "tokenizer.")):
            continue
        name = key.removeprefix(f"{arch}.")
        value = entry.contents()
        if name == "expert_feed_forward_length" and value:
            value = N_FF
        value = changed.get(name, value)
        if isinstance(value, int) and entry.types[0] == GGUFValueType.ARRAY:  # one value a layer
            value = [value] * len(entry.contents())
        if value != []:
            writer.add_key_value(key, value, entry.types[0], entry.types[-1] if len(entry.types) > 1 else None)
    _add_vocabulary(writer, vocab, template)
    wide = int(np.max(reader.fields[f"{arch}.feed_forward_length"].contents()))
    narrowed = {wide: N_FF, 2 * wide: 2 * N_FF}  # the latter where gate and up are one tensor
    rng = np.random.default_rng(11)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, _values(tensor, len(vocab.tokens), n_expert, narrowed, rng))
    _finish(writer)
    return path


def _values(tensor: Any, n_vocab: int, n_expert: int, narrowed: Mapping[int, int], rng: np.random.Generator) -> Any:
    values = np.array(tensor.data)
    name = tensor.name
    shape = list(values.shape)
    if name in ("token_embd.weight", "output.weight", "output.bias"):
        shape[0] = n_vocab
    elif ".ffn_" in name or ".exp_probs_b" in name:
        shape = [narrowed.get(size, size) for size in shape]
        if ("exp" in name.split(".")[2].replace("shexp", "") or "ffn_gate_inp." in name) and shape[0] == 2:
            shape[0] = n_expert
    if shape == list(values.shape):
        return values
    scale = {"ffn_gate_inp": 1.0, "token_embd": 1.0}.get(name.split(".")[-2], 0.1)
    # wide vocabularies in half precision: the file stays small
    kind = np.float16 if len(shape) == 2 and shape[0] == n_vocab else values.dtype
    return (rng.standard_normal(shape, dtype=np.float32) * scale).astype(kind)
