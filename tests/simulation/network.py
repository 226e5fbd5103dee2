"""The way between a process and a server: slow, lossy, cut, and back again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from tests.simulation.loop import Process, SimLoop

__all__ = ["CutError", "Network", "Server"]


class CutError(Exception):
    """The connection was refused or reset."""


class Server:
    """A server: up, refusing, or silent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mode = "up"  # or "refuse", or "silent"
        self.run = 0
        self.backlog: list[Callable[[], None]] = []

    def stop(self) -> None:
        """SIGSTOP: what arrives waits, and is done after all when it goes on."""
        self.mode = "silent"

    def resume(self) -> None:
        """SIGCONT."""
        self.mode = "up"
        backlog, self.backlog = self.backlog, []
        for work in backlog:
            work()


class Network:
    """Carries calls, each with a fate of its own.

    Args:
        loop: the loop.
        chance: decides.
        faults: share of calls that are slow, lost or answered by a reset.
        note: called with a line for the log of a replay.
    """

    def __init__(
        self, loop: SimLoop, chance: random.Random, faults: float, note: Callable[[str], None]
    ) -> None:
        self.loop = loop
        self.chance = chance
        self.faults = faults
        self.note = note
        self.slowest = 2.5
        # (process name, server name) -> "refuse" or "silent"
        self.cuts: dict[tuple[str, str], str] = {}

    def latency(self) -> float:
        """Return how long one way takes."""
        return 0.0004 + 0.002 * self.chance.random()

    def slow(self) -> float:
        """Return how much longer a call takes that something holds up."""
        draw = self.chance.random()
        if draw < 0.6:
            return 0.1 * self.chance.random()
        return min(self.slowest, 0.6 if draw < 0.9 else 2.5) * self.chance.random()

    def blocked(self, process: Process, server: Server) -> str | None:
        """Return how a process fails to reach a server now, if it does."""
        if server.mode != "up":
            return server.mode
        return self.cuts.get((process.name, server.name))

    async def call(
        self, process: Process, server: Server, label: str, work: Callable[[], Any]
    ) -> Any:
        """Have ``work`` done at the server and return its result, or raise CutError, or hang."""
        chance = self.chance
        out, back = self.latency(), self.latency()
        fate = ""
        if self.faults and chance.random() < self.faults:
            fate = chance.choice(("slow", "slow", "late reply", "lost", "no reply", "reset", "cut"))
            if fate == "slow":
                out += self.slow()
            elif fate == "late reply":
                back += self.slow()
        loop = self.loop
        future: asyncio.Future[Any] = loop.create_future()
        run = server.run

        def answer(result: Any, exc: BaseException | None) -> None:
            if future.done() or not process.alive:
                return
            with loop.inside(process):
                if exc is not None:
                    future.set_exception(exc)
                else:
                    future.set_result(result)

        def later(seconds: float, result: Any = None, exc: BaseException | None = None) -> None:
            with loop.inside(None):
                loop.call_later(seconds, answer, result, exc)

        def arrive() -> None:
            blocked = self.blocked(process, server)
            if server.mode == "silent" and fate != "lost" and server.run == run:
                server.backlog.append(arrive)
                return
            if blocked == "silent" or fate == "lost":
                self.note(f"  {process}: {label} is lost")
                return
            if blocked == "refuse" or fate == "cut" or server.run != run:
                self.note(f"  {process}: {label} is refused")
                later(back, exc=CutError())
                return
            try:
                result = work()
            except Exception as exc:
                later(back, exc=exc)
                return
            self.note(f"  {process}: {label} took effect{', ' + fate if fate else ''}")
            if fate == "reset":
                later(back, exc=CutError())
            elif fate != "no reply":
                # What was answered before a cut may not come through it.
                with loop.inside(None):
                    loop.call_later(back, reply, result)

        def reply(result: Any) -> None:
            blocked = self.blocked(process, server)
            if blocked == "silent":
                return
            if blocked or server.run != run:
                answer(None, CutError())
            else:
                answer(result, None)

        if self.blocked(process, server) == "refuse":
            later(out, exc=CutError())
        else:
            with loop.inside(None):
                loop.call_later(out, arrive)
        return await future
