"""Words of any length: llama.cpp's tokenizers with std::regex recurse as deep as a word is long."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steermoe_local import ResourceError, UsageError
from steermoe_local.llama import tokenizing
from steermoe_local.llama.rendering import Renderer, vocabulary
from steermoe_local.llama.tokenizing import longest_run
from tests.support.gguf_copy import copy_model
from tests.support.running_server import TINY

WORD = 12_000  # characters: about 4 MB of stack
STACK = 2_000_000


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a pattern that llama.cpp leaves to std::regex."""
    path = tmp_path_factory.mktemp("bloom") / "bloom.gguf"
    copy_model(TINY, path, pre="bloom")
    return path


#
# how long is the longest
#

# What tokenizers take at once, with the blanks of C++: a word with the blanks around it, blanks, sentences.
BLANK = "[\t-\r \x85\xa0\u2028\u3000]"
PATTERNS = [rf" ?(?:(?!{BLANK}).)+{BLANK}*", rf"{BLANK}+"]
SENTENCE = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)*")


def runs(pattern: str, text: str) -> int:
    return max((len(found) for found in re.findall(pattern, text, re.DOTALL)), default=0)


@given(st.text(st.sampled_from("ab.1é漢 \n\t\r\x0b\x1c\x1f\x85\xa0\u2028\u3000"), max_size=300))
@example(" " * 200)
@example("a" * 200 + "\n" * 200)
@example("a\x1c" * 100)
@example((" " * 70 + "a") * 3 + "\n" * 90)
def test_no_run_is_longer(text: str) -> None:
    found = longest_run(text)
    for pattern in PATTERNS:
        assert runs(pattern, text) <= found, pattern
    assert max((len(run) for run in SENTENCE.findall(text)), default=0) <= longest_run(text, "exaone-moe")


def test_ordinary_texts_have_none() -> None:
    page = ("The quick brown fox jumps over the lazy dog; it sleeps.\n\n    indented\n" * 2000)[:100_000]
    assert longest_run(page) < 100
    assert longest_run(page, "exaone-moe") < 200
    assert longest_run("word " * 400, "exaone-moe") > 2000, "its pattern takes them all at once"


#
# tokenizing them
#


def test_tokens_are_the_same(bloom: Path) -> None:
    """In a thread or not, and for texts around the bound."""
    with vocabulary(bloom) as model:
        renderer = Renderer(model)
        for n in (1, 510, 511, 512, 513, 3000):
            for text in ("x" * n, f"a {'é' * n} b", " " * n, f"<|end|>{'.' * n}"):
                for parse in (True, False):
                    expected = model.tokenize(text.encode(), True, parse)
                    assert renderer.tokenize(text, add_special=True, parse_special=parse) == expected


def test_ordinary_texts_start_no_thread(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def thread(*_: Any) -> Any:
        raise AssertionError("a thread")

    monkeypatch.setattr(tokenizing, "_with_stack", thread)
    with vocabulary(bloom) as model:
        renderer = Renderer(model)
        assert renderer.tokenize("one, two, three. " * 1000, add_special=False)
        with pytest.raises(AssertionError, match="a thread"):
            renderer.tokenize("x" * 600, add_special=False)


def test_words_that_are_too_long(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with vocabulary(bloom) as model:
        renderer = Renderer(model)
        with pytest.raises(UsageError, match=r"more than \S+ characters"):
            renderer.tokenize("x" * 600_000, add_special=False)
        sizes: list[int] = []
        real = threading.stack_size

        def stack_size(*size: int) -> int:
            sizes.extend(size)
            return real(*size)

        def no_thread(*_: Any) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading, "stack_size", stack_size)
        assert renderer.tokenize("x" * 3000, add_special=False)
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(ResourceError, match="word of 3"):
            renderer.tokenize("x" * 3000, add_special=False)
    assert sizes[0] > 3000 * 320
    assert sizes[1] == sizes[3] == 0, "threads of others are as before"


# With a small stack, so that little is needed to fill it. What it prints says how far it came.
SCRIPT = """
import json, resource, sys, threading
from click.testing import CliRunner
from steermoe_local.llama.rendering import Renderer, vocabulary
from steermoe_local.cli import main

what, model, n, pairs, out = sys.argv[1:]
word = "x" * int(n)


def run(*args, **more):
    done = CliRunner().invoke(main, [*args], **more)
    print(json.dumps([args[0], done.exit_code, done.output]), flush=True)


if what == "bare":
    with vocabulary(model) as opened:
        opened.tokenize(word.encode(), False, True)
else:
    flags = ["-m", model, "-t", "1", "-c", "256"]
    run("run", *flags, "--raw", "-n", "1", "-p", word)
    run("run", *flags, "-n", "1", "-p", f"Say {word}.")
    run("chat", *flags, input=f"{word}\\nOne?\\n")
    run("detect", *flags, "--pairs", pairs, "-o", out)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets the stack's size")
def test_no_command_crashes(bloom: Path, tmp_path: Path) -> None:
    pair = {name: f"{name} {'x' * WORD}" for name in ("positive", "negative")}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair | {"positive_target": "x", "negative_target": "x"}))

    def start(what: str) -> subprocess.CompletedProcess[str]:
        script = f"import resource; resource.setrlimit(resource.RLIMIT_STACK, ({STACK}, {STACK}))\n"
        script += "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        arguments = [what, bloom, WORD, tmp_path / "pairs.jsonl", tmp_path / "map.json"]
        command = [sys.executable, "-c", script, "-c", SCRIPT, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert start("bare").returncode == -11, "this would be no test: llama.cpp's tokenizer bears the word by itself"
    done = start("commands")
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    told = {"run": "tokens", "chat": "tokens", "detect": "skipped"}  # it does not fit the context
    assert [name for name, _, _ in found] == ["run", "run", "chat", "detect"]
    for name, status, output in found:
        assert status in (0, 1, 2), (name, output)
        assert told[name] in output, (name, output)
