"""Logits of a model with all layers on the device, nothing looking into its graphs. A program of its own:

STEERMOE_BIAS=BIAS.gguf python driver.py MODEL OUTPUT.npy [BIAS.gguf]

The second bias takes the place of the first after some tokens, and is taken off again; llama.cpp's log goes to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from steermoe_local.llama import capi
from tests.support.low_level import Context, set_verbose
from tests.support.on_device import ALL, model_on

N_PROMPT, N_EACH = 6, 6


def main() -> None:
    """Command line."""
    path, output, *later = map(Path, sys.argv[1:])
    n_single = 3 * N_EACH if later else 4
    tokens = np.random.default_rng(3).integers(0, 64, N_PROMPT + n_single).tolist()
    with model_on(path, ALL, verbose=True) as model, Context(model) as context:
        set_verbose(True)  # making the context turned it off
        parts = [context.decode(tokens[:N_PROMPT])]
        for i, token in enumerate(tokens[N_PROMPT:]):
            if later and i == N_EACH:
                capi.attach(context.ctx, capi.NativeBias.load(later[0]))
            if later and i == 2 * N_EACH:
                capi.detach(context.ctx)
            parts.append(context.decode([token], N_PROMPT + i))
    np.save(output, np.concatenate(parts))
