"""How long threads of GNU's OpenMP spin while they wait for others, and that nothing is left in the environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from steermoe_local.llama.library import SPINS

PROGRAM = """
import os
from steermoe_local.llama.library import llama_cpp
before = dict(os.environ)
llama_cpp()
assert os.environ == before, "the environment has changed"
"""
_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def spins(**variables: str) -> str:
    """The count that the library shows when it is loaded."""
    unset = {name: value for name, value in os.environ.items() if name not in _NAMES}
    environment = {**unset, "OMP_DISPLAY_ENV": "verbose", **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("the library was built without GNU's OpenMP")
    return found[1]


def test_a_short_spin_by_itself() -> None:
    assert spins() == SPINS


@pytest.mark.parametrize(
    ("variables", "count"), [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_what_the_user_says_counts(variables: dict[str, str], count: str) -> None:
    assert spins(**variables) == count
