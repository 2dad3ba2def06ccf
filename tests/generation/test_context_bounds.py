"""Numbers of tokens that llama.cpp's 32 bits cannot hold are refused, wherever they come from."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from steermoe_local import Engine, SteeredLlama, UsageError
from steermoe_local.llama import capi


def test_the_context_that_a_model_was_trained_with(tiny_path: Path, tmp_path: Path) -> None:
    """2^30 tokens are few enough for a header, and too many for eight slots; ctypes would cut the product off."""
    key = b"olmoe.context_length" + struct.pack("<I", 4)
    data = tiny_path.read_bytes()
    at = data.index(key) + len(key)
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:at] + struct.pack("<I", 1 << 30) + data[at + 4 :])
    llama = SteeredLlama(path, n_ctx=64, n_threads=1)
    with pytest.raises(UsageError, match=f"n_ctx: {1 << 30} for 8 slots"):
        Engine(llama, n_ctx=0, n_slots=8, n_threads=1)
    llama.close()


def test_a_context_of_many_sequences() -> None:
    assert capi.parallel_context_params((1 << 31) - 1, 64, 1, 1).n_ctx == (1 << 31) - 1
    with pytest.raises(UsageError, match=f"n_ctx: {1 << 32}"):
        capi.parallel_context_params(1 << 32, 64, 1, 1)
