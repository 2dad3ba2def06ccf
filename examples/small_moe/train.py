"""Train the small model as usual: `python -m small_moe.train TOKENS FOLDER`.

The loss is that of the next token, with load balancing and a router z-loss; no term knows what a text is about. Every
step draws its windows from (seed, step), so an interrupted run that goes on with --resume gives the same model. Trains
on a GPU where PyTorch finds one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_moe.model import Config
from tiny_moe.training import adamw, run_workers, save, sum_over_workers

from .model import SmallMoE, parameter_counts
from .tokens import VOCAB_SIZE

WARM_UP = 100  # steps
WARM_DOWN = 0.3  # share of the steps at the end in which the learning rate falls to a twentieth
# glibc gives large blocks back to the kernel, which clears their pages again a moment later: a fifth of the time
KEEP_MEMORY = {f"MALLOC_{name}_": str(2**33) for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD")}


class Windows:
    """Windows of a stream of tokens, in an order of its own for each pass over it."""

    def __init__(self, stream: np.ndarray, length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.n = (len(stream) - 1) // length

    def batch(self, first: int, n: int) -> Tensor:
        """Windows `first` to `first + n` of the endless order, int64 [n, length + 1]."""
        rows = []
        for index in range(first, first + n):
            epoch, at = divmod(index, self.n)
            if epoch != getattr(self, "_epoch", None):
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            begin = int(self._order[at]) * self.length
            rows.append(self.stream[begin : begin + self.length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up, hold, and fall linearly at the end."""
    left = (steps - step) / max(1.0, WARM_DOWN * steps)
    return peak * min((step + 1) / WARM_UP, 1.0, max(0.05, left))


def losses(model: SmallMoE, windows: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Next-token loss, balancing loss and z-loss, all means; counts [layers, E].

    `shares` [layers, E] are those of the tokens of the whole batch before this one that chose each expert: balance is
    asked of a batch of many documents, not of each sequence (arXiv 2501.11873). Each layer's balancing loss is
    E x sum of shares x mean probabilities, 1 when even.
    """
    hidden, z, counts = model(windows[:, :-1])
    targets = windows[:, 1:].flatten()
    logits = model.logits(hidden).flatten(0, 1)
    ce = F.cross_entropy(logits.float(), targets)
    probabilities = z.softmax(-1).mean(1)
    balance = len(z[0, 0]) * (shares * probabilities).sum(-1).mean()
    return ce, balance, z.logsumexp(-1).square().mean(), counts


def plain_options(args: argparse.Namespace) -> dict:
    """The options without the paths, which say nothing about the model."""
    return {name: value for name, value in vars(args).items() if not isinstance(value, Path)}


def train(rank: int, args: argparse.Namespace) -> None:
    """Train as worker `rank` of `args.workers`; worker 0 reports and saves."""
    os.nice(19)
    device = torch.device(args.device)
    if device.type != "cpu":  # sums in one order; warns where an operation has no such form
        torch.use_deterministic_algorithms(True, warn_only=True)
    config = Config(
        vocab=VOCAB_SIZE,
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        experts=args.experts,
        top_k=args.top_k,
        expert_ff=args.expert_ff,
        context=args.context,
    )
    last = args.folder / "last.pt"
    state = torch.load(last, map_location=device, weights_only=True) if args.resume and last.exists() else None
    model = SmallMoE(config).to(device)  # whose weights are drawn on the CPU: one seed, one model
    optimizer = adamw(model, args.lr, beta2=0.95, decay=0.1)
    shares = torch.full((config.layers, config.experts), 1 / config.experts, device=device)
    first, spent = 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        shares, first, spent = state["shares"], state["step"], state["seconds"]
    if rank == 0:
        described = {"config": config.to_dict(), "options": plain_options(args)}
        (args.folder / "options.json").write_text(json.dumps(described, indent=1) + "\n")
        n, active = parameter_counts(config)
        print(f"{n:,} parameters, {active:,} work on a token", file=sys.stderr, flush=True)
    windows = Windows(np.load(args.tokens / "train.npy", mmap_mode="r"), args.length, args.seed)
    heldout = Windows(np.load(args.tokens / "heldout.npy", mmap_mode="r"), args.length, 0)
    began = time.monotonic() - spent
    each = args.batch // args.workers
    recent: list[list[float]] = []
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        batch = windows.batch(step * args.batch + rank * each, each).to(device)
        sums, counted = torch.zeros(3, device=device), torch.zeros_like(shares)
        parts = batch.split(args.micro)
        for part in parts:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16):
                ce, balance, z, counts = losses(model, part, shares)
            total = ce + args.balance * balance + args.z_loss * z
            share = len(part) / args.batch
            (total * share).backward()
            sums += torch.stack([ce, balance, z]).detach() * share
            counted += counts
        sums, counted = sum_over_workers(model, sums, counted)
        shares = counted / counted.sum(-1, keepdim=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank > 0:
            continue
        if not torch.isfinite(sums).all():
            raise SystemExit(f"loss is not a number at step {step}")
        recent.append([*sums.tolist(), float((shares * config.experts).max())])
        done, seconds = step + 1, time.monotonic() - began
        ends = done == args.steps
        if done % 20 == 0 or ends:
            mean = np.mean(recent[-20:], 0)
            row = {
                "step": done,
                "tokens": done * args.batch * args.length,
                "loss": round(float(mean[0]), 4),
                "balance": round(float(mean[1]), 4),
                "z": round(float(mean[2]), 4),
                "largest_share": round(float(mean[3]), 3),
                "seconds": round(seconds, 1),
            }
            if done % args.evaluate_every == 0 or ends:
                row["heldout"] = round(evaluate(model, heldout, shares, args.micro), 4)
            with (args.folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
        if done % args.save_every == 0 or ends:
            facts = {
                "shares": shares,
                "config": config.to_dict(),
                "step": done,
                "seconds": seconds,
                "options": plain_options(args),
            }
            save(last, facts, model, optimizer)


@torch.no_grad()
def evaluate(model: SmallMoE, windows: Windows, shares: Tensor, micro: int, most: int = 128) -> float:
    """Mean next-token loss on the first held-out windows."""
    n = min(most, windows.n)
    parts = windows.batch(0, n).to(shares.device).split(micro)
    return sum(float(losses(model, part, shares)[0]) * len(part) for part in parts) / n


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path, help="the folder that small_moe.tokens wrote")
    parser.add_argument("folder", type=Path, help="where checkpoints and losses.jsonl go")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32, help="windows of a step")
    parser.add_argument("--micro", type=int, default=8, help="windows computed at once by a worker")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of load balancing")
    parser.add_argument("--z-loss", type=float, default=0.001, help="weight of the router z-loss")
    for name, size in {
        "hidden": 256,
        "layers": 8,
        "heads": 4,
        "experts": 16,
        "top-k": 2,
        "expert-ff": 128,
        "context": 1024,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, ...; default: a GPU if there is one")
    parser.add_argument("--workers", type=int, help="single-threaded processes; default: 2, on a GPU 1")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--bf16", action="store_true", help="large products in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on from FOLDER/last.pt")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.workers = args.workers or (2 if args.device == "cpu" else 1)
    if args.device != "cpu" and args.workers > 1:
        parser.error(f"--workers {args.workers}: {args.device} has one worker; leave --workers out")
    if args.batch % args.workers:
        parser.error(f"--batch {args.batch} is not a multiple of --workers {args.workers}")
    os.environ.update(KEEP_MEMORY)  # the workers' C library reads it when they start
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it products on a GPU differ from run to run
    run_workers(train, args)


if __name__ == "__main__":
    main()
