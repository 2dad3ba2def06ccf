"""Types of options that take a rule of a steering plan, or a part of one, in its text form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ...errors import UsageError
from ...steering.plan_rules import RuleSpec
from ...steering.plan_text import parse_rules, parse_where, split_rules


def rule_texts(values: Sequence[str]) -> list[str]:
    """The rules of some values of --steer; semicolons separate several of one value."""
    return [text for value in values for text in split_rules(value) or [value]]


def parse_texts(values: Sequence[str]) -> list[RuleSpec]:
    """Read the rules of some values of --steer. Raises UsageError, which names the rule by its number and text."""
    return parse_rules(rule_texts(values))


class RuleText(click.types.StringParamType):
    """A rule of a plan in its text form, or several with semicolons between them; it stays the text.

    It is read when all values are there (`parse_texts`): rules are numbered through, and those of the configuration
    do not matter where something nearer steers.
    """

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
