"""steermoe run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..bias_file import BiasFile
from ..errors import UsageError
from ..expert_map import ExpertMap
from ..model_info import ModelInfo, model_info
from ._common import LlamaFlags, json_option, llama_options, model_option, print_json
from .bias import make_bias, preset_choice, preset_option

DEFAULT_CONTEXT = 4096


@click.command()
@model_option
@click.option("--bias", type=click.Path(path_type=Path), envvar="STEERMOE_BIAS", help="Bias file to steer with.")
@click.option("--map", "map_file", type=click.Path(path_type=Path), help="Expert map to steer with, by --preset.")
@preset_option
@click.option("-p", "--prompt", required=True, help="What the user says.")
@click.option("-sys", "--system-prompt", help="System message before it.")
@click.option(
    "-n",
    "--n-predict",
    type=click.IntRange(-1),
    default=-1,
    show_default=True,
    help="Tokens to generate, -1: until the end.",
)
@click.option("--temp", type=click.FloatRange(0), default=0.8, show_default=True, help="Temperature, 0: greedy.")
@click.option("--top-k", type=int, default=40, show_default=True, help="Sample from the k likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="Nucleus sampling.")
@click.option(
    "--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Least probability, relative."
)
@click.option("-s", "--seed", type=int, default=-1, show_default=True, help="Seed of sampling, -1: random.")
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(0),
    help=f"Context in tokens, 0: the model's.  [default: at most {DEFAULT_CONTEXT}]",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--force", is_flag=True, help="Accept a bias whose router hash is another one, if the shape fits.")
@llama_options
@json_option
def run(
    model: Path,
    bias: Path | None,
    map_file: Path | None,
    preset: str | None,
    prompt: str,
    system_prompt: str | None,
    n_predict: int,
    temp: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    ctx_size: int | None,
    raw: bool,
    force: bool,
    flags: LlamaFlags,
    as_json: bool,
) -> None:
    """Answer one prompt, steered by a bias file, or by an expert map and the paper's numbers for its model.

    \b
    Examples:
      steermoe run -m tiny -p "What is three plus four?" --temp 0
      steermoe run -m tiny --bias bias.gguf -p "What is three plus four?" --temp 0
      steermoe run -m olmoe.gguf --map map.json --preset faithful -p "Document: ... Question: ..."
    """
    from ..model import SteeredLlama

    facts = model_info(model)
    steering = _from_map(map_file, preset, facts, force) if map_file or preset else bias
    if raw and system_prompt:
        raise UsageError("--raw has no system message; put it into the prompt")
    if ctx_size is None:
        ctx_size = min(DEFAULT_CONTEXT, facts.context_length or DEFAULT_CONTEXT)
    llama = SteeredLlama(
        model,
        bias=steering,
        force=force,
        n_ctx=ctx_size,
        seed=seed if seed >= 0 else 0xFFFFFFFF,
        **flags.model_arguments(),
        **flags.context_arguments(),
    )
    sampling: dict[str, Any] = {
        "temperature": temp,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "max_tokens": n_predict if n_predict >= 0 else None,
    }
    if raw or not facts.chat_template:
        request: dict[str, Any] = {"prompt": prompt}
        create = llama.create_completion
    else:
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        request = {"messages": [*system, {"role": "user", "content": prompt}]}
        create = llama.create_chat_completion
    try:
        if as_json:
            start = time.monotonic()
            response = create(**request, **sampling)
            source = {"map": str(map_file)} if map_file else {"bias": str(bias)}
            print_json(_result(response, model, source, llama.bias, time.monotonic() - start))
            return
        for chunk in create(**request, **sampling, stream=True):
            click.echo(_text(chunk["choices"][0]), nl=False)
            sys.stdout.flush()
        click.echo()
    except ValueError as error:  # llama_cpp: the prompt exceeds the context
        raise UsageError(f"{error}; raise -c or shorten the prompt") from None


def _from_map(map_file: Path | None, preset: str | None, facts: ModelInfo, force: bool) -> BiasFile:
    """The bias of --map and --preset; a --bias from the environment gives way to them."""
    if map_file is None or preset is None:
        raise UsageError("--map and --preset go together; for other numbers of experts run steermoe bias build")
    if click.get_current_context().get_parameter_source("bias") == ParameterSource.COMMANDLINE:
        raise UsageError("--bias and --map both steer; give one of them")
    expert_map = ExpertMap.load(map_file)
    for warning in expert_map.identity.require_same(facts.require_moe(), str(map_file), str(facts.paths[0]), force):
        click.echo(f"warning: {warning}", err=True)
    return make_bias(expert_map, preset_choice(preset, expert_map, map_file))


def _text(choice: dict[str, Any]) -> str:
    """Text of a choice, of a completion or of a chat, whole or streamed."""
    message = choice.get("delta") or choice.get("message") or {}
    return choice.get("text") or message.get("content") or ""


def _result(
    response: dict[str, Any], model: Path, source: dict[str, str], steering: BiasFile | None, seconds: float
) -> dict[str, Any]:
    choice = response["choices"][0]
    applied = steering and {
        **source,
        "mode": steering.mode,
        "n_active": steering.n_active,
        "n_inactive": steering.n_inactive,
        **steering.provenance,
    }
    return {
        "text": _text(choice),
        "finish_reason": choice["finish_reason"],
        "model": str(model),
        "steering": applied,
        "usage": response["usage"],
        "seconds": round(seconds, 3),
    }
