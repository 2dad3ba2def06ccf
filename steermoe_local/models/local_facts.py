"""A cache of facts about the models on this machine, and the expert maps that fit them.

Hashing a model's routers reads up to hundreds of megabytes. The result is kept in the platform's cache folder under
the file's path, with its size and modification time: a file that changed is read again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._util.file_kinds import NO_MODELS, kind_of
from .._util.files import parse_json, replacing, tool_name
from .._util.regular_files import open_regular
from ..errors import FormatError, ModelError, StorageError, UsageError
from ..identity import ModelIdentity
from ..model_files.splits import SplitPaths
from .local_models import LocalModel

_FORMAT = "steermoe-model-facts"
_MARK = '"steermoe-expert-map"'
_MARK_WITHIN = 4096  # bytes from a map's beginning
# general.architecture of GGUF files that are not models
_NO_MODEL = "no model"
_OTHERS = {"expertbias", "controlvector", "imatrix", "clip", _NO_MODEL}


@dataclass(frozen=True)
class ModelFacts:
    """The facts that a listing shows. `problem` says why a model cannot be read or steered, "" if it can.

    `identity` is None when it cannot be steered. `n_moe_layers` counts layers with a router. Sizes as in `ModelInfo`.
    """

    architecture: str = ""
    name: str = ""
    file_type: str = ""
    n_params: int = 0
    n_layer: int = 0
    n_moe_layers: int = 0
    n_expert: int = 0
    n_expert_used: int = 0
    identity: ModelIdentity | None = None
    problem: str = ""
    readable: bool = True

    @property
    def is_model(self) -> bool:
        """False for GGUF files of other kinds, like bias files."""
        return self.architecture not in _OTHERS

    @classmethod
    def read(cls, path: Path) -> ModelFacts:
        """Read the header and hash the routers; for an unreadable file `problem` is set."""
        from ..model_files.model_info import model_info
        from .hub_models import why_not_steerable

        try:
            info = model_info(path)
        except ModelError as error:
            if kind_of(path) in NO_MODELS:
                return cls(architecture=_NO_MODEL, readable=False)
            return cls(problem=str(error).removeprefix(f"{path}: "), readable=False)
        problem = why_not_steerable(info)
        same = ("architecture", "name", "file_type", "n_params", "n_layer", "n_expert", "n_expert_used")
        return cls(
            **{name: getattr(info, name) for name in same},
            n_moe_layers=len(info.moe_layers),
            identity=None if problem else info.identity,
            problem=problem,
        )


@dataclass(frozen=True)
class LocalMap:
    """An expert map on this machine: its name, its file, and the model that it belongs to."""

    name: str
    path: Path
    identity: ModelIdentity


def facts_cache_path() -> Path:
    """File of the kept facts, in the platform's cache folder."""
    from platformdirs import user_cache_path

    return user_cache_path("steermoe", appauthor=False) / "models.json"


class FactsCache:
    """Facts by path, size and time of the model files; `path` None is the usual file.

    A damaged cache, or one of another version, counts as empty.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or facts_cache_path()
        self._kept = self._read()
        self._changed = False

    def facts(self, model: LocalModel) -> ModelFacts:
        """Facts of a model, from the cache or read now."""
        if model.missing:
            parts = SplitPaths.of(model.path)
            of = f" of {parts.count}" if parts else ""
            return ModelFacts(problem=f"part {model.missing}{of} is missing", readable=False)
        if self.is_kept(model):
            try:
                data = self._kept[os.path.abspath(model.path)]["facts"]
                identity = None if data["identity"] is None else ModelIdentity.from_dict(data["identity"])
                return ModelFacts(**data | {"identity": identity})
            except (KeyError, TypeError, FormatError):
                pass
        facts = ModelFacts.read(model.path)
        if facts.readable and (stamp := _stamp(model.path)):
            self._kept[os.path.abspath(model.path)] = {"parts": stamp, "facts": asdict(facts)}
            self._changed = True
        return facts

    def is_kept(self, model: LocalModel) -> bool:
        """Whether the cache has the facts of the file as it is now."""
        entry = self._kept.get(os.path.abspath(model.path))
        return bool(entry and entry.get("parts") == _stamp(model.path))

    def save(self) -> None:
        """Write the cache if it changed; a folder that cannot be written to is ignored."""
        if not self._changed:
            return
        models = {path: entry for path, entry in self._kept.items() if os.path.exists(path)}
        data = {"format": _FORMAT, "tool": tool_name(), "models": models}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(data, indent=1), "utf-8", newline="\n")
        except (OSError, UsageError, StorageError):
            pass

    def _read(self) -> dict[str, Any]:
        try:
            data = parse_json(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        # another version may read other facts
        if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("tool") != tool_name():
            return {}
        models = data.get("models")
        return {k: v for k, v in models.items() if isinstance(v, dict)} if isinstance(models, dict) else {}


def maps_in(folders: Iterable[Path], warn: Callable[[str], None] = lambda _: None) -> list[LocalMap]:
    """The expert maps that ship with the package and those in folders; `warn` is called for damaged ones."""
    from ..maps.expert_map import ExpertMap
    from .shipped_maps import shipped_maps

    found = list(shipped_maps().items())
    for folder in folders:
        found += [(str(path), path) for path in sorted(folder.rglob("*.json")) if _is_map(path)]
    maps = []
    for name, path in found:
        try:
            maps.append(LocalMap(name, path, ExpertMap.load(path).identity))
        except FormatError as error:
            warn(str(error))
    return maps


def fitting(identity: ModelIdentity | None, maps: Sequence[LocalMap]) -> list[LocalMap]:
    """The maps that were made for the model of this identity."""
    return [item for item in maps if identity is not None and item.identity == identity]


def _is_map(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return _MARK.encode() in file.read(_MARK_WITHIN)
    except OSError:
        return False


def _stamp(path: Path) -> list[list[int]]:
    """Size and modification time of every part, [] if one is missing."""
    try:
        return [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, SplitPaths.of(path) or (path,))]
    except OSError:
        return []
