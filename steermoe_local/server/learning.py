"""What a request to learn becomes: a lesson under a name that is free, in the folder where it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._util.files import require_writable
from ..behaviours.builtin import behaviour, behaviours
from ..errors import StorageError, UsageError
from ..evaluation.tasks.builtin import is_embedded
from ..identity import ModelIdentity
from ..models.user_maps import MAP_FILE, RESULT_FILE, check_map_name
from .api_errors import ApiError, storage_error
from .learn_jobs import LearnJobs, Lesson, Source
from .registry import SteeringRegistry
from .schemas_learn import LearnRequest

_ON_CPU = ("--gpu-layers=0", "--device=none")


def learn_jobs(model: Path, registry: SteeringRegistry, options: Sequence[str] = ()) -> LearnJobs:
    """The jobs of a server: each is of its model, under `options` of the command line; what works is served then.

    The jobs compute on the CPU: the server's own weights and cache lie in the memory of its devices, and nothing of a
    process that was stopped there could be taken back for an answer.
    """
    folder = registry.learnt_folder
    words = [f"--model={model.absolute()}", f"--maps-dir={folder.absolute()}", *_ON_CPU, *options]
    return LearnJobs(words, lambda name: add_learnt(registry, name), hidden=(model.absolute().parent, folder))


def add_learnt(registry: SteeringRegistry, name: str) -> None:
    """Register what was learnt under a name. Raises FormatError, ModelMismatchError, UsageError."""
    registry.add_learnt(name, registry.learnt_folder / name / MAP_FILE)


def lesson_of(request: LearnRequest, registry: SteeringRegistry) -> Lesson:
    """The lesson of a request. Raises ApiError: 400 for a name that no map can have, 409 for one that is taken."""
    name = _name_of(request)
    folder = registry.learnt_folder
    before = _before(request, name, folder, registry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_writable(folder / MAP_FILE)
    except (OSError, StorageError, UsageError) as error:
        raise storage_error(error) from error
    source: Source
    options: Sequence[str]
    if request.pairs is not None:
        source, options = "pairs", ()
    elif request.behaviour is not None:
        source, options = "behaviour", (f"--behaviour={behaviour(request.behaviour).name}",)
    else:
        source, options = "instructions", (f"--like={request.like}", f"--unlike={request.unlike}")
    pairs = tuple(example.pair() for example in request.pairs or ())
    return Lesson(name, source, (*before, *options), pairs)


def _name_of(request: LearnRequest) -> str:
    name = request.name or request.behaviour or ""
    try:
        check_map_name(name)
    except UsageError as error:
        raise ApiError(400, f"name: {error}", param="name", code="invalid_value") from None
    return name


def _before(request: LearnRequest, name: str, folder: Path, registry: SteeringRegistry) -> tuple[str, ...]:
    """What is to be done with what stands under the name: nothing, go on with it, or begin anew."""
    there = folder / name
    if there.is_symlink() or (folder / f"{name}.json").exists() or (there.exists() and not there.is_dir()):
        raise ApiError(409, f"{name}: taken in the maps folder; choose another name", code="name_taken")
    done = (there / RESULT_FILE).exists() or (there / MAP_FILE).exists()
    if not there.exists() and any(entry.name == name for entry in registry.entries()):
        raise ApiError(409, f"{name}: the name of another steering; choose another", code="name_taken")
    if done and not request.replace:
        raise ApiError(
            409, f"{name}: learnt already; choose another name, or send replace: true", code="learnt_already"
        )
    if request.replace:
        return ("--restart",) if there.exists() else ()
    return ("--resume",) if there.exists() else ()


def lessons(model: ModelIdentity | None) -> list[dict[str, Any]]:
    """The behaviours that can be learnt of a model by their names; the embedded model's own come first."""
    if model is None:
        return []
    own = [one for one in behaviours() if one.model and is_embedded(model)]
    names = ("name", "title", "positive", "negative", "about", "one_way")
    found = [*own, *(one for one in behaviours() if not one.model)]
    return [{"object": "behaviour"} | {name: getattr(one, name) for name in names} for one in found]
