"""Run many models with whatever llama.cpp LLAMA_CPP_LIB_PATH names, and keep every logit. A program of its own:

python driver_many.py OUTPUT.npz MODEL...
"""

from __future__ import annotations

import sys
from pathlib import Path

import llama_cpp
import numpy as np
from driver import Context, context, tokens

N_PROMPT, N_SINGLE = 40, 4


def prompt_and_singles(c: Context) -> np.ndarray:
    """A prompt, then single tokens."""
    ids = tokens(c.n_vocab, N_PROMPT + N_SINGLE, 2)
    parts = [c.decode([(t, i, 0) for i, t in enumerate(ids[:N_PROMPT])])]
    parts += [c.decode([(ids[i], i, 0)]) for i in range(N_PROMPT, len(ids))]
    return np.concatenate(parts)


def main() -> None:
    """Command line."""
    output, *paths = sys.argv[1:]
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    found = {"patched": np.asarray(hasattr(llama_cpp.llama_cpp._lib, "steermoe_abi_version"))}
    for path in paths:
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise SystemExit(f"{path}: cannot be loaded")
        with context(model, n_ctx=128, n_ubatch=64, n_seq_max=1) as c:
            found[Path(path).stem] = prompt_and_singles(c)
        llama_cpp.llama_model_free(model)
    np.savez(output, allow_pickle=False, **found)


if __name__ == "__main__":
    main()
