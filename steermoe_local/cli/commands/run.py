"""steermoe run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..._util.files import read_bytes
from ...errors import FormatError, UsageError
from ..options.common import FILE, json_option, output_option, reasoning_option, resume_options, template_options
from ..options.groups import is_given
from ..options.llama import llama_options
from ..options.model import model_option
from ..options.sampling import sampling_options
from ..options.steering import steering_options
from ..options.system_text import UserPath
from ..run.setup import BatchFlags, RunFlags

_MAX_PROMPT = 64 << 20  # bytes


@click.command()
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="What the user says; behind the text that is piped in, if any.")
@click.option(
    "-f",
    "--file",
    "prompt_file",
    type=FILE,
    allow_from_autoenv=False,  # `pull` has another --file
    metavar="FILE",
    help="Read what the user says from a file.",
)
@click.option("-sys", "--system-prompt", metavar="TEXT", help="System message before it.")
@click.option(
    "--n-prompts",
    "--prompts",
    "prompts_file",
    type=UserPath(path_type=Path, allow_dash=True),
    allow_from_autoenv=False,  # `demo` has other --prompts
    metavar="FILE",
    help="Answer many prompts: JSON (lines or array) with `prompt` or `messages`, CSV, or lines of text; - for stdin.",
)
@output_option(
    "With --n-prompts: JSON Lines to write.  [default: stdout]",
    required=False,
    allow_from_autoenv=False,  # no other command's output
)
@resume_options("With -o: go on with an interrupted run.", "With -o: forget an interrupted run.")
@click.option(
    "-np",
    "--parallel",
    type=click.IntRange(1, 256),
    metavar="N",
    help="With --n-prompts: prompts decoded at once.  [default: 4]",
)
@steering_options
@click.option("--compare", is_flag=True, help="Answer twice, unsteered and steered, with the same seed.")
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given again.")
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(0),
    metavar="N",
    help="Context of each prompt in tokens, 0: the model's.  [default: as needed, at most 4096]",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@template_options
@reasoning_option("What the model thinks before it answers; auto shows it on a terminal.")
@click.option("--show-timings", is_flag=True, help="Tell tokens and tokens per second on stderr.")
@llama_options
@json_option
def run(
    model: Path,
    prompt: str | None,
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

    Text that is piped in stands before -p, with a blank line between, and is the prompt without it. A terminal gets the
    answer as it comes, a pipe the same without what the model thought before; --json tells tokens, timings, seed and
    steering. With --n-prompts every prompt becomes one line of JSON, in their order; -o keeps what is done in
    OUTPUT.partial, and the same command with --resume goes on from there.

    \b
    Examples:
      steermoe run -m tiny --temp 0 -p "What is three plus four?"
      steermoe run -m tiny --map digits-words --reverse --compare --temp 0 -p "What is three plus four?"
      steermoe run -m olmoe.gguf --map map.json --activate 10 --deactivate 50 -p "..."
      steermoe run -m olmoe.gguf --steer "answer[0:32]: map.json +0 -20" --steer "thinking: none" -p "..."
      cat doc.txt | steermoe run -m olmoe.gguf --map map.json --preset faithful -p "Summarise this." --json
      steermoe run -m olmoe.gguf --n-prompts questions.jsonl -n 200 -o answers.jsonl
    """
    flags = RunFlags(model=model, **options)
    if flags.raw and is_given("date"):
        raise UsageError("--raw uses no chat template, so no date; leave out --date")
    if prompts_file is not None:
        if is_given("prompt") or is_given("prompt_file"):
            raise UsageError("--n-prompts has the prompts; leave out -p and -f")
        from ..run.batch import run_batch

        run_batch(flags, BatchFlags(prompts_file, output, resume, restart, parallel), as_json)
        return
    # what comes from the environment or the configuration, and does not fit, is left aside
    for option, name in (("output", "-o"), ("resume", "--resume"), ("restart", "--restart"), ("parallel", "-np")):
        if is_given(option):
            raise UsageError(f"{name} belongs to --n-prompts FILE; a single answer goes to stdout")
    if is_given("prompt") and is_given("prompt_file"):
        raise UsageError("-p and -f both give the prompt; to ask about a file, pipe it in: steermoe run -p ... < FILE")
    said = _prompt(prompt, None if is_given("prompt") else prompt_file)
    from ..run.one import run_one

    run_one(flags, said, as_json)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """What the user says: the text piped in, a blank line, -p or the text of -f. One line end at a text's end goes."""
    piped = _text(_stdin(), "stdin")
    if prompt_file is not None:
        prompt = _text(read_bytes(prompt_file, "a prompt", _MAX_PROMPT), str(prompt_file))
    texts = [text for text in (piped, prompt) if text and text.strip()]
    if not texts:
        what = "no prompt" if prompt_file is None else f"{prompt_file}: empty"
        raise UsageError(f"{what}; give -p TEXT or -f FILE, or pipe a text in")
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
