"""Checks pairs before recording: can each target be located under a model's chat template and tokenizer?

Only the vocabulary is loaded, so that the check is quick for a model of any size. Rendering is the recorder's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .._util.file_kinds import PAIRS, require_kind
from .._util.files import StrPath, parse_json
from .._util.regular_files import open_regular
from ..errors import PairsError
from ..llama.rendering import LocatedTarget, Renderer, vocabulary
from ..llama.template_date import AnyDate
from ..pairs.pairs import SIDES, Pair, parse_pair

_MAX_LINE = 64 << 20


@dataclass(frozen=True)
class CheckedSide:
    """One side: located in the rendered prompt, or `problem` says why not.

    Pieces of text are bytes of the rendered prompt in UTF-8; the target is at [start, end) in it.
    """

    name: str
    located: LocatedTarget | None
    problem: str = ""

    @property
    def n_tokens(self) -> int:
        """Tokens up to the target's last one, which is what recording decodes; 0 when not located."""
        return self.located.n_needed if self.located else 0

    @property
    def n_target(self) -> int:
        """Target tokens; 0 when not located."""
        return len(self.located.target) if self.located else 0

    @property
    def parts(self) -> tuple[str, str, str]:
        """The rendered prompt before, at and behind the target."""
        if self.located is None:
            return "", "", ""
        text = self.located.text.encode("utf-8")
        cut = (text[: self.located.start], text[self.located.start : self.located.end], text[self.located.end :])
        before, target, behind = (part.decode("utf-8", "replace") for part in cut)
        return before, target, behind


@dataclass(frozen=True)
class CheckedPair:
    """A pair and its sides. A line that holds no pair has no sides, and one problem."""

    id: str
    sides: tuple[CheckedSide, ...]
    problem: str = ""

    def problems(self) -> Iterator[tuple[str, str]]:
        """(side, why it cannot be counted); the side is "" when the line has no pair."""
        if self.problem:
            # pairs.py names the field first: "negative_target: ...", "positive[0].role: ..."
            yield next((side for side in SIDES if self.problem.startswith(side)), ""), self.problem
        for side in self.sides:
            if side.problem:
                yield side.name, side.problem

    def warnings(self, context: int = 0) -> Iterator[tuple[str, str]]:
        """(side, warning); `context` is the longest prompt in tokens, 0 for no limit."""
        for side in self.sides:
            if context and side.n_tokens > context:
                yield side.name, f"{side.n_tokens} tokens are more than the context of {context}"
            if side.located is None:
                continue
            for loss in side.located.losses:
                yield side.name, f"{loss}; detect skips this pair"
            for note in side.located.notes:
                yield side.name, note
            if side.located.as_paper is False:
                yield side.name, "the paper's rule (last exact run of the target's tokens) finds other tokens"
        texts = [side.located.text for side in self.sides if side.located]
        if len(texts) == 2 and texts[0] == texts[1]:
            yield "", "both sides render to the same text, so the pair shows no difference"


def candidates(path: StrPath) -> Iterator[Pair | tuple[str, str]]:
    """The pairs of a file; for a line without a valid pair, its name and the problem.

    Unlike `load_pairs` it continues after a bad line. Raises PairsError for a file that cannot be read or is empty.
    """
    ids: dict[str, int] = {}
    empty = True
    for number, raw in enumerate(_lines(path), 1):
        data = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not data.strip():
            continue
        empty = False
        name = f"line-{number}"
        if len(raw) > _MAX_LINE:
            yield name, f"a line of more than {_MAX_LINE >> 20} MiB, checked no further; write one pair a line"
            return
        try:
            fields = parse_json(data.decode("utf-8"))
            if isinstance(fields, dict) and isinstance(fields.get("id"), str):
                name = f"{fields['id']} ({name})"
            pair = parse_pair(fields, f"line-{number}")
        except UnicodeDecodeError:
            yield name, "not UTF-8; save the file as UTF-8"
        except PairsError as error:
            yield name, str(error)
        except ValueError as error:
            yield name, f"not JSON ({error}); write one JSON object a line"
        else:
            first = ids.setdefault(pair.id, number)
            if first == number:
                yield pair
            else:
                yield name, f"id: {pair.id!r} is already the id of line {first}; give each pair its own"
    if empty:
        raise PairsError(f"{path}: no pairs in it; write one JSON object a line")


def _lines(path: StrPath) -> Iterator[bytes]:
    require_kind(path, "a pairs file", PAIRS, error=PairsError)
    try:
        with open_regular(path, streams=True, fifos=True) as file:
            yield from iter(lambda: file.readline(_MAX_LINE + 1), b"")
    except OSError as error:
        raise PairsError(
            f"{path}: cannot be read as a pairs file: {error.strerror or error}; check the path"
        ) from error


class Checker:
    """Checks pairs against one model's template and tokenizer; a context manager.

    `thinking`, `template_arguments` and `date` as in recording. Raises ModelError, UsageError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        thinking: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
        date: AnyDate = None,
        verbose: bool = False,
    ) -> None:
        self._opened = vocabulary(model, verbose=verbose)
        opened = self._opened.__enter__()
        try:
            self._renderer = Renderer(opened, thinking=thinking, template_arguments=template_arguments, date=date)
            metadata = opened.metadata()
        except BaseException:
            self.close()
            raise
        architecture = metadata.get("general.architecture", "")
        length = metadata.get(f"{architecture}.context_length", "0")
        self.training_context = int(length) if length.isdigit() else 0
        """Context length that the model was trained with, 0 when the file does not say."""

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the vocabulary."""
        self._opened.__exit__(None, None, None)

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables that the chat template gets, the switches for thinking among them."""
        return self._renderer.template_arguments

    @property
    def date(self) -> str | None:
        """The date that the chat template may print, as YYYY-MM-DD; None for a template that reads none."""
        return self._renderer.date

    def check(self, candidate: Pair | tuple[str, str]) -> CheckedPair:
        """Render and locate both sides."""
        if isinstance(candidate, tuple):
            return CheckedPair(candidate[0], (), candidate[1])
        sides = []
        for name, (side, target) in zip(SIDES, candidate.sides(), strict=True):
            try:
                sides.append(CheckedSide(name, self._renderer.located(side, target)))
            except PairsError as error:
                sides.append(CheckedSide(name, None, str(error)))
        return CheckedPair(candidate.id, tuple(sides))
