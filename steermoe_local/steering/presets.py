"""The paper's numbers of experts: how many to activate and deactivate for its six models and two behaviours.

Sources. Layers, experts and top-k: each model's config.json. Numbers of experts: the table of steered experts in the
appendix of arXiv 2509.09660, which its authors publish as num_experts.jsonl beside their code; its total of experts
per model is layers times experts here. Of its three columns, "Steer Faithful" and "Steer Safe" are kept. Its numbers
for steering away from safety are not.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError
from ..identity import ModelIdentity

PRESETS = ("faithful", "safe")


@dataclass(frozen=True)
class PaperModel:
    """One of the paper's models: its Hugging Face name, its routing as llama.cpp tells it, and (+, -) by preset."""

    name: str
    architecture: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    faithful: tuple[int, int]
    safe: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain JSON values."""
        numbers = {name: dict(zip(("activate", "deactivate"), getattr(self, name), strict=True)) for name in PRESETS}
        return asdict(self) | numbers


PAPER_MODELS = (
    #          model, architecture, layers, experts of a layer, top-k, faithful (+, -), safe (+, -)
    PaperModel("Qwen/Qwen3-30B-A3B", "qwen3moe", 48, 128, 8, (0, 500), (15, 0)),
    PaperModel("allenai/OLMoE-1B-7B-0125-Instruct", "olmoe", 16, 64, 8, (0, 50), (5, 0)),
    PaperModel("microsoft/Phi-3.5-MoE-instruct", "phimoe", 32, 16, 2, (10, 75), (5, 0)),
    PaperModel("mistralai/Mixtral-8x7B-Instruct-v0.1", "llama", 32, 8, 2, (10, 100), (20, 0)),
    PaperModel("openai/gpt-oss-120b", "gpt-oss", 36, 128, 4, (5, 100), (5, 0)),
    PaperModel("openai/gpt-oss-20b", "gpt-oss", 24, 32, 4, (10, 50), (5, 0)),
)


@dataclass(frozen=True)
class Preset:
    """The numbers of one preset for one model, for `ExpertMap.choose`."""

    name: str
    model: str
    n_activate: int
    n_deactivate: int


def preset_for(name: str, identity: ModelIdentity) -> Preset:
    """The numbers of preset `name` for a model of the table.

    A model is known by architecture, layers, experts and top-k: its fine-tunes and sister models are taken for it.

    Raises UsageError when there is no such preset, or the table does not have the model.
    """
    if name not in PRESETS:
        raise UsageError(f"{name!r} is no preset; take one of {', '.join(PRESETS)}")
    routing = (identity.architecture, *identity.shape, identity.n_expert_used)
    for model in PAPER_MODELS:
        if routing == (model.architecture, model.n_layer, model.n_expert, model.n_expert_used):
            return Preset(name, model.name, *getattr(model, name))
    known = ", ".join(model.name.split("/")[1] for model in PAPER_MODELS)
    raise UsageError(
        f"preset {name}: the paper has no numbers for {identity.short}; "
        f"give --activate and --deactivate (in a rule +N and -N), or take a map of {known}"
    )


def presets_for(identity: ModelIdentity, behaviour: str, positive: str, negative: str) -> list[Preset]:
    """The presets that fit a map by its model and by the words of its behaviour and sides, none for other models."""
    found = []
    for name in PRESETS:
        try:
            numbers = preset_for(name, identity)
            warnings = check_sides(name, behaviour, positive, negative, "")
        except UsageError:
            continue
        if not warnings:
            found.append(numbers)
    return found


# Words by which people name the two sides of a preset's behaviour.
_SIDES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "faithful": (
        frozenset({"faithful", "faithfulness", "document", "context", "grounded"}),
        frozenset({"unfaithful", "memory", "parametric", "hallucinated", "ungrounded"}),
    ),
    "safe": (
        frozenset({"safe", "safety", "refuse", "refuses", "refusal", "refusing", "harmless"}),
        frozenset({"unsafe", "comply", "complies", "compliance", "complying", "harmful", "jailbroken"}),
    ),
}


def check_sides(preset: str, behaviour: str, positive: str, negative: str, where: str) -> list[str]:
    """Check by its words that the map in `where` is of the preset's behaviour and has its good side as the positive.

    Returns warnings: one if the words are those of the other preset. Words that are nobody's say nothing.

    Raises UsageError when the map's sides are the other way round: a preset never steers away from its behaviour.
    """
    good, bad = _SIDES[preset]
    first, second = _words(positive), _words(negative)
    # "ignores the document" is a good name of the negative side: there, only a name and nothing else counts
    if (first & bad and not first & good) or (second and second <= good):
        raise UsageError(
            f"{where}: its positive side is {positive!r} and its negative {negative!r}, the other way round than "
            f"preset {preset} needs; run steermoe detect with the sides of the pairs swapped"
        )
    for other, (other_good, other_bad) in _SIDES.items():
        words = _words(behaviour) | first | second
        if other != preset and words & (other_good | other_bad) and not words & (good | bad):
            return [f"{where}: looks like a map for preset {other}, and the numbers are those of {preset}"]
    return []


_NEGATIONS = frozenset({"no", "not", "without", "never", "non", "t"})


def _words(text: str) -> frozenset[str]:
    """The words of a name; none if it negates something, as that takes more than words to understand."""
    words = frozenset(re.findall(r"[a-z]+", text.lower()))
    return frozenset() if words & _NEGATIONS else words
