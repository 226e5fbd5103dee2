"""Loading, checking and writing back config files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cachetools import LRUCache
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from layered_store.config import json_schema, load_stack, to_config
from layered_store.errors import ConfigError
from layered_store.interface import StateStore
from layered_store.layers.cached import Cached
from layered_store.layers.metrics import Metrics
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stack import describe, find, replace
from layered_store.stores.memory import MemoryStore
from layered_store.stores.redis import RedisStore
from layered_store.stores.sql import SQLStore
from layered_store.testing import FakeClock

MEMORY: dict[str, Any] = {"use": "memory"}
CYCLE: dict[str, Any] = {"use": "cached"}
CYCLE["inner"] = CYCLE
LAYER_CYCLE: dict[str, Any] = {"use": "memory"}
LAYER_CYCLE["layers"] = [LAYER_CYCLE]
DEEP: dict[str, Any] = MEMORY
for _ in range(60):
    DEEP = {"use": "cached", "inner": DEEP}
ENDLESS_TABLE: dict[str, Any] = {}
ENDLESS_TABLE["a"] = ENDLESS_TABLE
ENDLESS_LIST: list[Any] = []
ENDLESS_LIST.append(ENDLESS_LIST)
ENDLESS_DEFAULT = "5"
for _ in range(2_000):
    ENDLESS_DEFAULT = "${NOT_SET_ANYWHERE:-" + ENDLESS_DEFAULT + "}"
SECRET = "hunter2-marked-secret"  # noqa: S105


class Special(StateSnapshot):
    """A user's own snapshot."""

    mood: str = ""

    class Inner(StateSnapshot):
        """One that stands in another class."""


def test_layers_stand_outermost_first() -> None:
    """``layers`` wraps the block, the first entry outermost, and durations are read."""
    stack = load_stack(
        {
            "store": {
                "use": "write_through",
                "inner": {"use": "memory", "id": "cache"},
                "origin": {"use": "memory", "history_limit": 5},
                "layers": [{"use": "cached", "ttl": "1m30s", "max_entries": 7}],
            }
        }
    )
    assert [block.kind for block in describe(stack)] == [
        "cached",
        "write_through",
        "memory",
        "memory",
    ]
    assert isinstance(stack, Cached)
    assert stack.ttl == 90
    assert [block.id for block in describe(stack)] == [None, None, "cache", None]


def test_inner_is_the_same_as_a_layers_entry() -> None:
    """Both ways of writing a layer build the same stack."""
    nested = load_stack({"use": "cached", "ttl": 5, "inner": MEMORY})
    listed = load_stack({"use": "memory", "layers": [{"use": "cached", "ttl": 5}]})
    assert repr(nested) == repr(listed)


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_files(tmp_path: Path, suffix: str) -> None:
    """TOML and JSON files hold the same, and the environment fills in texts and numbers."""
    path = tmp_path / f"stack.{suffix}"
    if suffix == "toml":
        path.write_text('[store]\nuse = "memory"\nhistory_limit = "${LIMIT:-3}"\n')
    else:
        path.write_text(json.dumps({"store": {**MEMORY, "history_limit": "${LIMIT:-3}"}}))
    first, second = load_stack(path), load_stack(path, environ={"LIMIT": "9"})
    assert (first.history_limit, second.history_limit) == (3, 9)  # type: ignore[attr-defined]


def test_none_can_be_said_in_toml() -> None:
    """``"none"`` stands for None, which TOML lacks, and comes back as null."""
    stack = load_stack({**MEMORY, "history_limit": "none"})
    assert stack.history_limit is None  # type: ignore[attr-defined]
    assert to_config(stack)["store"]["history_limit"] is None
    assert load_stack(to_config(stack)).history_limit is None  # type: ignore[attr-defined]


def test_a_dict_may_hold_the_class_itself() -> None:
    """Of snapshots; it is written back by its name."""
    stack = load_stack({"use": "memory", "snapshot_type": Special})
    assert stack.snapshot_type is Special
    assert to_config(stack)["store"]["snapshot_type"] == f"{__name__}:Special"
    stack = load_stack({"use": "memory", "snapshot_type": Special.Inner})
    assert load_stack(to_config(stack)).snapshot_type is Special.Inner
    assert list(Draft202012Validator(json_schema()).iter_errors(to_config(stack))) == []
    with pytest.raises(ConfigError) as caught:
        load_stack({"use": "memory", "snapshot_type": dict})
    assert caught.value.path == "store.snapshot_type"


def test_overrides_take_the_place_and_keep_the_layers() -> None:
    """An override stands where the block stood, under its id; the replaced block is not built."""
    mine = MemoryStore()
    config = {"use": "sql", "url": "${NOT_SET_ANYWHERE}", "id": "db", "layers": [{"use": "cached"}]}
    stack = load_stack(config, overrides={"db": mine}, environ={})
    assert find(stack, MemoryStore) == [mine]
    assert isinstance(stack, Cached)
    other = MemoryStore()
    assert find(replace(stack, "db", other), MemoryStore) == [other]


def test_loading_imports_only_what_it_uses() -> None:
    """A stack in memory needs neither driver, and no connection library is imported."""
    code = (
        "import sys; from layered_store.config import load_stack;"
        "load_stack({'use': 'cached', 'inner': {'use': 'memory'}});"
        "print([m for m in ('redis', 'sqlalchemy', 'prometheus_client') if m in sys.modules])"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_several_problems_are_told_at_once() -> None:
    """Every problem is in the error, each with its path, and range errors of one block too."""
    bad = {
        "store": {
            "use": "cached",
            "ttl": -1,
            "max_entries": 0,
            "inner": {"use": "memory", "history_limit": "x", "histroy": 1},
        },
        "stoer": 1,
    }
    with pytest.raises(ConfigError) as caught:
        load_stack(bad)
    paths = {problem.path for problem in caught.value.problems}
    assert paths == {
        "stoer",
        "store.ttl",
        "store.max_entries",
        "store.inner.history_limit",
        "store.inner.histroy",
    }


BAD: list[tuple[Any, str]] = [
    ({}, "store"),
    ({"store": None}, "store"),
    ({"store": []}, "store"),
    ({"store": "memory"}, "store"),
    ({"store": 5}, "store"),
    ({"store": True}, "store"),
    ({"store": {}}, "store"),
    ({"sotre": MEMORY, "store": MEMORY}, "sotre"),
    ({"store": {"use": 5}}, "store.use"),
    ({"store": {"use": None}}, "store.use"),
    ({"store": {"use": ["memory"]}}, "store.use"),
    ({"store": {"use": ""}}, "store.use"),
    ({"store": {"use": "memry"}}, "store.use"),
    ({"store": {"use": "os:system"}}, "store.use"),
    ({"store": {"use": "../memory"}}, "store.use"),
    ({"store": {"use": "MemoryStore"}}, "store.use"),
    ({"store": {"use": "memory\n"}}, "store.use"),
    ({"store": {"use": "x" * 5000}}, "store.use"),
    ({"store": {"use": "memory", "ttl": 5}}, "store.ttl"),
    ({"store": {"use": "memory", 5: 5}}, "store.5"),
    ({"store": {"use": "memory", "inner": MEMORY}}, "store.inner"),
    ({"store": {"use": "memory", "clock": "now"}}, "store.clock"),
    ({"store": {"use": "memory", "id": 5}}, "store.id"),
    ({"store": {"use": "memory", "id": ""}}, "store.id"),
    ({"store": {"use": "memory", "id": []}}, "store.id"),
    ({"store": {"use": "memory", "snapshot_type": "nowhere"}}, "store.snapshot_type"),
    ({"store": {"use": "memory", "snapshot_type": "no.where:Thing"}}, "store.snapshot_type"),
    ({"store": {"use": "memory", "snapshot_type": "json:dumps"}}, "store.snapshot_type"),
    ({"store": {"use": "memory", "snapshot_type": "json:JSONDecoder"}}, "store.snapshot_type"),
    ({"store": {"use": "memory", "snapshot_type": 5}}, "store.snapshot_type"),
    ({"store": {"use": "memory", "snapshot_type": "json:a..b"}}, "store.snapshot_type"),
    ({"store": {"use": "memory", "snapshot_type": "json:"}}, "store.snapshot_type"),
    ({"store": {"use": "memory", "layers": {}}}, "store.layers"),
    ({"store": {"use": "memory", "layers": "cached"}}, "store.layers"),
    ({"store": {"use": "memory", "layers": 5}}, "store.layers"),
    ({"store": {"use": "memory", "layers": ["cached"]}}, "store.layers.0"),
    ({"store": {"use": "memory", "layers": [{}]}}, "store.layers.0"),
    ({"store": {"use": "memory", "layers": [MEMORY]}}, "store.layers.0.use"),
    ({"store": {"use": "memory", "layers": [{"use": "chached"}]}}, "store.layers.0.use"),
    (
        {"store": {"use": "memory", "layers": [{"use": "cached", "inner": MEMORY}]}},
        "store.layers.0.inner",
    ),
    (
        {"store": {"use": "memory", "layers": [{"use": "cached", "layers": []}]}},
        "store.layers.0.layers",
    ),
    (
        {"store": {"use": "memory", "layers": [{"use": "cached"}, {"use": "cached", "tll": 1}]}},
        "store.layers.1.tll",
    ),
    ({"store": {"use": "cached"}}, "store.inner"),
    ({"store": {"use": "cached", "inner": 5}}, "store.inner"),
    ({"store": {"use": "cached", "inner": "memory"}}, "store.inner"),
    ({"store": {"use": "cached", "inner": None}}, "store.inner"),
    ({"store": {"use": "cached", "inner": {}}}, "store.inner"),
    ({"store": {"use": "cached", "inner": {"use": "nope"}}}, "store.inner.use"),
    ({"store": {"use": "write_through", "inner": MEMORY}}, "store.origin"),
    ({"store": {"use": "write_through", "origin": MEMORY}}, "store.inner"),
    ({"store": {"use": "write_through", "inner": MEMORY, "origin": 1}}, "store.origin"),
    (
        {"store": {"use": "write_through", "inner": MEMORY, "origin": MEMORY, "orgin": 1}},
        "store.orgin",
    ),
    (CYCLE, "store.inner"),
    (LAYER_CYCLE, "store.layers.0"),
    (DEEP, "store" + ".inner" * 33),
    *[
        ({"store": {"use": "memory", "history_limit": value}}, "store.history_limit")
        for value in (ENDLESS_TABLE, ENDLESS_LIST, ENDLESS_DEFAULT)
    ],
    ({"store": {"use": "encrypted", "inner": MEMORY, "keys": ENDLESS_LIST}}, "store.keys"),
    ({"store": {"use": "memory", "id": ENDLESS_DEFAULT}}, "store.id"),
    ({"store": {"use": ENDLESS_DEFAULT}}, "store.use"),
    ({"store": MEMORY, "lint": 5}, "lint"),
    ({"store": MEMORY, "lint": {"allow": 5}}, "lint.allow"),
    ({"store": MEMORY, "lint": {"allow": ["LS999"]}}, "lint.allow.LS999"),
    ({"store": MEMORY, "lint": {"allow": {"LS022": 5}}}, "lint.allow.LS022"),
    *[
        ({"store": MEMORY, "lint": {"max_staleness": value}}, "lint.max_staleness")
        for value in ("x", -1, True, [], float("nan"), float("inf"), 10**400 * -1)
    ],
    ({"store": MEMORY, "lint": {"alow": []}}, "lint.alow"),
    ({"store": MEMORY, "lint": {"max_staleness": "soon"}}, "lint.max_staleness"),
    ({"store": MEMORY, "lint": {"max_staleness": True}}, "lint.max_staleness"),
    (
        {
            "store": {
                "use": "write_through",
                "id": "a",
                "inner": {"use": "memory", "id": "a"},
                "origin": MEMORY,
            }
        },
        "store.inner.id",
    ),
    *[
        ({"store": {"use": "memory", "history_limit": value}}, "store.history_limit")
        for value in (
            -1,
            1.5,
            True,
            "many",
            [],
            {},
            "${NOT_SET_ANYWHERE}",
            "${",
            "${}",
            "${A B}",
            "${A:-x}",
            float("nan"),
            float("inf"),
            "-3",
            "3s",
        )
    ],
    *[
        ({"store": {"use": "cached", "inner": MEMORY, "ttl": value}}, "store.ttl")
        for value in (
            0,
            -1,
            "0s",
            "-5s",
            "forever",
            True,
            None,
            [],
            {},
            float("nan"),
            float("inf"),
            10**400,
            "1e9s",
            "5 minutes",
            "${NOT_SET_ANYWHERE}s",
            "99" * 400 + "d",
        )
    ],
    *[
        ({"store": {"use": "cached", "inner": MEMORY, "max_entries": value}}, "store.max_entries")
        for value in (0, -5, "10", 1.0, None, True)
    ],
    *[
        ({"store": {"use": "cached", "inner": MEMORY, "invalidation": value}}, "store.invalidation")
        for value in ("on", "", 5, None, "required")
    ],
    ({"store": {"use": "cached", "inner": MEMORY, "refresh_ahead": 1.5}}, "store.refresh_ahead"),
    ({"store": {"use": "cached", "inner": MEMORY, "refresh_ahead": "half"}}, "store.refresh_ahead"),
    ({"store": {"use": "cached", "inner": MEMORY, "ttl_jitter": 1}}, "store.ttl_jitter"),
    ({"store": {"use": "cached", "inner": MEMORY, "stale_if_error": -1}}, "store.stale_if_error"),
    ({"store": {"use": "cached", "inner": MEMORY, "cache": {}}}, "store.cache"),
    ({"store": {"use": "cached", "inner": MEMORY, "random": 5}}, "store.random"),
    ({"store": {"use": "cached", "inner": MEMORY, "fallback": 5}}, "store.fallback"),
]


def test_there_are_a_hundred_bad_configs() -> None:
    """The list below is as long as it should be."""
    assert len(BAD) >= 100


@pytest.mark.parametrize(("config", "path"), BAD, ids=range(len(BAD)))
def test_bad_configs_name_the_place(config: dict[str, Any], path: str) -> None:
    """Each wrong config is a ConfigError that names the place and says what to do."""
    with pytest.raises(ConfigError) as caught:
        load_stack(config, environ={"A": SECRET})
    places = [problem.path for problem in (caught.value.problems or (caught.value,))]
    assert path in places
    assert len(str(caught.value)) > len(path) + 10
    assert len(str(caught.value)) < 3000
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "suggestion"),
    [
        ({"use": "memry"}, "memory"),
        ({"use": "write-through"}, "write_through"),
        ({"use": "memory", "history_limt": 1}, "history_limit"),
        ({"store": MEMORY, "lnt": {}}, "lint"),
    ],
)
def test_nearest_name(config: dict[str, Any], suggestion: str) -> None:
    """A misspelled name is answered with the nearest known one."""
    with pytest.raises(ConfigError) as caught:
        load_stack(config)
    assert caught.value.suggestion == suggestion
    assert f"did you mean {suggestion!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"use": "sql", "ulr": "sqlite://"}, "ulr"),
        ({"use": "redis", "urll": "redis://h"}, "urll"),
        ({"use": "timeout", "secnds": 1, "inner": MEMORY}, "secnds"),
        ({"use": "write_through", "inner": MEMORY, "orgin": MEMORY}, "orgin"),
        ({"use": "ramp", "inner": MEMORY, "alternativ": MEMORY}, "alternativ"),
    ],
)
def test_a_misspelt_option_is_not_said_to_be_missing_too(table: dict[str, Any], key: str) -> None:
    """One mistake is one problem; other mistakes are told beside it."""
    with pytest.raises(ConfigError) as caught:
        load_stack(table)
    assert (caught.value.path, caught.value.problems) == (f"store.{key}", ())
    with pytest.raises(ConfigError) as caught:
        load_stack({**table, "id": 5, "colour": "red"})
    paths = [problem.path for problem in caught.value.problems]
    assert sorted(paths[:2]) == sorted([f"store.{key}", "store.colour"])
    assert paths[2:] == ["store.id"]


def test_what_stands_for_none_is_told() -> None:
    """A file has no null; where None is no value, nor is the word."""
    table = {"use": "sql", "url": "sqlite+aiosqlite://"}
    with pytest.raises(ConfigError, match='must be a whole number or "none", not text'):
        load_stack({**table, "history_limit": "None"})
    with pytest.raises(ConfigError, match="must be a whole number, not text"):
        load_stack({**table, "pool_size": "None"})


def test_nearest_choice() -> None:
    """Of an option that takes one of a few words; where none is near, none is named."""
    table = {"use": "sql", "url": "sqlite+aiosqlite://"}
    with pytest.raises(ConfigError, match="did you mean 'arrival'"):
        load_stack({**table, "order": "arival"})
    with pytest.raises(ConfigError, match="must be .*arrival") as caught:
        load_stack({**table, "order": "42"})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.toml", b"[store\n"),
        ("a.toml", b"\xff\xfe"),
        ("a.toml", b'url = "' + SECRET.encode() + b'" x'),
        ("a.json", b"{"),
        ("a.json", b"[]"),
        ("a.json", b"[" * 100_000),
        ("a.yaml", b"store: {}"),
        ("a.toml", b"#" * 1_000_001),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes) -> None:
    """A file that cannot be read is a ConfigError that quotes nothing of it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_stack(path)
    assert SECRET not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        load_stack(tmp_path / "nothing.toml")


def test_an_override_of_a_layer_takes_what_it_wraps_along() -> None:
    """In a list of layers as with ``inner``: nothing inside is built, nor asks for variables."""
    mine = MemoryStore()
    layers = [
        {"use": "metrics", "name": "outer"},
        {"use": "cached", "id": "cache", "ttl": "${TTL}"},
        {"use": "retry"},
    ]
    listed = {"use": "sql", "url": "${URL}", "layers": layers}
    nested = {
        "use": "metrics",
        "name": "outer",
        "inner": {"use": "cached", "id": "cache", "inner": {"use": "sql", "url": "${URL}"}},
    }
    for config in (listed, nested):
        stack = load_stack(config, overrides={"cache": mine}, environ={})
        assert isinstance(stack, Metrics)
        assert stack.inner is mine
    taken = {**layers[1], "id": "taken"}
    with pytest.raises(ConfigError, match="already that of") as caught:
        load_stack(
            {
                "use": "fallback",
                "inner": {**MEMORY, "layers": [taken]},
                "secondary": {**MEMORY, "id": "taken"},
            },
            overrides={"taken": mine},
            environ={},
        )
    assert caught.value.path == "store.secondary.id"


def test_unknown_override() -> None:
    """An override without a block of its id is refused, with the nearest id."""
    with pytest.raises(ConfigError) as caught:
        load_stack({**MEMORY, "id": "cache"}, overrides={"cahce": MemoryStore()})
    assert caught.value.suggestion == "cache"


def test_the_environment_is_not_parsed_again() -> None:
    """A value of the environment is taken as it is, whatever it holds."""
    with pytest.raises(ConfigError):
        load_stack({**MEMORY, "history_limit": "${A}"}, environ={"A": "${B}", "B": "5"})


stores = st.recursive(
    st.builds(
        lambda limit: {"use": "memory", **limit},
        st.fixed_dictionaries({}, optional={"history_limit": st.integers(0, 50) | st.none()}),
    ),
    lambda inner: (
        st.builds(
            lambda inner, options: {"use": "cached", "inner": inner, **options},
            inner,
            st.fixed_dictionaries(
                {},
                optional={
                    "ttl": st.sampled_from(["30s", "250ms", 5, 0.5]),
                    "max_entries": st.integers(1, 99),
                    "negative_ttl": st.integers(0, 9),
                    "refresh_ahead": st.sampled_from([None, 0.5]),
                    "invalidation": st.sampled_from(["auto", "off"]),
                },
            ),
        )
        | st.builds(
            lambda inner, layers: (
                {"use": "write_through", "inner": inner, "origin": MEMORY} | {"layers": layers}
            ),
            inner,
            st.lists(
                st.sampled_from(
                    [
                        {"use": "retry", "attempts": 2, "base_delay": "10ms", "time_limit": None},
                        {"use": "timeout", "seconds": "2s"},
                        {"use": "circuit_breaker", "open_for": "7s"},
                        {"use": "bulkhead", "max_in_flight": 3},
                    ]
                ),
                max_size=3,
            ),
        )
        | st.builds(
            lambda inner, other: {"use": "fallback", "inner": inner, "secondary": other},
            inner,
            inner,
        )
        | st.builds(
            lambda inner, origin: {"use": "write_through", "inner": inner, "origin": origin},
            inner,
            inner,
        )
    ),
    max_leaves=5,
)


@given(config=stores)
@pytest.mark.filterwarnings("ignore::layered_store.config.LintWarning")
def test_round_trip(config: dict[str, Any]) -> None:
    """Whatever stack: what ``to_config`` gives back builds a stack that describes the same."""
    stack = load_stack(config)
    again = load_stack(json.loads(json.dumps(to_config(stack))))
    assert describe(again) == describe(stack)
    assert to_config(again) == to_config(stack)


@pytest.mark.parametrize(
    ("stack", "name", "kind"),
    [
        (RedisStore(client=Redis(password=SECRET)), "client", "Redis"),
        (SQLStore(engine=create_async_engine("sqlite+aiosqlite://")), "engine", "AsyncEngine"),
        (Cached(MemoryStore(), cache=LRUCache(9)), "cache", "LRUCache"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_object_is_left_out_silently(stack: StateStore, name: str, kind: str) -> None:
    """It is shown by its class; loading names it and the remedy, rather than take another."""
    written = to_config(stack)
    (block,) = written["store"].get("layers", [written["store"]])
    assert block[name] == f"<{kind}>"
    assert SECRET not in str(written)
    with pytest.raises(ConfigError, match=rf"{name}: takes an object.* overrides=") as caught:
        load_stack(written)
    assert str(caught.value.path).endswith(name)


def test_what_belongs_to_the_process_is_no_part_of_the_file() -> None:
    """A stack with a registry and a clock of its own, as in tests, can be written and loaded."""
    clock = FakeClock()
    inner = Cached(MemoryStore(clock=clock), ttl=9, clock=clock, random=Random(7))
    stack = Metrics(inner, name="s", registry=CollectorRegistry(), exemplar=dict, clock=clock)
    written = to_config(stack)
    again = load_stack(written)
    assert describe(again) == describe(stack)
    assert to_config(again) == written


def test_replace_by_id_and_class() -> None:
    """``replace`` swaps one block and builds the others anew, sharing nothing."""
    stack = load_stack(
        {"use": "memory", "id": "db", "layers": [{"use": "cached", "id": "l1", "ttl": 9}]}
    )
    new = MemoryStore()
    by_id, by_class = replace(stack, "db", new), replace(stack, MemoryStore, new)
    for twin in (by_id, by_class):
        assert isinstance(twin, Cached)
        assert twin is not stack
        assert twin.inner is new
        assert (twin.ttl, describe(twin)[0].id) == (9, "l1")


def test_replace_refuses_what_is_not_there() -> None:
    """A target that matches no block, or several, is refused."""
    stack = WriteThrough(MemoryStore(), origin=MemoryStore())
    for target in ("nothing", Cached, MemoryStore):
        with pytest.raises(ConfigError):
            replace(stack, target, MemoryStore())


def test_a_misspelt_target_or_override_is_told() -> None:
    """With the ids that there are and the nearest; a store in a table with how to pass it."""
    stack = load_stack({"use": "memory", "id": "cache"})
    with pytest.raises(ConfigError) as caught:
        replace(stack, "chache", MemoryStore())
    assert caught.value.suggestion == "cache"
    assert "ids of this stack: cache" in str(caught.value)
    with pytest.raises(ConfigError, match="ids of this stack: none"):
        replace(MemoryStore(), "cache", MemoryStore())
    with pytest.raises(ConfigError, match="WriteThrough is no block of this stack, which has Mem"):
        replace(stack, WriteThrough, MemoryStore())
    with pytest.raises(ConfigError, match="this MemoryStore is no block of this stack"):
        replace(stack, MemoryStore(), MemoryStore())
    with pytest.raises(ConfigError, match="overrides: must be a dict of stores by id, not list"):
        load_stack({"use": "memory"}, overrides=[MemoryStore()])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="store.inner: .*; pass it with overrides"):
        load_stack({"use": "cached", "inner": MemoryStore()})


async def test_replace_empties_a_cache_object() -> None:
    """A rebuilt Cached does not share the cache object that was passed in."""
    from cachetools import LRUCache

    from layered_store.snapshot import StateSnapshot

    inner = MemoryStore()
    stack = Cached(inner, cache=LRUCache(5))
    await stack.upsert_latest(StateSnapshot("u-1"))
    await stack.get_latest("u-1")
    assert stack.cache is not None
    twin = replace(stack, inner, MemoryStore())
    assert isinstance(twin, Cached)
    assert twin.cache is not None
    assert len(stack.cache) == 1
    assert len(twin.cache) == 0
    assert await twin.get_latest("u-1") is None


def test_unregistered_block_has_no_config() -> None:
    """A block that no kind names cannot be written, and the error says what to do."""

    class Odd(MemoryStore):
        pass

    with pytest.raises(ConfigError, match=r"layered_store\.blocks"):
        to_config(Odd())


def test_third_party_block(tmp_path: Path) -> None:
    """An entry point of the group adds a kind, with its options, and round-trips."""
    (tmp_path / "odd.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from layered_store.layer import Layer\n"
        "@dataclass(eq=False, repr=False)\n"
        "class Odd(Layer):\n"
        '    """Odd.\n\n    Args:\n        size: how odd.\n    """\n'
        "    size: int = field(default=1, kw_only=True)\n"
        "    steps: list[int] = field(default_factory=list, kw_only=True)\n"
    )
    info = tmp_path / "odd-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[layered_store.blocks]\nodd = odd:Odd\n")
    code = (
        "from layered_store.config import json_schema, load_stack, to_config, json_schema\n"
        "def build(**more):\n"
        "    return load_stack({'use': 'memory', 'layers': [{'use': 'odd', **more}]})\n"
        "s = build(size=3)\n"
        "print(to_config(s)['store']['layers'], 'layer.odd' in json_schema()['$defs'])\n"
        "s = build(steps=[1, '${STEP:-2}'])\n"
        "print(s.steps, to_config(s)['store']['layers'])\n"
        "try: build(steps=[1, 'x'])\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        },
    )
    assert done.stdout.splitlines() == [
        "[{'use': 'odd', 'size': 3}] True",
        "[1, 2] [{'use': 'odd', 'steps': [1, 2]}]",
        "store.layers.0.steps: must be a list of whole numbers; an item is something else",
    ]


def test_all_blocks_are_stores() -> None:
    """What loading returns is a StateStore, closed by nobody yet."""
    assert isinstance(load_stack(MEMORY), StateStore)


def test_a_block_that_points_back() -> None:
    """A third party's block that knows what it stands in is walked and printed once."""
    from layered_store.config import lint

    class Aware(MemoryStore):
        parent: StateStore

        def children(self) -> dict[str, StateStore]:
            return {"parent": self.parent}

    end = Aware()
    stack = Cached(end)
    end.parent = stack
    assert repr(stack) == "Cached(Aware())"
    assert [block.name for block in describe(stack)] == ["Cached", "Aware"]
    assert lint(stack)
