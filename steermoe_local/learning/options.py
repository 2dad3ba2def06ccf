"""What `learn` is asked for: where the contrast comes from, how thorough it is, how models and templates are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from ..llama.template_date import AnyDate

Effort = Literal["quick", "normal", "thorough"]


@dataclass(frozen=True)
class LikeUnlike:
    """Two instructions: the model itself answers `questions` under each as system prompt.

    `questions` is a file of prompts; None: the neutral questions that ship, for the embedded model its own.
    """

    like: str
    unlike: str
    questions: Path | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for instructions that are empty or the same."""
        if not self.like.strip() or not self.unlike.strip():
            raise UsageError("--like, --unlike: empty; write two instructions that make the model answer differently")
        if self.like.strip() == self.unlike.strip():
            raise UsageError("--like, --unlike: the same instruction; write two that make the model answer differently")


@dataclass(frozen=True)
class GivenPairs:
    """A file of pairs of one prompt and two answers."""

    path: Path


@dataclass(frozen=True)
class Builtin:
    """A behaviour that ships, by name: its pairs, and its held-out prompts with their scorer."""

    name: str


Contrast = LikeUnlike | GivenPairs | Builtin


@dataclass(frozen=True)
class JudgeOptions:
    """A model behind an endpoint of OpenAI's API that scores the held-out answers (`evaluation/tasks/judge.py`)."""

    base_url: str
    model: str
    criterion: str

    def to_dict(self) -> dict[str, str]:
        """The options of the scorer `judge`."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """How much a run does.

    Attributes:
        n_pairs: pairs that detection and attribution get, at most.
        answer_tokens: longest answer.
        n_candidates: experts whose effects are estimated, without as many controls; 0: attribution is left out.
        draws: random interventions of each action, at most.
        n_items: pairs that attribution uses, half of them to confirm.
        item_words: words of each answer that attribution reads.
        n_choosing: items on which the numbers of experts are chosen, at most.
        n_trials: choices that are tried, at most.
        n_heldout: held-out items that are measured, at most.
        n_random: draws of random experts.
        n_text: tokens of the neutral text.
    """

    n_pairs: int
    answer_tokens: int
    n_candidates: int
    draws: int
    n_items: int
    item_words: int
    n_choosing: int
    n_trials: int
    n_heldout: int
    n_random: int
    n_text: int

    def __post_init__(self) -> None:
        """Raise UsageError for impossible numbers."""
        for name, value in asdict(self).items():
            if type(value) is not int or value < (0 if name == "n_candidates" else 1):
                raise UsageError(f"{name}: {value!r} is not a whole number from 1 up")
        if self.n_random < LEAST_RANDOM:
            raise UsageError(f"n_random: {self.n_random} draws of random experts are too few; take {LEAST_RANDOM}")


LEAST_RANDOM = 5
"""Draws of random experts that a verdict takes."""

SIZES: Mapping[str, Sizes] = {
    "quick": Sizes(60, 24, 10, 64, 8, 12, 20, 14, 40, 5, 300),
    "normal": Sizes(140, 40, 16, 192, 16, 14, 40, 24, 64, 7, 800),
    "thorough": Sizes(400, 64, 32, 512, 32, 20, 80, 60, 120, 20, 2000),
}
"""The sizes of each effort."""


@dataclass(frozen=True)
class LearnOptions:
    """How `learn` works.

    Attributes:
        effort: "normal"; "quick": half of its answers, a third of its draws; "thorough": three times as many.
        sizes: sizes that differ from those of the effort, by the names of `Sizes`.
        heldout: share of the questions or pairs that only the last step sees.
        max_ppl_increase: most increase of the perplexity of neutral text, as a share.
        judge: scores the held-out answers; None: the behaviour's scorer, or the margin of the answers.
        positive, negative: names of the sides; "": those of the behaviour, or "like" and "unlike".
        license: licence of the map.
        thinking, template_arguments, date: as in `Renderer`.
        n_parallel: answers decoded at once.
        seed: of everything that is drawn.
        model_arguments, context: arguments of `SteeredLlama`, and of the contexts (n_threads, type_k, ...).
        command: the command line that does the same, for files.

    Raises UsageError for values outside their ranges.
    """

    effort: Effort = "normal"
    sizes: Mapping[str, int] = field(default_factory=dict)
    heldout: float = 0.4
    max_ppl_increase: float = 0.05
    judge: JudgeOptions | None = None
    positive: str = ""
    negative: str = ""
    license: str = ""
    thinking: bool = False
    template_arguments: Mapping[str, Any] | None = None
    date: AnyDate = None
    n_parallel: int = 16
    seed: int = 0
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        if self.effort not in SIZES:
            raise UsageError(f"effort: {self.effort!r} is none of {', '.join(SIZES)}")
        if unknown := sorted(set(self.sizes) - set(Sizes.__dataclass_fields__)):
            raise UsageError(f"sizes: {unknown[0]}: unknown; there are {', '.join(Sizes.__dataclass_fields__)}")
        if not 0.1 <= self.heldout <= 0.8:
            raise UsageError(f"heldout: {self.heldout} is not from 0.1 to 0.8: both parts have to be large enough")
        if not 1 <= self.n_parallel <= 256:
            raise UsageError(f"n_parallel: {self.n_parallel} is not from 1 to 256")
        _ = self.all_sizes

    @property
    def all_sizes(self) -> Sizes:
        """The sizes of the effort with those that were given."""
        return replace(SIZES[self.effort], **self.sizes)

    @property
    def rendering(self) -> dict[str, Any]:
        """Arguments of `Renderer`, `record_counts` and the settings of evaluators."""
        return {"thinking": self.thinking, "template_arguments": self.template_arguments, "date": self.date}

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as JSON values: a run resumes under the same alone."""
        context = {name: value for name, value in self.context.items() if name != "n_threads"}
        return {
            "effort": self.effort,
            **asdict(self.all_sizes),
            "heldout": self.heldout,
            "max_ppl_increase": self.max_ppl_increase,
            "judge": None if self.judge is None else self.judge.to_dict(),
            "positive": self.positive,
            "negative": self.negative,
            "thinking": self.thinking,
            "template_arguments": self.template_arguments,
            "n_parallel": self.n_parallel,
            "seed": self.seed,
            "context": context,
        }
