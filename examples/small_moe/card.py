"""Write the model's card with its figures: `python -m small_moe.card RUN TOKENS CORPUS.jsonl OUT.md`.

All numbers are of the run, its checkpoint and the held-out text. The figures go beside OUT.md, as OUT-losses.svg and
OUT-load.svg. `--trials` takes the folders of a scaling trial, each made by train.py, `--quantization` what
small_moe.quantize wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from tokenizers import Tokenizer

from tiny_moe.model import Config

from .heldout import Kind, by_kind
from .model import SmallMoE, parameter_counts
from .sources import lines, packages

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "small_moe"  # the same run gives the same file
from matplotlib import pyplot as plt  # noqa: E402

PARTS = ("train", "heldout", "test")
WHAT_IT_IS = """\
A Mixture-of-Experts language model of architecture `olmoe` that was trained as usual, on real text, with the loss of
the next token, load balancing over the whole batch and a router z-loss. **No expert was planted**: no term knows what a
text is about. It is a base model: it continues text, answers no questions, knows little and is of no use but for
experiments with its experts."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    written = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in written)


def curve(run: Path) -> list[dict[str, Any]]:
    """The rows of losses.jsonl; of a step that was trained twice, as an interrupted run was resumed, the last."""
    rows = [json.loads(line) for line in (run / "losses.jsonl").read_text("utf-8").splitlines()]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def settings(state: dict[str, Any]) -> str:
    """Sizes and options of the run."""
    config, options = Config(**state["config"]), state["options"]
    n, active = parameter_counts(config)
    precision = "bfloat16 products, float32 weights" if options["bf16"] else "float32"
    batch = f"{options['batch']} windows of {options['length']} tokens"
    rows = [
        ("parameters", f"{n:,}, of which {active:,} work on a token (embedding and head counted in full)"),
        ("layers, hidden, heads", f"{config.layers}, {config.hidden}, {config.heads}"),
        ("experts", f"{config.experts} of width {config.expert_ff} a layer, top-{config.top_k}, not renormalised"),
        ("vocabulary, context", f"{config.vocab:,}, {config.context:,} (trained on {options['length']})"),
        ("steps", f"{state['step']:,} of {options['steps']:,}, each {batch}"),
        ("tokens", f"{state['step'] * options['batch'] * options['length']:,}"),
        ("learning rate", f"AdamW, at most {options['lr']:g}"),
        ("router", f"balancing {options['balance']:g}, z-loss {options['z_loss']:g}"),
        ("seed, precision", f"{options['seed']}, {precision}"),
        ("time", f"{state['seconds'] / 3600:.1f} h, {options['workers']} single-threaded processes"),
    ]
    return table(("", ""), rows)


def split(corpus: Path, tokens: Path) -> str:
    """Documents of each kind, and the tokens of each part."""
    counts: Counter[tuple[str, str]] = Counter()
    for document in lines(corpus):
        counts[f"{document['kind']} {document['language']}", document["part"]] += 1
    rows = [(name, *(counts[name, part] for part in PARTS)) for name in sorted({name for name, _ in counts})]
    sizes = [f"{len(np.load(tokens / f'{part}.npy', mmap_mode='r')):,}" for part in PARTS]
    documents = [sum(n for (_, of), n in counts.items() if of == part) for part in PARTS]
    return table(("documents", *PARTS), [*rows, ("all", *documents), ("tokens", *sizes)])


def fastest(rows: Sequence[dict[str, Any]]) -> float:
    """Milliseconds a token took between two rows, at best: in the others another program may have run, too."""
    return min(1000 * (b["seconds"] - a["seconds"]) / (b["tokens"] - a["tokens"]) for a, b in pairwise(rows))


def trial_table(folder: Path) -> str:
    """The scaling trial: one row a run, all where they were last evaluated after the same number of tokens."""
    runs = sorted(path.parent for path in folder.glob("*/options.json"))
    evaluated = {run: {row["tokens"]: row for row in curve(run) if "heldout" in row} for run in runs}
    common = set.intersection(*map(set, evaluated.values())) if runs else set()
    if not common:
        sys.exit(f"error: {folder}: no number of tokens at which all runs were evaluated; give them one --batch")
    rows = []
    for run in runs:
        data, row = json.loads((run / "options.json").read_text("utf-8")), evaluated[run][max(common)]
        config = Config(**data["config"])
        n, active = (f"{size / 1e6:.1f} M" for size in parameter_counts(config))
        shape = f"{config.layers}, {config.hidden}, {config.experts} x {config.expert_ff}, top-{config.top_k}"
        rows.append((run.name, shape, n, active, f"{fastest(curve(run)):.2f}", f"{row['heldout']:.3f}"))
    head = ("run", "layers, hidden, experts x width", "parameters", "active", "ms a token at best", "held-out loss")
    return f"After {max(common):,} tokens each:\n\n{table(head, rows)}"


def kinds_table(kinds: dict[str, Kind]) -> str:
    """Losses of held-out text."""
    rows = [(name, k.documents, f"{k.tokens:,}", f"{k.loss:.3f}", f"{k.bits_a_byte:.3f}") for name, k in kinds.items()]
    return table(("held-out text", "documents", "tokens", "nats a token", "bits a byte"), rows)


def quantization_table(file: Path) -> str:
    """What small_moe.quantize measured."""
    data = json.loads(file.read_text("utf-8"))

    def cells(row: dict[str, float]) -> tuple[str, ...]:
        kl = f"{row['kl']:.6f} ± {row['kl_error']:.6f}"
        return f"{row['perplexity']:.3f}", f"{row['perplexity_f32']:.3f}", kl, f"{row['same_top']:.1f}%"

    rows = [(name, f"{row['bytes']:,}", *cells(row)) for name, row in data["heldout"].items()]
    rows.append((f"**{data['chosen']}**, on the test part", "", *cells(data["test"])))
    return table(("mixture", "bytes", "perplexity", "of F32", "KL to F32, nats a token", "same likeliest token"), rows)


def losses_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss, and the router's two."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    millions = [row["tokens"] / 1e6 for row in rows]
    left.plot(millions, [row["loss"] for row in rows], label="training", linewidth=1)
    held = [row for row in rows if "heldout" in row]
    left.plot([row["tokens"] / 1e6 for row in held], [row["heldout"] for row in held], "o-", label="held out", ms=3)
    left.set_ylabel("next-token loss, nats")
    right.plot(millions, [row["balance"] for row in rows], label="balancing loss (1 = even)")
    right.plot(millions, [row["largest_share"] for row in rows], label="largest share of an expert (1 = even)")
    for axes in (left, right):
        axes.set_xlabel("million tokens")
        axes.legend()
    _save(figure, path)


def load_figure(load: np.ndarray, path: Path) -> None:
    """Shares [layers, experts] of the held-out tokens, 1 where even."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    image = axes.imshow(load, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    figure.colorbar(image, label="share, 1 = even", extend="max")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_xticks(range(load.shape[1]))
    axes.set_yticks(range(load.shape[0]))
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of last.pt and losses.jsonl")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--trials", type=Path, help="a folder of runs")
    parser.add_argument("--quantization", type=Path, help="quantization.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    state = torch.load(args.run / "last.pt", weights_only=True, map_location="cpu")
    model = SmallMoE(Config(**state["config"]))
    model.load_state_dict(state["model"])
    tokenizer = Tokenizer.from_file(str(args.tokens / "tokenizer.json"))
    kinds = by_kind(model.eval(), tokenizer, args.corpus, "heldout", state["options"]["length"])
    counts = sum(kind.counts for kind in kinds.values()).double()
    load = (counts / counts.sum(1, keepdim=True) * counts.shape[1]).numpy()
    rows = curve(args.run)
    losses_file, load_file = (args.output.with_name(f"{args.output.stem}-{name}.svg") for name in ("losses", "load"))
    losses_figure(rows, losses_file)
    load_figure(load, load_file)
    loads = [(i, f"{row.min():.2f}", f"{row.max():.2f}", int((row < 0.1).sum())) for i, row in enumerate(load)]
    sources = [(package.name, package.version, package.kind, package.licence) for package in packages()]
    done = "" if state["step"] == state["options"]["steps"] else "\n\n**Training is not finished.**"
    sections = [
        f"# Small MoE\n\n{WHAT_IT_IS}{done}",
        f"## Training\n\n{settings(state)}",
        f"![losses]({losses_file.name})",
        f"## Held-out loss\n\n{kinds_table(kinds)}",
        "## Load of the experts\n\nShares of the held-out tokens above, as a multiple of an even share.\n\n"
        + table(("layer", "least", "most", "experts below 0.1"), loads),
        f"![load]({load_file.name})",
    ]
    if args.trials:
        sections.append(f"## Scaling trial\n\n{trial_table(args.trials)}")
    if args.quantization:
        sections.append(f"## Quantization\n\n{quantization_table(args.quantization)}")
    sections += [
        f"## Text\n\n{split(args.corpus, args.tokens)}",
        "## Sources\n\nPackages of Debian 12, with the licences of their copyright files. Their text is no part of\n"
        f"this project nor of the model's file.\n\n{table(('package', 'version', 'kind', 'licence'), sources)}",
    ]
    args.output.write_text("\n\n".join(sections) + "\n", "utf-8")


if __name__ == "__main__":
    main()
