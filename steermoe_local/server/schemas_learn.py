"""What POST /v1/learn takes: a name, and one thing that says what is to be learnt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from .schemas_base import Body, Name

MAX_INSTRUCTION = 2_000  # characters
MAX_EXAMPLE = 16_000  # characters of a message of an example
MAX_PAIRS = 500
MIN_PAIRS = 3
MAX_MESSAGES = 64


def _is_text(text: str) -> str:
    """Raises ValueError for what no file and no command line can hold."""
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("has NUL, or half of a surrogate pair; send text")
    if not text.strip():
        raise ValueError("is empty; write something")
    return text


Instruction = Annotated[str, StringConstraints(max_length=MAX_INSTRUCTION), AfterValidator(_is_text)]
ExampleText = Annotated[str, StringConstraints(max_length=MAX_EXAMPLE), AfterValidator(_is_text)]


class ExampleMessage(Body):
    """A message in front of the two answers."""

    role: Literal["system", "user", "assistant"]
    content: ExampleText


class Example(Body):
    """A question, an answer as wanted, and one as not wanted."""

    prompt: ExampleText | Annotated[list[ExampleMessage], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The question, or the conversation that ends with it."
    )
    like: ExampleText
    unlike: ExampleText

    @model_validator(mode="after")
    def _differ(self) -> Example:
        if self.like.strip() == self.unlike.strip():
            raise ValueError("like and unlike are the same text; give two answers that differ")
        if not isinstance(self.prompt, str) and self.prompt[-1].role != "user":
            raise ValueError("prompt: ends with another message than the user's; leave out the answer")
        return self

    def pair(self) -> dict[str, Any]:
        """The line of a file of pairs."""
        prompt = self.prompt
        messages = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [m.model_dump() for m in prompt]
        )
        like, unlike = self.like.strip(), self.unlike.strip()
        return {
            "positive": [*messages, {"role": "assistant", "content": like}],
            "negative": [*messages, {"role": "assistant", "content": unlike}],
            "positive_target": like,
            "negative_target": unlike,
        }


class LearnRequest(Body):
    """POST /v1/learn: learn a steering from two instructions, a built-in behaviour, or examples."""

    name: Name | None = Field(
        None, description="What the steering is called from then on; a behaviour's own name if left out."
    )
    like: Instruction | None = Field(None, description="An instruction that brings about the behaviour.")
    unlike: Instruction | None = Field(None, description="One that brings about its opposite.")
    behaviour: Name | None = Field(None, description="A name of GET /v1/behaviours.")
    pairs: Annotated[list[Example], Field(min_length=MIN_PAIRS, max_length=MAX_PAIRS, fail_fast=True)] | None = Field(
        None, description="Questions with an answer as wanted and one as not wanted."
    )
    replace: bool = Field(False, description="Learn it anew, in place of what was learnt under this name.")

    @model_validator(mode="after")
    def _one_source(self) -> LearnRequest:
        instructions = self.like is not None or self.unlike is not None
        if sum((instructions, self.behaviour is not None, self.pairs is not None)) != 1:
            raise ValueError("give one of like with unlike, behaviour, and pairs")
        if self.name is None and self.behaviour is None:
            raise ValueError("name: missing; give the steering a name")
        if instructions and (self.like is None or self.unlike is None):
            raise ValueError("like and unlike go together: two instructions, one for each side")
        if instructions and (self.like or "").strip() == (self.unlike or "").strip():
            raise ValueError("like and unlike are the same text; give two instructions that differ")
        return self
