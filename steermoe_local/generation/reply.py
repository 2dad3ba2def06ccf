"""The reply of a request: accumulated text, reasoning, tokens, routing and finish event."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..llama.reasoning import Kind, Part, ReasoningSplitter
from ..llama.reasoning_styles import ReasoningStyle
from .engine import FinishEvent, TokenEvent


@dataclass
class Reply:
    """Accumulates the events of one request; `style` says how reasoning is marked.

    `raw` is the whole text, `texts` are its parts without the markers of reasoning, `tokens` all that were drawn,
    `rules` the rule under which each of them was drawn (`TokenEvent.rule`). `finish`, which has the routing, is None
    until the end.
    """

    style: ReasoningStyle | None = None
    raw: str = ""
    tokens: list[int] = field(default_factory=list)
    rules: list[int | None] = field(default_factory=list)
    texts: dict[Kind, str] = field(default_factory=lambda: {"reasoning": "", "answer": ""})
    finish: FinishEvent | None = None

    def __post_init__(self) -> None:
        self._splitter = ReasoningSplitter(self.style)

    @property
    def text(self) -> str:
        """The answer, without what the model thought before it."""
        return self.texts["answer"]

    @property
    def reasoning(self) -> str:
        """What the model thought before its answer."""
        return self.texts["reasoning"]

    def add(self, event: TokenEvent | FinishEvent) -> list[Part]:
        """Add an event; returns the parts of the text that became certain by it."""
        if isinstance(event, FinishEvent):
            self.finish = event
            return self.flush()
        self.raw += event.text
        if event.token >= 0:
            self.tokens.append(event.token)
            self.rules.append(event.rule)
        return self._keep(self._splitter.feed(event.text))

    def flush(self) -> list[Part]:
        """Take what was held back because a marker might come: nothing follows."""
        return self._keep(self._splitter.finish())

    def _keep(self, parts: list[Part]) -> list[Part]:
        for kind, text in parts:
            self.texts[kind] += text
        return parts

    def to_dict(self) -> dict[str, Any]:
        """The finished reply as plain JSON values."""
        finish = self._finished()
        return {
            "text": self.text,
            **({"reasoning": self.reasoning} if self.reasoning else {}),
            "finish_reason": finish.reason,
            **({"stop": finish.stop} if finish.stop is not None else {}),
            "usage": {
                "prompt_tokens": finish.n_prompt,
                "completion_tokens": finish.n_generated,
                "total_tokens": finish.n_prompt + finish.n_generated,
            },
            "seed": finish.seed,
        }

    def timings(self) -> dict[str, Any]:
        """Seconds, and tokens per second, of the prompt and of the tokens behind the answer's first.

        Rates are None where too little was computed to tell.
        """
        finish = self._finished()
        return {
            "prompt_seconds": round(finish.prompt_seconds, 6),
            "prompt_per_second": _rate(finish.n_prompt - finish.n_cached, finish.prompt_seconds),
            "generation_seconds": round(finish.seconds, 6),
            # the first token comes out of the prompt's last row
            "generation_per_second": _rate(finish.n_rows - 1, finish.seconds),
        }

    def _finished(self) -> FinishEvent:
        assert self.finish is not None, "the reply is not at its end"
        return self.finish


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if tokens > 0 and seconds > 0 else None
