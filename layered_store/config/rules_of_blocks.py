"""Rules about where encryption, compression, ramps, shadows and read-only layers stand."""

from __future__ import annotations

from layered_store.config.lint_view import At, Severity, is_a, rule
from layered_store.interface import StateStore
from layered_store.stack import children_of, walk

__all__: list[str] = []


def _holds(store: StateStore | None, kind: str) -> bool:
    """Tell whether a block, or one below it, is of this kind."""
    return store is not None and any(is_a(place.store, kind) for place in walk(store))


def _in_cache_tier(at: At) -> bool:
    """Tell whether a block stands in the cache tier of a write-through above it."""
    roles = at.place.path.split(".") if at.place.path else []
    return any(
        is_a(holder, "write_through") and role == "inner"
        for holder, role in zip(at.above, roles, strict=True)
    )


@rule("LS050", Severity.WARNING, "compression below encryption", of="compressed")
def _compressed_ciphertext(at: At) -> str | None:
    if at.under("encrypted") is None:
        return None
    return "ciphertext does not get smaller; put Compressed outside Encrypted"


@rule("LS051", Severity.WARNING, "encryption above the cache", of="encrypted")
def _decrypts_hits(at: At) -> str | None:
    if not at.over("cached"):
        return None
    return "every hit of the cache is decrypted again; put Encrypted below Cached"


@rule("LS052", Severity.WARNING, "one of two tiers in the clear", of="write_through")
def _half_encrypted(at: At) -> str | None:
    if at.under("encrypted") is not None:
        return None
    tier, origin = at.child("inner"), at.child("origin")
    if _holds(tier, "encrypted") == _holds(origin, "encrypted"):
        return None
    bare, name = (tier, "cache tier") if _holds(origin, "encrypted") else (origin, "origin")
    if bare is None:
        return None
    ends = [place.store for place in walk(bare) if not children_of(place.store)]
    if all(is_a(end, "memory") for end in ends):
        return None
    return f"the {name} keeps every state in the clear; put Encrypted around both sides"


@rule("LS053", Severity.NOTE, "encryption around both tiers at once", of="encrypted")
def _encrypted_around_tiers(at: At) -> str | None:
    tiers = at.over("write_through")
    if not tiers:
        return None
    if not any(_holds(children_of(tier).get("inner"), "redis") for tier in tiers):
        return None
    return (
        "a damaged copy in the cache tier is an error here, not a miss; put Encrypted around the"
        " tier and around the origin"
    )


@rule("LS054", Severity.NOTE, "records that are not encrypted are accepted", of="encrypted")
def _accepts_plain(at: At) -> str | None:
    if getattr(at.store, "accept_plain", False) is not True:
        return None
    return (
        "whoever can write to the backend can put a state there; take accept_plain out once all"
        " users were written again"
    )


@rule("LS055", Severity.ERROR, "a cache tier that cannot be written", of="read_only")
def _read_only_tier(at: At) -> str | None:
    if not _in_cache_tier(at):
        return None
    return (
        "the tier is never filled and its old copies are not replaced; put ReadOnly around the"
        " whole stack, or around the origin"
    )


@rule("LS056", Severity.WARNING, "a shadow of the cache", of="shadow")
def _shadow_above_cache(at: At) -> str | None:
    if not (at.over("cached") or _in_cache_tier(at)):
        return None
    return (
        "the candidate gets the traffic of a cache, not of the store that it is to replace; put"
        " Shadow around the backend of record"
    )


@rule("LS057", Severity.WARNING, "a ramp below write-through", of="ramp")
def _ramp_below_tiers(at: At) -> str | None:
    if at.under("write_through") is None:
        return None
    return (
        "versions do not pass a ramp, so processes that share the cache tier would not agree; put"
        " Ramp above WriteThrough"
    )
