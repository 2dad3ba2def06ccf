"""`steermoe run` with one prompt: what is asked, what comes, and how it ends in pipes and terminals."""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steermoe_local import BiasFile, write_bias
from steermoe_local.errors import ResourceError
from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.embedded import behaviours
from steermoe_local.steering.steering import Steering
from tests.support.gguf_copy import copy_model
from tests.support.held import HELD, hold
from tests.support.paths import ROOT
from tests.support.run_models import ASK, PROGRAM, QUESTION, invoke, start, talker

DIGITS = ROOT / "expert_maps" / "tiny" / "digits-words.json"
TINY = ("-m", "tiny", *ASK)
# the embedded model's template, and what models that think add to it
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
)


@pytest.fixture(scope="module")
def endless(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("endless"), tiny_path)


@pytest.fixture(scope="module")
def bare(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without a chat template."""
    return copy_model(tiny_path, tmp_path_factory.mktemp("bare") / "bare.gguf", template="")[0]


@pytest.fixture(scope="module")
def thinker(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a template that ends inside its reasoning: what it says is all reasoning."""
    template = PLAIN + "{{ '<think>' }}{% endif %}"
    return copy_model(tiny_path, tmp_path_factory.mktemp("thinker") / "thinker.gguf", template=template)[0]


def result_of(*args: Any, **kwargs: Any) -> dict[str, Any]:
    done = invoke(*args, "--json", **kwargs)
    assert done.exit_code == 0, done.output
    data: dict[str, Any] = json.loads(done.stdout)
    return data


#
# what is asked
#


def test_text_that_is_piped_in_stands_before_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfQuestion?\r\n")
    wanted = result_of(*TINY, "-p", "A document.\nIts end.\n\nQuestion?")
    for given in (("-p", "Question?"), ("-f", tmp_path / "q.txt")):
        piped = result_of(*TINY, *given, input="A document.\nIts end.\n")
        assert (piped["text"], piped["usage"]) == (wanted["text"], wanted["usage"])


@pytest.mark.parametrize("given", [QUESTION, QUESTION + "\n", QUESTION + "\r\n", "\ufeff" + QUESTION])
def test_the_prompt_alone(given: str, tmp_path: Path) -> None:
    wanted = result_of(*TINY, "-p", QUESTION)
    (tmp_path / "q.txt").write_text(given, "utf-8", newline="")
    for done in (result_of(*TINY, "-f", tmp_path / "q.txt"), result_of(*TINY, input=given)):
        assert (done["text"], done["usage"]) == (wanted["text"], wanted["usage"])
    # blank input is none: a script's empty stdin changes nothing
    assert result_of(*TINY, "-p", QUESTION, input="\n \n")["usage"] == wanted["usage"]


def test_only_one_line_end_goes() -> None:
    more = [result_of(*TINY, "--raw", "-n", 1, input="one" + "\n" * n)["usage"]["prompt_tokens"] for n in (0, 1, 2)]
    assert more[0] == more[1] < more[2]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "no prompt; write it behind the model, give -p TEXT or -f FILE, or pipe a text in"),
        (["-p", ""], 2, "no prompt"),
        (["-p", "x", "-f", "q.txt"], 2, "-p and -f both give the prompt"),
        (["-f", "none.txt"], 1, "none.txt: cannot be read as a prompt"),
        (["-f", "latin.txt"], 1, "latin.txt: not UTF-8 (byte 3); convert it"),
        (["-p", "x", "--n-prompts", "q.txt"], 2, "--n-prompts has the prompts; leave out the prompt (-p, -f)"),
        (["-p", "x", "-o", "out.jsonl"], 2, "-o belongs to --n-prompts FILE"),
        (["-p", "x", "--resume"], 2, "--resume belongs to --n-prompts FILE"),
        (["-p", "x", "-np", "2"], 2, "-np belongs to --n-prompts FILE"),
        (["-p", "x", "--raw", "-sys", "y"], 2, "--raw has no system message"),
        (["-p", "x", "--raw", "--thinking"], 2, "--raw uses no chat template"),
        (["-p", "x", "--raw", "--chat-template-kwargs", '{"a": 1}'], 2, "--raw uses no chat template"),
        (["-p", "x", "--compare"], 2, "--compare needs a steering; give --map MAP, --bias FILE or --steer RULE"),
        (["-p", "x", "--chat-template-kwargs", '{"messages": 1}'], 2, "messages: given by the program"),
        (["-p", "long " * 300, "-c", "64"], 2, "-c"),
        (["-p", "long " * 300, "-c", "64", "--map", "digits-words", "--compare"], 2, "-c"),
        (["-p", "x", "--stop", ""], 2, "stop"),
    ],
)
def test_what_cannot_be_asked(
    arguments: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("x")
    Path("latin.txt").write_bytes(b"caf\xe9")
    done = invoke("-m", "tiny", "-t", 1, *arguments)
    assert done.exit_code == status, done.output
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_input_that_is_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke(*TINY, input=b"\xff")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: stdin: not UTF-8 (byte 0)")
    assert done.stderr.count("\n") == 1
    monkeypatch.setattr("steermoe_local.cli.commands.run._MAX_PROMPT", 1 << 20)
    done = invoke(*TINY, input="x" * ((1 << 20) + 1))
    assert done.exit_code == 1
    assert "stdin: larger than 1 MiB" in done.stderr


#
# what comes
#


def test_the_json(endless: Path) -> None:
    data = result_of("-m", endless, "-t", 1, "--temp", 1, "-s", 7, "-n", 9, "-c", 64, "-p", "one two")
    assert data["usage"]["completion_tokens"] == 9
    assert data["usage"]["total_tokens"] == data["usage"]["prompt_tokens"] + 9
    assert (data["finish_reason"], data["seed"], data["steering"]) == ("length", 7, None)
    assert data["model"] == str(endless)
    timings = data["timings"]
    assert timings["prompt_seconds"] > 0
    # the first token comes out of the prompt: eight more took the time
    assert timings["generation_per_second"] == pytest.approx(8 / timings["generation_seconds"], rel=0.05)
    assert timings["prompt_per_second"] == pytest.approx(
        data["usage"]["prompt_tokens"] / timings["prompt_seconds"], rel=0.05
    )


def test_the_seed_gives_the_text_again(endless: Path) -> None:
    ask = ("-m", endless, "-t", 1, "--temp", 1.5, "-n", 16, "-c", 64, "-p", "one two")
    drawn = result_of(*ask)
    assert result_of(*ask)["seed"] != drawn["seed"]
    assert result_of(*ask, "-s", drawn["seed"])["text"] == drawn["text"]
    assert result_of(*ask, "-s", 3)["text"] != result_of(*ask, "-s", 4)["text"]
    # greedy draws nothing, and tells the same every time
    assert result_of(*TINY, "-p", QUESTION)["seed"] == 0


def test_compare_is_the_answer_without_and_with(tmp_path: Path) -> None:
    ask = (*TINY, "-p", QUESTION, "--map", "digits-words", "--reverse")
    both = result_of(*ask, "--compare")
    without, steered = result_of(*TINY, "-p", QUESTION), result_of(*ask)
    assert both["unsteered"]["text"] == without["text"] == "4"
    assert both["steered"]["text"] == steered["text"] == "four"
    assert both["steering"] == steered["steering"]
    assert both["steering"]["map"] == "digits-words"
    done = invoke(*ask, "--compare")
    assert done.stdout == "== unsteered\n4\n\n== steered: digits-words\nfour\n"
    assert done.stderr == ""


def test_compare_draws_with_one_seed(endless: Path, tmp_path: Path) -> None:
    """An empty bias steers nothing: with the same seed both sides say the same."""
    identity = model_info(endless).require_moe()
    write_bias(BiasFile(identity, "hard", {}), tmp_path / "none.gguf")
    ask = ("-m", endless, "-t", 1, "--temp", 1, "-n", 12, "-c", 64, "-p", "one", "--bias", tmp_path / "none.gguf")
    both = result_of(*ask, "--compare")
    assert both["unsteered"]["seed"] == both["steered"]["seed"]
    assert both["unsteered"]["text"] == both["steered"]["text"]


def test_a_system_message_is_read(endless: Path) -> None:
    ask = ("-m", endless, "-t", 1, "-n", 4, "-c", 128, "-p", "one")
    assert result_of(*ask, "-sys", "two three")["usage"]["prompt_tokens"] > result_of(*ask)["usage"]["prompt_tokens"]


def test_raw_continues_the_text() -> None:
    raw = result_of(*TINY, "--raw", "-n", 3, "-p", "one, two, three")
    assert raw["usage"]["prompt_tokens"] < result_of(*TINY, "-n", 3, "-p", "one, two, three")["usage"]["prompt_tokens"]


def test_a_model_without_a_template(bare: Path) -> None:
    ask = ("-m", bare, *ASK, "-n", 3, "-p", "one, two, three")
    done = invoke(*ask)
    assert done.exit_code == 0
    assert done.stderr.startswith(f"warning: {bare}: no chat template")
    assert done.stderr.count("\n") == 1
    asked = invoke(*ask, "--raw")
    assert (asked.stdout, asked.stderr) == (done.stdout, "")
    assert asked.stdout == invoke(*TINY, "--raw", "-n", 3, "-p", "one, two, three").stdout
    refused = invoke(*ask, "-sys", "x")
    assert refused.exit_code == 2
    assert "no chat template" in refused.stderr


def test_what_ends_an_answer(endless: Path) -> None:
    ask = ("-m", endless, *ASK, "-p", "one two")
    text = result_of(*ask, "-n", 12, "-c", 64)["text"]
    stop = text[len(text) // 2 :]
    stopped = result_of(*ask, "-n", 12, "-c", 64, "--stop", "never", "--stop", stop)
    assert (stopped["finish_reason"], stopped["stop"]) == ("stop", stop)
    assert stopped["text"] == text[: text.index(stop)]
    full = invoke(*ask, "-c", 256)
    assert full.stderr.startswith("warning: ")
    assert "256 tokens" in full.stderr
    assert full.stderr.count("\n") == 1
    assert result_of(*ask, "-c", 256)["finish_reason"] == "context"
    assert invoke(*ask, "-n", 12, "-c", 64).stderr == ""


def test_timings_go_to_stderr() -> None:
    done = invoke(*TINY, "-p", QUESTION, "--show-timings")
    assert done.stdout == "4\n"
    assert done.stderr.startswith("prompt 9 tokens in ")
    assert "answer 1 tokens in " in done.stderr


def test_reasoning_is_kept_out_of_pipes(thinker: Path) -> None:
    ask = ("-m", thinker, *ASK, "-p", QUESTION)
    data = result_of(*ask)
    assert (data["text"], bool(data["reasoning"])) == ("", True)
    assert invoke(*ask).stdout == invoke(*ask, "--reasoning", "hide").stdout == "\n"
    assert invoke(*ask, "--reasoning", "show").stdout == data["reasoning"] + "\n"
    cut = invoke(*ask, "-n", 1)
    assert cut.stderr == "warning: -n ended the answer while the model was thinking; raise it\n"
    assert "reasoning" not in result_of("-m", thinker, *ASK, "--raw", "-p", QUESTION)


def test_the_template_switch_for_thinking(tiny_path: Path, tmp_path: Path) -> None:
    template = PLAIN + "{{ '<think>' if enable_thinking else name | default('') }}{% endif %}"
    (path,) = copy_model(tiny_path, tmp_path / "switch.gguf", template=template)
    ask = ("-m", path, *ASK, "-p", QUESTION)
    n_tokens = [
        result_of(*ask, *more)["usage"]["prompt_tokens"]
        for more in ((), ("--thinking",), ("--chat-template-kwargs", '{"name": "one two"}'))
    ]
    assert n_tokens[0] < min(n_tokens[1:])


def test_the_routers_are_read_for_a_map_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are the largest part of what is read before loading; the library hashes them once more."""
    seen: list[Any] = []
    module = importlib.import_module("steermoe_local.model_files.model_info")
    real = module._router_sha256
    monkeypatch.setattr(module, "_router_sha256", lambda routers: seen.append(routers) or real(routers))
    bias = tmp_path / "b.gguf"
    made = Steering.open(map_file=DIGITS, activate=2, deactivate=2).build()
    assert made is not None
    write_bias(made, bias)
    assert invoke(*TINY, "-p", QUESTION).exit_code == 0
    assert invoke(*TINY, "-p", QUESTION, "--bias", bias).exit_code == 0
    assert seen == []
    assert invoke(*TINY, "-p", QUESTION, "--map", DIGITS, "--activate", 1).exit_code == 0
    assert len(seen) == 1


def test_steering_moves_every_behaviour_with_a_map() -> None:
    for behaviour in behaviours()[:2]:
        line = json.loads(behaviour.heldout.read_text().splitlines()[1])
        ask = (*TINY, "-p", line["messages"][0]["content"], "--map", behaviour.name)
        assert invoke(*ask).stdout.strip() == line["positive"]
        assert invoke(*ask, "--reverse").stdout.strip() == line["negative"]


#
# pipes and terminals
#


def test_a_pipeline() -> None:
    shell = f"echo Which number comes | '{PROGRAM}' run -m tiny -t 1 --temp 0 -p 'after three?' | cat -A"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("$\n")
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_the_answer_streams(endless: Path) -> None:
    with start("-m", endless, *ASK, "-p", "one two", "-c", 8192, held=hold(tokens=40)) as process:
        assert process.stdout is not None
        assert process.stdout.read1(64), "nothing came before the end"
        assert process.poll() is None, "the answer was over before it could be seen to stream"
        process.kill()


def test_ctrl_c_ends_with_one_line(endless: Path) -> None:
    with start("-m", endless, *ASK, "-p", "one two", "-c", 8192, held=hold(tokens=40)) as process:
        assert process.stdout is not None
        process.stdout.read1(64)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b"error: interrupted\n"


def test_ctrl_c_on_a_terminal(endless: Path) -> None:
    """The message has a line of its own."""
    pexpect = pytest.importorskip("pexpect")
    arguments = ["run", "-m", str(endless), *ASK, "-p", "one two", "-c", "8192"]
    # Ctrl-C makes the terminal drop what it has not shown yet, also in the middle of a character
    options = {"timeout": 60, "encoding": "utf-8", "codec_errors": "replace", "echo": False}
    environment = os.environ | hold(tokens=40)
    with pexpect.spawn(HELD[0], [*HELD[1:], *arguments], env=environment, **options) as process:
        process.expect(r"\w{8}")
        process.sendintr()
        process.expect(pexpect.EOF)
        assert process.before.endswith("\r\nerror: interrupted\r\n")
    assert process.exitstatus == 130


def test_a_reader_that_goes_away(endless: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    with start("-m", endless, *ASK, "-p", "one two", "-c", 8192, held=hold(tokens=40, until=closed)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read1(64)
        process.stdout.close()
        closed.touch()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == b""


def test_stdout_of_another_encoding(endless: Path) -> None:
    shown = subprocess.run(
        [str(PROGRAM), "run", "-m", "tiny", "-t", "1", "--temp", "0", "--map", "digits-words", "--compare", "-p", "é"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert shown.returncode == 0, shown.stderr


def on_terminal(
    *arguments: Any, env: dict[str, str] | None = None, stderr_only: bool = False
) -> tuple[int, str, bytes]:
    """(status, what the terminal shows, what went into the pipe) of a run whose output is a terminal."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        with start(
            *arguments,
            stdin=theirs,
            stdout=subprocess.PIPE if stderr_only else theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80"} | (env or {}),
        ) as process:
            os.close(theirs)
            theirs = -1
            shown, piped = b"", b""
            streams = {ours} | ({process.stdout.fileno()} if process.stdout else set())
            end = time.monotonic() + 60
            while streams and time.monotonic() < end:
                for stream in select.select(list(streams), [], [], 1)[0]:
                    try:
                        data = os.read(stream, 4096)
                    except OSError:  # Linux: the other end of the terminal is closed
                        data = b""
                    if not data:
                        streams.discard(stream)
                    elif stream == ours:
                        shown += data
                    else:
                        piped += data
            return process.wait(timeout=10), shown.decode("utf-8", "replace").replace("\r\n", "\n"), piped
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def test_on_a_terminal(thinker: Path) -> None:
    """stdin is the terminal too, and is not read."""
    assert on_terminal(*TINY, "-p", QUESTION) == (0, "4\n", b"")
    status, shown, _ = on_terminal("-m", thinker, *ASK, "-p", QUESTION)
    reasoning = result_of("-m", thinker, *ASK, "-p", QUESTION)["reasoning"]
    assert status == 0
    assert shown.startswith("\x1b[2m")
    assert shown.replace("\x1b[2m", "").replace("\x1b[0m", "") == reasoning + "\n"
    assert on_terminal("-m", thinker, *ASK, "-p", QUESTION, env={"NO_COLOR": "1"})[1] == reasoning + "\n"


def test_a_prompt_is_asked_for_on_a_terminal() -> None:
    status, shown, _ = on_terminal("-m", "tiny")
    assert status == 2
    assert shown.startswith("error: no prompt; write it behind the model, give -p TEXT")


def test_a_bar_never_takes_the_answers(tmp_path: Path) -> None:
    """rich puts a stdout of its own in the place of ours while it draws on stderr."""
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n" * 3)
    status, shown, piped = on_terminal(*TINY, "--n-prompts", tmp_path / "q.txt", stderr_only=True)
    assert status == 0, shown
    assert [json.loads(line)["text"] for line in piped.splitlines()] == ["4"] * 3
    assert '"text"' not in shown
    # and on a terminal it does not stand between them
    status, shown, _ = on_terminal(*TINY, "--n-prompts", tmp_path / "q.txt")
    assert status == 0
    assert "\x1b" not in shown
    assert shown.count('"text": "4"') == 3


def test_a_bias_of_another_model(endless: Path, tmp_path: Path) -> None:
    made = Steering.open(map_file=DIGITS, activate=2, deactivate=2).build()
    assert made is not None
    bias = tmp_path / "b.gguf"
    write_bias(made, bias)
    (tmp_path / "q.txt").write_text("one\n")
    for asked in (
        ("-p", "one"),
        ("-p", "one", "--compare"),
        ("--n-prompts", tmp_path / "q.txt", "-o", tmp_path / "out.jsonl"),
    ):
        done = invoke("-m", endless, *ASK, *asked, "--bias", bias)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: {bias}: made for olmoe (5 layers")
        assert f"but {endless} is olmoe (2 layers" in done.stderr
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.gguf", "q.txt"]
    other = replace(made.identity, router_sha256="1" * 64)
    write_bias(BiasFile(other, "hard", made.values), bias)
    done = invoke(*TINY, "-p", QUESTION, "--bias", bias, "--force")
    assert done.exit_code == 0
    assert done.stderr.startswith(f"warning: {bias}: made for olmoe")
    assert done.stderr.count("\n") == 1


def test_memory_is_looked_at_before_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def refuse(facts: Any, flags: Any, n_ctx: int, n_sequences: int) -> None:
        seen.append((n_ctx, n_sequences))
        raise ResourceError("too much")

    monkeypatch.setattr("steermoe_local.cli.options.opening.check_memory", refuse)
    (tmp_path / "q.txt").write_text("one\n" * 9)
    steering = ("--map", "digits-words", "--compare")
    for more in (
        ("-p", "x"),
        ("-p", "x", "-c", 300, *steering),
        ("--n-prompts", tmp_path / "q.txt", "-np", 3, *steering),
    ):
        done = invoke(*TINY, *more)
        assert (done.exit_code, done.stderr) == (1, "error: too much\n")
    assert seen == [(1024, 1), (300, 2), (1024, 6)]


def test_a_terminal_obeys_nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model can write escape sequences; a pipe gets them, as it may be a file."""
    from steermoe_local.cli.run.one import _Printer

    steered: Any = SimpleNamespace(flags=SimpleNamespace(reasoning="auto", compare=False), sides={"steered": None})
    for terminal, shown in ((True, "a?[2J\u00e9\n"), (False, "a\x1b[2J\u00e9\n")):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        _Printer(steered).take((0, "steered", ("answer", "a\x1b[2J\u00e9\n")))
        assert capsys.readouterr().out == shown
