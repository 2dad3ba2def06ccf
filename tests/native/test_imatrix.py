"""llama-imatrix as an independent judge: its per-expert counts of two texts are a1 and a2.

llama-imatrix splits a text into chunks of n_ctx tokens (it wants two at least), drops what is left over, writes BOS
over each chunk's first token where the model wants one, and makes every token an output: it counts all layers, the last
one included. It never warms up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from steermoe_local import RoutingCounts
from steermoe_local.llama import capi
from tests.detection.test_recorder import counts_of, recording
from tests.support.low_level import identity_of

CHUNK, N_CHUNKS = 32, 3
TEXTS = (
    "one two three four five, six seven eight nine ten. " * 12,
    "1 2 3 4 5, 6 7 8 9 10. What is the sum? It is 55. " * 12,
)


def chunks_of(model: Any, text: str) -> tuple[str, list[list[int]]]:
    """The shortest beginning of `text` that gives all the chunks, and their tokens as llama-imatrix sees them."""
    tokens = model.tokenize(text.encode(), True, False)
    assert len(tokens) >= CHUNK * N_CHUNKS, "the text is too short for this tokenizer"
    chunks = [list(tokens[i * CHUNK : (i + 1) * CHUNK]) for i in range(N_CHUNKS)]
    if capi.llama_cpp().llama_vocab_get_add_bos(model.vocab):
        for chunk in chunks:
            chunk[0] = model.token_bos()
    return text, chunks


def imatrix_counts(path: Path, identity: Any) -> dict[str, Any]:
    """Per-expert counts of the file, [n_layer, n_expert] by tensor."""
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    return {
        name: np.stack(
            [found[f"blk.{layer}.{name}.weight.counts"].reshape(-1) for layer in range(identity.n_layer)]
        ).astype(np.int64)
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    }


@pytest.mark.parametrize("n_parallel", [1, N_CHUNKS])
def test_counts(tool: Callable[..., Any], tmp_path: Path, tiny_path: Path, tiny_model: Any, n_parallel: int) -> None:
    identity = identity_of(tiny_path)
    for number, text in enumerate(TEXTS):
        text, chunks = chunks_of(tiny_model, text)
        (tmp_path / "text.txt").write_text(text, "utf-8")
        out = tmp_path / f"imatrix-{number}-{n_parallel}.gguf"
        done = tool(
            *("llama-imatrix", "-m", tiny_path, "-f", tmp_path / "text.txt", "-o", out, "--output-format", "gguf"),
            *("-c", CHUNK, "-b", CHUNK * n_parallel, "-ub", CHUNK * n_parallel, "--chunks", N_CHUNKS),
            *("-t", 1, "-fa", "off", "--no-ppl", "-ngl", 0),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        judge = imatrix_counts(out, identity)

        with recording(tiny_model, identity.shape, n_bins=1, n_batch=CHUNK * n_parallel) as (context, recorder):
            for first in range(0, N_CHUNKS, n_parallel):
                rows = [
                    (token, position, sequence, True)
                    for sequence, chunk in enumerate(chunks[first : first + n_parallel])
                    for position, token in enumerate(chunk)
                ]
                context.clear()
                recorder.set_mask([0] * len(rows))
                context.decode_rows(rows)
            counts, tokens = counts_of(recorder, identity.shape, n_bins=1)
        assert tokens.tolist() == [[CHUNK * N_CHUNKS] * identity.n_layer]
        for name, table in judge.items():
            assert table.sum(axis=1).tolist() == [CHUNK * N_CHUNKS * identity.n_expert_used] * identity.n_layer, name
            assert np.array_equal(table, counts[0]), f"{name} of text {number}: another count than llama-imatrix's"


def test_record_counts(tool: Callable[..., Any], tmp_path: Path, tiny_path: Path, tiny_model: Any) -> None:
    """The same through `record_counts`: a pair of texts, the target is all of each."""
    from steermoe_local import Pair, record_counts

    identity = identity_of(tiny_path)
    texts = []
    judges = []
    for number, text in enumerate(TEXTS):
        chunk = chunks_of(tiny_model, text)[1][0]
        plain = tiny_model.detokenize(chunk, special=False).decode().strip()
        again = list(tiny_model.tokenize(plain.encode(), True, False))
        if capi.llama_cpp().llama_vocab_get_add_bos(tiny_model.vocab):
            assert again[0] == tiny_model.token_bos()
        # twice the text: llama-imatrix wants two chunks and gets one counted
        n = len(again)
        doubled = plain + " " + plain
        if list(tiny_model.tokenize(doubled.encode(), True, False))[:n] != again:
            pytest.skip("this tokenizer merges over the cut")
        (tmp_path / "text.txt").write_text(doubled + " " + plain, "utf-8")
        out = tmp_path / f"imatrix-{number}.gguf"
        done = tool(
            *("llama-imatrix", "-m", tiny_path, "-f", tmp_path / "text.txt", "-o", out, "--output-format", "gguf"),
            *("-c", n, "-b", n, "-ub", n, "--chunks", 1, "-t", 1, "-fa", "off", "--no-ppl", "-ngl", 0),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        texts.append(plain)
        judges.append(imatrix_counts(out, identity)["ffn_gate_exps"])
    pair = Pair("p", texts[0], texts[1], texts[0], texts[1])
    counts: RoutingCounts = record_counts(tiny_path, [pair], n_threads=1, n_batch=64, n_ubatch=64)
    bos = int(bool(capi.llama_cpp().llama_vocab_get_add_bos(tiny_model.vocab)))
    for side, (a, n, judge) in enumerate(((counts.a1, counts.n1, judges[0]), (counts.a2, counts.n2, judges[1]))):
        assert judge.sum() == (n + bos) * identity.n_expert_used * identity.n_layer, side
        difference = judge - a
        if not bos:
            assert not difference.any(), f"side {side}"
        else:  # the BOS token is no part of the target
            assert (difference >= 0).all()
            assert (difference.sum(axis=1) == identity.n_expert_used).all()
