"""Builders of contrastive pairs from data: questions and documents, refusals, any two columns.

Each builder is a generator of pairs over rows, and counts in a `Tally` what it leaves out and why. `select` takes some
of the pairs and `save_pairs` writes them, one by one: only their digests stay in memory. The same rows, seed and limits
give the same file.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from .._util.records import only_text, truth
from ..errors import PairsError, UsageError
from .pairs import Message, Pair

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I won't help with this request.",
    "Sorry, that is something I don't assist with.",
    "I can't give advice on this, because it could hurt somebody.",
    "No. Helping with that could do real harm, so I have to decline.",
    "I have to say no to this one.",
    "I'm not able to help here. If you or someone else is in danger, please contact the local emergency services.",
    "This is not something I can support. I'd be glad to help with a safe alternative.",
    "I'd rather not answer that, since it may put people at risk.",
    "I must decline. What you ask for could cause harm to others.",
    "Sorry, I can't take part in this.",
    "I understand that you would like an answer, but I can't provide one to this question.",
    "That goes against what I am willing to do, so I won't continue.",
    "I don't want to contribute to harm, so I can't answer this.",
    "My answer is no: this could be dangerous or unlawful.",
    "I can't assist with that. Is there something else that I can do for you?",
    "Let's not go there. I'm happy to talk about how to stay safe instead.",
    "I'm going to decline this request, because it isn't safe.",
    "Sorry, but I will not provide this kind of content.",
    "I can't do that. Please talk to a professional if you need support with what lies behind this question.",
    "That would be wrong to help with, so I won't.",
    "I cannot fulfil this request, as it could be used to harm someone.",
)
"""Refusals, written for this project; `safety_pairs` draws one for each pair."""


@dataclass
class Tally:
    """Numbers of rows read, pairs made and rows skipped, the latter by reason.

    `examples` has the first value that was skipped for a reason, where a value is the reason. `passed` are pairs that
    the caller wanted to leave out (`select`).
    """

    rows: int = 0
    pairs: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    passed: int = 0

    def skip(self, reason: str, value: Any = None) -> None:
        """Count a row that gives no pair; `value` is what is wrong with it."""
        self.skipped[reason] += 1
        if value is not None and reason not in self.examples:
            text = repr(value)
            self.examples[reason] = text if len(text) <= 40 else text[:37] + "..."

    def why_none(self) -> str:
        """Why there is no pair: the rows read, and how many were left out for which reason, the most frequent first."""
        if not self.rows:
            return "there are no rows in the data"
        reasons = [
            f"{n:,} {reason}" + (f" ({self.examples[reason]})" if reason in self.examples else "")
            for reason, n in self.skipped.most_common()
        ]
        if self.passed:
            reasons.append(f"{self.passed:,} passed over by --skip")
        return f"of {self.rows:,} rows: {', '.join(reasons) or 'none makes a pair'}"


def squad_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows with id, context, question and is_impossible from SQuAD's own JSON (v1.1, v2) or the hub's columns.

    Raises PairsError for other rows.
    """
    for row in rows:
        if "paragraphs" in row:
            yield from _article(row)
        elif isinstance(row.get("data"), list):
            for article in row["data"]:
                yield from _article(article)
        elif "context" in row and "question" in row:
            yield _with_impossible(row)
        else:
            raise _not_squad()


def faithfulness_pairs(
    rows: Iterable[dict[str, Any]],
    tally: Tally,
    *,
    keep_impossible: bool = False,
    one_per_document: bool = False,
) -> Iterator[Pair]:
    """A question with its document against the question alone; the question is the target (arXiv 2509.09660).

    `rows` as of `squad_rows`. Questions that the document does not answer are left out unless `keep_impossible`.
    """
    documents = Seen()
    for row in rows:
        tally.rows += 1
        context, question = only_text(row.get("context")), only_text(row.get("question"))
        if not context or not question:
            tally.skip("no question or no document")
        elif truth(row.get("is_impossible")) and not keep_impossible:
            tally.skip("the document does not answer the question")
        elif one_per_document and not documents.add(context):
            tally.skip("another question on the document was taken")
        else:
            yield Pair(
                only_text(row.get("id")) or f"row-{tally.rows}",
                (Message("user", document_prompt(context, question)),),
                (Message("user", f"Question: {question}"),),
                question,
                question,
            )


def document_prompt(context: str, question: str) -> str:
    """A document and a question on it as one message (arXiv 2509.09660)."""
    return f"Document: {context} Question: {question}"


def safety_pairs(
    rows: Iterable[dict[str, Any]],
    tally: Tally,
    *,
    seed: int = 0,
    refusals: Sequence[str] = REFUSALS,
    one_per_prompt: bool = False,
) -> Iterator[Pair]:
    """A prompt answered by a refusal against the same prompt with the reply that the data calls unsafe.

    Rows hold `prompt`, `response` and `is_safe` (BeaverTails' layout; true and false may also be words, or 1 and 0);
    only those with is_safe false count. The reply is the target. The refusal depends on the seed, the prompt and the
    response, not on the order of the rows.
    """
    if not refusals:
        raise UsageError("no refusals to choose from; give at least one")
    prompts = Seen()
    for row in rows:
        tally.rows += 1
        missing = [name for name in ("prompt", "response", "is_safe") if name not in row]
        if missing:
            raise PairsError(f"row {tally.rows}: no {', '.join(missing)}; a row needs prompt, response and is_safe")
        prompt, response, safe = only_text(row["prompt"]), only_text(row["response"]), truth(row["is_safe"])
        if safe is None:
            tally.skip("is_safe is neither true nor false", row["is_safe"])
        elif safe:
            tally.skip("is_safe is true")
        elif not prompt or not response:
            tally.skip("no prompt or no response")
        elif one_per_prompt and not prompts.add(prompt):
            tally.skip("another response to the prompt was taken")
        else:
            refusal = refusals[drawn_number(seed, prompt, response) % len(refusals)]
            yield chat_pair(f"row-{tally.rows}", prompt, refusal, response)


def column_pairs(
    rows: Iterable[dict[str, Any]],
    tally: Tally,
    *,
    positive: str,
    negative: str,
    prompt: str | None = None,
    id_: str | None = None,
) -> Iterator[Pair]:
    """Two columns as the replies to a third; without `prompt` as plain texts, which get no chat template."""
    for row in rows:
        tally.rows += 1
        cells = [only_text(row.get(name)) for name in (positive, negative, *([prompt] if prompt else []))]
        name = (only_text(row.get(id_)) if id_ else None) or f"row-{tally.rows}"
        if not row:
            tally.skip("another number of cells than the header")
        elif not all(cells):
            tally.skip("an empty cell")
        elif cells[0] == cells[1]:
            tally.skip("both sides are the same")
        elif prompt:
            yield chat_pair(name, str(cells[2]), str(cells[0]), str(cells[1]))
        else:
            yield Pair(name, str(cells[0]), str(cells[1]), str(cells[0]), str(cells[1]))


def select(
    pairs: Iterable[Pair],
    tally: Tally,
    *,
    skip: int = 0,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> Iterator[Pair]:
    """Some of the pairs, without repeated contents and with unique ids.

    After the first `skip` pairs: the first `limit`, or `sample` drawn at random from all (in the data's order), or all.
    """
    if limit is not None and sample is not None:
        raise UsageError("--limit takes the first pairs, --sample draws some of all; give one of them")
    unique = _behind(_unique(pairs, tally), skip, tally)
    if sample is not None:
        draw = random.Random(seed)
        # The pairs with the smallest random keys, in one pass and without keeping more than `sample` of them.
        keyed = ((draw.random(), number, pair) for number, pair in enumerate(unique))
        drawn = heapq.nsmallest(sample, keyed)
        unique = (pair for _, _, pair in sorted(drawn, key=lambda item: item[1]))
    for pair in unique_ids(islice(unique, limit)):
        tally.pairs += 1
        yield pair


def _behind(pairs: Iterator[Pair], skip: int, tally: Tally) -> Iterator[Pair]:
    for _ in islice(pairs, skip):
        tally.passed += 1
    yield from pairs


def unique_ids(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """The pairs, with "-2", "-3", ... appended to an id that an earlier pair has."""
    ids: Counter[str] = Counter()
    for pair in pairs:
        name = pair.id
        while name in ids:
            ids[pair.id] += 1
            name = f"{pair.id}-{ids[pair.id]}"
        ids[name] += 1
        yield pair if name == pair.id else replace(pair, id=name)


class Seen:
    """Texts seen before, as digests of 16 bytes."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, text: str) -> bool:
        """Tell whether the text is new."""
        before = len(self._digests)
        self._digests.add(hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest())
        return len(self._digests) > before


def _unique(pairs: Iterable[Pair], tally: Tally) -> Iterator[Pair]:
    seen = Seen()
    for pair in pairs:
        content = {key: value for key, value in pair.to_dict().items() if key != "id"}
        if seen.add(json.dumps(content, ensure_ascii=False)):
            yield pair
        else:
            tally.skip("the same as an earlier pair")


def _article(article: Any) -> Iterator[dict[str, Any]]:
    try:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {"context": paragraph["context"], **question}
    except (KeyError, TypeError, IndexError):
        raise _not_squad() from None


def _with_impossible(row: dict[str, Any]) -> dict[str, Any]:
    """The row with is_impossible, which the hub's columns do not have: there a question without an answer is."""
    if truth(row.get("is_impossible")) is not None or "answers" not in row:
        return row
    texts = _answer_texts(row["answers"])
    if isinstance(texts, list):
        return {**row, "is_impossible": not any(map(only_text, texts))}
    return {**row, "is_impossible": texts is None or texts == ""}


def accepted_answers(row: dict[str, Any]) -> list[str]:
    """The texts that a row of `squad_rows` accepts as answers, each once; blanks in them are single."""
    texts = _answer_texts(row.get("answers"))
    found = map(only_text, texts if isinstance(texts, list) else [texts])
    return list(dict.fromkeys(" ".join(text.split()) for text in found if text))


def _answer_texts(answers: Any) -> Any:
    """The texts of SQuAD's [{"text": ...}, ...] or of the hub's {"text": [...]}; what is neither is left as it is."""
    texts = answers.get("text") if isinstance(answers, dict) else answers
    if isinstance(texts, list):
        return [entry.get("text") if isinstance(entry, dict) else entry for entry in texts]
    return texts


def _not_squad() -> PairsError:
    return PairsError(
        "not SQuAD's layout: neither data[].paragraphs[].{context, qas[].question} nor rows with context and question; "
        "for other data use steermoe pairs from-csv"
    )


def drawn_number(seed: int, *texts: str) -> int:
    """A number of 64 bits that depends on the seed and the texts alone."""
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=8)
    for text in texts:
        digest.update(b"\0" + text.encode("utf-8"))
    return int.from_bytes(digest.digest(), "big")


def chat_pair(name: str, prompt: str, positive: str, negative: str) -> Pair:
    """Two replies to one prompt; the replies are the targets."""
    ask = Message("user", prompt)
    sides = [(ask, Message("assistant", reply)) for reply in (positive, negative)]
    return Pair(name, sides[0], sides[1], positive, negative)
