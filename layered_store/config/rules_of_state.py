"""Rules about state: how old an answer may be, who may lose it, who counts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import parse_qs, urlsplit

from layered_store.coherence.contract import Invalidations
from layered_store.config.lint_view import RULES, At, Rule, Severity, is_a, number, rule
from layered_store.interface import StateStore, ability_of
from layered_store.stack import Place, children_of, staleness, walk

__all__ = ["shared_keys"]


@rule("LS009", Severity.WARNING, "in-process TTL longer than the shared tier's", of="cached")
def _ttl_order(at: At) -> str | None:
    ttl = number(at.store, "ttl")
    if ttl is None:
        return None
    for tier in at.over("redis"):
        shared = number(tier, "ttl")
        if shared is not None and ttl > shared:
            return (
                f"an entry lives {ttl:g} s here but {shared:g} s in Redis below: this process would"
                " answer with what the shared tier has dropped; make the TTL here the shorter"
            )
    return None


@rule(
    "LS011",
    Severity.WARNING,
    "in-process cache over a shared tier with no invalidation",
    of="cached",
)
def _no_channel(at: At) -> str | None:
    if not any(map(_is_shared_tier, at.places_below)):
        return None
    if getattr(at.store, "invalidation", "auto") != "off" and _channel_below(at):
        return None
    late, no_bound = staleness(at.store)
    when = "late or never" if no_bound else f"up to {late or number(at.store, 'ttl') or 0:g} s late"
    return (
        f"another process's write or erasure shows here {when}; use"
        " WriteThrough(RedisStore(url), origin=SQLStore(url)) below with invalidation='auto'"
    )


def _is_shared_tier(place: Place) -> bool:
    """Tell whether a block is Redis, or any cache tier that other processes may use too."""
    if is_a(place.store, "redis"):
        return True
    tier = children_of(place.store).get("inner") if is_a(place.store, "write_through") else None
    return tier is not None and not any(is_a(each.store, "memory") for each in walk(tier))


def _channel_below(at: At) -> bool:
    inner = at.child("inner")
    return inner is not None and ability_of(inner, Invalidations) is not None


@rule("LS017", Severity.ERROR, "a layer that does not forward")
def _forwards(at: At) -> str | None:
    if not children_of(at.store):
        return None
    hidden = [
        name
        for name, ways in (
            ("delete", ("delete",)),
            ("get_history", ("get_history",)),
            ("health", ("health_check", "health_report")),
        )
        if all(getattr(type(at.store), way, None) is getattr(StateStore, way) for way in ways)
    ]
    if not hidden:
        return None
    return (
        f"it wraps a store but does not forward {', '.join(hidden)}, so the default hides what is"
        " inside; subclass Layer"
    )


@rule("LS022", Severity.WARNING, "memory as the system of record, or as a fallback", of="memory")
def _memory_of_record(at: At) -> str | None:
    if at.is_origin:
        return "everything is lost when this process ends; use SQLStore outside tests"
    fallback = at.under("fallback")
    if fallback is None or at.place.path.rpartition(".")[2] != "secondary":
        return None
    return (
        "no write of the stack goes there, so while inner is away every user is told to be absent"
        " instead of unavailable; use a replica, or take Fallback out"
    )


@rule("LS023", Severity.NOTE, "metrics missing, or only inside the cache")
def _metrics_outside(at: At) -> str | None:
    if at.above or not children_of(at.store) or at.is_a("metrics"):
        return None
    if not at.over("metrics"):
        return "nothing counts this stack's calls; wrap it in Metrics(..., name=)"
    first = next(s for s in (at.store, *at.below) if is_a(s, "cached") or is_a(s, "metrics"))
    if is_a(first, "metrics"):
        return None
    return "Metrics stands only inside the cache and never sees a hit; put it outermost"


@rule("LS025", Severity.ERROR, "the same block twice")
def _twice(at: At) -> str | None:
    if at.is_first:
        return None
    return "this very object stands in the stack twice and shares its state; build a second one"


@rule("LS034", Severity.WARNING, "answers may be older than max_staleness")
def _staleness(at: At) -> str | None:
    if at.max_staleness is None or not (at.is_a("cached") or at.is_a("write_through")):
        return None
    if at.is_a("write_through") and at.under("cached") is not None:
        return None  # told of the cache, to which it adds
    bound, why = staleness(at.store)
    ttl, stale = number(at.store, "ttl") or 0.0, number(at.store, "stale_if_error") or 0.0
    own = getattr(at.store, "staleness", (None, ""))[0]
    if own is None:  # a third party's cache
        own = 0.0 if _channel_below(at) else max(ttl, number(at.store, "negative_ttl") or 0.0)
        bound += own
    if why:
        return (
            f"there is no bound for the age of an answer ({why}), and max_staleness is"
            f" {at.max_staleness:g} s; use WriteThrough(RedisStore(url), origin=SQLStore(url))"
        )
    if stale:
        below = 0.0 if _channel_below(at) else bound - own
        bound = max(bound, below + ttl + stale)
    if bound <= at.max_staleness:
        return None
    return (
        f"an answer may be {bound:g} s old (ttl, negative_ttl and stale_if_error, with what caches"
        f" below add), over the max_staleness of {at.max_staleness:g} s; lower one of them"
    )


@rule("LS039", Severity.NOTE, "cache without jitter", of="cached")
def _jitter(at: At) -> str | None:
    if number(at.store, "ttl_jitter") != 0.0:
        return None
    return "entries stored together expire together and are loaded together; set ttl_jitter=0.1"


@rule("LS040", Severity.WARNING, "two in-process caches on one path", of="cached")
def _two_caches(at: At) -> str | None:
    outer = at.under("cached")
    if outer is None:
        return None
    total = (number(outer, "ttl") or 0.0) + (number(at.store, "ttl") or 0.0)
    return f"lifetimes add up: an answer may be {total:g} s old; keep one of the two"


@rule("LS041", Severity.NOTE, "Redis as the system of record", of="redis")
def _redis_of_record(at: At) -> str | None:
    if not at.is_origin:
        return None
    return (
        "what Redis acknowledged may be lost when it dies (as its appendfsync setting allows); keep"
        " the record in SQLStore if that matters"
    )


@rule("LS042", Severity.WARNING, "the system of record forgets", of="redis")
def _record_expires(at: At) -> str | None:
    ttl = number(at.store, "ttl")
    if not at.is_origin or ttl is None:
        return None
    return f"users not written for {ttl:g} s vanish; take ttl out, or add a system of record"


@rule("LS043", Severity.WARNING, "a mask in place of the password")
def _masked_password(at: At) -> str | None:
    url = getattr(at.store, "url", None)
    if not isinstance(url, str) or ":***@" not in url:
        return None
    return (
        "the password of its URL is the mask that describe and to_config show; write ${NAME} there"
        " and set the environment variable"
    )


def shared_keys(stacks: list[StateStore]) -> Iterator[tuple[Place, str]]:
    """LS013: blocks that keep their data under the same keys of one server."""
    owners: dict[tuple[object, ...], tuple[StateStore, object]] = {}
    for stack in stacks:
        by_path = {place.path: place.store for place in walk(stack)}
        for place in walk(stack):
            store = place.store
            if not is_a(store, "redis"):
                continue
            url = getattr(store, "url", None)
            where = id(getattr(store, "client", store)) if url is None else _server_of(str(url))
            key = (where, getattr(store, "prefix", None))
            record = _record_of(place, by_path)
            owner, owners_record = owners.setdefault(key, (store, record))
            # Two stacks of one system of record may share their tier: that is what it is for.
            if owner is store or (record is not None and record == owners_record):
                continue
            yield (
                place,
                "another block keeps its data on this Redis under the same prefix, so they"
                " overwrite each other; give each a prefix= of its own",
            )


def _server_of(url: str) -> object:
    """Return which database of which server a URL names, whatever its login and other options."""
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
    except ValueError:  # several hosts
        return url
    path, database = parts.path.strip("/"), parse_qs(parts.query).get("db", [""])[0]
    if parts.scheme in ("redis", "rediss"):  # with others the path is a socket or a service
        path, database = "", database or path
    return parts.hostname, port, path, database or "0"


def _record_of(place: Place, by_path: Mapping[str, StateStore]) -> object:
    """Return which system of record a cache tier stands in front of, when that can be told."""
    path = place.path
    while path:
        path, _, role = path.rpartition(".")
        origin = children_of(by_path[path]).get("origin")
        if role == "inner" and origin is not None:
            end = next((each.store for each in walk(origin) if is_a(each.store, "sql")), None)
            url = getattr(end, "url", None)
            known = getattr(end, "engine", None) if url is None else str(url)
            return None if known is None else (known, getattr(end, "latest_table", None))
    return None


RULES["LS013"] = Rule(
    "LS013", Severity.WARNING, "two blocks on one Redis with the same prefix", lambda _: None
)
"""Told by :func:`shared_keys`, since it is about several stacks."""
