"""Neutral text, which a steered model should predict as well as the unsteered one, and its scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..._util.file_kinds import require_kind
from ..._util.files import StrPath, read_bytes
from ...errors import FormatError, UsageError
from ...llama.rendering import Renderer
from ...llama.sampling import log_softmax
from ...llama.tokenizing import common_prefix
from ...pairs.pairs import Message
from ...pairs.prompts import load_prompts

if TYPE_CHECKING:
    from ...generation.engine import Engine
    from ...steering.bias_plan import AnyBias

_MAX_BYTES = 64 << 20
_LEAST = -700.0  # stands for -inf and NaN as a log-probability; finite, and so is its exponential

Passage = tuple[tuple[Message, ...] | None, str]


@dataclass(frozen=True)
class NeutralText:
    """Passages as (prompt, text): a text after a chat prompt, of which only the text counts; or (None, text), plain."""

    name: str
    passages: tuple[Passage, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the passages."""
        data = [[prompt and [m.to_dict() for m in prompt], text] for prompt, text in self.passages]
        return hashlib.sha256(json.dumps(data, ensure_ascii=False).encode("utf-8")).hexdigest()

    def longest(self, renderer: Renderer) -> int:
        """Tokens of context that the longest passage after a prompt needs; plain text can be cut, and needs none."""
        texts = (renderer.chat_text([m.to_dict() for m in prompt]) + text for prompt, text in self.passages if prompt)
        return max((len(renderer.tokenize(text, add_special=False)) for text in texts), default=0)

    def documents(self, renderer: Renderer, n_ctx: int, max_tokens: int | None = None) -> list[Document]:
        """Tokens of all passages, in pieces that fit into `n_ctx`, up to `max_tokens` that count.

        Raises UsageError when nothing is left to count, or a prompt does not fit.
        """
        found: list[Document] = []
        left = math.inf if max_tokens is None else max_tokens
        for prompt, text in self.passages:
            if left <= 0:
                break
            if prompt is None:
                tokens = renderer.tokenize(text, add_special=True)
                # each piece begins without context, so its first token is not predicted
                pieces = [(tokens[i : i + n_ctx], 0) for i in range(0, len(tokens), n_ctx)]
            else:
                before = renderer.chat_text([m.to_dict() for m in prompt])
                head = renderer.tokenize(before, add_special=False)
                tokens = renderer.tokenize(before + text, add_special=False)
                if len(tokens) > n_ctx:
                    raise UsageError(f"{self.name}: a passage of {len(tokens)} tokens, but n_ctx is {n_ctx}; raise it")
                pieces = [(tokens, max(0, common_prefix(head, tokens) - 1))]
            for piece, first in pieces:
                n = int(min(len(piece) - 1 - first, left))
                if n > 0:
                    found.append(Document(tuple(piece[: first + 1 + n]), first))
                    left -= n
        if not found:
            raise UsageError(f"{self.name}: no text whose tokens could be predicted; give a longer one")
        return found


@dataclass(frozen=True)
class Document:
    """Tokens of which those after index `first` count, each predicted from all before it."""

    tokens: tuple[int, ...]
    first: int

    @property
    def n(self) -> int:
        """Number of tokens that count."""
        return len(self.tokens) - 1 - self.first


@dataclass(frozen=True)
class TextScore:
    """How a model predicts a neutral text: mean negative log-likelihood and mean KL(unsteered || steered), in nats.

    `n` tokens count. `same_top` is the share of them where the likeliest token is the unsteered model's.
    """

    nll: float
    kl: float
    same_top: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TextScore:
        """The score in a line of records.jsonl."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


def load_neutral_text(path: StrPath) -> NeutralText:
    """A plain text file, or JSON Lines of prompts with an `answer` each, whose tokens count.

    Raises FormatError.
    """
    name = Path(path).name
    if Path(path).suffix.lower() == ".jsonl":
        passages: list[Passage] = []
        for item in load_prompts(path):
            answer = item.extra.get("answer")
            if not isinstance(answer, str) or not answer:
                raise FormatError(f"{path}:{item.line}: answer: not a text; neutral prompts need an answer to predict")
            passages.append((item.messages(), answer))
        return NeutralText(name, tuple(passages))
    require_kind(path, "a neutral text")
    try:
        text = read_bytes(path, "a neutral text", _MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise FormatError(f"{path}: empty; give a text of some hundred words at least")
    return NeutralText(name, ((None, text),))


def score_text(engine: Engine, biases: Sequence[AnyBias | None], documents: Sequence[Document]) -> list[TextScore]:
    """Score documents under each of the biases; the first, None, is the unsteered model that the others are compared
    with.

    Under a plan the tokens that count are those of the answer, all before them the prompt's. Each document is computed
    under all of them in the same batches, so rounding does not differ by position. Raises UsageError (the
    engine has not as many free slots), NativeError.
    """
    n_biases = len(biases)
    nll, kl, same = np.zeros(n_biases), np.zeros(n_biases), np.zeros(n_biases)
    n = 0
    for document in documents:
        for start, logits in engine.logits(biases, document.tokens, document.first, n_prompt=document.first + 1):
            targets = np.asarray(document.tokens[start + 1 : start + 1 + logits.shape[1]])
            logprobs = log_probabilities(logits)
            nll -= logprobs[:, np.arange(len(targets)), targets].sum(axis=1)
            base = logprobs[0]
            p = np.exp(base)
            for index in range(1, n_biases):
                kl[index] += max(0.0, float((p * (base - logprobs[index])).sum()))
            tops = logprobs.argmax(axis=2)
            same += (tops == tops[0]).sum(axis=1)
            n += len(targets)
    return [TextScore(float(nll[i] / n), float(kl[i] / n), float(same[i] / n), n) for i in range(n_biases)]


def log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """`log_softmax`, but finite: what is impossible, or is no number, is so unlikely that its probability is 0."""
    return np.nan_to_num(log_softmax(logits), nan=_LEAST, neginf=_LEAST)
