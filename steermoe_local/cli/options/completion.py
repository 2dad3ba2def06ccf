"""Shell completion of options and arguments that take a model, a map, a bias file or pairs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from ..._util.visible import visible
from ...errors import SteerMoEError
from ...models.embedded import embedded_models
from ...steering.plan_file import SUFFIXES
from . import settings

_SUFFIXES = {"map": (".json",), "plan": SUFFIXES, "bias": (".gguf",), "pairs": (".jsonl", ".json")}
_MOST = 200  # entries of a folder that are offered


def attach(root: click.Group) -> None:
    """Add completion to the parameters of all commands, by their types and names."""
    for _, command in settings.commands(root):
        for parameter in command.params:
            if parameter._custom_shell_complete is None and (complete := _completer(parameter)) is not None:
                parameter._custom_shell_complete = complete


def _completer(parameter: click.Parameter):  # type: ignore[no-untyped-def] # click's own signature differs by version
    if parameter.type.name == "model":
        return _models
    if isinstance(parameter.type, click.Choice):
        return None  # it knows better
    name = parameter.human_readable_name.strip(".[]").lower()
    names = [name, *(option.removeprefix("--") for option in parameter.opts if option.startswith("--"))]
    what = "map" if parameter.type.name == "map" else next((name for name in names if name in _SUFFIXES), None)
    if what is None:
        return None

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        names = _maps(incomplete) if what == "map" else []
        return names + _files(_SUFFIXES[what], incomplete, alone=not names)

    return complete


def _models(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The embedded models, the local models, and files."""
    names = starting(incomplete, [*embedded_models(), *_local_models(ctx)])
    return names + _files((".gguf",), incomplete, alone=not names)


def _local_models(ctx: click.Context) -> list[str]:
    """Names of the models on this machine. Nothing here may put a traceback into a command line."""
    from ...models.local_models import LocalModels

    try:
        local = LocalModels.scan(ctx.params.get("models_dirs") or ())
        return [local.name_of(model) for model in local.models() if not model.missing]
    except (SteerMoEError, OSError):
        return []


def _maps(incomplete: str) -> list[CompletionItem[str]]:
    """The maps that have names."""
    from ...models.shipped_maps import known_maps

    return starting(incomplete, known_maps())


def starting(incomplete: str, names: Iterable[str]) -> list[CompletionItem[str]]:
    """The names that begin with what was typed."""
    return [
        CompletionItem(name) for name in sorted(set(names)) if name.startswith(incomplete) and visible(name) == name
    ]


def _files(suffixes: tuple[str, ...], incomplete: str, alone: bool) -> list[CompletionItem[str]]:
    """Files with these endings, and folders; folders alone are the shell's own to go on in."""
    name = incomplete.rpartition("/")[2]
    typed = incomplete[: len(incomplete) - len(name)]
    folder = Path(os.path.expanduser(typed or "."))
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(name) or (entry.name.startswith(".") and not name):
                    continue
                if visible(entry.name) != entry.name:  # it would be part of the protocol, or of what a terminal obeys
                    continue
                if entry.is_dir():
                    folders.append(f"{typed}{entry.name}/")
                elif entry.name.lower().endswith(suffixes):
                    files.append(f"{typed}{entry.name}")
    except OSError:
        return []
    if alone and folders and not files:
        return [CompletionItem(incomplete, type="dir")]
    return [CompletionItem(path) for path in [*sorted(files), *sorted(folders)][:_MOST]]
