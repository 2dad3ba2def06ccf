"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ..generation.engine import FinishEvent, Sampling, TokenEvent
from ..steering.bias_file import BiasFile

__all__ = ["Event", "Job", "Ticket"]

Event = TokenEvent | FinishEvent | Exception


@dataclass(frozen=True)
class Job:
    """One answer that a ticket asks for."""

    tokens: list[int]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n_probs: int | None = None
    prompt_probs: int | None = None
    special: bool = False
    bias: BiasFile | None = None


@dataclass(eq=False)
class Ticket:
    """A client's request: one job or several, whose events come out of `next` in order.

    `client` is who takes turns with others. The deadline is in the worker's clock (time.monotonic).
    """

    client: str
    jobs: list[Job]
    deadline: float
    events: asyncio.Queue[list[tuple[int, Event]]] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    cancelled: bool = False

    async def next(self) -> list[tuple[int, Event]]:
        """What came since the last call, at least one (index of the job, event)."""
        events = await self.events.get()
        while not self.events.empty():
            events += self.events.get_nowait()
        return events
