"""Every wrong argument of every block is a ConfigError that names option, range and remedy."""

from __future__ import annotations

import inspect
import math
import os
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from layered_store import Cached, ConfigError, MemoryStore, StateSnapshot, StateStore, SyncStore
from layered_store.config.registry import BUILT_IN, spec_of
from layered_store.testing import Faults, Recorded, Scripted


class Other(StateSnapshot):
    """Another class of snapshots than the usual one."""


def classes() -> dict[str, type[StateStore]]:
    found: dict[str, type[StateStore]] = {}
    for kind in sorted(BUILT_IN):
        if kind == "tracing":
            pytest.importorskip("opentelemetry")
        found[kind] = spec_of(kind).cls
    return found | {"faults": Faults, "recorded": Recorded}


CLASSES = classes()

# What a block needs to be built at all.
REQUIRED: dict[str, dict[str, Any]] = {
    "metrics": {"name": "m", "registry": CollectorRegistry()},
    "timeout": {"seconds": 1},
    "bulkhead": {"max_in_flight": 1},
    "redis": {"url": "redis://127.0.0.1:6379/0"},
    "sql": {"url": "sqlite+aiosqlite:///x.db"},
    "encrypted": {"keys": [bytes(32)]},
    "prefixed": {"prefix": "p-"},
    "ramp": {"alternative": MemoryStore()},
    "shadow": {"candidate": MemoryStore()},
}
STORES = ("origin", "secondary", "fallback", "inner", "candidate")


def required(kind: str) -> dict[str, Any]:
    options = dict(REQUIRED.get(kind, {}))
    for parameter in inspect.signature(CLASSES[kind]).parameters.values():
        if parameter.name in STORES and parameter.default is parameter.empty:
            options[parameter.name] = MemoryStore()
    return options


def build(kind: str, **options: Any) -> StateStore:
    return CLASSES[kind](**{**required(kind), **options})


OPTIONS = [
    (kind, name) for kind, cls in CLASSES.items() for name in inspect.signature(cls).parameters
]
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "marked-4711",
    "marked-4711\udcff",  # what a variable that is not UTF-8 becomes
    b"marked-4711",
    [],
    ["marked-4711"],
    {},
    {"get_latest": "marked-4711"},
    object(),
    object,
    MemoryStore,
    MemoryStore(snapshot_type=Other),
    timedelta(seconds=-1),
    timedelta(0),
    lambda: None,
]


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_any_value_builds_or_is_refused_by_name(kind: str, name: str) -> None:
    """No option lets a wrong value through as another error, or shows a text it was given."""
    refused = 0
    for value in ODD:
        try:
            build(kind, **{name: value})
        except ConfigError as exc:
            refused += 1
            if name == "layer" and exc.path:
                continue  # the table of a block, told by its place
            assert exc.option is not None, f"{name}={value!r}: {exc}"
            assert exc.option in str(exc)
            assert exc.layer == CLASSES[kind].__name__ or exc.option == "snapshot_type"
            assert "marked-4711" not in str(exc)
            assert len(str(exc)) < 400
            if exc.option not in (name, "snapshot_type"):
                # Two options that do not fit together; the text names both.
                assert name in str(exc) or exc.option in required(kind) or kind == "ramp"
    assert refused, "some of these values are wrong for every option"


SECONDS = (-1, 0, math.nan, math.inf, "1", True, timedelta(0), timedelta(seconds=-1), [])
NOT_NEGATIVE = (-1, math.nan, math.inf, "1", True, timedelta(seconds=-1), [])
COUNT = (0, -1, 1.0, "1", True, [])
SHARE = (-0.1, 1.1, math.nan, "1", True, [])
OF_STORE = (None, MemoryStore, "memory", {}, object())
CLOCK = (None, 1, "clock", object())
NO_UTF8 = os.fsdecode(b"key-\xff")
"""As ``os.environ`` gives bytes that are no text."""

WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    "memory": {"history_limit": (-1, 1.0, "1", True), "snapshot_type": (None, int, "x")},
    "redis": {
        "url": ("", "127.0.0.1", "http://127.0.0.1", "redis+cluster://", 7, None),
        "prefix": (None, 7, "{x}", NO_UTF8),
        "ttl": (-1, 0, math.nan, "1"),
        "history_limit": (-1, 1.0, None, True),
        "snapshot_type": (None, int),
        "digest_key": ("x" * 65, 7, None, NO_UTF8),
        "connect_timeout": (*SECONDS, None),
        "timeout": (*SECONDS, None),
        "max_connections": (*COUNT, None),
        "probe_seconds": (*SECONDS, None),
        "clock": CLOCK,
    },
    "sql": {
        "url": ("", "nonsense", "oracle://x/y", "mysql+mysqldb://x/y", 7, None),
        "history_limit": (-1, 1.0, "1", True),
        "history_max_age": (-1, 0, math.nan, "1"),
        "order": ("", "newest", None, 1),
        "create_tables": (None, 1, "yes"),
        "snapshot_type": (None, int),
        "digest_key": ("x" * 65, 7, None, NO_UTF8),
        "clock": CLOCK,
    },
    "cached": {
        "inner": OF_STORE,
        "fallback": OF_STORE[1:],
        "ttl": (*SECONDS, None),
        "max_entries": (*COUNT, None),
        "negative_ttl": (*NOT_NEGATIVE, None),
        "stale_if_error": (*NOT_NEGATIVE, None),
        "refresh_ahead": (0, 1, -0.1, 1.1, math.nan, "1", True),
        "ttl_jitter": (1, -0.1, 1.1, math.nan, "1", True, None),
        "invalidation": ("", "on", None, True),
        "cache": (1, {}, "lru"),
        "clock": CLOCK,
        "random": (None, 1, object()),
    },
    "write_through": {"inner": OF_STORE, "origin": OF_STORE, "clock": CLOCK},
    "metrics": {
        "inner": OF_STORE,
        "name": ("", "a b", "x" * 101, "é", None, 7, "näme"),
        "time_hits": ("", "none", None, True),
        "registry": (1, "default", {}),
        "clock": CLOCK,
    },
    "retry": {
        "inner": OF_STORE,
        "attempts": (*COUNT, None),
        "base_delay": (*NOT_NEGATIVE, None),
        "max_delay": (*NOT_NEGATIVE, None, 0.001),
        "time_limit": SECONDS,
        "budget": SHARE,
        "burst": (*COUNT, None),
        "clock": CLOCK,
        "random": (None, 1, object()),
    },
    "timeout": {"inner": OF_STORE, "seconds": (*SECONDS, None), "clock": CLOCK},
    "circuit_breaker": {
        "inner": OF_STORE,
        "failure_share": (0, -0.1, 1.1, math.nan, "1", True, None),
        "minimum_calls": (*COUNT, None),
        "window": (*SECONDS, None),
        "open_for": (*SECONDS, None),
        "max_open_for": (*SECONDS, 0.001),
        "clock": CLOCK,
        "random": (None, 1, object()),
    },
    "fallback": {"inner": OF_STORE, "secondary": OF_STORE},
    "shadow": {"salt": (None, 7, "x" * 65, NO_UTF8)},
    "ramp": {"salt": (None, 7, "x" * 65, NO_UTF8)},
    "bulkhead": {
        "inner": OF_STORE,
        "max_in_flight": (*COUNT, None),
        "max_waiting": (-1, 1.0, "1", True, None),
        "max_wait": (*SECONDS, 1),
        "clock": CLOCK,
    },
}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (kind, name, value)
        for kind, options in WRONG.items()
        for name, values in options.items()
        for value in values
    ],
    ids=lambda value: repr(value)[:30],
)
def test_wrong_values(kind: str, name: str, value: Any) -> None:
    """Each is refused where the block is built; the text names option and what is allowed."""
    with pytest.raises(ConfigError) as refused:
        build(kind, **{name: value})
    error = refused.value
    assert isinstance(error, ValueError)
    assert name in str(error)
    assert any(word in str(error) for word in ("must", "needs", "give", "pass", "cannot"))


def test_different_snapshot_types() -> None:
    """Stores that keep different classes of snapshots cannot be joined."""
    for kind, name in (("write_through", "origin"), ("fallback", "secondary")):
        with pytest.raises(ConfigError, match="snapshot_type="):
            build(kind, **{name: MemoryStore(snapshot_type=Other)})


@pytest.mark.parametrize("stack", [None, MemoryStore, 7, "memory"])
def test_sync_store(stack: Any) -> None:
    """SyncStore takes a stack or a function."""
    with pytest.raises(ConfigError, match=r"SyncStore\.stack: must be a StateStore"):
        SyncStore(stack)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, "1"])
def test_sync_store_timeout(timeout: Any) -> None:
    """Its time limit is checked as every other."""
    with pytest.raises(ConfigError, match=r"SyncStore\.timeout"):
        SyncStore(MemoryStore(), timeout=timeout)


def test_unknown_options_are_refused_by_python() -> None:
    """A misspelt option is a TypeError that names it."""
    for kind in CLASSES:
        with pytest.raises(TypeError, match="atempts"):
            build(kind, atempts=3)
    assert Scripted()


@pytest.mark.parametrize("value", [timedelta(0), timedelta(seconds=-2)])
def test_a_refused_timedelta_is_told_in_seconds(value: timedelta) -> None:
    """The error says what was wrong with it, and not that it must be what it is."""
    with pytest.raises(ConfigError, match=f"above 0, not {value.total_seconds():g}"):
        build("timeout", seconds=value)


@pytest.mark.parametrize("value", [timedelta(seconds=2), 2, 2.0])
def test_durations(value: Any) -> None:
    """Seconds or a timedelta, everywhere."""
    build("cached", ttl=value, negative_ttl=value, stale_if_error=value)
    build("retry", base_delay=value, max_delay=value, time_limit=value)
    build("timeout", seconds=value)
    build("circuit_breaker", window=value, open_for=value, max_open_for=value)
    build("bulkhead", max_waiting=1, max_wait=value)
    build("redis", ttl=value, timeout=value, connect_timeout=value)


def test_a_word_that_is_none_of_the_choices_is_told_the_nearest() -> None:
    """That it is text is no news; a class is named, which is no text of anybody's."""
    for build, wanted in (
        (lambda: MemoryStore(snapshot_type=dict), "not the class dict"),  # type: ignore[arg-type]
        (
            lambda: Cached(MemoryStore(), invalidation="of"),  # type: ignore[arg-type]
            "must be one of 'auto', 'required', 'off' (did you mean 'off'?)",
        ),
        (
            lambda: Cached(MemoryStore(), invalidation="marked"),  # type: ignore[arg-type]
            "must be one of 'auto', 'required', 'off'",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            build()
        assert str(caught.value).endswith(wanted)
