"""Which event loop runs here, told without a system call; and what outlives a caller on it."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Ending", "running_loop"]

_hooks = sys.get_asyncgen_hooks
_known: tuple[object, asyncio.AbstractEventLoop | None] = (None, None)


def _remembered() -> asyncio.AbstractEventLoop:
    global _known  # noqa: PLW0603  one pair, replaced as a whole: threads may race for it
    # An event loop that runs has a hook of its own in its thread, and no other loop ever has it.
    hook = _hooks()[0]
    known, loop = _known
    if hook is known and loop is not None:
        return loop
    loop = asyncio.get_running_loop()
    # A program's hook in its place would say the same on every loop.
    own = getattr(hook, "__self__", None) is loop
    _known = (hook, loop) if own else (None, None)
    return loop


running_loop: Callable[[], asyncio.AbstractEventLoop] = (
    asyncio.get_running_loop if sys.version_info >= (3, 12) else _remembered
)
"""As ``asyncio.get_running_loop``, which before Python 3.12 asks the system for the process id each
time: 0.3 microseconds, several times per call.
"""


class Ending:
    """Closing that goes on to its end: who waits for it may be cancelled, or come again."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[None, None, None]) -> None:
        """Begin to close on the running event loop."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def wait(self) -> None:
        """Wait until what was begun on this event loop is closed."""
        here = asyncio.get_running_loop()
        tasks = [task for task in tuple(self._tasks) if task.get_loop() is here]
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever waited for it may be gone
