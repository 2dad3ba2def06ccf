"""Assistant prefill: the text of a prompt that ends inside the assistant's message, which the model continues."""

from __future__ import annotations

from ..errors import UsageError
from .reasoning_styles import ReasoningStyle

_ANALYSIS, _FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
_NEXT = "<|end|><|start|>assistant"


def continued(
    text: str, style: ReasoningStyle | None, reasoning: str, content: str, *, in_answer: bool = False
) -> tuple[str, str | None]:
    """The prompt `text`, which ends with the header of the assistant's turn, with the beginning of its message.

    As llama-server does it: the message so far stands behind the header as it is, its reasoning between the markers of
    `style`. With content, or `in_answer`, the answer is continued, and reasoning that is open is closed before it; with
    reasoning alone, the reasoning is. Returns the text, and the part of the reply that the prompt ends with
    (`ReasoningStyle.prefix`) where the text alone does not tell it.

    Raises UsageError for reasoning alone under a template whose markers are not known.
    """
    in_answer = in_answer or bool(content)
    if style is None:
        if reasoning and not in_answer:
            raise UsageError(
                "how this model's template marks reasoning is not known, so reasoning cannot be continued; give content"
            )
        return text + content, None
    if style.tags is None:
        text += _ANALYSIS + reasoning if reasoning else ""
        if not in_answer:
            return text, None
        return text + (_NEXT if reasoning else "") + _FINAL + content, None
    opening, closing = style.tags.opening, style.tags.closing
    line = "" if "|" in opening or opening.startswith("[") else "\n"  # as these models write them
    if reasoning:
        if text.rstrip().endswith(closing) and opening in text:  # an empty block: the template turns thinking off
            text = text[: text.rindex(opening)]
        if not text.rstrip().endswith(opening):
            text += opening
        text = text.rstrip() + line + reasoning
        if not in_answer:
            return text, opening + reasoning.rstrip()
        text += line + closing + line * 2
    elif in_answer and text.rstrip().endswith(opening):
        text = text.rstrip() + line * 2 + closing + line * 2
    if not (in_answer and style.tags.answer_opening):
        return text + content, None
    answer_opening = style.tags.answer_opening
    if not text.rstrip().endswith(answer_opening):
        text += answer_opening + line
    return text + content, answer_opening + content
