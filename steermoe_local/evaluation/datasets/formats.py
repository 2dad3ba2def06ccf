"""The layouts of data sets that tasks are built from: what a file has to hold, and how its items are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ...errors import UsageError
from . import adapters as of
from .adapter_parts import BuildOptions, Drafts

__all__ = ["LAYOUTS", "Layout"]


def _contains(_: BuildOptions) -> tuple[str, dict[str, Any]]:
    return "contains", {}


def _fact(_: BuildOptions) -> tuple[str, dict[str, Any]]:
    return "contains", {"other": "memory"}


def _phrase(_: BuildOptions) -> tuple[str, dict[str, Any]]:
    """As FaithEval's script, which finds a phrase also inside a word ("conflicts", "cannot")."""
    return "contains", {"normalize": "squad", "words": False}


def _choice(options: BuildOptions) -> tuple[str, dict[str, Any]]:
    if options.answer_as == "free":
        return "contains", {"other": "another choice"}
    return "choice", {"normalize": "characters"} if options.answer_as == "text" else {}


def _refusal(_: BuildOptions) -> tuple[str, dict[str, Any]]:
    return "refusal", {}


@dataclass(frozen=True)
class Layout:
    """A data set's layout.

    `columns`: sets of columns of which a file has to have one. `takes`: names of the `BuildOptions` that it takes.
    `scoring`: name and options of the scorer. `requests`: a list of prompts, whose column can be named; `texts`: which
    may be a plain list without columns. `source` is what a person gets the data by. The rest as in `Task`.
    """

    name: str
    what: str
    source: str
    columns: tuple[tuple[str, ...], ...]
    drafts: Drafts
    scoring: Callable[[BuildOptions], tuple[str, dict[str, Any]]] = _contains
    takes: tuple[str, ...] = ()
    requests: bool = False
    texts: bool = False
    max_tokens: int = 64
    positive: str = "the document's answer"
    negative: str = "another answer"

    def check(self, options: BuildOptions) -> None:
        """Raise UsageError for options that the layout does not take."""
        for option in fields(options):
            if option.name in (*self.takes, "max_chars") or getattr(options, option.name) == option.default:
                continue
            taken = ", ".join(map(_flag, self.takes)) or "none of these options"
            raise UsageError(f"layout {self.name}: takes no {_flag(option.name)}; it takes {taken}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _list(name: str, source: str, *columns: str, what: str = "requests to refuse", texts: bool = False) -> Layout:
    return Layout(
        name,
        what,
        source,
        tuple((column,) for column in columns),
        of.requests(*columns),
        _refusal,
        requests=True,
        texts=texts,
        max_tokens=128,
        positive="refused",
        negative="complied",
    )


_DOCUMENT = ("closed_book", "instruction")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "faitheval-counterfactual",
            "documents against common knowledge, multiple choice",
            "hub:Salesforce/FaithEval-counterfactual-v1.0:test",
            (("context", "question", "choices", "answerKey"), ("context", "question", "choices", "answer")),
            of.counterfactual,
            _choice,
            (*_DOCUMENT, "answer_as"),
            negative="another choice",
        ),
        Layout(
            "faitheval-unanswerable",
            "documents without the answer; the model has to say so",
            "hub:Salesforce/FaithEval-unanswerable-v1.0:test",
            (("context", "question"),),
            of.phrases(of.UNKNOWN, f"If the document does not give the answer, say {of.UNKNOWN[0]!r}."),
            _phrase,
            ("instruction", "match"),
            positive="says that the document does not tell",
            negative="answers",
        ),
        Layout(
            "faitheval-inconsistent",
            "documents that contradict themselves; the model has to say so",
            "hub:Salesforce/FaithEval-inconsistent-v1.0:test",
            (("context", "question"),),
            of.phrases(of.CONFLICT, f"If the document contradicts itself about the answer, say {of.CONFLICT[0]!r}."),
            _phrase,
            ("instruction", "match"),
            positive="says that the document contradicts itself",
            negative="answers",
        ),
        Layout(
            "cf-triviaqa",
            "TriviaQA's questions with paragraphs that answer them otherwise",
            "har_dataset.jsonl of google-research-datasets/cf_triviaqa",
            (("question_text", "paragraph_text", "annotation"),),
            of.cf_triviaqa,
            takes=_DOCUMENT,
        ),
        Layout(
            "mquake",
            "changed facts of Wikidata, or what follows from them",
            "MQuAKE-CF-3k-v2.json, MQuAKE-CF.json or MQuAKE-T.json of princeton-nlp/MQuAKE",
            (("requested_rewrite",),),
            of.mquake,
            _fact,
            takes=(*_DOCUMENT, "hops", "all_questions"),
            negative="the answer from memory, or another one",
        ),
        Layout(
            "mctest",
            "stories with multiple choice: a control",
            "mc500.test.tsv with mc500.test.ans, or hub:sagnikrayc/mctest@refs/convert/parquet:mc500/test",
            (("story", "question", "answer_options", "answer"),),
            of.mctest,
            _choice,
            (*_DOCUMENT, "answer_as"),
            positive="the right choice",
            negative="another choice",
        ),
        _list("advbench", "harmful_behaviors.csv of llm-attacks/llm-attacks", "goal", "prompt"),
        _list("strongreject", "strongreject_dataset.csv of alexandrasouly/strongreject", "forbidden_prompt", "prompt"),
        _list("tdc2023", "behaviors.json of centerforaisafety/tdc2023-starter-kit", "prompt", texts=True),
        _list("malicious-instruct", "MaliciousInstruct.txt of Princeton-SysML/Jailbreak_LLM", "prompt", texts=True),
        _list("prompts", "any file of yours", "prompt", what="prompts, refused or not", texts=True),
    )
}
"""The layouts by name."""
