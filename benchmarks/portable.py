"""Speed of the portable wheel's libraries over that of the native build, in one run.

    python benchmarks/portable.py LIBRARIES... [--models tiny,granite-layers] [--rounds N] [--check]
                                                                            (a few minutes; `make test-dist` first)

LIBRARIES are folders of libraries: that of the wheel installed by `make test-dist`, or some in which a single variant
lies, or another build. Each is measured against the installed package, which is built for this CPU. A worker for each,
and a second one of the native build for the noise, take turns: a prompt of 256 tokens, then 32 tokens one by one. The
promise is a ratio of at least 0.97. With --check the status says if it is missed. On a machine with other work,
`--by cpu --threads 1` compares CPU time, which that work moves less.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import performance
from random_q4 import cached_model
from ratios import Ratio, noise_of, speed_ratios, verdict
from workers import Worker

from steermoe_local.llama.cpu import default_threads
from steermoe_local.models.embedded import embedded_model

BENCH = Path(__file__).resolve().parent.parent / "build" / "bench"
AT_LEAST = 0.97
N_PROMPT, N_DECODED = 256, 32


def measure(
    model: Path, libraries: Sequence[Path], n_threads: int, n_rounds: int, by: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """Ratios of each portable build to the native one, by folder and "prompt" or "decode", with verdicts."""
    places = {"native": "", "native again": ""} | {str(folder): str(folder.resolve()) for folder in libraries}
    times: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "decode": []} for name in places}
    with ExitStack() as stack:
        arguments = ("worker.py", model, "--threads", n_threads, "--variants", "plain")
        workers = {
            name: stack.enter_context(Worker(*arguments, environment={"STEERMOE_LIB_PATH": folder}))
            for name, folder in places.items()
        }
        names = list(workers)
        for number in range(-1, n_rounds):  # the first round warms up
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                read = workers[name].ask("prompt", variant="plain", n=N_PROMPT)
                said = workers[name].ask("decode", variant="plain", start=N_PROMPT, n=N_DECODED)
                if number >= 0:
                    times[name]["prompt"].append(read[by])
                    times[name]["decode"].append(said[by])
    found: dict[str, dict[str, dict[str, Any]]] = {str(folder): {} for folder in libraries}
    for part in ("prompt", "decode"):
        noise = noise_of(Ratio.of(speed_ratios(times["native again"][part], times["native"][part])))
        for name, parts in found.items():
            ratio = Ratio.of(speed_ratios(times[name][part], times["native"][part]))
            parts[part] = ratio.to_dict() | {"noise": noise, "holds": verdict(ratio, AT_LEAST, noise)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", type=Path, nargs="+")
    parser.add_argument("--models", default="tiny,granite-layers")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--by", choices=("seconds", "cpu"), default="seconds")
    parser.add_argument("--output", type=Path, default=BENCH / "portable.json")
    parser.add_argument("--check", action="store_true", help="status 1 if the promise is missed")
    arguments = parser.parse_args()
    for folder in arguments.libraries:
        if not any(folder.glob("libllama.*")):
            parser.error(f"{folder}: has no libllama; build the wheels with make test-dist")
    report: dict[str, Any] = {**performance.circumstances(), "threads": arguments.threads, "by": arguments.by}
    report["models"] = {}
    missed = False
    print(f"{'model':16} {'part':7} {'ratio':>6} {'95% interval':>16} {'noise':>6}  at least {AT_LEAST} libraries")
    for name in arguments.models.split(","):
        model = embedded_model() if name == "tiny" else cached_model(name, arguments.output.parent)
        n_threads = 1 if name == "tiny" else arguments.threads  # as the package chooses for it
        found = measure(model, arguments.libraries, n_threads, arguments.rounds, arguments.by)
        report["models"][name] = found
        for folder, parts in found.items():
            for part, ratio in parts.items():
                numbers = f"{ratio['median']:6.3f} {ratio['low']:7.3f} to {ratio['high']:5.3f} {ratio['noise']:6.3f}"
                print(f"{name:16} {part:7} {numbers}  {ratio['holds']:13} {folder}", flush=True)
                missed |= ratio["holds"] == "no"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(int(missed and arguments.check))


if __name__ == "__main__":
    main()
