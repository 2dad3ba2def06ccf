"""A model, and a prompt, without a flag before them: `steermoe run MODEL PROMPT`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ..._util.file_kinds import MODEL as GGUF_MODEL
from ..._util.file_kinds import kind_of
from ...errors import ModelError, SteerMoEError, UsageError
from ...models.embedded import embedded_models
from ...models.local_models import resolve_model
from ...models.names import looks_like_name
from .groups import MODEL, is_given, option_group
from .model import COMMON, MODEL_OPTIONS, ModelText, fetch_if_missing, models_dir_option, resolve_named

_SHOWN = 40  # characters of a prompt in a message


def names_model(text: str, models_dirs: tuple[Path, ...]) -> bool:
    """Whether a text names a model rather than being a prompt.

    It does if it has the form of a model's name, whether that model is here or not (`tiny`, FILE.gguf, USER/REPO, a
    short name; no blanks), if it is a GGUF file, or if a model on this machine has this name.
    """
    is_name = text in embedded_models() or text.lower().endswith(".gguf") or looks_like_name(text)
    if is_name and not any(map(str.isspace, text)):
        return True
    try:
        path = resolve_model(text, models_dirs)
        return path.is_file() and kind_of(path) is GGUF_MODEL
    except (SteerMoEError, OSError, ValueError):  # no such model, or a text that no system has as a name
        return False


def _model(
    named: str | None,
    model: str | None,
    hf_repo: str | None,
    hf_file: str | None,
    hf_token: str | None,
    offline: bool,
    models_dirs: tuple[Path, ...],
) -> Path:
    """The path of the model that is named without a flag, or else by the options.

    Those of the environment and the configuration give way to it. Raises UsageError where the command line names
    another one, too.
    """
    if named is None:
        return resolve_named(model, hf_repo, hf_file, hf_token, offline, models_dirs)
    if hf_repo is not None and is_given("hf_repo"):
        if hf_repo != named:
            raise UsageError(f"{named} and -hf {hf_repo} both name a model; give one of them")
        return fetch_if_missing(hf_repo, hf_file, hf_token, offline, models_dirs)
    if hf_file is not None and is_given("hf_file"):
        raise UsageError(f"-hff goes with -hf USER/REPO; write -hf {named}")
    found = resolve_model(named, models_dirs)
    if model is not None and is_given("model") and model != named:
        other = resolve_model(model, models_dirs)
        if os.path.realpath(other) != os.path.realpath(found):
            raise UsageError(f"{named} and -m {model} both name a model; give one of them")
    return found


model_argument = option_group(
    _model,
    "model",
    (click.argument("named", required=False, metavar="[MODEL]", type=ModelText()), *MODEL_OPTIONS),
    heading=MODEL,
    common=COMMON,
)
"""[MODEL], or -m and -hf; the command gets the path of the model as `model`."""


def _looked_at(named: str | None, model: str | None, models_dirs: tuple[Path, ...]) -> Path:
    if named is None and model is None:
        raise UsageError("which model? name it (a GGUF file, tiny, or one that `steermoe models` lists)")
    return _model(named, model, None, None, None, True, models_dirs)


looked_at_argument = option_group(
    _looked_at,
    "model",
    (
        click.argument("named", required=False, metavar="[MODEL]", type=ModelText()),
        MODEL_OPTIONS[0],
        models_dir_option,
    ),
)
"""[MODEL] or -m of a command that fetches none; the command gets the path of the model as `model`."""


def _model_and_prompt(words: tuple[str, ...], prompt: str | None, **others: Any) -> dict[str, Any]:
    """The model, and the prompt of the command line without a flag, None if there is none.

    Raises UsageError for what is named twice, and where no model is named.
    """
    prompt_by_flag = any(map(is_given, ("prompt", "prompt_file", "prompts_file")))
    elsewhere = others["model"] is not None or others["hf_repo"] is not None
    named, said = _told_apart(words, prompt_by_flag, elsewhere, others["models_dirs"])
    if said is not None and prompt is not None and is_given("prompt") and prompt != said:
        raise UsageError(f"{_quoted(said)} and -p {_quoted(prompt)} both give the prompt; give one of them")
    try:
        return {"model": _model(named, **others), "prompt": prompt, "said": said}
    except ModelError as error:
        if len(words) == 1 and elsewhere and not prompt_by_flag and named is not None:
            raise ModelError(f"{error}; a prompt that looks like a model's name: -p {_quoted(named)}") from None
        raise


def _told_apart(
    words: tuple[str, ...], prompt_by_flag: bool, elsewhere: bool, models_dirs: tuple[Path, ...]
) -> tuple[str | None, str | None]:
    """The model and the prompt among the words without a flag. `elsewhere`: whether a model is named otherwise."""
    if len(words) > 2:
        raise UsageError(f"{len(words)} words without a flag, where a model and a prompt can stand; quote the prompt")
    if len(words) != 1:
        return words if len(words) == 2 else (None, None)
    (word,) = words
    if prompt_by_flag or names_model(word, models_dirs):
        return word, None
    if elsewhere:
        return None, word
    if any(map(str.isspace, word)):
        raise UsageError(
            f"which model? {_quoted(word)} names none; give it before the prompt, like steermoe run tiny "
            f"{_quoted(word)}, or set one: steermoe config set model MODEL"
        )
    return word, None  # what looks for it says that there is no such model


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= _SHOWN else f'"{text[: _SHOWN - 3]}..."'


model_and_prompt_arguments = option_group(
    _model_and_prompt,
    options=(
        click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]", type=ModelText()),
        *MODEL_OPTIONS,
    ),
    takes=("prompt",),
    heading=MODEL,
    common=COMMON,
)
"""[MODEL] [PROMPT], or -m and -hf; the command gets the path of the model, `prompt` (-p) and `said` (PROMPT).

One word alone is the model if -p, -f or --n-prompts give the prompt, if it names a model (`names_model`), or if no
model is set elsewhere; else it is the prompt.
"""
