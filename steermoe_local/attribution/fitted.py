"""What a fit is asked for, and what comes out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import UsageError
from ..steering.bias_file import BiasFile
from .options import DecoderOptions

CMA = "cma"
LEAST_POPULATION, MOST_POPULATION = 4, 1024
MOST_EXPERTS = 1024  # the search keeps a matrix of as many rows and columns, and decomposes it
_SURE = 2.0  # standard errors that a change on the confirming items must exceed to be called confirmed


@dataclass(frozen=True)
class FitOptions(DecoderOptions):
    """How `fit` chooses a soft bias, beside the options of the context.

    Attributes:
        budget: most KL(unsteered || steered) per token of the neutral text, in nats.
        n_experts: experts that get a value, at most.
        method: "cma" refines the start by CMA-ES; "none" only scales it.
        evaluations: steerings that the search measures, in whole generations.
        population: steerings of one generation, which share their batches.
        bound: largest |value|, in logits.
        reverse: towards the negative side.
        n_text: tokens of the neutral text that the search uses; as many others confirm.
        seed: of the search.

    Raises UsageError for values outside their ranges.
    """

    budget: float
    n_experts: int = 16
    method: Literal["cma", "none"] = "cma"
    evaluations: int = 640
    population: int = 32
    bound: float = 8.0
    reverse: bool = False
    n_text: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("budget", "bound"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                raise UsageError(f"{name}: {value!r} is not a number above 0 and below a million")
        self._require_whole("n_experts", "evaluations", "n_text", "n_batch")
        if self.n_experts > MOST_EXPERTS:
            raise UsageError(f"n_experts: {self.n_experts} are more than the search can do, {MOST_EXPERTS}")
        if type(self.population) is not int or not LEAST_POPULATION <= self.population <= MOST_POPULATION:
            raise UsageError(
                f"population: {self.population!r} is not a whole number from {LEAST_POPULATION} to {MOST_POPULATION}"
            )
        if self.method not in (CMA, "none"):
            raise UsageError(f"method: {self.method!r} is neither cma nor none")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:
            raise UsageError(f"seed: {self.seed!r} is not a whole number from 0 to 4294967295")

    def settings(self) -> dict[str, Any]:
        """What the parts of a run depend on, as plain JSON values.

        Budget and evaluations are not in it: a part is known by the values that it measures, whatever asked for them.
        """
        without = {"budget", "evaluations", "n_threads"}
        return {name: value for name, value in asdict(self).items() if name not in without}


@dataclass(frozen=True)
class Shift:
    """What a steering does to some items, and to a text: means with their standard errors, in nats per token.

    `margin` is the mean margin, `change` its difference to the unsteered one. The error of `change` is over the items,
    that of `kl` over the text's documents; None where there is only one.
    """

    margin: float
    change: float
    change_se: float | None
    kl: float
    kl_se: float | None


@dataclass(frozen=True)
class Comparison:
    """The unsteered model, the start and the fitted bias on the same items and text.

    `difference` is the change by the fitted bias less that by the start, with its error over the items.
    """

    n_items: int
    n_text: int
    unsteered: float
    start: Shift
    fitted: Shift
    difference: float
    difference_se: float | None


@dataclass(frozen=True)
class Choice:
    """How it was chosen between the start and what the search found.

    `taken` is "start" or "search". `gain` is the gain of the search over the start on `n_items` items that the search
    has not seen, with its standard error, and `kl` its cost on `n_text` tokens that the search has not seen. None of
    them where there were too few items, or documents: the search was taken then, or the cost was not looked at.
    """

    taken: Literal["start", "search"]
    n_items: int
    n_text: int
    gain: float | None
    gain_se: float | None
    kl: float | None


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted soft bias, and what was measured of it.

    `start` is the bias of the closed form at its best scale. `fitted_on` are the items and the text that the search
    has used, so that its figures are too good; `confirmed_on` are others, None where there is no item to confirm on.
    `choice` says whether `bias` is the start or what the search found, None without a search.
    """

    bias: BiasFile
    start: BiasFile
    experts: tuple[tuple[int, int], ...]
    options: FitOptions
    choice: Choice | None
    fitted_on: Comparison
    confirmed_on: Comparison | None
    n_evaluations: int
    n_generations: int
    ended: str

    @property
    def is_confirmed(self) -> bool:
        """Whether the margin moves to the wanted side on other items, by more than two standard errors."""
        if self.confirmed_on is None or (error := self.confirmed_on.fitted.change_se) is None:
            return False
        change = self.confirmed_on.fitted.change
        return (-change if self.options.reverse else change) > _SURE * error

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        start, fitted = self.start.dense(), self.bias.dense()
        return {
            "method": self.options.method,
            "reverse": self.options.reverse,
            "budget": self.options.budget,
            "seed": self.options.seed,
            "n_evaluations": self.n_evaluations,
            "n_generations": self.n_generations,
            "ended": self.ended,
            "choice": None if self.choice is None else asdict(self.choice),
            "experts": [
                {
                    "layer": layer,
                    "expert": expert,
                    "start": float(start[layer, expert]),
                    "fitted": float(fitted[layer, expert]),
                }
                for layer, expert in self.experts
            ],
            "fitted_on": asdict(self.fitted_on),
            "confirmed_on": None if self.confirmed_on is None else asdict(self.confirmed_on),
            "is_confirmed": self.is_confirmed,
        }
