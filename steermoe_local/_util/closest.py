"""The known name that an unknown one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(text: str, known: Iterable[str]) -> str | None:
    """The name in `known` that `text` is nearest to, whatever its case; None if none is near."""
    by_case = {name.lower(): name for name in known}
    found = difflib.get_close_matches(text.lower(), by_case, n=1, cutoff=0.6)
    return by_case[found[0]] if found else None


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """The end of an error's line that names the nearest of the known names: "; did you mean X?", "" if none is near."""
    found = closest(text, known)
    return f"; did you mean {found}?" if found else ""
