"""The bodies of requests: fields, types and bounds. Unknown fields are refused.

The request models of llama_cpp.server are not used: they ignore unknown fields and bound little. Answers do follow the
TypedDicts of llama_cpp.llama_types (bodies.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from ..generation.bounds import MAX_TOKENS
from .known_fields import Place
from .schemas_base import (
    MAX_PROMPTS,
    NAME_PATTERN,
    Body,
    Name,
    Short,
    StopString,
    Text,
    TokenId,
    Tokens,
    same,
)
from .schemas_plans import GivenPlan, OrPlan, Rules
from .schemas_sampling import SamplingFields

__all__ = [
    "NAME_PATTERN",
    "Body",
    "CompletionRequest",
    "DetokenizeRequest",
    "Generation",
    "GivenPlan",
    "Preset",
    "RegisterRequest",
    "Short",
    "SteeringChoice",
    "StreamOptions",
    "Text",
    "TokenizeRequest",
]

Preset = Literal["faithful", "safe"]
"""The names of `steering.presets.PRESETS`."""
RankName = Literal["rd", "log-odds", "logit", "weight", "effect", "efficiency"]
"""The names of `maps.ranks.RANKS`."""
WeightsName = Literal["log-odds", "logit", "weight", "effect", "none"]
"""The names of `maps.ranks.WEIGHTS`, and none for equal strengths."""
RuleMode = Literal["hard", "soft", "capped"]
"""The names of `steering.rules.RULES`."""
Strength = Annotated[float, Field(le=1000, allow_inf_nan=False, json_schema_extra={"minimum": 0})]
"""A strength in logits. `Rule` refuses one below 0, and says what to do."""
Cap = Annotated[float, Field(gt=0, le=1000)] | Literal["inf"]
"""The cap of the capped rule in logits; JSON has no infinity."""


class SteeringChoice(Body):
    """A registered map with other numbers of experts. What is left out is as the map is registered."""

    map: Name = Field(description="Name of a registered map; GET /v1/steering lists them. Never a path.")
    activate: int | None = Field(None, ge=0, le=1_000_000, description="Experts with RD > 0 to promote.")
    deactivate: int | None = Field(None, ge=0, le=1_000_000, description="Experts with RD < 0 to suppress.")
    reverse: bool | None = Field(None, description="Flip the sign of RD first.")
    layers: str | None = Field(None, max_length=200, description='Steer only these layers, like "3-7,9".')
    mode: RuleMode | None = Field(
        None, description="The rule; soft adds `scale` to logits, capped is hard but moves no logit by more than `cap`."
    )
    scale: Strength | None = Field(None, description="Strength of the soft rule, in logits.")
    preset: Preset | None = Field(
        None, description="The paper's numbers for the map's model, instead of activate, deactivate and reverse."
    )
    rank: RankName | None = Field(None, description="Score by which experts are chosen; the map has to have its data.")
    weights: WeightsName | None = Field(
        None, description="Soft rule: strength in proportion to this score, the largest of the chosen in full."
    )
    cap: Cap | None = Field(None, description='Most logits that the capped rule moves; "inf": any number.')

    @model_validator(mode="after")
    def _numbers_or_preset(self) -> SteeringChoice:
        require_one_choice(self)
        return self


if TYPE_CHECKING:
    Wanted = str | SteeringChoice | GivenPlan
else:  # the validator makes a GivenPlan of what is neither a name nor a choice
    Wanted = Annotated[Name | SteeringChoice, *OrPlan]


class StreamOptions(Body):
    """How to stream."""

    place: ClassVar[Place | None] = "stream_options"

    include_usage: bool | None = Field(None, description="A last chunk with the numbers of tokens.")


class Generation(SamplingFields):
    """What chat/completions and completions share."""

    place: ClassVar[Place | None] = "request"

    model: Short | None = Field(
        None, description="MODEL:NAME chooses a steering by its name. A name without a colon is the served model."
    )
    steering: Wanted | None = Field(
        None,
        description="What steers this answer: a registered name, a choice, the rules of a plan, or null for nothing; "
        "the server's default if it is left out.",
    )
    routing: bool = Field(False, description="Give the routing behind each answer, [layers][experts] selections.")
    return_steered: bool | None = Field(
        None, description="Say which characters of each answer were steered, by which rule of the plan."
    )
    return_routed_experts: bool | None = Field(
        None,
        description="Give the experts that each token of prompt and answer but the last selected, as SGLang does: "
        "base64 of little-endian int32 [tokens][layers][experts used], in sglext.routed_experts.",
    )
    routed_experts_start_len: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="The first of these tokens, at most the prompt's number of tokens."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(
        None, ge=-1, le=MAX_TOKENS, description="-1: until the model ends, or the context is full."
    )
    n_predict: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="max_tokens under llama-server's name.")
    n: int | None = Field(None, ge=1, le=8, description="Answers to each prompt.")
    n_cmpl: int | None = Field(None, ge=1, le=8, description="n under llama-server's name.")
    n_probs: int | None = Field(
        None, ge=0, le=20, description="llama-server's name: log probabilities, and how many of the likeliest tokens."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    cache_prompt: bool | None = Field(None, description="false: compute the whole prompt again.")
    return_tokens: bool | None = Field(None, description="Give the answer's tokens, too, as `tokens` of each choice.")

    @model_validator(mode="after")
    def _options_of_streams(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream: true")
        self.n = same("n", self.n, "n_cmpl", self.n_cmpl)
        self.max_tokens = same("max_tokens", self.max_tokens, "n_predict", self.n_predict)
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Generation):
    """POST /v1/completions: continue a text, or tokens, as they are."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = Field(None, description="Give the prompt before its continuation.")
    logprobs: int | None = Field(None, ge=0, le=20, description="How many of the likeliest tokens to name.")

    @model_validator(mode="after")
    def _probabilities(self) -> CompletionRequest:
        self.logprobs = same("logprobs", self.logprobs, "n_probs", self.n_probs)
        return self


class TokenizeRequest(Body):
    """POST /tokenize, as llama-server has it (`content`) or vLLM (`prompt`)."""

    content: Text | None = Field(None, description="The text.")
    prompt: Text | None = Field(None, description="The text, in vLLM's form of a request.")
    add_special: bool = Field(False, description="Add what the model puts around a text, such as a BOS token.")
    add_special_tokens: bool = Field(True, description="The same, with `prompt`.")
    parse_special: bool = Field(True, description="Names of special tokens become these tokens.")
    with_pieces: bool = Field(False, description="Give each token's text, too.")
    model: Short | None = Field(None, description="Accepted, without effect: there is one tokenizer.")

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if (self.content is None) == (self.prompt is None):
            raise ValueError("give one of content and prompt")
        return self

    @property
    def text(self) -> tuple[str, bool]:
        """The text, and whether the model's own tokens go around it."""
        if self.prompt is not None:
            return self.prompt, self.add_special_tokens
        return self.content or "", self.add_special


class DetokenizeRequest(Body):
    """POST /detokenize, as llama-server and vLLM have it."""

    tokens: Annotated[list[TokenId], Field(max_length=1_000_000, fail_fast=True)]
    model: Short | None = Field(None, description="Accepted, without effect: there is one tokenizer.")


class RegisterRequest(Body):
    """POST /v1/steering: give a choice, a map, a bias file or a plan a name."""

    name: Name
    map: Name | dict[str, Any] | None = Field(
        None, description="Name of a registered map, or a map itself: the JSON of its file."
    )
    bias: Annotated[str, StringConstraints(max_length=24_000_000)] | None = Field(
        None, description="A bias file, its bytes in base64."
    )
    rules: Rules | None = Field(None, description="The rules of a plan, texts or objects.")
    activate: int | None = Field(None, ge=0, le=1_000_000)
    deactivate: int | None = Field(None, ge=0, le=1_000_000)
    reverse: bool | None = None
    layers: str | None = Field(None, max_length=200)
    mode: RuleMode | None = None
    scale: Strength | None = None
    preset: Preset | None = Field(None, description="The paper's numbers for the map's model.")
    rank: RankName | None = None
    weights: WeightsName | None = None
    cap: Cap | None = None
    replace: bool = Field(False, description="Take the place of what has this name.")

    @model_validator(mode="after")
    def _one_source(self) -> RegisterRequest:
        if sum(source is not None for source in (self.map, self.bias, self.rules)) != 1:
            raise ValueError("give one of map and bias, or the rules of a plan")
        require_one_choice(self)
        return self


def require_one_choice(choice: SteeringChoice | RegisterRequest) -> None:
    """Raise ValueError for a preset together with what it fixes, as the command line does."""
    fixed = [name for name in ("activate", "deactivate", "reverse") if getattr(choice, name) is not None]
    if choice.preset is not None and fixed:
        raise ValueError(f"preset gives the numbers and the side; leave out {fixed[0]}, or preset")
    other = {"rank": choice.rank not in (None, "rd"), "weights": choice.weights not in (None, "none")}
    other |= {"cap": choice.cap is not None, "mode": choice.mode == "capped"}
    if choice.preset is not None and any(other.values()):
        name = next(name for name, is_other in other.items() if is_other)
        raise ValueError(f"preset: the paper's numbers are those of RD and its own rule; leave out {name}, or preset")
