"""The steerings that requests can name: maps, bias files and choices, checked against the model that is served."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelMismatchError, SteerMoEError, UsageError
from ..identity import ModelIdentity
from ..models.shipped_maps import recommended_numbers, shipped_maps
from ..steering.bias_file import BiasFile
from ..steering.steering import Steering
from .api_errors import ApiError
from .maps_folder import MapsFolder, bias_from_base64, map_from_json, name_of_file
from .registered import NONE, NUMBERS, Applied, Registered, Source, map_digest, size
from .schemas import RegisterRequest, SteeringChoice

__all__ = ["SteeringRegistry"]

_MAX_NAMES = 256
_MAX_BYTES = 256 << 20  # of all tables that came with requests
_CACHED = 128


@dataclass
class _Cache:
    """Biases that were built, by what was asked for."""

    built: OrderedDict[tuple[Any, ...], Applied] = field(default_factory=OrderedDict)
    by_digest: weakref.WeakValueDictionary[str, BiasFile] = field(default_factory=weakref.WeakValueDictionary)


class SteeringRegistry:
    """Names of steerings; safe to use from several threads.

    What a request names is looked up here and nowhere else: no part of a request becomes a path, but for the name of
    POST /v1/steering in a folder that may be written to.
    """

    def __init__(self, *, folder: Path | None = None, writable: bool = False, force: bool = False) -> None:
        """`force` accepts maps whose router hash is another one, if the shape fits."""
        self._folder = MapsFolder(folder, writable) if folder is not None else None
        self._force = force
        self._lock = threading.RLock()
        self._entries: dict[str, Registered] = {}
        self._cache = _Cache()
        self._identity: ModelIdentity | None = None
        self.default: str | None = None

    #
    # filling
    #

    def open(self, identity: ModelIdentity | None) -> list[str]:
        """Take up what ships with the model and what lies in the maps folder; returns warnings of what does not fit."""
        with self._lock:
            self._identity = identity
            if identity is None:
                return ["this model has no experts, so nothing can steer it"]
            for name, path in shipped_maps().items():
                numbers = recommended_numbers(path) or (0, 0)
                steering = Steering.open(map_file=path, activate=numbers[0], deactivate=numbers[1])
                if steering.expert_map is not None and steering.expert_map.identity == identity:
                    self._put(name, steering, "ships")
            return self._open_folder()

    def _open_folder(self) -> list[str]:
        warnings: list[str] = []
        if self._folder is None:
            return warnings
        choices: list[tuple[str, Path]] = []
        for name, path, kind in self._folder.files():
            try:
                if kind == "choice":
                    choices.append((name, path))
                    continue
                steering = Steering.open(map_file=path) if kind == "map" else Steering.open(bias=path)
                warnings += self._put(name, steering, "folder")
                self._folder.take(path)
            except SteerMoEError as error:
                warnings.append(f"left out: {error}")
        for name, path in choices:  # last: they speak of the others
            try:
                choice = self._folder.read_choice(path, name)
                warnings += self._put(name, self._chosen(self.entry(choice.map), choice), "folder", replace=True)
                self._folder.take(path)
            except (SteerMoEError, ApiError) as error:
                warnings.append(f"left out: {path}: {error}")
        return warnings

    def add_file(self, path: Path, activate: int = 0, deactivate: int = 0) -> tuple[str, list[str]]:
        """Register a file that the command line names; returns its name and warnings.

        Raises FormatError, ModelMismatchError, UsageError.
        """
        if path.suffix == ".gguf":
            steering = Steering.open(bias=path)
        else:
            steering = Steering.open(map_file=path, activate=activate, deactivate=deactivate)
        name = name_of_file(path)
        return name, self._put(name, steering, "command line", replace=True)

    def register(self, request: RegisterRequest) -> Registered:
        """What POST /v1/steering asks for. Raises ApiError, and what a map or bias that does not fit raises."""
        if request.name == NONE:
            raise ApiError(400, f"name: {NONE!r} stands for no steering; choose another", param="name")
        if isinstance(request.map, str):
            steering = self._chosen(self.entry(request.map), request)
        elif request.map is not None:
            steering = Steering(request.name, expert_map=map_from_json(request.map, request.name))
            steering = self._with_numbers(steering, request)
        else:
            if any(getattr(request, name) is not None for name in (*NUMBERS, "mode", "scale")):
                raise UsageError("a bias file's choice of experts is made; leave out the numbers, or give the map")
            steering = Steering(request.name, bias=bias_from_base64(request.bias or "", request.name))
        entry = Registered(request.name, steering, "request")
        if entry.has_numbers:
            steering.build(self._identity)  # impossible numbers are refused now
        with self._lock:
            self._require_free(request.name, request.replace)
            self._require_room(request.name, steering)
            self._check(steering)
            if self._folder is not None and self._folder.writable:
                of_map = request.map if isinstance(request.map, str) else None
                self._folder.write(request.name, steering, of_map)
            self._put(request.name, steering, "request", replace=True)
        return self.entry(request.name)

    def remove(self, name: str) -> None:
        """Forget a name. Raises ApiError for one that did not come with a request, or is the server's default."""
        with self._lock:
            entry = self.entry(name)
            if name == self.default:
                raise ApiError(409, f"{name}: the server's default cannot be deleted", code="in_use")
            if not self._is_free(entry):
                raise ApiError(
                    403,
                    f"{name}: did not come with a request (source: {entry.source}), so none can delete it",
                    kind="permission_error",
                    code="read_only",
                )
            if self._folder is not None and self._folder.writable:
                self._folder.remove(name)
            del self._entries[name]

    def _put(self, name: str, steering: Steering, source: Source, replace: bool = False) -> list[str]:
        with self._lock:
            if name == NONE or (name in self._entries and not replace and self._entries[name].source != "ships"):
                raise UsageError(f"{steering.path or name}: the name {name!r} is taken; rename the file")
            warnings = self._check(steering)
            self._entries[name] = Registered(name, steering, source)
            return warnings

    def _check(self, steering: Steering) -> list[str]:
        if self._identity is None:
            raise ModelMismatchError(f"{steering.name}: the model has no experts, so nothing can steer it")
        return steering.check(self._identity, "the served model", self._force)

    def _require_free(self, name: str, replace: bool) -> None:
        known = self._entries.get(name)
        if known is None:
            if len(self._entries) >= _MAX_NAMES:
                raise ApiError(409, f"{_MAX_NAMES} names are registered; delete one first", code="too_many")
        elif not self._is_free(known):
            raise ApiError(409, f"{name}: taken (source: {known.source}); choose another name", code="name_taken")
        elif not replace:
            raise ApiError(409, f"{name}: taken; choose another name, or send replace: true", code="name_taken")
        elif name == self.default:
            raise ApiError(409, f"{name}: the server's default cannot be replaced", code="in_use")

    def _is_free(self, entry: Registered) -> bool:
        """May a request replace or delete it?"""
        in_folder = entry.source == "folder" and self._folder is not None and self._folder.holds(entry.name)
        return entry.source == "request" or in_folder

    def _require_room(self, name: str, steering: Steering) -> None:
        others = [entry for entry in self._entries.values() if entry.source == "request" and entry.name != name]
        held = sum(size(entry.steering) for entry in others)
        if held + size(steering) > _MAX_BYTES:
            raise ApiError(
                409, f"the maps that came with requests fill {_MAX_BYTES >> 20} MiB; delete some", code="full"
            )

    #
    # looking up
    #

    def entries(self) -> list[Registered]:
        """All, by name."""
        with self._lock:
            return [self._entries[name] for name in sorted(self._entries)]

    def entry(self, name: str) -> Registered:
        """What a name stands for. Raises ApiError (404), which lists the names."""
        with self._lock:
            found = self._entries.get(name)
            names = ", ".join([*sorted(self._entries), NONE])
        if found is None:
            raise ApiError.not_found(
                f"steering {name!r} is not registered; there are: {names}", param="steering", code="steering_not_found"
            )
        return found

    def chosen(self, wanted: str | SteeringChoice) -> Steering:
        """The choice behind a name or a changed map, with a request's name. Raises ApiError, UsageError."""
        if isinstance(wanted, str):
            return self.entry(wanted).steering
        return self._chosen(self.entry(wanted.map), wanted)

    def resolve(self, wanted: str | SteeringChoice | None) -> Applied:
        """What a request's `steering` comes to, built and ready. Raises ApiError, UsageError, ChoiceError."""
        if wanted is None or wanted == NONE:
            return Applied(NONE)
        name = wanted if isinstance(wanted, str) else wanted.map
        entry = self.entry(name)
        choice = () if isinstance(wanted, str) else tuple(wanted.model_dump().values())
        key = (id(entry), choice)
        with self._lock:
            if key in self._cache.built:
                self._cache.built.move_to_end(key)
                return self._cache.built[key]
        steering = self.chosen(wanted)
        if entry.is_map and not (steering.activate or steering.deactivate):
            raise ApiError(
                400,
                f"steering {name!r}: the map has no numbers of experts; send "
                f'{{"map": "{name}", "activate": N, "deactivate": N}}',
                param="steering",
                code="no_numbers",
            )
        applied = self._applied(name, entry, steering, changed=not isinstance(wanted, str))
        with self._lock:
            if self._entries.get(name) is entry:  # its id is nobody else's while it is registered
                self._cache.built[key] = applied
                stale = {id(known) for known in self._entries.values()}
                for old in [old for old in self._cache.built if old[0] not in stale]:
                    del self._cache.built[old]
                while len(self._cache.built) > _CACHED:
                    self._cache.built.popitem(last=False)
        return applied

    def _applied(self, name: str, entry: Registered, steering: Steering, changed: bool) -> Applied:
        bias = steering.build(self._identity)
        if bias is None:
            return Applied(NONE, None, {"name": name, "n_active": 0, "n_inactive": 0})
        with self._lock:
            # equal ones are one object, and share their prefixes
            bias = self._cache.by_digest.setdefault(bias.key, bias)
        info: dict[str, Any] = {"name": name, "mode": bias.mode, "n_active": bias.n_active}
        info |= {"n_inactive": bias.n_inactive, "bias_sha256": bias.key}
        if entry.is_map:
            info |= {"map_sha256": map_digest(steering), "side": steering.side}
            info |= {field: getattr(steering, field) for field in (*NUMBERS, "scale")}
        return Applied(f"{name}:changed" if changed else name, bias, info)

    def _chosen(self, entry: Registered, choice: SteeringChoice | RegisterRequest) -> Steering:
        given = any(getattr(choice, name) is not None for name in (*NUMBERS, "mode", "scale"))
        if not entry.is_map:
            if given:
                raise UsageError(
                    f"{entry.name}: a bias file, whose choice of experts is made; only a map takes other numbers"
                )
            return entry.steering
        return self._with_numbers(entry.steering, choice) if given else entry.steering

    @staticmethod
    def _with_numbers(steering: Steering, choice: SteeringChoice | RegisterRequest) -> Steering:
        changes = {name: value for name in NUMBERS if (value := getattr(choice, name)) is not None}
        scale = steering.scale if choice.scale is None else choice.scale
        mode = choice.mode or ("soft" if scale is not None else "hard")
        if mode == "soft" and scale is None:
            raise UsageError("mode soft: how strong? give scale, the logits that promoted experts get")
        if mode == "hard" and choice.scale is not None:
            raise UsageError("scale goes with mode soft; the hard rule has no strength")
        return steering.changed(**changes, scale=scale if mode == "soft" else None)
