"""The expert maps that ship with the package, by name."""

from __future__ import annotations

import os
from pathlib import Path

from .._util.package import PACKAGE
from ..errors import UsageError
from .embedded import behaviours

__all__ = ["map_path", "recommended_numbers", "shipped_maps"]


def shipped_maps() -> dict[str, Path]:
    """Name of each shipped map, all of the embedded model, and its file."""
    return {path.stem: path for path in sorted((_folder() / "tiny").glob("*.json"))}


def map_path(name: str | os.PathLike[str]) -> Path:
    """Path of a map as the command line names it: a file, else `digits-words` or `tiny/digits-words`.

    Raises UsageError, which names the shipped maps.
    """
    text = os.fspath(name)
    path = Path(text)
    shipped = shipped_maps()
    found = shipped.get(text.removeprefix("tiny/"))
    if found is not None and not path.exists():
        return found
    if not path.exists() and path.suffix == "" and path.name == text:
        raise UsageError(f"{text}: neither a file nor a map that ships ({', '.join(shipped)}); check the name")
    return path


def recommended_numbers(path: Path) -> tuple[int, int] | None:
    """How many experts to activate and deactivate by a shipped map, or a copy of it, as the model's card says.

    None for other files.
    """
    shipped = shipped_maps().get(path.stem)
    if shipped is None or not _same_bytes(shipped, path):
        return None
    return next(((b.n_activate, b.n_deactivate) for b in behaviours() if b.name == path.stem), None)


def _same_bytes(one: Path, other: Path) -> bool:
    try:
        return one == other or (one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes())
    except OSError:
        return False


def _folder() -> Path:
    """Beside the modules when installed; in a source tree the folder of the same name at its top."""
    installed = PACKAGE / "expert_maps"
    return installed if installed.is_dir() else PACKAGE.parent / "expert_maps"
