"""The text form of the rules of a plan: read, written, read again; what is refused, and at which cost."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import UsageError
from steermoe_local.steering.plan_rules import Condition, RuleSpec, Where
from steermoe_local.steering.plan_text import MAX_RULE, format_rule, format_window, parse_rule, parse_rules
from tests.support.plans import specs

FAITHFUL = Condition("routing", below=0.1, map="faithful")
READ: dict[str, RuleSpec] = {
    "formal": RuleSpec(Where(), "formal"),
    "formal +8 -8": RuleSpec(Where(), "formal", {"activate": 8, "deactivate": 8}),
    "all: formal +0": RuleSpec(Where(), "formal", {"activate": 0}),
    "maps/x.json reverse": RuleSpec(Where(), "maps/x.json", {"reverse": True}),
    '"C:\\\\maps\\\\x.json" -3': RuleSpec(Where(), "C:\\maps\\x.json", {"deactivate": 3}),
    "answer: C:\\maps\\x.json -3": RuleSpec(Where("answer"), "C:\\maps\\x.json", {"deactivate": 3}),
    '"answer" +1': RuleSpec(Where(), "answer", {"activate": 1}),
    "answer: answer": RuleSpec(Where("answer"), "answer"),
    "thinking: none": RuleSpec(Where("thinking"), None),
    "\n answer\t:\n none ": RuleSpec(Where("answer"), None),
    "prompt[-1:]: x": RuleSpec(Where("prompt", -1), "x"),
    "prompt[ -5 : -1 ]: x": RuleSpec(Where("prompt", -5, -1), "x"),
    "prompt[-5:3]: x": RuleSpec(Where("prompt", -5, 3), "x"),
    "answer[:32]: x": RuleSpec(Where("answer", 0, 32), "x"),
    "answer[:]: x": RuleSpec(Where("answer"), "x"),
    "answer every 2 [4:] until #12 after 'it: \"so\"': x": RuleSpec(Where("answer", 4, None, 'it: "so"', 12, 2), "x"),
    'answer after "\\u00e9\\n": x': RuleSpec(Where("answer", after="é\n"), "x"),
    "answer after Answer until Stop: x": RuleSpec(Where("answer", after="Answer", until="Stop"), "x"),
    "answer when faithful<0.1 over prompt: x": RuleSpec(Where("answer", when=FAITHFUL), "x"),
    "thinking when 'a b' by effect > -1e-3 over last 16: x": RuleSpec(
        Where("thinking", when=Condition("routing", above=-0.001, map="a b", by="effect", last=16)), "x"
    ),
    "answer when entropy > .5: x": RuleSpec(Where("answer", when=Condition("entropy", above=0.5)), "x"),
    "answer when margin < 2.: x": RuleSpec(Where("answer", when=Condition("margin", below=2)), "x"),
    'answer when "margin" < 2 over prompt: x': RuleSpec(
        Where("answer", when=Condition("routing", below=2, map="margin")), "x"
    ),
    'x layers="3-7, 9" mode=capped cap=inf': RuleSpec(
        Where(), "x", {"layers": "3-7, 9", "mode": "capped", "cap": float("inf")}
    ),
    "x reverse=false weights=none scale=-2.5": RuleSpec(
        Where(), "x", {"reverse": False, "weights": "none", "scale": -2.5}
    ),
}


@pytest.mark.parametrize("text", READ)
def test_read(text: str) -> None:
    assert parse_rule(text) == READ[text]


@given(specs())
def test_what_is_written_reads_back(spec: RuleSpec) -> None:
    text = format_rule(spec)
    if len(text) > MAX_RULE:
        with pytest.raises(UsageError, match="longer"):
            parse_rule(text)
        return
    assert parse_rule(text) == spec
    assert text.isprintable(), "a line on a terminal, and nothing that it would obey"


def test_written() -> None:
    text = 'answer[0:32] after "X y" until #12 every 2 when faithful < 0.1 over prompt: careful +0 -20 cap=4'
    assert format_rule(parse_rule(text)) == text
    assert format_rule(parse_rule("x -0 reverse=true")) == "all: x -0 reverse"
    assert format_rule(parse_rule("answer after '\x1b[1m': 'b\u202e'")) == 'answer after "\\u001b[1m": "b\\u202e"'
    assert [format_window(0, None), format_window(3, None), format_window(-3, -1)] == ["", "[3:]", "[-3:-1]"]


REFUSED = {  # text: what the message shows
    "": "what steers there",
    "answer": "a colon",
    "answer +8 -8": "'+8'",
    "answer formal +8": "'formal'",
    "answer:": "what steers there",
    "answer: 'none'": "none",
    'answer: ""': "what steers there",
    "answer: none +8": "none",
    "answer: +8": "+8",
    "answer: x +8 +9": "activate twice",
    "answer: x +1234567890": "'+1234567890'",
    "answer: x foo=1": "'foo=1'",
    "answer: x layers=": "layers",
    "answer: x scale=1x": "'1x'",
    "answer: x scale=inf": "'inf'",
    "answer: x scale=1e999": "scale: inf",
    "answer: x cap=nan": "'nan'",
    "answer: x scale=\u0663": "'\u0663'",
    "answer: x 'y": '"\'y"',
    "foo: x": "'foo'",
    ": x": "':'",
    "answer[16]: x": "'[16]'",
    "answer[a:b]: x": "'[a:b]'",
    "answer[\u0663:]: x": "'[\u0663:]'",
    "answer[-1:]: x": "-1",
    "answer[5:5]: x": "answer[5:5]",
    "answer[:0]: x": "answer[0:0]",
    "prompt[-1:0]: x": "prompt[-1:0]",
    "answer[0:99999999999]: x": "'[0:99999999999]'",
    "answer[0:9999999999]: x": "9999999999",
    "answer[0:3] [4:5]: x": "a window twice",
    "answer[0:3: x": "no end",
    "answer after: x": "which text",
    "answer after '': x": "1 to 1000",
    "answer after #x: x": "'#x'",
    "answer after #\u0663: x": "'#\u0663'",
    "answer after #2147483648: x": "#2147483648",
    'answer after "\\x": x': "JSON",
    'answer after "\ud800": x': "'\\ud800'",
    "answer after 'a: x": "no end",
    "answer every 0: x": "every 0",
    "answer every \u0663: x": "'\u0663'",
    "answer every 2 every 3: x": "every twice",
    "answer when: x": "faithful",
    "answer when f: x": "< or >",
    "answer when f = 1 over prompt: x": "< or >",
    "answer when f < y over prompt: x": "'y'",
    "answer when f < 1: x": "over prompt",
    "answer when f < 1 over all: x": "'all'",
    "answer when f < 1 over last 0: x": "last 0",
    "answer when f < 1 over last 4097: x": "4097",
    "answer when f by weight < 1 over prompt: x": "'weight'",
    "answer when f < 1e999 over prompt: x": "inf",
    "answer when entropy < 1 over prompt: x": "'over'",
    "all when entropy < 1: x": "thinking or answer",
    "prompt when f < 1 over prompt: x": "thinking or answer",
    "answer: \x00": "'\\x00'",
    "answer when '\x00' < 1 over prompt: x": "'\\x00'",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_rules(["all: x", text])
    message = str(refused.value)
    assert message.startswith(f"rule 2 {text!r}: ")
    assert REFUSED[text] in message.removeprefix(f"rule 2 {text!r}: ")
    with pytest.raises(UsageError, match=r"^rule [\"']"):
        parse_rule(text)


@pytest.mark.parametrize("n", [0, 65])
def test_the_number_of_rules(n: int) -> None:
    with pytest.raises(UsageError, match=f"64 rules, not {n}"):
        parse_rules(["x"] * n)
    assert len(parse_rules(["x"] * 64)) == 64


WORDS = "answer all : [ ] [0:1] after until when entropy < 0.5 over last every none ' \" \\ #1 +8 layers= = x \u0663"
HOSTILE = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*WORDS.split(), " ", "\n", "\x1b", "\x00", "\ud800"]), max_size=14).map("".join),
)


def message_of(text: str, number: int) -> str | None:
    """What a rule is refused with."""
    try:
        spec = parse_rule(text, number)
    except UsageError as error:
        return str(error)
    assert parse_rule(format_rule(spec)) == spec
    return None


@given(HOSTILE, st.integers(1, 64))
def test_any_text_is_a_rule_or_one_printable_line(text: str, number: int) -> None:
    message = message_of(text, number)
    if message is not None:
        assert message.startswith(f"rule {number} {text[:80]!r}")
        assert message.isprintable(), "control characters are shown, not printed"
        assert len(message) < 2000


LONG = {
    "quotes": '"' * MAX_RULE,
    "single quotes": "'" * (MAX_RULE - 1),
    "escapes without an end": '"' + '\\"' * (MAX_RULE // 2 - 1),
    "escapes": '\\"' * (MAX_RULE // 2),
    "brackets": "[" * MAX_RULE,
    "a bracket": "answer[" + " " * (MAX_RULE - 10) + "x]:",
    "digits": "answer: x scale=" + "1" * (MAX_RULE - 20) + "x",
    "digits of a window": "answer[" + "1" * (MAX_RULE - 20) + ":]: x",
    "digits of every": "answer every " + "1" * (MAX_RULE - 20) + ": x",
    "digits of a token": "answer after #" + "1" * (MAX_RULE - 20) + ": x",
    "fields": "answer: x " + "a=" * (MAX_RULE // 2 - 10),
    "letters": "answer: x " + "a" * (MAX_RULE - 20),
    "blanks": "answer" + " " * (MAX_RULE - 20),
    "colons": ":" * MAX_RULE,
    "control characters": "answer after '" + "\x01" * 1000 + "': x",
    "a large one": "x" * (1 << 22),
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts_cost_little(name: str) -> None:
    """A body holds many rules: each is refused in time linear in its length, ten of these in milliseconds of CPU.

    The square of 4,096 characters is 17 million steps, each of some ten nanoseconds or more.
    """
    start = time.process_time()
    messages = {message_of(LONG[name], 7) for _ in range(10)}
    assert time.process_time() - start < 1
    (message,) = messages
    assert message is not None
    assert message.startswith("rule 7 ")
    assert len(message) < 1200


def test_no_longer_text_is_written_than_is_read() -> None:
    """Single quotes may hold control characters, which are written as six: what is accepted can be saved."""
    short = f"answer after '{chr(1) * 600}': x"
    assert len(format_rule(parse_rule(short))) > 6 * 600
    long = f"answer after '{chr(1) * 700}': x"
    assert len(long) < MAX_RULE
    with pytest.raises(UsageError, match="as it is written"):
        parse_rule(long)
