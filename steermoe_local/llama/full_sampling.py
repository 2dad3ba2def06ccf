"""Sampling with all of llama.cpp's samplers, as requests under llama-server's field names ask for them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from .sampling import LARGEST, Sampling, bias_sampler, require_ranges

SAMPLERS = {
    "penalties": "e",
    "dry": "d",
    "top_n_sigma": "s",
    "top_k": "k",
    "typ_p": "y",
    "top_p": "p",
    "min_p": "m",
    "xtc": "x",
    "temperature": "t",
    "adaptive_p": "a",
}
"""llama.cpp's samplers and their letters (`common_sampler_type_to_chr`); the first nine in its default order.

"infill" is left out: it belongs to llama-server's /infill, and without a top-k before it compares all pairs of tokens.
"""

DEFAULT_ORDER = tuple(SAMPLERS)[:9]

MAX_SAMPLERS = 32
MAX_BREAKERS = 16
MAX_BREAKER = 40  # characters; llama.cpp cuts longer ones

_OTHER_NAMES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p", "typical": "typ_p", "typical_p": "typ_p"}
_BREAKERS = ("\n", ":", '"', "*")
_MIROSTAT_1_TOKENS = 100  # llama.cpp's, the paper's m


@dataclass(frozen=True)
class FullSampling(Sampling):
    """`Sampling`, and llama.cpp's further samplers under llama-server's names, each off by default.

    `samplers` is their order, and those left out are off; None: `DEFAULT_ORDER`. `min_keep` tokens stay at least behind
    each filter. With `ignore_eos` nothing but a limit or a stop string ends the answer. With `mirostat` 1 or 2 only
    logit biases and the temperature are applied before it, as in llama.cpp.

    Raises UsageError for values outside their ranges, and for an unknown sampler.
    """

    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = _BREAKERS
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    min_keep: int = 0
    ignore_eos: bool = False
    samplers: tuple[str, ...] | None = field(default=None)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require_ranges(
            self,
            typical_p=(0, 1),
            top_n_sigma=(-LARGEST, LARGEST),
            xtc_probability=(0, 1),
            xtc_threshold=(0, 1),
            dynatemp_range=(0, LARGEST),
            dynatemp_exponent=(0, LARGEST),
            dry_multiplier=(0, LARGEST),
            dry_base=(0, LARGEST),
            dry_allowed_length=(0, 2**31 - 1),
            dry_penalty_last_n=(-1, 2**31 - 1),
            mirostat=(0, 2),
            mirostat_tau=(0, LARGEST),
            mirostat_eta=(0, LARGEST),
            adaptive_target=(-LARGEST, 1),
            adaptive_decay=(0, 0.99),
            min_keep=(0, 2**31 - 1),
        )
        if self.dry_multiplier and not all(self.dry_sequence_breakers):
            raise UsageError("dry_sequence_breakers: one is empty; leave it out")
        for name in self.samplers or ():
            _require_sampler(name, name)

    def chain(self, lib: Any, vocab: Any, n_ctx: int, seed: int) -> tuple[list[Any], int]:
        """As `Sampling.chain`, in the order of llama.cpp's common_sampler_init."""
        n_vocab = lib.llama_vocab_n_tokens(vocab)
        first = []
        if self.ignore_eos:
            ends = [token for token in range(n_vocab) if lib.llama_vocab_is_eog(vocab, token)]
            first = [bias_sampler(lib, n_vocab, dict.fromkeys(ends, -math.inf))] if ends else []
        if self.mirostat:
            drawn = (
                lib.llama_sampler_init_mirostat(n_vocab, seed, self.mirostat_tau, self.mirostat_eta, _MIROSTAT_1_TOKENS)
                if self.mirostat == 1
                else lib.llama_sampler_init_mirostat_v2(seed, self.mirostat_tau, self.mirostat_eta)
            )
            return [*first, lib.llama_sampler_init_temp(self.temperature), drawn], 0
        order = DEFAULT_ORDER if self.samplers is None else self.samplers
        samplers: list[Any] = []
        n_look_back = 0
        for name in order:
            if name == "adaptive_p":
                continue  # it draws, so it comes last
            if name in ("penalties", "dry"):
                found, last_n = (self.penalties if name == "penalties" else self._dry)(lib, vocab, n_ctx)
                samplers += found
                n_look_back = max(n_look_back, last_n)
            else:
                samplers += self._filter(name, lib, seed)
        if "adaptive_p" in order:
            draw = lib.llama_sampler_init_adaptive_p(self.adaptive_target, self.adaptive_decay, seed)
        else:
            draw = lib.llama_sampler_init_dist(seed)
        return [*first, *samplers, draw], n_look_back

    def _dry(self, lib: Any, vocab: Any, n_ctx: int) -> tuple[list[Any], int]:
        last_n = n_ctx if self.dry_penalty_last_n == -1 else min(self.dry_penalty_last_n, n_ctx)
        if not self.dry_multiplier or not last_n:
            return [], 0
        texts = [text.encode("utf-8") for text in self.dry_sequence_breakers]
        breakers = (ctypes.c_char_p * len(texts))(*texts)
        base = self.dry_base if self.dry_base >= 1 else FullSampling.dry_base  # as llama-server
        length = self.dry_allowed_length
        return [
            lib.llama_sampler_init_dry(vocab, self.dry_multiplier, base, length, last_n, breakers, len(texts))
        ], last_n

    def _filter(self, name: str, lib: Any, seed: int) -> list[Any]:
        """The native sampler of a name, none if it is off."""
        keep = max(1, self.min_keep)
        makers: dict[str, tuple[bool, Callable[[], Any]]] = {
            "top_n_sigma": (self.top_n_sigma > 0, lambda: lib.llama_sampler_init_top_n_sigma(self.top_n_sigma)),
            "top_k": (True, lambda: lib.llama_sampler_init_top_k(self.top_k)),
            "typ_p": (self.typical_p < 1, lambda: lib.llama_sampler_init_typical(self.typical_p, keep)),
            "top_p": (True, lambda: lib.llama_sampler_init_top_p(self.top_p, keep)),
            "min_p": (True, lambda: lib.llama_sampler_init_min_p(self.min_p, keep)),
            "xtc": (
                self.xtc_probability > 0,
                lambda: lib.llama_sampler_init_xtc(self.xtc_probability, self.xtc_threshold, keep, seed),
            ),
            "temperature": (
                True,
                lambda: lib.llama_sampler_init_temp_ext(self.temperature, self.dynatemp_range, self.dynatemp_exponent),
            ),
        }
        wanted, make = makers[name]
        return [make()] if wanted else []


def sampler_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """The samplers that a request names: by llama.cpp's names, in one of their spellings, or as a text of letters.

    Raises UsageError for a name that is none.
    """
    if isinstance(given, str):
        letters = {letter: name for name, letter in SAMPLERS.items()}
        found = [letters.get(letter, letter) for letter in given]
    else:
        found = [_name(text.lower()) for text in given]
    for name, text in zip(found, given, strict=True):
        _require_sampler(name, text)
    return tuple(found)


def _require_sampler(name: str, given: str) -> None:
    if name not in SAMPLERS:
        raise UsageError(f"samplers: {given[:40]!r} is none; take of {', '.join(SAMPLERS)}")


def _name(text: str) -> str:
    spelled = text.replace("-", "_")
    joined = {name.replace("_", ""): name for name in SAMPLERS}
    return _OTHER_NAMES.get(spelled) or joined.get(spelled, spelled)
