"""The parts of a neutral text on which costs are measured."""

from __future__ import annotations

from ..errors import UsageError
from ..evaluation.tasks.neutral_text import Document, NeutralText
from ..llama.rendering import Renderer

_PIECE = 32  # tokens of a piece of plain neutral text: short, so that many steerings fit a batch


def documents(neutral: NeutralText, renderer: Renderer, n: int) -> list[Document]:
    """The first documents of a text, of which `n` tokens count. Raises UsageError when it has none."""
    return neutral.documents(renderer, _length(neutral, renderer), n)


def n_tokens(of: list[Document]) -> int:
    """How many tokens of some documents count."""
    return sum(document.n for document in of)


def other_documents(neutral: NeutralText, renderer: Renderer, n_used: int, n: int) -> list[Document]:
    """The documents behind those that `documents` gives for `n_used` tokens; at most `n` of their tokens count.

    Raises UsageError when there are none.
    """
    used = documents(neutral, renderer, n_used)
    # more by one document, as the last one that was used may have been cut
    rest = documents(neutral, renderer, n_tokens(used) + _length(neutral, renderer) + n)[len(used) :]
    found: list[Document] = []
    for document in rest:
        if (left := n - n_tokens(found)) <= 0:
            break
        found.append(Document(document.tokens[: document.first + 1 + min(document.n, left)], document.first))
    if not found:
        raise UsageError(
            f"{neutral.name}: {n_tokens(used)} tokens count, and the search needs all of them, so that no other text "
            "is left to confirm the cost on; give a longer text, or use fewer tokens of it (--n-text)"
        )
    return found


def _length(neutral: NeutralText, renderer: Renderer) -> int:
    return max(_PIECE, neutral.longest(renderer))
