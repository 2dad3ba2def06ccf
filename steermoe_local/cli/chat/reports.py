"""Tables of a chat: the experts that an answer used, and what steering changed about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..._util.visible import visible
from ...maps.colours import TERMINAL
from ...maps.recommended import values_words
from ...steering.plan import AnySteering, SteeringPlan
from ...steering.steering import Steering

if TYPE_CHECKING:
    from ...generation.answer_routing import AnswerRouting, ExpertUse, SlotChange, WhyReport

_FEW = 8  # experts, or layers, of a short report
_MOST = 200  # characters of a plan's rules in the line that says what steers
_MARKS = {1: "+", -1: "-", 0: ""}


def describe(steering: AnySteering | None, on: bool = True) -> str:
    """One line: "digits-words: 4 experts promoted, 4 suppressed, towards digits, hard rule, all layers".

    Of a plan its rules: "careful, a plan of 2 rules: thinking: none; answer: digits-words +2 -2".
    """
    if steering is None:
        return "off; no map or bias file is chosen"
    if isinstance(steering, SteeringPlan):
        line = _describe_plan(steering)
        return line if on else f"off; /steer on goes back to {line}"
    built = steering.bias_file()
    if built is None:
        return (
            f"off; {steering.name} is chosen, which recommends no experts: "
            "/activate N promotes, /deactivate N suppresses"
        )
    parts = [f"{_many(built.n_active, 'expert')} promoted, {built.n_inactive} suppressed"]
    if steering.side:
        parts.append(f"towards {steering.side}")
    elif steering.reverse:
        parts.append("reversed")
    if steering.preset:
        parts.append(f"preset {steering.preset}")
    parts += [values_words(steering.values)] if steering.values else []
    parts += [f"by {steering.rank}"] if steering.rank != "rd" else []
    parts.append(_rule(steering))
    parts.append(f"layers {steering.layers}" if steering.layers else "all layers")
    line = f"{steering.name}: {', '.join(parts)}"
    return line if on else f"off; /steer on goes back to {line}"


def _describe_plan(plan: SteeringPlan) -> str:
    name = "a plan" if plan.path is None else f"{plan.name}, a plan"
    rules = "; ".join(plan.texts)
    if len(rules) > _MOST:
        rules = f"{rules[: _MOST - 3]}..."
    nothing = " (steers nothing)" if plan.build() is None else ""
    return f"{name} of {_many(len(plan.rules), 'rule')}{nothing}: {rules}"


def _rule(steering: Steering) -> str:
    if steering.cap is not None:
        return f"capped rule, cap {steering.cap:g}"
    if steering.scale is None:
        return f"{steering.mode} rule"
    return f"soft rule, strength {steering.scale:g}" + (f" by {steering.weights}" if steering.weights else "")


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def experts_report(
    routing: AnswerRouting, steering: AnySteering | None, *, everything: bool = True
) -> list[RenderableType]:
    """Which experts an answer used, layer by layer, the most used first; else a few lines with the most used of all."""
    head = (
        f"The last answer: {_many(routing.n_tokens, 'token')}, each through {_many(routing.n_expert_used, 'expert')} "
        f"in {_many(len(routing.layers), 'layer')}."
    )
    lines = [head]
    if any(use.sign for layer in routing.layers for use in layer.experts):
        lines.append(
            f"Promoted experts (+) took {routing.promoted:.0%} of the routing, suppressed ones (-) "
            f"{routing.suppressed:.0%}."
        )
    expert_map = steering and steering.expert_map
    if routing.mean_rd is not None and expert_map:
        line = f"Mean RD of the experts used: {routing.mean_rd:+.3f}"
        if routing.position is not None:
            low, high = expert_map.negative or "the negative side", expert_map.positive or "the positive side"
            line += f"; on the map's scale {routing.position:.2f} (0: {visible(low)}, 1: {visible(high)})"
        lines.append(line + ".")
    columns = "share of the tokens" + ("" if routing.mean_rd is None else ", RD")
    if not everything:
        return [Text("\n".join(lines)), *_most_used(routing, columns)]
    if expert_map and expert_map.effects is not None:
        columns += " (effect of promoting / suppressing it, nats a token)"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column(f"expert: {columns}", overflow="fold")
    for layer in routing.layers:
        # all that were chosen, and of the others as many as a token uses
        others = [use for use in layer.experts if not use.sign][: routing.n_expert_used]
        chosen = [use for use in layer.experts if use.sign]
        table.add_row(str(layer.layer), _Flow([_use(use) for use in chosen + others]))
    return [Text("\n".join(lines)), table]


def _most_used(routing: AnswerRouting, columns: str) -> list[RenderableType]:
    uses = [(layer.layer, use) for layer in routing.layers for use in layer.experts if use.slots]
    uses.sort(key=lambda pair: (-pair[1].of_tokens, pair[0], pair[1].expert))
    flow = _Flow([_use(use, f"{layer}.") for layer, use in uses[:_FEW]])
    head = Text(f"The most used, layer.expert: {columns}")
    return [head, flow, Text("/experts all shows every layer", style="dim")]


def _use(use: ExpertUse, layer: str = "") -> Text:
    rd = "" if use.rd is None else f" {use.rd:+.2f}"
    style = {1: "bold green", -1: "bold red", 0: ""}[use.sign]
    effects = "" if use.promote is None and use.suppress is None else f" ({_tried(use.promote)}/{_tried(use.suppress)})"
    return Text(f"{_MARKS[use.sign]}{layer}{use.expert}: {use.of_tokens:.0%}{rd}{effects}", style=style)


def _tried(effect: float | None) -> str:
    return "?" if effect is None else f"{effect:+.2f}"


@dataclass
class _Flow:
    """Pieces of text in lines that are broken between them only."""

    pieces: list[Text]
    gap: str = "  "

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: list[Text] = []
        for piece in self.pieces:
            if lines and lines[-1].cell_len + len(self.gap) + piece.cell_len <= options.max_width:
                lines[-1].append(self.gap).append_text(piece)
            else:
                lines.append(Text().append_text(piece))
        yield Text("\n").join(lines)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widths = [piece.cell_len for piece in self.pieces]
        return Measurement(max(widths), sum(widths) + len(self.gap) * (len(widths) - 1))


def why_report(report: WhyReport, *, everything: bool = True) -> list[RenderableType]:
    """What steering changed about the routing of an answer, layer by layer; else a few lines."""
    lines = [
        f"The last answer's {_many(report.n_tokens, 'token')}, read again unsteered: steering changed "
        f"{report.changed} of {report.n_slots} choices of an expert ({report.changed / report.n_slots:.0%})."
    ]
    for name, change, verb in (
        ("Promoted", report.promoted, "forced in"),
        ("Suppressed", report.suppressed, "suppressed"),
    ):
        if change.n_experts:
            lines.append(
                f"{name}: {_many(change.n_experts, 'expert')}, {change.share_unsteered:.1%} of the choices unsteered, "
                f"{change.share_steered:.1%} steered: {change.moved} {verb}."
            )
    if not everything:
        most = sorted((layer for layer in report.layers if layer.changed), key=lambda layer: -layer.changed)[:_FEW]
        if most:
            lines.append("Most changed: " + ", ".join(f"layer {layer.layer} ({layer.changed})" for layer in most) + ".")
        return [Text("\n".join(lines)), Text("/why full shows every layer", style="dim")]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right")
    for name in ("promoted", "suppressed", "changed"):
        table.add_column(name, justify="right", overflow="fold", style=TERMINAL.get(name))
    for layer in report.layers:
        if layer.promoted.n_experts or layer.suppressed.n_experts or layer.changed:
            table.add_row(str(layer.layer), _choices(layer.promoted), _choices(layer.suppressed), str(layer.changed))
    note = Text("Choices of promoted and suppressed experts: unsteered > steered.", style="dim")
    return [Text("\n".join(lines)), table, note]


def _choices(change: SlotChange) -> str:
    return f"{change.unsteered} > {change.steered}" if change.n_experts else "-"
