"""The command line in this process, and pairs for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from steermoe_local import Pair, save_pairs
from steermoe_local.cli import main
from steermoe_local.pairs.pairs import Message


def ok(*args: Any) -> Result:
    """A command that succeeds."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="steermoe")
    assert result.exit_code == 0, result.output
    return result


def as_json(*args: Any) -> Any:
    """What a command prints with --json."""
    return json.loads(ok(*args, "--json").stdout)


def refused(*args: Any) -> Result:
    """A command that refuses, without a traceback."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="steermoe")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    return result


PAIRS = [
    Pair(
        f"p{n}",
        (Message("user", f"Count from {one}."), Message("assistant", one)),
        (Message("user", f"Count from {one}."), Message("assistant", other)),
        one,
        other,
    )
    for n, (one, other) in enumerate([("three, four", "3, 4"), ("five", "5"), ("13, 14", "thirteen")])
]


def write_pairs(path: Path) -> Path:
    """A file of three pairs whose targets are replies."""
    save_pairs(PAIRS, path)
    return path
