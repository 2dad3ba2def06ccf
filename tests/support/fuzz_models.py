"""Runs everything that reads a model's header on damaged models, in processes of little memory and time.

`make fuzz` runs `python -m tests.support.fuzz_models`. A finding is an error of another type than FormatError and
ModelError, or more than `MEMORY` bytes or `SECONDS` of CPU time. One is run again by its seed and number:
`--seed S --first N --runs 1`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steermoe_local import BiasFile, write_bias
from steermoe_local._util.file_kinds import kind_of
from steermoe_local.cli.commands import info as info_command
from steermoe_local.cli.options.opening import context_size
from steermoe_local.errors import FormatError, ModelError
from steermoe_local.model_files.cache_shape import cache_shape, read_headers
from steermoe_local.model_files.header import n_vocab
from steermoe_local.model_files.memory import check_memory
from steermoe_local.model_files.model_info import ModelInfo, check_loadable, model_info
from steermoe_local.models.embedded import embedded_model
from steermoe_local.models.local_facts import ModelFacts
from steermoe_local.steering.bias_file import read_bias
from tests.support.model_mutants import Forged, mutant, taken_apart, write
from tests.support.paths import BUILD, GOLDEN
from tests.support.random_models import DENSE_FIRST, GPT_OSS, SELECTION_BIAS, write_random_model

MEMORY = 1 << 30  # bytes of address space beyond what the process has when it begins, NumPy and click loaded
SECONDS = 20  # of CPU time a file; a router of 4096 layers that lie in a hole of 1 TiB is refused, not hashed
_VOCABULARIES = ("ggml-vocab-nomic-bert-moe.gguf", "ggml-vocab-llama-spm.gguf")


def seeds(folder: Path) -> list[Forged]:
    """The models that are damaged: the embedded one, random ones, a bias file, vocabularies of llama.cpp if here."""
    described = enumerate((GPT_OSS, DENSE_FIRST, SELECTION_BIAS))
    made = [write_random_model(folder / f"{number}.gguf", model) for number, model in described]
    # unpacked by `make test-rehearsal`
    archives = BUILD.parent / "rehearsal"
    vocabularies = [path for name in _VOCABULARIES for path in sorted(archives.glob(f"*/{name}"))[:1]]
    return [taken_apart(path) for path in (embedded_model(), *made, GOLDEN / "hard.gguf", *vocabularies)]


def examine(path: Path, scratch: Path) -> str:
    """Do all that commands do with a model before llama.cpp sees it. Returns how far that went."""
    kind_of(path)
    facts = ModelFacts.read(path)
    with contextlib.suppress(FormatError):
        read_bias(path)
    try:
        info = model_info(path, routers=False)
    except ModelError:
        assert not facts.readable
        return "refused"
    json.dumps(info.to_dict())
    info_command._rows(info)
    _sizes(info)
    try:
        check_loadable(path)
        identity = model_info(path).require_moe()
    except ModelError:
        return "not loadable or steerable"
    signs = np.zeros(identity.shape, np.float32)
    signs[0, 0] = 1
    write_bias(BiasFile.from_signs(signs, identity), scratch / "bias.gguf")
    return "steerable"


def _sizes(info: ModelInfo) -> None:
    with contextlib.suppress(ModelError, FormatError):
        headers = read_headers(info)
        n_vocab(headers)
        cache_shape(info, headers)
        for n_ctx in (0, context_size(info, None), context_size(info, 0)):
            estimate = check_memory(info, n_ctx, 2, repacks=lambda kind, shape: kind == "Q4_0", free=1 << 30)
            json.dumps(estimate.to_dict())
            assert estimate.problem() is None or "\n" not in str(estimate.problem())
            estimate.warning()


@contextlib.contextmanager
def _cpu_limit(seconds: int) -> Iterator[None]:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))
    yield


def run(first: int, n_runs: int, seed: int, folder: Path) -> dict[str, int]:
    """Examine mutants in this process, under the limits. Raises what is a finding."""
    import resource

    (folder / "seeds").mkdir(exist_ok=True)
    models = seeds(folder / "seeds")
    taken = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds of CPU time")

    signal.signal(signal.SIGXCPU, too_long)
    outcomes = collections.Counter[str]()
    for number in range(first, first + n_runs):
        rng = random.Random(seed << 40 | number)
        path = folder / rng.choice(("m.gguf", "m.gguf", "m.gguf", "m-00001-of-00002.gguf", "m-00001-of-99999.gguf"))
        write(mutant(models, rng), path, rng)
        try:
            with _cpu_limit(SECONDS):
                outcomes[examine(path, folder)] += 1
        except BaseException:
            print(f"FINDING: --seed {seed} --first {number} --runs 1", flush=True)
            raise
        finally:
            path.unlink()
    return outcomes


def fuzz(n_runs: int, seed: int = 1, first: int = 0, batch: int = 5000) -> tuple[dict[str, int], str]:
    """Examine mutants in child processes, which a finding ends. Returns the outcomes and the first finding ("")."""
    outcomes = collections.Counter[str]()
    for start in range(first, first + n_runs, batch):
        n = min(batch, first + n_runs - start)
        command = [sys.executable, "-m", "tests.support.fuzz_models", "--child", "--seed", str(seed)]
        command += ["--first", str(start), "--runs", str(n)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            return outcomes, f"exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        outcomes.update(json.loads(done.stdout.splitlines()[-1]))
    return outcomes, ""


def main() -> int:
    """`--runs N [--seed S] [--first N]`; `--child` runs them in this process."""
    parser = argparse.ArgumentParser(description="fuzz what reads a model's header")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            try:
                print(json.dumps(run(arguments.first, arguments.runs, arguments.seed, Path(folder))))
            except BaseException:
                traceback.print_exc()
                return 1
        return 0
    begin = time.monotonic()
    print(f"== model headers: {arguments.runs:,} executions", flush=True)
    outcomes, finding = fuzz(arguments.runs, arguments.seed, arguments.first)
    if finding:
        print(f"== model headers: FINDING: {finding}")
        return 1
    words = ", ".join(f"{name} {n:,}" for name, n in sorted(outcomes.items()))
    seconds = time.monotonic() - begin
    print(f"== model headers: {sum(outcomes.values()):,} executions in {seconds:.0f} s, no finding; {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
