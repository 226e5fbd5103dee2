"""The running event loop, found without a system call; and work on it that outlives its caller."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator

    from layered_store.clock import Clock

__all__ = ["Ending", "UnderWay", "cancel_all", "running_loop", "spawn"]

T = TypeVar("T")

_LAST_SECONDS: Final = 5.0

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


def spawn(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run something on this event loop, in a context of its own: it is not the caller's alone."""
    return running_loop().create_task(work, context=contextvars.Context())


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks on whatever event loops, and wait for those on this one."""
    here = asyncio.get_running_loop()
    own = []
    for task in tuple(tasks):
        loop = task.get_loop()
        if loop is here:
            task.cancel()
            own.append(task)
        else:
            with suppress(RuntimeError):  # it was closed
                loop.call_soon_threadsafe(task.cancel)
    await asyncio.gather(*own, return_exceptions=True)


class Ending:
    """Closing that runs to its end, though a caller who waits for it is cancelled.

    One who comes again waits for what is still being closed.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[None, None, None]) -> None:
        """Begin to close on the running event loop."""
        task = spawn(work)
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


class UnderWay:
    """Calls that take steps on several stores; closing waits for them.

    A backend that is closed waits for its own calls, but nobody does for one that is between two.

    Args:
        clock: source of time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._calls: set[asyncio.Future[None]] = set()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Be waited for until the end of the block."""
        over = asyncio.get_running_loop().create_future()
        self._calls.add(over)
        try:
            yield
        finally:
            self._calls.discard(over)
            over.cancel()

    async def end(self) -> None:
        """Wait for the calls on this event loop, but not for longer than any backend's limit."""
        here = asyncio.get_running_loop()
        calls = [over for over in tuple(self._calls) if over.get_loop() is here]
        if calls:
            with suppress(TimeoutError):
                async with self._clock.timeout(_LAST_SECONDS):
                    await asyncio.wait(calls)
