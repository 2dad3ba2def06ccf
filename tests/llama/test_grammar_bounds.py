"""Grammars that would end the process or hold it for hours are refused before a native library sees them."""

from __future__ import annotations

import pytest

from steermoe_local.errors import UsageError
from steermoe_local.llama.grammar_bounds import MAX_GRAMMAR, require_bounded, require_of_file
from steermoe_local.llama.sampling import Sampling

LARK = "%llguidance {}\n"
# each ends a process with 8 MiB of stack, but for the length
CRASHES = {
    "groups": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
    "open groups": "root ::= " + "(" * 100_000,
    "rules": "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(100_000)) + 'a100000 ::= "a"',
    "repetitions": "root ::= a0{0,2000}\n"
    + "".join(f"a{i} ::= a{i + 1}{{0,2000}}\n" for i in range(100))
    + 'a100 ::= "a"',
    "rules of Lark": LARK + "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(3000)) + 'a3000: "a"\n',
    "length": "root ::= [" + "a" * MAX_GRAMMAR + "]",
}
# llama.cpp takes more than 20 seconds for each
HOLDS = {
    "nested repetitions": "root ::= " + "(" * 6 + '"a"' + "{0,3})" * 6,
    "optional rules": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}? r{i + 1}?\n" for i in range(12)) + 'r12 ::= "a"',
    "optional texts": "root ::= " + '"a"? ' * 1000 + '"b"',
}
PLAIN = [
    'root ::= [^"]*',
    'root ::= "a" | "b (" | [)(]{2,5}',
    "root ::= .{,9}  # (a comment)\n",
    'root ::= "\\"" [\\]] "x"+',
]


@pytest.mark.parametrize("name", CRASHES)
def test_what_would_end_the_process(name: str) -> None:
    with pytest.raises(UsageError, match=r"grammar: .* at most") as caught:
        Sampling(grammar=CRASHES[name])
    assert len(str(caught.value)) < 200
    with pytest.raises(UsageError):
        require_of_file(CRASHES[name])


@pytest.mark.parametrize("name", HOLDS)
def test_what_would_hold_it_is_not_read_from_files(name: str) -> None:
    require_bounded(HOLDS[name])  # the user's own
    with pytest.raises(UsageError, match="read from a file"):
        require_of_file(HOLDS[name])


@pytest.mark.parametrize(
    "grammar", ['%llguidance {}\nstart: %json {"type": "null"}\n', 'root ::= a\na ::= "x"', "root ::= " + '"a"? ' * 65]
)
def test_other_grammars_that_are_not_read_from_files(grammar: str) -> None:
    with pytest.raises(UsageError, match="read from a file"):
        require_of_file(grammar)


@pytest.mark.parametrize("grammar", [*PLAIN, LARK + 'start: "a" | /b+/\n'])
def test_grammars_of_files(grammar: str) -> None:
    require_of_file(grammar)
