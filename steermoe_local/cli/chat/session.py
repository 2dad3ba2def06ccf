"""The state of a running chat: a loaded model, a conversation, and what the commands change."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelMismatchError, SteerMoEError, UsageError
from ...generation.chat import Chat
from ...generation.engine import FinishEvent, Sampling
from ...llama.reasoning_styles import unknown_reasoning
from ...llama.template_date import AnyDate
from ...model_files.model_info import ModelInfo, model_info
from ...steering.plan import AnySteering
from ...steering.steering import Steering
from ..options.opening import context_size, open_engine
from .columns import SIDES
from .maps import MapFinder
from .reports import describe
from .screen import Screen, speed
from .terminal_state import one_interrupt

if TYPE_CHECKING:
    from ..options.llama import LlamaFlags


@dataclass(frozen=True)
class ChatFlags:
    """The options of `steermoe chat` that hold for every model of a chat."""

    flags: LlamaFlags
    sampling: Sampling
    n_predict: int | None
    ctx_size: int | None
    thinking: bool
    template_arguments: Mapping[str, Any] | None
    date: datetime.date | None
    maps: tuple[Path, ...]
    force: bool


class Loaded:
    """A model in memory, and the engine that answers with it."""

    def __init__(self, facts: ModelInfo, flags: ChatFlags) -> None:
        """Load the model. Raises ModelError, ResourceError, NativeError."""
        n_slots = 2 if facts.is_moe else 1  # the second one is for the unsteered side of a comparison
        n_ctx = context_size(facts, flags.ctx_size)
        self.facts = facts
        self.path = facts.paths[0]
        self._stack = ExitStack()
        self.engine = self._stack.enter_context(open_engine(facts, flags.flags, n_ctx, n_slots, force=flags.force))

    def close(self) -> None:
        self._stack.close()


class Session:
    """A chat: the conversation, the loaded model, and the switches that commands change.

    `run_load` runs the loading of a model and gives its result; a terminal lets Ctrl-C through meanwhile.
    """

    def __init__(
        self,
        flags: ChatFlags,
        screen: Screen,
        run_load: Callable[[Callable[[], Loaded]], Loaded],
        *,
        show_speed: bool = False,
    ) -> None:
        self.flags = flags
        self.screen = screen
        self.show_speed = show_speed
        self.comparing = False
        self.chat: Chat
        self._run_load = run_load
        self._loaded: Loaded | None = None
        self._maps: MapFinder | None = None
        self._n_forgotten = 0  # tokens of the chat that a change of steering took out of memory
        self.may_ask_again = False  # the steering was changed since the last answer

    #
    # the model
    #

    def open(self, path: Path, system: str | None = None, steering: AnySteering | None = None) -> None:
        """Load a model and begin a conversation. Raises SteerMoEError."""
        self._open(model_info(path, routers=False))
        self.chat = self._new_chat(system)
        self.chat.steer(steering)

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

    @property
    def is_open(self) -> bool:
        return self._loaded is not None

    @property
    def loaded(self) -> Loaded:
        assert self._loaded is not None, "a session is opened before it is used"
        return self._loaded

    def change_model(self, path: Path) -> None:
        """Go on with another model; the conversation stays, the steering as far as it fits.

        If it cannot be loaded, the old one comes back; if that cannot be loaded either, the session is not open any
        more. Raises SteerMoEError, KeyboardInterrupt.
        """
        facts = model_info(path, routers=False)  # what is no model is refused before the old one goes
        old, state, comparing = self.loaded, self.chat, self.comparing
        self.close()  # first: there may not be memory for both
        try:
            self._open(facts)
            self.chat = self._new_chat(state.system, state.date)
        except BaseException:
            self.close()
            self._open(old.facts)
            self._take_over(state, state.steering, state.steering_on)
            self.comparing = comparing
            raise
        steering = state.steering
        if steering is not None:
            identity = self.loaded.engine.identity
            try:
                if identity is None:
                    raise ModelMismatchError("it has no experts")
                steering.check(identity, str(path), self.flags.force)
            except ModelMismatchError as error:
                self.screen.note(f"the steering does not go along: {error}")
                steering = None
        self._take_over(state, steering, state.steering_on)
        self.comparing = comparing and self.chat.steered

    def _open(self, facts: ModelInfo) -> None:
        if warning := unknown_reasoning(facts.chat_template or ""):
            self.screen.note(f"warning: {warning}")
        self._loaded = self._run_load(lambda: Loaded(facts, self.flags))
        self._maps = None

    def _new_chat(self, system: str | None, date: AnyDate = None) -> Chat:
        return Chat(
            self.loaded.engine,
            system=system,
            sampling=self.flags.sampling,
            max_tokens=self.flags.n_predict,
            thinking=self.flags.thinking,
            template_arguments=self.flags.template_arguments,
            date=date or self.flags.date,
        )

    def _take_over(self, state: Chat, steering: AnySteering | None, on: bool) -> None:
        self.chat = self._new_chat(state.system)
        self.chat.messages = [*state.messages]
        self.chat.sampling, self.chat.max_tokens = state.sampling, state.max_tokens
        if steering is not None:
            self.chat.steer(steering)
            self.chat.switch(on)

    @property
    def maps(self) -> MapFinder:
        """The maps for this model. Raises ModelError for a model without experts."""
        if self._maps is None:
            identity = self.loaded.engine.identity
            if identity is None:
                identity = self.loaded.facts.require_moe()  # says why not
            self._maps = MapFinder(self.flags.maps, identity, self.loaded.path, self.flags.force)
        return self._maps

    #
    # steering
    #

    @property
    def steering(self) -> AnySteering:
        """What steers, or would. Raises UsageError if nothing was chosen, ModelError for a model without experts."""
        chosen = self.chat.steering
        if chosen is None:
            names = ", ".join(self.maps.names())
            raise UsageError(
                "no steering is chosen; " + (f"/steer NAME takes one of {names}" if names else "/steer takes a map")
            )
        return chosen

    @property
    def choice(self) -> Steering:
        """The steering whose numbers and rule can be changed. Raises as `steering`, UsageError for a plan."""
        chosen = self.steering
        if not isinstance(chosen, Steering):
            raise UsageError(
                "a plan steers, and each of its rules has its own choice of experts; write it there and give all rules "
                "again, like /steer answer: NAME +8 -8; thinking: none (/steer shows those of now)"
            )
        return chosen

    def change_steering(self, **fields: Any) -> None:
        """Change the choice of experts, and say what applies."""
        self.steer(self.choice.changed(**fields))

    def steer(self, steering: AnySteering) -> None:
        """Steer by another choice, and say what applies. On an error the old one stays."""
        if words := steering.shortfall:
            self.screen.note(f"warning: {words}")
        before = self.chat.steering if self.chat.steered else None
        self.say_steering(self.chat.steer(steering))
        if before is None or before.content != steering.content:
            self.offer_again()

    def offer_again(self) -> None:
        """Say that the last question can be asked again: its answer stands, and leads the next ones."""
        if self.chat.messages:
            self.may_ask_again = True
            self.screen.note("the last answer is from before; an empty line (or /regenerate) asks its question again")

    def say_steering(self, n_recomputed: int = 0) -> None:
        """Say what steers; and after a change, which took `n_recomputed` tokens out of memory, what follows from it."""
        # a second change before the next message finds nothing in memory, but the chat is recomputed all the same
        self._n_forgotten = max(self._n_forgotten, n_recomputed) if self.chat.messages else 0
        line = f"steering: {describe(self.chat.steering, self.chat.steering_on)}"
        if self._n_forgotten:
            n = f"{self._n_forgotten} token{'s' * (self._n_forgotten != 1)}"
            # under a plan the beginning of the chat may have been computed as it is to be
            what = f"{n} of the chat so far are" if self.chat.n_tokens else f"the chat so far ({n}) is"
            line += f"; {what} recomputed under it with the next message"
        self.screen.note(line)
        if self.comparing and not self.chat.steered:
            self.comparing = False
            self.screen.note("compare: off, as nothing steers")

    #
    # talking
    #

    def load(self, path: Path) -> None:
        """Go on with a saved conversation, and say what it is. Raises FormatError; nothing changes then."""
        warnings = self.chat.load(path)
        self._n_forgotten = 0
        self.may_ask_again = False
        for warning in warnings:
            self.screen.note(f"warning: {warning}")
        self.screen.note(f"{path}: {len(self.chat.messages)} messages")
        self.say_steering()

    def say(self, text: str) -> None:
        """Send a message and show the answer. Errors are shown."""
        try:
            with one_interrupt():
                self._say(text)
            self._n_forgotten = 0
            self.may_ask_again = False
            self.screen.gap()
        except SteerMoEError as error:
            self.screen.error(str(error))

    def _say(self, text: str) -> None:
        n_before = len(self.chat.messages)
        if self.comparing:
            ends = self.screen.compare(self.chat.compare(text))
            for side in SIDES:
                self._tell_end(ends.get(side), f"{side}: ")
        else:
            self._tell_end(self.screen.answer(self.chat.ask(text)))
        if len(self.chat.messages) == n_before:
            self.screen.note("nothing was answered yet; the message is taken back")

    def regenerate(self) -> None:
        """Answer the last message again."""
        before = [*self.chat.messages]
        if not before:
            raise UsageError("there is no answer yet; ask something first")
        last = max(index for index, message in enumerate(before) if message["role"] == "user")
        del self.chat.messages[last:]
        self.say(before[last]["content"])
        if len(self.chat.messages) <= last:  # refused, or stopped before anything was said
            self.chat.messages = before

    def _tell_end(self, finish: FinishEvent | None, side: str = "") -> None:
        if finish is None:
            self.screen.note(f"{side}stopped")
            return
        if finish.reason == "length":
            self.screen.note(f"{side}stopped after -n {finish.n_generated} tokens")
        elif finish.reason == "context":
            n_ctx = self.loaded.engine.n_ctx
            self.screen.note(f"{side}the context of {n_ctx} tokens is full: /reset, or start with a larger -c")
        if self.show_speed:
            self.screen.note(side + speed(finish))
