"""What goes wrong in a run, drawn from its seed before it starts."""

from __future__ import annotations

import random
from typing import NamedTuple

__all__ = ["Event", "draw_plan"]

_KINDS = {
    # (weight, needs which servers)
    "redis refuses": (3, "redis"),
    "redis stops": (3, "redis"),
    "redis crashes": (4, "redis"),
    "redis evicts": (4, "redis"),
    "redis flushes": (1, "redis"),
    "redis forgets scripts": (1, "redis"),
    "channel half open": (3, "redis"),
    "channel kicked": (2, "redis"),
    "sql refuses": (2, "sql"),
    "sql stops": (2, "sql"),
    "cut from redis": (4, "redis"),
    "cut from sql": (3, "sql"),
    "process killed": (4, ""),
    "process stops": (3, ""),
    "process sleeps": (1, ""),
    "redis clock set": (3, "redis clocks"),
    "sql clock set": (2, "sql clocks"),
    "host clock set": (1, "clocks"),
    "redis slot moved": (4, "cluster"),
}

_SETS = (0.4, 2.0, 20.0, 300.0)


class Event(NamedTuple):
    """One thing that goes wrong.

    Args:
        at: when, in seconds.
        kind: what.
        seconds: for how long.
        process: which process it concerns.
        loses: how many seconds of writes a crash loses.
        draw: decides the rest.
        sets: by how many seconds a clock is set.
    """

    at: float
    kind: str
    seconds: float
    process: int
    loses: float
    draw: float
    sets: float

    def __str__(self) -> str:
        return (
            f"{self.at:.3f} s: {self.kind} (process {self.process}) for {self.seconds:.3f} s"
            f"{f', losing {self.loses:.2f} s' if self.kind == 'redis crashes' else ''}"
            f"{f', by {self.sets:.1f} s' if self.kind.endswith('clock set') else ''}"
        )


def draw_plan(
    chance: random.Random, processes: int, servers: tuple[str, ...], *, one: bool
) -> list[Event]:
    """Return the events of a run in their order.

    Args:
        chance: decides.
        processes: how many there are.
        servers: which may fail: ``redis`` and ``sql``; ``cluster`` when Redis is one; ``clocks``
            when those of the servers and hosts may be set.
        one: whether the stack is checked as one process whose servers never lose what they have.
    """
    kinds = {
        kind: weight
        for kind, (weight, server) in _KINDS.items()
        if all(part in servers for part in server.split())
        and not (one and kind.startswith(("process", "redis crash", "redis evict", "redis flush")))
    }
    count = chance.choice((0, 1, 2, 2, 3, 3, 4, 5))
    events = []
    for _ in range(count):
        kind = chance.choices(list(kinds), list(kinds.values()))[0]
        if kind == "process sleeps" and any(event.kind == kind for event in events):
            continue  # one is long enough
        events.append(
            Event(
                at=0.3 + 4.0 * chance.random(),
                kind=kind,
                seconds=chance.choice((0.05, 0.3, 1.0, 3.0)) * (0.5 + chance.random()),
                process=chance.randrange(processes),
                loses=chance.choice((0.0, 0.2, 1.0, 3.0)) * chance.random(),
                draw=chance.random(),
                sets=chance.choice(_SETS) * chance.choice((-1, 1)),
            )
        )
    return sorted(events)
