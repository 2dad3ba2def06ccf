"""Settings of sampling that a chat changes as it goes, under the names of the options of the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from ..._util.closest import did_you_mean
from ...errors import UsageError
from ..options.groups import long_names
from ..options.sampling import sampling_parameters
from .session import Session

_LIMIT = "n_predict"  # of the chat, not of its sampling


def setting_names() -> dict[str, click.Parameter]:
    """The options by the names that /set takes: their long names without dashes, the first of each the one shown."""
    return {name: option for option in sampling_parameters() for name in long_names(option)}


def shown_settings(session: Session) -> dict[str, str]:
    """Every setting of sampling and its value, as text."""
    return {long_names(option)[0]: _shown(_value(session, option.name or "")) for option in sampling_parameters()}


def change_setting(session: Session, name: str, text: str) -> str:
    """Set one, from the next message on; without a text nothing is changed. Returns a line with its value.

    Raises UsageError for a name that there is not, and for what is no value of it.
    """
    known = setting_names()
    option = known.get(name.lstrip("-").replace("_", "-").lower())
    if option is None:
        shown = ", ".join(shown_settings(session))
        raise UsageError(f"/set {name}: no such setting{did_you_mean(name, known) or f'; there are {shown}'}")
    field, first = option.name or "", long_names(option)[0]
    if text:
        try:
            _set(session, field, option.type.convert(text, option, None))
        except click.BadParameter as error:
            raise UsageError(
                f"{first} {text}: {error.message.rstrip('.')}; give a value like {option.default}"
            ) from None
    return f"{first}: {_shown(_value(session, field))}"


def _value(session: Session, field: str) -> Any:
    chat = session.chat
    found = chat.max_tokens if field == _LIMIT else getattr(chat.sampling, field)
    return -1 if found is None else found


def _set(session: Session, field: str, value: Any) -> None:
    if field == _LIMIT:
        session.chat.max_tokens = None if value < 0 else value
        return
    value = None if field == "seed" and value < 0 else value
    session.chat.sampling = dataclasses.replace(session.chat.sampling, **{field: value})


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
