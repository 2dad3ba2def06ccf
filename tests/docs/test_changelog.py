"""CHANGELOG.md has the form of Keep a Changelog, and the version of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from datetime import date

from tests.support.paths import ROOT

HEADING = re.compile(r"## \[(Unreleased|\d+\.\d+\.\d+)\](?: - (\d{4}-\d\d-\d\d))?")


def releases() -> list[tuple[str, date | None]]:
    """Versions of the changelog with their dates, as they stand."""
    found = []
    for line in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines():
        if line.startswith("## "):
            heading = HEADING.fullmatch(line)
            assert heading, f"not a heading of a release: {line}"
            found.append((heading[1], date.fromisoformat(heading[2]) if heading[2] else None))
    return found


def test_what_is_not_released_is_first_and_has_no_date() -> None:
    first, *others = releases()
    assert first == ("Unreleased", None)
    assert all(day is not None for _, day in others)


def test_the_version_has_its_heading() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert releases()[1][0] == version, "the newest release is another one than pyproject.toml's"


def test_releases_are_in_order() -> None:
    numbers = [tuple(map(int, version.split("."))) for version, _ in releases()[1:]]
    days = [day for _, day in releases()[1:]]
    assert numbers == sorted(set(numbers), reverse=True)
    assert days == sorted(days, key=str, reverse=True)
