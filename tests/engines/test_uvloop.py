"""What the command line and the service run on where uvloop is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from servers import Server

from layered_store import (
    Cached,
    Metrics,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    Timeout,
    UnavailableError,
)
from layered_store.testing import check_layer, check_store

uvloop = pytest.importorskip("uvloop", reason="uvloop is not made for this platform")


def on_uvloop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        await scenario()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(whole())


@pytest.mark.parametrize(
    ("fixture", "build"),
    [
        ("redis_url", lambda url: RedisStore(url, history_limit=50)),
        ("sqlite_url", SQLStore),
        ("postgres_url", SQLStore),
        ("mysql_url", SQLStore),
    ],
)
def test_stores(
    fixture: str, build: Callable[[str], Any], request: pytest.FixtureRequest
) -> None:
    """Every backend passes the conformance suite."""
    url = request.getfixturevalue(fixture)

    async def scenario() -> None:
        report = await check_store(lambda: build(url))
        assert report.ok, str(report)

    on_uvloop(scenario)


def test_three_tiers(redis_url: str, postgres_url: str) -> None:
    """So does a whole stack, whose processes hear of each other's writes."""

    def build() -> Metrics:
        return Metrics(Cached(RedisStore(redis_url), fallback=SQLStore(postgres_url)), name="tiers")

    async def scenario() -> None:
        report = await check_store(build)
        assert report.ok, str(report)

    on_uvloop(scenario)


def test_layers() -> None:
    """Layers keep their laws, those about cancellation, hanging stores and left tasks too."""

    async def scenario() -> None:
        report = await check_layer(lambda inner: Cached(Retry(Timeout(inner, seconds=1))))
        assert report.ok, str(report)

    on_uvloop(scenario)


def test_a_server_that_hangs_and_dies(redis_server: Callable[..., Server]) -> None:
    """Its calls end within their limit, and the store finds the server when it is there again."""
    server = redis_server()
    url = f"redis://127.0.0.1:{server.port}/0"

    async def scenario() -> None:
        async with RedisStore(url, timeout=0.2) as store:
            await store.upsert_latest(StateSnapshot("u-1"))
            server.stop()
            calls = [store.get_latest(f"u-{number}") for number in range(100)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(result).__name__ for result in results} == {"StoreTimeoutError"}
            server.cont()
            assert await store.get_latest("u-1") is not None
            server.kill()
            with pytest.raises(UnavailableError):
                await store.get_latest("u-1")

    on_uvloop(scenario)
