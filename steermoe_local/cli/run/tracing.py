"""The work of `steermoe trace`: texts of prompts, answers and pairs, read once under the steering, and their trace."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._util.files import human_duration, human_size
from ...detection.decoding import ContextOptions
from ...detection.trace_files import TraceShape, bytes_of_tokens, require_room, trace_file
from ...detection.tracing import SideName, TracedText, TraceReader, phases_of, prompt_rules, rules_of
from ...errors import ModelError, PairsError, UsageError
from ...generation.answering import answers
from ...generation.reply import Reply
from ...llama.rendering import Prompt, RenderedPrompt, Renderer, vocabulary_renderer
from ...llama.tokenizing import token_bytes
from ...pairs.pairs import SIDES, Pair, PairsFile
from ...pairs.prompts import PromptItem
from ...steering.bias_plan import BiasPlan
from ..options.opening import open_model, warn_of_unknown_reasoning
from ..output import SummedLines, progress_bar, say, warn
from .batch import said
from .setup import STEERED, RunFlags, Steered

if TYPE_CHECKING:
    from ...generation.engine import Engine

_COUNTED = 1000  # pairs that are rendered beforehand, to say how much will be written; the rest is as long on average
_AHEAD = 8  # prompts that are answered for each slot before their answers are traced
_OF_PROMPT = {None, "prompt"}
_SAID = 10.0  # seconds from which on it is said how long a trace takes


@dataclass(frozen=True)
class TraceJob:
    """What is traced, and where it is written. `n_predict` None: no answers; -1: to the end of each."""

    source: PairsFile | Sequence[PromptItem]
    name: str  # of the source, for messages
    output: Path
    logits: bool
    n_predict: int | None
    parallel: int

    @property
    def n_texts(self) -> int:
        """Prompts, or sides of pairs."""
        return len(self.source) * (len(SIDES) if isinstance(self.source, PairsFile) else 1)


@dataclass
class _Measure:
    """How many tokens the texts have, their answers not counted; of a file of many pairs about."""

    n_tokens: int = 0
    longest: int = 0
    n_texts: int = 0

    def add(self, n: int) -> None:
        self.n_tokens += n
        self.longest = max(self.longest, n)
        self.n_texts += 1


@dataclass
class Tracing:
    """One run of `steermoe trace`. `run` does it; the rest says what it did."""

    flags: RunFlags
    job: TraceJob
    n_texts: int = 0
    n_tokens: int = 0
    n_answered: int = 0  # tokens of answers
    n_skipped: int = 0
    n_cut: int = 0  # answers that the context cut off
    seconds: float = 0.0
    date: str | None = None
    steered: Steered = field(init=False)

    def run(self) -> None:
        """Read the headers, render, load the model, trace.

        Raises what the options ask for wrongly (UsageError), ModelError, PairsError (no pair that can be traced),
        StorageError, NativeError.
        """
        self.steered = Steered(self.flags)
        identity = self.steered.facts.require_moe()
        if not isinstance(self.job.source, PairsFile):
            self.steered.warn_without_template()
        if isinstance(self.steered.bias, BiasPlan) and not self._answers:
            self._warn_of(self.steered.bias)
        shape = TraceShape(identity, self.job.logits)
        measure = self._measured()
        n_ctx = self._context(measure.longest)
        self._announce(shape, measure, n_ctx)
        flags = self.flags.flags
        n_sequences = self.job.parallel if self._answers else 0
        in_context = max(n_ctx, flags.batch_size)
        with (
            open_model(self.steered.facts, flags, in_context, n_sequences + 1, path=self.flags.model) as llama,
            self._engine(llama, n_ctx) as engine,
        ):
            if self.steered.chats and engine is not None:
                warn_of_unknown_reasoning(self.steered.facts)
            renderer = self._configured(Renderer(llama._model))
            self.date = renderer.date
            pieces = functools.cache(functools.partial(token_bytes, llama._model.vocab, special=True))
            reader = TraceReader(
                llama._model,
                self.steered.bias,
                ContextOptions(**flags.context_arguments()),
                logits=self.job.logits,
                force=self.flags.steering_flags.force,
            )
            with reader:
                self.steered.check(reader.identity)
                self._trace(reader, _Texts(self, renderer, pieces), engine, pieces)

    def _trace(
        self,
        reader: TraceReader,
        texts: _Texts,
        engine: Engine | None,
        pieces: Callable[[int], bytes],
    ) -> None:
        """Read the texts and write the trace."""
        found = texts.of_pairs() if isinstance(self.job.source, PairsFile) else texts.of_prompts(engine)
        shape = TraceShape(reader.identity, self.job.logits)  # with the hash of the routers
        file = trace_file(self.job.output, shape, lambda token: _text(pieces(token)), self._about())
        with file as writer, progress_bar() as show:
            start, told = time.monotonic(), False
            for tokens in reader.read(found):
                writer.add(tokens)
                self.n_texts, self.n_tokens = writer.n_texts, writer.n_tokens
                self.seconds = time.monotonic() - start
                show("trace", self.n_texts + self.n_skipped, self.job.n_texts)
                if not told and self.seconds > 1 and reader.n_read:
                    told = True
                    self._say_time(reader.n_read)
            if not self.n_texts:
                raise PairsError(f"{self.job.name}: no pair could be traced; see why each was skipped")

    def _warn_of(self, plan: BiasPlan) -> None:
        """Warn of rules that mean nothing for texts that are only read."""
        if not {rule.where.phase for rule in plan.rules} & _OF_PROMPT:
            # a condition needs routing, or a token that was drawn: none holds at the prompt's last token
            drawn = any(
                rule.bias is not None and rule.where.when is None and rule.where.after is None and not rule.where.start
                for rule in plan.rules
            )
            is_last = drawn and not isinstance(self.job.source, PairsFile)
            last = " but its last token, which draws the answer's first" if is_last else ""
            warn(f"what is read is a prompt, and no rule of the plan is of it: nothing is steered{last}")
        if any(rule.where.when is not None for rule in plan.rules):
            warn("conditions hold nowhere in a prompt that is only read; -n has it answered under them")

    @property
    def _answers(self) -> bool:
        """Whether prompts are answered."""
        return bool(self.job.n_predict) and not isinstance(self.job.source, PairsFile)

    #
    # beforehand
    #

    def _configured(self, renderer: Renderer) -> Renderer:
        flags = self.flags
        return renderer.configured(
            thinking=flags.thinking, template_arguments=flags.template_arguments, date=flags.date
        )

    def _measured(self) -> _Measure:
        """Render by the vocabulary alone: what cannot be used fails before the model is loaded."""
        measure = _Measure()
        with vocabulary_renderer(self.flags.model, verbose=self.flags.flags.verbose) as plain:
            renderer = self._configured(plain)
            if isinstance(self.job.source, PairsFile):
                if renderer.has_template and not isinstance(next(iter(self.job.source)).positive, str):
                    renderer.check_template()
                for pair in itertools.islice(self.job.source, _COUNTED):
                    with contextlib.suppress(PairsError):  # it is skipped, and said why, later
                        for prompt in _pair_prompts(renderer, pair, self.flags.ctx_size or 0):
                            measure.add(len(prompt.tokens))
                if measure.n_texts:
                    n_counted = min(_COUNTED, len(self.job.source))
                    measure.n_tokens = measure.n_tokens * len(self.job.source) // n_counted
                return measure
            for item in self.job.source:
                measure.add(len(self.rendered(renderer, item).tokens))
        return measure

    def rendered(self, renderer: Renderer, item: PromptItem) -> RenderedPrompt:
        """A prompt as the model reads it. Raises UsageError and ModelError, which name the line."""
        where = f"{self.job.name}:{item.line}: " if item.line else ""
        try:
            found = renderer.render(said(item, self.steered))
        except (UsageError, ModelError) as error:
            raise type(error)(f"{where}{error}") from None
        if not found.tokens:
            raise UsageError(f"{where}the prompt has no tokens; give a longer one")
        n_ctx = self.flags.ctx_size
        if n_ctx and len(found.tokens) > n_ctx:
            raise UsageError(f"{where}a prompt of {len(found.tokens)} tokens, but the context has {n_ctx}; raise -c")
        return found

    def _context(self, longest: int) -> int:
        """Tokens of context of a prompt and its answer."""
        if not self._answers:
            return max(longest, 1)
        n_ctx = self.flags.context(self.steered.facts, longest)
        if longest >= n_ctx:
            raise UsageError(f"{self.job.name}: a prompt of {longest} tokens, but the context has {n_ctx}; raise -c")
        return n_ctx

    def _announce(self, shape: TraceShape, measure: _Measure, n_ctx: int) -> None:
        """Say how much will be written, and refuse what there is no room for."""
        n_tokens, most = measure.n_tokens, ""
        require_room(self.job.output, shape, n_tokens)
        if self._answers:
            answer = n_ctx - 1 if self.flags.n_predict is None else min(self.flags.n_predict, n_ctx - 1)
            n_tokens += measure.n_texts * answer
            most = "at most "
        about = most or ("" if measure.n_texts >= self.job.n_texts else "about ")
        n_bytes = bytes_of_tokens(self.job.output, shape, n_tokens)
        size = human_size(n_bytes) if n_bytes >= 1e5 else f"{n_bytes:,} bytes"
        shorter = "shorter with -n N, or fewer prompts" if self._answers else "shorter with fewer texts"
        say(f"{self.job.output}: {about}{_tokens(n_tokens, self.job.n_texts)}, {about}{size} ({shorter})")

    def _say_time(self, n_read: int) -> None:
        n_left = self.job.n_texts - n_read - self.n_skipped
        left = self.seconds / n_read * n_left
        if left > _SAID:
            say(f"trace: about {human_duration(left)} for the other {n_left:,} texts")

    def _about(self) -> dict[str, Any]:
        pairs = self.job.source if isinstance(self.job.source, PairsFile) else None
        return {
            "source": self.job.name,
            **({"pairs_sha256": pairs.digest} if pairs is not None else {}),
            "steering": self.steered.describe(),
            **({"date": self.date} if self.date else {}),
        }

    #
    # answers
    #

    @contextlib.contextmanager
    def _engine(self, llama: Any, n_ctx: int) -> Iterator[Engine | None]:
        """What answers the prompts, if they are answered."""
        if not self._answers:
            yield None
            return
        from ...generation.engine import Engine

        context = self.flags.flags.context_arguments()
        context["n_batch"] = max(context["n_batch"], self.job.parallel)
        record = bool(getattr(self.steered.bias, "needs_routing", False))
        with Engine(
            llama,
            n_ctx=n_ctx,
            n_slots=self.job.parallel,
            record=record,
            force=self.flags.steering_flags.force,
            **context,
        ) as engine:
            yield engine

    def summary(self) -> str:
        """One line for people."""
        rate = f", {self.n_tokens / self.seconds:,.0f} tokens/s" if self.seconds else ""
        skipped = f", {self.n_skipped} pairs skipped" if self.n_skipped else ""
        return f"{_tokens(self.n_tokens, self.n_texts)}{skipped}{rate}"

    def figures(self) -> dict[str, Any]:
        """For --json."""
        return {
            "output": str(self.job.output),
            "bytes": self.job.output.stat().st_size,
            "n_texts": self.n_texts,
            "n_tokens": self.n_tokens,
            "n_answered": self.n_answered,
            "n_skipped": self.n_skipped,
            "logits": self.job.logits,
            "model": str(self.flags.model),
            "steering": self.steered.describe(),
            **({"date": self.date} if self.date else {}),
            "seconds": round(self.seconds, 3),
        }


class _Texts:
    """Makes the texts that are traced."""

    def __init__(self, tracing: Tracing, renderer: Renderer, pieces: Callable[[int], bytes]) -> None:
        self._tracing, self._renderer, self._pieces = tracing, renderer, pieces
        self._bias = tracing.steered.bias

    def of_pairs(self) -> Iterator[TracedText]:
        """The sides of pairs, up to the end of their targets. All of such a text is a prompt."""
        skipped = SummedLines(say)
        tracing = self._tracing
        assert isinstance(tracing.job.source, PairsFile)
        for index, pair in enumerate(tracing.job.source):
            try:
                prompts = _pair_prompts(self._renderer, pair, tracing.flags.ctx_size or 0)
            except PairsError as error:
                reason = str(error).lstrip(", :")
                skipped.add(f"skipped: pair {pair.id!r}: {reason}", f"skipped: {reason}")
                tracing.n_skipped += 1
                continue
            for side, prompt in zip(SIDES, prompts, strict=True):
                yield self._text(index, pair.id, prompt.tokens, side=side, target=prompt.target)  # type: ignore[arg-type]
        skipped.close()

    def of_prompts(self, engine: Engine | None) -> Iterator[TracedText]:
        """The prompts; with an engine, with their answers."""
        items = self._tracing.job.source
        assert not isinstance(items, PairsFile)
        prompts = (self._tracing.rendered(self._renderer, item) for item in items)
        if engine is None:
            for index, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
                yield self._text(index, str(item.id), prompt.tokens, prompt=prompt)
            return
        for start in range(0, len(items), n := _AHEAD * self._tracing.job.parallel):
            some = items[start : start + n]
            asked = list(itertools.islice(prompts, len(some)))
            for index, (prompt, reply) in enumerate(zip(asked, self._replies(engine, asked), strict=True)):
                yield self._text(start + index, str(some[index].id), prompt.tokens, prompt=prompt, reply=reply)

    def _replies(self, engine: Engine, prompts: Sequence[RenderedPrompt]) -> list[Reply]:
        """The answers to some prompts, in their order."""
        flags = self._tracing.flags
        events = answers(
            engine,
            prompts,
            {STEERED: self._bias},
            sampling=flags.sampling,
            max_tokens=flags.n_predict,
            stop=flags.stop,
        )
        replies = {index: what for index, _, what in events if isinstance(what, Reply)}
        for reply in replies.values():
            self._tracing.n_answered += len(reply.tokens)
            self._tracing.n_cut += reply.finish is not None and reply.finish.reason == "context"
        return [replies[index] for index in range(len(prompts))]

    def _text(
        self,
        item: int,
        name: str,
        tokens: Sequence[int],
        *,
        side: SideName = "",
        target: Iterable[int] = (),
        prompt: RenderedPrompt | None = None,
        reply: Reply | None = None,
    ) -> TracedText:
        """`reply` to a prompt; `side` of a pair, which is not replied to."""
        style = None if prompt is None else prompt.style
        rules = prompt_rules(self._bias, tokens, style, self._pieces, answered=not side)
        answer: list[int] = []
        if reply is not None and reply.finish is not None:
            # the last token is read if another one was drawn behind it, which ended the answer
            drawn_under = [*reply.rules, *([reply.finish.end.rule] if reply.finish.end is not None else [])]
            answer = reply.tokens[: reply.finish.n_rows - 1]
            rules = rules_of([*rules.tolist()[:-1], *drawn_under[: len(answer) + 1]])
        phases = phases_of(len(tokens), answer, style, self._pieces)
        return TracedText(item, name, [*tokens, *answer], phases, rules, side, list(target))


def _pair_prompts(renderer: Renderer, pair: Pair, n_ctx: int) -> list[Prompt]:
    """Both sides of a pair. Raises PairsError for one that cannot be traced."""
    prompts = []
    for name, (side, target) in zip(SIDES, pair.sides(), strict=True):
        try:
            prompts.append(renderer.prompt(side, target))
        except PairsError as error:
            raise PairsError(f"{name}: {error}") from None
        if n_ctx and len(prompts[-1].tokens) > n_ctx:
            n = len(prompts[-1].tokens)
            raise PairsError(f"{name}: needs {n} tokens of context, but n_ctx is {n_ctx}; raise it (-c {n})")
    return prompts


def _tokens(n_tokens: int, n_texts: int) -> str:
    return f"{n_tokens:,} tokens of {n_texts:,} text{'' if n_texts == 1 else 's'}"


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
