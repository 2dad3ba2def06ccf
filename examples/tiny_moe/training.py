"""What the trainers of this folder and of small_moe share; no module of either is imported."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn


def run_workers(train: Callable[..., None], args: argparse.Namespace) -> None:
    """Call `train(rank, args)` in `args.workers` processes that can sum over each other.

    One single-threaded process per core beats threads inside each operation: the workers meet
    once a step, so another program on the machine slows them down only in proportion.
    """
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        arguments = (train, args, meeting)
        multiprocessing.start_processes(_worker, arguments, args.workers, start_method="spawn")


def _worker(rank: int, train: Callable[..., None], args: argparse.Namespace, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    train(rank, args)
    dist.destroy_process_group()


def adamw(model: nn.Module, lr: float, beta2: float, decay: float) -> torch.optim.AdamW:
    """AdamW; norms and routers do not decay."""
    named = list(model.named_parameters())
    wide = [p for n, p in named if p.ndim > 1 and "router" not in n]
    plain = [p for n, p in named if p.ndim == 1 or "router" in n]
    groups = [{"params": wide, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def sum_over_workers(model: nn.Module, *sums: Tensor) -> list[Tensor]:
    """Add up all workers' gradients in place, and return the sums of the others."""
    if dist.get_world_size() == 1:
        return list(sums)
    values = [*(p.grad for p in model.parameters()), *sums]
    flat = torch.cat([value.flatten() for value in values])
    dist.all_reduce(flat)
    pieces = flat.split([value.numel() for value in values])
    added = [piece.view_as(value) for piece, value in zip(pieces, values, strict=True)]
    n = len(values) - len(sums)
    for value, total in zip(values[:n], added[:n], strict=True):
        value.copy_(total)
    return added[n:]


def save(path: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Write a checkpoint atomically: a run that is killed meanwhile leaves the one before."""
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **state}, part)
    part.replace(path)
