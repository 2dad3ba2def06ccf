"""The library and llama.cpp's programs, built for Windows and run by wine.

They steer as on Linux, refuse what is refused there, and open files of any name.

Not run here: Python on Windows, which no package brings to wine. tests/test_windows_stand_in.py has what can be seen of
that without one.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, model_info, write_bias
from steermoe_local.identity import ModelIdentity
from tests.support import hostile, native_programs
from tests.support.low_level import random_signs
from tests.support.paths import BUILD as NATIVE
from tests.support.paths import ROOT
from tests.support.random_models import OLMOE, write_random_model
from tests.support.wine import BUILD, command, environment, seen, wine

pytestmark = [pytest.mark.windows, pytest.mark.skipif(sys.platform == "win32", reason="a cross-build")]

NAME = "größe 模型 и пробел"  # letters that no code page of Windows has all of, and spaces
PROMPTS = ["count from one to nine", "zwölf größe 模型", "a b c"]
GREEDY = ("-n", 24, "--temp", 0, "-st", "-t", 2, "--no-warmup", "--log-disable")


@pytest.fixture(scope="module")
def files(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model and bias files in a folder with such a name: `model`, `bias`, `damaged`, `foreign`, `missing`."""
    folder = tmp_path_factory.mktemp("files") / NAME
    folder.mkdir()
    found = {kind: folder / f"{kind} {NAME}.gguf" for kind in ("model", "bias", "damaged", "foreign", "missing")}
    shutil.copyfile(tiny_path, found["model"])
    identity = model_info(tiny_path).require_moe()
    rng = np.random.default_rng(8)
    rows = [random_signs(rng, identity.n_expert, identity.n_expert_used, 2, 8) for _ in range(identity.n_layer)]
    write_bias(BiasFile.from_signs(np.stack(rows), identity), found["bias"])
    other = ModelIdentity(**(vars(identity) | {"router_sha256": "0" * 64}))
    write_bias(BiasFile.from_signs(np.stack(rows), other), found["foreign"])
    found["damaged"].write_bytes(b"GGUF" + bytes(30))
    return found


def answer(stdout: bytes, prompt: str) -> str:
    """What llama-cli answered: it stands below the prompt, which is repeated."""
    text = stdout.decode("utf-8").replace("\r\n", "\n")
    match = re.search(re.escape(f"> {prompt}\n") + r"(.*?)\n+\[ Prompt: ", text, re.DOTALL)
    assert match is not None, text[-2000:]
    return match[1]


def on_linux(model: Path, prompt: str, bias: Path | None) -> str:
    program = NATIVE / "bin" / "llama-cli"
    assert program.exists(), "llama-cli is not built: make tools"
    done = subprocess.run(
        [str(program), "-m", str(model), "-p", prompt, *map(str, GREEDY)],
        env=environment({} if bias is None else {"STEERMOE_BIAS": str(bias)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return answer(done.stdout, prompt)


def test_the_greedy_answers_are_those_of_linux(files: dict[str, Path]) -> None:
    found: dict[bool, list[str]] = {True: [], False: []}
    for steered in (False, True):
        env = {"STEERMOE_BIAS": seen(files["bias"])} if steered else {}
        for prompt in PROMPTS:
            done = wine("llama-cli", "-m", files["model"], "-p", prompt, *GREEDY, env=env)
            assert done.returncode == 0, done.stderr[-2000:]
            here = answer(done.stdout, prompt)
            assert here == on_linux(files["model"], prompt, files["bias"] if steered else None)
            found[steered].append(here)
    assert found[True] != found[False], "the environment does not steer"


@pytest.mark.parametrize(
    ("case", "words"),
    [("damaged", "not a valid GGUF file"), ("foreign", "made for olmoe"), ("missing", "cannot be opened")],
)
def test_a_bad_file_stops_the_program(files: dict[str, Path], case: str, words: str) -> None:
    """With its name in UTF-8, whatever the letters."""
    path = seen(files[case])
    done = wine("llama-cli", "-m", files["model"], "-p", "a", *GREEDY, env={"STEERMOE_BIAS": path})
    assert done.returncode != 0, "ran unsteered"
    assert f"error: STEERMOE_BIAS: {path}: {words}" in done.stderr.decode("utf-8"), done.stderr[-2000:]


def console(*words: Any, env: dict[str, str]) -> str:
    """What stands on a console, which wine draws on this terminal, when the program has ended."""
    pexpect = pytest.importorskip("pexpect")
    pyte = pytest.importorskip("pyte")
    screen = pyte.Screen(400, 60)
    stream = pyte.Stream(screen)
    started = command(*words)
    child = pexpect.spawn(started[0], started[1:], env=environment(env), dimensions=(60, 400), encoding="utf-8")
    with contextlib.suppress(pexpect.EOF):
        while True:
            stream.feed(child.read_nonblocking(4096, timeout=120))
    child.close()
    # a wide letter has two cells, of which the second is empty
    return "\n".join(line.replace("\0", "").rstrip() for line in screen.display)


def test_the_console_shows_the_letters_of_an_error(files: dict[str, Path]) -> None:
    missing = seen(files["missing"])
    shown = console("llama-cli", "-m", files["model"], "-p", "a", *GREEDY, env={"STEERMOE_BIAS": missing})
    assert f"error: STEERMOE_BIAS: {missing}: cannot be opened" in shown, shown


def test_the_console_shows_the_letters_of_a_chat(files: dict[str, Path]) -> None:
    """What llama.cpp's own program prints: the prompt and the answer; lines begin at the left."""
    prompt = PROMPTS[1]
    shown = console("llama-cli", "-m", files["model"], "-p", prompt, *GREEDY, env={})
    assert f"\n> {prompt}\n" in shown, shown
    assert answer(shown.encode("utf-8"), prompt) == on_linux(files["model"], prompt, None), shown


@contextlib.contextmanager
def server(*arguments: Any, env: dict[str, str]) -> Iterator[Callable[[str, Any], Any]]:
    """llama-server on a free port; the function asks it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = command("llama-server", "--host", "127.0.0.1", "--port", port, *arguments)
    process = subprocess.Popen(
        words, env=environment(env), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def ask(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    try:
        end = time.monotonic() + 120
        while True:
            try:
                ask("/health")
                break
            except OSError:
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < end, "the server does not answer"
                time.sleep(0.2)
        yield ask
    finally:
        process.kill()
        process.wait()


def test_the_server_steers(files: dict[str, Path]) -> None:
    """Its greedy answers, unsteered and steered, are those of llama-cli."""
    for bias in (None, files["bias"]):
        env = {} if bias is None else {"STEERMOE_BIAS": seen(bias)}
        with server("-m", files["model"], "-t", 2, "-np", 1, "-c", 256, "--no-warmup", env=env) as ask:
            for prompt in PROMPTS[:2]:
                body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0}
                answered = ask("/v1/chat/completions", body)["choices"][0]["message"]["content"]
                assert answered.strip() == on_linux(files["model"], prompt, bias).strip()


def test_the_reader_takes_and_refuses_what_it_does_on_linux(tmp_path: Path) -> None:
    """Every hostile file, under a name with letters of several alphabets."""
    folder, scratch = tmp_path / "corpus", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    corpus = hostile.corpus(scratch, n_flips=100)
    for name, data in corpus.items():
        (folder / f"{name}-模型ü.gguf").write_bytes(data)
    done = wine("load_bias", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    # messages quote files, which may have no UTF-8
    for line in done.stdout.decode("utf-8", "replace").replace("\r\n", "\n").removesuffix("\n").split("\n"):
        name, status, message = line.split(" ", 2)
        assert (status == "0") == (message == ""), line
        assert status == "0" or message.startswith(seen(folder / name)), line
        found[name.removesuffix("-模型ü.gguf")] = status
    assert found.keys() == corpus.keys()
    assert set(found.values()) == {"0", "2"}
    assert {found[f"legal-{name}"] for name in hostile.LEGAL} == {"0"}
    assert {found[f"forged-{name}"] for name in hostile.FORGED} == {"2"}


def fuzz(program: str, runs: int, seeds: Path, env: dict[str, str] | None = None) -> dict[str, int]:
    done = wine(program, f"-runs={runs}", "-seed=1", seeds, env=env)
    errors = done.stderr.decode("utf-8", "replace")
    assert not any(words in errors for words in native_programs.REPORTS), errors[-2000:]
    assert done.returncode == 0, errors[-2000:]
    output = done.stdout.decode("utf-8").replace("\r\n", "\n")
    assert native_programs.executions(output) == runs + len(list(seeds.iterdir()))
    return native_programs.outcomes(output)


def test_mutated_files(tmp_path: Path) -> None:
    found = fuzz("fuzz_bias", 20_000, native_programs.reader_seeds(tmp_path / "seeds"))
    assert min(found["accepted"], found["refused"]) > 1000, found


def test_mutated_files_are_attached(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", native_programs.FUZZ_MODEL)
    seeds = native_programs.attach_seeds(tmp_path / "seeds", model)
    found = fuzz("fuzz_attach", 2_000, seeds, {"STEERMOE_FUZZ_MODEL": seen(model)})
    assert min(found["attached"], found["refused"]) > 100, found


def test_contexts_in_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", OLMOE)
    files = native_programs.stress_files(tmp_path / "files", model)
    done = wine("stress_threads", model, files, "-rounds=6", "-threads=3", "-decode_threads=1")
    assert done.returncode == 0, done.stderr[-2000:]
    attaches, decodes = map(int, re.findall(rb": (\d+) attaches, (\d+) steered decodes", done.stdout)[0])
    assert attaches == 2 * 6 * 3
    assert decodes > attaches


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("assertion", "SIGABRT): crash.cpp:"),
        ("exception", "SIGABRT): nobody catches this;"),
        ("memory", "SIGSEGV, it read or wrote memory that is not its own);"),
        ("memory-in-a-thread", "SIGSEGV, it read or wrote memory that is not its own);"),
        ("memory-without-a-runtime", "SIGSEGV, it read or wrote memory that is not its own);"),
    ],
)
def test_last_words(kind: str, words: str) -> None:
    done = wine("crash", kind)
    lines = done.stderr.decode("ascii").splitlines()
    assert done.returncode != 0
    assert [line for line in lines if line.startswith("error: llama.cpp, or another native library, ended")] == lines[
        -1:
    ]
    assert words in lines[-1]
    assert lines[-1].endswith("; do this")


def sections(dll: str) -> str:
    done = subprocess.run(
        ["x86_64-w64-mingw32-objdump", "-p", str(BUILD / "bin" / dll)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_library_exports_its_interface() -> None:
    header = (ROOT / "native" / "include" / "steermoe.h").read_text("utf-8")
    declared = set(re.findall(r"^STEERMOE_API [^(]*?\b(steermoe_\w+)\(", header, re.MULTILINE))
    assert len(declared) > 25
    exported = set(
        re.findall(r"^\s*\[ *\d+\] (?:\+base\[ *\d+\] +[0-9a-f]+ )?(\w+)$", sections("llama.dll"), re.MULTILINE)
    )
    assert declared <= exported, declared - exported
    assert "llama_decode" in exported


def test_the_library_needs_its_own_and_windows() -> None:
    needed = set(re.findall(r"DLL Name: (\S+)", sections("llama.dll")))
    runtime = {"libstdc++-6.dll", "libgcc_s_seh-1.dll", "libwinpthread-1.dll"}
    assert needed <= {"ggml.dll", "ggml-base.dll", "KERNEL32.dll", "msvcrt.dll"} | runtime, needed
