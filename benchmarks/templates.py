"""What it costs that chat templates are rendered in a child process: against this process, in the same rounds.

    python benchmarks/templates.py [--check]

For each of some templates of llama.cpp's archive a short question, a document of 1 MB and a conversation of 1 MB are
rendered, with the check for texts that the template leaves out, here and in the child in turn. A line gives the medians
and the median of the differences. `--check` fails when a short question takes a millisecond more in the child.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steermoe_local.llama.chat_template import ChatTemplate
from steermoe_local.llama.locating import find_losses, knowing_roles
from steermoe_local.llama.template_client import BoundedTemplate
from steermoe_local.llama.template_date import template_date

FOLDER = Path(__file__).parents[1] / "build" / "native" / "llama.cpp" / "models" / "templates"
TEMPLATES = ("Qwen-Qwen3-0.6B", "tencent-Hy3", "google-gemma-4-31B-it", "openai-gpt-oss-120b")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
DAY = template_date("2024-02-29")
MOST_MORE = 1e-3  # seconds

DOCUMENT = ("The quick brown fox, né, jumps over <b>lazy</b> dogs & cats.\n" * 20_000)[:1_000_000]
Messages = list[dict[str, Any]]
CASES: dict[str, tuple[Messages, int]] = {
    "short question": ([{"role": "user", "content": "Hi there."}], 200),
    "document of 1 MB": ([{"role": "user", "content": DOCUMENT}], 5),
    "conversation of 1 MB": (
        [
            message
            for begin in range(0, 1_000_000, 10_000)
            for message in (
                {"role": "user", "content": DOCUMENT[begin : begin + 9_000]},
                {"role": "assistant", "content": DOCUMENT[begin + 9_000 : begin + 10_000]},
            )
        ]
        + [{"role": "user", "content": "Go on."}],
        3,
    ),
}


def seconds(function: Callable[[Messages], str], messages: Messages) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    function(messages)
    return time.perf_counter() - begin


def ways(source: str) -> tuple[Callable[[Messages], str], Callable[[Messages], str]]:
    """Rendering in this process, and in the child."""
    mine, theirs = ChatTemplate(source, TOKENS), BoundedTemplate(source, TOKENS)

    def here(messages: Messages) -> str:
        def render(messages: Messages) -> str:
            return mine.chat(messages, add_generation_prompt=True, variables={}, date=DAY)

        whole = knowing_roles(render, messages, source)
        text = whole([dict(message) for message in messages])
        find_losses(whole, messages, text)
        return text

    def there(messages: Messages) -> str:
        return theirs.text_and_losses(messages, add_generation_prompt=True, variables={}, date=DAY)[0]

    return here, there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail when a short question takes a millisecond more")
    check = parser.parse_args().check
    begin = time.perf_counter()
    BoundedTemplate("{{ messages }}", {})
    print(f"start of the child: {time.perf_counter() - begin:.3f} s")
    worst = 0.0
    for name in TEMPLATES:
        here, there = ways((FOLDER / f"{name}.jinja").read_text("utf-8"))
        for case, (messages, rounds) in CASES.items():
            assert here(messages) == there(messages)
            pairs = [(seconds(here, messages), seconds(there, messages)) for _ in range(rounds)]
            more = statistics.median(theirs - ours for ours, theirs in pairs)
            ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
            print(f"{name}, {case}: {1e3 * ours:.2f} ms here, {1e3 * theirs:.2f} in the child, {1e3 * more:+.2f}")
            if case == "short question":
                worst = max(worst, more)
    if check and worst > MOST_MORE:
        print(f"a short question takes {1e3 * worst:.2f} ms more", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
