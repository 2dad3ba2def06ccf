"""Write the reference files of tests/data/ again: what transformers computes with the embedded model.

    .venv/bin/python tests/integration/reference/record.py      (after make test-reference, which installs torch)

`make test` compares the native library with these files and needs no torch. They belong to one tiny-moe.gguf and its
pairs, named in them by hash, and must be written again when these change.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # the tests are no installed package
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from steermoe_local.model_files.model_info import model_info
from steermoe_local.pairs.pairs import load_pairs, pairs_digest
from tests.integration.reference import cases, native
from tests.integration.reference.hf_olmoe import HfOlmoe, Steering
from tests.support.paths import DATA

PROMPTS_PER_BEHAVIOUR = 2
RECORDED = ("unsteered", "hard-8-8", "hard-random", "soft-random")
PLACES = 2  # whose logits are kept of each prompt: the middle and the end


def reference_counts(hf: HfOlmoe) -> tuple[dict[str, np.ndarray], dict[str, cases.Counts]]:
    """Contents of reference-counts.npz, and the counts by behaviour."""
    counts = {name: cases.count(hf, name) for name in cases.BEHAVIOURS}
    digests = [pairs_digest(load_pairs(native.data_file(f"{name}.pairs.jsonl"))) for name in counts]
    arrays = {
        "model_sha256": np.asarray(hf.sha256),
        "behaviours": np.asarray(list(counts)),
        "pairs_sha256": np.asarray(digests),
        "a1": np.stack([c.a[0] for c in counts.values()]),
        "a2": np.stack([c.a[1] for c in counts.values()]),
        "n1": np.stack([c.n[0] for c in counts.values()]),
        "n2": np.stack([c.n[1] for c in counts.values()]),
        "near_ties": np.stack([c.near_ties for c in counts.values()]),  # [behaviours, sides, layers]
    }
    return arrays, counts


def reference_logits(hf: HfOlmoe, steerings: dict[str, Steering | None]) -> dict[str, np.ndarray]:
    """Contents of reference-logits.npz: S ways to steer, P prompts of T tokens in all, one behind the other."""
    prompts = cases.prompts(hf, PROMPTS_PER_BEHAVIOUR)
    places = np.asarray([[len(tokens) // 2, len(tokens) - 1] for tokens in prompts])
    unsteered = Steering("soft", np.zeros((hf.n_layer, hf.n_expert), dtype=np.float32))
    chosen: list[Any] = [steerings[name] for name in RECORDED]
    runs = [[hf.run(tokens, steering) for tokens in prompts] for steering in chosen]
    values = [steering or unsteered for steering in chosen]
    return {
        "model_sha256": np.asarray(hf.sha256),
        "steerings": np.asarray(RECORDED),
        "modes": np.asarray([v.mode for v in values]),
        "values": np.stack([v.values.astype(np.float32) for v in values]),  # [S, layers, experts]
        "epsilons": np.asarray([v.epsilon for v in values], dtype=np.float32),
        "tokens": np.concatenate(prompts).astype(np.int32),  # [T]
        "lengths": np.asarray([len(tokens) for tokens in prompts]),  # [P]
        "places": places,  # [P, PLACES]
        "logits": np.stack([[r.logits[p] for r, p in zip(row, places, strict=True)] for row in runs]),
        "selected": np.stack([np.concatenate([r.selected for r in row], axis=1) for row in runs]).astype(np.uint8),
        "near_ties": np.stack([np.concatenate([r.margin for r in row], axis=1) for row in runs]) < native.NEAR_TIE,
    }


def main() -> None:
    """Command line."""
    model = native.data_file("tiny-moe.gguf")
    identity = model_info(model).identity
    assert identity is not None
    with tempfile.TemporaryDirectory() as folder:
        hf = HfOlmoe(model, Path(folder))
        count_arrays, counts = reference_counts(hf)
        logit_arrays = reference_logits(hf, cases.steerings(counts, identity))
    DATA.mkdir(exist_ok=True)
    for name, arrays in (("counts", count_arrays), ("logits", logit_arrays)):
        path = DATA / f"reference-{name}.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        print(f"{path.relative_to(DATA.parents[1])}: {path.stat().st_size} bytes")
    print(f"of {model.name} {hf.sha256}, near ties: {int(count_arrays['near_ties'].sum())}")


if __name__ == "__main__":
    main()
