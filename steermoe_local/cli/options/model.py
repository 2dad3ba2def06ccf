"""The options that name a model, and fetching a model that is not on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..._util.files import human_size
from ..._util.visible import visible
from ...errors import ModelError, UsageError
from ...models.hub import is_offline
from ...models.names import ModelName
from ..output import say, warn
from .groups import MODEL, is_given, option_group, rank
from .secrets import SecretOption
from .system_text import UserPath

if TYPE_CHECKING:
    from ...model_files.model_info import ModelInfo
    from ...models.hub_models import HubModel

MODELS_VARIABLE = "STEERMOE_MODELS"


class ModelText(click.ParamType):  # type: ignore[type-arg, unused-ignore] # generic only in newer click
    """The name of a model: `tiny`, a GGUF file, a short name, or USER/REPO[:QUANT] of the hub's cache."""

    name = "model"


class ModelPath(ModelText):
    """The name of a model, resolved to its file; the models folders are those of STEERMOE_MODELS."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Resolve the name. The file is not read, so that it may turn out to be no model later."""
        if isinstance(value, Path):
            return value
        from ...models.local_models import resolve_model

        return resolve_model(value, folders_from_environment())


def folders_from_environment() -> tuple[Path, ...]:
    """The models folders of STEERMOE_MODELS, separated as in PATH, where there is no --models-dir."""
    text = os.environ.get(MODELS_VARIABLE) or os.environ.get(f"{MODELS_VARIABLE}_DIR", "")
    return tuple(Path(os.path.expanduser(folder)) for folder in text.split(os.pathsep) if folder)


models_dir_option = click.option(
    "--models-dir",
    "models_dirs",
    type=UserPath(file_okay=False, path_type=Path),
    multiple=True,
    envvar=MODELS_VARIABLE,
    metavar="DIR",
    help="Folder of GGUF files; -m takes their names. Can be given again.",
)
offline_option = click.option(
    "--offline", is_flag=True, help="Use no network: take what is on this machine, as with HF_HUB_OFFLINE=1."
)

MODEL_OPTIONS = (
    click.option(
        "-m",
        "--model",
        type=ModelText(),
        envvar="STEERMOE_MODEL",
        metavar="MODEL",
        help="`tiny`, a GGUF file, or the name of a model (steermoe models).",
    ),
    click.option(
        "-hf",
        "-hfr",
        "--hf-repo",
        metavar="REPO[:QUANT]",
        help="Model of the Hugging Face hub, by name; fetched if not here.",
    ),
    click.option("-hff", "--hf-file", metavar="FILE", help="File of that repository, instead of QUANT."),
    click.option(
        "-hft",
        "--hf-token",
        cls=SecretOption,
        instead="the variable HF_TOKEN",
        metavar="TOKEN",
        help="Access token for the hub.  [default: HF_TOKEN]",
    ),
    offline_option,
    models_dir_option,
)


def resolve_named(
    model: str | None,
    hf_repo: str | None,
    hf_file: str | None,
    hf_token: str | None,
    offline: bool,
    models_dirs: tuple[Path, ...],
) -> Path:
    """The path of the model that is named nearest: on the command line, in the environment, in the configuration."""
    if model is None and hf_repo is None:
        raise UsageError("which model? give -m MODEL (a GGUF file, tiny) or -hf USER/REPO[:QUANT]")
    if model is not None and hf_repo is not None and rank("model") == rank("hf_repo"):
        raise UsageError(f"-m {model} and -hf {hf_repo} both name a model; give one of them")
    if hf_repo is not None and (model is None or rank("hf_repo") < rank("model")):
        return fetch_if_missing(hf_repo, hf_file, hf_token, offline, models_dirs)
    if hf_file and is_given("hf_file"):
        raise UsageError("-hff goes with -hf USER/REPO")
    assert model is not None
    from ...models.local_models import resolve_model

    return resolve_model(model, models_dirs)


COMMON = ("model", "hf_repo")

model_option = option_group(resolve_named, "model", MODEL_OPTIONS, heading=MODEL, common=COMMON)
"""-m and -hf, as llama.cpp names them; the command gets the path of the model as `model`."""


def fetch_if_missing(
    text: str, file: str | None, token: str | None, offline: bool, models_dirs: tuple[Path, ...]
) -> Path:
    """Path of a model of the hub: on this machine, else fetched. Raises ModelError, UsageError, ResourceError."""
    from ...models.local_models import LocalModels

    local = LocalModels.scan(models_dirs)
    if found := local.find(text, file):
        return found.path
    if is_offline(offline):
        raise local.not_here(text, OFFLINE)
    from ...models.hub_models import find_on_hub

    model = find_on_hub(ModelName.parse(text), file=file, token=token)
    check(model)
    say(f"fetching {visible(describe(model))}")
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
        warn(message)
    return info


def describe(model: HubModel) -> str:
    """One line on a model of the hub: name, files, size."""
    n_files = len(model.model.paths)
    files = f"{n_files} files" if n_files > 1 else model.model.paths[0]
    return f"{model.full_name} ({files}, {human_size(model.model.size)})"


def fetch(model: HubModel, folder: Path | None = None) -> list[Path]:
    """Fetch it; when that is interrupted or fails, say what is kept and how to go on."""
    try:
        return model.fetch(folder)
    except (KeyboardInterrupt, ModelError):
        if kept := model.bytes_here(folder):
            size = human_size(model.model.size)
            say(f"{human_size(kept)} of {size} are kept; the same command goes on from there")
        raise
