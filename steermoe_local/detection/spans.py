"""The tokens that a condition of a steering plan looks at, on the sides of a pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import ModelError, PairsError, UsageError
from ..llama.rendering import Prompt, Renderer
from ..pairs.pairs import SIDES, Pair, Side
from ..steering.plan_rules import MAX_LAST

DEFAULT_LAST = 16


@dataclass(frozen=True)
class ConditionSpan:
    """What is scored of each side: its prompt without the last token (`last` None), or the last `last` of its reply.

    The prompt is what a request has: everything before the reply, with what the chat template puts at its end for the
    answer. Its last token is left out, since a plan decides what steers it, where the reply's first token is drawn, by
    what came before. The reply is the last message if it is the assistant's, or the target that a plain text ends with.

    Raises UsageError for a number of tokens that no condition can have.
    """

    last: int | None = None

    def __post_init__(self) -> None:
        """Check the number."""
        if self.last is not None and not 1 <= self.last <= MAX_LAST:
            raise UsageError(f"over last {self.last}: give 1 to {MAX_LAST} tokens")

    def __str__(self) -> str:
        """As in the text form of a condition, behind "over"."""
        return "prompt" if self.last is None else f"last {self.last}"

    def prompts(self, renderer: Renderer, pair: Pair) -> tuple[Prompt, Prompt]:
        """Both sides, with the tokens that are scored as their targets.

        Raises PairsError, whose message continues "pair ID", for a side without the span, and for a pair whose sides
        route alike because their tokens are the same.
        """
        found = []
        for name, (side, target) in zip(SIDES, pair.sides(), strict=True):
            try:
                found.append(self._of(renderer, side, target))
            except (PairsError, UsageError, ModelError) as error:
                raise PairsError(f", {name}: {error}") from None
        if found[0] == found[1]:
            cure = (
                "give sides whose prompts differ, or score the replies (over last N)"
                if self.last is None
                else "give sides that differ before the end of the reply"
            )
            raise PairsError(f": both sides have the same tokens over {self}, so there is nothing to compare; {cure}")
        return found[0], found[1]

    def _of(self, renderer: Renderer, side: Side, target: str) -> Prompt:
        before, reply = split_reply(side, target)
        if self.last is None:
            if not before:
                raise PairsError("nothing stands before the reply; begin with the prompt that it answers")
            if not isinstance(before, str) and not renderer.has_template:
                raise PairsError("the model has no chat template; write the pairs' sides as plain texts")
            tokens = renderer.render(before).tokens[:-1]
            if not tokens:
                raise PairsError("the prompt has one token, before which there is nothing; write a longer one")
            return Prompt(tokens, list(range(len(tokens))))
        if reply is None:
            raise PairsError(
                f"the target is not in a reply, so there is nothing to score over {self}; put it into the "
                "assistant's message at the end, or score the prompts (over prompt)"
            )
        prompt = renderer.prompt(side, reply)
        n_reply = len(prompt.target)
        if n_reply < self.last:
            raise PairsError(
                f"the reply has {n_reply} tokens, before whose end a condition over {self} never holds; "
                f"score fewer (over last {n_reply}), or give longer replies"
            )
        return Prompt(prompt.tokens, prompt.target[-self.last :])

    def content(self, pair: Pair) -> tuple[bytes, bytes]:
        """A digest of each side's text that decides its tokens; sides of other pairs may have the same one."""
        one, two = (
            hashlib.sha256(_text(split_reply(side, target)[0] if self.last is None else side)).digest()
            for side, target in pair.sides()
        )
        return one, two


def split_reply(side: Side, target: str) -> tuple[Side, str | None]:
    """(prompt, reply) of a side; the reply is None where it has none that holds the target."""
    if isinstance(side, str):
        at = side.rindex(target)
        return (side, None) if side[at + len(target) :].strip() else (side[:at], target)
    if side[-1].role != "assistant":
        return side, None
    return side[:-1], side[-1].content if target in side[-1].content else None


def usual_span(pairs: Collection[Pair]) -> ConditionSpan:
    """The prompt, where the prompts of at least half of the pairs differ, else the last 16 tokens of the reply."""
    prompts = ConditionSpan()
    differ = sum(len(set(prompts.content(pair))) > 1 for pair in pairs)
    return prompts if 2 * differ >= len(pairs) else ConditionSpan(DEFAULT_LAST)


def _text(side: Side) -> bytes:
    plain = side if isinstance(side, str) else [message.to_dict() for message in side]
    return json.dumps(plain, sort_keys=True).encode("utf-8")
