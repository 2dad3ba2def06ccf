"""The command line as `python -m steermoe_local`, for where the program `steermoe` is not on the PATH."""

from __future__ import annotations

from .cli.start import start

if __name__ == "__main__":
    start()
