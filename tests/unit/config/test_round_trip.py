"""Every block with every option comes back from its config, alone and in random stacks."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from layered_store.config import json_schema, load_stack, to_config
from layered_store.config.registry import BUILT_IN, Option, kinds, spec_of
from layered_store.errors import ConfigError
from layered_store.stack import describe

pytestmark = pytest.mark.filterwarnings("ignore::layered_store.config.LintWarning")

MEMORY: dict[str, Any] = {"use": "memory"}
URLS = {
    "redis": [
        "redis://127.0.0.1:6379/0",
        "redis://h?socket_timeout=2&db=3",
        "unix:///run/redis.sock",
        "rediss://h:7000/1",
        "redis+cluster://h1,h2:7001",
        "redis+sentinel://h1,h2/main",
    ],
    "sql": [
        "sqlite://",
        "sqlite+aiosqlite:///states.db?timeout=3",
        "postgresql+asyncpg://u@h/db?ssl=require",
        "mysql+aiomysql://u@h:3307/db?charset=utf8mb4",
    ],
}
TEXTS: dict[str, Any] = {
    "name": st.from_regex(r"\A[a-z_][a-z0-9_]{0,9}\Z"),
    "prefix": st.text("abc:_-$ü", min_size=1, max_size=9),
    "latest_table": st.from_regex(r"\Al_[a-z0-9_]{0,9}\Z"),
    "history_table": st.from_regex(r"\Ah_[a-z0-9_]{0,9}\Z"),
    "order": st.sampled_from(["arrival", "snapshot_time"]),
    "invalidation": st.sampled_from(["auto", "off"]),
    "time_hits": st.sampled_from(["sampled", "all"]),
    "prefixed.prefix": st.text("abc_-ü: ", min_size=2, max_size=9),
    "level": st.integers(1, 9),
    "layer": st.sampled_from([{"use": "timeout", "seconds": 2.5}, {"use": "cached", "ttl": "5s"}]),
}
"""Values of the options that take text, but not any text, and of others with a range."""

DURATIONS = st.sampled_from(["30s", "250ms", "5m", "1h", "1h30m", "2d", 7, 0.5, 12.25])


def values(kind: str, option: Option) -> st.SearchStrategy[Any]:
    """Values that a file may give this option."""
    forms = []
    if option.name == "url":
        forms.append(st.sampled_from(URLS[kind]))
    elif (name := f"{kind}.{option.name}") in TEXTS or (name := option.name) in TEXTS:
        forms.append(TEXTS[name])
    elif option.choices:
        forms.append(st.sampled_from(option.choices))
    elif option.duration:
        forms.append(DURATIONS)
    elif type in option.accepts:
        forms.append(st.just("layered_store.snapshot:StateSnapshot"))
    elif bool in option.accepts:
        forms.append(st.booleans())
    elif int in option.accepts:
        forms.append(st.integers(1, 200))
    elif float in option.accepts:
        forms.append(st.floats(0.01, 0.9))
    elif list in option.accepts:
        item = {str: st.sampled_from(["a", "b"]), int: st.integers(1, 9)}
        forms.append(st.lists(item.get(option.item or str, st.floats(0.1, 0.9)), max_size=3))
    elif dict in option.accepts:
        forms.append(st.dictionaries(st.sampled_from(["a", "b"]), st.integers(1, 9), max_size=2))
    elif str in option.accepts:
        forms.append(st.from_regex(r"\A[a-z]{1,9}\Z"))
    if option.nullable and (not option.required):
        forms.append(st.none())
    return st.one_of(forms)


def blocks(kind: str, inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Tables of one kind with any of its options."""
    required: dict[str, Any] = {"use": st.just(kind)}
    optional: dict[str, Any] = {}
    for option in spec_of(kind).options:
        # A secret comes back masked, so it cannot come back as it was.
        if not option.from_file or option.secret:
            continue
        given = inner if option.store else values(kind, option)
        must = option.required or option.name == "url"
        (required if must else optional)[option.name] = given
    # One of two options that exclude each other.
    one_of = [optional.pop(name) for name in ("alternative", "layer") if name in optional]
    tables = [
        st.fixed_dictionaries({**required, name: given}, optional=optional)
        for name, given in zip(("alternative", "layer"), one_of, strict=False)
    ]
    return st.one_of(tables) if tables else st.fixed_dictionaries(required, optional=optional)


def needs_secret(kind: str) -> bool:
    """Tell whether a block cannot be built from what ``to_config`` gives."""
    return any(option.secret and option.required for option in spec_of(kind).options)


LAYERS = [kind for kind in BUILT_IN if spec_of(kind).is_layer and not needs_secret(kind)]
ENDS = [kind for kind in BUILT_IN if not spec_of(kind).is_layer]

stacks = st.recursive(
    st.one_of([blocks(kind, st.just(MEMORY)) for kind in ENDS]),
    lambda inner: st.one_of([blocks(kind, inner) for kind in LAYERS]),
    max_leaves=4,
)


def built(config: Any) -> Any:
    try:
        return load_stack(config)
    except ConfigError:
        assume(False)  # two options that exclude each other, or a linter's error


@given(config=stacks)
@settings(deadline=None)
def test_random_stacks(config: dict[str, Any]) -> None:
    """What ``to_config`` gives, also through JSON, builds a stack that describes the same."""
    stack = built(config)
    written = to_config(stack)
    again = load_stack(json.loads(json.dumps(written)))
    assert describe(again) == describe(stack)
    assert repr(again) == repr(stack)
    assert to_config(again) == written


@given(data=st.data(), inner=st.sampled_from(["layers", "inner"]))
@settings(deadline=None)
def test_layers_and_inner_are_equal(data: st.DataObject, inner: str) -> None:
    """A layer written as ``inner`` and one written in ``layers`` are the same stack."""
    chain = data.draw(st.lists(st.sampled_from(LAYERS), max_size=4))
    tables = [data.draw(blocks(kind, st.just(MEMORY))) for kind in chain]
    nested: Any = MEMORY
    for table in reversed(tables):
        nested = {**table, "inner": nested}
    entries = [{key: value for key, value in table.items() if key != "inner"} for table in tables]
    assert repr(built(nested)) == repr(built({**MEMORY, "layers": entries}))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, option.name)
        for kind in BUILT_IN
        if not needs_secret(kind)
        for option in spec_of(kind).options
        if option.from_file and not option.store and not option.secret
    ],
)
def test_every_option(kind: str, name: str) -> None:
    """No option is left out of the property above: each loads with a value that is no default."""
    schema = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())
    option = spec_of(kind).option(name)
    assert option is not None
    other = values(kind, option).filter(lambda value: value != option.default)
    if name == "snapshot_type":
        other = values(kind, option)

    @given(table=blocks(kind, st.just(MEMORY)), value=other)
    @settings(
        deadline=None,
        max_examples=15,
        database=None,
        # Options that need others, such as max_wait, fit few of the drawn tables.
        suppress_health_check=[HealthCheck.filter_too_much],
    )
    def check(table: dict[str, Any], value: Any) -> None:
        config = {"store": {**table, name: value}}
        stack = built(config)
        assert list(schema.iter_errors(config)) == []
        again = load_stack(to_config(stack))
        assert getattr(again, name) == getattr(stack, name)

    check()


def test_loading_opens_no_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Whatever the blocks, loading neither connects nor looks up a host nor makes a file."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.chdir(tmp_path)
    for redis in URLS["redis"]:
        for sql in URLS["sql"]:
            load_stack(
                {
                    "use": "cached",
                    "layers": [{"use": "metrics", "name": "loading"}],
                    "inner": {"use": "redis", "url": redis, "layers": [{"use": "retry"}]},
                    "fallback": {"use": "sql", "url": sql, "layers": [{"use": "retry"}]},
                }
            )
    assert list(tmp_path.iterdir()) == []


def test_every_kind_has_docs_for_every_option() -> None:
    """The schema, which editors show, says of each option what it means."""
    bare = [
        f"{kind}.{option.name}"
        for kind in kinds()
        for option in spec_of(kind).options
        if not option.doc
    ]
    assert bare == []
