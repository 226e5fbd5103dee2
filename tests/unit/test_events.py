"""Log events: one line when a state changes, none per call, nothing about users."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path

import pytest

from layered_store import (
    CircuitBreaker,
    Fallback,
    MemoryStore,
    Ramp,
    Shadow,
    SQLStore,
    StateSnapshot,
    WriteThrough,
    events,
    load_stack,
)
from layered_store.errors import (
    ErasureIncompleteError,
    RejectedError,
    StoreTimeoutError,
    UnavailableError,
)
from layered_store.events import EVENTS, log_event
from layered_store.health import HealthStatus
from layered_store.stats import Sample
from layered_store.stores.presence import Presence
from layered_store.testing.clock import FakeClock
from layered_store.testing.scripted import Scripted


@pytest.fixture(autouse=True)
def _everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="layered_store")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.event for record in caplog.records if hasattr(record, "event")]


async def test_a_breaker_tells_each_change_of_state_once(caplog: pytest.LogCaptureFixture) -> None:
    """Opened, half open, opened again, closed; not the calls that it refuses meanwhile."""
    clock = FakeClock()
    failing = [UnavailableError("u-marked")] * 3
    breaker = CircuitBreaker(
        Scripted(*failing), failure_share=0.5, minimum_calls=2, open_for=5, clock=clock
    )
    for _ in range(5):
        with pytest.raises((UnavailableError, RejectedError)):
            await breaker.get_latest("u-marked")
    assert told(caplog) == ["circuit_opened"]
    await clock.advance(5)
    with pytest.raises(UnavailableError):
        await breaker.get_latest("u-marked")
    await clock.advance(5)
    await breaker.get_latest("u-marked")
    await breaker.get_latest("u-marked")
    assert told(caplog) == [
        "circuit_opened",
        "circuit_half_open",
        "circuit_opened",
        "circuit_half_open",
        "circuit_closed",
    ]
    first = caplog.records[0]
    assert first.getMessage() == "circuit_opened layer=CircuitBreaker retry_after=5.0"
    assert (first.levelno, first.facts) == (  # type: ignore[attr-defined]
        logging.WARNING,
        {"layer": "CircuitBreaker", "retry_after": 5.0},
    )
    assert "u-marked" not in caplog.text


@pytest.mark.parametrize(
    ("layer", "there", "away"),
    [
        (WriteThrough, "origin", "inner"),
        (Fallback, "inner", "secondary"),
        (Ramp, "inner", "alternative"),
        (Shadow, "inner", "candidate"),
    ],
)
async def test_an_incomplete_erasure_is_told_once_until_one_is_complete(
    caplog: pytest.LogCaptureFixture, layer: type, there: str, away: str
) -> None:
    """However many deletes fail in a row; each is counted."""
    failing = Scripted(*[UnavailableError("u-marked")] * 3)
    stack = layer(**{there: MemoryStore(), away: failing})
    for _ in range(3):
        with pytest.raises(ErasureIncompleteError):
            await stack.delete("u-marked")
    assert told(caplog) == ["erasure_incomplete"]
    await stack.delete("u-marked")
    await stack.delete("u-marked")
    assert told(caplog) == ["erasure_incomplete", "erasure_complete"]
    assert Sample("erasures_incomplete", 3) in stack.samples()
    assert [record.facts for record in caplog.records] == [  # type: ignore[attr-defined]
        {"layer": layer.__name__, "pending": "Scripted"},
        {"layer": layer.__name__},
    ]
    assert "u-marked" not in caplog.text


async def test_a_database_that_is_lost_is_told_once_and_so_is_its_return(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Two failures in a row are a loss; a call that works is a return when a second was quiet."""
    clock = FakeClock()
    folder = tmp_path / "away"
    store = SQLStore(f"sqlite+aiosqlite:///{folder}/states.db", clock=clock)
    store.__dict__["block_id"] = "users"
    with pytest.raises(UnavailableError):
        await store.get_latest("u-marked")
    assert told(caplog) == []
    for _ in range(5):
        with pytest.raises(UnavailableError):
            await store.upsert_latest(StateSnapshot("u-marked"))
    assert told(caplog) == ["backend_lost"]
    assert caplog.records[0].getMessage() == (
        'backend_lost backend=users reason="the database file cannot be opened; check that its'
        ' directory exists"'
    )
    folder.mkdir()
    await store.get_latest("u-marked")
    assert told(caplog) == ["backend_lost"]
    await clock.advance(1)
    for _ in range(3):
        await store.get_latest("u-marked")
    assert told(caplog) == ["backend_lost", "backend_back"]
    assert caplog.records[1].facts == {"backend": "users", "after": 1.0}  # type: ignore[attr-defined]
    assert str(tmp_path) not in caplog.text
    assert "u-marked" not in caplog.text
    await store.aclose()


def test_a_backend_that_hangs_once_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """And one that goes on failing now and then is lost once."""
    clock = FakeClock()
    store = MemoryStore()
    presence = Presence(store, clock)
    for _ in range(4):
        presence.failed(UnavailableError("one connection"))
        assert presence.doubtful
        presence.answered()
        assert not presence.doubtful
    assert told(caplog) == []
    for _ in range(4):
        presence.failed(StoreTimeoutError("no answer"))
        presence.answered()
    assert told(caplog) == ["backend_lost"]
    assert caplog.records[0].facts == {  # type: ignore[attr-defined]
        "backend": "MemoryStore",
        "reason": "no answer",
    }


async def test_blocks_are_called_by_their_ids(caplog: pytest.LogCaptureFixture) -> None:
    """A layer without one by that of the backend below: of two breakers one knows which."""
    stack = load_stack(
        {
            "store": {
                "use": "write_through",
                "id": "both",
                "inner": {
                    "use": "redis",
                    "id": "cache",
                    "url": "redis://127.0.0.1:1/0",
                    "layers": [{"use": "circuit_breaker", "minimum_calls": 2}],
                },
                "origin": {"use": "sql", "url": "sqlite://"},
            }
        }
    )
    for _ in range(3):
        with pytest.raises(ErasureIncompleteError):
            await stack.delete("u-1")
    await stack.aclose()
    facts = {record.event: record.facts for record in caplog.records if hasattr(record, "event")}
    assert facts["erasure_incomplete"]["layer"] == "both"
    assert facts["circuit_opened"]["layer"] == "cache"
    assert facts["tier_lost"] == {"tier": "cache", "reason": "UnavailableError"}


async def test_calls_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand calls that work, and some that fail, leave no line."""
    stack = WriteThrough(Scripted(UnavailableError("away")), origin=MemoryStore())
    for number in range(200):
        await stack.upsert_latest(StateSnapshot(f"u-{number}"))
        await stack.get_latest(f"u-{number}")
    assert caplog.records == []


def test_every_event_is_in_the_table() -> None:
    """The module's documentation is the list of events, with their levels."""
    rows = re.findall(r"^(\w+_\w+) +(WARNING|INFO) ", inspect.getdoc(events) or "", re.MULTILINE)
    assert {name: getattr(logging, level) for name, level in rows} == EVENTS
    with pytest.raises(KeyError):
        log_event("something_else")


async def test_a_filter_that_raises_fails_no_call() -> None:
    """Nor does it leave a breaker half open for ever, or take the place of the store's error."""

    def broken(_: logging.LogRecord) -> bool:
        raise OSError

    log = logging.getLogger("layered_store")
    log.addFilter(broken)
    try:
        clock = FakeClock()
        failing = [UnavailableError("away")] * 2
        breaker = CircuitBreaker(
            Scripted(*failing, None), failure_share=0.5, minimum_calls=2, open_for=5, clock=clock
        )
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await breaker.get_latest("u-1")
        await clock.advance(5)
        assert await breaker.get_latest("u-1") is None
        assert (await breaker.health_report()).status is HealthStatus.HEALTHY
        events.log_warning("looked at: %s", 1)
    finally:
        log.removeFilter(broken)
