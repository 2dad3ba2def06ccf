"""The options of sampling under llama.cpp's names, the same for every command that generates text."""

from __future__ import annotations

import functools
from typing import Any, cast

import click

from .common import F

__all__ = ["TRUNCATION", "sampling_options"]

_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
)

TRUNCATION = (
    click.option(
        "--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True, metavar="P", help="Nucleus sampling."
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1),
        default=0.05,
        show_default=True,
        metavar="P",
        help="Least probability, as a share of the likeliest token's.",
    ),
)
"""--top-p and --min-p."""

_OPTIONS = (
    click.option(
        "-n",
        "--predict",
        "--n-predict",
        "n_predict",
        type=click.IntRange(-1),
        default=-1,
        show_default=True,
        metavar="N",
        help="Tokens to generate at most, -1: until the model ends.",
    ),
    click.option(
        "-s",
        "--seed",
        type=click.IntRange(-1, 0xFFFFFFFE),  # llama.cpp takes the next one for "random"
        default=-1,
        show_default=True,
        metavar="SEED",
        help="Seed of sampling, -1: random.",
    ),
    click.option(
        "--temp",
        "temperature",
        type=click.FloatRange(0),
        default=0.8,
        show_default=True,
        metavar="T",
        help="Temperature of sampling, 0: greedy.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0),
        default=40,
        show_default=True,
        metavar="K",
        help="Sample from the k likeliest tokens, 0: from all.",
    ),
    *TRUNCATION,
    click.option(
        "--repeat-penalty",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        metavar="X",
        help="Penalty for tokens that stand in the last ones, 1: none.",
    ),
    click.option(
        "--repeat-last-n",
        type=click.IntRange(-1),
        default=64,
        show_default=True,
        metavar="N",
        help="How many last tokens the penalties look at, 0: none, -1: the whole context.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        metavar="X",
        help="For each token once, 0: none.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        metavar="X",
        help="For each time a token came, 0: none.",
    ),
)


def sampling_options(command: F) -> F:
    """How tokens are sampled; the command gets `sampling` (engine.Sampling) and `n_predict`.

    `n_predict` is None when there is no limit, and the sampling's seed is None when it is random.
    """

    @functools.wraps(command)
    def with_sampling(**arguments: Any) -> Any:
        from ...generation.engine import Sampling

        values = {name: arguments.pop(name) for name in _FIELDS}
        seed, n_predict = arguments.pop("seed"), arguments.pop("n_predict")
        return command(
            **arguments,
            sampling=Sampling(**values, seed=None if seed < 0 else seed),
            n_predict=None if n_predict < 0 else n_predict,
        )

    wrapped: Any = with_sampling
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return cast(F, wrapped)
