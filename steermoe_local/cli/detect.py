"""steermoe detect."""

from __future__ import annotations

from pathlib import Path

import click

from .._files import require_writable
from ..expert_map import ExpertMap
from ..pairs import load_pairs
from ._common import json_option, llama_options, model_option, print_json, progress_bar
from .map import print_map


@click.command()
@model_option
@click.option("--pairs", "pairs_file", type=click.Path(path_type=Path), required=True, help="Contrastive pairs, JSONL.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Expert map to write, JSON.")
@click.option("--counts", "counts_file", type=click.Path(path_type=Path), help="Also write the routing counts, .npz.")
@click.option("--behaviour", help="Name of the behaviour.  [default: the pairs file's name]")
@click.option("--positive", default="", help="What the positive side means, in words.")
@click.option("--negative", default="", help="What the negative side means, in words.")
@click.option("--license", "license_", default="", help="Licence of the map, kept in it.")
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Longest prompt, 0: as the pairs need.",
)
@llama_options
@json_option
def detect(
    model: Path,
    pairs_file: Path,
    output: Path,
    counts_file: Path | None,
    behaviour: str | None,
    positive: str,
    negative: str,
    license_: str,
    ctx_size: int,
    threads: int | None,
    n_gpu_layers: int,
    batch_size: int,
    ubatch_size: int,
    verbose: bool,
    as_json: bool,
) -> None:
    """Find the experts of a behaviour: run contrastive pairs, write the map of risk differences.

    Runs unsteered, whatever STEERMOE_BIAS says.

    \b
    Example:
      steermoe detect -m tiny --pairs pairs.jsonl -o map.json
    """
    from ..recorder import record_counts

    for path in filter(None, (output, counts_file)):
        require_writable(path)
    pairs = load_pairs(pairs_file)
    with progress_bar() as show:
        counts = record_counts(
            model,
            pairs,
            behaviour=behaviour or pairs_file.name.split(".")[0],
            n_ctx=ctx_size,
            n_batch=batch_size,
            n_ubatch=ubatch_size,
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
            verbose=verbose,
            progress=lambda done, total: show("detect", done, total),
        )
    expert_map = ExpertMap.from_counts(counts, positive=positive, negative=negative, license=license_)
    if counts_file:
        counts.save(counts_file)
    expert_map.save(output)
    if as_json:
        top = [{"layer": layer, "expert": expert, "rd": rd} for layer, expert, rd in expert_map.top(10)]
        print_json(
            {
                "map": str(output),
                "counts": str(counts_file) if counts_file else None,
                "behaviour": expert_map.behaviour,
                "n_pairs": counts.n_pairs,
                "n1": counts.n1,
                "n2": counts.n2,
                "top": top,
            }
        )
        return
    print_map(expert_map, 10)
    click.echo(f"\nwritten: {output}" + (f", {counts_file}" if counts_file else ""))
