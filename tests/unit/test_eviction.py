"""S3-FIFO: a cachetools cache that scans do not empty."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from cachetools import Cache, LRUCache
from hypothesis import given
from hypothesis import strategies as st

from layered_store.eviction import Node, S3FIFOCache


def zipf_trace(users: int, length: int, seed: int = 1) -> list[int]:
    chance = random.Random(seed)
    weights = [1 / (rank + 1) ** 0.99 for rank in range(users)]
    return chance.choices(range(users), weights, k=length)


def hit_share(cache: Cache[int, int], trace: list[int]) -> float:
    hits = 0
    for key in trace:
        if key in cache:
            hits += 1
            cache[key]
        else:
            cache[key] = key
    return hits / len(trace)


@pytest.mark.parametrize("size", [20, 200])
def test_it_keeps_more_of_what_comes_back_than_lru(size: int) -> None:
    """At 1 and 10 % capacity of a Zipf trace, and with one-time keys mixed in."""
    trace = zipf_trace(2000, 20_000)
    assert hit_share(S3FIFOCache(size), trace) > hit_share(LRUCache(size), trace) + 0.03
    once = iter(range(10_000, 99_999))
    scans = [next(once) if index % 100 < 30 else key for index, key in enumerate(trace)]
    assert hit_share(S3FIFOCache(size), scans) > hit_share(LRUCache(size), scans) + 0.05


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from(["set", "get", "del", "pop"]), st.integers(0, 9))),
)
def test_it_is_a_mapping_of_bounded_size(size: int, steps: list[tuple[str, int]]) -> None:
    """What it holds is what was last set, it never grows, and each eviction is told once."""
    evicted: list[Node] = []
    cache = S3FIFOCache(size, evicted.append)
    model: dict[int, int] = {}
    for value, (step, key) in enumerate(steps):
        evicted.clear()
        if step == "set":
            cache[key] = value
            model[key] = value
            for node in evicted:
                assert model.pop(node.key) == node.value
        elif step == "get":
            assert (key in cache) == (key in model)
            assert cache.get(key) == model.get(key)
        elif step == "del" and key in model:
            del cache[key]
            del model[key]
        elif step == "pop" and model:
            gone, held = cache.popitem()
            assert model.pop(gone) == held
            assert evicted == []
        assert dict(cache.items()) == model
        assert len(cache) == cache.currsize == len(model) <= size
        live = Counter(node.queue for node in cache.nodes.values())
        assert len(cache._small) - cache._small_gone == live[0]
        assert {id(node) for node in (*cache._small, *cache._main)} >= {
            id(node) for node in cache.nodes.values()
        }


def test_the_oldest_is_never_one_that_is_gone() -> None:
    """An entry that was removed and came back is not judged by what it was before."""
    cache = S3FIFOCache(10)
    for key in ("a", "b"):
        cache[key] = 1
    del cache["a"]
    cache["a"] = 2
    assert [node.key for node in cache.oldest()] == ["b"]
    assert next(cache.oldest()) is cache.nodes["b"]


@pytest.mark.parametrize("used", [False, True])
def test_queues_do_not_grow_when_entries_come_and_go(used: bool) -> None:
    """Removed entries are cleared away though the cache never fills."""
    cache = S3FIFOCache(1000)
    for index in range(10_000):
        cache[index] = index
        if used:
            cache[index] = cache[index] + 1
        del cache[index]
    assert len(cache._small) + len(cache._main) <= 64
    cache[1] = 1
    cache.clear()
    assert not cache.nodes
    with pytest.raises(KeyError):
        cache.popitem()
    with pytest.raises(KeyError):
        del cache[1]
    with pytest.raises(KeyError):
        cache[1]


def test_its_repr_shows_no_entry() -> None:
    """Entries are about users."""
    cache = S3FIFOCache(5)
    cache["marked-user"] = "marked-value"
    assert repr(cache) == "S3FIFOCache(maxsize=5, currsize=1)"
