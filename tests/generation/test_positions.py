"""Models with a table of positions: behind its end llama.cpp ends the process, so the engine refuses before."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from steermoe_local import SteeredLlama, UsageError
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling

N_POSITIONS, N_VOCAB, N_EMBD, N_FF, N_LAYER = 40, 48, 32, 64, 2
GREEDY = Sampling(temperature=0)


def write(path: Path, arch: str) -> Path:
    """A random dense model whose positions are learned."""
    rng = np.random.default_rng(3)

    def random(*shape: int) -> Any:
        return rng.normal(scale=0.2, size=shape).astype(np.float32)

    tensors = {"token_embd.weight": random(N_VOCAB, N_EMBD), "position_embd.weight": random(N_POSITIONS, N_EMBD)}
    shapes: dict[str, tuple[int, ...]] = {"output_norm": (N_EMBD,)}
    for layer in range(N_LAYER):
        parts: dict[str, tuple[int, ...]] = {"attn_norm": (N_EMBD,), "attn_qkv": (3 * N_EMBD, N_EMBD)}
        parts |= {"attn_output": (N_EMBD, N_EMBD), "ffn_norm": (N_EMBD,)}
        parts |= {"ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    for name, shape in shapes.items():
        tensors |= {f"{name}.weight": random(*shape), f"{name}.bias": random(shape[0])}
    writer = GGUFWriter(path, arch)
    writer.add_context_length(N_POSITIONS)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["gpt2", "mpt", "starcoder"])
def test_no_context_is_longer_than_the_positions(tmp_path: Path, arch: str) -> None:
    llama = SteeredLlama(write(tmp_path / "m.gguf", arch), n_ctx=16, n_batch=16, n_threads=1)
    with closing(llama):
        for n_ctx in (N_POSITIONS + 1, 4096):
            with pytest.raises(UsageError, match=rf"n_ctx: {n_ctx}, .*{arch} .*{N_POSITIONS} positions"):
                Engine(llama, n_ctx=n_ctx, n_threads=1)
        with Engine(llama, n_ctx=0, n_threads=1) as engine:  # as many as the model has
            assert engine.n_ctx == N_POSITIONS
            request = Request(list(range(1, 30)), sampling=GREEDY, special=True)
            events = [event for _, event in engine.generate(request)]
            assert isinstance(events[-1], FinishEvent)
            assert 29 + events[-1].n_generated == N_POSITIONS, "up to the last position, and not behind it"


UNGUARDED = """
import sys
from steermoe_local import SteeredLlama
from steermoe_local.generation import context
from steermoe_local.generation.engine import Engine, Request, Sampling
context._LEARNED_POSITIONS = ()
llama = SteeredLlama(sys.argv[1], n_ctx=16, n_batch=16, n_threads=1)
with Engine(llama, n_ctx=256, n_threads=1) as engine:
    list(engine.generate(Request(list(range(1, 30)), None, Sampling(temperature=0), 40)))
"""


def test_what_happens_without_the_guard(tmp_path: Path) -> None:
    command = [sys.executable, "-c", UNGUARDED, str(write(tmp_path / "m.gguf", "gpt2"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0, "llama.cpp bears it now: the guard can go"
    assert "Traceback" not in done.stderr, done.stderr
