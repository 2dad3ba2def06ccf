"""Measure the exported model: detection, steering both ways, neutral tasks, random experts.

Works on the GGUF (its weights as rounded there) and the JSONL files next to it, in PyTorch.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from export_gguf import read_gguf
from model import TinyMoE
from questions import BEHAVIOURS
from steermoe_local.models.embedded import score_reply
from tokens import END, PAD, render


def read_jsonl(path: Path) -> list[dict]:
    """One JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pad(rows: list[list[int]]) -> Tensor:
    """Token ids [B, T], padded at the end (causal attention never looks there)."""
    length = max(map(len, rows))
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


@torch.no_grad()
def forward(model: TinyMoE, rows: list[list[int]], signs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run `rows` under one map of signs [layers, E]."""
    return model(pad(rows), None if signs is None else signs.expand(len(rows), -1, -1))


def generate(
    model: TinyMoE,
    tokenizer: Tokenizer,
    prompts: list[list[dict]],
    signs: Tensor | None,
    most: int = 40,
) -> list[str]:
    """Greedy replies; signs apply to every token, including the prompt's."""
    rows = [tokenizer.encode(render(p, True)).ids for p in prompts]
    replies: list[list[int]] = [[] for _ in rows]
    live = list(range(len(rows)))
    for _ in range(most):
        logits, _ = forward(model, [rows[i] for i in live], signs)
        after = []
        for j, i in enumerate(live):
            token = int(logits[j, len(rows[i]) - 1].argmax())
            if token != END:
                rows[i].append(token)
                replies[i].append(token)
                after.append(i)
        live = after
        if not live:
            break
    return [tokenizer.decode(r) for r in replies]


def exact_share(
    model: TinyMoE, tokenizer: Tokenizer, items: list[dict], side: str, signs: Tensor | None
) -> float:
    """Share of items whose greedy reply is exactly `item[side]`, by one teacher-forced pass."""
    rows, starts = [], []
    for item in items:
        rows.append(tokenizer.encode(render(item["messages"], True)).ids)
        starts.append(len(rows[-1]))
        rows[-1] = rows[-1] + tokenizer.encode(item[side]).ids + [END]
    best = forward(model, rows, signs)[0].argmax(-1)
    hits = [
        best[i, a - 1 : len(row) - 1].tolist() == row[a:]
        for i, (row, a) in enumerate(zip(rows, starts, strict=True))
    ]
    return sum(hits) / len(hits)


def risk_difference(model: TinyMoE, tokenizer: Tokenizer, pairs: list[dict]) -> Tensor:
    """RD [layers, E] over the replies' tokens at their own positions, unsteered."""
    rates = []
    for side in ("positive", "negative"):
        rows, spans = [], []
        for pair in pairs:
            before = tokenizer.encode(render(pair[side][:-1], True)).ids
            target = tokenizer.encode(pair[f"{side}_target"]).ids
            rows.append(before + target)
            spans.append((len(before), len(rows[-1])))
        z = forward(model, rows, None)[1]
        chosen = torch.zeros_like(z).scatter(-1, z.topk(model.config.top_k, -1).indices, 1.0)
        picked = torch.cat([chosen[:, i, a:b] for i, (a, b) in enumerate(spans)], dim=1)
        rates.append(picked.mean(1))
    return rates[0] - rates[1]


def choose(rd: Tensor, n_activate: int, n_deactivate: int, top_k: int) -> Tensor:
    """Signs [layers, E]: experts by |RD|, the first with RD > 0 get +1, with RD < 0 get -1."""
    signs = torch.zeros_like(rd)
    order = rd.abs().flatten().argsort(descending=True, stable=True).tolist()
    for wanted, sign in ((n_activate, 1.0), (n_deactivate, -1.0)):
        chosen = [i for i in order if rd.flatten()[i] * sign > 0][:wanted]
        for layer, expert in (divmod(i, rd.shape[1]) for i in chosen):
            if sign < 0 or int((signs[layer] > 0).sum()) < top_k:
                signs[layer, expert] = sign
    return signs


def random_choice(rng: random.Random, like: Tensor, top_k: int) -> Tensor:
    """As many random +1 and -1 as `like` has."""
    signs = torch.zeros_like(like)
    layers, experts = like.shape
    for sign in (1.0, -1.0):
        for _ in range(int((like == sign).sum())):
            while True:
                layer, expert = rng.randrange(layers), rng.randrange(experts)
                full = sign > 0 and int((signs[layer] > 0).sum()) >= top_k
                if signs[layer, expert] == 0 and not full:
                    break
            signs[layer, expert] = sign
    return signs


def measure(behaviour: str, items: list[dict], replies: list[str]) -> dict[str, float]:
    """Shares of the sides among the replies."""
    scored = [
        score_reply(behaviour, r, i["positive"], i["negative"])
        for r, i in zip(replies, items, strict=True)
    ]
    n = len(scored)
    return {
        "positive": sum(s == "positive" for s, _ in scored) / n,
        "negative": sum(s == "negative" for s, _ in scored) / n,
        "ill_formed": sum(s == "ill-formed" for s, _ in scored) / n,
        "exact": sum(e for _, e in scored) / n,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds tiny-moe.gguf, tiny-moe.json, *.jsonl")
    parser.add_argument("--draws", type=int, default=20, help="random choices of experts")
    parser.add_argument("--counts", help="N_ACTIVATE/N_DEACTIVATE instead of the recommended ones")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = read_gguf(args.folder / "tiny-moe.gguf")
    sheet = json.loads((args.folder / "tiny-moe.json").read_text(encoding="utf-8"))
    neutral = read_jsonl(args.folder / "neutral.heldout.jsonl")

    def neutral_accuracy(signs: Tensor | None) -> float:
        return exact_share(model, tokenizer, neutral, "answer", signs)

    result: dict = {"neutral": neutral_accuracy(None), "behaviours": {}}
    for name in BEHAVIOURS:
        items = read_jsonl(args.folder / f"{name}.heldout.jsonl")
        rd = risk_difference(model, tokenizer, read_jsonl(args.folder / f"{name}.pairs.jsonl"))
        counts = sheet["recommended"][name]
        up, down = (
            [int(n) for n in args.counts.split("/")]
            if args.counts
            else (counts["n_activate"], counts["n_deactivate"])
        )
        planted = sheet["planted_experts"][name]
        truth = {
            (*place, s)
            for s, key in ((1, "positive"), (-1, "negative"))
            for place in map(tuple, planted[key])
        }
        order = rd.abs().flatten().argsort(descending=True, stable=True).tolist()
        top = {
            (*divmod(i, rd.shape[1]), 1 if rd.flatten()[i] > 0 else -1) for i in order[: len(truth)]
        }
        row: dict = {
            "counts": [up, down],
            "recall": len(top & truth) / len(truth),
            "max_abs_rd": float(rd.abs().max()),
            "min_planted_abs_rd": min(float(rd[x, e].abs()) for x, e, _ in truth),
            "max_other_abs_rd": max(
                float(rd[divmod(i, rd.shape[1])].abs())
                for i in order
                if not {(*divmod(i, rd.shape[1]), s) for s in (1, -1)} & truth
            ),
        }
        swing = {}
        for way, signs in (
            ("base", None),
            ("toward", choose(rd, up, down, model.config.top_k)),
            ("away", choose(-rd, up, down, model.config.top_k)),
        ):
            replies = generate(model, tokenizer, [i["messages"] for i in items], signs)
            row[way] = measure(name, items, replies)
            if signs is not None:
                row[way]["neutral"] = neutral_accuracy(signs)
                swing[way] = signs
        row["swing"] = row["toward"]["positive"] - row["away"]["positive"]
        rng = random.Random(f"draws {name}")
        moves = []
        for _ in range(args.draws):
            signs = random_choice(rng, swing["toward"], model.config.top_k)
            moves.append(
                abs(
                    exact_share(model, tokenizer, items, "positive", signs)
                    - exact_share(model, tokenizer, items, "positive", -signs)
                )
            )
        if moves:
            row["random_mean"], row["random_max"] = sum(moves) / len(moves), max(moves)
        result["behaviours"][name] = row
        if not args.json:
            print(name, json.dumps(row, indent=1), file=sys.stderr)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"neutral accuracy, unsteered: {result['neutral']:.3f}")
        for name, row in result["behaviours"].items():
            print(
                f"{name}: base {row['base']['positive']:.2f} toward "
                f"{row['toward']['positive']:.2f} away {row['away']['positive']:.2f} "
                f"neutral {row['toward']['neutral']:.2f}/{row['away']['neutral']:.2f} "
                f"random max {row.get('random_max', float('nan')):.2f}"
            )


if __name__ == "__main__":
    main()
