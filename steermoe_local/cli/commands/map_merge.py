"""steermoe map merge."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..._util.file_kinds import PAIR_COUNTS, kind_of
from ..._util.windows import replace
from ...errors import UsageError
from ...maps.counts import RoutingCounts, merge_counts
from ...maps.expert_map import ExpertMap
from ...maps.pair_counts import PairCounts, merge_pair_counts
from ...maps.significance import annotate
from ..options.common import FILE, json_option, lock_output, meaning_options, output_option, require_distinct
from ..output import print_json, say_written, warn
from .map import print_map, warn_unless_different


@click.command()
@click.argument("files", metavar="FILES...", type=FILE, nargs=-1, required=True)
@output_option("Expert map to write, JSON.")
@click.option("--counts", "counts_file", type=FILE, help="Also write the sum of the counts, .npz.")
@click.option(
    "--per-pair",
    "per_pair_file",
    type=FILE,
    help="Also write all per-pair counts; name those of each run beside its counts.",
)
@click.option("--behaviour", help="Name of the behaviour.  [default: the counts']")
@meaning_options()
@json_option
def merge(
    files: tuple[Path, ...],
    output: Path,
    counts_file: Path | None,
    per_pair_file: Path | None,
    behaviour: str | None,
    meaning: dict[str, str],
    as_json: bool,
) -> None:
    """Add up the counts of several runs or machines (detect --counts), and write the map of all of them.

    The runs must be of one model and one behaviour. Shards of one pairs file and different pairs files add up; pairs
    that two files hold are refused. Files of detect --per-pair may stand among them: then the map gets standard errors
    and stability, and --per-pair keeps them together.

    \b
    Example:
      steermoe map merge a.counts.npz b.counts.npz -o map.json
    """
    require_distinct(output, counts_file, per_pair_file)
    for path in filter(None, (output, counts_file, per_pair_file)):
        lock_output(path)
    counted: list[tuple[str, RoutingCounts]] = []
    sidecars: list[Path] = []
    for path in files:
        if kind_of(path) == PAIR_COUNTS:
            PairCounts.load(path)
            sidecars.append(path)
        else:
            counted.append((str(path), RoutingCounts.load(path)))
    if not counted:
        raise UsageError("only per-pair counts; name the counts (detect --counts) of the runs too")
    if per_pair_file and not sidecars:
        raise UsageError(f"--per-pair {per_pair_file}: no per-pair counts among the files; name those of each run")
    counts = merge_counts(counted)
    expert_map = ExpertMap.from_counts(counts, behaviour or "", **meaning)
    if sidecars:
        kept = Path(os.path.realpath(per_pair_file or output))
        target = kept.with_name(f".{kept.name}.pairs.npz")
        try:
            expert_map = annotate(expert_map, merge_pair_counts(sidecars, target))
            if per_pair_file:
                replace(target, kept)
        finally:
            target.unlink(missing_ok=True)
    if len(counts.dates) > 1:
        warn(
            f"the chat template printed other dates in some runs ({', '.join(counts.dates)}), which may change routing"
        )
    if counts_file:
        counts.save(counts_file)
    expert_map.save(output)
    warn_unless_different(expert_map, output)
    written = [str(path) for path in (output, counts_file, per_pair_file) if path]
    if as_json:
        print_json(
            {
                "map": str(output),
                "counts": str(counts_file) if counts_file else None,
                "per_pair": str(per_pair_file) if per_pair_file else None,
                "behaviour": expert_map.behaviour,
                "n_files": len(counted),
                "n_pairs": counts.n_pairs,
                "n_skipped": counts.n_skipped,
                "n1": counts.n1,
                "n2": counts.n2,
                "sources": [
                    {
                        "pairs_sha256": source.pairs_sha256,
                        "shard": f"{source.shard[0]}/{source.shard[1]}",
                        "n_pairs": source.n_pairs,
                        "n_skipped": source.n_skipped,
                    }
                    for source in counts.sources
                ],
            }
        )
        return
    print_map(expert_map, 10)
    say_written(*written, before=f"\n{len(counted)} runs, {counts.n_pairs} pairs\n")
