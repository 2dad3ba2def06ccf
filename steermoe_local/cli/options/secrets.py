"""Options whose values are secret: warnings where others on the machine can read them."""

from __future__ import annotations

import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..output import warn
from .config_file import config_path


class SecretOption(click.Option):
    """An option with a secret value; `instead` says how else it can be given."""

    def __init__(self, *arguments: Any, instead: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.instead = instead

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        """As of other options; warns if other users of the machine can read the value where it comes from."""
        value, source = super().consume_value(ctx, opts)
        if value and not ctx.resilient_parsing:
            if source is ParameterSource.COMMANDLINE:
                name = next(name for name in self.opts if name.startswith("--"))
                warn(f"{name}: the machine's other users can read command lines (ps); use {self.instead}")
            elif source is ParameterSource.DEFAULT_MAP:
                warn_of_readers(config_path())
        return value, source


def warn_of_readers(path: Path) -> None:
    """Warn of a file with a secret that others than its owner can read (POSIX; Windows' lists are not looked at)."""
    if sys.platform == "win32":
        return
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # whoever reads it says so
    if stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
        warn(f"{path}: holds a secret, and others can read it; run chmod 600 {path}")
