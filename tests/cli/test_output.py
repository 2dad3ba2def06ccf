"""Progress without a terminal, and messages of which many are alike."""

from __future__ import annotations

import itertools

import pytest
from rich.progress import Progress

from steermoe_local._util.files import human_duration
from steermoe_local.cli.output import ProgressLines, SummedLines, TimeLeftColumn, progress_bar


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(first=10, every=60, clock=clock)
    shown = []
    for done in range(0, 1001, 10):  # one a second
        lines.show("detect", done, 1000)
        clock.now += 10
        if text := capsys.readouterr().err:
            shown.append(text)
    assert shown[0] == "detect: 10 of 1,000 (1%), 1.0/s, about 16 min left\n"
    assert shown[1] == "detect: 70 of 1,000 (7%), 1.0/s, about 16 min left\n"
    assert len(shown) == 17
    assert "detect: 970 of 1,000" in shown[-1]
    assert shown[-1].endswith("about 30 s left\n")


def test_what_was_done_before_tells_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(first=10, every=60, clock=clock)
    lines.show("detect", 500, 1000)  # an earlier process did these
    clock.now += 100
    lines.show("detect", 510, 1000, "99 tokens/s")
    assert capsys.readouterr().err == "detect: 510 of 1,000 (51%), 99 tokens/s, about 82 min left\n"
    lines.show("another", 0, 5)
    clock.now += 100
    lines.show("another", 0, 5)
    assert capsys.readouterr().err == "another: 0 of 5 (0%), 0.0/h\n"
    clock.now += 100
    lines.show("another", 5, 5)
    assert capsys.readouterr().err == ""


def test_many_short_works_have_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    """`tune` measures choice after choice, each in a few seconds."""
    clock = Clock()
    lines = ProgressLines(first=10, every=60, clock=clock)
    shown = []
    for _ in range(100):
        for what, total in (("tune", 4), ("text", 2)):
            for done in range(total + 1):
                lines.show(what, done, total)
                shown += [clock.now] if capsys.readouterr().err else []
                clock.now += 1
    assert shown[0] - 1000 < 12
    assert all(60 <= after - before < 63 for before, after in itertools.pairwise(shown))
    assert len(shown) > 10


def test_work_that_has_just_begun_has_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(first=10, every=60, clock=clock)
    lines.show("tune", 0, 4)
    clock.now += 10
    lines.show("text", 0, 2)
    assert capsys.readouterr().err == "text: 0 of 2 (0%)\n"


def test_the_time_that_is_left_as_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    """A clock of the whole knows more than the speed of one step."""
    clock = Clock()
    lines = ProgressLines(first=10, every=60, clock=clock)
    lines.show("learn: answers", 0, 100, left=90)
    clock.now += 10
    lines.show("learn: answers", 1, 100, left=80)
    assert capsys.readouterr().err == "learn: answers: 1 of 100 (1%), about 80 s left in all\n"
    clock.now += 60
    lines.show("learn: answers", 2, 100, left=0)
    assert capsys.readouterr().err == "learn: answers: 2 of 100 (2%)\n"


def test_a_bar_with_the_time_that_is_left_as_it_is_given() -> None:
    bar = Progress(TimeLeftColumn())
    task = bar.add_task("learn", total=10)
    bar.update(task, completed=1, left=150.0)
    assert bar.columns[0](bar.tasks[0]).plain == "2.5 min left"  # type: ignore[union-attr, operator]
    bar.update(task, left=None)
    assert ":" in bar.columns[0](bar.tasks[0]).plain  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("seconds", "about", "most"),
    [
        (0, "0 s", "0 s"),
        (45.2, "45 s", "46 s"),
        (120, "2 min", "2 min"),
        (149, "2.5 min", "2.5 min"),
        (151, "2.5 min", "2.6 min"),
        (620, "10 min", "11 min"),
        (7200, "2.0 h", "2.0 h"),
        (7201, "2.0 h", "2.1 h"),
    ],
)
def test_durations(seconds: float, about: str, most: str) -> None:
    """The most that is said is never less than what is meant."""
    assert human_duration(seconds) == about
    assert human_duration(seconds, most=True) == most


def test_quick_work_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as show:
        for done in range(11):
            show("work", done, 10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("hidden", [False, True])
def test_a_bar_without_a_terminal(
    hidden: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("steermoe_local.cli.output.ProgressLines", lambda: ProgressLines(clock=clock))
    with progress_bar(hidden=hidden) as show:
        show("work", 0, 10)
        clock.now += 3600
        show("work", 1, 10)
    captured = capsys.readouterr()
    assert captured.err == ("" if hidden else "work: 1 of 10 (10%), 1.0/h, about 9.0 h left\n")
    assert captured.out == ""


def test_lines_that_are_alike_are_summed_up() -> None:
    printed: list[str] = []
    lines = SummedLines(printed.append, shown=2)
    for number in range(5):
        lines.add(
            f"skipped: pair '{number}': target \"it's {number}\": not in the text", f"target 'x{number}': not in it"
        )
    lines.add("skipped: pair 'a': longer than 512 tokens", "longer than 512 tokens")
    lines.add("skipped: pair 'b': longer than 1,024 tokens", "longer than 1,024 tokens")
    lines.close()
    assert len(printed) == 6
    assert printed[1].startswith("skipped: pair '1'")
    assert "counted" in printed[2]
    assert [line for line in printed if "longer" in line] == [
        "skipped: pair 'a': longer than 512 tokens",
        "skipped: pair 'b': longer than 1,024 tokens",
    ]
    assert printed[-1] == "5 in all: target …: not in it"
    lines.close()
    assert len(printed) == 6
