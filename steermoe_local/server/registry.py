"""The steerings that requests can name: maps, bias files and choices, checked against the model that is served."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..errors import ModelMismatchError, SteerMoEError, UsageError
from ..identity import ModelIdentity
from ..llama.steered_llama import native_bias
from ..maps.ranks import ranks_of
from ..models.shipped_maps import recommended_numbers, shipped_maps
from ..steering.bias_file import BiasFile
from ..steering.rules import json_cap
from ..steering.steering import Steering
from .api_errors import ApiError, request_error
from .maps_folder import KeptChoice, MapsFolder, bias_from_base64, map_from_json, name_of_file
from .schemas import RegisterRequest, SteeringChoice

log = logging.getLogger("steermoe.server")

NONE = "none"
"""The name that stands for no steering."""

NUMBERS = ("activate", "deactivate", "reverse", "layers")
"""The fields of a choice that say which experts."""

Source = Literal["ships", "folder", "command line", "request"]

_RULE = ("scale", "weights", "cap")
_MAX_NAMES = 256
_MAX_BYTES = 256 << 20  # of all tables that came with requests
_CACHED = 128  # biases that are kept ready


@dataclass(frozen=True)
class Applied:
    """What steers an answer. `label` is its name in the metrics, `info` what the answer says about it."""

    label: str
    bias: BiasFile | None = None
    info: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Registered:
    """A name and the steering that it stands for."""

    name: str
    steering: Steering
    source: Source

    @property
    def is_map(self) -> bool:
        """Whether requests can change the numbers of experts."""
        return self.steering.expert_map is not None

    @property
    def has_numbers(self) -> bool:
        """Whether a request needs to give nothing but the name."""
        return not self.is_map or bool(self.steering.activate or self.steering.deactivate)

    def to_dict(self) -> dict[str, Any]:
        """The entry in GET /v1/steering."""
        steering, expert_map = self.steering, self.steering.expert_map
        facts: dict[str, Any] = {"name": self.name, "object": "steering", "kind": "map" if expert_map else "bias"}
        facts |= {"source": self.source, "usable_by_name": self.has_numbers, "mode": steering.mode}
        if expert_map is None:
            assert steering.bias is not None
            return facts | {"n_active": steering.bias.n_active, "n_inactive": steering.bias.n_inactive}
        facts |= {name: getattr(steering, name) for name in (*NUMBERS, "scale", "preset", "rank", "weights")}
        facts |= {"cap": json_cap(steering.cap), "ranks": list(ranks_of(expert_map))}
        facts["presets"] = {p.name: {"activate": p.n_activate, "deactivate": p.n_deactivate} for p in steering.presets}
        facts |= {name: getattr(expert_map, name) for name in ("behaviour", "positive", "negative")}
        return facts | {"side": steering.side, "map_sha256": expert_map.sha256, "n_pairs": expert_map.n_pairs or None}


class SteeringRegistry:
    """Names of steerings; safe to use from several threads.

    Everything that a request names is looked up here. No part of a request becomes a path, except the name of
    POST /v1/steering in a folder that may be written to.
    """

    def __init__(self, *, folder: Path | None = None, writable: bool = False, force: bool = False) -> None:
        """`force` accepts maps with another router hash if the shape fits."""
        self._folder = MapsFolder(folder, writable) if folder is not None else None
        self._force = force
        self._lock = threading.RLock()
        self._entries: dict[str, Registered] = {}
        # By the content of map or bias and the choice. A name or an object can be given to something else, content not.
        self._built: OrderedDict[tuple[Any, ...], BiasFile | None] = OrderedDict()
        self._identity: ModelIdentity | None = None
        self.default: str | None = None

    #
    # filling
    #

    def open(self, identity: ModelIdentity | None) -> list[str]:
        """Register what ships with the model and the maps folder; returns warnings about what does not fit."""
        with self._lock:
            self._identity = identity
            if identity is None:
                return ["this model has no experts, so nothing can steer it"]
            for name, path in shipped_maps().items():
                numbers = recommended_numbers(path) or (0, 0)
                steering = Steering.open(map_file=path, activate=numbers[0], deactivate=numbers[1])
                if steering.identity == identity:
                    self._put(name, steering, "ships")
            if self._folder is None:
                return []
            self.claim()
            return self._open_folder(self._folder)

    def claim(self) -> None:
        """Lock the maps folder, if this server writes there, until `close`. A second call has no effect.

        Raises BusyError (another server writes there), UsageError, StorageError.
        """
        if self._folder is not None:
            self._folder.open()

    def close(self) -> None:
        """Give back the maps folder, which nobody else may write to meanwhile."""
        if self._folder is not None:
            self._folder.close()

    def _open_folder(self, folder: MapsFolder) -> list[str]:
        warnings: list[str] = []
        choices: list[tuple[str, Path]] = []
        for name, path, kind in folder.files():
            try:
                if kind == "choice":
                    choices.append((name, path))
                    continue
                steering = Steering.open(map_file=path) if kind == "map" else Steering.open(bias=path)
                warnings += self._put(name, steering, "folder")
                folder.take(path)
            except SteerMoEError as error:
                warnings.append(f"left out: {error}")
        return warnings + self._open_choices(folder, choices)  # last: they refer to the others, and to one another

    def _open_choices(self, folder: MapsFolder, choices: list[tuple[str, Path]]) -> list[str]:
        warnings: list[str] = []
        while choices:
            waiting: list[tuple[str, Path]] = []
            names = {name for name, _ in choices}
            for name, path in choices:
                try:
                    choice = folder.read_choice(path, name)
                    if choice.map not in self._entries and choice.map in names - {name}:
                        waiting.append((name, path))
                        continue
                    warnings += self._put(name, _restored(self.entry(choice.map), choice), "folder", replace=True)
                    folder.take(path)
                except (SteerMoEError, ApiError) as error:
                    warnings.append(f"left out: {path}: {error}")
            if len(waiting) == len(choices):
                return warnings + [f"left out: {path}: the choices refer to one another" for _, path in waiting]
            choices = waiting
        return warnings

    def add_file(self, path: Path, activate: int = 0, deactivate: int = 0) -> tuple[str, list[str]]:
        """Register a file of the command line; returns its name and warnings.

        Raises FormatError, ModelMismatchError, UsageError.
        """
        if path.suffix == ".gguf":
            steering = Steering.open(bias=path)
        else:
            steering = Steering.open(map_file=path, activate=activate, deactivate=deactivate)
        name = name_of_file(path)
        return name, self._put(name, steering, "command line", replace=True)

    def choose(self, name: str, fields: Mapping[str, Any]) -> None:
        """Change the choice of a name from now on, as the command line asks: `fields` of SteeringChoice.

        Raises ApiError, UsageError.
        """
        try:
            choice = SteeringChoice(map=name, **fields)
        except ValidationError as error:
            raise request_error(error) from None
        with self._lock:
            entry = self.entry(choice.map)
            self._put(entry.name, _chosen(entry, choice), entry.source, replace=True)

    def register(self, request: RegisterRequest) -> Registered:
        """Do what POST /v1/steering asks for; the bias is built, so that the first answer does not wait for it.

        Raises ApiError, and what a map or bias that does not fit raises.
        """
        if request.name == NONE:
            raise ApiError(400, f"name: {NONE!r} stands for no steering; choose another", param="name")
        if isinstance(request.map, str):
            steering = _chosen(self.entry(request.map), request)
        elif request.map is not None:
            steering = Steering(request.name, expert_map=map_from_json(request.map, request.name))
            steering = _with_numbers(steering, request)
        else:
            if _has_choice(request):
                raise UsageError("a bias file's choice of experts is made; leave out the numbers, or give the map")
            steering = Steering(request.name, bias=bias_from_base64(request.bias or "", request.name))
        entry = Registered(request.name, steering, "request")
        bias = steering.build(self._identity) if entry.has_numbers else None  # impossible numbers are refused now
        with self._lock:
            self._require_free(request.name, request.replace)
            self._require_room(request.name, steering)
            self._check(steering)
            if self._folder is not None and self._folder.writable:
                of_map = request.map if isinstance(request.map, str) else None
                self._folder.write(request.name, steering, of_map)
            self._put(request.name, steering, "request", replace=True)
            entry = self._entries[request.name]
        if entry.has_numbers:
            self._keep(steering, bias)
        return entry  # not looked up again: another request may have the name by now

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
            _ = steering.content  # hashed once, here: looking a name up is quick then
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
        """Whether a request may replace or delete the entry."""
        in_folder = entry.source == "folder" and self._folder is not None and self._folder.holds(entry.name)
        return entry.source == "request" or in_folder

    def _require_room(self, name: str, steering: Steering) -> None:
        others = [entry for entry in self._entries.values() if entry.source == "request" and entry.name != name]
        if sum(n_bytes(entry.steering) for entry in others) + n_bytes(steering) > _MAX_BYTES:
            raise ApiError(
                409, f"the maps that came with requests fill {_MAX_BYTES >> 20} MiB; delete some", code="full"
            )

    #
    # looking up
    #

    def entries(self) -> list[Registered]:
        """All entries, by name."""
        with self._lock:
            return [self._entries[name] for name in sorted(self._entries)]

    def entry(self, name: str) -> Registered:
        """The entry of a name. Raises ApiError (404), which lists the names."""
        with self._lock:
            found = self._entries.get(name)
            names = ", ".join([*sorted(self._entries), NONE])
        if found is None:
            raise ApiError.not_found(
                f"steering {name!r} is not registered; there are: {names}", param="steering", code="steering_not_found"
            )
        return found

    def chosen(self, wanted: str | SteeringChoice) -> Steering:
        """The steering of a name, or of a name with other numbers. Raises ApiError, UsageError."""
        return self._lookup(wanted)[1]

    def resolve(self, wanted: str | SteeringChoice | None) -> Applied:
        """The bias of a request's `steering`, built if it was not yet. Raises ApiError, UsageError, ChoiceError.

        Building takes milliseconds or more: use `ready` first on the event loop.
        """
        named = self._named(wanted)
        if named is None:
            return Applied(NONE)
        entry, steering = named
        kept = self._kept(steering)
        bias = self._keep(steering, steering.build(self._identity)) if kept is None else kept[0]
        return self._applied(wanted, entry, steering, bias)

    def ready(self, wanted: str | SteeringChoice | None) -> Applied | None:
        """The same if the bias is built already, else None. Raises ApiError, UsageError."""
        named = self._named(wanted)
        if named is None:
            return Applied(NONE)
        kept = self._kept(named[1])
        return None if kept is None else self._applied(wanted, *named, kept[0])

    def _named(self, wanted: str | SteeringChoice | None) -> tuple[Registered, Steering] | None:
        """What a request names, None for no steering. Each call looks up anew: a name may change hands in between."""
        if wanted is None or wanted == NONE:
            return None
        entry, steering = self._lookup(wanted)
        if entry.is_map and not (steering.activate or steering.deactivate):
            name = entry.name
            raise ApiError(
                400,
                f"steering {name!r}: the map has no numbers of experts; send "
                f'{{"map": "{name}", "activate": N, "deactivate": N}}',
                param="steering",
                code="no_numbers",
            )
        return entry, steering

    def _kept(self, steering: Steering) -> tuple[BiasFile | None] | None:
        """The bias that is kept ready, if one is."""
        content = steering.content
        with self._lock:
            if content not in self._built:
                return None
            self._built.move_to_end(content)
            return (self._built[content],)

    def _lookup(self, wanted: str | SteeringChoice) -> tuple[Registered, Steering]:
        if isinstance(wanted, str):
            entry = self.entry(wanted)
            return entry, entry.steering
        entry = self.entry(wanted.map)
        return entry, _chosen(entry, wanted)

    def _keep(self, steering: Steering, bias: BiasFile | None) -> BiasFile | None:
        """Keep a bias ready, with the native bias that the engine attaches: the engine's thread builds none."""
        if bias is not None:
            native_bias(bias)
        with self._lock:
            self._built[steering.content] = bias
            while len(self._built) > _CACHED:
                self._built.popitem(last=False)
        return bias

    @staticmethod
    def _applied(
        wanted: str | SteeringChoice | None, entry: Registered, steering: Steering, bias: BiasFile | None
    ) -> Applied:
        if bias is None:
            return Applied(NONE, None, {"name": entry.name, "n_active": 0, "n_inactive": 0})
        info: dict[str, Any] = {"name": entry.name, "mode": bias.mode, "n_active": bias.n_active}
        info |= {"n_inactive": bias.n_inactive, "bias_sha256": bias.key}
        if steering.expert_map is not None:
            info |= {"map_sha256": steering.expert_map.sha256, "side": steering.side}
            info |= {field: getattr(steering, field) for field in (*NUMBERS, "scale", "rank", "weights")}
            info["cap"] = json_cap(steering.cap)
            if steering.preset is not None:
                info["preset"] = steering.preset
        return Applied(entry.name if isinstance(wanted, str) else f"{entry.name}:changed", bias, info)


def n_bytes(steering: Steering) -> int:
    """Size of a steering's tables."""
    expert_map, bias = steering.expert_map, steering.bias
    if expert_map is not None:
        names = ("rd", "a1", "a2", "se", "logit", "weight")
        tables = [table for name in names if (table := getattr(expert_map, name)) is not None]
        effects = 0 if expert_map.effects is None else expert_map.effects.nbytes
        return effects + sum(int(table.nbytes) for table in tables)
    return 0 if bias is None else sum(row.nbytes for row in bias.values.values())


def _has_choice(choice: SteeringChoice | RegisterRequest) -> bool:
    return any(getattr(choice, name) is not None for name in (*NUMBERS, "mode", "preset", "rank", *_RULE))


def _chosen(entry: Registered, choice: SteeringChoice | RegisterRequest) -> Steering:
    if not _has_choice(choice):
        return entry.steering
    return _with_numbers(entry.steering, choice)


def _restored(entry: Registered, choice: KeptChoice) -> Steering:
    """The choice of a file. Raises UsageError, also if the name of its map stands for another map by now."""
    if choice.map_sha256 is None:
        return _chosen(entry, choice)
    expert_map = entry.steering.expert_map
    if expert_map is None or expert_map.sha256 != choice.map_sha256:
        raise UsageError(f"map: {choice.map!r} is not the map that it was made of; register it again")
    return _with_numbers(Steering(entry.name, expert_map, path=entry.steering.path), choice)


def _with_numbers(steering: Steering, choice: SteeringChoice | RegisterRequest) -> Steering:
    names = (*NUMBERS, "preset", "rank", "mode", *_RULE)
    steering, warnings = steering.with_choice({name: getattr(choice, name) for name in names})
    for line in warnings:
        log.warning("%s", line)
    return steering
