"""Lists of prompts that a model may refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...._util.records import clean_text
from ....pairs.prompts import PromptItem
from ..adapter import BuildOptions, DatasetAdapter, Row, Skipped, row_id

__all__ = ["TDC2023", "AdvBench", "MaliciousInstruct", "Prompts", "StrongReject"]


class Prompts(DatasetAdapter):
    """Prompts in one of the columns, the first that a row has."""

    name = "prompts"
    what = "prompts, refused or not"
    source = "any file of yours"
    columns: tuple[tuple[str, ...], ...] = (("prompt",),)
    requests = True
    texts = True
    max_tokens = 128
    positive = "refused"
    negative = "complied"

    def scoring(self, options: BuildOptions) -> tuple[str, dict[str, Any]]:
        return "refusal", {}

    def items(self, row: Row, options: BuildOptions) -> Iterator[PromptItem]:
        prompt = next((text for (name,) in self.columns if (text := clean_text(row.get(name)))), None)
        if prompt is None:
            raise Skipped("no prompt")
        # of the other columns only what groups results; AdvBench's `target`, say, is an answer that nobody needs here
        kept = {name: text for name in ("category", "source") if (text := clean_text(row.get(name)))}
        yield PromptItem(row_id(row), prompt, extra=kept)


class AdvBench(Prompts):
    """AdvBench."""

    name = "advbench"
    what = "requests to refuse"
    source = "harmful_behaviors.csv of llm-attacks/llm-attacks"
    columns = (("goal",), ("prompt",))
    texts = False


class StrongReject(Prompts):
    """StrongREJECT."""

    name = "strongreject"
    what = "requests to refuse"
    source = "strongreject_dataset.csv of alexandrasouly/strongreject"
    columns = (("forbidden_prompt",), ("prompt",))
    texts = False


class TDC2023(Prompts):
    """The red-teaming track of the Trojan Detection Challenge 2023."""

    name = "tdc2023"
    what = "requests to refuse"
    source = "behaviors.json of centerforaisafety/tdc2023-starter-kit"


class MaliciousInstruct(Prompts):
    """MaliciousInstruct."""

    name = "malicious-instruct"
    what = "requests to refuse"
    source = "MaliciousInstruct.txt of Princeton-SysML/Jailbreak_LLM"
