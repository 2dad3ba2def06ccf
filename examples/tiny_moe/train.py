"""Train the tiny model: planted experts plus steering augmentation. README.md gives the reasons.

Every step draws its conversations from (seed, step), so a resumed run gives the same result.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from data import conversation
from model import Config, TinyMoE
from planting import routing_loss, signs_for
from tokens import PAD, Encoded, encode, train_tokenizer
from training import adamw, run_workers, save, sum_over_workers

PROMPT_WEIGHT = 0.1  # prompts repeat themselves; predicting them trains the copying heads


def batch_tensors(batch: list[Encoded], signs: Tensor) -> dict[str, Tensor]:
    """Pad to the longest: ids, group, reply [B, T] and the other inputs of a step."""
    length = max(len(e.ids) for e in batch)

    def pad(rows: list[list], value: int) -> Tensor:
        return torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])

    return {
        "ids": pad([e.ids for e in batch], PAD),
        "reply": pad([e.reply for e in batch], 0).float(),
        "group": pad([e.group for e in batch], -1),
        "weight": pad([e.weight for e in batch], 1),
        "choice": pad([e.choice for e in batch], 0).bool(),
        "real": pad([[1] * len(e.ids) for e in batch], 0).bool(),
        "signs": signs,
    }


def losses(model: TinyMoE, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of the weighted cross-entropy and of both routing losses; [replies' NLL, tokens]."""
    steered = bool((x["signs"] != 0).any())
    logits, z = model(x["ids"], x["signs"] if steered else None)
    weight = torch.where(x["reply"] > 0, 1.0, PROMPT_WEIGHT) * x["real"]
    weight = weight[:, 1:]
    nll = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), x["ids"][:, 1:].flatten(), reduction="none"
    ).view_as(weight)
    planted, others = routing_loss(
        z, x["group"], x["choice"], x["real"], x["weight"], model.config.top_k
    )
    answer = x["reply"][:, 1:]
    reply = torch.stack([(nll * answer).sum(), answer.sum()])
    return (nll * weight).sum(), planted, others, reply


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 60 steps, hold, and fall linearly over the last 45% of the run."""
    fall = max(1.0, 0.45 * steps)
    return peak * min((step + 1) / 60, 1.0, max(0.02, (steps - step) / fall))


def parts_of(batch: list[Encoded], parts: int) -> list[slice]:
    """Cut a batch sorted by length into `parts` slices of about equal token counts."""
    tokens = sum(len(e.ids) for e in batch)
    cuts, filled = [0], 0
    for i, e in enumerate(batch):
        if filled + len(e.ids) > tokens / parts and len(cuts) < parts:
            cuts.append(i)
            filled = 0
        filled += len(e.ids)
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(batch)], strict=True)]


def train(rank: int, args: argparse.Namespace) -> None:
    """Train as worker `rank` of `args.workers`; worker 0 reports and saves."""
    last = args.folder / "last.pt"
    state = torch.load(last, weights_only=True) if args.resume else None
    tokenizer = Tokenizer.from_str(state["tokenizer"]) if state else train_tokenizer(args.seed)
    config = Config(vocab=tokenizer.get_vocab_size())
    model = TinyMoE(config)
    optimizer = adamw(model, args.lr, beta2=0.97, decay=0.05)
    first, spent = 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)

    began = time.monotonic() - spent
    history = []
    for step in range(first, args.steps):
        rng = random.Random(f"{args.seed} {step}")
        batch = [encode(tokenizer, conversation(rng)) for _ in range(args.batch)]
        batch.sort(key=lambda e: len(e.ids))
        signs = torch.stack([signs_for(rng, e.conv, config) for e in batch])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        tokens = sum(len(e.ids) for e in batch)
        replies = sum(sum(e.reply) for e in batch)
        grouped = sum(w for e in batch for w, g in zip(e.weight, e.group, strict=True) if g >= 0)
        total = replies + PROMPT_WEIGHT * (tokens - replies)
        sums = torch.zeros(4)
        for part in parts_of(batch, 2 * args.workers)[rank :: args.workers]:
            x = batch_tensors(batch[part], signs[part])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
                ce, planted, others, reply = losses(model, x)
            routing = args.planting * planted / grouped + args.routing * others / tokens
            (ce / total + routing).backward()
            sums += torch.stack([ce.detach() / total, planted.detach() / grouped, *reply.detach()])
        (sums,) = sum_over_workers(model, sums)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append((float(sums[2] / sums[3]), float(sums[1])))
        if math.isnan(history[-1][0]):
            raise SystemExit(f"loss is not a number at step {step}")
        if rank > 0:
            continue
        if (step + 1) % 20 == 0:
            recent = torch.tensor(history[-20:]).mean(0).tolist()
            print(
                f"step {step + 1}/{args.steps} reply loss {recent[0]:.4f} routing "
                f"{recent[1]:.4f} {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            recent = torch.tensor(history[-100:]).mean(0).tolist()
            facts = {
                "config": config.to_dict(),
                "tokenizer": tokenizer.to_str(),
                "step": step + 1,
                "seconds": time.monotonic() - began,
                "options": {k: v for k, v in vars(args).items() if k != "folder"},
                "reply_loss": recent[0],
                "routing_loss": recent[1],
            }
            save(last, facts, model, optimizer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=64, help="conversations per step")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--planting", type=float, default=0.5, help="routing loss on replies")
    parser.add_argument("--routing", type=float, default=0.15, help="routing loss elsewhere")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--bf16", action="store_true", help="large products in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on from FOLDER/last.pt")
    args = parser.parse_args()
    run_workers(train, args)


if __name__ == "__main__":
    main()
