"""Types of options that take a rule of a steering plan, or a part of one, in its text form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ...errors import UsageError
from ...steering.plan_text import parse_where, split_rules


class RuleText(click.types.StringParamType):
    """A rule of a plan in its text form; semicolons separate those of an environment variable."""

    name = "rule"

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """The rules of a variable."""
        return split_rules(rv)


class WhereText(click.types.StringParamType):
    """A place in the text form of rules, like `answer[0:32]`; it stays the text."""

    name = "where"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text. Fails for one that is no place."""
        text = super().convert(value, param, ctx)
        try:
            parse_where(str(text))
        except UsageError as error:
            self.fail(f"{error}.", param, ctx)
        return text
