"""steermoe run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..._util.files import read_bytes
from ...errors import FormatError, UsageError
from ..options.common import (
    FILE,
    context_option,
    json_option,
    output_option,
    reasoning_option,
    resume_options,
    stop_option,
    system_option,
    template_options,
)
from ..options.groups import OUTPUT, PROMPT, STEERING, is_given, together
from ..options.llama import llama_options
from ..options.positionals import model_and_prompt_arguments
from ..options.sampling import sampling_options
from ..options.steering import steering_options
from ..options.system_text import UserPath
from ..run.setup import BatchFlags, RunFlags

_MAX_PROMPT = 64 << 20  # bytes


@click.command()
@model_and_prompt_arguments
@together(
    click.option("-p", "--prompt", metavar="TEXT", help="The prompt, as PROMPT."),
    click.option(
        "-f",
        "--file",
        "prompt_file",
        type=FILE,
        allow_from_autoenv=False,  # `pull` has another --file
        metavar="FILE",
        help="Read the prompt from a file.",
    ),
    system_option("System message before it."),
    click.option(
        "--n-prompts",
        "--prompts",
        "prompts_file",
        type=UserPath(path_type=Path, allow_dash=True),
        allow_from_autoenv=False,  # `demo` has other --prompts
        metavar="FILE",
        help="Answer all prompts of a file: JSON, CSV or lines; - for stdin.",
    ),
    click.option(
        "-np",
        "--parallel",
        type=click.IntRange(1, 256),
        metavar="N",
        help="With --n-prompts: prompts decoded at once.  [default: 4]",
    ),
    click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template."),
    template_options,
    heading=PROMPT,
    common=("prompt", "prompts_file"),
)
@output_option(
    "With --n-prompts: JSON Lines to write.  [default: stdout]",
    required=False,
    allow_from_autoenv=False,  # no other command's output
)
@resume_options("With -o: go on with an interrupted run.", "With -o: forget an interrupted run.", common=())
@steering_options
@together(
    click.option("--compare", is_flag=True, help="Answer twice, unsteered and steered, with the same seed."),
    heading=STEERING,
)
@sampling_options
@stop_option
@context_option("Context of each prompt in tokens, 0: the model's.  [default: as needed, at most 4096]")
@reasoning_option("What the model thinks before it answers; auto shows it on a terminal.")
@together(
    click.option("--show-timings", is_flag=True, help="Tell tokens and tokens per second on stderr."),
    heading=OUTPUT,
    common=(),
)
@llama_options
@json_option
def run(
    model: Path,
    prompt: str | None,
    said: str | None,
    prompt_file: Path | None,
    prompts_file: Path | None,
    output: Path | None,
    resume: bool,
    restart: bool,
    parallel: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer one prompt, or a file of them, steered or not.

    Text that is piped in stands before PROMPT; MODEL can be set, too (docs/run.md).

    \b
    Examples:
      steermoe run tiny "What is three plus four?" --temp 0 --map digits-words --reverse --compare
      cat doc.txt | steermoe run olmoe.gguf "Summarise this." --map map.json --preset faithful --json
      steermoe run olmoe.gguf --n-prompts questions.jsonl -n 200 -o answers.jsonl
    """
    flags = RunFlags(model=model, **options)
    if flags.raw and is_given("date"):
        raise UsageError("--raw uses no chat template, so no date; leave out --date")
    if prompts_file is not None:
        if said is not None or is_given("prompt") or is_given("prompt_file"):
            raise UsageError("--n-prompts has the prompts; leave out the prompt (-p, -f)")
        from ..run.batch import run_batch

        run_batch(flags, BatchFlags(prompts_file, output, resume, restart, parallel), as_json)
        return
    # what comes from the environment or the configuration, and does not fit, is left aside
    for option, name in (("output", "-o"), ("resume", "--resume"), ("restart", "--restart"), ("parallel", "-np")):
        if is_given(option):
            raise UsageError(f"{name} belongs to --n-prompts FILE; a single answer goes to stdout")
    typed = said is not None or is_given("prompt")
    if typed and is_given("prompt_file"):
        raise UsageError("-p and -f both give the prompt; to ask about a file, pipe it in: steermoe run -p ... < FILE")
    text = _prompt(prompt if said is None else said, None if typed else prompt_file)
    from ..run.one import run_one

    run_one(flags, text, as_json)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """What the user says: the text piped in, a blank line, -p or the text of -f. One line end at a text's end goes."""
    piped = _text(_stdin(), "stdin")
    if prompt_file is not None:
        prompt = _text(read_bytes(prompt_file, "a prompt", _MAX_PROMPT), str(prompt_file))
    texts = [text for text in (piped, prompt) if text and text.strip()]
    if not texts:
        what = "no prompt" if prompt_file is None else f"{prompt_file}: empty"
        raise UsageError(f"{what}; write it behind the model, give -p TEXT or -f FILE, or pipe a text in")
    return "\n\n".join(texts)


def _stdin() -> bytes:
    """What is piped in; nothing from a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return b""
    data = sys.stdin.buffer.read(_MAX_PROMPT + 1)
    if len(data) > _MAX_PROMPT:
        raise FormatError(f"stdin: larger than {_MAX_PROMPT >> 20} MiB, so it is not a prompt; check what is piped in")
    return data


def _text(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 (byte {error.start}); convert it, for example with iconv") from None
    return text.removesuffix("\n").removesuffix("\r")
