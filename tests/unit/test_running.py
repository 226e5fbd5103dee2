"""Which event loop runs here."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading

import pytest

from layered_store import running
from layered_store.clock import SYSTEM_CLOCK


async def same() -> asyncio.AbstractEventLoop:
    """Check it twice: when it is new, and when it is known."""
    loop = asyncio.get_running_loop()
    assert running._remembered() is loop
    await asyncio.sleep(0)
    assert running._remembered() is running.running_loop() is loop
    return loop


def test_it_is_the_loop_that_runs() -> None:
    """One after the other in one thread, the same one again, and none."""
    first = asyncio.run(same())
    second = asyncio.run(same())
    assert first is not second
    with pytest.raises(RuntimeError):
        running._remembered()
    loop = asyncio.new_event_loop()
    for _ in range(3):
        assert loop.run_until_complete(same()) is loop
        asyncio.run(same())
    loop.close()


def test_a_hook_of_the_program_tells_nothing() -> None:
    """It may set one and the same on every event loop, to watch its generators."""

    async def look() -> None:
        before = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=len, finalizer=before.finalizer)  # type: ignore[arg-type]
        try:
            await same()
        finally:
            sys.set_asyncgen_hooks(*before)

    asyncio.run(look())
    asyncio.run(look())


def test_threads_have_their_own() -> None:
    """Loops that run at the same time are never mixed up."""
    wrong: list[object] = []

    async def look() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(500):
            if running._remembered() is not loop:
                wrong.append(loop)
            await asyncio.sleep(0)

    threads = [threading.Thread(target=lambda: asyncio.run(look())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


async def test_an_ending_tells_all_who_wait_how_it_went() -> None:
    """Its failure is raised by each of them, and complained about nowhere when all are gone."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    ending = running.Ending()
    await ending.wait()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise OSError

    ending.begin(fails())
    for each in await asyncio.gather(ending.wait(), ending.wait(), return_exceptions=True):
        assert isinstance(each, OSError)
    ending.begin(fails())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del ending
    gc.collect()
    assert not complaints


def test_an_ending_that_its_event_loop_cut_off() -> None:
    """On another loop there is nothing to wait for."""
    ending = running.Ending()

    async def begins() -> None:
        ending.begin(asyncio.sleep(60))

    asyncio.run(begins())
    asyncio.run(ending.wait())


async def test_a_timer_is_nobodys_call() -> None:
    """Each sets the next one for as long as there is traffic, so nothing of a request stays."""
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")
    request.set("the first one")
    found = asyncio.get_running_loop().create_future()
    SYSTEM_CLOCK.call_later(0.0, lambda: found.set_result(request.get("nobody's")))
    assert await found == "nobody's"
