"""Files of traces: `.npz`, `.csv` or `.parquet` by the name of the output, written as the tokens come.

docs/traces.md says what is in them. An output gets its name when it is complete; memory does not grow with it, but for
the texts of the tokens that occur, which are as many as the vocabulary has at most.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .._util.disk import cannot_write
from .._util.files import StrPath, human_size
from .._util.npz_parts import NpzParts
from .._util.parquet_parts import Column, ParquetParts, require_pyarrow
from .._util.writing import Replacement
from ..errors import StorageError, UsageError
from ..identity import ModelIdentity
from ..steering.plan_rules import PHASES

if TYPE_CHECKING:
    from .tracing import TracedTokens

FORMAT = "steermoe-trace"
VERSION = 1
SIDE_NAMES = ("", "positive", "negative")
MOST_ID = 100
"""Characters of an id that are kept, and so of the text of a token: both are repeated, and strangers choose them."""
_CELLS = 100_000  # of a table of text that are in memory at once
_OF_NPZ = 4 + 4 + 4 + 1 + 2 + 1  # bytes of a token, without what the layers do
_OF_TOKEN = ("item", "id", "side", "position", "token", "text", "phase", "target", "rule", "layer")


@dataclass(frozen=True)
class TraceShape:
    """What a trace has for each token."""

    identity: ModelIdentity
    logits: bool

    @property
    def n_logits(self) -> int:
        """Router logits of a token in a layer that are written."""
        return self.identity.n_expert if self.logits else 0


class TraceWriter(Protocol):
    """Takes the tokens of a trace in their order."""

    n_texts: int
    n_tokens: int

    def add(self, tokens: TracedTokens) -> None:
        """Append tokens; those of a text follow each other. Raises StorageError, UsageError."""


@contextmanager
def trace_file(
    path: StrPath, shape: TraceShape, token_text: Callable[[int], str], about: Mapping[str, Any]
) -> Iterator[TraceWriter]:
    """Write a trace in the block; the file is there when the block succeeds, as a whole.

    `about`: plain JSON values that are kept with it. `token_text` gives a token's text. Raises UsageError (a name with
    another ending, a path that cannot be written, no pyarrow), StorageError (a full disk).
    """
    kind = _WRITERS[trace_kind(path)]
    texts = _TokenTexts(token_text)
    with kind(path, shape, texts) as writer:
        yield writer
        writer.finish({"format": FORMAT, "version": VERSION, **about, **_counts(writer, shape)})


def trace_kind(path: StrPath) -> str:
    """The kind of file that a name asks for: ".npz", ".csv" or ".parquet". Raises UsageError for another."""
    kind = Path(path).suffix.lower()
    if kind not in _WRITERS:
        raise UsageError(f"{path}: a trace is written as .npz, .csv or .parquet; give it a name with one of these ends")
    if kind == ".parquet":
        require_pyarrow(path)
    return kind


def bytes_of_tokens(path: StrPath, shape: TraceShape, n_tokens: int) -> int:
    """Bytes that the tokens take in a file: in `.npz` exactly, in the others about."""
    n_layer, top_k = shape.identity.n_layer, shape.identity.n_expert_used
    kind = trace_kind(path)
    if kind == ".npz":
        return n_tokens * (_OF_NPZ + n_layer * (top_k * (2 + 4) + 4 * shape.n_logits))
    if kind == ".csv":
        return n_tokens * n_layer * (40 + top_k * (3 + 12) + 12 * shape.n_logits)
    return n_tokens * n_layer * (4 + top_k * (1 + 4) + 4 * shape.n_logits)


def require_room(path: StrPath, shape: TraceShape, n_tokens: int) -> None:
    """Raise StorageError if the disk has less room than the trace of so many tokens is sure to take."""
    if trace_kind(path) != ".npz":
        return
    largest = 4 * shape.identity.n_layer * (shape.n_logits or shape.identity.n_expert_used)
    needed = bytes_of_tokens(path, shape, n_tokens) + n_tokens * largest  # one array is there twice, see `NpzParts`
    with suppress(OSError):
        free = shutil.disk_usage(Path(path).absolute().parent).free
        if free < needed:
            raise StorageError(
                f"{path}: the trace takes {human_size(needed)} while it is written, but {human_size(free)} are free "
                "there; free some room, or trace fewer texts"
            )


def _counts(writer: TraceWriter, shape: TraceShape) -> dict[str, Any]:
    return {"model": shape.identity.to_dict(), "n_texts": writer.n_texts, "n_tokens": writer.n_tokens}


class _TokenTexts:
    """Texts of tokens, each asked for once; `seen` are those that occurred."""

    def __init__(self, token_text: Callable[[int], str]) -> None:
        self._token_text = token_text
        self.seen: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        text = self.seen.get(token)
        if text is None:
            text = self.seen[token] = _short(self._token_text(token))
        return text


def _short(text: str) -> str:
    return text if len(text) <= MOST_ID else f"{text[: MOST_ID - 1]}…"


class _Counting:
    """Counts tokens and texts of what is added."""

    def __init__(self) -> None:
        self.n_texts = self.n_tokens = 0
        self._text: object = None

    def _begins(self, tokens: TracedTokens) -> bool:
        """Count; whether another text begins."""
        begins = tokens.text is not self._text
        self._text = tokens.text
        self.n_texts += begins
        self.n_tokens += len(tokens)
        return begins


class _NpzWriter(_Counting):
    """Arrays with a row for each token, and arrays with a row for each text."""

    def __init__(self, path: StrPath, shape: TraceShape, texts: _TokenTexts) -> None:
        super().__init__()
        self._shape, self._texts = shape, texts
        self._parts = NpzParts(path)

    def __enter__(self) -> _NpzWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._parts.__exit__(*error)

    def add(self, tokens: TracedTokens) -> None:
        text, first = tokens.text, self.n_tokens
        if self._begins(tokens):
            self._parts.add(
                items=np.array([text.item], np.int32),
                ids=np.array([_short(text.id)], f"<U{MOST_ID}"),
                sides=np.array([SIDE_NAMES.index(text.side)], np.int8),
                first=np.array([first], np.int64),
            )
        n, part = len(tokens), tokens.part
        ids = np.asarray(text.tokens[part], np.int32)
        for token in np.unique(ids).tolist():
            self._texts(token)
        self._parts.add(
            texts=np.full(n, self.n_texts - 1, np.int32),
            positions=np.arange(part.start, part.stop, dtype=np.int32),
            tokens=ids,
            phases=text.phases[part],
            targets=text.is_target(part),
            rules=text.rules[part],
            experts=tokens.experts.astype(np.int16),
            weights=tokens.weights,
            **({} if tokens.logits is None else {"logits": tokens.logits}),
        )

    def finish(self, about: Mapping[str, Any]) -> None:
        known = sorted(self._texts.seen)
        self._parts.finish(
            meta=np.asarray(json.dumps({**about, "phases": PHASES, "sides": SIDE_NAMES})),
            vocabulary=np.array(known, np.int32),
            vocabulary_texts=np.array([self._texts.seen[token] for token in known], np.str_),
        )


def _table(tokens: TracedTokens, texts: _TokenTexts) -> dict[str, Column]:
    """The columns of a table with a row for each token and layer that routes."""
    text, part, n = tokens.text, tokens.part, len(tokens)
    layers = np.flatnonzero((tokens.experts[:, :, 0] >= 0).any(axis=0))
    m = len(layers)
    ids = list(text.tokens[part])
    columns: dict[str, Column] = {
        "item": np.full(n * m, text.item, np.int32),
        "id": [_short(text.id)] * (n * m),
        "side": [text.side] * (n * m),
        "position": np.repeat(np.arange(part.start, part.stop, dtype=np.int32), m),
        "token": np.repeat(np.array(ids, np.int32), m),
        "text": [text for token in ids for text in [texts(token)] * m],
        "phase": [name for phase in text.phases[part].tolist() for name in [PHASES[phase]] * m],
        "target": np.repeat(text.is_target(part).astype(np.int8), m),
        "rule": np.repeat(text.rules[part], m),
        "layer": np.tile(layers.astype(np.int16), n),
    }
    experts = tokens.experts[:, layers].reshape(n * m, -1)
    weights = tokens.weights[:, layers].reshape(n * m, -1)
    assert tuple(columns) == _OF_TOKEN
    columns |= {f"expert_{slot}": experts[:, slot].astype(np.int16) for slot in range(experts.shape[1])}
    columns |= {f"weight_{slot}": weights[:, slot] for slot in range(weights.shape[1])}
    if tokens.logits is not None:
        logits = tokens.logits[:, layers].reshape(n * m, -1)
        columns |= {f"logit_{expert}": logits[:, expert] for expert in range(logits.shape[1])}
    return columns


class _CsvWriter(_Counting):
    """A table as comma-separated values, its names in the first line."""

    def __init__(self, path: StrPath, shape: TraceShape, texts: _TokenTexts) -> None:
        super().__init__()
        self._path, self._token_texts = path, texts
        self._replacement = Replacement(path)
        self._file = open(self._replacement.path, "w", encoding="utf-8", newline="")  # noqa: SIM115
        self._csv = csv.writer(self._file, lineterminator="\n")
        cells = shape.identity.n_layer * (len(_OF_TOKEN) + 2 * shape.identity.n_expert_used + shape.n_logits)
        self._n_at_once = max(1, _CELLS // cells)

    def __enter__(self) -> _CsvWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what a full disk did not take is tried again
            self._file.close()
        self._replacement.abort()

    def add(self, tokens: TracedTokens) -> None:
        first = not self.n_tokens
        self._begins(tokens)
        try:
            for part in tokens.split(self._n_at_once):
                columns = _table(part, self._token_texts)
                if first:
                    self._csv.writerow(columns)
                    first = False
                self._csv.writerows(zip(*map(_cells, columns.values()), strict=True))
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def finish(self, about: Mapping[str, Any]) -> None:
        try:
            self._file.close()
            self._replacement.commit()
        except OSError as error:
            raise cannot_write(self._path, error) from error


def _cells(column: Column) -> list[Any]:
    """The cells of a column; a float32 in the fewest digits that give it back."""
    if isinstance(column, list):
        return column
    return [f"{value:.9g}" for value in column.tolist()] if column.dtype.kind == "f" else list(column.tolist())


class _ParquetWriter(_Counting):
    """The same table as a Parquet file; what the trace is about is its metadata `steermoe`."""

    def __init__(self, path: StrPath, shape: TraceShape, texts: _TokenTexts) -> None:
        super().__init__()
        self._token_texts = texts
        self._parts = ParquetParts(path)

    def __enter__(self) -> _ParquetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._parts.__exit__(*error)

    def add(self, tokens: TracedTokens) -> None:
        self._begins(tokens)
        self._parts.add(_table(tokens, self._token_texts))

    def finish(self, about: Mapping[str, Any]) -> None:
        self._parts.finish(steermoe=json.dumps(about))


_WRITERS: dict[str, Callable[[StrPath, TraceShape, _TokenTexts], Any]] = {
    ".npz": _NpzWriter,
    ".csv": _CsvWriter,
    ".parquet": _ParquetWriter,
}
