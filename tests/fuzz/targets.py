"""What is fuzzed: each target takes any bytes, and fails when a promise about them is broken.

A target is a plain function, so that hypothesis (``test_fuzz.py``) and a coverage-guided fuzzer
(``python -m tests.fuzz``) drive the same ones. Its samples are where both begin.
"""

from __future__ import annotations

import asyncio
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from layered_store import Compressed, CorruptDataError, MemoryStore, StateSnapshot, StoreError
from layered_store.codec import CodecError, SnapshotCodec
from layered_store.config import load_stack
from layered_store.errors import ConfigError, ValidationError
from layered_store.sealed import SealedSnapshot
from layered_store.service import create_app
from layered_store.stores.redis.record import STATE, pack, unpack

__all__ = ["MARK", "TARGETS", "Target"]

MARK = "marked-4711"
"""Stands in samples; no error text may show it."""


@dataclass(frozen=True)
class Target:
    """One thing that is fuzzed.

    Args:
        run: does it; an exception is a finding.
        samples: inputs that reach deep, to be mutated.
    """

    run: Callable[[bytes], None]
    samples: tuple[bytes, ...]


class Mood(StateSnapshot):
    """A class of the application's own."""

    mood: str = ""
    tags: tuple[str, ...] = ()


STATES = (
    StateSnapshot(MARK, 5, axes={"warmth": 0.7, "a": 1.0}),
    StateSnapshot("ä名", -1, confidence=0.25),
    Mood(MARK, mood="calm", tags=("x", "y")),
)


def in_range(state: StateSnapshot) -> None:
    """Check what holds of every state that was read from bytes."""
    assert 0.0 <= state.confidence <= 1.0
    assert all(type(name) is str and 0.0 <= value <= 1.0 for name, value in state.axes.items())
    assert -(2**63) <= state.updated_at_unix_ms < 2**63
    assert MARK not in repr(state)


def tells_nothing(error: Exception) -> None:
    """Check that an error's text shows nothing of what was read."""
    assert MARK not in str(error)
    assert len(str(error)) < 2_000


def wire(data: bytes) -> None:
    """JSON from outside: a valid state that reads back as itself, or a ValidationError."""
    for kind in (StateSnapshot, Mood):
        try:
            state = kind.from_json(data)
        except ValidationError as error:
            tells_nothing(error)
            continue
        state.validate()
        in_range(state)
        assert kind.from_json(state.to_json()) == state


def stored(data: bytes) -> None:
    """The stored form: a state in range that reads back as itself, or a CodecError."""
    for kind in (StateSnapshot, Mood):
        codec = SnapshotCodec(kind)
        try:
            state = codec.decode(data, MARK)
        except CodecError as error:
            tells_nothing(error)
            continue
        assert state.user_id == MARK
        if not isinstance(state, SealedSnapshot):
            in_range(state)
        assert codec.decode(codec.encode(state), MARK) == state


def record(data: bytes) -> None:
    """A value under a key of Redis: a record that packs to the same bytes, or none."""
    found = unpack(data)
    if found is not None and (found.body or found.write_ids):
        parts = {"generation": found.generation, "write_ids": found.write_ids}
        assert pack(found.kind, found.version, found.body, **parts) == data  # type: ignore[arg-type]


_compressed = Compressed(MemoryStore(), threshold=0)


def compressed(data: bytes) -> None:
    """What stands where a compressed state should: that user's state, or CorruptDataError."""
    kept = SealedSnapshot(MARK, 5, sealed=data or b"\x00")
    try:
        state = _compressed.up(kept, MARK)
    except CorruptDataError as error:
        tells_nothing(error)
        return
    assert state.user_id == MARK


def config(data: bytes) -> None:
    """A config file in either form: a stack, or a ConfigError that says where."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("stack.toml", "stack.json"):
            path = Path(folder, name)
            path.write_bytes(data)
            try:
                load_stack(path, environ={"SECRET": MARK})
            except ConfigError as error:
                tells_nothing(error)
                assert str(error)


class _Kept(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


_METHODS = ("GET", "POST", "DELETE", "HEAD", "PUT", "OPTIONS", "x")
_PATHS = ("/v1/state", "/v1/state/", "/health", "/metrics", "/openapi.json", "/live", "/")


def http(data: bytes) -> None:
    """One request, made of these bytes: an answer below 500 with a body of the documented form."""
    head, _, rest = data.partition(b"\n")
    headers, _, body = rest.partition(b"\n")
    method = _METHODS[head[0] % len(_METHODS)] if head else "GET"
    path = _PATHS[head[1] % len(_PATHS)] if len(head) > 1 else "/"
    raw, _, query = head[2:].partition(b"?")
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path + raw.decode("utf-8", "surrogateescape"),
        "raw_path": path.encode() + raw,
        "query_string": query,
        "root_path": "",
        "headers": [(name, headers[:200]) for name in (b"accept", b"content-length")[: len(rest)]],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "state": {},
    }
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    kept = _Kept()
    logging.getLogger().addHandler(kept)
    try:
        _run(create_app(MemoryStore(), max_body=500)(scope, receive, send))
    finally:
        logging.getLogger().removeHandler(kept)
    status = sent[0]["status"]
    answer = b"".join(message.get("body", b"") for message in sent)
    assert status < 500, status
    assert b"Traceback" not in answer
    assert MARK not in "".join(kept.lines)
    if status >= 400 and method != "HEAD":
        error = json.loads(answer)["error"]
        assert set(error) == {"code", "message", "request_id"}
        assert MARK not in error["message"]


def _run(coroutine: Any) -> None:
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(coroutine)
    finally:
        loop.close()


def ids(data: bytes) -> None:
    """An id from outside, as text of any kind: taken by every operation, or refused by all."""
    user_id = data[1:].decode("utf-8", "surrogateescape" if data[:1] == b"s" else "replace")
    store = MemoryStore()
    try:
        StateSnapshot(user_id).validate()
    except ValidationError as error:
        assert MARK not in str(error)
        for call in (store.get_latest, store.delete, lambda each: store.get_history(each, 1)):
            try:
                _run(call(user_id))
            except ValidationError:
                continue
            raise AssertionError("one operation takes an id that another refuses") from None
        return
    _run(store.upsert_latest(StateSnapshot(user_id)))
    _run(store.delete(user_id))


_PACKED = SnapshotCodec(StateSnapshot)
_TOML = b"""[store]
use = "cached"
ttl = "60s"
inner = { use = "redis", url = "redis://:${SECRET}@127.0.0.1:6379/0", id = "cache" }
layers = [{ use = "metrics", name = "states" }]
"""

TARGETS = {
    "wire": Target(wire, tuple(state.to_json() for state in STATES)),
    "stored": Target(
        stored,
        (
            *(SnapshotCodec(type(state)).encode(state) for state in STATES),
            _PACKED.encode(SealedSnapshot(MARK, 5, sealed=b"\x01x")),
        ),
    ),
    "record": Target(
        record,
        (
            pack(STATE, 7, b"body", write_ids=[bytes(16)]),
            pack(b"D", 2**53 - 1),
            pack(b"T", 1, generation=b"g" * 16),
        ),
    ),
    "compressed": Target(
        compressed,
        (_compressed.down(STATES[0]).sealed, b"\x01\x78\x9c\x03\x00"),  # type: ignore[attr-defined]
    ),
    "config": Target(
        config,
        (
            _TOML,
            b'{"store": {"use": "cached", "inner": {"use": "memory"}, "ttl": 60}}',
            b'[store]\nuse = "write_through"\ninner = { use = "memory" }\norigin = { use = "sql" }',
        ),
    ),
    "http": Target(
        http,
        (
            b"\x01\x00\n\n" + STATES[0].to_json(),
            b"\x00\x01" + MARK.encode() + b"/history?limit=3\napplication/json\n",
            b"\x02\x01%e4%00/..\n\n",
            b"\x00\x03\napplication/openmetrics-text; version=1.0.0\n",
            b"\x00\x03\napplication/openmetrics-text; version=new\n",
        ),
    ),
    "ids": Target(ids, (b"r" + MARK.encode(), "rä名²٣".encode(), b"s\xed\xa0", b"r" + b"a" * 257)),
}

assert all(issubclass(kind, StoreError) for kind in (CodecError, ConfigError, ValidationError))
