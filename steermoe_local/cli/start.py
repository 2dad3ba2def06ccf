"""The program's entry point: it also covers what goes wrong before a command starts."""

from __future__ import annotations

from .failures import install_hooks, last_resort
from .streams import settle_streams


def start() -> None:
    """Run the command line of this process; the exit status says how it went."""
    settle_streams()
    with last_resort():
        install_hooks()
        from .group import main

        main(prog_name="steermoe")
