"""Measures whether effects of interventions choose better than RD: the section "Cause" of docs/results.md.

    python benchmarks/causes.py [--write-docs] [-m MODEL] [--folder FOLDER] [--behaviour NAME ...] [--items N]

For each behaviour of `tiny`: the map of detect, the effects of attribute over all experts, the truth by suppressing
each expert alone on other items, and every rule at its best strength within one cost. Strengths are chosen on the items
that estimated the effects and on one half of the neutral text; what is reported was measured on the other items, the
other half, and the held-out prompts. Finished steps are kept in the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from performance import machine, table, write_docs
from results import IMAGES, OUTPUT, ROOT, steermoe

from steermoe_local import __version__
from steermoe_local.attribution.decoding import InterventionDecoder
from steermoe_local.attribution.items import Item, pair_items, split
from steermoe_local.evaluation.measuring.evaluator import EvaluatorSettings
from steermoe_local.evaluation.measuring.opening import open_evaluator, open_guards
from steermoe_local.evaluation.metrics.intervals import Interval, bootstrap, difference
from steermoe_local.evaluation.tasks.neutral_text import Document
from steermoe_local.llama.rendering import Renderer
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.maps.effects import SUPPRESS
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.significance import pearson, spearman
from steermoe_local.models.embedded import Behaviour, behaviours
from steermoe_local.models.local_models import resolve_model
from steermoe_local.pairs.pairs import load_pairs
from steermoe_local.steering.bias_file import BiasFile, read_bias
from steermoe_local.steering.steering import Steering

FloatArray = npt.NDArray[np.float64]

DOCS = ROOT / "docs" / "results.md"
START, END = "<!-- causes:start -->", "<!-- causes:end -->"
CAUSAL = 0.05  # nats per token: an expert whose suppression alone moves the margin by less is called idle
DRAWS = 768  # of each action, on 120 candidates
N_RANDOM = 20
PICTURE = "rd-effect.png"
SHOWN = "document-memory"  # whose picture is in the docs

SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
CAPS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class Method:
    """A rule, and the choices among which its strength is chosen; each is a pair of biases (towards, away)."""

    name: str
    choices: tuple[tuple[str, BiasFile, BiasFile], ...]


def made(behaviour: Behaviour, model: str, folder: Path, n_items: int | None) -> ExpertMap:
    """The map with effects: `detect`, then `attribute` with every expert as a candidate."""
    detected, attributed = folder / f"{behaviour.name}.json", folder / f"{behaviour.name}.effects.json"
    if not detected.exists():
        sides = ("--positive", behaviour.positive, "--negative", behaviour.negative)
        steermoe("detect", "-m", model, "--pairs", str(behaviour.pairs), "-o", str(detected), *sides, "-t", "1")
    if not attributed.exists():
        half = ExpertMap.load(detected).rd.size // 2
        some = () if n_items is None else ("--items", str(n_items))
        words = ("--candidates", str(half), "--draws", str(DRAWS), "-t", "1", "-o", str(attributed), *some)
        again = ["--resume"] if Path(f"{attributed}.partial").exists() else []
        pairs = ("--pairs", str(behaviour.pairs))
        steermoe("attribute", "-m", model, "--map", str(detected), *pairs, *words, *again)
    return ExpertMap.load(attributed)


class Measured:
    """Margins and costs of steerings of one model."""

    def __init__(self, llama: SteeredLlama, behaviour: Behaviour, expert_map: ExpertMap, n_items: int | None) -> None:
        renderer = Renderer(llama._model)
        facts = expert_map.effects
        assert facts is not None
        items = pair_items(renderer, load_pairs(behaviour.pairs))
        self.fitted, self.held = split(items, n_items, facts.facts.seed)
        neutral = open_guards(resolve_model("tiny"), None, "default")[1]
        assert neutral is not None
        documents = neutral.documents(renderer, neutral.longest(renderer))
        self.texts = documents[::2], documents[1::2]  # to choose, to report
        self.decoder = InterventionDecoder(llama._model, items, documents, n_steerings=64, steer="all", n_threads=1)

    def margins(self, biases: Sequence[BiasFile | None], items: Sequence[Item]) -> FloatArray:
        """[n_biases, n_items]"""
        return self._blocks(biases, lambda: np.array([self.decoder.margins(item) for item in items]).T)

    def costs(self, biases: Sequence[BiasFile | None], documents: Sequence[Document]) -> FloatArray:
        """KL in nats per token, [n_biases]."""
        n = sum(document.n for document in documents)
        return self._blocks(biases, lambda: sum(self.decoder.divergences(document) for document in documents) / n)

    def _blocks(self, biases: Sequence[BiasFile | None], measure: Callable[[], Any]) -> FloatArray:
        found = []
        size = self.decoder.n_steerings
        for start in range(0, len(biases), size):
            self.decoder.steer_by(biases[start : start + size])
            found.append(measure())
        return np.concatenate(found)


def alone(expert_map: ExpertMap) -> tuple[list[tuple[int, int]], list[BiasFile | None]]:
    """Every expert, and the bias that suppresses it alone."""
    experts = [(layer, expert) for layer in range(expert_map.rd.shape[0]) for expert in range(expert_map.rd.shape[1])]
    biases: list[BiasFile | None] = []
    for place in experts:
        signs = np.zeros(expert_map.rd.shape, dtype=np.int8)
        signs[place] = -1
        biases.append(BiasFile.from_signs(signs, expert_map.identity))
    return experts, biases


def truth(measured: Measured, expert_map: ExpertMap) -> dict[str, Any]:
    """Which experts are causal, and how well RD and effects say so."""
    experts, biases = alone(expert_map)
    margins = measured.margins([None, *biases], measured.held)
    change = margins[1:] - margins[:1]
    real, error = change.mean(axis=1), change.std(axis=1, ddof=1) / np.sqrt(change.shape[1])
    effects = expert_map.effects
    assert effects is not None
    estimated = effects.table(SUPPRESS, "effect", expert_map.identity.shape)
    sure = effects.table(SUPPRESS, "significant", expert_map.identity.shape) == 1
    rd = expert_map.rd
    flat = [layer * rd.shape[1] + expert for layer, expert in experts]
    causal = (np.abs(real) >= CAUSAL) & (np.abs(real) >= 2 * error)
    n = int(causal.sum())
    size = np.round(np.abs(rd.ravel()[flat]), 9)
    least = np.sort(size)[::-1][n - 1] if n else np.inf
    tied = size == least
    # of those that share the last place each is taken with the same probability: the order of ties means nothing
    by_rd = (size > least) + tied * (n - int((size > least).sum())) / max(1, int(tied.sum()))
    said = sure.ravel()[flat] & (np.abs(estimated.ravel()[flat]) >= CAUSAL)
    strong = np.abs(rd.ravel()[flat]) >= 0.9
    return {
        "n": n,
        "n_experts": len(experts),
        "effect": _found(said.astype(float), causal),
        "rd": _found(by_rd, causal),
        "idle": int((strong & ~causal).sum()),
        "strong": int(strong.sum()),
        "pearson_effect": pearson(estimated.ravel()[flat], real),
        "pearson_rd": pearson(rd.ravel()[flat], -real),
        "spearman_effect": spearman(np.abs(estimated.ravel()[flat]), np.abs(real)),
        "spearman_rd": spearman(np.abs(rd.ravel()[flat]), np.abs(real)),
        "real": dict(zip(map(str, experts), real.tolist(), strict=True)),
        "causal": [experts[i] for i in np.flatnonzero(causal)],
    }


def _found(said: FloatArray, causal: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Precision and recall; `said` is the probability with which each expert is named."""
    both = float(said[causal].sum())
    return {"n": float(said.sum()), "precision": both / max(1.0, said.sum()), "recall": both / max(1, causal.sum())}


def methods(expert_map: ExpertMap, behaviour: Behaviour, fitted: Mapping[str, Path]) -> list[Method]:
    """The rules that are compared; numbers of experts are those that training planted, or half as many."""
    n = (len(behaviour.planted_positive), len(behaviour.planted_negative))
    half = ((n[0] + 1) // 2, (n[1] + 1) // 2)

    def both(numbers: tuple[int, int], label: str, **fields: Any) -> tuple[str, BiasFile, BiasFile]:
        # the same number of experts both ways: towards the one side and towards the other
        towards = Steering("towards", expert_map=expert_map, activate=numbers[0], deactivate=numbers[1], **fields)
        away = towards.changed(activate=numbers[1], deactivate=numbers[0], reverse=True)
        one, two = towards.bias_file(), away.bias_file()
        assert one is not None
        assert two is not None
        return label, one, two

    def scaled(numbers: tuple[int, int], **fields: Any) -> tuple[tuple[str, BiasFile, BiasFile], ...]:
        return tuple(both(numbers, f"strength {scale:g}", scale=scale, **fields) for scale in SCALES)

    found = [
        Method("RD, hard", (both(n, "all"),)),
        Method("RD, hard, half as many", (both(half, "half"),)),
        Method("RD, soft", scaled(n)),
        Method("log-odds, soft, weighted", scaled(n, rank="log-odds", weights="log-odds")),
        Method("RD, capped", tuple(both(n, f"cap {cap:g}", cap=cap) for cap in CAPS)),
        Method("effect, hard", (both(n, "all", rank="effect"),)),
        Method("effect, hard, half as many", (both(half, "half", rank="effect"),)),
        Method("effect, soft, weighted", scaled(n, rank="effect", weights="effect")),
        Method("effect, capped", tuple(both(n, f"cap {cap:g}", rank="effect", cap=cap) for cap in CAPS)),
    ]
    if fitted:
        found.append(Method("fitted", (("fit", read_bias(fitted["towards"]), read_bias(fitted["away"])),)))
    return found


def randoms(expert_map: ExpertMap, numbers: tuple[int, int], seed: int = 0) -> list[tuple[BiasFile, BiasFile]]:
    """Hard choices of as many random experts, as the control; "away" swaps promoted and suppressed."""
    rng = np.random.default_rng(seed)
    layers = np.flatnonzero(np.abs(expert_map.rd).sum(axis=1) > 0)
    found = []
    for _ in range(N_RANDOM):
        scores = np.zeros(expert_map.rd.shape)
        scores[layers] = rng.uniform(-1, 1, (len(layers), expert_map.rd.shape[1]))
        drawn = ExpertMap(expert_map.identity, "random", scores)
        found.append(
            (
                BiasFile.from_signs(drawn.choose(*numbers), expert_map.identity),
                BiasFile.from_signs(drawn.choose(*numbers[::-1], reverse=True), expert_map.identity),
            )
        )
    return found


def compare(
    measured: Measured,
    expert_map: ExpertMap,
    behaviour: Behaviour,
    fitted: Mapping[str, Path],
    causal: frozenset[tuple[int, int]],
) -> list[Any]:
    """Every method at its best strength within the cost of RD's hard choice."""
    compared = methods(expert_map, behaviour, fitted)
    biases = [bias for method in compared for _, *pair in method.choices for bias in pair]
    margins = measured.margins([None, *biases], measured.fitted)[1:].mean(axis=1).reshape(-1, 2)
    costs = measured.costs(biases, measured.texts[0]).reshape(-1, 2).mean(axis=1)
    swings = margins[:, 0] - margins[:, 1]
    budget = float(costs[0]) * 1.05  # RD's hard choice itself, whatever rounding does
    chosen: list[tuple[str, str, BiasFile, BiasFile]] = []
    at = 0
    for method in compared:
        here = range(at, at + len(method.choices))
        at = here.stop
        within = [i for i in here if costs[i] <= budget]
        best = max(within, key=lambda i: float(swings[i])) if within else min(here, key=lambda i: float(costs[i]))
        label, towards, away = method.choices[best - here.start]
        chosen.append((method.name, label + ("" if within else " (above the cost)"), towards, away))
    numbers = (len(behaviour.planted_positive), len(behaviour.planted_negative))
    drawn = randoms(expert_map, numbers)
    pairs = [(towards, away) for _, _, towards, away in chosen] + drawn
    both = [bias for pair in pairs for bias in pair]
    held = measured.margins(both, measured.held).reshape(len(pairs), 2, -1)
    held_swing = held[:, 0] - held[:, 1]
    held_cost = measured.costs(both, measured.texts[1]).reshape(-1, 2).mean(axis=1)
    rates = rates_of(both, behaviour)
    rows: list[Any] = []
    idle = (behaviour.planted_positive | behaviour.planted_negative) - causal
    for i, (name, label, towards, away) in enumerate(chosen):
        against = None if i == 0 else bootstrap(held_swing[i] - held_swing[0])
        promoted = {(layer, e) for bias in (towards, away) for layer in bias.layers for e in bias.experts(layer)[0]}
        rows.append(
            {
                "name": name,
                "strength": label,
                "n": [towards.n_active, towards.n_inactive],
                "swing": plain(bootstrap(held_swing[i])),
                "more_than_rd": None if against is None else plain(against),
                "cost": float(held_cost[i]),
                "rate": plain(difference(rates[2 * i], rates[2 * i + 1])),
                "promoted_idle": len(promoted & idle),
            }
        )
    control = held_swing[len(chosen) :].mean(axis=1)
    control_rates = [
        float(rates[2 * j].mean() - rates[2 * j + 1].mean()) for j in range(len(chosen), len(chosen) + N_RANDOM)
    ]
    rows.append(
        {
            "name": f"{N_RANDOM} random choices, hard",
            "strength": "all",
            "n": list(numbers),
            "swing": {"value": float(control.mean()), "low": float(control.min()), "high": float(control.max())},
            "more_than_rd": None,
            "cost": float(held_cost[len(chosen) :].mean()),
            "rate": {
                "value": float(np.mean(control_rates)),
                "low": min(control_rates),
                "high": max(control_rates),
            },
            "promoted_idle": None,
        }
    )
    return rows


def rates_of(biases: Sequence[BiasFile], behaviour: Behaviour) -> list[FloatArray]:
    """Values of the held-out prompts under each bias."""
    settings = EvaluatorSettings(context={"n_threads": 1})
    with open_evaluator(
        "tiny", f"builtin:{behaviour.name}", benign=None, neutral=None, settings=settings, n_threads=1
    ) as evaluator:
        return [measurement.values for measurement in evaluator.measure(list(biases), text=False, benign=False)]


def plain(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def fits(behaviour: Behaviour, model: str, folder: Path, budget: float) -> dict[str, Path]:
    """The biases of `steermoe fit`, towards both sides, within a budget of KL."""
    found = {}
    for side, words in (("towards", ()), ("away", ("--reverse",))):
        path = folder / f"{behaviour.name}.{side}.gguf"
        if not path.exists():
            again = ["--resume"] if Path(f"{path}.partial").exists() else []
            effects = str(folder / f"{behaviour.name}.effects.json")
            common = ("-m", model, "--map", effects, "--pairs", str(behaviour.pairs), "-o", str(path), "-t", "1")
            steermoe("fit", *common, "--budget", f"{budget:.6f}", *words, *again)
        found[side] = path
    return found


def measure(behaviour: Behaviour, model: str, folder: Path, n_items: int | None) -> dict[str, Any]:
    done = folder / f"{behaviour.name}.causes.json"
    if done.exists():
        data: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return data
    expert_map = made(behaviour, model, folder, n_items)
    llama = SteeredLlama(resolve_model(model), n_ctx=64, n_threads=1)
    measured = Measured(llama, behaviour, expert_map, n_items)
    effects = expert_map.effects
    assert effects is not None
    by_rd = methods(expert_map, behaviour, {})[0].choices[0][1:]
    fitted = fits(behaviour, model, folder, float(measured.costs(by_rd, measured.texts[0]).mean()))
    real = truth(measured, expert_map)
    causal = frozenset((layer, expert) for layer, expert in real["causal"])
    data = {
        "attribution": effects.facts.to_dict(),
        "truth": real,
        "rules": compare(measured, expert_map, behaviour, fitted, causal),
        "sides": [behaviour.positive, behaviour.negative],
    }
    done.write_text(json.dumps(data), encoding="utf-8")
    return data


def render(report: Mapping[str, Any]) -> str:
    """The tables."""
    about = report["about"]
    parts = [
        f"{about['tool']}, {about['date']}, {about['machine']['cpu']}, one thread. All 120 experts are candidates; "
        f"an expert is causal if suppressing it alone moves the margin by {CAUSAL} nats per token or more, and by two "
        "standard errors, on items that estimated nothing."
    ]
    rows = []
    for name, found in report["behaviours"].items():
        facts, real = found["attribution"], found["truth"]
        rows.append(
            [
                name,
                f"{facts['n_draws']['suppress']} / {facts['n_draws']['promote']}",
                f"{facts['r2']['suppress']:.2f} / {facts['r2']['promote']:.2f}",
                str(real["n"]),
                f"{real['effect']['precision']:.2f} / {real['effect']['recall']:.2f}",
                f"{real['rd']['precision']:.2f} / {real['rd']['recall']:.2f}",
                f"{real['pearson_effect']:.2f} / {real['pearson_rd']:.2f}",
                f"{real['idle']} of {real['strong']}",
            ]
        )
    header = [
        "behaviour",
        "draws, suppress / promote",
        "held-out R2",
        "causal experts",
        "effects: precision / recall",
        "as many by RD, ties at random: precision / recall",
        "correlation with the truth, effects / RD",
        "idle of those with RD of at least 0.9",
    ]
    parts.append(table(header, rows))
    for name, found in report["behaviours"].items():
        rows = [
            [
                row["name"],
                row["strength"],
                f"{row['n'][0]} / {row['n'][1]}",
                span(row["swing"]),
                "" if row["more_than_rd"] is None else span(row["more_than_rd"], "+"),
                f"{row['cost']:.4f}",
                span({key: 100 * value for key, value in row["rate"].items()}, digits=0),
                "" if row["promoted_idle"] is None else str(row["promoted_idle"]),
            ]
            for row in found["rules"]
        ]
        header = [
            "rule",
            "strength",
            "promoted / suppressed",
            "swing of the margin",
            "more than RD, hard",
            "KL",
            "swing of the rate, points",
            "idle planted experts promoted, either way",
        ]
        parts.append(f"**{name}** ({' / '.join(found['sides'])})\n\n" + table(header, rows))
    return "\n\n".join(parts) + "\n"


def span(found: Mapping[str, float], sign: str = "", digits: int = 2) -> str:
    return f"{found['value']:{sign}.{digits}f} ({found['low']:{sign}.{digits}f} to {found['high']:{sign}.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="tiny")
    parser.add_argument("--folder", type=Path, default=OUTPUT.parent / "causes")
    parser.add_argument("--behaviour", action="append", choices=[b.name for b in behaviours()])
    parser.add_argument("--items", type=int)
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "about": {
            "tool": f"steermoe-local {__version__}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
        },
        "behaviours": {},
    }
    for behaviour in behaviours():
        if not arguments.behaviour or behaviour.name in arguments.behaviour:
            print(behaviour.name, file=sys.stderr)
            found = measure(behaviour, arguments.model, arguments.folder, arguments.items)
            report["behaviours"][behaviour.name] = found
    text = render(report)
    print(text)
    if arguments.write_docs:
        write_docs(DOCS, text, START, END)
        picture = str(IMAGES / PICTURE)
        steermoe("map", "plot", "--effects", str(arguments.folder / f"{SHOWN}.effects.json"), "-o", picture)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None
