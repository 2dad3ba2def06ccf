"""Measures behaviours of the small model, which nobody planted: the second column of docs/results.md.

    python benchmarks/small.py [-m MODEL] [--corpus CORPUS.jsonl] [--folder FOLDER] [--behaviour NAME ...] [--items N]

For each behaviour of examples/small_moe: detection, effects of interventions, the hard rule with all controls, the
depth of the experts, every rule at one cost of KL, and quantizations. Runs the program's own commands, --jobs
behaviours at a time, each on one thread; finished steps are kept in the folder, and an interrupted run continues. The
first run needs the corpus (examples/small_moe/README.md), of which it makes pairs, prompts and neutral texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from performance import machine
from results import OUTPUT, ROOT, SMALL, SMALL_RESULT, Job, run, steermoe
from rules import FloatArray, Measured, both_ways, compare, methods, plain, randoms
from small_tables import render

from steermoe_local import __version__
from steermoe_local.attribution.items import pair_items, split
from steermoe_local.evaluation.measuring.evaluator import EvaluatorSettings
from steermoe_local.evaluation.measuring.opening import open_evaluator
from steermoe_local.evaluation.measuring.plans import open_placement
from steermoe_local.evaluation.metrics.intervals import difference
from steermoe_local.evaluation.studies.layers import thirds
from steermoe_local.evaluation.tasks.neutral_text import Document, load_neutral_text
from steermoe_local.llama.rendering import Renderer
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.pair_counts import PairCounts
from steermoe_local.maps.significance import corrected_p, t_quantile
from steermoe_local.model_files.model_info import model_info
from steermoe_local.pairs.pairs import load_pairs
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.plan_text import parse_where

CORPUS = ROOT / "build" / "small" / "corpus.jsonl"
FOLDER = OUTPUT.parent / "small"

BUDGET = 0.1  # nats of KL per token: numbers of experts are the most whose hard rule costs no more
SIZES = (16, 12, 8, 6, 4, 3, 2, 1)  # promoted, and as many suppressed
N_CONTROLLED = 36  # prompts of the commands with controls and of those that try many choices
N_COMPARED = 66  # prompts of the comparison of rules
N_ITEMS = 24  # pairs of the attribution, half of them to confirm
N_HELD = 48  # pairs, none of which estimated an effect, on which margins are reported
N_TEXT = 200  # tokens of the text to choose on
DRAWS = 20  # of each control
N_RANDOM = 10  # random choices beside the rules
N_EFFECTS = 192  # draws of the attribution, of each action, on 64 candidates
EVALUATIONS = 256  # steerings of a fit's search
N_RULES = 10  # of rules.methods, the fitted one with them
QUANTS = "Q8_0,Q4_K_M,Q2_K"
N_PARALLEL = 64
N_GROUPS = 20  # of pairs, for the intervals of shares
SECONDS_AN_ANSWER = 0.033  # of one core (EPYC with AVX512), 24 tokens after 45, 64 at a time; to say how long it takes
SECONDS_BEFORE = 200.0  # of one core: detection, attribution and two fits of a behaviour


@dataclass(frozen=True)
class Files:
    """The files of one behaviour."""

    model: Path
    material: Path
    folder: Path
    name: str
    about: dict[str, Any]
    n_items: int | None

    @property
    def pairs(self) -> Path:
        return self.material / f"{self.name}.pairs.jsonl"

    @property
    def task(self) -> Path:
        return self.material / f"{self.name}.task.jsonl"

    def neutral(self, use: str) -> Path:
        """`use`: "choose" or "report"."""
        return self.material / f"{self.about['neutral']}.{use}.txt"

    @property
    def map(self) -> Path:
        return self.folder / self.name / "map.json"

    @property
    def effects(self) -> Path:
        return self.folder / self.name / "effects.json"

    def at_most(self, n: int) -> int:
        """`n` prompts, or those that --items allows."""
        return min(n, self.n_items or n, self.about["n_prompts"])


def resumed(path: Path) -> list[str]:
    """What goes on with an interrupted command that writes `path`."""
    return ["--resume"] if list(path.parent.glob(f"{path.name}.partial*")) else []


def maps(files: Files) -> None:
    """The map with standard errors, and the one with effects."""
    files.map.parent.mkdir(parents=True, exist_ok=True)
    pairs = ("-m", str(files.model), "--pairs", str(files.pairs), "-t", "1")
    if not files.map.exists():
        sides = ("--positive", files.about["positive"], "--negative", files.about["negative"])
        counts = ("--per-pair", str(files.map.with_name("map.pairs.npz")))
        steermoe("detect", *pairs, "-o", str(files.map), *sides, *counts, *resumed(files.map))
    if not files.effects.exists():
        options = ("--candidates", "32", "--draws", str(N_EFFECTS), "--items", str(N_ITEMS))
        text = ("--neutral", str(files.neutral("choose")), "--n-text", str(N_TEXT), "--steer", "all")
        out = ("-o", str(files.effects), *resumed(files.effects))
        steermoe("attribute", *pairs, "--map", str(files.map), *options, *text, *out)


class Opened:
    """The model, and what measures the margins of the pairs and the KL of the texts."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.expert_map = ExpertMap.load(files.effects)
        self.llama = SteeredLlama(files.model, n_ctx=64, n_threads=1)
        self.renderer = Renderer(self.llama._model)
        effects = self.expert_map.effects
        assert effects is not None
        every = pair_items(self.renderer, load_pairs(files.pairs))
        fitted, confirming = split(every, N_ITEMS, effects.facts.seed)
        known = {item.id for item in (*fitted, *confirming)}
        self.items = fitted, [*confirming, *(item for item in every if item.id not in known)][:N_HELD]
        self.texts = self._documents("choose"), self._documents("report")
        self.measured = Measured(self.llama, self.items, self.texts)

    def _documents(self, use: str) -> list[Document]:
        limit = N_TEXT if use == "choose" else 5 * N_TEXT
        return load_neutral_text(self.files.neutral(use)).documents(self.renderer, 128, limit)

    def numbers(self) -> tuple[int, float]:
        """How many experts the hard rule promotes, and suppresses: the most within BUDGET, or one; and their KL."""
        costs = []
        for n in SIZES:
            both = both_ways(self.expert_map, (n, n))
            # more than the layers have room for, or than there are
            if both is None or min(both[0].n_active, both[0].n_inactive) < n:
                continue
            costs.append((n, float(self.measured.costs(both, self.texts[0]).mean())))
            if costs[-1][1] <= BUDGET:
                break
        return costs[-1]


def fits(files: Files, budget: float) -> dict[str, Path]:
    """The biases of `steermoe fit`, towards both sides."""
    found = {}
    for side, words in (("towards", ()), ("away", ("--reverse",))):
        path = files.effects.with_name(f"{side}.gguf")
        if not path.exists():
            common = ("-m", str(files.model), "--map", str(files.effects), "--pairs", str(files.pairs), "-t", "1")
            text = ("--neutral", str(files.neutral("choose")), "--n-text", str(N_TEXT), "--budget", f"{budget:.6f}")
            search = ("--evaluations", str(EVALUATIONS))
            try:
                steermoe("fit", *common, *text, *search, "-o", str(path), *words, *resumed(path))
            except RuntimeError as error:
                if "significant" not in str(error):  # nothing to start from is a finding, not a failure
                    raise
                return {}
        found[side] = path
    return found


def compared(files: Files) -> dict[str, Any]:
    """Every rule at its best within the KL of RD's hard choice, at all tokens and at those of the answer alone."""
    done = files.effects.with_name("rules.json")
    if done.exists():
        data: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return data
    opened = Opened(files)
    n, budget = opened.numbers()
    fitted = fits(files, budget)
    rules = methods(opened.expert_map, (n, n), fitted)
    drawn = randoms(opened.expert_map, (n, n))[:N_RANDOM]
    rows, pairs = compare(opened.measured, rules, budget, drawn, lambda biases: rates(files, biases))
    both = [bias for pair in pairs for bias in pair]
    values = rates(files, both, "answer")
    margins = Measured(opened.llama, opened.items, opened.texts, "answer").margins(both, opened.items[1])
    for i, row in enumerate(rows[: len(pairs)]):
        row["answer_rate"] = plain(difference(values[2 * i], values[2 * i + 1]))
        row["answer_swing"] = float((margins[2 * i] - margins[2 * i + 1]).mean())
    facts = opened.expert_map.effects
    assert facts is not None
    data = {
        "n": n,
        "budget": budget,
        "fitted": bool(fitted),
        "n_items": [len(side) for side in opened.items],
        "n_prompts": files.at_most(N_COMPARED),
        "attribution": facts.facts.to_dict(),
        "rules": rows,
    }
    done.write_text(json.dumps(data), encoding="utf-8")
    return data


def rates(files: Files, biases: Sequence[BiasFile], where: str = "") -> list[FloatArray]:
    """Values of the first held-out prompts under each bias, in force everywhere or where a rule of plans says."""
    placement = open_placement(parse_where(where)) if where else None
    settings = EvaluatorSettings(n_parallel=N_PARALLEL, placement=placement, context={"n_threads": 1})
    n = files.at_most(N_COMPARED)
    options: dict[str, Any] = {"n_items": n, "benign": None, "neutral": None, "settings": settings, "n_threads": 1}
    with open_evaluator(files.model, files.task, **options) as evaluator:
        return [found.values for found in evaluator.measure(list(biases), text=False, benign=False)]


def jobs(files: Files, n: int) -> list[Job]:
    """The commands on the hard rule with `n` promoted and `n` suppressed experts."""
    common = (
        *("-m", str(files.model), "--map", str(files.map), "--task", str(files.task), "-np", str(N_PARALLEL)),
        *("--activate", str(n), "--deactivate", str(n), "--neutral", str(files.neutral("report"))),
    )
    few = ("-n", str(files.at_most(N_CONTROLLED)))
    all_of_them = ("-n", str(files.at_most(files.about["n_prompts"])))
    pairs = ("--pairs", str(files.pairs))
    no_benign = ("--benign", "none")
    return [
        Job(files.name, "eval", ("eval", *common, *all_of_them, *no_benign, "--no-controls")),
        Job(files.name, "controls", ("eval", *common, *few, *no_benign, *pairs, "--control-draws", str(DRAWS))),
        Job(files.name, "layers", ("experiment", "layers", *common, *few, *no_benign, *pairs)),
        Job(files.name, "transfer", ("transfer", *common, *few, *pairs, "--quants", QUANTS)),
    ]


def n_answers(files: Files) -> int:
    """At most how many answers a behaviour takes: three or two for each prompt of a steering, by the steps above."""
    few, many = files.at_most(N_CONTROLLED), files.at_most(N_COMPARED)
    controls = 2 * (2 * DRAWS + 1 + 4 + 10 + 10)
    layers = 2 * (model_info(files.model).n_layer + 7)
    return (
        3 * files.at_most(files.about["n_prompts"])
        + (3 + controls + layers + 5 * (1 + len(QUANTS.split(",")))) * few
        + 2 * (2 * N_RULES + N_RANDOM) * many
    )


def untrained_depth(files: Files, model: Path) -> dict[str, Any]:
    """`depth` of the same pairs on a model of the same shape that learnt nothing."""
    path = files.map.with_name("untrained.json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        counts = ("--per-pair", str(path.with_name("untrained.pairs.npz")), *resumed(path))
        steermoe("detect", "-m", str(model), "--pairs", str(files.pairs), "-t", "1", "-o", str(path), *counts)
    return depth(ExpertMap.load(path), PairCounts.load(path.with_name("untrained.pairs.npz")))


def depth(expert_map: ExpertMap, pairs: PairCounts) -> dict[str, Any]:
    """How many experts differ significantly between the sides (Holm), and how |RD| is divided over the depth."""
    confidence = expert_map.confidence
    assert confidence is not None
    sure = corrected_p(expert_map) < 0.05
    return {
        "n_experts": int(expert_map.rd.size),
        "n_pairs": expert_map.n_pairs,
        "n_sure": int(sure.sum()),
        "max_rd": float(np.abs(expert_map.rd).max()),
        "shuffled": asdict(confidence.max_rd),
        "overlap": confidence.split_half.overlap,
        "share": shares(np.concatenate([counts for _, counts in pairs.chunks()]), np.asarray(pairs.n)),
        "sure_by_layer": sure.sum(axis=1).tolist(),
    }


def shares(a: npt.NDArray[Any], n: npt.NDArray[Any]) -> list[dict[str, float]]:
    """Share of each third of the layers in the sum of |RD|, with 95% intervals by a jackknife over groups of pairs.

    `a` [n_pairs, 2, n_layer, n_expert] are the pairs' counts, `n` [n_pairs, 2] their tokens.
    """
    parts = [list(layers) for layers in thirds(range(a.shape[2])).values()]

    def of(kept: npt.NDArray[Any]) -> FloatArray:
        rates = a[kept].sum(axis=0, dtype=np.float64) / n[kept].sum(axis=0)[:, None, None]
        size = np.abs(rates[0] - rates[1])
        return np.array([size[layers].sum() for layers in parts]) / max(size.sum(), 1e-12)

    every = np.arange(len(a))
    groups = min(N_GROUPS, len(a))
    values = of(every)
    without = np.array([of(every[every % groups != group]) for group in range(groups)])
    half = t_quantile(0.95, groups - 1) * np.sqrt((groups - 1) * without.var(axis=0))
    return [
        {"value": float(value), "low": max(0.0, float(value - width)), "high": min(1.0, float(value + width))}
        for value, width in zip(values, half, strict=True)
    ]


def measure(files: Files, untrained: Path | None, step: Callable[[str], None]) -> dict[str, Any]:
    """All steps of a behaviour; `step` is called with the name of each that is done."""
    maps(files)
    step("map and effects")
    rules = compared(files)
    step("rules at one cost")
    commands = jobs(files, rules["n"])
    for job in commands:
        run(job, files.folder, lambda line: None)
        step(job.kind)
    depth_of_map = depth(ExpertMap.load(files.map), PairCounts.load(files.map.with_name("map.pairs.npz")))
    found: dict[str, Any] = {"about": files.about, "rules": rules, "depth": depth_of_map}
    found["untrained"] = None if untrained is None else untrained_depth(files, untrained)
    for job in commands:
        found[job.kind] = json.loads((files.folder / job.name / "summary.json").read_text("utf-8"))
    return found


def material(corpus: Path, folder: Path) -> dict[str, Any]:
    """What is measured on; made of the corpus where it is not there yet. Raises RuntimeError."""
    scorers = folder / "scorers.json"
    if not scorers.exists():
        if not corpus.exists():
            raise RuntimeError(f"{corpus}: no such file; make it as examples/small_moe/README.md says, or name it")
        words = [sys.executable, "-m", "small_moe.material", str(corpus), str(folder)]
        subprocess.run(words, cwd=ROOT / "examples", check=True)
    found: dict[str, Any] = json.loads(scorers.read_text("utf-8"))
    return found


def same_run(folder: Path, wanted: dict[str, Any]) -> None:
    """Keep what the results of a folder depend on, or compare it with what is kept. Raises RuntimeError."""
    path = folder / "run.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted), encoding="utf-8")
    elif json.loads(path.read_text("utf-8")) != wanted:
        raise RuntimeError(f"{folder}: has results of another model or of other --items; give another --folder")


def all_of(
    model: Path,
    corpus: Path,
    folder: Path,
    names: Sequence[str] = (),
    n_items: int | None = None,
    n_jobs: int = 2,
    untrained: Path | None = None,
) -> dict[str, Any]:
    """The whole report; `names` empty: all behaviours. Raises RuntimeError, OSError."""
    for path in filter(None, (model, untrained)):
        if not path.exists():
            raise RuntimeError(
                f"{path}: no such file; train and export the model (examples/small_moe/README.md), or -m"
            )
    facts = model_info(model)
    identity = facts.require_moe()
    same_run(folder, {"router": identity.router_sha256, "type": facts.file_type, "items": n_items})
    known = material(corpus.resolve(), folder / "material")
    todo = [
        Files(model, folder / "material", folder, name, about, n_items)
        for name, about in known["behaviours"].items()
        if not names or name in names
    ]
    total = sum(map(n_answers, todo))
    seconds = (total * SECONDS_AN_ANSWER + len(todo) * SECONDS_BEFORE) / n_jobs
    begin = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    log(f"{len(todo)} behaviours, at most {total} answers: about {seconds / 60:.0f} minutes on {n_jobs} quiet cores")
    n_steps = 6 * len(todo)
    done = 0

    def stepped(name: str, step: str) -> None:
        nonlocal done
        done += 1
        log(f"{name}: {step} ({done} of {n_steps} steps)")

    with ThreadPoolExecutor(n_jobs) as pool:
        futures = {}
        for files in todo:
            step = partial(stepped, files.name)
            futures[files.name] = pool.submit(measure, files, untrained, step)
        try:
            found = {name: future.result() for name, future in futures.items()}
        except BaseException:  # what waits is not to begin after an interrupt or an error
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {
        "about": {
            "tool": f"steermoe-local {__version__}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "model": model.name,
            "file_type": facts.file_type,
            "router_sha256": identity.router_sha256,
            "items": n_items,
            "n_answers": total,
            "max_tokens": known["max_tokens"],
            "budget": BUDGET,
            "n_draws": DRAWS,
        },
        "scorers": known,
        "behaviours": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SMALL)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--untrained", type=Path, help="a model of the same shape that learnt nothing, as a control")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--behaviour", action="append", default=[])
    parser.add_argument("--items", type=int, help="first N prompts of each task: tries the script")
    parser.add_argument("--jobs", type=int, default=2, help="behaviours at a time")
    args = parser.parse_args()
    folder: Path = args.folder.resolve()
    report = all_of(args.model.resolve(), args.corpus, folder, args.behaviour, args.items, args.jobs, args.untrained)
    (folder / SMALL_RESULT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(render(report))


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
