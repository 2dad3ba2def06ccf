"""Models for the tests of `steermoe run`: other chat templates, and one that never comes to an end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import CliRunner, Result

from steermoe_local.cli import main
from tests.support import random_models
from tests.support.gguf_copy import copy_model
from tests.support.held import HELD
from tests.support.random_models import RandomModel, write_random_model

PROGRAM = Path(sys.executable).with_name("steermoe")
ASK = ("-t", "1", "--temp", "0")
QUESTION = "Which number comes after three?"


def invoke(*args: Any, **kwargs: Any) -> Result:
    """`steermoe run` in this process; stdin is empty unless there is `input`."""
    return CliRunner().invoke(main, ["run", *map(str, args)], **kwargs)


def start(*args: Any, held: Mapping[str, str] | None = None, **kwargs: Any) -> subprocess.Popen[bytes]:
    """The installed program, its stdout and stderr as pipes; `held`: an environment of `hold`."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {name: text for name, text in os.environ.items() if not name.startswith("STEERMOE_BIAS")}
    program = [str(PROGRAM)] if held is None else HELD
    options: dict[str, Any] = pipes | {"env": environment | dict(held or {})} | kwargs
    return subprocess.Popen([*program, "run", *map(str, args)], **options)


def talker(folder: Path, tiny_path: Path) -> Path:
    """Random weights with the embedded model's tokenizer; its greedy answers go on and on."""
    with mock.patch.object(random_models, "N_VOCAB", 1280):  # of the embedded model
        plain = write_random_model(folder / "plain.gguf", RandomModel("olmoe", n_layer=2))
    (path,) = copy_model(plain, folder / "talker.gguf", tokenizer_of=tiny_path)
    return path
