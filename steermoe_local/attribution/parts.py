"""The parts of a run that computes under many steerings: kept as they come, and counted as steps of its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.files import human_duration
from ..errors import FormatError
from ..generation.answer_file import AnswerFile
from ..steering.bias_file import BiasFile
from .decoding import InterventionDecoder

FloatArray = npt.NDArray[np.float64]

Progress = Callable[[str, int, int], None]
"""Called with (what is computed, steps that are done, steps at most)."""

Biases = Callable[[], Sequence[BiasFile | None]]
"""Gives the steerings of a block, the same object in every call."""

_AGAIN = "start over with --restart"


class Parts:
    """Values by the name of their part: those that an interrupted run has kept, or computed and kept.

    `total` is how many steps there are, or how many at most if `at_most` says so, which stands before the time that
    they take.
    """

    def __init__(
        self,
        decoder: InterventionDecoder,
        what: str,
        progress: Progress | None,
        log: Callable[[str], None] | None,
    ) -> None:
        """`what` names the run in its progress. `log` is told how long it takes, by the first part."""
        self._decoder, self._what = decoder, what
        self._progress, self._log = progress or (lambda *_: None), log or (lambda _: None)
        self._kept: AnswerFile | None = None
        self._records: dict[str, list[float]] = {}
        self._steps = 0
        self._timed = False
        self.total = 0
        self.at_most = ""

    def open(self, kept: AnswerFile | None, settings: Mapping[str, Any], resume: bool) -> None:
        """Begin a run, or `resume` an interrupted one.

        Raises BusyError, UsageError (other settings), FormatError, StorageError.
        """
        self._kept = kept
        if kept is None:
            return
        if resume and kept.exists():
            kept.resume(settings)
            self._records = {str(record["id"]): _values(record, kept) for record in kept.records()}
        else:
            kept.start(settings)

    def values(
        self, name: str, n: int, biases: Biases, compute: Callable[[], FloatArray], *, typical: bool = True
    ) -> FloatArray:
        """The `n` values of a part: those kept, or computed under the biases and kept.

        The first `typical` part that is computed tells how long the others take. Raises FormatError.
        """
        if name not in self._records:
            if self._decoder.attached is not biases():
                self._decoder.steer_by(biases())
            start = time.monotonic()
            values = [float(value) for value in compute()]
            if typical and not self._timed:
                self._timed = True
                left = (time.monotonic() - start) * (self.total - self._steps)
                self._log(f"{self.at_most}about {human_duration(left)}, by its first part")
            if self._kept is not None:
                self._kept.add({"id": name, "values": values})
            self._records[name] = values
        self.step(1)
        found = np.array(self._records.pop(name))
        if len(found) != n:
            assert self._kept is not None
            raise FormatError(f"{self._kept.path}: {len(found)} values of {name!r}, not {n}; {_AGAIN}")
        return found

    def step(self, n: int) -> None:
        """Count steps that are done."""
        self._steps += n
        self._progress(self._what, self._steps, self.total)


def _values(record: Mapping[str, Any], kept: AnswerFile) -> list[float]:
    """The values of a part that was kept. Raises FormatError."""
    values = record.get("values")
    if not isinstance(values, list) or not all(type(value) is float for value in values):
        raise FormatError(f"{kept.path}: a part that is no list of figures; {_AGAIN}")
    return values
