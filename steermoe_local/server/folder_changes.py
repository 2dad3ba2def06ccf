"""Changes of several files of a folder that happen together or not at all, whatever ends the process in between.

New files are written beside their targets (`.NAME.<12 hex digits>.new`), the old ones are kept under a second name
(`.NAME.<12 hex digits>.old`), and a journal (`.KEY.changing`, JSON) names both. Then the new files get their names and
what is superseded is removed. Removing the journal makes the change count; while the journal is there, the old files
are what the folder holds: `undo_unfinished` brings them back, `old_view` reads them in a folder that is not written.
Every step is on the disk before the next one begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .._util.disk import flush_file, flush_folder
from .._util.files import parse_json, read_bytes, replacing
from .._util.windows import replace
from .._util.writing import require_no_link

_JOURNAL = re.compile(r"\.(.+)\.changing")
_STAGED = re.compile(r"\.(.+\.(?:json|gguf|toml))\.[0-9a-f]{12}\.(?:new|old)")
_TEMPORARY = re.compile(r"\.\..+\.(?:[0-9a-f]{12}\.new|changing)\.[0-9a-f]{12}\.tmp")
_FORMAT = "steermoe-folder-change"
_MAX_JOURNAL = 64 << 10


def change_together(
    folder: Path, key: str, new: Mapping[str, Callable[[Path], None]], remove: Collection[str] = ()
) -> None:
    """Write the files `new` (by name, each by a function that writes a path), and remove the files `remove`.

    `key` is the journal's name; changes of one folder do not overlap. After any error, which is raised again, the
    folder holds what it held before.
    """
    tag = secrets.token_hex(6)
    targets = [name for name in (*new, *remove) if os.path.lexists(folder / name)]
    staged = {name: folder / f".{name}.{tag}.new" for name in new}
    kept = {name: folder / f".{name}.{tag}.old" for name in targets}
    journal = folder / f".{key}.changing"
    content = {"format": _FORMAT, "old": {name: path.name for name, path in kept.items()}}
    content["added"] = [name for name in new if name not in kept]
    begun = False
    try:
        for name, write in new.items():
            write(staged[name])
        for name, path in kept.items():
            _keep(folder / name, path)
        flush_folder(folder)
        begun = True
        with replacing(require_no_link(journal)) as temporary:
            temporary.write_text(json.dumps(content) + "\n", "utf-8", newline="\n")
        for name, path in staged.items():
            replace(path, folder / name)
        for name in set(remove) & set(targets):
            os.unlink(folder / name)
        flush_folder(folder)
        os.unlink(journal)
        flush_folder(folder)
    except BaseException:
        if begun:
            with contextlib.suppress(OSError):  # else the journal stays, and the next start does it
                _undo(folder, content, journal)
        _clean([*staged.values(), *(() if journal.exists() else kept.values())])
        raise
    _clean(kept.values())


def undo_unfinished(folder: Path) -> None:
    """Bring back what stood in the folder before changes that did not end, and remove what they left.

    The caller has the lock of the folder. Raises OSError; FormatError for a damaged journal.
    """
    for name, content in _journals(folder).items():
        _undo(folder, content, folder / name)
    _clean([path for path in folder.iterdir() if _STAGED.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name)])


def old_view(folder: Path) -> tuple[dict[str, Path], set[str]]:
    """(names of files and where their contents are, names that are not there) by the journals of unfinished changes."""
    old: dict[str, Path] = {}
    added: set[str] = set()
    for content in _journals(folder).values():
        old |= {name: folder / kept for name, kept in content["old"].items()}
        added |= set(content["added"])
    return old, added


def _journals(folder: Path) -> dict[str, dict[str, Any]]:
    """The journals of a folder, by their names; each name in them is one of a file in the folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        if not _JOURNAL.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
        try:
            content = parse_json(read_bytes(path, "a journal", _MAX_JOURNAL).decode("utf-8"))
        except ValueError:
            continue  # not of this program: its own are replaced as a whole
        if isinstance(content, dict) and content.get("format") == _FORMAT and _is_sound(content):
            found[path.name] = content
    return found


def _is_sound(content: Mapping[str, Any]) -> bool:
    old, added = content.get("old"), content.get("added")
    if not isinstance(old, dict) or not isinstance(added, list) or not all(isinstance(name, str) for name in added):
        return False
    plain = all(os.path.basename(name) == name and not name.startswith(".") for name in (*old, *added))
    return plain and all(
        isinstance(kept, str) and (match := _STAGED.fullmatch(kept)) and match[1] == name for name, kept in old.items()
    )


def _keep(path: Path, second: Path) -> None:
    """Give a file's contents a second name."""
    try:
        os.link(path, second)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, second)
        fd = os.open(second, os.O_RDWR)
        try:
            flush_file(fd)
        finally:
            os.close(fd)


def _undo(folder: Path, content: Mapping[str, Any], journal: Path) -> None:
    """Bring the old files back. It may be begun again after it was interrupted. Raises OSError."""
    for name, kept in content["old"].items():
        source, target = folder / kept, folder / name
        if source.exists() and not (target.exists() and os.path.samefile(source, target)):
            replace(source, target)
    for name in content["added"]:
        (folder / name).unlink(missing_ok=True)
    flush_folder(folder)
    journal.unlink(missing_ok=True)
    flush_folder(folder)


def _clean(paths: Collection[Path]) -> None:
    """Remove files that nothing needs any more; one that stays does no harm and goes at the next start."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
