"""What `steermoe` alone says: lines to try, and the models and maps that are here."""

from __future__ import annotations

import queue
import shlex
import threading
from collections.abc import Sequence
from pathlib import Path

import click

from ..errors import SteerMoEError
from ..models.embedded import TINY, embedded_models
from ..models.local_models import LocalModels
from ..models.user_maps import user_maps
from .help_pages import COMMANDS
from .options import settings
from .options.model import folders_from_environment
from .output import print_lines

_MOST = 5  # names of a line
_SECONDS = 0.25  # that looking for models may take: a folder may be of a network


def print_start_page(root: click.Group) -> None:
    """Write it to stdout. Nothing that is damaged or slow keeps it from being written."""
    own = [name for name in _models(_folders(root)) or () if name not in embedded_models()]
    example = shlex.quote(own[0]) if own else "MODEL"
    steerings = list(user_maps())
    rows = [
        (f"steermoe chat {TINY} --map digits-words", "chat with the model that is included, steered"),
        (f'steermoe run {TINY} "Add seven and four."', "one answer"),
    ]
    if "learn" in root.commands:
        rows.append((f"steermoe learn NAME -m {example}", "make a steering of your own, measured"))
    else:
        rows.append(("steermoe demo", "find, steer and measure three behaviours of it"))
    width = max(len(line) for line, _ in rows)
    lines = [
        "Steer Mixture-of-Experts GGUF models. To try:",
        "",
        *(f"  {line:{width}}  {what}" for line, what in rows),
        "",
        f"Models here: {_listed([*embedded_models(), *own], 'steermoe models')}",
        f"Your steerings: {_listed(steerings, 'steermoe models') if steerings else 'none yet'}",
        f"Further commands: {', '.join(name for name in COMMANDS['Get started'] if name in root.commands)}, ...",
        "Help: steermoe --help, steermoe COMMAND --help",
    ]
    print_lines("\n".join(lines))


def _listed(names: Sequence[str], command: str) -> str:
    """The first names, and how many more there are, which `command` lists."""
    more = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f" and {more} more ({command})" if more > 0 else "")


def _folders(root: click.Group) -> tuple[Path, ...]:
    """The models folders of the environment, else of the configuration, which may be broken."""
    if given := folders_from_environment():
        return given
    try:
        found = settings.default_map(root).get("models", {}).get("models_dirs", ())
    except SteerMoEError:
        return ()
    return tuple(Path(folder).expanduser() for folder in found)


def _models(folders: tuple[Path, ...]) -> list[str] | None:
    """Names of the models on this machine; None if looking for them takes longer than `_SECONDS`, or fails."""
    found: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()

    def look() -> None:
        try:
            local = LocalModels.scan(folders)
            found.put([local.name_of(model) for model in local.models() if not model.missing])
        except (SteerMoEError, OSError):
            found.put(None)

    threading.Thread(target=look, daemon=True).start()
    try:
        return found.get(timeout=_SECONDS)
    except queue.Empty:
        return None
