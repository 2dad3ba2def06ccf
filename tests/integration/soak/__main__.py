"""Run it and print the report: python -m tests.integration.soak [--seconds N] [--seed N] [--silent N] [--json FILE]."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.integration.reference.native import write_f32
from tests.integration.soak.soak import N_SILENT, soak
from tests.support.running_server import TINY


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Returns the exit status: 1 if something was not held, or could not be judged."""
    parser = argparse.ArgumentParser(prog="python -m tests.integration.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (600)")
    parser.add_argument("--seed", type=int, default=1, help="of what the clients do (1)")
    parser.add_argument("--silent", type=int, default=N_SILENT, help=f"connections that say nothing ({N_SILENT})")
    parser.add_argument("--json", type=Path, help="write the report there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(
            options.seconds, write_f32(TINY, Path(folder) / "tiny-f32.gguf"), options.seed, options.silent, say
        )
    print("\n".join(report.lines()))
    if options.json:
        options.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
    return bool(report.wrong or report.not_judged)


if __name__ == "__main__":
    sys.exit(main())
