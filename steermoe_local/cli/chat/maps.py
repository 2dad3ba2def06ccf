"""Finding a map or bias file by what a person calls it."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from ..._util.regular_files import open_regular
from ...errors import UsageError
from ...identity import ModelIdentity
from ...maps.ranks import ranks_of
from ...models.shipped_maps import recommended_numbers, shipped_maps
from ...steering.steering import Steering
from ..options.system_text import is_text

_HEAD = 1 << 16  # bytes


class MapFinder:
    """Maps and bias files by path, or by name: those of folders, and those that ship with the package.

    Where several have a name, the first folder's counts.
    """

    def __init__(self, folders: Sequence[Path], identity: ModelIdentity, where: Path, force: bool = False) -> None:
        """`identity` is that of the model in `where`; files of other models are not offered."""
        self._folders = folders
        self._identity = identity
        self._where = where
        self._force = force
        self._fitting: dict[str, Path] | None = None

    def names(self) -> dict[str, Path]:
        """The files that fit the model, by name; read once."""
        if self._fitting is None:
            self._fitting = {name: path for name, path in self._named().items() if self._fits(path)}
        return self._fitting

    def open(self, name: str, before: Steering | None = None) -> tuple[Steering, list[str]]:
        """The steering of that name or path, and warnings.

        A map is taken with the numbers of experts that are recommended for it, else with those of `before`, else with
        none; rule and layers are those of `before`, and so are rank and weights, if the map has their data.

        Raises UsageError for a name that nothing has, FormatError, ModelMismatchError.
        """
        path = self._find(name)
        if _is_bias(path):
            steering = Steering.open(bias=path)
        else:
            steering = Steering.open(map_file=path)
            numbers = recommended_numbers(path)
            if before is not None and before.expert_map is not None:
                numbers = numbers or (before.activate, before.deactivate)
                steering = steering.changed(epsilon=before.epsilon, layers=before.layers, **before.rule.fields)
                there = () if steering.expert_map is None else ranks_of(steering.expert_map)
                steering = steering.changed(
                    rank=before.rank if before.rank in there else "rd",
                    weights=before.weights if before.weights in there else None,
                )
            activate, deactivate = numbers or (0, 0)
            steering = steering.changed(activate=activate, deactivate=deactivate)
        return steering, steering.check(self._identity, str(self._where), self._force)

    def _find(self, name: str) -> Path:
        path = Path(os.path.expanduser(name))
        if path.is_file():
            return path
        named = self._named()
        if name in named:
            return named[name]
        close = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else "give the path of a map or bias file"
        raise UsageError(f"{name}: no such file, and no map of that name for this model; {hint}")

    def _named(self) -> dict[str, Path]:
        named = shipped_maps()
        for folder in reversed(self._folders):
            with contextlib.suppress(OSError):  # gone, or not to be read: its names are not there
                found = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".gguf"))
                files = [path for path in found if is_text(path.name)]  # others cannot be kept in a saved chat
                named |= {path.stem: path for path in files}
        return named

    def _fits(self, path: Path) -> bool:
        """Is the model's router hash in the file's head? Enough for a list of names; opening it looks closer."""
        try:
            with open_regular(path) as file:
                return self._identity.router_sha256.encode() in file.read(_HEAD)
        except OSError:
            return False


def _is_bias(path: Path) -> bool:
    """By its first bytes: GGUF, or JSON as a map is."""
    try:
        with open_regular(path) as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False  # reading it as a map says why
