"""The command line as `python -m steermoe_local`, for where the program `steermoe` is not on the PATH."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main(prog_name="steermoe")
