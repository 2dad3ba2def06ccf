"""What the commands that measure share (eval, sweep, tune, experiment, transfer): what their options come to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..._util.files import replacing, require_writable
from ...errors import UsageError
from ...identity import ModelIdentity
from ...model_files.model_info import ModelInfo, model_info
from ...models.shipped_maps import shipped_maps
from .common import LlamaFlags, print_json, progress_bar
from .memory_check import check_memory
from .steering import SteeringFlags, warn

if TYPE_CHECKING:
    from ...evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
    from ...evaluation.tasks.neutral_text import NeutralText
    from ...evaluation.tasks.tasks import Scorer, Task
    from ...steering.steering import Steering

__all__ = ["NONE", "RECORDS", "EvaluationSetup"]

RECORDS = "records.jsonl"
NONE = "none"


@dataclass(frozen=True)
class EvaluationSetup:
    """The options of `evaluation_options`, and what they come to. Everything is read when it is first asked for.

    `seed` is that of random draws (bootstrap, controls), `seeds` are those of sampled answers. `output` is the folder
    of the results, None for a command without one. `command` is a line that does the same again.
    """

    model: Path
    steering_flags: SteeringFlags
    flags: LlamaFlags
    task_name: str | None = None
    scorer_name: str | None = None
    scorer_options: tuple[str, ...] = ()
    max_tokens: int | None = None
    n_items: int | None = None
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seeds: tuple[int, ...] = (0,)
    seed: int = 0
    parallel: int = 16
    ctx_size: int | None = None
    thinking: bool = False
    template_arguments: Mapping[str, Any] | None = None
    neutral_name: str | None = None
    benign_name: str | None = None
    n_text: int = 2000
    output: Path | None = None
    resume: bool = False
    restart: bool = False
    as_json: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        """Raise UsageError for options that exclude each other."""
        if self.resume and self.restart:
            raise UsageError("--resume and --restart exclude each other")
        if self.temperature == 0 and len(self.seeds) > 1:
            raise UsageError("--seeds: a greedy answer is the same for every seed; add --temp 0.8, say")
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError("--seeds: a seed stands twice; give each once")
        if self.task_name is None and self._shipped is None:
            raise UsageError("which task? give --task FILE.jsonl, or --task builtin:NAME (steermoe tasks list)")

    @cached_property
    def facts(self) -> ModelInfo:
        """The model's, with its routers' hash. Raises ModelError."""
        return model_info(self.model)

    @cached_property
    def identity(self) -> ModelIdentity:
        """The model's. Raises ModelError for one without experts."""
        return self.facts.require_moe()

    @cached_property
    def steering(self) -> Steering:
        """The steering that the flags choose, checked against the model. Raises UsageError when they name none."""
        found = self.steering_flags.open(self.identity, self.model)
        if found is None:
            raise UsageError("nothing to steer by; give --map MAP, or --bias FILE")
        found.build(self.identity)  # what the model cannot carry out is told now
        return found

    @cached_property
    def map_steering(self) -> Steering:
        """The map alone, for commands that choose the numbers of experts themselves.

        The numbers are those of the flags, else of a shipped map's card, else 0. Raises UsageError for a bias file.
        """
        flags = self.steering_flags
        if "map" not in flags.source:
            raise UsageError("the experts are chosen from a map; give --map MAP")
        from ...evaluation.measuring.opening import open_steering

        steering = open_steering(
            flags.source["map"],
            activate=flags.activate,
            deactivate=flags.deactivate,
            reverse=flags.reverse,
            layers=flags.layers,
            strength=flags.strength,
        )
        warn(steering.check(self.identity, str(self.model), flags.force))
        return steering

    @cached_property
    def task(self) -> Task:
        """The task, its first `n_items` items. Raises FormatError, UsageError."""
        from ...evaluation.tasks.builtin import open_task
        from ...evaluation.tasks.scorers import parse_options

        task = open_task(
            self.task_name or f"builtin:{self._shipped}", scorer=self.scorer_name, max_tokens=self.max_tokens
        )
        if self.scorer_options:
            options = parse_options(task.scorer, self.scorer_options)
            task = replace(task, options={**task.options, **options})
        return task.first(self.n_items)

    @cached_property
    def scorer(self) -> Scorer:
        """The task's scorer. Raises UsageError."""
        from ...evaluation.tasks.scorers import make_scorer

        return make_scorer(self.task.scorer, self.task.options)

    @cached_property
    def guards(self) -> tuple[tuple[Task, Scorer] | None, NeutralText | None]:
        """Benign prompts with their scorer, and the neutral text: those that were named, else the shipped ones."""
        from ...evaluation.measuring.opening import open_guards

        benign, neutral = (
            "default" if name is None else None if name == NONE else name
            for name in (self.benign_name, self.neutral_name)
        )
        return open_guards(self.model, benign, neutral)

    @cached_property
    def settings(self) -> EvaluatorSettings:
        """How the evaluator measures."""
        from ...evaluation.measuring.evaluator import EvaluatorSettings
        from ...generation.engine import Sampling

        context = self.flags.context_arguments()
        del context["n_threads_batch"]  # one number of threads
        n_ctx = self.ctx_size
        return EvaluatorSettings(
            sampling=Sampling(
                temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=0
            ),
            seeds=self.seeds,
            n_parallel=self.parallel,
            n_ctx=(self.facts.context_length or None) if n_ctx == 0 else n_ctx,
            n_text=self.n_text or None,
            thinking=self.thinking,
            template_arguments=self.template_arguments or {},
            force=self.steering_flags.force,
            context=context,
        )

    @property
    def about(self) -> dict[str, Any]:
        """Facts of model and context that results hang on, as plain JSON values; the same in every run."""
        return self._about(self.facts)

    def _about(self, facts: ModelInfo) -> dict[str, Any]:
        from ...evaluation.measuring.opening import model_facts

        flags = self.flags
        return {
            "model": model_facts(facts),
            "context": {
                "cache_type_k": flags.cache_type_k,
                "cache_type_v": flags.cache_type_v,
                "flash_attn": flags.flash_attn,
            },
        }

    def path(self, name: str) -> Path:
        """A file of the output folder."""
        assert self.output is not None
        return self.output / name

    def write(self, name: str, text: str) -> Path:
        """Write a text file of the output folder. Raises UsageError."""
        with replacing(self.path(name)) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
        return self.path(name)

    def write_summary(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json, with the command; returns all that stands in it. Raises UsageError."""
        whole = {**data, "command": self.command}
        self.write("summary.json", json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
        return whole

    def print_json(self, data: Any) -> None:
        """Print the result of --json."""
        print_json(data)

    def check_output(self, *names: str) -> None:
        """Make the output folder, and check that these files can be written in it. Raises UsageError."""
        if self.output is None:
            return
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"{self.output}: is a file; name a folder for the results with -o")
        try:
            self.output.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.output}: cannot be made: {error.strerror or error}; name another folder") from None
        for name in names:
            require_writable(self.path(name))

    @contextmanager
    def evaluator(self, *, model: Path | None = None, kept: str | None = RECORDS) -> Iterator[Evaluator]:
        """The evaluator on the model (or on another `model` for the same task), with a progress bar.

        What it measures is kept in the file `kept` of the output folder: written when the block ends, and left to go on
        from with --resume when it fails or is interrupted, which is said on stderr. Raises UsageError (a run that was
        interrupted is there; a prompt that does not fit), ResourceError (no memory for it), ModelError, FormatError.
        """
        from ...evaluation.measuring.evaluator import plan
        from ...evaluation.measuring.opening import open_evaluator
        from ...generation.answer_file import AnswerFile

        path = model or self.model
        facts = model_info(path) if model else self.facts
        records: Path | None = None
        if kept is not None and self.output is not None:
            self.check_output(kept)
            records = self.path(kept)
            partial = AnswerFile(records)
            if partial.exists() and not self.resume and not self.restart:
                raise UsageError(
                    f"{partial.path}: an interrupted run; go on with --resume, or start over with --restart"
                )
        benign, neutral = self.guards
        settings = self.settings
        n_ctx = plan(path, self.task, self.scorer, benign=benign, neutral=neutral, settings=settings)
        check_memory(facts, self.flags, n_ctx, max(2, settings.n_parallel))
        with (
            progress_bar() as show,
            open_evaluator(
                path,
                self.task,
                scorer=self.scorer,
                benign=benign,
                neutral=neutral,
                settings=settings,
                records=records,
                resume=self.resume,
                metadata=self._about(facts),
                progress=show,
                **self.flags.model_arguments(),
            ) as evaluator,
        ):
            try:
                yield evaluator
            except BaseException:
                if records and evaluator.n_kept:
                    click.echo(
                        f"{evaluator.n_kept} results are kept in {partial.path}; "
                        "go on with the same command and --resume",
                        err=True,
                    )
                raise

    @property
    def _shipped(self) -> str | None:
        """Name of the shipped map that steers, for its own task."""
        name = self.steering_flags.source.get("map", "").removeprefix("tiny/")
        return name if name in shipped_maps() else None
