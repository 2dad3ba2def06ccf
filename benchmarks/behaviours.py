"""The full measurement of the embedded model's behaviours: all held-out prompts, 20 draws of random experts.

    python benchmarks/behaviours.py [OUTPUT.json]

Decoding is greedy, so a machine gets the same figures every time. Prints a Markdown table.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from steermoe_local import __version__
from steermoe_local.evaluation.demo import DemoResult, run_demo


def table(result: DemoResult) -> str:
    lines = [
        "| behaviour | n | away | unsteered | towards | swing | random experts' swing (mean, max of 20) "
        "| ill-formed | neutral tasks right | max abs RD | planted experts found |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for b in result.behaviours:
        three = [
            " / ".join(f"{values[name]:.0%}" for name in ("away", "base", "toward"))
            for values in (b.ill_formed, b.neutral)
        ]
        lines.append(
            f"| {b.positive} / {b.negative} | {b.n} | {b.away:.0%} | {b.base:.0%} | {b.toward:.0%} "
            f"| {100 * b.swing:+.0f} points | {100 * b.random_swing:.0f}, {100 * b.random_swing_max:.0f} points "
            f"| {three[0]} | {three[1]} | {b.max_abs_rd:.2f} | {b.planted_precision:.0%} of {b.planted_n} |"
        )
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(Path(folder), n_prompts=None, n_random=20)
    print(table(result))
    print(f"\nsteermoe-local {__version__}, {platform.machine()}, {datetime.now(UTC):%Y-%m-%d}, {result.seconds:.0f} s")
    if len(sys.argv) > 1:
        data = result.to_dict()
        del data["folder"]
        Path(sys.argv[1]).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
