"""The steerings that requests can name: maps, bias files, choices and plans, checked against the served model."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .._util.closest import did_you_mean
from ..errors import ModelMismatchError, SteerMoEError, UsageError, prefixed
from ..evaluation.measuring.plans import open_plan as open_files_plan
from ..identity import ModelIdentity
from ..llama.steered_llama import native_bias
from ..models.shipped_maps import map_path, shipped_maps
from ..models.user_maps import is_learnt, map_label, user_maps_folder
from ..steering.bias_plan import AnyBias
from ..steering.plan import AnySteering, SteeringPlan
from ..steering.plan_file import SUFFIXES as PLAN_SUFFIXES
from ..steering.plan_file import read_plan_file
from ..steering.plan_rules import EVERYWHERE, PHASES
from ..steering.steering import Steering
from .api_errors import ApiError, request_error
from .choices import has_choice, with_choice
from .maps_folder import KeptChoice, Kind, MapsFolder, bias_from_base64, map_from_json, name_of_file
from .own_plan import require_plan_name, without_folders
from .plans import open_plan, refusing
from .registered import NONE, Applied, Registered, Source, applied, biases_of, has_numbers, n_bytes
from .schemas import GivenPlan, RegisterRequest, SteeringChoice, Wanted

log = logging.getLogger("steermoe.server")

UNNAMED_PLAN = "unnamed:plan"
"""The label of plans that come with a request; no registered name has a colon."""

_PLACES = (*PHASES, EVERYWHERE)
_MAX_NAMES = 256
_MAX_BYTES = 256 << 20  # of all tables that came with requests
_CACHED = 128  # biases that are kept ready, those of plans included


class SteeringRegistry:
    """Names of steerings; safe to use from several threads.

    Everything that a request names is looked up here. No part of a request becomes a path, except the name of
    POST /v1/steering in a folder that may be written to.
    """

    def __init__(self, *, folder: Path | None = None, writable: bool = False, force: bool = False) -> None:
        """`force` accepts maps with another router hash if the shape fits. `learnt_folder` keeps what is learnt."""
        self._folder = MapsFolder(folder, writable) if folder is not None else None
        self.learnt_folder = folder if folder is not None and writable else user_maps_folder()
        self._force = force
        self._lock = threading.RLock()
        self._entries: dict[str, Registered] = {}
        # By the content of map or bias and the choice. A name or an object can be given to something else, content not.
        self._built: OrderedDict[tuple[Any, ...], AnyBias | None] = OrderedDict()
        self._n_built = 0  # biases in it
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
                steering = Steering.open(map_file=path).recommending()
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
        later: dict[Kind, list[tuple[str, Path]]] = {"choice": [], "plan": [], "plan in toml": []}
        for name, path, kind in folder.files():
            try:
                if kind in later:
                    later[kind].append((name, path))
                    continue
                opened = Steering.open(map_file=path) if kind == "map" else Steering.open(bias=path)
                warnings += self._put(name, opened.recommending(), "folder")
                folder.take(path)
            except SteerMoEError as error:
                if isinstance(error, ModelMismatchError) and path.parent != folder.path:
                    continue  # a steering that was learnt for another model is in its place there
                warnings.append(f"left out: {error}")
        warnings += self._open_choices(folder, later["choice"])  # they refer to the others, and to one another
        return warnings + self._open_plans(folder, later["plan"] + later["plan in toml"])

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
                    warnings += self._put(name, _restored(self.entry(choice.map), choice, name), "folder", replace=True)
                    folder.take(path)
                except (SteerMoEError, ApiError) as error:
                    warnings.append(f"left out: {path}: {error}")
            if len(waiting) == len(choices):
                return warnings + [f"left out: {path}: the choices refer to one another" for _, path in waiting]
            choices = waiting
        return warnings

    def _open_plans(self, folder: MapsFolder, plans: list[tuple[str, Path]]) -> list[str]:
        warnings: list[str] = []
        for name, path in plans:
            try:
                warnings += self._put(name, self._plan_of_file(name, path), "folder")
                folder.take(path)
            except SteerMoEError as error:
                warnings.append(f"left out: {error}")
        return warnings

    def _plan_of_file(self, name: str, path: Path) -> SteeringPlan:
        """The plan of a file, whose rules name what is registered. Raises FormatError, UsageError."""
        read = read_plan_file(path)
        with prefixed(str(path), once=True):
            return open_plan(read.rules, self._steerings(), name, made_of=read.made_of or None, path=path)

    def _find(self, name: str) -> Path:
        """The file of a registered map or bias, or of a path or shipped map. Raises UsageError."""
        with self._lock:
            entry = self._entries.get(name)
        path = None if entry is None or entry.kind == "plan" else entry.steering.path
        # not of a choice, whose numbers its map's file lacks
        return path if path is not None and name_of_file(path) == name else map_path(name)

    def add_file(self, path: Path, activate: int = 0, deactivate: int = 0) -> tuple[str, list[str]]:
        """Register a file of the command line; returns its name and warnings.

        The rules of a plan name what lies beside it, what is registered, and the maps that ship; those of a plan in the
        maps folder what is registered. Raises ChoiceError, FormatError, ModelMismatchError, UsageError.
        """
        name = name_of_file(path.with_name(f"{map_label(path)}.json") if is_learnt(path) else path)
        steering: AnySteering
        if path.name.endswith(PLAN_SUFFIXES):
            if self._folder is None or path.resolve().parent != self._folder.path.resolve():
                told: list[str] = []
                with prefixed(str(path), once=True):
                    plan = open_files_plan(path, name=name, find=self._find, tell=lambda *lines: told.extend(lines))
                return name, told + self.add_plan(plan)
            steering = self._plan_of_file(name, path)
        elif path.suffix == ".gguf":
            steering = Steering.open(bias=path)
        else:
            steering = Steering.open(map_file=path, activate=activate, deactivate=deactivate).recommending()
        return name, self._put(name, steering, "command line", replace=True)

    def add_learnt(self, name: str, path: Path) -> list[str]:
        """Register a learnt steering of the maps folder by its map's file, in place of an older one; returns warnings.

        Raises FormatError, ModelMismatchError, UsageError (the name is another steering's).
        """
        steering = Steering.open(map_file=path).recommending()
        with self._lock:
            known = self._entries.get(name)
            there = None if known is None else known.steering.path
            again = there is not None and there.resolve() == path.resolve()
            return self._put(name, steering, "folder", replace=again)

    def add_plan(self, plan: SteeringPlan) -> list[str]:
        """Register a plan of the command line under its name, which it takes from what has it; returns warnings.

        Its rules show clients the names of files, never where they lie. Raises ModelMismatchError, UsageError, and what
        building it raises.
        """
        require_plan_name(plan.name)
        shown = replace(plan, rules=tuple(map(without_folders, plan.rules)))
        warnings = self._put(plan.name, shown, "command line", replace=True)
        self._keep(shown, shown.build(self._identity))  # impossible numbers are refused now
        return warnings

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
        steering: AnySteering
        if isinstance(request.map, str):
            steering = _chosen(self.entry(request.map), request)
        elif request.map is not None:
            steering = Steering(request.name, expert_map=map_from_json(request.map, request.name))
            choice = {name: getattr(request, name) for name in ("activate", "deactivate", "preset", "reverse")}
            steering = with_choice(steering.recommending(choice), request)
        elif has_choice(request):
            raise UsageError(
                "the rules of a plan have numbers of their own; leave out those beside them"
                if request.rules is not None
                else "a bias file's choice of experts is made; leave out the numbers, or give the map"
            )
        elif request.rules is not None:
            with refusing("rules"):
                steering = open_plan(request.rules.rules, self._steerings(), request.name)
        else:
            steering = Steering(request.name, bias=bias_from_base64(request.bias or "", request.name))
        entry = Registered(request.name, steering, "request")
        with refusing("rules") if entry.kind == "plan" else nullcontext():
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

    def _put(self, name: str, steering: AnySteering, source: Source, replace: bool = False) -> list[str]:
        with self._lock:
            if name == NONE or (name in self._entries and not replace and self._entries[name].source != "ships"):
                raise UsageError(f"{steering.path or name}: the name {name!r} is taken; rename the file")
            warnings = self._check(steering)
            _ = steering.content  # hashed once, here: looking a name up is quick then
            self._entries[name] = Registered(name, steering, source)
            return warnings

    def _check(self, steering: AnySteering) -> list[str]:
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

    def _require_room(self, name: str, steering: AnySteering) -> None:
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
            known = [*sorted(self._entries), NONE]
        if found is None:
            names = ", ".join(known)
            hint = f"; a rule has a colon and what steers, like {name}: {NONE}" if name in _PLACES else ""
            raise ApiError.not_found(
                f"steering {name!r} is not registered; there are: {names}{hint or did_you_mean(name, known)}",
                param="steering",
                code="steering_not_found",
            )
        return found

    def _steerings(self) -> dict[str, AnySteering]:
        """What the names stand for now, all at one time."""
        with self._lock:
            return {name: entry.steering for name, entry in self._entries.items()}

    def chosen(self, wanted: Wanted) -> AnySteering:
        """The steering of a name, of a name with other numbers, or of rules. Raises ApiError, UsageError."""
        return self._lookup(wanted)[1]

    def resolve(self, wanted: Wanted | None) -> Applied:
        """The bias of a request's `steering`, built if it was not yet. Raises ApiError, UsageError, ChoiceError.

        Building takes milliseconds or more: use `ready` first on the event loop.
        """
        named = self._named(wanted)
        if named is None:
            return Applied(NONE)
        label, steering = named
        kept = self._kept(steering)
        if kept is not None:
            return applied(label, steering, kept[0])
        with refusing("steering") if isinstance(steering, SteeringPlan) else nullcontext():
            built = steering.build(self._identity)
        bias = self._keep(steering, built)
        return applied(label, steering, bias)

    def ready(self, wanted: Wanted | None) -> Applied | None:
        """The same if the bias is built already, else None. Raises ApiError, UsageError."""
        named = self._named(wanted)
        if named is None:
            return Applied(NONE)
        kept = self._kept(named[1])
        return None if kept is None else applied(*named, kept[0])

    def _named(self, wanted: Wanted | None) -> tuple[str, AnySteering] | None:
        """(label, what steers) of a request, None for no steering.

        Each call looks up anew: a name may change hands in between.
        """
        if wanted is None or wanted == NONE:
            return None
        label, steering = self._lookup(wanted)
        if not has_numbers(steering):
            name = label.partition(":")[0]
            raise ApiError(
                400,
                f"steering {name!r}: the map recommends no numbers of experts; send "
                f'{{"map": "{name}", "activate": N, "deactivate": N}}',
                param="steering",
                code="no_numbers",
            )
        return label, steering

    def _kept(self, steering: AnySteering) -> tuple[AnyBias | None] | None:
        """The bias that is kept ready, if one is."""
        content = steering.content
        with self._lock:
            if content not in self._built:
                return None
            self._built.move_to_end(content)
            return (self._built[content],)

    def _lookup(self, wanted: Wanted) -> tuple[str, AnySteering]:
        """(label in the metrics, what steers)."""
        if isinstance(wanted, str):
            return wanted, self.entry(wanted).steering
        if isinstance(wanted, GivenPlan):
            with refusing("steering"):
                return UNNAMED_PLAN, open_plan(wanted.rules, self._steerings(), "plan")
        return f"{wanted.map}:changed", _chosen(self.entry(wanted.map), wanted)

    def _keep(self, steering: AnySteering, bias: AnyBias | None) -> AnyBias | None:
        """Keep a bias ready, with the native biases that the engine attaches: the engine's thread builds none."""
        for one in biases_of(bias):
            native_bias(one)
        content = steering.content
        with self._lock:
            self._n_built -= len(biases_of(self._built.pop(content, None)))
            self._built[content] = bias
            self._n_built += len(biases_of(bias))
            while len(self._built) > 1 and max(len(self._built), self._n_built) > _CACHED:
                self._n_built -= len(biases_of(self._built.popitem(last=False)[1]))
        return bias


def _chosen(entry: Registered, choice: SteeringChoice | RegisterRequest) -> Steering:
    if isinstance(entry.steering, SteeringPlan):
        raise ApiError(
            400,
            f"steering {entry.name!r}: a plan, whose rules have numbers of their own; send its name alone",
            param="steering",
            code="invalid_value",
        )
    return with_choice(entry.steering, choice)


def _restored(entry: Registered, choice: KeptChoice, name: str) -> Steering:
    """The choice of a file. Raises UsageError, also if the name of its map stands for another map by now."""
    expert_map = entry.steering.expert_map
    if choice.map_sha256 is None:
        own = entry.source == "folder" and entry.is_map and name == entry.name and expert_map is not None
        if not own or all(number is None for number in (choice.activate, choice.deactivate, choice.preset)):
            return _chosen(entry, choice)
        # numbers of a map's own choice are instead of those that it recommends
    elif not entry.is_map or expert_map is None or expert_map.sha256 != choice.map_sha256:
        raise UsageError(f"map: {choice.map!r} is not the map that it was made of; register it again")
    bare = Steering(entry.name, expert_map, path=entry.steering.path)
    return with_choice(bare.recommending(choice.model_dump()), choice)  # a choice without numbers is of fitted values
