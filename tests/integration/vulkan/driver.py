"""Logits of a model with all layers on the device, nothing looking into its graphs. A program of its own:

STEERMOE_BIAS=BIAS.gguf python driver.py MODEL OUTPUT.npy
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tests.support.low_level import Context
from tests.support.on_device import ALL, model_on


def main() -> None:
    """Command line."""
    path, output = map(Path, sys.argv[1:])
    tokens = np.random.default_rng(3).integers(0, 64, 10).tolist()
    with model_on(path, ALL) as model, Context(model) as context:
        parts = [context.decode(tokens[:6])]
        parts += [context.decode([token], 6 + i) for i, token in enumerate(tokens[6:])]
    np.save(output, np.concatenate(parts))
