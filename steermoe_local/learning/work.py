"""The folder of a learnt steering while it is made: which steps are finished, under which settings."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._util.disk import cannot_write
from .._util.files import parse_json, read_bytes, replacing
from .._util.locks import OutputLock
from .._util.writing import remove
from ..errors import FormatError, SteerMoEError, UsageError
from ..models.shipped_maps import shipped_maps
from ..models.user_maps import MAP_FILE, PAIRS_FILE, RESULT_FILE, TASK_FILE, user_maps_folder

STATE = "state.json"
_FORMAT = "steermoe-learning"
_VERSION = 1
_MOST = 64 << 20
_AGAIN = "start over with --restart"
FILES = (
    RESULT_FILE,
    MAP_FILE,
    PAIRS_FILE,
    TASK_FILE,
    "bias.gguf",
    "report.md",
    "report.html",
    "README.md",
    "gain.png",
    "map.png",
    "effects.png",
)
"""What a run writes into the folder, besides the folder of its work."""


class WorkFolder:
    """FOLDER/NAME with its folder of work; a context manager, whose block has the lock of the folder.

    `steps` are the results of the finished steps by name, as JSON values; `facts` are further ones that later
    processes of the run need (speed, expected and spent seconds).
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Make the folder. Raises UsageError, StorageError."""
        self.folder = folder / name
        self.work = self.folder / "work"
        self.name = name
        self.steps: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        self._lock = OutputLock(self.folder)

    def __enter__(self) -> WorkFolder:
        """Take the lock. Raises BusyError."""
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if not self._settings:  # forgotten: a folder of its own goes, after the lock in it
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def path(self, name: str) -> Path:
        """A file of the result."""
        return self.folder / name

    def begin(self, settings: Mapping[str, Any], resume: bool, restart: bool) -> None:
        """Begin a run under settings (JSON values), or go on with one that was begun under the same.

        Raises UsageError: a finished or interrupted run is there, or one under other settings.
        """
        self._settings = json.loads(json.dumps(dict(settings)))
        try:
            self._open(resume, restart)
        except SteerMoEError:
            self._settings = {}  # nothing is to be written
            raise
        try:
            self.work.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(self.work, error) from None
        self.save()

    def _open(self, resume: bool, restart: bool) -> None:
        """Clear the folder, or read the run that is in it, or refuse what is there."""
        if restart:
            self._clear()
        elif self.path(RESULT_FILE).exists():
            self._refuse_finished()
        elif (self.work / STATE).exists():
            made = self._read(self.work / STATE)
            if not resume:
                raise UsageError(
                    f"{self.folder}: an interrupted run; go on with --resume, or start over with --restart"
                )
            self._require_same(made["settings"])
            self.steps, self.facts = made["steps"], made["facts"]
        elif (loose := self.folder.with_name(f"{self.name}.json")).exists():
            raise UsageError(f"{loose}: a map of this name, which the steering would hide; choose another name")
        elif self.path(MAP_FILE).exists():
            raise UsageError(f"{self.path('map.json')}: a map that was not learnt here; choose another name")

    @property
    def note(self) -> str:
        """What is to be said of the name before the run; "" if nothing is."""
        if self.name not in shipped_maps() or self.folder.parent != user_maps_folder():
            return ""
        return (
            f"{self.name} is the name of a map that ships, too: --map {self.name} will be what is learnt now, as long "
            f"as {self.folder} is there"
        )

    def finish(self, step: str, result: Mapping[str, Any]) -> None:
        """Keep the result of a step; it is not computed again."""
        self.steps[step] = json.loads(json.dumps(dict(result)))
        self.save()

    def save(self) -> None:
        """Write the state; nothing of a forgotten run. Raises StorageError, UsageError."""
        if not self._settings:
            return
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": self._settings,
            "steps": self.steps,
            "facts": self.facts,
        }
        self.write(self.work / STATE, json.dumps(data, ensure_ascii=False) + "\n")

    def write(self, path: Path, text: str) -> None:
        """Write a text file. Raises StorageError, UsageError."""
        with replacing(path, cure="go on with the same command and --resume") as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")

    def forget(self) -> None:
        """Remove what a run without a finished step has left; an empty folder goes with the lock."""
        self._clear()
        self._settings = {}

    def _clear(self) -> None:
        for name in FILES:
            remove(self.path(name))
        if self.work.is_dir() and not self.work.is_symlink():
            shutil.rmtree(self.work, ignore_errors=True)

    def _refuse_finished(self) -> None:
        made = self._read(self.path(RESULT_FILE), "steermoe-learn")
        model, now = made.get("model"), self._settings.get("model")
        if isinstance(model, dict) and isinstance(now, dict) and model.get("identity") != now.get("identity"):
            raise UsageError(
                f"{self.name}: learnt already, for another model ({model.get('file')}); choose another name, or make "
                "it anew for this one with --restart"
            )
        raise UsageError(
            f"{self.name}: learnt already ({self.folder}); use it with --map {self.name}, or make it anew with "
            "--restart"
        )

    def _require_same(self, made: Mapping[str, Any]) -> None:
        for name in dict.fromkeys([*self._settings, *made]):
            if made.get(name) != self._settings.get(name):
                raise UsageError(
                    f"{self.folder}: begun with {name} {_short(made.get(name))}, now it is "
                    f"{_short(self._settings.get(name))}; give the same options, or {_AGAIN}"
                )

    def _read(self, path: Path, format: str = _FORMAT) -> dict[str, Any]:
        """A JSON file of this folder. Raises FormatError."""
        try:
            data = parse_json(read_bytes(path, "a learning run", _MOST).decode("utf-8"))
        except ValueError:
            data = None
        parts = ("settings", "steps", "facts") if format == _FORMAT else ()
        whole = isinstance(data, dict) and data.get("format") == format and data.get("version") == _VERSION
        if not whole or not all(isinstance(data.get(part), dict) for part in parts):
            raise FormatError(f"{path}: damaged, or of another version; {_AGAIN}")
        found: dict[str, Any] = data
        return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
