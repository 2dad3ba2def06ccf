"""The fields of requests that say how tokens are drawn, under OpenAI's, llama-server's and vLLM's names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from ..errors import UsageError
from ..generation.bounds import MAX_BIASES, MAX_TOKENS
from ..llama.full_sampling import MAX_BREAKER, MAX_BREAKERS, MAX_SAMPLERS, FullSampling, sampler_names
from ..llama.sampling import LARGEST, Sampling
from .schemas_base import Body, Short, TokenId, same

_MAX_BIAS = 100
Bias = Annotated[float, Field(ge=-_MAX_BIAS, le=_MAX_BIAS)]
BiasPair = Annotated[list[TokenId | Bias | Literal[False]], Field(min_length=2, max_length=2, fail_fast=True)]
Breaker = Annotated[str, StringConstraints(min_length=1, max_length=MAX_BREAKER)]

# The names of further samplers, which only `FullSampling` has.
_FURTHER = tuple(name for name in FullSampling.__dataclass_fields__ if name not in Sampling.__dataclass_fields__)

# The fields that hold whole numbers, also those of the subclasses.
_WHOLE = frozenset({"max_tokens", "max_completion_tokens", "n_predict", "n", "n_cmpl", "n_probs", "logprobs"})
_WHOLE |= {"top_logprobs", "seed", "top_k", "repeat_last_n", "min_keep", "mirostat"}
_WHOLE |= {"dry_allowed_length", "dry_penalty_last_n", "routed_experts_start_len"}


class SamplingFields(Body):
    """How tokens are drawn; what is left out is as the server was started."""

    temperature: float | None = Field(None, ge=0, le=10, description="0: greedy.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="0 or -1: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="-1: random.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repeat_penalty: float | None = Field(None, gt=0, le=10, description="1: off.")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="repeat_penalty under vLLM's name.")
    repeat_last_n: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="How far the penalties look back.")
    logit_bias: (
        Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)]
        | Annotated[list[BiasPair], Field(max_length=MAX_BIASES)]
        | None
    ) = Field(None, description="By token; as in llama-server also [[token, bias], ...], where false bans a token.")
    ignore_eos: bool | None = Field(None, description="The model cannot end the answer.")
    typical_p: float | None = Field(None, ge=0, le=1, description="1: off.")
    top_n_sigma: float | None = Field(None, ge=-1, le=LARGEST, description="0 or less: off.")
    xtc_probability: float | None = Field(None, ge=0, le=1, description="0: off.")
    xtc_threshold: float | None = Field(None, ge=0, le=1)
    dynatemp_range: float | None = Field(None, ge=0, le=10, description="0: off.")
    dynatemp_exponent: float | None = Field(None, ge=0, le=LARGEST)
    dry_multiplier: float | None = Field(None, ge=0, le=LARGEST, description="0: off.")
    dry_base: float | None = Field(None, ge=0, le=LARGEST)
    dry_allowed_length: int | None = Field(None, ge=0, le=MAX_TOKENS)
    dry_penalty_last_n: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="-1: the whole context.")
    dry_sequence_breakers: Annotated[list[Breaker], Field(max_length=MAX_BREAKERS, fail_fast=True)] | None = None
    mirostat: Literal[0, 1, 2] | None = Field(None, description="0: off.")
    mirostat_tau: float | None = Field(None, ge=0, le=LARGEST)
    mirostat_eta: float | None = Field(None, ge=0, le=LARGEST)
    adaptive_target: float | None = Field(None, ge=-LARGEST, le=1)
    adaptive_decay: float | None = Field(None, ge=0, le=0.99)
    min_keep: int | None = Field(None, ge=0, le=MAX_TOKENS, description="Tokens that each filter leaves at least.")
    samplers: Short | Annotated[list[Short], Field(max_length=MAX_SAMPLERS, fail_fast=True)] | None = Field(
        None, description="Which samplers, in which order; names, or a text of llama.cpp's letters."
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        """40.0 is 40, as in JSON Schema: clients whose sliders give floats send it."""
        if not isinstance(value, dict):
            return value
        whole = {name: int(n) for name, n in value.items() if name in _WHOLE and type(n) is float and n.is_integer()}
        return value | whole

    @field_validator("logit_bias")
    @classmethod
    def _tokens_and_biases(cls, value: Any) -> dict[str, float] | None:
        if value is None:
            return None
        for key in value if isinstance(value, dict) else ():
            if not (key.isascii() and key.isdecimal() and len(key) <= 10):
                raise ValueError(f"{key[:40]!r} is not the number of a token")
        if isinstance(value, dict):
            return value
        biases: dict[str, float] = {}
        for token, bias in value:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ValueError(f"{token!r} is not the number of a token")
            if bias is not False and not -_MAX_BIAS <= bias <= _MAX_BIAS:
                raise ValueError(f"{bias} is not from {-_MAX_BIAS} to {_MAX_BIAS}; false bans a token")
            biases[str(token)] = -float("inf") if bias is False else float(bias)
        return biases

    @field_validator("samplers")
    @classmethod
    def _known_samplers(cls, value: str | list[str] | None) -> list[str] | None:
        if value is None:
            return None
        if len(value) > MAX_SAMPLERS:
            raise ValueError(f"more than {MAX_SAMPLERS}")
        try:
            return list(sampler_names(value))
        except UsageError as error:
            raise ValueError(str(error).removeprefix("samplers: ")) from None

    @model_validator(mode="after")
    def _two_names(self) -> SamplingFields:
        names = ("repeat_penalty", "repetition_penalty")
        self.repeat_penalty = same(names[0], self.repeat_penalty, names[1], self.repetition_penalty)
        return self

    @property
    def biases(self) -> dict[int, float]:
        """logit_bias by token."""
        pairs = self.logit_bias if isinstance(self.logit_bias, dict) else {}  # the validator makes one of a list
        return {int(token): bias for token, bias in pairs.items()}

    @property
    def given_sampling(self) -> dict[str, Any]:
        """The fields that the request gives, by their names in `FullSampling`; seed and logit_bias are left out."""
        names = (*Sampling.__dataclass_fields__, *_FURTHER)
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        for name in ("seed", "logit_bias"):
            given.pop(name, None)
        if given.get("top_k") == -1:
            given["top_k"] = 0
        for name in ("samplers", "dry_sequence_breakers"):
            if name in given:
                given[name] = tuple(given[name])
        return given

    def sampling(self, defaults: Sampling, **more: Any) -> Sampling:
        """The sampling of the request, with `defaults` for what it leaves out, and `more` fields.

        Raises UsageError for values outside their ranges.
        """
        given = self.given_sampling
        kind = FullSampling if given.keys() & set(_FURTHER) else type(defaults)
        return kind(**{name: getattr(defaults, name) for name in defaults.__dataclass_fields__} | given | more)
