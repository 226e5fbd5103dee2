"""Bytes from outside never break anything: hypothesis, and a coverage-guided fuzzer if it is here.

The promises are in ``targets.py``; the second half puts bytes where they stand in a real Redis.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layered_store import RedisStore, SQLStore, StateSnapshot, WriteThrough, find
from layered_store.errors import CorruptDataError
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]

QUICK = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def mutated(draw: st.DrawFn, samples: tuple[bytes, ...]) -> bytes:
    """Any bytes, or a sample with some of it replaced, cut out, doubled or cut off."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=64))
    data = draw(st.sampled_from(samples))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 8)))
        other = draw(st.binary(max_size=6) | st.just(data[start:end] * 2) | st.just(b"null"))
        data = data[:start] + other + data[end:]
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


@pytest.mark.parametrize("name", TARGETS)
def test_samples_are_good(name: str) -> None:
    """What the fuzzers begin with keeps the promises itself."""
    for sample in TARGETS[name].samples:
        TARGETS[name].run(sample)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    """Whatever is read: a result that keeps the promises, or the documented error."""

    @QUICK
    @given(mutated(TARGETS[name].samples))
    def run(data: bytes) -> None:
        TARGETS[name].run(data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_guided_by_coverage(name: str, tmp_path: Path) -> None:
    """A fuzzer that follows new branches finds nothing either."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris has no wheel for this Python and platform")
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "tests.fuzz", name, "--runs", "2000", "--findings", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    assert "Done 2000 runs" in done.stderr


# In Redis, where a record should be

USER = "u-1"
TRUTH = StateSnapshot(USER, 5, axes={"a": 0.5})
RECORDS = TARGETS["record"].samples + TARGETS["stored"].samples


@st.composite
def values(draw: st.DrawFn, sample: bytes) -> bytes:
    """What another program, another release or a fault may have left under a key."""
    return draw(mutated((sample, *RECORDS)))


async def test_a_tier_is_never_believed_or_broken(redis_url: str, sqlite_url: str) -> None:
    """Whatever stands at a user's key in the cache tier, reads and writes answer with the truth."""
    client = redis.asyncio.Redis.from_url(redis_url)
    stack = WriteThrough(RedisStore(redis_url), origin=SQLStore(sqlite_url))
    async with stack:
        await stack.upsert_latest(TRUTH)
        await stack.get_latest(USER)
        (key,) = await _record_keys(client, find(stack, RedisStore)[0])
        await stack.get_latest(USER)
        sample = await client.get(key)
        assert sample
        for data in _examples(sample, 150):
            await client.set(key, data)
            assert await stack.get_latest(USER) == TRUTH
            await client.set(key, data)
            await stack.upsert_latest(TRUTH)
            assert await stack.get_latest(USER) == TRUTH
        for other in ("list", "hash"):
            await client.delete(key)
            await (client.lpush(key, "x") if other == "list" else client.hset(key, "x", "y"))
            assert await stack.get_latest(USER) == TRUTH
            await stack.upsert_latest(TRUTH)
            assert await stack.get_latest(USER) == TRUTH
    await client.aclose()


async def test_a_record_that_is_damaged_concerns_one_user(redis_url: str) -> None:
    """With Redis as the record: that user's state, none or CorruptDataError; a write heals it."""
    client = redis.asyncio.Redis.from_url(redis_url)
    async with RedisStore(redis_url) as store:
        await store.upsert_latest(TRUTH)
        (key,) = await _record_keys(client, store)
        sample = await client.get(key)
        await store.upsert_latest(StateSnapshot("u-2"))
        for data in _examples(sample, 150):
            await client.set(key, data)
            try:
                found = await store.get_latest(USER)
            except CorruptDataError:
                found = None
            assert found is None or found.user_id == USER
            assert await store.get_latest("u-2") is not None
            await store.upsert_latest(TRUTH)
            assert await store.get_latest(USER) == TRUTH
    await client.aclose()


def _examples(sample: bytes, count: int) -> list[bytes]:
    """Return some values, the same in every run."""
    found: list[bytes] = []

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(values(sample))
    def collect(data: bytes) -> None:
        found.append(data)

    collect()
    assert len(found) > count // 2
    return found


async def _record_keys(client: redis.asyncio.Redis, store: RedisStore) -> list[bytes]:
    """Return the keys that hold a record."""
    keys = [key async for key in client.scan_iter(f"{store.prefix}*")]
    kinds = [await client.type(key) for key in keys]
    return [
        key
        for key, kind in zip(keys, kinds, strict=True)
        if kind == b"string" and (await client.get(key)).startswith(b"LS")
    ]
