"""From a contrast to a steering that was checked: `learn`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._util.files import human_duration, timestamp, tool_name
from .._util.running_clock import RunningClock
from ..errors import PairsError
from ..evaluation.measuring.opening import model_facts, open_guards
from ..llama.steered_llama import SteeredLlama
from ..model_files.model_info import model_info
from ..models.user_maps import check_map_name
from .clock import Clock
from .options import Contrast, LearnOptions
from .report import write_results
from .result import LearnResult
from .run import Run
from .source import open_source
from .work import WorkFolder

__all__ = ["LearnProgress", "LearnResult", "learn"]


@dataclass(frozen=True)
class LearnProgress:
    """How far a run is: `done` of `total` of a step; seconds that all steps have taken, and are expected to take."""

    step: str
    done: int
    total: int
    elapsed: float
    expected: float


def learn(
    model: Path,
    name: str,
    contrast: Contrast,
    folder: Path,
    *,
    options: LearnOptions | None = None,
    resume: bool = False,
    restart: bool = False,
    progress: Callable[[LearnProgress], None] | None = None,
    log: Callable[[str], None] | None = None,
    now: Callable[[], float] | None = None,
) -> LearnResult:
    """Learn a steering from a contrast, check it on what it has not seen, and write it into `folder`/`name`.

    Args:
        model: the GGUF file.
        name: of the steering.
        contrast: two instructions, a file of pairs, or a behaviour that ships.
        folder: the user's maps folder, or another one.
        options: how; its defaults where None.
        resume: go on with an interrupted run. restart: forget it, or a finished one, and begin anew.
        progress: called as often as something is done.
        log: called with a line on what is being done.
        now: the clock, in seconds; None: one that stands still while the process is stopped.

    The steps are those of `clock.STEPS`; each leaves what it found in `folder`/`name`/work, so that a run that is
    killed at any time goes on with `resume`. Raises UsageError (a name or folder that is taken, other settings),
    FormatError and PairsError (files that cannot be used), BusyError, StorageError, ModelError, NativeError.
    """
    options = options or LearnOptions()
    check_map_name(name)
    facts = model_info(model)
    identity = facts.require_moe()
    source = open_source(contrast, options, identity)
    about = model_facts(facts)
    settings = {"model": about, "contrast": source.settings, **options.settings()}
    neutral = open_guards(model, None, "default")[1]
    show, say = progress or (lambda _: None), log or (lambda _: None)
    with WorkFolder(folder, name) as work, ExitStack() as stack:
        work.begin(settings, resume, restart)
        for note in (source.note, work.note):
            if note:
                say(note)
        now = now or stack.enter_context(RunningClock())
        clock = Clock(work.facts.get("expected"), work.facts.get("spent"), now)

        def report(step: str, done: int, total: int) -> None:
            show(LearnProgress(step, done, total, clock.elapsed, clock.foreseen))

        try:
            clock.begin("answers")  # loading the model is a part of the first step
            with closing(SteeredLlama(model, **{"n_ctx": 64, "n_batch": 64, **options.model_arguments})) as llama:
                run = Run(llama, work, source, neutral, options, clock, about, report, say)
                found = run.found()
            clock.begin("report")
            report("report", 0, 1)
            result = write_results(work, found, source, options, clock, _facts(about, source, options, work))
            report("report", 1, 1)
        except PairsError:
            if not work.steps:  # nothing was computed, and other pairs are not to be refused for it
                work.forget()
            raise
        finally:
            clock.begin("")
            work.facts["spent"] = clock.spent
            with contextlib.suppress(Exception):  # what went wrong before is what is reported
                work.save()
    say(f"took {human_duration(clock.elapsed)}; at most {human_duration(clock.total, most=True)} were expected")
    return result


def _facts(about: Mapping[str, Any], source: Any, options: LearnOptions, work: WorkFolder) -> dict[str, Any]:
    """Facts of the run for learn.json."""
    return {
        "model": dict(about),
        "contrast": {"words": source.words, **source.settings},
        "effort": options.effort,
        "speed": work.facts.get("speed"),
        "command": options.command,
        "tool": tool_name(),
        "created": timestamp(),
        "seed": options.seed,
    }
