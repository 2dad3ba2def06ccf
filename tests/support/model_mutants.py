"""Damaged GGUF models, by number: a real header taken apart, changed where its counts and sizes are, and put together.

The same seed and number give the same file. Data is a hole in the file, so that a mutant costs what its header costs.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGUFValueType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

U32, U64, ARRAY, STRING = GGUFValueType.UINT32, GGUFValueType.UINT64, GGUFValueType.ARRAY, GGUFValueType.STRING
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of scalars by their type
_NUMBERS = (0, 1, 2, 3, 5, 8, 255, 256, 511, 513, 4095, 4097, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32)
_HUGE = (*_NUMBERS, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_SUFFIXES = (
    *("block_count", "nextn_predict_layers", "leading_dense_block_count", "expert_count", "expert_used_count"),
    *("expert_group_count", "expert_group_used_count", "expert_shared_count", "expert_gating_func", "vocab_size"),
    *("context_length", "embedding_length", "feed_forward_length", "expert_feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.key_length_swa", "attention.value_length_swa", "attention.key_length_mla"),
    *("attention.sliding_window", "attention.recurrent_layers", "attention.indexer.key_length"),
    *("rope.dimension_count", "rope.scaling.type", "rope.scaling.original_context_length", "shortconv.l_cache"),
    *("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.group_count", "kda.head_dim"),
)
_GENERAL = (
    *("general.architecture", "general.name", "general.alignment", "general.file_type", "general.type"),
    *("split.count", "split.no", "split.tensors.count", "tokenizer.chat_template", "tokenizer.ggml.tokens"),
)
_TEXTS = (
    b"",
    b"olmoe",
    b"clip",
    b"\xff\xfe",
    b"a\nb\x1b[2J",
    b"{% for x in range(9) %}",
    "\u0663".encode(),
    b"expertbias",
)
_KEPT_ITEMS = 12  # of a seed's arrays: vocabularies would only take time


@dataclass(frozen=True)
class Forged:
    """A GGUF in pieces: fields as (key, type, value's bytes), tensors as (name, shape, type, offset), and its counts.

    `n_tensors` and `n_fields` None are the true counts; `tail` is the size of the data section.
    """

    fields: tuple[tuple[bytes, int, bytes], ...]
    tensors: tuple[tuple[bytes, tuple[int, ...], int, int], ...]
    tail: int
    n_tensors: int | None = None
    n_fields: int | None = None
    version: int = 3

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_fields = len(self.fields) if self.n_fields is None else self.n_fields
        parts = [struct.pack("<4sIQQ", b"GGUF", self.version, n_tensors, n_fields)]
        for key, kind, value in self.fields:
            parts += [text(key), struct.pack("<I", kind), value]
        for name, shape, kind, offset in self.tensors:
            parts += [text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape), struct.pack("<IQ", kind, offset)]
        return b"".join(parts)


def text(data: bytes) -> bytes:
    """A text as GGUF writes it."""
    return struct.pack("<Q", len(data)) + data


def array(kind: int, items: list[bytes], count: int | None = None) -> bytes:
    """The value of an array field; `count` is what it says of itself."""
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


def taken_apart(path: Path) -> Forged:
    """A valid GGUF in pieces, its long arrays shortened and its data left out."""
    data, at = path.read_bytes(), 24

    def take(fmt: str) -> int:
        nonlocal at
        at += struct.calcsize(fmt)
        return int(struct.unpack_from(fmt, data, at - struct.calcsize(fmt))[0])

    def piece(kind: int) -> bytes:
        nonlocal at
        start, at = at, at + (8 + int.from_bytes(data[at : at + 8], "little") if kind == STRING else _SIZES[kind])
        return data[start:at]

    n_tensors, n_fields = struct.unpack_from("<QQ", data, 8)
    fields = []
    for _ in range(n_fields):
        key, kind = piece(int(STRING))[8:], take("<I")
        if kind != ARRAY:
            fields.append((key, kind, piece(kind)))
            continue
        item, count = take("<I"), take("<Q")
        fields.append((key, kind, array(item, [piece(item) for _ in range(count)][:_KEPT_ITEMS])))
    tensors = []
    for _ in range(n_tensors):
        name, n_dims = piece(int(STRING))[8:], take("<I")
        shape = tuple(take("<Q") for _ in range(n_dims))
        tensors.append((name, shape, take("<I"), take("<Q")))
    return _laid_out(Forged(tuple(fields), tuple(tensors), 0))


def write(forged: Forged, path: Path, rng: random.Random) -> None:
    """Write a mutant; now and then with single bytes of the header changed, or cut off."""
    header = bytearray(forged.header())
    if rng.random() < 0.08:
        for _ in range(rng.randint(1, 4)):
            header[rng.randrange(len(header))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    if rng.random() < 0.05:
        del header[rng.randrange(len(header)) :]
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(-(-len(header) // 32) * 32 + (forged.tail if rng.random() < 0.95 else rng.choice((0, 1 << 40))))


def mutant(seeds: list[Forged], rng: random.Random) -> Forged:
    """A seed with one to four changes."""
    forged = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        forged = rng.choice(_CHANGES)(forged, rng)
    return forged


def _key(forged: Forged, rng: random.Random) -> bytes:
    arch = next((value[8:] for key, _, value in forged.fields if key == b"general.architecture"), b"olmoe")
    if rng.random() < 0.3:
        return rng.choice(_GENERAL).encode()
    return arch + b"." + rng.choice(_SUFFIXES).encode()


def _number(rng: random.Random) -> tuple[int, bytes]:
    kind = rng.choice((U32, U32, U32, U64, *_SIZES))
    value = rng.choice(_NUMBERS[:6] if rng.random() < 0.6 else _HUGE) & ((1 << 8 * _SIZES[kind]) - 1)
    return int(kind), value.to_bytes(_SIZES[kind], "little")


def _some_array(rng: random.Random) -> tuple[int, bytes]:
    kind = int(rng.choice((*_SIZES, STRING, ARRAY)))
    n = rng.choice((0, 1, 3, 5, 40, 4096, 4097))
    items = [text(b"x")] * n if kind == STRING else [rng.choice((b"\0", b"\1", b"\xff")) * _SIZES.get(kind, 12)] * n
    return int(ARRAY), array(kind, items, rng.choice((None, None, None, *_HUGE)))


def _set_field(forged: Forged, rng: random.Random) -> Forged:
    """A number, text or array where the header has, or may have, a count or a size."""
    key, kind = _key(forged, rng), rng.random()
    if kind < 0.6:
        made, value = _number(rng)
    elif kind < 0.8:
        made, value = _some_array(rng)
    else:
        made, value = int(STRING), text(rng.choice((*_TEXTS, b"n" * rng.choice((129, 5000, 1 << 20, (1 << 20) + 1)))))
    others = tuple(field for field in forged.fields if field[0] != key)
    at = rng.randint(0, len(others))
    return replace(forged, fields=(*others[:at], (key, made, value), *others[at:]))


def _drop_field(forged: Forged, rng: random.Random) -> Forged:
    if not forged.fields:
        return forged
    at = rng.randrange(len(forged.fields))
    return replace(forged, fields=forged.fields[:at] + forged.fields[at + 1 :])


def _repeat_field(forged: Forged, rng: random.Random) -> Forged:
    return replace(forged, fields=(*forged.fields, rng.choice(forged.fields))) if forged.fields else forged


def _text_length(forged: Forged, rng: random.Random) -> Forged:
    """A text that says that it is longer."""
    found = [at for at, field in enumerate(forged.fields) if field[1] == STRING]
    if not found:
        return forged
    at = rng.choice(found)
    key, kind, value = forged.fields[at]
    lying = (key, kind, struct.pack("<Q", rng.choice(_HUGE)) + value[8:])
    return replace(forged, fields=(*forged.fields[:at], lying, *forged.fields[at + 1 :]))


def _counts(forged: Forged, rng: random.Random) -> Forged:
    if rng.random() < 0.5:
        return replace(forged, n_tensors=rng.choice(_HUGE))
    return replace(forged, n_fields=rng.choice(_HUGE))


def _tensor(forged: Forged, rng: random.Random) -> Forged:
    """Another name, shape, type or offset."""
    if not forged.tensors:
        return forged
    at = rng.randrange(len(forged.tensors))
    name, shape, kind, offset = forged.tensors[at]
    what = rng.choice((0, 0, 0, 0, 1, 2, 3, 4))
    if what == 0:
        layer = rng.choice((b"0", b"00", b"-1", b"4", b"99", b"4096", b"99999", "\u0663".encode()))
        name = (
            b"blk." + layer + rng.choice((b".ffn_gate_inp.weight", b".attn_k.weight", b".ssm_a", b".exp_probs_b.bias"))
        )
    elif what == 1:
        shape = tuple(rng.choice(_HUGE) if rng.random() < 0.5 else size for size in shape)
    elif what == 2:
        shape = tuple(rng.choice(_NUMBERS) for _ in range(rng.choice((0, 1, 2, 3, 4, 5))))
    elif what == 3:
        kind = rng.randrange(45)
    else:
        offset = rng.choice(_HUGE)
    changed = (*forged.tensors[:at], (name, shape, kind, offset), *forged.tensors[at + 1 :])
    return (
        _laid_out(replace(forged, tensors=changed))
        if what != 4 and rng.random() < 0.8
        else replace(forged, tensors=changed)
    )


def _drop_tensors(forged: Forged, rng: random.Random) -> Forged:
    kept = tuple(tensor for tensor in forged.tensors if rng.random() < 0.8)
    return _laid_out(replace(forged, tensors=kept))


def _laid_out(forged: Forged) -> Forged:
    """With the offsets that follow from the shapes, and data of that size, up to a TiB (of nothing)."""
    tensors, at = [], 0
    for name, shape, kind, _ in forged.tensors:
        block, size = GGML_QUANT_SIZES.get(GGMLQuantizationType(kind) if kind in _TYPES else 0, (1, 4))
        n = 1
        for length in shape:
            n *= length
        tensors.append((name, shape, kind, min(at, (1 << 64) - 1)))
        at += -(-(n // block * size) // 32) * 32
    return replace(forged, tensors=tuple(tensors), tail=min(at, 1 << 40))


_TYPES = {int(kind) for kind in GGMLQuantizationType}
_CHANGES = (
    *(_set_field,) * 8,
    *(_tensor,) * 4,
    *(_drop_field, _repeat_field, _text_length, _counts, _drop_tensors),
)
