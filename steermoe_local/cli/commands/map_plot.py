"""steermoe map plot and steermoe map diff."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ..._util.files import require_writable
from ...errors import UsageError
from ...maps import significance
from ...maps.expert_map import ExpertMap, parse_layers
from ...maps.plots import plot_difference, plot_map, require_drawable
from ..options.common import FILE, json_option, output_option
from ..output import console, facts_table, print_json, say

_OUTPUT = "Picture to write: .png, .svg, or .html, which names the expert under the pointer."


@click.command()
@click.argument("map_file", metavar="MAP", type=FILE)
@output_option(_OUTPUT)
@click.option(
    "-n", "--top", type=click.IntRange(1, 60), default=20, show_default=True, help="Experts in the bar chart."
)
@click.option("--activate", type=click.IntRange(0), default=0, help="Mark the experts that this would promote.")
@click.option("--deactivate", type=click.IntRange(0), default=0, help="Mark the experts that this would suppress.")
@click.option("--reverse", is_flag=True, help="Flip the sign of RD for the choice, as in `bias build`.")
@click.option("--layers", metavar="A-B", help="Choose in these layers only, like 3-7,9.")
def plot(
    map_file: Path, output: Path, top: int, activate: int, deactivate: int, reverse: bool, layers: str | None
) -> None:
    """Draw a map: layers x experts, RD by depth, first experts with their intervals.

    --activate, --deactivate, --reverse and --layers mark what `steermoe bias build` would choose. Needs matplotlib:
    pip install 'steermoe-local[plot]'.

    \b
    Example:
      steermoe map plot map.json -o map.png --activate 8 --deactivate 8
    """
    require_drawable(output)
    require_writable(output)
    if (reverse or layers) and not activate and not deactivate:
        raise UsageError("--reverse and --layers belong to a choice; give --activate N, --deactivate N or both")
    expert_map = ExpertMap.load(map_file)
    signs = None
    if activate or deactivate:
        chosen = None if layers is None else parse_layers(layers)
        signs = expert_map.choose(activate, deactivate, reverse=reverse, layers=chosen)
    plot_map(expert_map, output, signs, top)
    click.echo(f"written: {output}")


@click.command()
@click.argument("first", metavar="A", type=FILE)
@click.argument("second", metavar="B", type=FILE)
@output_option(_OUTPUT, required=False)
@click.option("-n", "--top", type=click.IntRange(1), default=20, show_default=True, help="First experts to compare.")
@json_option
def diff(first: Path, second: Path, output: Path | None, top: int, as_json: bool) -> None:
    """Compare two maps: two behaviours, two quantizations, two runs.

    Overlap counts experts that both maps have among their first by |RD|, with the same sign.

    \b
    Example:
      steermoe map diff q8_0.json q4_0.json -o diff.png
    """
    if output:
        require_drawable(output)
        require_writable(output)
    one, two = ExpertMap.load(first), ExpertMap.load(second)
    result = significance.compare(one, two, top)
    same_model = one.identity == two.identity
    if not same_model:
        say(
            f"note: {first} is of {one.identity.short}, {second} of {two.identity.short}: other models, "
            "so expert numbers may mean other things"
        )
    if output:
        names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
        plot_difference(one, two, output, names, top)
    if as_json:
        print_json(
            {"first": str(first), "second": str(second), "same_model": same_model, "plot": output, **asdict(result)}
        )
        return
    worst = min(range(len(result.layers)), key=lambda i: result.by_layer[i])
    rows = [
        ("first", f"{first}: {one.behaviour}"),
        ("second", f"{second}: {two.behaviour}"),
        ("Pearson of RD", f"{result.pearson:+.4f}"),
        ("Spearman of RD", f"{result.spearman:+.4f}"),
        ("overlap", f"{result.overlap:.0%} of the first {result.top_n} experts (by chance {result.chance:.1%})"),
        ("lowest layer", f"layer {result.layers[worst]}, Pearson {result.by_layer[worst]:+.4f}"),
    ]
    console().print(facts_table(rows))
    if output:
        click.echo(f"\nwritten: {output}")
