"""`steermoe run` with one prompt: the answer as it comes, or as JSON."""

from __future__ import annotations

import sys
from typing import Any

from ..._util.visible import HarmlessStream, visible
from ...generation.answering import Event, answers
from ...generation.reply import Reply
from ...pairs.pairs import Message
from ..output import print_json, say, warn
from ..streams import put
from .setup import STEERED, UNSTEERED, RunFlags, Steered


def run_one(flags: RunFlags, prompt: str, as_json: bool) -> None:
    """Answer one prompt."""
    steered = Steered(flags)
    steered.warn_without_template()
    said: Any = prompt
    if steered.chats:
        system = [Message("system", flags.system_prompt)] if flags.system_prompt else []
        said = (*system, Message("user", prompt))
    replies: dict[str, Reply] = {}
    printer: _Printer | None = None
    with steered.load(steered.flags.context(steered.facts)) as engine:
        renderer = engine.renderer.configured(
            thinking=flags.thinking, template_arguments=flags.template_arguments, date=flags.date
        )
        events = answers(
            engine,
            [renderer.render(said)],
            steered.sides,
            sampling=flags.sampling,
            max_tokens=flags.n_predict,
            stop=flags.stop,
        )
        try:
            for event in events:
                if not as_json:
                    printer = printer or _Printer(steered)  # not before: an error leaves stdout empty
                    printer.take(event)
                if isinstance(event[2], Reply):
                    replies[event[1]] = event[2]
        except KeyboardInterrupt:
            if printer:
                printer.break_off()
            raise
    if as_json:
        print_json(_result(replies, steered) | ({"date": renderer.date} if steered.chats and renderer.date else {}))
    _notes(replies, steered, engine.n_ctx)


def _result(replies: dict[str, Reply], steered: Steered) -> dict[str, Any]:
    whole = {side: reply.to_dict() | {"timings": reply.timings()} for side, reply in replies.items()}
    steering = steered.of_answer(steered.describe(), replies[STEERED])
    facts = {"model": str(steered.flags.model), "steering": steering}
    if steered.flags.compare:
        return {**{side: whole[side] for side in (UNSTEERED, STEERED)}, **facts}
    return {**whole[STEERED], **facts}


def _notes(replies: dict[str, Reply], steered: Steered, n_ctx: int) -> None:
    """Print on stderr why an answer was cut off, if not by -n, and the timings."""
    for side, reply in replies.items():
        name = f"{side}: " if steered.flags.compare else ""
        reason = reply.finish.reason if reply.finish else ""
        if reason == "context":
            warn(f"{name}the context of {n_ctx} tokens is full; raise -c")
        elif reason == "length" and reply.reasoning and not reply.text:
            warn(f"{name}-n ended the answer while the model was thinking; raise it")
        if steered.flags.show_timings:
            say(f"{name}{_timings(reply)}")


def _timings(reply: Reply) -> str:
    finish, facts = reply.finish, reply.timings()
    assert finish is not None
    rates = [facts["prompt_per_second"], facts["generation_per_second"]]
    prompt, generation = ("" if rate is None else f" ({rate:.1f} tokens/s)" for rate in rates)
    return (
        f"prompt {finish.n_prompt} tokens in {finish.prompt_seconds:.2f} s{prompt}, "
        f"answer {finish.n_generated} tokens in {finish.seconds:.2f} s{generation}, seed {finish.seed}"
    )


class _Printer:
    """Prints answers while they are generated; of two sides, the second after the first."""

    def __init__(self, steered: Steered) -> None:
        self._terminal = sys.stdout.isatty()
        self._reasoning = {"auto": self._terminal, "show": True, "hide": False}[steered.flags.reasoning]
        self._headings: dict[str, str] = {}
        if steered.flags.compare and steered.steering is not None:
            self._headings = {UNSTEERED: "== unsteered", STEERED: f"== steered: {steered.title}"}
        self._order = list(steered.sides)
        self._held: list[Event] = []
        self._shown: set[str] = set()  # kinds of the present side
        self._filter = HarmlessStream()

        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
        self._begin()

    def take(self, event: Event) -> None:
        """Print an event, or keep it until its side's turn comes."""
        if event[1] != self._order[0]:
            self._held.append(event)
            return
        self._print(event)
        while isinstance(event[2], Reply) and len(self._order) > 1:
            del self._order[0]
            self._begin()
            held, self._held = self._held, []
            for event in held:
                self._print(event)

    def break_off(self) -> None:
        """End the line on a terminal, where messages come next."""
        if self._terminal and self._shown:
            put(self._filter.end())

    def _begin(self) -> None:
        self._shown = set()
        if heading := self._headings.get(self._order[0]):
            first = self._order[0] == UNSTEERED
            put("" if first else "\n", end="")
            put(visible(heading), dim=True)

    def _print(self, event: Event) -> None:
        what = event[2]
        if isinstance(what, Reply):
            put(self._filter.end())
            return
        kind, text = what
        if kind == "reasoning" and not self._reasoning:
            return
        if kind == "answer" and self._shown == {"reasoning"}:
            put(self._filter.end() + "\n")
        self._shown.add(kind)
        put(self._filter.feed(text) if self._terminal else text, end="", dim=kind == "reasoning")
