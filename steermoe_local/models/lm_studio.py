"""Where LM Studio keeps its models: in its home folder, or in the folder that its settings name.

The files are PUBLISHER/REPO/FILE.gguf, as in any models folder. Its home is ~/.lmstudio, in older versions
~/.cache/lm-studio, or what the file ~/.lmstudio-home-pointer names; `downloadsFolder` of settings.json in it is the
models folder that was chosen (as LM Studio's command `lms` reads them).
"""

from __future__ import annotations

import os
from pathlib import Path

from .._util.json_text import JsonLimits, parse_json
from .._util.regular_files import open_regular

_MAX_POINTER = 4096  # bytes: it holds a path
_MAX_SETTINGS = 1 << 20
_LIMITS = JsonLimits(values=20_000, containers=10_000, keys=5_000)


def lm_studio_folders() -> list[Path]:
    """LM Studio's models folders, those of its settings first; none need exist. What cannot be read is left out."""
    home = Path.home()
    homes = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    if (named := _folder(_text(home / ".lmstudio-home-pointer", _MAX_POINTER).strip())) is not None:
        homes.insert(0, named)
    chosen = [folder for at in homes if (folder := _downloads(at / "settings.json")) is not None]
    return list(dict.fromkeys([*chosen, *(at / "models" for at in homes)]))


def _downloads(settings: Path) -> Path | None:
    """The models folder that a settings file names."""
    try:
        data = parse_json(_text(settings, _MAX_SETTINGS), _LIMITS)
    except ValueError:
        return None
    found = data.get("downloadsFolder") if isinstance(data, dict) else None
    return _folder(found) if isinstance(found, str) else None


def _folder(text: str) -> Path | None:
    """A folder that a file names: an absolute path, so that it does not depend on where the program was started."""
    if not text or not text.isprintable():
        return None
    path = Path(os.path.expanduser(text))
    return path if path.is_absolute() else None


def _text(path: Path, most: int) -> str:
    """The text of a small file, "" if it is larger, no UTF-8, or cannot be read."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
        return "" if len(data) > most else data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""
