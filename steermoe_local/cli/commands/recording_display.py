"""What a recording says of itself while it runs: a progress bar, skipped pairs, an interruption."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..._util.visible import shortened, visible
from ...pairs.pairs import Pair
from ..options.announcing import Announcer
from ..output import ProgressLines, SummedLines, say
from ..streams import console

if TYPE_CHECKING:
    from ...detection.recording_options import RecordingProgress


class RecordingDisplay:
    """What a run says of itself while it runs: a bar on a terminal, skipped pairs on stderr."""

    def __init__(self, what: str, shorter: str = "fewer pairs") -> None:
        """`what` names the bar; its total is all pairs. `shorter`: what makes the run shorter, as one writes it."""
        self._what = what
        self._announcer = Announcer(shorter, print_line=self._print)
        self._timed = self._announcer.timed(lambda *_: None)
        self._last: RecordingProgress | None = None
        self._start = time.monotonic()
        self._seconds = 0.0
        self._interrupted = False
        self._told = False
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(
            *columns,
            console=console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
            speed_estimate_period=300,
        )
        self._task = self._bar.add_task(what, total=None, rate="")
        self._terminal = sys.stderr.isatty()
        self._lines = ProgressLines()
        self._skipped = SummedLines(self._print)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar; the clock of tokens per second starts. Ctrl-C takes effect behind the batch, or in a template.

        Python would raise it in whatever Python function the library calls back, where it is lost.
        """

        from ...llama.template_pool import default_pool

        def remember(*_: Any) -> None:
            self._interrupted = True
            signal.signal(signal.SIGINT, before)  # a second one takes effect where it can
            if default_pool().waits:
                raise KeyboardInterrupt

        self._start = time.monotonic()
        before = signal.getsignal(signal.SIGINT)
        handled = threading.current_thread() is threading.main_thread() and before is not None
        if handled:
            signal.signal(signal.SIGINT, remember)
        try:
            with self._bar:
                yield
        finally:
            self._skipped.close()
            if handled:
                signal.signal(signal.SIGINT, before)

    def update(self, progress: RecordingProgress) -> None:
        self._last = progress
        self._seconds = time.monotonic() - self._start
        if self._interrupted:
            raise KeyboardInterrupt
        if not self._told:
            self._told = True
            n = progress.n_total - progress.n_done
            self._announcer.announce(self._what, f"{n:,} pairs, {2 * n:,} texts")
        self._timed(self._what, progress.n_done, progress.n_total)
        rate = f"{self._rate():,.0f} tokens/s"
        if self._terminal:
            self._bar.update(self._task, completed=progress.n_done, total=progress.n_total, rate=rate)
        else:
            self._lines.show(self._what, progress.n_done, progress.n_total, rate)

    def skipped(self, pair: Pair, reason: str) -> None:
        self._skipped.add(f"skipped: pair {pair.id!r}: {reason}", f"skipped: {reason}")
        if self._interrupted:
            raise KeyboardInterrupt

    def _print(self, line: str) -> None:
        if self._terminal:
            self._bar.console.print(visible(shortened(line, 4_000)), soft_wrap=True)
        else:
            say(visible(line))

    def _rate(self) -> float:
        return self._last.n_tokens / self._seconds if self._last and self._seconds else 0.0

    def figures(self) -> dict[str, Any]:
        """For --json: of this process; an interrupted one before it is not in them."""
        if self._last is None:
            return {}
        return {
            "n_tokens": self._last.n_tokens,
            "n_decoded": self._last.n_decoded,
            "seconds": round(self._seconds, 3),
            "tokens_per_second": round(self._rate(), 1),
        }

    def summary(self) -> str:
        last = self._last
        if last is None:
            return "no pair was counted yet"
        skipped = f", {last.n_skipped} of them skipped" if last.n_skipped else ""
        return f"{last.n_done} of {last.n_total} pairs{skipped}, {self._rate():,.0f} tokens/s"
