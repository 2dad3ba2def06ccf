"""Copies of GGUF models by gguf-py's writer: split, with tensors in another order, with another tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter


def copy_model(
    source: Path,
    target: Path,
    *,
    max_tensors: int = 0,
    empty_first: bool = False,
    order: Callable[[str], Any] | None = None,
    tokenizer_of: Path | None = None,
    template: str | None = None,
    pre: str | None = None,
    random: int | None = None,
    top_k: int | None = None,
) -> list[Path]:
    """Write a copy; returns its files, in order.

    With `max_tensors` it is split, and `target` gives the name; `empty_first` leaves the first part without tensors.
    `order` is the key that sorts the tensors' names. `tokenizer_of` is the model whose tokenizer the copy gets.
    `template` is its chat template, "" for none; `pre` the name of its tokenizer's pattern.
    `random` is the seed of random weights that the copy gets: normal, F32, ones in norms. `top_k` is how many experts a
    token uses.
    """
    reader = GGUFReader(source)
    fields = dict(reader.fields)
    if tokenizer_of:
        fields = {name: field for name, field in fields.items() if not name.startswith("tokenizer.")}
        others = GGUFReader(tokenizer_of).fields
        fields |= {name: field for name, field in others.items() if name.startswith("tokenizer.")}
    if template is not None:
        fields.pop("tokenizer.chat_template", None)
    architecture = fields.pop("general.architecture").contents()
    writer = GGUFWriter(target, architecture, split_max_tensors=max_tensors, small_first_shard=empty_first)
    for name, field in fields.items():
        if not name.startswith(("GGUF.", "split.")):
            kind = field.types[0]
            changed = {"tokenizer.ggml.pre": pre, f"{architecture}.expert_used_count": top_k}
            value = changed[name] if changed.get(name) is not None else field.contents()
            writer.add_key_value(name, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    if template:
        writer.add_chat_template(template)
    tensors = sorted(reader.tensors, key=lambda tensor: order(tensor.name)) if order else reader.tensors
    draws = np.random.default_rng(random)
    for tensor in tensors:
        if random is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        shape = tuple(int(n) for n in tensor.shape[::-1])
        weights = np.ones(shape) if "norm" in tensor.name else draws.normal(scale=shape[-1] ** -0.5, size=shape)
        writer.add_tensor(tensor.name, weights.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}-*-of-*.gguf")) if max_tensors else [target]
