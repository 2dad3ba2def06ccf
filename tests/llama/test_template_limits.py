"""Hostile chat templates in the real child: each ends with one line within its limits, and the next one is served."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from steermoe_local.errors import ModelError, UsageError
from steermoe_local.llama.template_client import BoundedTemplate, TemplateFacts, TemplateRefusal, template_facts
from steermoe_local.llama.template_date import template_date
from steermoe_local.llama.template_pool import (
    SECONDS_VARIABLE,
    Cancellation,
    Cancelled,
    TemplateLimits,
    TemplatePool,
    cancellable,
)
from tests.support.hostile_templates import FOREVER, LARGE, SLOW, UNREADABLE
from tests.support.paths import ROOT

resource = pytest.importorskip("resource", reason="this system limits no CPU time and memory")

DAY = template_date("2024-02-29")
# the clock is no limit here: only CPU time and memory are
SMALL = TemplateLimits(cpu_seconds=1, seconds=600, memory=128 << 20)


@pytest.fixture(scope="module")
def pool() -> Iterator[TemplatePool]:
    found = TemplatePool(SMALL, most_children=1)
    yield found
    found.close()


def text(source: str, pool: TemplatePool, content: str = "Hi.") -> str:
    template = BoundedTemplate(source, {}, pool)
    messages = [{"role": "user", "content": content}]
    return template.text(messages, add_generation_prompt=True, variables={}, date=DAY)


@pytest.mark.parametrize("source", ["{{ '\\ud800' }}", "{{ raise_exception('\\udfff') }}"])
def test_texts_that_are_no_unicode(source: str, pool: TemplatePool) -> None:
    """Half of a surrogate pair can be neither tokenized nor sent."""
    with pytest.raises(TemplateRefusal) as caught:
        text(source, pool)
    assert str(caught.value).encode("utf-8")


def child_of(pool: TemplatePool) -> int:
    """The process that serves a pool of one child."""
    assert text("{{ messages[0].content }}", pool) == "Hi."
    (worker,) = pool._idle
    assert worker._child is not None
    return worker._child.pid


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not gone(pid):
        assert time.monotonic() < deadline, f"process {pid} lives"
        time.sleep(0.01)


@pytest.mark.parametrize("name", [*SLOW, *LARGE])
def test_rendering(name: str, pool: TemplatePool) -> None:
    source = (SLOW | LARGE)[name]
    assert template_facts(source, pool).problem is None, "it is only read"
    before = cpu_of_children()
    with pytest.raises(ModelError, match=r"takes too|out of all proportion") as caught:
        text(source, pool)
    assert "\n" not in str(caught.value)
    assert "--raw" in str(caught.value)
    assert (name in SLOW) <= ("too long" in str(caught.value))
    # the limit, the second that the kernel counts in, the start of a child
    assert cpu_of_children() - before < 10
    child_of(pool)


@pytest.mark.parametrize("name", UNREADABLE)
def test_reading(name: str, pool: TemplatePool) -> None:
    source = UNREADABLE[name]
    before = cpu_of_children()
    problem = template_facts(source, pool).problem
    assert problem is not None
    assert "\n" not in problem
    assert "--raw" in problem
    with pytest.raises(ModelError) as caught:
        text(source, pool)
    assert str(caught.value) == problem
    assert cpu_of_children() - before < 10
    child_of(pool)


def test_a_template_without_end_is_looked_at_once(pool: TemplatePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a hostile template costs a server its limit once, not with every request."""
    source = UNREADABLE["a long sum"] + "{# once #}"
    problem = template_facts(source, pool).problem
    monkeypatch.setattr(TemplatePool, "ask", None)
    assert template_facts(source, pool).problem == problem
    assert template_facts("") == TemplateFacts()


def test_what_probes_swallow_is_no_limit(pool: TemplatePool) -> None:
    """Probes take an error of the template for a refusal; they do not go on without time or memory."""
    bomb = (LARGE["join"], FOREVER)
    for source in bomb:
        with pytest.raises(ModelError, match="takes too"):
            text("{% if 'Zq' in messages[0].content | string %}" + source + "{% endif %}", pool)
        template = BoundedTemplate(source, {}, pool)
        with pytest.raises(ModelError, match="takes too"):
            _ = template.reasoning_field


def test_deep_values(pool: TemplatePool) -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    template = BoundedTemplate("{{ x }}", {}, pool)
    with pytest.raises(TemplateRefusal, match="nested too deeply"):
        template.text([], add_generation_prompt=True, variables={"x": value}, date=DAY)
    while value:  # one by one: the interpreter frees a deep list by recursion
        value = value[0]
    assert child_of(pool)


def test_the_next_request_has_a_new_child(pool: TemplatePool) -> None:
    first = child_of(pool)
    assert child_of(pool) == first
    with pytest.raises(ModelError, match="too long"):
        text(FOREVER, pool)
    assert gone(first)
    assert child_of(pool) != first


def test_a_child_that_was_killed(pool: TemplatePool) -> None:
    first = child_of(pool)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)  # with all its threads
    assert child_of(pool) != first


def test_the_clock_ends_it_where_cpu_time_does_not() -> None:
    """As on systems without limits of CPU time."""
    slow = TemplatePool(TemplateLimits(cpu_seconds=3600, seconds=1), most_children=1)
    with pytest.raises(ModelError, match="too long"):
        text(FOREVER, slow)
    slow.close()


def test_a_bomb_delays_no_other_text() -> None:
    two = TemplatePool(TemplateLimits(cpu_seconds=3600, seconds=3600), most_children=2)
    cancellation = Cancellation()
    ended = threading.Event()

    def bomb() -> None:
        with cancellable(cancellation):
            try:
                text("{% if messages[0].content == 'bomb' %}" + FOREVER + "{% endif %}", two, "bomb")
            except Cancelled:
                ended.set()

    thread = threading.Thread(target=bomb)
    thread.start()
    while two._n_workers < 1:
        time.sleep(0.001)
    for _ in range(20):
        assert text("{{ messages[0].content }}", two) == "Hi."
    assert thread.is_alive()
    cancellation.cancel()
    thread.join(60)
    assert ended.is_set()
    assert [text("{{ messages[0].content }}", two, str(i)) for i in range(4)] == ["0", "1", "2", "3"]
    two.close()


def test_whoever_waits_for_a_child_can_be_cancelled() -> None:
    one = TemplatePool(TemplateLimits(cpu_seconds=3600, seconds=3600), most_children=1)
    cancellations = [Cancellation() for _ in range(3)]
    ended: list[int] = []

    def ask(index: int) -> None:
        with cancellable(cancellations[index]), pytest.raises(Cancelled):
            text(FOREVER, one)
        ended.append(index)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for cancellation in cancellations:
        cancellation.cancel()
    for thread in threads:
        thread.join(60)
    assert sorted(ended) == [0, 1, 2]
    assert text("{{ messages[0].content }}", one) == "Hi."
    one.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork_the_children_are_the_other_process_s(pool: TemplatePool) -> None:
    first = child_of(pool)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if child_of(pool) != first else 2
            pool.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert child_of(pool) == first


ASKING = f"""
import sys, threading
from steermoe_local.llama import template_client, template_pool
from steermoe_local.llama.template_date import template_date

pool = template_pool.TemplatePool(template_pool.TemplateLimits(cpu_seconds=3600, seconds=3600), most_children=1)
say = lambda source: template_client.BoundedTemplate(source, {{}}, pool).text(
    [], add_generation_prompt=True, variables={{}}, date=template_date(None)
)
bomb = "x{FOREVER}"
template_client.template_facts(bomb, pool)
print(pool._idle[0]._child.pid, flush=True)
try:
    say(bomb)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_the_parent_is_interrupted_or_killed(signal_: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C ends the wait and the child at once; a parent that is killed takes its child along."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", ASKING], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        started = psutil.Process(child).cpu_times().user
        while psutil.Process(child).cpu_times().user <= started:  # until it works on the bomb
            time.sleep(0.01)
        process.send_signal(signal_)
        assert process.stdout.read() == ("interrupted\n" if signal_ == signal.SIGINT else "")
    assert process.returncode == (0 if signal_ == signal.SIGINT else -signal.SIGKILL)
    until_gone(child)


def test_the_seconds_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_VARIABLE, "7.5")
    assert TemplatePool().limits == TemplateLimits(cpu_seconds=8, seconds=30)
    monkeypatch.setenv(SECONDS_VARIABLE, "")
    assert TemplatePool().limits == TemplateLimits()
    for nonsense in ("0", "-1", "nan", "inf", "ten", "1e9"):
        monkeypatch.setenv(SECONDS_VARIABLE, nonsense)
        with pytest.raises(UsageError, match=SECONDS_VARIABLE):
            _ = TemplatePool().limits
