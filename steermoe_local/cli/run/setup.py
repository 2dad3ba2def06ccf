"""The flags of `steermoe run`, and the model and steering that they name, for one prompt and for many."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...identity import ModelIdentity
from ...model_files.model_info import ModelInfo, model_info
from ...steering.bias_file import BiasFile, none_if_empty
from ...steering.bias_plan import AnyBias, BiasPlan
from ...steering.plan import AnySteering, SteeringPlan
from ...steering.steering import Steering
from ..options.common import check_resume
from ..options.llama import LlamaFlags
from ..options.opening import context_size, open_engine, warn_of_unknown_reasoning
from ..options.steering import SteeringFlags
from ..output import warn

if TYPE_CHECKING:
    from ...generation.engine import Engine, Sampling
    from ...generation.reply import Reply

DEFAULT_PARALLEL = 4  # answers at once of `run --n-prompts` and `trace`
UNSTEERED, STEERED = "unsteered", "steered"


@dataclass(frozen=True)
class RunFlags:
    """The options of `steermoe run` that hold for one prompt and for many."""

    model: Path
    system_prompt: str | None
    steering_flags: SteeringFlags
    compare: bool
    sampling: Sampling
    n_predict: int | None
    stop: tuple[str, ...]
    ctx_size: int | None
    raw: bool
    thinking: bool
    template_arguments: Mapping[str, Any] | None
    date: datetime.date | None
    reasoning: str
    show_timings: bool
    flags: LlamaFlags

    def __post_init__(self) -> None:
        """Raise UsageError for options that exclude each other."""
        if self.compare and not self.steering_flags.wanted:
            raise UsageError("--compare needs a steering; give --map MAP, --bias FILE or --steer RULE")
        if not self.raw:
            return
        if self.system_prompt:
            raise UsageError("--raw has no system message; put it into the prompt")
        if self.thinking or self.template_arguments:
            raise UsageError("--raw uses no chat template; leave out --thinking and --chat-template-kwargs")

    def context(self, facts: ModelInfo, longest: int | None = None) -> int:
        """Tokens of context: -c, or what a prompt of `longest` tokens needs, at most DEFAULT_CONTEXT."""
        size = context_size(facts, self.ctx_size)
        if self.ctx_size is not None or longest is None or self.n_predict is None:
            return size
        return min(size, longest + self.n_predict)


@dataclass(frozen=True)
class BatchFlags:
    """The options that go with --n-prompts."""

    prompts_file: Path | None
    output: Path | None
    resume: bool
    restart: bool
    parallel: int | None

    def __post_init__(self) -> None:
        """Raise UsageError for options that exclude each other."""
        check_resume(self.resume, self.restart)
        if (self.resume or self.restart) and self.output is None:
            raise UsageError("--resume and --restart are about an output file; name it with -o OUTPUT")


class Steered:
    """A model whose header was read, and its steering; `load` loads the model."""

    def __init__(self, flags: RunFlags) -> None:
        """Read the headers of model and bias, or the map. Raises ModelError, FormatError, ModelMismatchError."""
        self.flags = flags
        # the routers are hashed to check a map; a bias file is checked when the model is loaded
        maps = bool({"map", "steer", "plan"} & flags.steering_flags.source.keys())
        self.facts = model_info(flags.model, routers=maps)
        identity: ModelIdentity | None = self.facts.require_moe() if maps else None
        self.steering: AnySteering | None = flags.steering_flags.open(identity, flags.model)
        self._file: BiasFile | None = None
        self.bias: AnyBias | None
        if isinstance(self.steering, SteeringPlan):
            self.bias = self.steering.build(identity)
        else:
            self._file = self.steering.bias_file(identity) if self.steering is not None else None
            self.bias = none_if_empty(self._file)
        if not flags.raw and not self.facts.chat_template and flags.system_prompt:
            raise UsageError(f"{flags.model}: no chat template, so no system message; put it into the prompt")

    @property
    def sides(self) -> dict[str, AnyBias | None]:
        """The biases to answer under, by name."""
        return {UNSTEERED: None, STEERED: self.bias} if self.flags.compare else {STEERED: self.bias}

    @property
    def title(self) -> str:
        """What steers, in a few words: a name, or the rules of the command line."""
        steering = self.steering
        if isinstance(steering, SteeringPlan) and steering.path is None:
            return "; ".join(steering.texts)
        return steering.name if steering is not None else ""

    @property
    def chats(self) -> bool:
        """Whether prompts go through a chat template."""
        return not self.flags.raw and bool(self.facts.chat_template)

    def warn_without_template(self) -> None:
        """Warn that a prompt is continued although --raw was not given."""
        if not self.flags.raw and not self.chats:
            warn(f"{self.flags.model}: no chat template, so the prompt is continued as it is (--raw)")

    def describe(self) -> dict[str, Any] | None:
        """The steering for --json: name, file, rule, numbers of experts, and the provenance of the bias.

        Of a plan what `SteeringPlan.to_dict` says.
        """
        if isinstance(self.steering, SteeringPlan):
            return self.steering.to_dict()
        if self.steering is None or self._file is None:
            return None
        return {
            "name": self.steering.name,
            **self.flags.steering_flags.source,
            "mode": self._file.mode,
            "n_active": self._file.n_active,
            "n_inactive": self._file.n_inactive,
            **self._file.provenance,
        }

    def of_answer(self, facts: dict[str, Any] | None, reply: Reply) -> dict[str, Any] | None:
        """The facts about the steering with what is of one answer alone: how many of its tokens a plan steered."""
        if facts is None or reply.finish is None or not isinstance(self.steering, SteeringPlan):
            return facts
        return {**facts, "n_steered": reply.finish.n_steered}

    @contextmanager
    def load(self, n_ctx: int, n_parallel: int = 1) -> Iterator[Engine]:
        """An engine on the loaded model, with `n_parallel` slots for each side.

        Raises ResourceError (no memory for it), ModelError, ModelMismatchError (bias of another model), NativeError.
        """
        if self.chats:
            warn_of_unknown_reasoning(self.facts)
        n_slots = n_parallel * len(self.sides)
        force = self.flags.steering_flags.force
        record = isinstance(self.bias, BiasPlan) and self.bias.needs_routing
        with open_engine(
            self.facts, self.flags.flags, n_ctx, n_slots, path=self.flags.model, record=record, force=force
        ) as engine:
            self.check(engine.identity)
            yield engine

    def check(self, identity: ModelIdentity | None) -> None:
        """Warn of a bias file that another model was meant for; a map was checked before. Raises ModelMismatchError."""
        if isinstance(self.steering, Steering) and self.steering.bias is not None and identity is not None:
            warn(*self.steering.check(identity, str(self.flags.model), self.flags.steering_flags.force))
