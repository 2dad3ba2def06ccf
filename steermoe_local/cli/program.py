"""The root group of commands: it applies settings before a command starts, and turns errors into messages."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from .._util.closest import did_you_mean
from .._util.import_path import leave_current_folder
from .._util.visible import visible
from ..errors import SteerMoEError, UsageError
from ..llama.library import tell_of_crashes
from ..models.embedded import embedded_models
from . import failures
from .failures import EXIT_ERROR, EXIT_INTERRUPTED
from .help_pages import ALL, is_rare, write_commands
from .options import settings
from .options.system_text import locale_cure, require_text
from .output import package_warnings, say
from .streams import settle_streams

_DID_YOU_MEAN = re.compile(r"\.? \(?(?:Did you mean|Possible options:).*$")  # of some of click's releases, not of all
_NO_COMMAND = re.compile(r"No such command '(.*?)'")
EXIT_USAGE = 2
# Commands that choose experts themselves say where these are in force, others by which rules: one has no other.
_INSTEAD = {"--steer": "--where", "--plan": "--where", "--where": "--steer"}


class SteerMoEGroup(click.Group):
    """A group whose commands take defaults from the environment and the configuration, and fail with one line.

    The line says what is wrong, where, and the cure.
    """

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """Run a command line: without `args` as this process's program, of which hooks and signals are taken."""
        failures.debug(False)
        settle_streams()
        if args is None:
            leave_current_folder()
            failures.install_hooks()
            tell_of_crashes()
        with failures.last_resort():
            return super().main(args, *others, **settings)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Give every option its environment variables before anything is read."""
        try:
            if parent is None:
                settings.name_variables(self)
            if extra.get("resilient_parsing"):  # click completes for a shell
                from .options import completion

                completion.attach(self)
            elif parent is None:
                require_text(args, os.environ)
            return super().make_context(info_name, args, parent, **extra)
        except UsageError as error:
            _fail(str(error), EXIT_USAGE)
        except click.UsageError as error:
            _fail_by_click(error)
        except (KeyboardInterrupt, EOFError) as error:
            _fail_unlike_click(error)
        except OSError as error:  # a full disk behind the stdout of --help
            _fail_by_system(error)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Read the configuration for the command that is about to start; help is shown even if the file is broken."""
        found = super().resolve_command(ctx, args)
        command, rest = found[1:]
        needs_none = isinstance(command, settings.WithoutConfig) or bool({*ctx.help_option_names, ALL} & {*rest})
        if command is not None and not needs_none and not ctx.resilient_parsing:
            ctx.default_map = settings.default_map(self)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the program's commands in groups."""
        write_commands(self, ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; translate errors into a message and an exit status."""
        try:
            with package_warnings() if ctx.parent is None else contextlib.nullcontext():
                return super().invoke(ctx)
        except UsageError as error:
            _fail(str(error), EXIT_USAGE)
        except SteerMoEError as error:
            _fail(str(error), EXIT_ERROR)
        except click.ClickException as error:
            _fail_by_click(error)
        except OSError as error:
            _fail_by_system(error)
        except UnicodeEncodeError as error:
            # a name in a file, or a folder's, in a locale that does not have its letters
            what = f"{error.object[error.start : error.end]!r} in a name or text cannot be written as"
            _fail(f"{what} {locale_cure() or f'{error.encoding}; rename the file or folder'}", EXIT_ERROR)
        except MemoryError:
            _fail("out of memory; close other programs, or take a smaller model or context (-c)", EXIT_ERROR)
        except (KeyboardInterrupt, EOFError, click.Abort) as error:
            _fail_unlike_click(error)


def _fail_unlike_click(error: BaseException) -> NoReturn:
    """Exit by what click takes for the user's wish to end: an interrupt, and any EOFError, which is none."""
    if isinstance(error, EOFError):
        failures.report(error)
        sys.exit(EXIT_ERROR)
    _fail("interrupted", EXIT_INTERRUPTED)


def _fail_by_system(error: OSError) -> NoReturn:
    """Exit by an error that is not handled elsewhere: a full disk behind stdout, a folder that is gone."""
    _drop_stdout()
    if isinstance(error, BrokenPipeError):  # the reader of stdout is gone (`steermoe map show M | head`)
        sys.exit(EXIT_ERROR)
    where = error.filename or "the output or a file"
    _fail(f"{where}: {error.strerror or error}; check the path, and the room on the disk", EXIT_ERROR)


def debug_option(*, hidden: bool = False) -> click.Option:
    """The option that asks for tracebacks; it has taken effect when the others are read."""

    def take(ctx: click.Context, parameter: click.Parameter, on: bool) -> None:
        if on and not ctx.resilient_parsing:
            failures.debug()

    words = "Show the traceback of an unexpected error."
    return click.Option(
        [failures.OPTION],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        hidden=hidden,
        envvar=None if hidden else failures.VARIABLE,
        show_envvar=True,
        callback=take,
        help=words,
    )


def take_debug(group: click.Group) -> None:
    """Let all commands below a group take --debug, too, without a word about it in their help."""
    for command in group.commands.values():
        command.params.append(debug_option(hidden=True))
        if isinstance(command, click.Group):
            take_debug(command)


def _drop_stdout() -> None:
    """Send the rest of stdout's buffer to the null device; writing it at exit would fail again."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _fail_by_click(error: click.ClickException) -> NoReturn:
    """Print an error of click like all others, in one line that names the help, and exit."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()
        sys.exit(error.exit_code)
    ctx = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split())
    meant = _meant(error, message)
    message = _DID_YOU_MEAN.sub("", message).rstrip(".")
    if isinstance(error, click.NoSuchOption) and ctx is not None:
        instead = _INSTEAD.get(error.option_name)
        if instead and instead in (name for parameter in ctx.command.params for name in parameter.opts):
            message = f"no such option {error.option_name!r}; this command has {instead}, see docs/plans.md"
            meant = ""
    if message[1:2].islower():
        message = message[0].lower() + message[1:]
    if isinstance(error, click.BadParameter) and ctx is not None and error.param is not None:
        message += settings.provenance(ctx, error.param)
    if meant:
        message += meant
    elif ctx is not None:
        wrong = error.param if isinstance(error, click.BadParameter) else None
        message += f"; see {ctx.command_path} {ALL if wrong is not None and is_rare(wrong) else '--help'}"
    _fail(message, error.exit_code)


def _meant(error: click.ClickException, message: str) -> str:
    """What a misspelt option or command was probably meant to be, as the end of a line; "" for other errors."""
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return ""
    command = error.ctx.command
    if isinstance(error, click.NoSuchOption):
        options = [p for p in command.get_params(error.ctx) if isinstance(p, click.Option) and not p.hidden]
        return did_you_mean(error.option_name, [name for p in options for name in (*p.opts, *p.secondary_opts)])
    match = _NO_COMMAND.search(message)
    if match is None or not isinstance(command, click.Group):
        return ""
    if match[1] in embedded_models() or match[1].lower().endswith(".gguf"):
        return f", but a model; to talk to it: {error.ctx.find_root().command_path} chat {match[1]}"
    return did_you_mean(match[1], command.list_commands(error.ctx))


def _fail(message: str, status: int) -> NoReturn:
    say(f"error: {visible(message)}")
    sys.exit(status)
