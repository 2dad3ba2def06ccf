"""The last turn of a conversation: the reply as it comes in, and what is kept of it for questions about its routing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..llama.reasoning import Kind, ReasoningSplitter
from ..maps.expert_map import ExpertMap
from ..steering.bias_file import BiasFile
from .engine import FinishEvent, Request, TokenEvent

__all__ = ["Answered", "Delta", "Reply"]


@dataclass(frozen=True)
class Delta:
    """A piece of a reply, without the markers of reasoning."""

    kind: Kind
    text: str


@dataclass
class Reply:
    """A reply as it comes in."""

    request: Request
    splitter: ReasoningSplitter
    tokens: list[int] = field(default_factory=list)
    texts: dict[Kind, str] = field(default_factory=lambda: {"reasoning": "", "answer": ""})
    finish: FinishEvent | None = None

    def take(self, event: TokenEvent | FinishEvent) -> Iterator[Delta]:
        """Deltas of an event, already part of the reply when they are given."""
        if isinstance(event, FinishEvent):
            self.finish = event
            parts = self.splitter.finish()
        else:
            if event.token >= 0:
                self.tokens.append(event.token)
            parts = self.splitter.feed(event.text)
        for kind, text in parts:
            self.texts[kind] += text
        for kind, text in parts:
            yield Delta(kind, text)

    def flush(self) -> None:
        """Take what waited in the splitter, at the end of a reply that was stopped."""
        for kind, text in self.splitter.finish():
            self.texts[kind] += text

    def message(self) -> dict[str, str]:
        """What goes into the conversation."""
        reasoning = {"reasoning_content": self.texts["reasoning"]} if self.texts["reasoning"] else {}
        return {"role": "assistant", "content": self.texts["answer"], **reasoning}


@dataclass(frozen=True)
class Answered:
    """The last answer, for `routing` and `why`; `finish` None: it was stopped."""

    prompt: list[int]
    tokens: list[int]
    finish: FinishEvent | None
    bias: BiasFile | None
    expert_map: ExpertMap | None

    @property
    def rows(self) -> tuple[int, int]:
        """[first, last) of the rows whose logits gave the answer's tokens."""
        first = len(self.prompt) - 1
        return first, first + (self.finish.n_rows if self.finish else len(self.tokens))

    @property
    def signs(self) -> npt.NDArray[np.int8] | None:
        """Which experts were promoted and suppressed, [n_layer, n_expert]; None: nothing steered."""
        return None if self.bias is None else self.bias.signs
