"""The options of sampling under llama.cpp's names, the same for every command that generates text."""

from __future__ import annotations

from typing import Any

import click

from .groups import SAMPLING, option_group

# also of the commands that measure
TOP_P: dict[str, Any] = {
    "type": click.FloatRange(0, 1),
    "default": 0.95,
    "show_default": True,
    "metavar": "P",
    "help": "Nucleus sampling.",
}
MIN_P: dict[str, Any] = {
    "type": click.FloatRange(0, 1),
    "default": 0.05,
    "show_default": True,
    "metavar": "P",
    "help": "Least probability, as a share of the likeliest token's.",
}

_N_PREDICT = click.option(
    "-n",
    "--predict",
    "--n-predict",
    "--max-tokens",
    "n_predict",
    type=click.IntRange(-1),
    default=-1,
    show_default=True,
    metavar="N",
    help="Most tokens, -1: until the model ends.",
)
_OPTIONS = (
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
        "--temperature",
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
    click.option("--top-p", **TOP_P),
    click.option("--min-p", **MIN_P),
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


def _sampling(seed: int, **values: Any) -> Any:
    from ...generation.engine import Sampling

    return Sampling(**values, seed=None if seed < 0 else seed)


def _generation(n_predict: int, **values: Any) -> dict[str, Any]:
    return {"sampling": _sampling(**values), "n_predict": None if n_predict < 0 else n_predict}


_COMMON = ("n_predict", "seed", "temperature")

sampling_options = option_group(_generation, options=(_N_PREDICT, *_OPTIONS), heading=SAMPLING, common=_COMMON)
"""How tokens are sampled; the command gets `sampling` (engine.Sampling) and `n_predict`.

`n_predict` is None when there is no limit, and the sampling's seed is None when it is random.
"""


def sampling_parameters() -> list[click.Parameter]:
    """The options of `sampling_options`, to read their values elsewhere than on the command line."""

    def command(**_: Any) -> None:
        pass

    return list(reversed(getattr(sampling_options(command), "__click_params__")))  # noqa: B009 # of functions


drawing_options = option_group(_sampling, "sampling", _OPTIONS, heading=SAMPLING, common=_COMMON)
"""The same without -n, for a command that has another one; the command gets `sampling`."""
