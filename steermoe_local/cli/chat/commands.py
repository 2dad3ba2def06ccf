"""The commands of a chat: what begins with a slash."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..._util.closest import closest
from ...errors import UsageError
from ...maps.expert_map import parse_layers
from ...maps.ranks import RANKS, WEIGHTS, ranks_of
from ...steering.plan import SteeringPlan
from ...steering.plan_rules import EVERYWHERE, NONE, PHASES
from ...steering.rules import EQUAL
from ...steering.steering import Steering
from ..options.model import ModelPath
from .reports import experts_report, why_report
from .screen import speed
from .session import Session
from .settings import change_setting, shown_settings

_WHOLE = ("all", "full")


class Leave(Exception):
    """The chat ends."""


@dataclass(frozen=True)
class Command:
    """A command: what may follow its name, what it does in one line, and the function that does it.

    `words` are the arguments to offer, given what was typed so far; None: paths.
    """

    arguments: str
    help: str
    run: Callable[[Session, str], None]
    words: Callable[[Session, str], Iterable[str]] | None = lambda session, typed: ()


def perform(session: Session, line: str) -> None:
    """Carry out a line that begins with a slash. Raises Leave; SteerMoEError, also for a command that there is not."""
    if control := next((c for c in line if c < " " and c not in "\n\t"), ""):
        raise UsageError(f"a command with the control character {control!r} in it; leave that out")
    name, _, argument = line[1:].strip().partition(" ")
    command = COMMANDS.get(ALIASES.get(name.lower(), name.lower()))
    if command is None:
        close = closest(name, [*COMMANDS, *ALIASES])
        meant = f"did you mean /{close}?" if close else "/help lists them"
        raise UsageError(f"/{name.split(chr(10))[0]}: no such command; {meant} (to say a text with a slash, begin //)")
    if argument and not command.arguments:
        raise UsageError(f"/{name} takes nothing behind it; leave out {argument.strip()!r}")
    command.run(session, argument.strip())


def completions(session: Session, name: str, typed: str = "") -> Iterable[str] | None:
    """What can follow a command, behind which `typed` stands so far; None: any path."""
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        return ()
    return None if command.words is None else command.words(session, typed)


#
# steering
#


def _steer(session: Session, argument: str) -> None:
    if not argument:
        session.say_steering()
        if isinstance(session.chat.steering, SteeringPlan):
            for number, text in enumerate(session.chat.steering.texts, 1):
                session.screen.note(f"rule {number}: {text}")
        if names := ", ".join(session.maps.names()):
            session.screen.note(f"maps, bias files and plans for this model: {names}")
    elif argument in ("on", "off"):
        if session.chat.steering is None:
            _ = session.steering  # says what can be chosen
        changes = session.chat.steering_on != (argument == "on")
        session.say_steering(session.chat.switch(argument == "on"))
        if changes:
            session.offer_again()
    else:
        steering, warnings = session.maps.open(argument, session.chat.steering)
        for warning in warnings:
            session.screen.note(f"warning: {warning}")
        session.steer(steering)


def _steer_words(session: Session, typed: str) -> Iterable[str]:
    """Words, names and places; behind a place and its colon the names, behind a rule and its semicolon both again."""
    if not session.loaded.facts.is_moe:
        return ("on", "off")
    names, places = [*session.maps.names()], [f"{place}: " for place in (*PHASES, EVERYWHERE)]
    if behind := re.match(r"(.*[;:]\s*)", typed):
        more = [NONE] if behind[1].rstrip().endswith(":") else places
        return [f"{behind[1]}{word}" for word in (*names, *more)]
    return ("on", "off", *names, *places)


def _strength(session: Session, argument: str) -> None:
    if argument == "hard":
        _change_rule(session, mode="hard")
        return
    if not math.isfinite(scale := _number(argument)):
        raise UsageError(f"/strength {argument}: give the logits to add, like 2.5, or hard for the hard rule")
    _change_rule(session, scale=scale)


def _cap(session: Session, argument: str) -> None:
    if argument == "off":
        _change_rule(session, mode="hard")
        return
    if not (cap := _number(argument)) > 0:  # false for NaN
        raise UsageError(f"/cap {argument}: give the most logits that steering may move, like 2, inf, or off")
    _change_rule(session, cap=cap)


def _weights(session: Session, argument: str) -> None:
    if argument not in (*WEIGHTS, EQUAL):
        raise UsageError(f"/weights {argument}: give one of {', '.join(WEIGHTS)}, or {EQUAL} for all alike")
    names = {"mode": "rule", "scale": "/strength X", "weights": "/weights"}
    _change_rule(session, weights=argument, names=names)


def _change_rule(session: Session, **asked: Any) -> None:
    session.change_steering(**session.choice.rule.changed(**asked).fields)


def _number(argument: str) -> float:
    try:
        return float(argument)
    except ValueError:
        return math.nan


def _rank(session: Session, argument: str) -> None:
    if argument not in RANKS:
        raise UsageError(f"/rank {argument}: give one of {', '.join(RANKS)}")
    session.change_steering(rank=argument)


def _ranks(session: Session, typed: str) -> Iterable[str]:
    steering = session.chat.steering
    expert_map = steering.expert_map if isinstance(steering, Steering) else None
    return () if expert_map is None else ranks_of(expert_map)


def _activate(session: Session, argument: str) -> None:
    session.change_steering(activate=_count("activate", argument))


def _deactivate(session: Session, argument: str) -> None:
    session.change_steering(deactivate=_count("deactivate", argument))


def _count(name: str, argument: str) -> int:
    if not (argument.isascii() and argument.isdecimal() and len(argument) <= 9):
        raise UsageError(f"/{name} {argument}: give a number of experts, 0 or more")
    return int(argument)


def _reverse(session: Session, argument: str) -> None:
    now = session.choice.reverse
    session.change_steering(reverse=_switched("reverse", argument, now))


def _layers(session: Session, argument: str) -> None:
    if not argument:
        raise UsageError("/layers: give layers like 3-7,9, or all")
    if argument != "all":
        parse_layers(argument)
    session.change_steering(layers=None if argument == "all" else argument)


def _compare(session: Session, argument: str) -> None:
    on = _switched("compare", argument, session.comparing)
    if on and not session.chat.steered:
        _ = session.steering  # says what is missing
        raise UsageError("nothing steers, so both answers would be the same; /steer on, or choose experts")
    session.comparing = on
    session.screen.note(
        "compare: on; the next messages are answered unsteered and steered, with the same seed, and the chat goes on "
        "with the steered answer"
        if on
        else "compare: off"
    )


def _experts(session: Session, argument: str) -> None:
    everything = _wholly("experts", argument)
    session.screen.table(*experts_report(session.chat.routing(), session.chat.steering, everything=everything))


def _why(session: Session, argument: str) -> None:
    everything = _wholly("why", argument)
    session.screen.table(*why_report(session.chat.why(), everything=everything))


def _wholly(name: str, argument: str) -> bool:
    """Whether a report is to have every layer."""
    if argument not in ("", *_WHOLE):
        raise UsageError(f"/{name} {argument}: give all for every layer, or nothing")
    return argument in _WHOLE


#
# the conversation
#


def _save(session: Session, argument: str) -> None:
    path = _path("save", argument)
    session.chat.save(path)
    session.screen.note(f"written: {path}")


def _load(session: Session, argument: str) -> None:
    session.load(_path("load", argument))


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise UsageError(f"/{name}: name a file")
    return Path(os.path.expanduser(argument))


def _reset(session: Session, argument: str) -> None:
    session.chat.reset()
    session.may_ask_again = False
    session.screen.note("the chat begins anew; system prompt and steering stay")


def _system(session: Session, argument: str) -> None:
    if argument:
        session.chat.set_system(None if argument == "off" else argument)
    note = f"system prompt: {session.chat.system or 'none'}"
    if argument and session.chat.messages:
        note += "; the chat so far is recomputed under it with the next message"
    session.screen.note(note, lines=True)


def _regenerate(session: Session, argument: str) -> None:
    session.regenerate()


def _model(session: Session, argument: str) -> None:
    if not argument:
        session.screen.note(f"model: {session.loaded.path}")
        return
    session.change_model(ModelPath().convert(argument, None, None))
    session.screen.note(f"model: {session.loaded.path}; the chat so far is recomputed by it with the next message")
    if session.chat.steering is not None:
        session.say_steering()


#
# sampling
#


def _temp(session: Session, argument: str) -> None:
    session.screen.note(change_setting(session, "temp", argument))


def _seed(session: Session, argument: str) -> None:
    session.screen.note(change_setting(session, "seed", argument))


def _set(session: Session, argument: str) -> None:
    name, _, value = argument.removeprefix("parameter ").partition(" ")
    if name == "system":  # as in other programs
        _system(session, value.strip())
    elif name:
        session.screen.note(change_setting(session, name, value.strip()))
    else:
        for name, value in shown_settings(session).items():
            session.screen.note(f"{name}: {value}")


def _setting_words(session: Session, typed: str) -> Iterable[str]:
    return shown_settings(session)


#
# the program
#


def _speed(session: Session, argument: str) -> None:
    if argument:
        session.show_speed = _switched("speed", argument, session.show_speed)
        session.screen.note(f"speed: {'shown after every answer' if session.show_speed else 'not shown'}")
    elif session.chat.last is None:
        raise UsageError("there is no answer yet; ask something first")
    else:
        session.screen.note(speed(session.chat.last))


def _reasoning(session: Session, argument: str) -> None:
    if argument not in ("", "show", "hide"):
        raise UsageError(f"/reasoning {argument}: give show or hide")
    shown = not session.screen.show_reasoning if not argument else argument == "show"
    session.screen.show_reasoning = shown
    session.screen.note(f"reasoning: {'shown' if shown else 'hidden'}")


def _help(session: Session, argument: str) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, command in COMMANDS.items():
        others = ", ".join(f"/{alias}" for alias, meant in ALIASES.items() if meant == name)
        table.add_row(f"/{name} {command.arguments}".rstrip(), command.help + (f" ({others})" if others else ""))
    session.screen.table(table)
    session.screen.note(_KEYS)


_KEYS = (
    'Several lines: Alt-Enter or Ctrl-J, a backslash at the end of a line, or a block from """ to """. '
    "A message that begins with a slash: write // for /. Tab completes commands. "
    "Ctrl-C stops an answer, at the prompt it drops the line; Ctrl-D leaves."
)


def _quit(session: Session, argument: str) -> None:
    raise Leave


def _switched(name: str, argument: str, now: bool) -> bool:
    """on, off, or the other way round than now."""
    if argument not in ("", "on", "off"):
        raise UsageError(f"/{name} {argument}: give on or off, or nothing to change it")
    return not now if not argument else argument == "on"


def _on_off(session: Session, typed: str) -> Iterable[str]:
    return ("on", "off")


def _words(*words: str) -> Callable[[Session, str], Iterable[str]]:
    """Arguments that are always the same."""
    return lambda session, typed: words


COMMANDS: dict[str, Command] = {
    "steer": Command(
        "on|off|NAME|RULES",
        "switch steering, or choose a map, bias file or plan, or rules like answer: NAME +8 -8",
        _steer,
        _steer_words,
    ),
    "strength": Command("X|hard", "soft rule: add X to the router's logits", _strength, _words("hard")),
    "cap": Command("X|off", "capped rule: the hard one, moving no logit by more than X", _cap, _words("off")),
    "weights": Command("NAME", "soft rule: strength in proportion to a score", _weights, _words(*WEIGHTS, EQUAL)),
    "activate": Command("N", "promote the map's first N experts with RD > 0", _activate),
    "deactivate": Command("N", "suppress the first N experts with RD < 0", _deactivate),
    "rank": Command("NAME", "choose experts by another score than RD", _rank, _ranks),
    "reverse": Command("[on|off]", "steer to the map's other side", _reverse, _on_off),
    "layers": Command("A-B|all", "steer these layers only, like 3-7,9", _layers, _words("all")),
    "compare": Command("[on|off]", "answer unsteered and steered, side by side", _compare, _on_off),
    "experts": Command(
        "[all]", "the experts that the last answer used, against the map; all: in every layer", _experts, _words("all")
    ),
    "why": Command(
        "[full]", "what steering forced and suppressed in the last answer; full: in every layer", _why, _words("full")
    ),
    "temp": Command("[X]", "show or set the temperature, 0: greedy", _temp),
    "seed": Command("[N]", "show or set the seed of sampling, -1: random", _seed),
    "set": Command("[NAME VALUE]", "show or set how answers are sampled, like top-k 20", _set, _setting_words),
    "save": Command("FILE", "write the chat to a file", _save, None),
    "load": Command("FILE", "go on with a chat from a file", _load, None),
    "reset": Command("", "forget the chat, keep system prompt and steering", _reset),
    "system": Command("[TEXT|off]", "show or set the system prompt", _system, _words("off")),
    "model": Command("MODEL", "go on with another model", _model, None),
    "regenerate": Command("", "answer the last message again", _regenerate),
    "reasoning": Command("[show|hide]", "show or hide what the model thinks", _reasoning, _words("show", "hide")),
    "speed": Command("[on|off]", "tokens per second, of the last answer or after every one", _speed, _on_off),
    "help": Command("", "this list", _help),
    "quit": Command("", "leave, as Ctrl-D", _quit),
}
ALIASES = {"?": "help", "clear": "reset", "exit": "quit", "bye": "quit"}
"""Further names of commands, as other programs have them."""
