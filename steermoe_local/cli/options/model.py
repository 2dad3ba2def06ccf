"""The options that name a model, the same for every command that takes one, and fetching it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from ...errors import ModelError, UsageError

if TYPE_CHECKING:
    from ...model_files.model_info import ModelInfo
    from ...models.hub_models import HubModel
    from ...models.local_facts import LocalMap

F = TypeVar("F", bound=Callable[..., Any])

MODELS_VARIABLE = "STEERMOE_MODELS"
_RANK = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)


class ModelText(click.ParamType):  # type: ignore[type-arg, unused-ignore] # generic only in newer click
    """A model as a person names it: `tiny`, a GGUF file, a short name, USER/REPO[:QUANT] of the hub's cache."""

    name = "model"


class ModelPath(ModelText):
    """The same, resolved to its file. Models folders are those of STEERMOE_MODELS."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Resolve the name; whether the file is a model is the command's to find out."""
        if isinstance(value, Path):
            return value
        from ...models.local_models import resolve_model

        return resolve_model(value, folders_from_environment())


def folders_from_environment() -> tuple[Path, ...]:
    """The models folders of STEERMOE_MODELS, separated as in PATH, where there is no --models-dir."""
    text = os.environ.get(MODELS_VARIABLE) or os.environ.get(f"{MODELS_VARIABLE}_DIR", "")
    return tuple(Path(folder) for folder in text.split(os.pathsep) if folder)


def models_dir_option(command: F) -> F:
    """--models-dir."""
    return click.option(
        "--models-dir",
        "models_dirs",
        type=click.Path(file_okay=False, path_type=Path),
        multiple=True,
        envvar=MODELS_VARIABLE,
        metavar="DIR",
        help="Folder of GGUF files; -m takes their names. Can be given again.",
    )(command)


def offline_option(command: F) -> F:
    """--offline."""
    return click.option(
        "--offline", is_flag=True, help="Use no network: take what is on this machine, as with HF_HUB_OFFLINE=1."
    )(command)


_OPTIONS = (
    click.option(
        "-m",
        "--model",
        type=ModelText(),
        envvar="STEERMOE_MODEL",
        metavar="MODEL",
        help="GGUF file, `tiny` for the embedded model, or the name of a fetched one (steermoe models).",
    ),
    click.option(
        "-hf",
        "-hfr",
        "--hf-repo",
        metavar="USER/REPO[:QUANT]",
        help="Model on the Hugging Face hub, fetched if it is not here; a short name does, too.  [quant: Q4_K_M]",
    ),
    click.option("-hff", "--hf-file", metavar="FILE", help="File of that repository, instead of QUANT."),
    click.option("-hft", "--hf-token", metavar="TOKEN", help="Access token for the hub.  [default: HF_TOKEN]"),
    offline_option,
    models_dir_option,
)


def model_option(command: F) -> F:
    """-m and -hf, as llama.cpp names them; the command gets the model's path as `model`."""

    @functools.wraps(command)
    def with_model(**arguments: Any) -> Any:
        names = ("model", "hf_repo", "hf_file", "hf_token", "offline", "models_dirs")
        model = _resolve(**{name: arguments.pop(name) for name in names})
        return command(**arguments, model=model)

    wrapped: Any = with_model
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return cast(F, wrapped)


def _resolve(
    model: str | None,
    hf_repo: str | None,
    hf_file: str | None,
    hf_token: str | None,
    offline: bool,
    models_dirs: tuple[Path, ...],
) -> Path:
    """The path of the model that is named nearest: on the command line, in the environment, in the configuration."""
    source = click.get_current_context().get_parameter_source
    ranks = {
        name: _RANK.index(found) if (found := source(name)) in _RANK else len(_RANK)
        for name, value in (("model", model), ("hf_repo", hf_repo))
        if value is not None
    }
    if not ranks:
        raise UsageError("which model? give -m MODEL (a GGUF file, tiny) or -hf USER/REPO[:QUANT]")
    if len(set(ranks.values())) < len(ranks):
        raise UsageError(f"-m {model} and -hf {hf_repo} both name a model; give one of them")
    if min(ranks, key=ranks.__getitem__) == "hf_repo" and hf_repo is not None:
        return fetch_if_missing(hf_repo, hf_file, hf_token, offline, models_dirs)
    if hf_file and source("hf_file") == ParameterSource.COMMANDLINE:
        raise UsageError("-hff goes with -hf USER/REPO")
    from ...models.local_models import resolve_model

    return resolve_model(cast(str, model), models_dirs)


def fetch_if_missing(
    text: str, file: str | None, token: str | None, offline: bool, models_dirs: tuple[Path, ...]
) -> Path:
    """Path of a model of the hub: on this machine, else fetched. Raises ModelError, UsageError, ResourceError."""
    from ...models.hub import is_offline
    from ...models.local_models import LocalModels
    from ...models.names import ModelName

    local = LocalModels.scan(models_dirs)
    if found := local.find(text, file):
        return found.path
    if is_offline(offline):
        raise local.not_here(text, OFFLINE)
    from ...models.hub_models import find_on_hub

    model = find_on_hub(ModelName.parse(text), file=file, token=token)
    check(model)
    click.echo(f"fetching {describe(model)}", err=True)
    return fetch(model)[0]


OFFLINE = ", and the hub is off (--offline, HF_HUB_OFFLINE)"


def check(model: HubModel, folder: Path | None = None, force: bool = False) -> ModelInfo:
    """Read the headers, on the hub if it is not here; refuse what cannot be steered, or warn with `force`.

    Raises ModelError.
    """
    from ...model_files.model_info import model_info
    from ...models.hub_models import why_not_steerable

    here = model.local_path(folder)
    info = model_info(here) if here else model.info()
    if problem := why_not_steerable(info):
        message = f"{model.full_name}: cannot be steered: {problem}"
        if not force:
            raise ModelError(
                f"{message}; nothing was fetched; take a Mixture-of-Experts model (steermoe models --short-names), "
                "or fetch it all the same with steermoe pull --force"
            )
        click.echo(f"warning: {message}", err=True)
    return info


def describe(model: HubModel) -> str:
    """One line on a model of the hub: name, files, size."""
    from ...models.names import human_size

    n_files = len(model.model.paths)
    files = f"{n_files} files" if n_files > 1 else model.model.paths[0]
    return f"{model.full_name} ({files}, {human_size(model.model.size)})"


def fetch(model: HubModel, folder: Path | None = None) -> list[Path]:
    """Fetch it; when that is interrupted or fails, say what is kept and how to go on."""
    from ...models.names import human_size

    try:
        return model.fetch(folder)
    except (KeyboardInterrupt, ModelError):
        kept, size = human_size(model.bytes_here(folder)), human_size(model.model.size)
        click.echo(f"{kept} of {size} are kept; the same command goes on from there", err=True)
        raise


def candidates(info: ModelInfo, maps: list[LocalMap]) -> list[LocalMap]:
    """Maps of a model of this shape, whatever its routers."""
    from dataclasses import replace

    if info.identity is None:
        return []
    return [m for m in maps if replace(m.identity, router_sha256=info.identity.router_sha256) == info.identity]
