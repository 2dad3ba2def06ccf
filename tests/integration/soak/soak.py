"""The soak test: two servers, their clients in other processes, and the judge of what they saw.

The phases: warm up under the same load, drain, measure what the server holds; the load for the rest of the time, drain,
measure again; the load once more, and SIGTERM in the middle of it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from steermoe_local.llama.template_pool import MOST_CHILDREN
from tests.integration.soak.bound import BOUND, said
from tests.integration.soak.measure import EXECUTOR_THREADS, Curve, Held, held
from tests.integration.soak.prober import Samples
from tests.integration.soak.template import write_bombs
from tests.support.alone import Alone
from tests.support.names_in_use import CHOICES, Records, judge
from tests.support.running_server import until
from tests.support.serving import Process, serving

GRACE = 30.0  # seconds that running answers have after SIGTERM: `_GRACE` of steermoe_local/server/program.py
MARGIN = 15.0  # to end what then still runs, and the process, on a busy machine
DRAINED = 60.0
N_SILENT = 1100  # more than the 1,024 descriptors that a process often may have
# What may be held beyond the plateau once the load has gone. Memory: the responses that are kept (at most 256 of some
# kB), and what malloc keeps of the largest bodies (16 MiB, and their values) in the arenas of the threads that read
# them. Threads: the executor grows up to its size. Children: those that render, up to their number, as many as were
# needed at once; each with three pipes here and the memory of a Python. Descriptors: besides, one connection of a test.
_MORE = MOST_CHILDREN - 1
ALLOWED = Held(
    memory=96.0, files=2 + 4 * _MORE, threads=EXECUTOR_THREADS + _MORE, children=_MORE, of_children=64.0 * _MORE
)


@dataclass
class Report:
    """What happened. `wrong` is empty if all that is promised was held."""

    seconds: float
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    health: dict[str, Any] = field(default_factory=dict)
    probed: dict[str, Samples] = field(default_factory=dict)
    held: dict[str, dict[str, Held]] = field(default_factory=dict)
    curve: list[tuple[float, Held]] = field(default_factory=list)
    stopped: dict[str, Any] = field(default_factory=dict)
    not_judged: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        counts = {"counts": dict(self.counts), "judged": dict(self.judged)}  # asdict cannot copy a Counter
        return asdict(replace(self, counts=Counter(), judged=Counter())) | counts

    def lines(self) -> Iterator[str]:
        """For people."""
        yield "requests:  " + ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))
        rate = sum(self.counts.values()) / self.seconds
        yield f"           {rate:.0f} a second, over {self.seconds:.0f} seconds"
        yield "judged:    " + ", ".join(f"{n} {what}" for what, n in sorted(self.judged.items()))
        for name, health in self.health.items():
            yield f"/health:   {name}: {health}"
        for name, phases in self.held.items():
            yield f"held:      {name}: " + "; ".join(f"{phase}: {asdict(held)}" for phase, held in phases.items())
        if self.curve:
            step = max(1, len(self.curve) // 12)
            yield "memory:    " + ", ".join(f"{t:.0f} s: {held.memory:.0f}" for t, held in self.curve[::step]) + " MiB"
        yield f"SIGTERM:   {self.stopped}"
        yield from (f"unknown:   {line}" for line in self.not_judged)
        yield from (f"wrong:     {line}" for line in self.wrong[:50])
        yield f"{len(self.wrong)} things are wrong" if self.wrong else "all of it was held"


@dataclass
class _Load:
    """The processes of clients of one phase."""

    processes: list[subprocess.Popen[bytes]]
    files: list[Path]

    def wait(self, seconds: float) -> None:
        for process in self.processes:
            process.wait(seconds)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def soak(
    seconds: float,
    model: Path,
    seed: int = 1,
    n_silent: int = N_SILENT,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run it for about that many seconds, at least 30.

    `model` is the embedded one in F32, see `Alone`. `n_silent` connections say nothing.
    """
    report = Report(seconds)
    warm, stopping = max(8.0, seconds / 6), 5.0
    records, bound = Records(), Counter[str]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = ("--temp", 0, "-ctk", "f32", "-ctv", "f32", "-a", "tiny", "--timeout", 60)
        server = stack.enter_context(_server(report, *arguments, model=model, parallel=6, queue=64))
        bombs = stack.enter_context(
            _server(report, "--temp", 0, "--timeout", 20, model=write_bombs(folder / "bombs.gguf"))
        )
        servers = {"server": server, "beside template bombs": bombs}
        alone = stack.enter_context(Alone(model))
        expected = _bound_alone(server, alone, report)
        held_at: dict[str, dict[str, Held]] = {name: {} for name in servers}
        curve = Curve(server.process.pid)
        curve.start()
        begun = time.monotonic()
        for number, (phase, length) in enumerate((("warm", warm), ("after", seconds - warm - stopping))):
            say(f"{phase}: {length:.0f} seconds of load")
            with _probed(report, servers, phase):
                load = _start(server, bombs, length, 10 * seed + number, folder, n_silent)
                _finish(load, length, report, records, bound)
            say(f"{phase}: draining; {len(report.wrong) + len(records.wrong)} things are wrong so far")
            for name, one in servers.items():
                _drain(one, name, report)
                held_at[name][phase] = held(one.process.pid)
        report.seconds = time.monotonic() - begun
        _judge_health(report)
        for name, phases in held_at.items():
            for what, (before, now) in phases["after"].beyond(phases["warm"], ALLOWED).items():
                report.wrong.append(f"{name}: {what}: {before} after the warm-up, {now} after the load")
        report.held = held_at
        _compare_bound(_bound_alone(server, alone, report), expected, report, "alone, after the load")
        _compare_bound(bound, expected, report, "under load")
        report.curve = curve.stop()
        load = _start(server, bombs, GRACE + MARGIN, 10 * seed + 5, folder, n_silent)
        try:
            say("SIGTERM under load")
            time.sleep(stopping)
            for name, one in servers.items():
                _stop(one, name, report)
        finally:
            load.kill()
        say(f"judging {len(records.uses)} answers")
        verdict = judge(records, alone)
    report.wrong += verdict.wrong
    report.judged = verdict.counts + Counter({"bound by a grammar, or tools": sum(bound.values())})
    return report


@contextmanager
def _server(report: Report, *arguments: Any, **options: Any) -> Iterator[Process]:
    """A server that this test ends itself; what `serving` finds wrong at its end is reported."""
    try:
        with serving(*arguments, stopped=True, **options) as found:
            yield found
    except AssertionError as error:
        report.wrong.append(str(error)[-2000:])


def _start(server: Process, bombs: Process, seconds: float, seed: int, folder: Path, n_silent: int) -> _Load:
    files = [folder / f"{group}-{seed}" for group in ("answers", "attack")]
    program = [sys.executable, "-m", "tests.integration.soak.load", server.url, bombs.url]
    numbers = [str(seconds), str(seed), str(n_silent)]
    return _Load([subprocess.Popen([*program, path.name.split("-")[0], *numbers, path]) for path in files], files)


def _finish(load: _Load, seconds: float, report: Report, records: Records, bound: Counter[str]) -> None:
    """Wait for the clients, and take what they saw."""
    try:
        load.wait(seconds + 150)
    except subprocess.TimeoutExpired:
        report.wrong.append(f"clients still wait {seconds + 150:.0f} seconds after they began")
    finally:
        load.kill()
    for path in load.files:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        if not lines:
            report.wrong.append(f"no word of the clients {path.name}")
            continue
        for line in lines[:-1]:
            records.take(line)
        for what, n in json.loads(lines[-1])["counts"].items():
            (bound if what.startswith("{") else report.counts)[what] += n


def _drain(server: Process, name: str, report: Report) -> None:
    """Wait until nothing runs, and the connections that were closed are gone."""
    try:
        until(server.idle, DRAINED)
        until(lambda: held(server.process.pid).files < 100, DRAINED)
    except (AssertionError, httpx.HTTPError) as error:
        report.wrong.append(f"{name}: not idle {DRAINED:.0f} seconds after the load: {error}")


def _stop(server: Process, name: str, report: Report) -> None:
    """SIGTERM: the server must end in its deadline, with status 0."""
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    try:
        status: int | None = server.process.wait(GRACE + MARGIN)
    except subprocess.TimeoutExpired:
        status = None
        report.wrong.append(f"{name}: still there {GRACE + MARGIN:.0f} seconds after SIGTERM")
    report.stopped[name] = {"seconds": round(time.monotonic() - start, 1), "status": status}


@contextmanager
def _probed(report: Report, servers: dict[str, Process], phase: str) -> Iterator[None]:
    """Measure /health meanwhile; the rule is in `prober`."""
    program = [
        sys.executable,
        "-m",
        "tests.integration.soak.prober",
        *(f"{one.url}={one.process.pid}" for one in servers.values()),
    ]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as prober:
        try:
            yield
        finally:
            out, _ = prober.communicate(timeout=60)
    found = json.loads(out)
    for name, one in servers.items():
        rows = found[one.url]
        samples = Samples([tuple(row) for row in rows["samples"]], [tuple(row) for row in rows["controls"]])
        report.health[f"{name}, {phase}"] = samples.report()
        whole = report.probed.setdefault(name, Samples())
        whole.samples += samples.samples
        whole.controls += samples.controls
        if any(sample[2] != 200 for sample in samples.samples):
            report.wrong.append(f"{name}, {phase}: /health said {samples.report()['statuses']}")


def _judge_health(report: Report) -> None:
    """Judge /health over the whole run: of the warm-up's samples alone, one delay is more than a hundredth."""
    for name, samples in report.probed.items():
        if not samples.is_judged:
            busy = f"the machine stopped during {samples.excused:.0%} of the samples; end other programs"
            report.not_judged.append(f"{name}: /health: {busy}")
        elif not samples.is_held:
            report.wrong.append(f"{name}: /health was late: {samples.report()}, {samples.late[:5]}")


def _bound_alone(server: Process, alone: Alone, report: Report) -> dict[str, str]:
    """What the server says to the requests of `BOUND`, one at a time; those that rounding may decide are left out."""
    found = {}
    for number, (name, body) in enumerate(BOUND.items()):
        response = server.client.post("/v1/chat/completions", json=body | {"return_tokens": True})
        if response.status_code != 200:
            report.wrong.append(f"{name}, alone: {response.status_code} {response.text[:300]}")
            continue
        choice = CHOICES[[0, 0, 1, 4][number // 4]] if number >= 4 else None
        tokens = response.json()["choices"][0]["tokens"]
        if alone.is_certain(body["messages"], tokens, None if choice is None else choice.bias):
            found[name] = said(response.json())
    if len(found) < len(BOUND) / 2:
        report.wrong.append(f"of {len(BOUND)} answers that a grammar binds only {len(found)} are far from ties")
    return found


def _compare_bound(got: Any, expected: dict[str, str], report: Report, when: str) -> None:
    pairs = got.items() if not isinstance(got, Counter) else (json.loads(line)["bound"] for line in got)
    for name, text in pairs:
        if name in expected and text != expected[name]:
            report.wrong.append(f"{name}, {when}: {text}, but alone {expected[name]}")
