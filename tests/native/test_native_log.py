"""llama.cpp's log: kept for messages, printed when wanted, and no place where a signal gets lost."""

from __future__ import annotations

import ctypes
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ModelError, SteeredLlama, model_info
from steermoe_local.llama import capi
from steermoe_local.llama.library import llama_cpp, take_log_error
from steermoe_local.llama.steered_llama import native_bias
from steermoe_local.models.local_models import resolve_model

LOAD = """
import sys
from steermoe_local import SteeredLlama
SteeredLlama(sys.argv[1], n_ctx=64, verbose=sys.argv[2] == "loud").close()
"""


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_verbose_prints_and_quiet_does_not() -> None:
    loud, quiet = run(resolve_model("tiny"), "loud"), run(resolve_model("tiny"), "quiet")
    assert "llama_context: n_ctx" in loud.stderr, loud.stderr
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_the_first_failure_is_quoted_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, reason in (("no model", "invalid magic characters: 'no m'"), ("GGUF", "failed to read")):
        path = tmp_path / "broken.gguf"
        path.write_text(text)
        monkeypatch.setattr(capi, "check_loadable", lambda path: None)  # which would find it first
        with pytest.raises(ModelError, match=reason) as caught:
            SteeredLlama(path)
        assert "\n" not in str(caught.value)
        assert take_log_error() == ""


def test_a_failure_longer_than_the_buffer_is_cut() -> None:
    lib = llama_cpp().llama_cpp._lib
    assert take_log_error() == ""
    name = b"x" * 3000
    assert not llama_cpp().llama_model_load_from_file(name, llama_cpp().llama_model_default_params())
    assert lib.steermoe_log_take_error(None, ctypes.c_size_t(0)) == 1023
    assert len(take_log_error()) == 1023
    assert take_log_error() == ""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that send signals")
def test_no_signal_is_lost_while_the_library_logs(tiny_path: Path) -> None:
    """An exception of a signal's handler comes out of whatever was called, also where the library logs a lot."""

    class Alarm(Exception):
        pass

    n_sent = 0

    def handler(*_: Any) -> None:
        nonlocal n_sent
        n_sent += 1
        raise Alarm

    identity = model_info(tiny_path).require_moe()
    signs = np.zeros(identity.shape, np.int8)
    signs[1, 0] = 1
    bias = native_bias(BiasFile.from_signs(signs, identity))
    rng = random.Random(7)
    before = signal.signal(signal.SIGALRM, handler)
    n_caught = 0
    try:
        llama = SteeredLlama(tiny_path, n_ctx=64)
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, 0.01))
                for _ in range(10_000):
                    capi.attach(llama._ctx.ctx, bias)  # reserves the graphs, of which llama.cpp logs
                    capi.detach(llama._ctx.ctx)
                raise AssertionError("a signal was lost")
            except Alarm:
                n_caught += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    llama.close()
    assert n_caught == n_sent == 60
