"""The options of the commands that measure (eval, sweep, tune, experiment, transfer, audit), and what they open."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import click

from ..._util.disk import cannot_write
from ..._util.files import replacing, require_writable
from ..._util.writing import require_no_link
from ...errors import UsageError
from ...identity import ModelIdentity
from ...model_files.model_info import ModelInfo, model_info
from ...models.shipped_maps import map_path
from ..output import progress_bar, say
from .announcing import Announcer
from .common import PARALLEL, SEEDS, check_resume, check_unfinished, json_option, lock_output, template_options
from .groups import MEASUREMENT, MODEL, OUTPUT, SAMPLING, F, command_line, field_options, option, option_group, together
from .llama import LlamaFlags, llama_options
from .measured_steering import MeasuredSteering
from .model import model_option
from .opening import check_memory, warn_of_unknown_reasoning
from .plans import WhereText
from .sampling import MIN_P, TOP_P
from .steering import SteeringFlags, steering_options
from .system_text import NameOrPath, UserPath

if TYPE_CHECKING:
    from ...evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
    from ...evaluation.measuring.workload import Work
    from ...evaluation.reports.document import Document
    from ...evaluation.tasks.neutral_text import NeutralText
    from ...evaluation.tasks.tasks import Scorer, Task

RECORDS = "records.jsonl"
REPORTS = ("report.md", "report.html")
"""The report in two forms; the page has its pictures inside."""
NONE = "none"


@dataclass(frozen=True)
class EvaluationSetup(MeasuredSteering):
    """The options of a measurement, and what they name: model, steering, task. Each is read when it is first used.

    `seed` is that of random draws (bootstrap, controls), `seeds` are those of sampled answers. `output` is the folder
    of the results, None for a command without one. `command` is a line that does the same again. `second`: a task that
    is measured in the place of the benign prompts.
    """

    model: Path
    steering_flags: SteeringFlags
    flags: LlamaFlags
    task_name: str | None = option(
        "--task",
        type=NameOrPath(),
        metavar="TASK",
        help="Task file (docs/tasks.md), or builtin:NAME.  [default: that of a shipped or learnt map]",
    )
    scorer_name: str | None = option(
        "--scorer", metavar="NAME", help="How answers are scored.  [default: as the task says]"
    )
    scorer_options: tuple[str, ...] = option(
        "--scorer-option", multiple=True, metavar="KEY=VALUE", help="Option of the scorer; may be given again."
    )
    max_tokens: int | None = option(
        "--max-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.  [default: as the task says]"
    )
    n_items: int | None = option(
        "-n", "--n-items", type=click.IntRange(1), metavar="N", help="Take the first N items.  [default: all]"
    )
    temperature: float = option(
        "--temp",
        "--temperature",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        allow_from_autoenv=False,  # `run` samples by default
        metavar="T",
        help="Temperature of sampling, 0: greedy.",
    )
    top_k: int = option(
        "--top-k",
        type=click.IntRange(0),
        default=40,
        show_default=True,
        metavar="K",
        help="Sample from the k likeliest.",
    )
    top_p: float = option("--top-p", **TOP_P)
    min_p: float = option("--min-p", **MIN_P)
    seeds: tuple[int, ...] = option(
        "--seeds",
        type=SEEDS,
        default="0",
        value=(0,),
        show_default=True,
        metavar="LIST",
        help="With --temp: answer each item once for each seed, like 0,1,2 or 0-4.",
    )
    seed: int = option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=0,
        show_default=True,
        allow_from_autoenv=False,  # not the seed of sampling
        metavar="SEED",
        help="Seed of random draws: bootstrap, controls, splits.",
    )
    parallel: int = option(*PARALLEL[0], **PARALLEL[1])
    ctx_size: int | None = option(
        "-c",
        "--ctx-size",
        type=click.IntRange(0),
        allow_from_autoenv=False,  # as needed, whatever a chat takes
        metavar="N",
        help="Context of each answer in tokens, 0: the model's.  [default: as needed]",
    )
    neutral_name: str | None = option(
        "--neutral",
        type=NameOrPath(),
        metavar="FILE",
        help="Neutral text for perplexity and KL, `none` for none.  [default: a shipped one]",
    )
    n_text: int = option(
        "--n-text",
        type=click.IntRange(0),
        default=2000,
        show_default=True,
        metavar="N",
        help="Tokens of it that count, 0: all.",
    )
    benign_name: str | None = option(
        "--benign",
        type=NameOrPath(),
        metavar="FILE",
        help="Benign prompts, to count over-refusal, `none` for none.  [default: shipped ones]",
    )
    where: str | None = option(
        "--where",
        type=WhereText(),
        metavar="WHERE",
        help="Steer only there, like answer[0:32] or thinking, as the rules of plans begin (docs/plans.md).  "
        "[default: all tokens]",
    )
    output: Path | None = option(
        "-o",
        "--output",
        type=UserPath(path_type=Path),
        required=True,
        allow_from_autoenv=False,  # no other command's output
        metavar="DIR",
        help="Folder of the results; it is made.",
    )
    resume: bool = option("--resume", is_flag=True, help="Go on with an interrupted run.")
    restart: bool = option("--restart", is_flag=True, help="Forget an interrupted run.")
    thinking: bool = False
    template_arguments: Mapping[str, Any] | None = None
    date: datetime.date | None = None
    as_json: bool = False
    command: str = ""
    second: tuple[Task, Scorer] | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for options that exclude each other."""
        check_resume(self.resume, self.restart)
        if self.temperature == 0 and len(self.seeds) > 1:
            raise UsageError("--seeds: a greedy answer is the same for every seed; add --temp 0.8, say")
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError("--seeds: a seed stands twice; give each once")
        if self.task_name is None and self._own_task is None:
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
    def task(self) -> Task:
        """The task, its first `n_items` items. Raises FormatError, UsageError."""
        from ...evaluation.tasks.builtin import open_task
        from ...evaluation.tasks.scorers import parse_options

        task = open_task(self.task_name or self._own_task or "", scorer=self.scorer_name, max_tokens=self.max_tokens)
        if self.scorer_options:
            options = parse_options(task.scorer, self.scorer_options)
            task = replace(task, options={**task.options, **options})
        return task.first(self.n_items)

    @cached_property
    def scorer(self) -> Scorer:
        """The task's scorer. Raises UsageError."""
        from ...evaluation.tasks.scorers import make_scorer

        return make_scorer(self.task.scorer, self.task.options)

    def unrelated(self, name: str | None) -> tuple[Task, Scorer] | None:
        """A task that steering should leave alone, with its scorer: a file or builtin:NAME, None for `none`.

        Without a name it is that of the embedded model, for that model alone. Raises FormatError, UsageError.
        """
        from ...evaluation.tasks.builtin import is_embedded, open_task
        from ...evaluation.tasks.scorers import make_scorer

        if name == NONE or (name is None and not is_embedded(self.identity)):
            return None
        task = open_task(name or "builtin:neutral").first(self.n_items)
        return task, make_scorer(task.scorer, task.options)

    @cached_property
    def guards(self) -> tuple[tuple[Task, Scorer] | None, NeutralText | None]:
        """Benign prompts with their scorer, and the neutral text: those that were named, else the shipped ones."""
        from ...evaluation.measuring.opening import open_guards

        benign, neutral = (
            "default" if name is None else None if name == NONE else name
            for name in (self.benign_name, self.neutral_name)
        )
        return open_guards(self.model, self.second or benign, neutral)

    @cached_property
    def settings(self) -> EvaluatorSettings:
        from ...evaluation.measuring.evaluator import EvaluatorSettings
        from ...generation.engine import Sampling

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
            date=self.date,
            force=self.steering_flags.force,
            placement=self.placement,
            record=self._plan is not None and self._plan.needs_routing,
            context=self.flags.context_arguments(),
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the results: facts of the model and the context that they depend on, as JSON values."""
        return self._metadata(self.facts)

    def _metadata(self, facts: ModelInfo) -> dict[str, Any]:
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
        """A path in the output folder. Raises UsageError if a link to a file stands there, or a pipe."""
        assert self.output is not None
        return require_no_link(self.output / name)

    def write(self, name: str, text: str) -> Path:
        """Write a text file of the output folder. Raises UsageError."""
        with replacing(self.path(name)) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
        return self.path(name)

    def write_summary(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json, with the command; returns its content. Raises UsageError."""
        whole = {**data, "command": self.command}
        self.write("summary.json", json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
        return whole

    def write_report(self, document: Document) -> None:
        """Write report.md, and report.html with the pictures that were drawn before. Raises UsageError."""
        from ...evaluation.reports.html_report import html_report

        for name, text in zip(REPORTS, (document.markdown(), html_report(document, self.output)), strict=True):
            self.write(name, text)

    def draw(self, draw: Callable[[Sequence[Path]], Any], names: Sequence[str]) -> tuple[str, ...]:
        """Draw pictures into the output folder; returns the one for the report. Without matplotlib, says so."""
        from ...evaluation.reports.figure import missing_matplotlib

        if problem := missing_matplotlib():
            say(problem)
            return ()
        return () if draw([self.path(name) for name in names]) is False else tuple(names[:1])

    def check_output(self, *names: str) -> None:
        """Make the output folder, lock it for this command, and check that these files can be written in it.

        Raises UsageError, StorageError, BusyError (another process writes its results there).
        """
        _ = self.placement  # wrong input fails before anything is written
        if self.output is None:
            return
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"{self.output}: is a file; name a folder for the results with -o")
        try:
            self.output.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(self.output, error) from None
        for name in names:
            require_writable(self.path(name))
        lock_output(self.output, folder=True)

    @contextmanager
    def evaluator(
        self, *, model: Path | None = None, kept: str | None = RECORDS, shorter: str | None = None
    ) -> Iterator[Evaluator]:
        """The evaluator on the model (or on another `model` for the same task), with a progress bar.

        With `shorter`, the options that make the work shorter, stderr is told beforehand how much there is.

        What it measures is kept in the file `kept` of the output folder: written when the block ends, and left to go on
        from with --resume when it fails or is interrupted, which is said on stderr. Raises UsageError (a run that was
        interrupted is there; a prompt that does not fit), ResourceError (no memory for it), ModelError, FormatError.
        """
        from ...evaluation.measuring.evaluator import plan
        from ...evaluation.measuring.opening import open_evaluator
        from ...generation.answer_file import AnswerFile

        path = model or self.model
        facts = model_info(path) if model else self.facts
        if model in (None, self.model):
            warn_of_unknown_reasoning(facts)
        records: AnswerFile | None = None
        if kept is not None and self.output is not None:
            self.check_output(kept)
            records = AnswerFile(self.path(kept))
            check_unfinished(records, self.resume, self.restart)  # the folder is locked: this stays true
        benign, neutral = self.guards
        settings = self.settings
        n_ctx = plan(path, self.task, self.scorer, benign=benign, neutral=neutral, settings=settings)
        flags = check_memory(facts, self.flags, n_ctx, max(2, settings.n_parallel))
        announcer = Announcer(shorter or "")

        def announce(work: Work) -> None:
            announcer.announce(work.what, work, at_most=work.at_most)

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
                metadata=self._metadata(facts),
                progress=announcer.timed(show),
                on_work=None if shorter is None else announce,
                **flags.model_arguments(),
            ) as evaluator,
        ):
            try:
                yield evaluator
            except BaseException:
                if records and records.n_kept:
                    n = records.n_kept
                    say(f"{n} results are kept in {records.path}; go on with the same command and --resume")
                raise

    @cached_property
    def _own_task(self) -> str | None:
        """The task of the shipped or learnt map that steers. Raises UsageError for a map that there is not."""
        from ...evaluation.measuring.opening import task_of

        name = self.steering_flags.map_name
        return None if name is None else task_of(map_path(name))


def _setup(**values: Any) -> EvaluationSetup:
    values.setdefault("benign_name", NONE)  # a command without --benign has no such prompts
    return EvaluationSetup(**values, command=command_line())


_HEADINGS = {
    "": MEASUREMENT,
    **dict.fromkeys(("max_tokens", "temperature", "top_k", "top_p", "min_p", "seeds"), SAMPLING),
    **dict.fromkeys(("parallel", "ctx_size"), MODEL),
    **dict.fromkeys(("output", "resume", "restart"), OUTPUT),
}
_COMMON = ("task_name", "scorer_name", "max_tokens", "n_items", "where", "output", "resume", "restart")
_ALL = together(
    model_option,
    steering_options,
    option_group(
        _setup,
        "setup",
        (*field_options(EvaluationSetup), template_options, llama_options, json_option),
        takes=("model", "steering_flags", "flags"),
        heading=_HEADINGS,
        common=_COMMON,
    ),
)


@overload
def evaluation_options(command: F, *, without: tuple[str, ...] = ()) -> F: ...
@overload
def evaluation_options(command: None = None, *, without: tuple[str, ...] = ()) -> Callable[[F], F]: ...
def evaluation_options(command: F | None = None, *, without: tuple[str, ...] = ()) -> Any:
    """All options of a measurement; the command gets them as one argument, `setup` (EvaluationSetup).

    `without` names parameters (as in EvaluationSetup or SteeringFlags: "activate", "layers", "output", ...) that the
    command does not have; the setup holds their defaults. A command that has such an option in a form of its own must
    give its parameter another name: @click.option("--activate", "activate_counts", ...).
    """
    if command is None:
        return lambda wanted: evaluation_options(wanted, without=without)
    wrapped: Any = _ALL(command)
    wrapped.__click_params__ = [p for p in wrapped.__click_params__ if p.name not in without]
    return cast(F, wrapped)
