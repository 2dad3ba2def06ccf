"""steermoe trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import UsageError
from ...pairs.pairs import PairsFile
from ...pairs.prompts import PromptItem
from ..options.common import (
    FILE,
    context_option,
    json_option,
    lock_output,
    output_option,
    stop_option,
    system_option,
    template_options,
)
from ..options.groups import PROMPT, in_help, is_given
from ..options.llama import RecordingFlags, recording_options
from ..options.model import model_option
from ..options.sampling import drawing_options
from ..options.steering import SteeringFlags, steering_options
from ..options.system_text import UserPath
from ..output import print_json, say_written, warn
from ..run.setup import DEFAULT_PARALLEL, RunFlags

if TYPE_CHECKING:
    from ...generation.engine import Sampling


@click.command()
@in_help({"prompt": PROMPT, "prompts_file": PROMPT}, rare=("parallel", "raw"))
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="Trace what the user says.")
@click.option("--pairs", "pairs_file", type=FILE, help="Trace both sides of contrastive pairs, JSONL.")
@click.option(
    "--prompts",
    "--n-prompts",
    "prompts_file",
    type=UserPath(path_type=Path, allow_dash=True),
    allow_from_autoenv=False,  # `demo` has other --prompts
    metavar="FILE",
    help="Trace many prompts: JSON (lines or array) with `prompt` or `messages`, CSV, or lines of text; - for stdin.",
)
@output_option("Trace to write: .npz, .csv or .parquet.", allow_from_autoenv=False)
@click.option("--logits", is_flag=True, help="Also write all router logits, as they are before steering.")
@click.option(
    "-n",
    "--predict",
    "--n-predict",
    "--max-tokens",
    "n_predict",
    type=click.IntRange(-1),
    allow_from_autoenv=False,  # of other commands it is a limit
    metavar="N",
    help="Answer with at most N tokens, -1: until the model ends, and trace the answer, too.  [default: no answer]",
)
@system_option("System message before prompts.")
@steering_options
@drawing_options
@stop_option
@click.option(
    "-np",
    "--parallel",
    type=click.IntRange(1, 256),
    default=DEFAULT_PARALLEL,
    show_default=True,
    metavar="N",
    help="With -n: prompts answered at once.",
)
@context_option("Context of each text in tokens, 0: the model's.  [default: as needed, with -n at most 4096]")
@click.option("--raw", is_flag=True, help="Take prompts as they are, without the chat template.")
@template_options
@recording_options
@json_option
def trace(
    model: Path,
    prompt: str | None,
    pairs_file: Path | None,
    prompts_file: Path | None,
    output: Path,
    logits: bool,
    n_predict: int | None,
    system_prompt: str | None,
    steering_flags: SteeringFlags,
    sampling: Sampling,
    stop: tuple[str, ...],
    parallel: int,
    ctx_size: int | None,
    raw: bool,
    flags: RecordingFlags,
    as_json: bool,
    **template: Any,
) -> None:
    """Write which experts every token selects, in every layer, and with which weights.

    Of prompts, of their answers with -n, or of both sides of pairs up to the end of their targets, with the phase of
    each token (prompt, thinking, answer) and the rule that steers it. With -n the answer is generated first, and prompt
    and answer are read once more under the same steering of each token. The columns are in docs/traces.md.

    The trace is streamed to disk: memory does not grow with it. It gets its name when it is complete; an interrupted
    one leaves nothing and starts again.

    \b
    Examples:
      steermoe trace -m tiny -p "What is three plus four?" -n 8 --temp 0 -o trace.npz
      steermoe trace -m olmoe.gguf --pairs pairs.jsonl --logits -o trace.parquet
      steermoe trace -m olmoe.gguf --prompts questions.jsonl --map map.json --preset faithful -n 200 -o trace.csv
    """
    from ...detection.trace_files import trace_kind
    from ..run.tracing import TraceJob, Tracing

    given = [name for name in ("prompt", "pairs_file", "prompts_file") if is_given(name)]
    if len(given) != 1:
        many = "; give one of them" if given else "; what is to be traced?"
        raise UsageError(f"-p TEXT, --pairs FILE, --prompts FILE{many}")
    if raw and is_given("date"):
        raise UsageError("--raw uses no chat template, so no date; leave out --date")
    if pairs_file is not None and given == ["pairs_file"]:
        for name, option in (("n_predict", "-n"), ("system_prompt", "-sys"), ("raw", "--raw"), ("stop", "--stop")):
            if is_given(name):
                raise UsageError(f"{option}: pairs are read as they stand; it goes with -p and --prompts")
        system_prompt, raw, n_predict = None, False, None
    trace_kind(output)
    lock_output(output)
    settings = RunFlags(
        model=model,
        system_prompt=system_prompt,
        steering_flags=steering_flags,
        compare=False,
        sampling=sampling,
        n_predict=None if n_predict is None or n_predict < 0 else n_predict,
        stop=stop,
        ctx_size=ctx_size,
        raw=raw,
        reasoning="hide",
        show_timings=False,
        flags=flags,
        **template,
    )
    source, name = _source(given[0], prompt, pairs_file, prompts_file)
    tracing = Tracing(settings, TraceJob(source, name, output, logits, n_predict, min(parallel, len(source))))
    tracing.run()
    if tracing.n_cut:
        warn(f"{tracing.n_cut} answers ended because the context was full; raise -c")
    if as_json:
        print_json(tracing.figures())
    else:
        say_written(output, before=f"{tracing.summary()}\n")


def _source(
    given: str, prompt: str | None, pairs_file: Path | None, prompts_file: Path | None
) -> tuple[PairsFile | list[PromptItem], str]:
    """What is traced, and its name for messages."""
    if given == "pairs_file" and pairs_file is not None:
        return PairsFile(pairs_file), str(pairs_file)
    if given == "prompts_file" and prompts_file is not None:
        from ..run.batch import read_items

        name, items = read_items(prompts_file)
        return items, name
    if not prompt or not prompt.strip():
        raise UsageError("-p: no prompt; give a text")
    return [PromptItem("prompt", prompt)], "-p"
