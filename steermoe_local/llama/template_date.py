"""The date that chat templates print: fixed when a run begins, and kept with what it makes."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

CLOCK = "strftime_now"
"""The function by which transformers tells a template the date."""

# Variables by which llama.cpp gives a template today's date, and how it writes it (common_chat_extra_context).
_DATES = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}


@dataclass(frozen=True)
class TemplateDate:
    """The date for templates that print one; `given`: a user named it, it is not just the day of the run's start."""

    day: datetime.date
    given: bool = True


AnyDate = TemplateDate | datetime.date | str | None
"""A date, also as YYYY-MM-DD; None: today's."""


def template_date(date: AnyDate) -> TemplateDate:
    """The date for templates. Raises UsageError for a text that is none."""
    if isinstance(date, TemplateDate):
        return date
    if date is None:
        return TemplateDate(datetime.date.today(), given=False)
    if isinstance(date, datetime.datetime):
        return TemplateDate(date.date())
    if isinstance(date, datetime.date):
        return TemplateDate(date)
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", date, re.ASCII):  # other forms of ISO 8601 are read as well
            raise ValueError
        return TemplateDate(datetime.date.fromisoformat(date))
    except ValueError:
        raise UsageError(f"date: {date!r} is no day of the calendar, like 2026-01-31") from None


def date_variables(read: Collection[str], guarded: Collection[str], date: TemplateDate) -> dict[str, str]:
    """The variables besides the clock that tell a template the date; `read` are those that it reads.

    transformers gives a template the clock alone, llama.cpp also `date_string` and `datetime`. They are left out, as in
    transformers, where the template does without (`guarded`; the fixed date of Llama 3.1), unless a user gave the date
    and the template does not read the clock.
    """
    wanted = set(read) if date.given and CLOCK not in read else set(read) - set(guarded)
    return {name: date.day.strftime(form) for name, form in _DATES.items() if name in wanted}


def may_lack(given: bool) -> frozenset[str]:
    """The settings that a run to be resumed may lack: an earlier version kept no date; who gives one says what it was.

    `given`: a user gave one.
    """
    return frozenset({"date"} if given else ())


def other_date(old: Any, new: Any) -> str:
    """Why a run that began under another date (YYYY-MM-DD, None: it kept none) cannot be resumed, and the cure."""
    if old is None:
        return (
            f"an earlier version kept no date, and the chat template prints one, now {new}; give that day's by --date"
        )
    if new is None:
        return f"begun under the date {old}, and now there is none; give --date {old}"
    return f"begun under the date {old}, which the chat template prints, and now it is {new}; give --date {old}"
