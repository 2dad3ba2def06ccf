"""steermoe learn."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..._util.closest import did_you_mean
from ..._util.visible import visible
from ...errors import UsageError
from ...model_files.model_info import model_info
from ...models.user_maps import check_map_name, user_maps_folder
from ..failures import EXIT_ERROR
from ..options.common import (
    FILE,
    PARALLEL,
    SHARE,
    check_resume,
    json_option,
    meaning_options,
    resume_options,
    template_options,
)
from ..options.groups import command_line, option_group
from ..options.llama import LlamaFlags, llama_options
from ..options.model import model_option
from ..options.opening import check_memory
from ..output import print_json, print_lines, progress_bar, say

if TYPE_CHECKING:
    from ...learning.learn import LearnProgress, LearnResult
    from ...learning.options import Contrast, JudgeOptions

_TOKENS = 512  # of context of each answer, to tell whether there is memory for them


def _contrast(
    like: str | None, unlike: str | None, pairs_file: Path | None, questions: Path | None, behaviour_name: str | None
) -> Contrast | None:
    """The contrast that the options name; None: the name of the steering is that of a behaviour."""
    from ...learning.options import Builtin, GivenPairs, LikeUnlike

    given = [
        name
        for name, there in (
            ("--like/--unlike", like is not None or unlike is not None),
            ("--pairs", pairs_file is not None),
            ("--behaviour", behaviour_name is not None),
        )
        if there
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say what to learn; give one of them")
    if (like is None) != (unlike is None):
        raise UsageError("--like and --unlike go together; give both instructions")
    if questions is not None and like is None:
        raise UsageError("--questions are answered under --like and --unlike; give them, too")
    if pairs_file is not None:
        return GivenPairs(pairs_file)
    if like is not None and unlike is not None:
        return LikeUnlike(like, unlike, questions)
    return None if behaviour_name is None else Builtin(behaviour_name)


_contrast_options = option_group(
    _contrast,
    "contrast",
    [
        click.option("--like", metavar="TEXT", help="Instruction under which the model answers as it should."),
        click.option("--unlike", metavar="TEXT", help="Instruction under which it answers as it should not."),
        click.option(
            "--pairs",
            "pairs_file",
            type=FILE,
            help="Instead: pairs of one prompt and two answers, JSONL (docs/pairs.md).",
        ),
        click.option(
            "--behaviour",
            "behaviour_name",
            metavar="NAME",
            help="Instead: a behaviour that ships.  [default: the one that is called as the steering]",
        ),
        click.option(
            "--questions",
            type=FILE,
            help="Questions that the model answers, lines of text or JSONL.  [default: neutral ones that ship]",
        ),
    ],
)


def _judge(judge_url: str | None, judge_model: str | None, criterion: str | None) -> JudgeOptions | None:
    from ...learning.options import JudgeOptions

    given = {"--judge": judge_url, "--judge-model": judge_model, "--criterion": criterion}
    if not any(given.values()):
        return None
    if missing := [name for name, value in given.items() if not value]:
        raise UsageError(f"{missing[0]}: missing; a judge takes {', '.join(given)}")
    return JudgeOptions(str(judge_url), str(judge_model), str(criterion))


_judge_options = option_group(
    _judge,
    "judge",
    [
        click.option(
            "--judge",
            "judge_url",
            metavar="URL",
            help="Endpoint of OpenAI's API (.../v1) that scores the held-out answers.  [default: no judge]",
        ),
        click.option("--judge-model", metavar="MODEL", help="Model that judges."),
        click.option("--criterion", metavar="TEXT", help="Question that the judge answers with yes or no."),
    ],
)


def _effort(quick: bool, thorough: bool) -> str:
    if quick and thorough:
        raise UsageError("--quick and --thorough exclude each other; give one of them")
    return "quick" if quick else "thorough" if thorough else "normal"


_effort_options = option_group(
    _effort,
    "effort",
    [
        click.option("--quick", is_flag=True, help="In less time: half of the answers, a third of the draws."),
        click.option("--thorough", is_flag=True, help="About three times as many of both, for smaller effects."),
    ],
)


@click.command()
@click.argument("name")
@model_option
@_contrast_options
@_effort_options
@click.option(
    "--max-ppl-increase",
    type=SHARE,
    default="5%",
    show_default=True,
    metavar="SHARE",
    help="Most increase of the perplexity of neutral text.",
)
@_judge_options
@meaning_options()
@click.option(
    "--maps-dir",
    type=FILE,
    metavar="DIR",
    help="Folder that NAME is written into.  [default: the user's maps folder, STEERMOE_MAPS]",
)
@click.option(*PARALLEL[0], **PARALLEL[1])
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of random draws.")
@resume_options("Go on with an interrupted run.", "Forget an interrupted or a finished run.")
@template_options
@click.option(
    "--progress",
    "progress_format",
    type=click.Choice(["bar", "json"]),
    default="bar",
    show_default=True,
    help="Progress on stderr: a bar, or a JSON object a line, for programs.",
)
@llama_options
@json_option
def learn(
    name: str,
    model: Path,
    contrast: Contrast | None,
    effort: Any,
    max_ppl_increase: float,
    judge: JudgeOptions | None,
    meaning: dict[str, str],
    maps_dir: Path | None,
    parallel: int,
    seed: int,
    resume: bool,
    restart: bool,
    thinking: bool,
    template_arguments: dict[str, Any] | None,
    date: datetime.date | None,
    progress_format: str,
    flags: LlamaFlags,
    as_json: bool,
) -> None:
    """Learn a steering NAME: from two instructions, from pairs, or from a behaviour that ships, to a checked map.

    The model answers questions under both instructions (or the pairs are taken), the experts that differ are found,
    the effects of the first of them are estimated, as few as needed are chosen inside the budget, and the choice is
    checked on held-out items beside random experts and a map of shuffled pairs. How long it takes is said first.

    The folder NAME in the user's maps folder gets the map with its recommended choice, the pairs, the held-out task,
    a bias file and a report; from then on --map NAME is this steering. An interrupted run goes on with --resume.

    Exit status 1 if it did not work; the report says why, and the map recommends nothing.

    \b
    Examples:
      steermoe learn formal -hf granite-1b-a400m --like "Answer very formally." --unlike "Answer like a teenager."
      steermoe learn digits -m tiny --like "Use digits." --unlike "Use words." --quick
      steermoe learn terse -m olmoe.gguf --pairs pairs.jsonl
    """
    from ...learning.learn import learn as run
    from ...learning.options import Builtin, LearnOptions

    check_resume(resume, restart)
    check_map_name(name)
    if contrast is None:
        from ...behaviours.builtin import behaviours

        known = [one.name for one in behaviours()]
        if name not in known:
            raise UsageError(
                f"{name}: what is to be learnt? give --like and --unlike, two instructions, or --pairs FILE; or take "
                f"the name of a behaviour that ships ({', '.join(known)}){did_you_mean(name, known)}"
            )
        contrast = Builtin(name)
    facts = model_info(model)
    facts.require_moe()
    flags = check_memory(facts, flags, _TOKENS, parallel)
    options = LearnOptions(
        effort=effort,
        max_ppl_increase=max_ppl_increase,
        judge=judge,
        positive=meaning["positive"],
        negative=meaning["negative"],
        license=meaning["license"],
        thinking=thinking,
        template_arguments=template_arguments,
        date=date,
        n_parallel=parallel,
        seed=seed,
        model_arguments=flags.model_arguments(),
        context=flags.context_arguments(),
        command=command_line(),
    )
    folder = maps_dir or user_maps_folder()
    try:
        with _shown(progress_format) as show:
            result = run(
                model,
                name,
                contrast,
                folder,
                options=options,
                resume=resume,
                restart=restart,
                progress=show,
                log=(lambda text: say(visible(text))),
            )
    except KeyboardInterrupt:
        if (folder / name / "work").is_dir():
            say(f"what is done is kept in {folder / name}; go on with the same command and --resume")
        raise
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result, command_line_model(model))
    if not result.works:
        raise SystemExit(EXIT_ERROR)


def command_line_model(model: Path) -> str:
    """The model as the user named it, for the next commands; else its path."""
    given = click.get_current_context().params.get("model")
    return str(given or model)


@contextmanager
def _shown(kind: str) -> Iterator[Callable[[LearnProgress], None]]:
    """What shows progress: bars, or lines of JSON on stderr."""
    if kind == "json":
        yield lambda done: say(json.dumps({**asdict(done), "elapsed": round(done.elapsed, 3)}))
        return
    with progress_bar() as bar:
        yield lambda done: bar(f"learn: {done.step}", done.done, done.total, _left(done))


def _left(done: LearnProgress) -> float | None:
    """Seconds that the whole run still takes; None before they are known."""
    return max(0.0, done.expected - done.elapsed) if done.expected else None


def _print(result: LearnResult, model: str) -> None:
    """The verdict in one line, and what comes next."""
    print_lines(visible(result.verdict))
    if result.works:
        model, usual = shlex.quote(model), result.folder.parent == user_maps_folder()
        name = result.name if usual else shlex.quote(str(result.folder))
        lines = [
            f"steermoe chat -m {model} --map {name}",
            f'steermoe run -m {model} --map {name} -p "..."',
            f"steermoe serve -m {model}{'' if usual else f' --maps {shlex.quote(str(result.folder.parent))}'}",
        ]
        print_lines("\nnext:\n" + "\n".join(f"  {line}" for line in lines))
    else:
        print_lines(f"what to try: {visible(result.advice)}")
    print_lines(f"\nreport: {visible(str(result.folder / 'report.md'))}")
