"""The folder of maps: NAME.json (a map), NAME.gguf (a bias file), NAME.choice.json (numbers for a map), and plans.

A choice is the JSON object of a request's `steering` field; without `map` it belongs to the map of its own name:

    faithful.json, faithful.choice.json: {"activate": 10, "deactivate": 50}
    words.choice.json: {"map": "digits-words", "activate": 2, "deactivate": 2, "reverse": true}

NAME.plan.json and NAME.plan.toml hold the rules of a plan (steering/plan_file.py), which name maps and bias files.

NAME/map.json is the map of a learnt steering (models/user_maps.py), which comes before a NAME.json.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from .._util.disk import cannot_write
from .._util.files import parse_json, read_bytes, replacing, require_writable
from .._util.locks import OutputLock
from .._util.windows import is_device
from ..errors import BusyError, FormatError, StorageError, UsageError
from ..maps.expert_map import ExpertMap
from ..models.user_maps import MAP_FILE, maps_in
from ..steering.bias_file import BiasFile, read_bias, write_bias
from ..steering.plan import AnySteering, SteeringPlan
from ..steering.plan_file import SUFFIXES as PLAN_SUFFIXES
from .api_errors import ApiError, storage_error
from .choices import whole_choice
from .folder_changes import change_together, old_view, undo_unfinished
from .plans import sources
from .schemas import NAME_PATTERN, SteeringChoice

T = TypeVar("T")
Kind = Literal["map", "bias", "choice", "plan", "plan in toml"]

_SUFFIXES: dict[Kind, str] = {
    "choice": ".choice.json",
    "plan": PLAN_SUFFIXES[0],
    "plan in toml": PLAN_SUFFIXES[1],
    "map": ".json",
    "bias": ".gguf",
}
_ENDINGS = (".choice", ".plan")  # of names whose map would have the file of something else
_MAX_CHOICE = 64 << 10


class KeptChoice(SteeringChoice):
    """A choice of experts in a file. With `map_sha256` a server wrote it: all of the choice, from that map alone."""

    map_sha256: str | None = None


def name_of_file(path: Path) -> str:
    """The name under which a file is registered: its stem in lower case, other characters than a-z 0-9 . _ - as "-".

    Raises UsageError if nothing is left.
    """
    stem = path.name
    for suffix in _SUFFIXES.values():
        stem = stem.removesuffix(suffix)
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip(".-")[:64]
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(f"{path}: its name cannot be used in requests; take letters, digits, '.', '_' and '-'")
    return name


def map_from_json(data: dict[str, Any], name: str) -> ExpertMap:
    """Read a map out of a request. Raises FormatError, which names the field."""
    return ExpertMap.from_dict(data, f"{name}.json")


def bias_from_base64(text: str, name: str) -> BiasFile:
    """Read a bias file out of a request. Raises FormatError."""
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise FormatError("bias: not base64; send the bytes of a bias file that way") from None
    return _read(data, f"{name}.gguf", read_bias)


def _read(data: bytes, name: str, reader: Callable[[Path], T]) -> T:
    """Read bytes by a function that reads files; its messages contain `name`, not the path of the temporary file.

    Raises FormatError; ApiError when there is no room for the temporary file.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="steermoe-") as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            try:
                return reader(path)
            except FormatError as error:
                if failed := _os_error(error):  # it is the server's own file
                    raise failed from None
                raise FormatError(str(error).replace(str(path), name)) from None
    except OSError as error:
        raise storage_error(error) from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError that an error came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class MapsFolder:
    """Reads the folder, and writes into it if that is allowed. Of its subfolders only learnt steerings count."""

    def __init__(self, path: Path, writable: bool) -> None:
        self.path, self.writable = path, writable
        self._own: set[Path] = set()  # registered or written by this server: a request may replace them
        self._named_otherwise: set[str] = set()
        self._lock = OutputLock(path)

    def open(self) -> None:
        """Make the folder this server's alone, if it writes there, and undo what a killed one had begun.

        Raises BusyError (another server writes there), UsageError, StorageError.
        """
        if not self.writable or self._lock.held:
            return
        require_writable(self.path / "map.json")
        try:
            self._lock.acquire()
        except BusyError as error:
            who = str(error).partition(": ")[2].partition(" is writing")[0]
            raise BusyError(
                f"--maps {self.path}: {who} writes maps there; end it, give another folder, or leave out "
                "--maps-writable"
            ) from None
        try:
            undo_unfinished(self.path)
        except OSError as error:
            self._lock.release()
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()

    def files(self) -> Iterator[tuple[str, Path, Kind]]:
        """(name, path, kind) of what can be registered: learnt steerings, then files in the order of their names."""
        for name, path in maps_in(self.path).items():
            if path.name == MAP_FILE and path.parent != self.path:
                yield name, path, "map"
        old, added = old_view(self.path)  # empty, unless another server's change is not complete
        there = {path.name: path for path in self.path.iterdir() if path.name not in added} | old
        for name, path in sorted(there.items()):
            kind = next((kind for kind, suffix in _SUFFIXES.items() if name.endswith(suffix)), None)
            if kind is None or name.startswith(".") or not path.is_file():
                continue
            yield name_of_file(Path(name)), path, kind

    def take(self, path: Path) -> None:
        """Note that a file is registered under its name."""
        self._own.add(path)
        name = name_of_file(path)
        if path not in (self._file(name, kind) for kind in _SUFFIXES):
            self._named_otherwise.add(name)

    def holds(self, name: str) -> bool:
        """Whether a request may replace or delete the files of a name: not links, nor files with another spelling."""
        own = [path for kind in _SUFFIXES if (path := self._file(name, kind)) in self._own]
        free = self.writable and name not in self._named_otherwise
        return free and bool(own) and not any(path.is_symlink() for path in own)

    @staticmethod
    def read_choice(path: Path, name: str) -> KeptChoice:
        """Read a NAME.choice.json. Raises FormatError."""
        try:
            data = parse_json(read_bytes(path, "a choice of experts", _MAX_CHOICE).decode("utf-8"))
            return KeptChoice.model_validate({"map": name} | data if isinstance(data, dict) else data)
        except ValidationError as error:
            first = error.errors()[0]
            where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
            raise FormatError(f"{path}: {where}{first['msg'].removeprefix('Value error, ')}") from None
        except ValueError as error:
            raise FormatError(f"{path}: not a choice of experts: not JSON ({error})") from None

    def write(self, name: str, steering: AnySteering, of_map: str | None) -> None:
        """Write a steering as NAME.* in place of what the name had; `of_map` is the map whose numbers it changes.

        After any error the folder is as it was. Raises ApiError: for a file that this server may not replace, and when
        the disk is full or fails.
        """
        if is_device(name) or name.endswith(_ENDINGS):
            raise ApiError(400, f"name: {name!r} is no name for a file; choose another", param="name")
        wanted: dict[Path, Any] = {}
        choice = {} if isinstance(steering, SteeringPlan) else whole_choice(steering)
        if isinstance(steering, SteeringPlan):
            wanted[self._file(name, "plan")] = steering.to_json() | {"made_of": sources(steering)}
        elif of_map is not None:
            # Until it is read again the name of the map may be given to another one, or to other numbers.
            digest = {} if steering.expert_map is None else {"map_sha256": steering.expert_map.sha256}
            wanted[self._file(name, "choice")] = {"map": of_map} | digest | choice
        elif steering.expert_map is not None:
            wanted[self._file(name, "map")] = steering.expert_map
            if choice:
                wanted[self._file(name, "choice")] = choice
        else:
            wanted[self._file(name, "bias")] = steering.bias
        for kind in _SUFFIXES:
            path = self._file(name, kind)
            if (path.exists() or path.is_symlink()) and (path not in self._own or path.is_symlink()):
                raise ApiError(409, f"{path.name}: stands in the maps folder already; choose another name")
        self._change(name, wanted, self._own_files(name) - set(wanted))

    def remove(self, name: str) -> None:
        """Delete the files of a name that this server may replace.

        After any error the folder is as it was. Raises ApiError when the disk fails.
        """
        self._change(name, {}, self._own_files(name))

    def _change(self, name: str, wanted: Mapping[Path, Any], superseded: set[Path]) -> None:
        new = {path.name: partial(_write, content) for path, content in wanted.items()}
        try:
            change_together(self.path, name, new, [path.name for path in superseded])
        except (OSError, StorageError, UsageError) as error:
            raise storage_error(error) from error
        self._own -= superseded
        self._own |= set(wanted)

    def _own_files(self, name: str) -> set[Path]:
        files = {self._file(name, kind) for kind in _SUFFIXES}
        return {path for path in files & self._own if not path.is_symlink()}

    def _file(self, name: str, kind: Kind) -> Path:
        path = self.path / f"{name}{_SUFFIXES[kind]}"
        if path.parent != self.path or not re.fullmatch(NAME_PATTERN, name):
            raise ApiError(400, f"name: {name!r} is no name for a file", param="name")
        return path


def _write(content: ExpertMap | BiasFile | dict[str, Any], path: Path) -> None:
    if isinstance(content, ExpertMap):
        content.save(path)
    elif isinstance(content, BiasFile):
        write_bias(content, path)
    else:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n", "utf-8", newline="\n")
