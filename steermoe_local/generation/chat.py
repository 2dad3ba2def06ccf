"""A conversation with a steered model; no terminal in it."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .._util.files import StrPath
from ..errors import SteerMoEError, UsageError
from ..llama.reasoning import Part
from ..llama.reasoning_styles import ReasoningStyle
from ..llama.sampling import RANDOM_SEED
from ..llama.template_date import AnyDate
from ..maps.expert_map import ExpertMap
from ..steering.bias_plan import AnyBias
from ..steering.plan import AnySteering, SteeringPlan
from ..steering.steering import Steering
from .answer_routing import AnswerRouting, Signs, WhyReport, answer_routing, signs_in_force, why
from .chat_file import ChatState, read_chat, with_whole_paths, write_chat
from .engine import Engine, FinishEvent, Request, Sampling
from .reply import Reply
from .slots import key_of

__all__ = ["AnswerRouting", "Chat", "Part", "Side", "WhyReport"]

Side = Literal["unsteered", "steered"]
_Items = Generator[tuple[Side, Part | FinishEvent]]

_ANSWERING = (inspect.GEN_RUNNING, inspect.GEN_SUSPENDED)


@dataclass(frozen=True)
class _Answered:
    """The last answer, for `routing` and `why`; `finish` None: it was stopped."""

    tokens: list[int]  # the prompt's, and the answer's
    n_prompt: int
    finish: FinishEvent | None
    style: ReasoningStyle | None
    bias: AnyBias | None
    signs: Signs | None  # of what was in force at its tokens, None: nothing
    expert_map: ExpertMap | None

    @property
    def rows(self) -> tuple[int, int]:
        """[first, last) of the rows whose logits gave the answer's tokens."""
        first = self.n_prompt - 1
        return first, first + self.finish.n_rows if self.finish else len(self.tokens) - 1


class Chat:
    """A conversation in a reserved slot of an `Engine`, under a steering or plan that can be changed between questions.

    Of what the model has in memory only tokens are used that were computed under the bias which is in force at them
    now. So a change of a steering forgets all of it, and a change between plans what comes behind the first token that
    they steer otherwise. For the next question earlier answers are a part of the prompt: under a plan that steers
    answers alone they are computed again, unsteered, and the prompts before them are not. Without a change only what is
    new is computed; where the template renders earlier turns in another way (their reasoning left out), from the first
    difference on.

    `messages` are the user's and the assistant's in turns, each with `role` and `content`, an assistant's also with
    `reasoning_content` if it reasoned; `system` comes before them. `sampling` and `max_tokens` (of an answer, None: up
    to its end) may be assigned. `last` says how the last answer ended; None: there is none, or it was stopped.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        thinking: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
        date: AnyDate = None,
        steering: AnySteering | None = None,
    ) -> None:
        """Reserve a slot of the engine; with another free one, `compare` and `why` work.

        `thinking` is the chat template's switch for it, `template_arguments` are further variables for the template,
        `date` is for templates that print one (None: that of today, which the whole conversation keeps); `steering` is
        what to begin with.

        Raises ModelError (no chat template, or one that cannot be read), UsageError (all slots taken), and what `steer`
        raises.
        """
        self._engine = engine
        self._template: dict[str, Any] = {"thinking": thinking, "template_arguments": template_arguments}
        self._renderer = engine.renderer.configured(**self._template, date=date)
        self._renderer.require_template()
        self._renderer.check_template()
        self.system = system
        self.sampling = sampling or Sampling()
        self.max_tokens = max_tokens
        self.messages: list[dict[str, str]] = []
        self.last: FinishEvent | None = None
        self._steering: AnySteering | None = None
        self._on = False
        self._answered: _Answered | None = None
        self._running: _Items | None = None
        self._slot = engine.slot()
        try:
            self.steer(steering)
        except BaseException:
            self._slot.close()
            raise

    def close(self) -> None:
        """Give the slot back to the engine."""
        self._slot.close()

    #
    # steering
    #

    @property
    def steering(self) -> AnySteering | None:
        """The choice of steering, or the plan, in force while `steering_on`."""
        return self._steering

    @property
    def steering_on(self) -> bool:
        """Whether the choice is in force."""
        return self._on

    @property
    def steered(self) -> bool:
        """Whether anything can steer the next answer; a choice without experts does not."""
        return self._slot.bias is not None

    @property
    def n_tokens(self) -> int:
        """Tokens in memory; `Engine.n_ctx` fit."""
        return len(self._slot.tokens)

    @property
    def date(self) -> str | None:
        """The date that the chat template may print, as YYYY-MM-DD; None for a template that reads none."""
        return self._renderer.date

    def steer(self, steering: AnySteering | None) -> int:
        """Steer by another choice or plan from the next token on, None for nothing; it is switched on.

        Returns how many tokens were forgotten and will be computed again: those from the first one on that, as a part
        of the next prompt, is now steered otherwise than it was computed; 0 if the routing does not change. On an error
        the old steering stays. Raises ModelMismatchError, ChoiceError, FormatError, UsageError.
        """
        return self._steer(steering, on=steering is not None)

    def switch(self, on: bool) -> int:
        """Put the choice of steering in force or out of it; returns as `steer`. Raises UsageError without a choice."""
        if on and self._steering is None:
            raise UsageError(
                "there is no steering to switch on; choose one first: /steer NAME, or --map, --bias, --steer or --plan"
            )
        return self._steer(self._steering, on)

    def _steer(self, steering: AnySteering | None, on: bool) -> int:
        self._require_idle()
        bias: AnyBias | None = None
        if steering is not None and on:
            if self._engine.identity is not None:
                steering.check(self._engine.identity, "this model", self._engine.force)
            bias = steering.build()
        n_held = len(self._slot.tokens)
        self._slot.steer(bias)
        self._steering, self._on = steering, on
        return n_held - len(self._slot.tokens)

    #
    # conversation
    #

    def set_system(self, system: str | None) -> None:
        """Set the system message, None for none; the conversation stays. Raises UsageError while answering."""
        self._require_idle()
        self.system = system

    def reset(self) -> None:
        """Begin a new conversation with the same system message and steering. Raises UsageError while answering."""
        self._require_idle()
        self.messages, self.last, self._answered = [], None, None

    def ask(self, text: str) -> Generator[Part | FinishEvent]:
        """Ask, and give the answer as it comes; the last item says how it ended.

        When the iterator is closed early, or Ctrl-C comes, what was said stays in the conversation; a question to which
        nothing was said yet is taken back. An error leaves the conversation as it was before the question.

        Raises UsageError (the context is full, another answer is coming, the template refuses), NativeError.
        """
        with closing(self._start(text, self.sampling, ("steered",))) as items:
            for _, item in items:
                yield item

    def compare(self, text: str) -> Generator[tuple[Side, Part | FinishEvent]]:
        """Ask once unsteered and once steered at the same time, with the same seed; the two come interleaved.

        The steered answer goes on as the conversation, as in `ask`; the unsteered one, to the same conversation, is
        computed in another slot and kept nowhere.

        Raises UsageError (nothing steers; the engine has one slot only), and as `ask`.
        """
        if not self.steered:
            raise UsageError("nothing steers, so there is nothing to compare; choose a steering first: /steer NAME")
        self._require_second_slot()
        seed = secrets.randbelow(RANDOM_SEED) if self.sampling.seed is None else self.sampling.seed
        with closing(self._start(text, replace(self.sampling, seed=seed), ("steered", "unsteered"))) as items:
            yield from items

    def _start(self, text: str, sampling: Sampling, sides: tuple[Side, ...]) -> _Items:
        self._require_idle()
        self._running = self._converse(text, sampling, sides)
        return self._running

    def _converse(self, text: str, sampling: Sampling, sides: tuple[Side, ...]) -> _Items:
        requests = [self._request(text, sampling, side) for side in sides]
        replies = {side: Reply(style) for side, (_, style) in zip(sides, requests, strict=True)}
        own, prompt = replies["steered"], requests[0][0].tokens
        before = self.messages
        try:
            with closing(self._engine.generate(*(request for request, _ in requests))) as events:
                for index, event in events:
                    reply = replies[sides[index]]
                    for part in reply.add(event):
                        yield sides[index], part
                    if isinstance(event, FinishEvent):
                        if reply is own:
                            self._keep(text, prompt, own)
                        if all(reply.finish for reply in replies.values()):
                            self._running = None
                        yield sides[index], event
        except (GeneratorExit, KeyboardInterrupt):
            if self.messages is before:
                own.flush()
                if any(own.texts.values()):
                    self._keep(text, prompt, own)
            raise

    def _request(self, text: str, sampling: Sampling, side: Side) -> tuple[Request, ReasoningStyle | None]:
        """Render the conversation with the new question. Raises UsageError when it does not fit."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        question = {"role": "user", "content": text}
        prompt = self._renderer.rendered(self._renderer.chat_text([*system, *self.messages, question]))
        if (n := len(prompt.tokens)) >= self._engine.n_ctx:
            raise UsageError(
                f"the conversation with this question has {n} tokens, and the context {self._engine.n_ctx}; "
                f"begin a new one with /reset, or start again with a larger -c (like -c {2 * n})"
            )
        request = Request(
            prompt.tokens,
            sampling=sampling,
            max_tokens=self.max_tokens,
            special=prompt.has_control_markers,
            style=prompt.style,
        )
        if side == "steered":
            request = replace(request, bias=self._slot.bias, slot=self._slot)
        return request, prompt.style

    def _keep(self, text: str, prompt: Sequence[int], reply: Reply) -> None:
        self.last = reply.finish
        self._answered = _Answered(
            [*prompt, *reply.tokens],
            len(prompt),
            reply.finish,
            reply.style,
            self._slot.bias,
            signs_in_force(self._slot.bias, self._slot.keys),
            self._steering.expert_map if self._steering else None,
        )
        message = {"role": "assistant", "content": reply.text}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        # last, and as a whole: what an interrupt may leave behind is no half of a turn
        self.messages = [*self.messages, {"role": "user", "content": text}, message]

    def _require_second_slot(self) -> None:
        if self._engine.n_slots < 2:
            raise UsageError("this needs a second slot beside the chat's; make the engine with n_slots=2")

    def _require_idle(self) -> None:
        # asked of the generator itself, so that no interrupt can leave a flag behind
        if self._running is not None and inspect.getgeneratorstate(self._running) in _ANSWERING:
            raise UsageError("an answer is still coming; wait for its end, or close its iterator")

    #
    # the routing of the last answer
    #

    def routing(self) -> AnswerRouting:
        """Which experts the last answer used, set against the map, if there is one.

        Under a plan an expert counts as promoted or suppressed if a bias that was in force at some token, of the prompt
        or of the answer, does that to it, and none does the opposite; the map is that of all its steerings, if they
        share one.

        Raises UsageError (no answer yet, an engine without recorder).
        """
        answered = self._last_answer()
        counts = self._counts(answered)
        return answer_routing(counts, self._n_expert_used(), answered.signs, answered.expert_map)

    def why(self) -> WhyReport:
        """How steering changed the routing of the last answer.

        Its tokens are read by the unsteered model, in another slot, and the routing of the two is compared. Which
        experts count as promoted and suppressed under a plan: see `routing`.

        Raises UsageError (no answer yet, or one that nothing steered; an engine with one slot or without recorder).
        """
        answered = self._last_answer()
        if answered.signs is None:
            raise UsageError("nothing steered the last answer; choose a steering (/steer NAME) and ask again")
        steered = self._counts(answered)
        self._require_second_slot()
        unsteered = self._engine.route(answered.tokens, None, *answered.rows)
        return why(self._counted(unsteered), steered, self._n_expert_used(), answered.signs)

    def _last_answer(self) -> _Answered:
        self._require_idle()
        if self._answered is None:
            raise UsageError("there is no answer yet; ask something first")
        return self._answered

    def _counts(self, answered: _Answered) -> npt.NDArray[np.int64]:
        if answered.finish is not None:
            return self._counted(answered.finish.routing)
        if key_of(self._slot.bias) != key_of(answered.bias):
            raise UsageError("the last answer was stopped, and the steering has changed since; ask again")
        # what was stopped gave no counts: read it once more
        first, last = answered.rows
        counts = self._engine.route(
            answered.tokens,
            answered.bias,
            first,
            last,
            slot=self._slot,
            n_prompt=answered.n_prompt,
            style=answered.style,
        )
        return self._counted(counts)

    @staticmethod
    def _counted(counts: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64]:
        if counts is None:
            raise UsageError("the routing was not counted: the model has no experts, or the engine was made without")
        return counts

    def _n_expert_used(self) -> int:
        return self._engine.identity.n_expert_used if self._engine.identity else 0

    #
    # files
    #

    def to_dict(self) -> dict[str, Any]:
        """The content of the file that `save` writes; see chat_file.py."""
        return self._state().to_dict()

    def save(self, path: StrPath) -> None:
        """Write the conversation with its steering and sampling. Raises UsageError, StorageError."""
        write_chat(self._state(), path)

    def load(self, source: StrPath | Mapping[str, Any]) -> list[str]:
        """Take up a conversation from a file, or from what `to_dict` gave, in place of this one.

        Returns warnings: a steering whose file is gone, has changed or is of another model is left out, and so is
        another model. Raises FormatError for a damaged file; nothing changes then.
        """
        self._require_idle()
        if isinstance(source, Mapping):
            state, where = ChatState.from_dict(source), "chat"
        else:
            state, where = read_chat(source), str(source)
        warnings = []
        if state.model is not None and self._engine.identity is not None and state.model != self._engine.identity:
            warnings.append(
                f"{where}: the answers are of {state.model.short}, and this is {self._engine.identity.short}"
            )
        steering: AnySteering | None = None
        try:
            if state.steering is not None:
                kind = SteeringPlan if "rules" in state.steering else Steering
                steering = kind.from_dict(state.steering, f"{where}: steering")
            self._steer(steering, state.steering_on and steering is not None)
        except SteerMoEError as error:
            warnings.append(f"{error}; the chat goes on unsteered")
            self._steer(None, False)
        self.reset()
        if state.date is not None and self.date not in (None, state.date):
            if self._renderer.date_given:
                warnings.append(f"{where}: of {state.date}, which its prompts said; the chat goes on under {self.date}")
            else:
                self._renderer = self._engine.renderer.configured(**self._template, date=state.date)
        self.messages, self.system = state.messages, state.system
        self.sampling, self.max_tokens = state.sampling, state.max_tokens
        return warnings

    def _state(self) -> ChatState:
        self._require_idle()
        return ChatState(
            model=self._engine.identity,
            system=self.system,
            messages=self.messages,
            steering=None if self._steering is None else with_whole_paths(self._steering.to_dict()),
            steering_on=self._on,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            date=self.date,
        )
