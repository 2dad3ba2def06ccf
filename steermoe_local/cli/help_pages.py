"""Pages of --help: options under headings, the rare ones for --help-all, and the program's commands in groups."""

from __future__ import annotations

import click

from .options.groups import HEADINGS, OWN, place
from .streams import put

ALL = "--help-all"
_META = "steermoe.help_all"  # set in a context whose page shows everything
_MOST_WITHOUT_HEADINGS = 9  # options of a page
_COLUMN = 30  # characters of the options' names

COMMANDS: dict[str, tuple[str, ...]] = {
    "Get started": ("learn", "chat", "run", "serve", "models", "behaviours", "demo"),
    "Make maps": ("pairs", "detect", "attribute", "fit", "condition", "trace"),
    "Measure": ("tasks", "eval", "tune", "sweep", "experiment", "transfer", "audit"),
    "Files and settings": ("map", "bias", "pull", "info", "presets", "config", "completion"),
}
"""The commands of the program under their headings, in the order in which `steermoe --help` lists them."""


def add_help_all(group: click.Group) -> None:
    """Let every command below a group write its options under headings, and take --help-all; groups take it, too."""
    group.params.append(_help_all_option(hidden=True))
    for command in group.commands.values():
        if isinstance(command, click.Group):
            add_help_all(command)
        else:
            command.params.append(_help_all_option())
            _set_writer(command)


def help_all(command: click.Command, ctx: click.Context) -> str:
    """The page of --help-all."""
    ctx.meta[_META] = True
    return command.get_help(ctx)


def write_commands(group: click.Group, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the commands of the program in their groups, those of no group last."""
    grouped = {name for names in COMMANDS.values() for name in names}
    others = tuple(name for name in group.list_commands(ctx) if name not in grouped)
    width = formatter.width - 6 - max(map(len, group.commands))
    for heading, names in (*COMMANDS.items(), ("Others", others)):
        found = ((name, group.get_command(ctx, name)) for name in names)
        rows = [(name, command.get_short_help_str(width)) for name, command in found if command and not command.hidden]
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


def is_rare(parameter: click.Parameter) -> bool:
    """Whether only --help-all shows a parameter."""
    return place(parameter).rare


def _help_all_option(*, hidden: bool = False) -> click.Option:
    def show(ctx: click.Context, parameter: click.Parameter, on: bool) -> None:
        if on and not ctx.resilient_parsing:
            put(help_all(ctx.command, ctx))
            ctx.exit()

    return click.Option(
        [ALL],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        hidden=hidden,
        help="Show all options and exit.",
    )


def _set_writer(command: click.Command) -> None:
    """Have the command's page written by `_write_options`, whatever class the command has."""

    def write(ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_options(command, ctx, formatter)

    setattr(command, "format_options", write)  # noqa: B010 # a method of the class otherwise


def _write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    everything = ctx.meta.get(_META, False)
    sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
    about_help, n_rare = [], 0
    for parameter in command.get_params(ctx):
        record = _record(parameter, ctx, everything)
        if record is None or ALL in parameter.opts:
            continue
        if set(parameter.opts) & set(ctx.help_option_names):
            about_help.append(record)
        elif is_rare(parameter) and not everything:
            n_rare += 1
        else:
            sections[place(parameter).heading].append(record)
    if n_rare:
        about_help.append((ALL, f"Show this message with {n_rare} more options and exit."))
    if sum(map(len, sections.values())) <= _MOST_WITHOUT_HEADINGS:
        sections = {OWN: [*(record for records in sections.values() for record in records), *about_help]}
        about_help = []
    widths = [len(names) for records in sections.values() for names, _ in records]
    width = max((width for width in widths if width <= _COLUMN), default=0)
    for heading, records in sections.items():
        if records:
            with formatter.section(heading):  # all with a second column at the same place
                formatter.write_dl([(names.ljust(width), text) for names, text in records], col_max=width)
    if about_help:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_dl([(names.ljust(width), text) for names, text in about_help], col_max=width)


def _record(parameter: click.Parameter, ctx: click.Context, everything: bool) -> tuple[str, str] | None:
    """What the page says of an option: its names, of which --help has one short and one long, and what it does."""
    if not isinstance(parameter, click.Option):
        return None
    names = parameter.opts
    if not everything:
        kinds = ([name for name in names if name.startswith("--") is long] for long in (False, True))
        parameter.opts = [name for kind in kinds for name in kind[:1]]
    try:
        return parameter.get_help_record(ctx)
    finally:
        parameter.opts = names
