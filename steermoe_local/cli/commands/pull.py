"""steermoe pull."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..._util.files import human_size
from ..._util.visible import visible
from ...errors import UsageError
from ...identity import UNKNOWN_ROUTER
from ...model_files.gating import ROUTED
from ...models.embedded import embedded_models
from ...models.hub import is_offline
from ...models.names import ModelName, short_names
from ..options.common import json_option, maps_folders_option
from ..options.model import OFFLINE, check, describe, fetch, folders_from_environment, offline_option
from ..options.secrets import SecretOption
from ..options.system_text import UserPath
from ..output import print_json, print_lines, progress_bar, say, warn
from ..streams import put

if TYPE_CHECKING:
    from ...model_files.model_info import ModelInfo
    from ...models.hub_models import HubModel
    from ...models.local_facts import LocalMap


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in short_names() if name.startswith(incomplete)]


@click.command()
@click.argument("name", metavar="USER/REPO[:QUANT]", shell_complete=_complete)
@click.option(
    "--revision",
    metavar="REV",
    allow_from_autoenv=False,
    help="Branch, tag or commit of the repository.  [default: main]",
)
@click.option(
    "--file",
    metavar="FILE",
    allow_from_autoenv=False,  # `run` has another
    help="File of the repository to fetch, instead of QUANT.",
)
@click.option(
    "--dir",
    "folder",
    type=UserPath(file_okay=False, path_type=Path),
    metavar="DIR",
    allow_from_autoenv=False,
    help="Fetch into DIR/USER/REPO, a models folder, instead of the hub's cache.",
)
@maps_folders_option("model")
@click.option(
    "-hft",
    "--hf-token",
    "--token",
    "token",
    cls=SecretOption,
    instead="the variable HF_TOKEN",
    metavar="TOKEN",
    help="Access token.  [default: HF_TOKEN]",
)
@offline_option
@click.option(
    "--force",
    is_flag=True,
    allow_from_autoenv=False,  # elsewhere it is about maps
    help="Fetch a model that cannot be steered, too.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    allow_from_autoenv=False,
    help="Look at the repository and the header; fetch nothing.",
)
@json_option
def pull(
    name: str,
    revision: str | None,
    file: str | None,
    folder: Path | None,
    maps_dirs: tuple[Path, ...],
    token: str | None,
    offline: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fetch a model from the Hugging Face hub and print its path.

    The name is USER/REPO, with a quantization behind a colon (else Q4_K_M, or what there is), or a short name
    (`steermoe models --short-names`). A split model is fetched whole. Before the download the file's header is read,
    to see that the model is a Mixture of Experts that can be steered. Every file is verified by the hub's SHA-256. Run
    again, an interrupted download goes on where it stopped.

    \b
    Examples:
      steermoe pull olmoe-1b-7b
      steermoe pull allenai/OLMoE-1B-7B-0125-Instruct-GGUF:Q8_0 --dry-run
    """
    if name in embedded_models():
        raise UsageError(f"{name}: ships with the program, there is nothing to fetch; use it with -m {name}")
    wanted = ModelName.parse(name, revision)
    if is_offline(offline):
        _local(wanted, file, folder, dry_run, as_json)
        return
    from ...models.hub_models import find_on_hub
    from ...models.local_facts import maps_in

    model = find_on_hub(wanted, file=file, token=token)
    say(visible(describe(model)))
    paths: list[Path] = []
    if not dry_run and model.local_path(folder):
        say("it is here; comparing it with the hub's SHA-256")
        paths = fetch(model, folder)
    info = check(model, folder, force)
    architecture = info.architecture if info.architecture in ROUTED else repr(info.architecture)
    say(f"{architecture}, {experts(info)}" if info.is_moe else f"{architecture}, no experts")
    maps = _fitting(model, info, maps_in(maps_dirs, warn))
    if maps:
        say(f"maps that fit: {visible(', '.join(item.name for item in maps))}")
    here = model.bytes_here(folder)
    if 0 < here < model.model.size:
        say(f"{human_size(here)} of {human_size(model.model.size)} are here already")
    free = model.check_space(folder)
    if not dry_run:
        paths = paths or fetch(model, folder)
        _hint(paths[0], folder)
    if as_json:
        print_json(_result(model, info, maps, here, free, paths))
    elif dry_run:
        print_lines(f"would fetch {human_size(model.model.size - here)} of {human_size(model.model.size)}")
    else:
        put(str(paths[0]))


def experts(info: Any) -> str:
    """Experts in a phrase: "64 experts, top-8, 16 layers"."""
    return f"{info.n_expert} experts, top-{info.n_expert_used}, {info.n_layer} layers"


def _local(wanted: Any, file: str | None, folder: Path | None, dry_run: bool, as_json: bool) -> None:
    """Without a network: say where it is, if it is."""
    from ...models.local_models import LocalModels

    local = LocalModels.scan([folder] if folder else folders_from_environment())
    found = local.find(str(wanted), file)
    if found is None:
        raise local.not_here(str(wanted), OFFLINE)
    if as_json:
        print_json(
            {"name": local.name_of(found), "paths": [str(found.path)], "size_bytes": found.size, "fetched": False}
        )
    else:
        put(str(found.path))


def _fitting(model: HubModel, info: ModelInfo, maps: list[LocalMap]) -> list[LocalMap]:
    """The maps that were made for the model: its routers are read from the hub if any has its shape."""
    identity = info.identity
    if identity is None:
        return []
    possible = [item for item in maps if replace(item.identity, router_sha256=identity.router_sha256) == identity]
    if possible and identity.router_sha256 == UNKNOWN_ROUTER:
        with progress_bar() as show:
            identity = model.info(routers=True, progress=show).identity
    return [item for item in possible if item.identity == identity]


def _hint(path: Path, folder: Path | None) -> None:
    """Say what to give to -m."""
    from ...models.local_models import LocalModels

    local = LocalModels.scan([*([folder] if folder else []), *folders_from_environment()])
    named = next((model for model in local.models() if model.path == path), None)
    name = local.name_of(named) if named else str(path)
    where = f" --models-dir {folder}" if folder and name != str(path) else ""
    say(visible(f'try it: steermoe run -m {name}{where} -p "..."'))


def _result(
    model: HubModel, info: ModelInfo, maps: list[LocalMap], here: int, free: int, paths: list[Path]
) -> dict[str, Any]:
    return {
        "name": model.full_name,
        "repository": model.name.repo,
        "revision": model.name.revision,
        "commit": model.commit,
        "quantization": model.model.tag,
        "files": [
            {"path": path, "size_bytes": size} for path, size in zip(model.model.paths, model.model.sizes, strict=True)
        ],
        "size_bytes": model.model.size,
        "here_before_bytes": here,
        "free_bytes": free,
        "architecture": info.architecture,
        "n_layer": info.n_layer,
        "n_expert": info.n_expert,
        "n_expert_used": info.n_expert_used,
        "steerable_layers": list(info.steerable_layers),
        "maps": [{"name": item.name, "path": str(item.path)} for item in maps],
        "paths": [str(path) for path in paths],
        "fetched": bool(paths),
    }
