"""`steermoe run --n-prompts`: many prompts, one line of JSON each."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..._util.visible import visible_json
from ...errors import ModelError, UsageError
from ...generation.answer_file import AnswerFile, json_line
from ...generation.answering import answers
from ...generation.reply import Reply
from ...llama.rendering import RenderedPrompt, vocabulary_renderer
from ...llama.template_date import may_lack
from ...pairs.prompts import PromptItem, load_prompts, prompts_digest, read_prompts
from ...steering.plan import SteeringPlan
from ..options.announcing import Announcer
from ..options.common import check_unfinished
from ..output import print_json, progress_bar, say, say_written
from .setup import DEFAULT_PARALLEL, STEERED, BatchFlags, RunFlags, Steered

Record = dict[str, Any]


def run_batch(flags: RunFlags, batch: BatchFlags, as_json: bool) -> None:
    """Answer all prompts of a file: onto stdout in their order, or into a file that keeps what is done."""
    assert batch.prompts_file is not None
    kept = AnswerFile(batch.output) if batch.output else None
    with kept or contextlib.nullcontext():  # of the file: nobody else writes it, or reads what is kept, meanwhile
        if kept:
            check_unfinished(kept, batch.resume, batch.restart)
        name, items = read_items(batch.prompts_file)
        steered = Steered(flags)
        steered.warn_without_template()
        prompts, date = _prepared(name, items, steered)
        n_ctx = flags.context(steered.facts, max(len(prompt.tokens) for prompt in prompts))
        for item, prompt in zip(items, prompts, strict=True):
            if (n := len(prompt.tokens)) >= n_ctx:
                raise UsageError(f"{name}:{item.line}: a prompt of {n} tokens, but the context has {n_ctx}; raise -c")
        done: set[str] = set()
        if kept:
            settings = _settings(steered, items, n_ctx) | ({"date": date} if date else {})
            if batch.resume and kept.exists():
                done = kept.resume(settings, may_lack=may_lack(flags.date is not None))
            else:
                kept.start(settings)
        left = [index for index, item in enumerate(items) if str(item.id) not in done]
        run = _Batch(steered, [items[i] for i in left], [prompts[i] for i in left], n_ctx)
        write = kept.add if kept else _to_stdout()
        try:
            # not between answers that are printed to a terminal
            with progress_bar(hidden=kept is None and sys.stdout.isatty()) as bar:
                announcer = Announcer("-n N, or fewer prompts")
                longest = n_ctx if flags.n_predict is None else flags.n_predict
                n_answers = len(left) * (2 if flags.compare else 1)
                show = announcer.timed(bar)

                def begin() -> None:
                    answers, tokens = "answer" + "s" * (n_answers != 1), "token" + "s" * (longest != 1)
                    announcer.announce("run", f"{n_answers:,} {answers} of at most {longest:,} {tokens}")
                    show("run", len(done), len(items))

                show("run", len(done), len(items))
                n_parallel = min(batch.parallel or DEFAULT_PARALLEL, len(left))
                for record in run.records(n_parallel, ordered=kept is None, begin=begin):
                    write(record)
                    show("run", len(done) + run.n_done, len(items))
        except KeyboardInterrupt:
            if kept and kept.n_kept:
                say(f"{kept.n_kept} of {len(items)} answers are kept; go on with the same command and --resume")
            raise
        if kept:
            kept.finish(item.id for item in items)
    if batch.output and as_json:
        facts = {"output": str(batch.output), "n_prompts": len(items), **({"date": date} if date else {})}
        print_json(facts | run.figures())
    elif batch.output:
        say_written(batch.output, before=f"{run.summary()}\n")
    elif flags.show_timings:
        say(run.summary())


def read_items(path: Path) -> tuple[str, list[PromptItem]]:
    """The prompts, and the name of their file for messages."""
    if str(path) == "-":
        if sys.stdin is None:
            raise UsageError("stdin is closed; give the prompts in a file")
        return "stdin", read_prompts(sys.stdin.buffer, "stdin")
    return str(path), load_prompts(path)


def _prepared(name: str, items: Sequence[PromptItem], steered: Steered) -> tuple[list[RenderedPrompt], str | None]:
    """Tokens of all prompts, and the date that the template prints, if it prints one.

    They are made by the vocabulary alone: prompts that cannot be used fail before the model is loaded.

    Raises UsageError and ModelError, which name the line.
    """
    flags = steered.flags
    prepared = []
    with vocabulary_renderer(
        flags.model,
        thinking=flags.thinking,
        template_arguments=flags.template_arguments,
        date=flags.date,
        verbose=flags.flags.verbose,
    ) as renderer:
        for item in items:
            try:
                prepared.append(renderer.render(said(item, steered)))
            except (UsageError, ModelError) as error:
                raise type(error)(f"{name}:{item.line}: {error}") from None
        return prepared, renderer.date if steered.chats else None


def said(item: PromptItem, steered: Steered) -> Any:
    """What `Renderer.render` takes for a prompt. Raises UsageError for a conversation without a chat template."""
    if steered.chats:
        return item.messages(steered.flags.system_prompt or "")
    why = "--raw uses" if steered.flags.raw else f"{steered.flags.model} has"
    if item.system or not isinstance(item.content, str):
        field = "system" if item.system else "messages"
        raise UsageError(f"{field}: {why} no chat template; write it all into prompt")
    return item.content


def _settings(steered: Steered, items: Sequence[PromptItem], n_ctx: int) -> dict[str, Any]:
    """What must be the same to go on with an interrupted run."""
    flags, facts = steered.flags, steered.facts
    return {
        "prompts": prompts_digest(items),
        "model": {name: getattr(facts, name) for name in ("architecture", "name", "file_type", "size_bytes")},
        "steering": steered.describe(),
        "compare": flags.compare,
        "sampling": dataclasses.asdict(flags.sampling),
        "n_predict": flags.n_predict,
        "stop": list(flags.stop),
        "system": flags.system_prompt,
        "raw": flags.raw,
        "thinking": flags.thinking,
        "template_arguments": dict(flags.template_arguments or {}),
        "n_ctx": n_ctx,
    }


def _to_stdout() -> Callable[[Record], None]:
    """A function that writes records to the real stdout, which a progress bar replaces while it runs."""
    stdout, terminal = sys.stdout.buffer, sys.stdout.isatty()

    def write(record: Record) -> None:
        line = json_line(record)
        stdout.write((visible_json(line) if terminal else line).encode("utf-8"))
        stdout.flush()

    return write


class _Batch:
    """Some prompts, answered."""

    def __init__(
        self, steered: Steered, items: Sequence[PromptItem], prompts: Sequence[RenderedPrompt], n_ctx: int
    ) -> None:
        self._steered, self._items, self._prompts, self._n_ctx = steered, items, prompts, n_ctx
        self.n_done = 0
        self._n_tokens = 0
        self._seconds = 0.0
        described = steered.describe() or {}
        if isinstance(steered.steering, SteeringPlan):
            described["rules"] = steered.steering.texts
        short = ("name", "mode", "n_active", "n_inactive", "map_sha256", "plan_sha256", "rules")
        self._steering = {key: described[key] for key in short if key in described} or None

    def records(self, n_parallel: int, ordered: bool, begin: Callable[[], None]) -> Iterator[Record]:
        """The answers, in the order of the prompts or as they are finished.

        `begin` is called when the model is loaded, before the first answer.
        """
        if not self._items:
            return
        flags, sides = self._steered.flags, self._steered.sides
        with self._steered.load(self._n_ctx, n_parallel) as engine:
            begin()
            start = time.monotonic()
            events = answers(
                engine,
                self._prompts,
                sides,
                sampling=flags.sampling,
                max_tokens=flags.n_predict,
                stop=flags.stop,
            )
            done = self._done(events)
            for record in _in_order(done) if ordered else (record for _, record in done):
                self._seconds = time.monotonic() - start
                yield record

    def _done(self, events: Iterable[Any]) -> Iterator[tuple[int, Record]]:
        """(index, record) of each prompt all of whose sides are answered."""
        replies: dict[int, dict[str, Reply]] = {}
        for index, side, what in events:
            if not isinstance(what, Reply):
                continue
            sides = replies.setdefault(index, {})
            sides[side] = what
            self._n_tokens += len(what.tokens)
            if len(sides) == len(self._steered.sides):
                self.n_done += 1
                yield index, self._record(self._items[index], replies.pop(index))

    def _record(self, item: PromptItem, replies: dict[str, Reply]) -> Record:
        head: Record = {"id": item.id, **({"extra": item.extra} if item.extra else {})}
        if self._steered.flags.compare:
            whole: Record = {side: replies[side].to_dict() for side in self._steered.sides}
        else:
            whole = replies[STEERED].to_dict()
        return {**head, **whole, "steering": self._steered.of_answer(self._steering, replies[STEERED])}

    def figures(self) -> dict[str, Any]:
        """For --json: of this process; what was kept of an interrupted one is not in them."""
        return {
            "n_answered": self.n_done,
            "completion_tokens": self._n_tokens,
            "seconds": round(self._seconds, 3),
            "tokens_per_second": round(self._n_tokens / self._seconds, 1) if self._seconds else None,
        }

    def summary(self) -> str:
        facts = self.figures()
        rate = f" ({facts['tokens_per_second']} tokens/s)" if facts["tokens_per_second"] else ""
        return f"{self.n_done} prompts answered, {self._n_tokens} tokens in {self._seconds:.1f} s{rate}"


def _in_order(done: Iterable[tuple[int, Record]]) -> Iterator[Record]:
    """Records by their index, which counts from 0."""
    held: dict[int, Record] = {}
    following = 0
    for index, record in done:
        held[index] = record
        while following in held:
            yield held.pop(following)
            following += 1
