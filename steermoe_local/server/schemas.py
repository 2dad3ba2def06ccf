"""The bodies of requests: fields, types and bounds. Unknown fields are refused.

The request models of llama_cpp.server are not used: they ignore unknown fields and bound little. Answers do follow the
TypedDicts of llama_cpp.llama_types (responses.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MAX_TEXT = 4_000_000  # characters; the context is what really bounds a prompt
MAX_PROMPTS = 256
MAX_TOKENS = 2**31 - 1
MAX_TOKEN_ID = 2**31 - 1

NAME_PATTERN = r"^[a-z0-9_-][a-z0-9._-]{0,63}$"  # never begins with a dot: it becomes a file name

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Short = Annotated[str, StringConstraints(max_length=512)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
# fail_fast, here and elsewhere: only one error is reported, and those of a list of millions would take gigabytes
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class Body(BaseModel):
    """A JSON object: unknown fields are refused, nothing is converted, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class SteeringChoice(Body):
    """A registered map with other numbers of experts. What is left out is as the map is registered."""

    map: Name = Field(description="Name of a registered map; GET /v1/steering lists them. Never a path.")
    activate: int | None = Field(None, ge=0, le=1_000_000, description="Experts with RD > 0 to promote.")
    deactivate: int | None = Field(None, ge=0, le=1_000_000, description="Experts with RD < 0 to suppress.")
    reverse: bool | None = Field(None, description="Flip the sign of RD first.")
    layers: str | None = Field(None, max_length=200, description='Steer only these layers, like "3-7,9".')
    mode: Literal["hard", "soft"] | None = Field(None, description="The rule; soft adds `scale` to logits.")
    scale: float | None = Field(None, ge=-1000, le=1000, description="Strength of the soft rule, in logits.")


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = Field(None, description="A last chunk with the numbers of tokens.")
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is padded here.")


class Generation(Body):
    """What chat/completions and completions share."""

    model: Short | None = Field(None, description="Model, or MODEL:NAME to choose a steering by its name.")
    steering: Name | SteeringChoice | None = Field(
        None,
        description="What steers this answer: a registered name, a choice, or null for nothing; the server's default "
        "if it is left out.",
    )
    routing: bool = Field(False, description="Give the routing behind each answer, [layers][experts] selections.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    n: int | None = Field(None, ge=1, le=8, description="Answers to each prompt.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="-1: random.")
    temperature: float | None = Field(None, ge=0, le=10, description="0: greedy.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_TOKENS, description="0: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    repeat_last_n: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    # Clients of OpenAI are known to send these; they mean nothing here.
    user: Short | None = Field(None, description="Accepted, without effect.")
    store: bool | None = Field(None, description="Accepted, without effect: nothing is stored.")
    metadata: dict[str, Any] | None = Field(None, max_length=64, description="Accepted, without effect.")
    service_tier: Short | None = Field(None, description="Accepted, without effect.")
    prompt_cache_key: Short | None = Field(None, description="Accepted, without effect: prefixes are found.")
    prompt_cache_retention: Short | None = Field(None, description="Accepted, without effect.")
    prompt_cache_options: dict[str, Any] | None = Field(None, max_length=16, description="Accepted, without effect.")
    safety_identifier: Short | None = Field(None, description="Accepted, without effect.")

    @field_validator("logit_bias")
    @classmethod
    def _token_keys(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdecimal() and len(key) <= 10):
                raise ValueError(f"{key[:40]!r} is not the number of a token")
        return value

    @model_validator(mode="after")
    def _options_of_streams(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream: true")
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
    best_of: Literal[1] | None = Field(None, description="Only 1.")
    suffix: None = Field(None, description="Not offered.")

    @field_validator("suffix", mode="before")
    @classmethod
    def _no_suffix(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("text between a prompt and a suffix is not offered; leave it out")


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
    """POST /v1/steering: give a choice, a map or a bias file a name."""

    name: Name
    map: Name | dict[str, Any] | None = Field(
        None, description="Name of a registered map, or a map itself: the JSON of its file."
    )
    bias: Annotated[str, StringConstraints(max_length=24_000_000)] | None = Field(
        None, description="A bias file, its bytes in base64."
    )
    activate: int | None = Field(None, ge=0, le=1_000_000)
    deactivate: int | None = Field(None, ge=0, le=1_000_000)
    reverse: bool | None = None
    layers: str | None = Field(None, max_length=200)
    mode: Literal["hard", "soft"] | None = None
    scale: float | None = Field(None, ge=-1000, le=1000)
    replace: bool = Field(False, description="Take the place of what has this name.")

    @model_validator(mode="after")
    def _one_source(self) -> RegisterRequest:
        if (self.map is None) == (self.bias is None):
            raise ValueError("give one of map and bias")
        return self
