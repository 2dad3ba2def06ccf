"""steermoe detect."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..._util.files import require_writable
from ...detection.checkpoint import CheckpointFile
from ...errors import PairsError, UsageError
from ...identity import ModelIdentity
from ...maps.counts import RoutingCounts
from ...maps.expert_map import ExpertMap
from ...maps.map_phases import PhaseSplit, phase_words
from ...maps.pair_counts import PairCounts, PairCountsWriter
from ...maps.significance import annotate, compare
from ...maps.stability import LEAST_PAIRS, UntilStable
from ...model_files.model_info import model_info
from ...pairs.pairs import PairsFile
from ..options.common import (
    FILE,
    Parsed,
    check_resume,
    check_unfinished,
    json_option,
    lock_output,
    longest_prompt_option,
    meaning_options,
    output_option,
    require_distinct,
    resume_options,
    template_options,
)
from ..options.groups import in_help, is_given, option_group
from ..options.llama import RecordingFlags, recording_options
from ..options.model import model_option
from ..options.opening import open_model
from ..output import facts_table, print_json, print_verdict, say, say_written
from ..streams import console
from .map import print_map, top_experts, warn_unless_different
from .recording_display import RecordingDisplay


def _shard(text: str) -> tuple[int, int]:
    """(i, n) with 1 <= i <= n."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and len(total) < 10 and 1 <= int(number) <= int(total)):
        raise ValueError(f"{text!r} is not like 2/4: the second of four parts.")
    return int(number), int(total)


def _phase(text: str) -> PhaseSplit:
    try:
        return PhaseSplit.parse(text)
    except UsageError as error:
        raise ValueError(f"{error}.") from None


@dataclass(frozen=True)
class _Files:
    """What a run writes: of all tokens of the targets, or of one phase of them."""

    output: Path
    counts: Path | None
    per_pair: Path | None

    def of(self, phase: str) -> _Files:
        """The files of a phase: words.json is words.first16.json for the first 16 tokens."""

        def named(path: Path) -> Path:
            return path.with_name(f"{path.stem}.{phase.replace(':', '')}{path.suffix}")

        return _Files(named(self.output), self.counts and named(self.counts), self.per_pair and named(self.per_pair))

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.output, self.counts, self.per_pair) if path]

    def to_dict(self) -> dict[str, str | None]:
        """For --json."""
        named = {"map": self.output, "counts": self.counts, "per_pair": self.per_pair}
        return {name: None if path is None else str(path) for name, path in named.items()}


def _until_stable(
    until_stable: bool, stable_level: float, stable_first: int, stable_checks: int, stable_min: int
) -> UntilStable | None:
    """The rule that the options of --until-stable make."""
    if until_stable:
        return UntilStable(stable_level, stable_first, stable_checks, stable_min)
    for name in ("stable_level", "stable_first", "stable_checks", "stable_min"):
        if is_given(name):
            raise UsageError(f"--{name.replace('_', '-')} belongs to --until-stable; give both")
    return None


_DEFAULT = UntilStable()
_stable_options = option_group(
    _until_stable,
    "rule",
    [
        click.option(
            "--until-stable",
            is_flag=True,
            help="End early, once halves of the pairs agree on the first experts. The file's order has no effect.",
        ),
        click.option(
            "--stable-level",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            default=_DEFAULT.level,
            show_default=True,
            help="Agreement that its lower 95% bound must reach; 0 is chance.",
        ),
        click.option(
            "--stable-first",
            type=click.IntRange(1, 1 << 31),
            default=_DEFAULT.first,
            show_default=True,
            help="Experts that are compared, at most a quarter of all.",
        ),
        click.option(
            "--stable-checks",
            type=click.IntRange(1, 1 << 31),
            default=_DEFAULT.checks,
            show_default=True,
            help="Checks in a row that must reach it; each has a fifth more pairs than the one before.",
        ),
        click.option(
            "--stable-min",
            type=click.IntRange(LEAST_PAIRS, 1 << 31),
            default=_DEFAULT.min_pairs,
            show_default=True,
            help="Pairs of the first check.",
        ),
    ],
)


@click.command()
@in_help(
    rare=(
        *("shard", "split", "share_prefixes", "ctx_size"),
        *("stable_level", "stable_first", "stable_checks", "stable_min"),
    )
)
@model_option
@click.option("--pairs", "pairs_file", type=FILE, required=True, help="Contrastive pairs, JSONL.")
@output_option("Expert map to write, JSON.")
@click.option("--counts", "counts_file", type=FILE, help="Also write the routing counts, .npz.")
@click.option(
    "--per-pair",
    "per_pair_file",
    type=FILE,
    help="Also write each pair's counts, .npz; the map gets standard errors and stability.",
)
@click.option("--behaviour", help="Name of the behaviour.  [default: the pairs file's name]")
@meaning_options()
@resume_options("Go on with an interrupted run, from the last batch that was counted.")
@click.option(
    "--shard",
    type=Parsed[tuple[int, int]]("shard", tuple, _shard),
    default=(1, 1),
    metavar="I/N",
    help="Only every N-th pair from the I-th on; put the counts together with steermoe map merge.",
)
@_stable_options
@click.option(
    "--phase",
    "split",
    type=Parsed("phase", PhaseSplit, _phase),
    metavar="first:N|thinking",
    help="Also write maps of two phases of the targets: the first N tokens and the rest, or thinking and answer.",
)
@longest_prompt_option
@template_options
@click.option(
    "--share-prefixes/--no-share-prefixes",
    default=True,
    help="Compute what several prompts begin with once.  [default: share]",
)
@recording_options
@json_option
def detect(
    model: Path,
    pairs_file: Path,
    output: Path,
    counts_file: Path | None,
    per_pair_file: Path | None,
    behaviour: str | None,
    meaning: dict[str, str],
    resume: bool,
    restart: bool,
    shard: tuple[int, int],
    rule: UntilStable | None,
    split: PhaseSplit | None,
    ctx_size: int,
    thinking: bool,
    template_arguments: dict[str, Any] | None,
    date: datetime.date | None,
    share_prefixes: bool,
    flags: RecordingFlags,
    as_json: bool,
) -> None:
    """Find the experts of a behaviour: run contrastive pairs, write the map of risk differences.

    Runs unsteered, whatever STEERMOE_BIAS says. What is counted is kept after every batch in OUTPUT.partial.npz until
    the map is written: an interrupted run goes on with the same command and --resume. Pairs that cannot be counted are
    reported on stderr and left out; the exit status is 1 when none is left.

    With --until-stable the run may end before the last pair: when both halves of the pairs, halved at random, name
    mostly the same first experts, check after check, and the two sides are told apart. The map says how it ended. A run
    that never becomes stable uses all pairs, and the exit status is 0 all the same.

    With --phase first:16 the run also writes map.first16.json, of the first 16 tokens of each target, and
    map.rest16.json, of those behind them, beside map.json, which is of all; with --phase thinking map.thinking.json and
    map.answer.json, for targets that are replies with their reasoning. Counts and per-pair counts are split alike.
    `steermoe map diff` compares the two.

    \b
    Examples:
      steermoe detect -m tiny --pairs pairs.jsonl -o map.json
      steermoe detect -m tiny --pairs pairs.jsonl -o map.json --phase first:4
    """
    from ...detection.recorder import record_counts, record_phases

    files = {"": _Files(output, counts_file, per_pair_file)}
    files |= {name: files[""].of(name) for name in (split.names if split else ())}
    paths = [path for part in files.values() for path in part.paths]
    require_distinct(*paths)
    checkpoint = CheckpointFile(output)
    for path in (*paths, checkpoint.path):
        require_writable(path)
    check_resume(resume, restart)
    pairs = PairsFile(pairs_file)
    click.get_current_context().with_resource(checkpoint)  # the lock of the map, until the command ends
    for path in paths:
        if path != output:
            lock_output(path)
    check_unfinished(checkpoint, resume, restart)
    if restart:
        checkpoint.remove()
    name = behaviour or pairs_file.name.split(".")[0]
    shorter = "fewer pairs" if rule else "--until-stable, or fewer pairs"
    display = RecordingDisplay("detect, at most" if rule else "detect", shorter)
    with ExitStack() as stack:
        # the recorder's context holds a batch, or the longest prompt; how long the pairs are is not known yet
        llama = stack.enter_context(open_model(model_info(model), flags, max(ctx_size, flags.batch_size), path=model))

        writers: dict[str, PairCountsWriter] = {}

        def sidecar(identity: ModelIdentity, digest: str, phase: str = "") -> PairCountsWriter:
            path = files[phase].per_pair
            assert path is not None
            writer = PairCountsWriter(path, identity, behaviour=name, pairs_digest=digest)
            writers[phase] = stack.enter_context(writer)
            return writer

        settings: dict[str, Any] = {
            "behaviour": name,
            "n_ctx": ctx_size,
            **flags.context_arguments(),
            "thinking": thinking,
            "template_arguments": template_arguments,
            "date": date,
            "share_prefixes": share_prefixes,
            "shard": shard,
            "until_stable": rule,
            "checkpoint": checkpoint,
            "per_pair": sidecar if per_pair_file else None,
            "on_skip": display.skipped,
            "on_batch": display.update,
        }
        missing: Mapping[str, str] = {}
        try:
            with display.shown():
                if split is None:
                    counts = record_counts(llama, pairs, **settings)
                    found = {"": counts}
                else:
                    by_phase = record_phases(llama, pairs, phase=split, **settings)
                    counts, missing = by_phase.whole, by_phase.missing
                    found = {"": counts, **by_phase.phases}
        except KeyboardInterrupt:
            if checkpoint.exists():
                say(f"{display.summary()}; go on with the same command and --resume")
            raise
        for phase in missing:
            if phase in writers:
                writers[phase].abort()
    maps = {phase: _write(counted, files[phase], meaning) for phase, counted in found.items()}
    checkpoint.remove()
    for phase, made in maps.items():
        warn_unless_different(made, files[phase].output)
    expert_map = maps.pop("")
    if as_json:
        phases = {
            phase: {**files[phase].to_dict(), "n1": made.n1, "n2": made.n2, "top": top_experts(made)}
            for phase, made in maps.items()
        }
        print_json(
            {
                "verdict": _verdict(expert_map),
                **files[""].to_dict(),
                "behaviour": expert_map.behaviour,
                "n_pairs": counts.n_pairs,
                "n_skipped": counts.n_skipped,
                "shard": f"{shard[0]}/{shard[1]}",
                "until_stable": counts.stability.to_dict() if counts.stability else None,
                "n1": counts.n1,
                "n2": counts.n2,
                "top": top_experts(expert_map),
                "phases": phases or None,
                **display.figures(),
            }
        )
    else:
        print_verdict(_verdict(expert_map))
        print_map(expert_map, 10)
        if maps:
            console().print("", facts_table(_phase_rows(maps)), sep="\n")
        written = [path for phase in found for path in files[phase].paths]
        say_written(*written, before=f"\n{display.summary()}\n")
    if missing:
        phase, why = next(iter(missing.items()))
        raise PairsError(f"{files[phase].output}: not written: {why}")


def _verdict(expert_map: ExpertMap) -> str:
    from ...evaluation.reports.verdicts import of_map

    confidence = expert_map.confidence
    return of_map(None if confidence is None else confidence.differs_from_shuffled)


def _write(counts: RoutingCounts, files: _Files, meaning: dict[str, str]) -> ExpertMap:
    """Write the counts and the map of all tokens, or of a phase; the per-pair counts are written already."""
    expert_map = ExpertMap.from_counts(counts, **meaning)
    if files.per_pair and counts.n_pairs > 1:
        expert_map = annotate(expert_map, PairCounts.load(files.per_pair))
    if files.counts:
        counts.save(files.counts)
    expert_map.save(files.output)
    return expert_map


def _phase_rows(maps: Mapping[str, ExpertMap]) -> list[tuple[str, str]]:
    """What the maps of phases are of, and how they agree."""
    rows = [(phase, f"{made.n1:,} / {made.n2:,}, {phase_words(phase)}") for phase, made in maps.items()]
    both = list(maps.values())
    if len(both) == 2 and any(made.rd.any() for made in both):
        found = compare(both[0], both[1])
        shared = f"{found.overlap:.0%} of the first {found.top_n} experts (by chance {found.chance:.1%})"
        rows.append(("overlap", f"{shared}, Pearson of RD {found.pearson:+.4f}"))
    return rows
