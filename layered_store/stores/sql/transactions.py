"""What happens inside one transaction, for any database.

The order is the same everywhere: lock the users' rows, look whether a write was stored before,
decide in Python, store, commit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from layered_store.coherence.tombstones import TOMBSTONE_SECONDS
from layered_store.errors import UnavailableError
from layered_store.stores.sql.session import padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layered_store.stores.erasures import Began, KnownErasures
    from layered_store.stores.sql.session import Rules, Session

__all__ = ["Erasure", "Row", "Settlement", "Write", "erase", "settle", "write"]

_TOMBSTONE_US: Final = int(TOMBSTONE_SECONDS) * 1_000_000
"""How long a tombstone stays, in microseconds."""

_PROBES: Final = 20

_HIDDEN_SECONDS: Final = 0.005
"""How long nobody sees an erasure after the moment that counts as its beginning. A write whose
beginning cannot be told from that moment by less than this began before anybody saw the erasure:
the two overlapped, and the write may be dropped."""

_HOST_SECONDS: Final = 20e-6
"""The same where all share the host's clock: an erasure takes longer by itself."""


class Write(msgspec.Struct, eq=False, gc=False):
    """One snapshot on its way in."""

    digest: bytes
    user_id: str
    payload: bytes
    write_id: bytes
    started: float
    order: int
    updated: int
    fresh: bool = False
    """Whether this is the first attempt to store it."""

    __repr__ = object.__repr__


@dataclass(slots=True)
class Erasure:
    """One erasure on its way in."""

    digest: bytes
    tiers: Sequence[str]
    write_id: bytes
    fresh: bool = False


@dataclass(slots=True)
class Settlement:
    """That a tier holds no copy of a user older than this version of an erasure."""

    digest: bytes
    version: int
    tier: str


@dataclass(slots=True)
class Row:
    """A user's row under its lock."""

    digest: bytes
    user_id: str | None
    version: int
    payload: bytes | None
    erased_version: int | None
    erased_at: int | None
    debts: str | None
    updated: int | None
    position: int = 0
    """Of its newest entry, where entries are chained."""


async def _lock(session: Session, digests: list[bytes], began: Began) -> dict[bytes, Row]:
    """Lock the rows of these users, made where there are none."""
    rows: dict[bytes, Row] = {}
    await _take(session, digests, began, rows)
    missing = [digest for digest in sorted(set(digests)) if digest not in rows]
    if missing:
        places: list[dict[str, Any]] = [{"at_digest": digest} for digest in missing]
        if session.statements.host_time:
            for place in places:
                place["start_version"] = int(session.clock.time() * 1e3) - 1
        await session.run(session.statements.place, places)
        await _take(session, missing, began, rows)
    if not all(digest in rows for digest in digests):
        # Its tombstone was forgotten between the two statements.
        raise UnavailableError("another transaction was in the way")
    return rows


async def _take(
    session: Session, digests: list[bytes], began: Began, rows: dict[bytes, Row]
) -> None:
    sent = session.clock.monotonic()
    found = await session.rows(session.statements.lock, session.timed({"digests": padded(digests)}))
    received = session.clock.monotonic()
    for row in found:
        digest = bytes(row.digest)
        rows[digest] = Row(
            digest,
            row.user_id,
            row.version,
            row.payload,
            row.erased_version,
            row.erased_at,
            row.debts,
            row.updated_at_unix_ms,
            row.position if session.statements.chained else 0,
        )
    if found:
        began.learn(sent, received, found[0].now_us)


async def write(
    session: Session,
    writes: Sequence[Write],
    rules: Rules,
    erasures: KnownErasures,
) -> tuple[list[Row], int]:
    """Store snapshots in one transaction; return what each left, and how many were too old.

    Args:
        session: the connection; its transaction is begun and committed here.
        writes: in their order; several may be of one user.
        rules: the store's options.
        erasures: what is known of their order to writes; learns what this one shows.
    """
    statements = session.statements
    await session.begin()
    began = session.measure()
    rows = await _lock(session, [item.digest for item in writes], began)
    erasures.learn(began)
    seen = await _seen(session, writes)
    now_us = int(began.high + session.clock.monotonic() * 1e6)
    results: list[Row] = []
    entries: list[dict[str, Any]] = []
    changed: dict[bytes, Write] = {}
    too_old = 0
    for item in writes:
        row = rows[item.digest]
        if (item.digest, item.write_id) in seen or await _late(
            session, row, item, began, erasures
        ):
            results.append(row)
            continue
        if (
            rules.by_snapshot_time
            and row.payload is not None
            and row.updated is not None
            and item.updated < row.updated
        ):
            too_old += 1
            results.append(row)
            continue
        row = Row(
            item.digest,
            item.user_id,
            row.version + 1,
            item.payload,
            row.erased_version,
            row.erased_at,
            row.debts,
            item.updated,
            row.position,
        )
        rows[item.digest] = row
        seen.add((item.digest, item.write_id))
        entries.append(
            {
                "digest": item.digest,
                "version": row.version,
                "write_id": item.write_id,
                "recorded_at": now_us,
                "payload": None if rules.history_limit == 0 else item.payload,
            }
        )
        changed[item.digest] = item
        results.append(row)
    if not changed:
        await session.rollback()
        return results, too_old
    heads = {digest: rows[digest].position for digest in changed}
    if statements.chained:
        hidden = list(heads.values()) if rules.history_limit == 0 else []
        await session.chain(entries, heads)
        # The latest state stands in the newest entry alone.
        for entry in entries:
            if heads[entry["digest"]] == entry["position"]:
                entry["payload"] = changed[entry["digest"]].payload
        await session.run(statements.hide, [{"at_position": place} for place in hidden])
    await session.run(statements.append, entries)
    updates = [
        {
            "at_digest": digest,
            "to_user_id": item.user_id,
            "to_version": rows[digest].version,
            "to_updated": item.updated,
            **(
                {"at_position": heads[digest]}
                if statements.chained
                else {"to_payload": item.payload, "to_write_id": item.write_id}
            ),
        }
        for digest, item in sorted(changed.items())
    ]
    if not statements.chained:  # from the next statement on, all writers may have to wait
        await session.trim(entries, rules, now_us)
    await session.run(statements.store, await session.positioned(updates))
    if statements.chained:  # which looks at the users' rows
        await session.trim(entries, rules, now_us)
    await session.commit()
    return results, too_old


async def _late(
    session: Session,
    row: Row,
    item: Write,
    began: Began,
    erasures: KnownErasures,
) -> bool:
    """Tell whether a write began before its user was erased.

    Raises:
        UnavailableError: that cannot be told.
    """
    if row.erased_at is None or row.erased_version is None:
        return False

    async def now_us() -> int:
        if session.statements.host_time:
            return int(session.clock.time() * 1e6)
        return int((await session.rows(session.statements.now, {}))[0][0])

    answer = await erasures.began_before(
        item, row.erased_version, row.erased_at, began, now_us, _PROBES
    )
    if answer is not None:
        return answer
    hidden = _HOST_SECONDS if session.statements.host_time else _HIDDEN_SECONDS
    if began.overlaps(item.started, row.erased_at, hidden):
        return True
    raise UnavailableError(
        "the write and an erasure of its user began too close together to tell their order"
    )


async def erase(session: Session, erasures: Sequence[Erasure]) -> list[tuple[int, bool]]:
    """Remove users and their histories, leave tombstones.

    A repeat of an erasure that took effect changes nothing: a write that came in between stays.
    Its id is found in the history, as a write's is, in an entry that shows nothing.

    Args:
        session: the connection; its transaction is begun and committed here.
        erasures: several may be of one user, who then has one tombstone.

    Returns:
        The version of each tombstone, and whether it is new.
    """
    await session.begin()
    began = session.measure()
    rows = await _lock(session, [erasure.digest for erasure in erasures], began)
    seen = await _seen(session, erasures)
    versions: dict[bytes, int] = {}
    owed: dict[bytes, set[str]] = {}
    entries: list[dict[str, Any]] = []
    # When it began, as the database saw it first; nobody sees the erasure before the commit.
    erased_at, now_us = began.now_us, int(began.high + session.clock.monotonic() * 1e6)
    for erasure in erasures:
        if (erasure.digest, erasure.write_id) in seen:
            continue
        seen.add((erasure.digest, erasure.write_id))
        version = versions.get(erasure.digest, rows[erasure.digest].version) + 1
        versions[erasure.digest] = version
        owed.setdefault(erasure.digest, set()).update(erasure.tiers)
        entries.append(
            {
                "digest": erasure.digest,
                "version": version,
                "write_id": erasure.write_id,
                "recorded_at": now_us,
                "payload": None,
            }
        )
    results = [
        (versions[erasure.digest], True)
        if erasure.digest in versions
        else (rows[erasure.digest].erased_version or rows[erasure.digest].version, False)
        for erasure in erasures
    ]
    if not versions:
        await session.rollback()
        return results
    places: list[dict[str, Any]] = [{"at_digest": digest} for digest in sorted(versions)]
    await session.run(session.statements.forget, places)
    heads: dict[bytes, int] = {}
    if session.statements.chained:
        await session.chain(entries, heads)
    await session.run(session.statements.append, entries)
    values: list[dict[str, Any]] = [
        {
            "at_digest": digest,
            "to_version": versions[digest],
            "to_debts": json.dumps(
                sorted({*json.loads(rows[digest].debts or "[]"), *owed[digest]})
            ),
            # Never back: what began before an earlier erasure stays out.
            "to_erased_at": max(erased_at, rows[digest].erased_at or 0),
            "to_purge_at": erased_at + _TOMBSTONE_US,
            **({"at_position": heads[digest]} if heads else {}),
        }
        for digest in sorted(versions)
    ]
    left = began.received + _HIDDEN_SECONDS - session.clock.monotonic()
    if left > 0 and not session.statements.host_time:
        await session.clock.sleep(left)  # before the lock of all writers, where there is one
    await session.run(session.statements.bury, await session.positioned(values))
    await session.commit()
    return results


async def _seen(
    session: Session, items: Sequence[Write] | Sequence[Erasure]
) -> set[tuple[bytes, bytes]]:
    """Return the (digest, write id) of those that were stored before."""
    if session.statements.counted:
        # All attempts at a write come through one process: before the first none can have been
        # stored. One that was given up comes to its end before the next one begins: in SQLite's
        # thread, or under the lock of its row.
        items = [item for item in items if not item.fresh]  # type: ignore[assignment]
        if not items:
            return set()
    found = await session.rows(
        session.statements.seen,
        {
            "digests": padded(item.digest for item in items),
            "write_ids": padded(item.write_id for item in items),
        },
    )
    return {(bytes(digest), bytes(write_id)) for digest, write_id in found}


async def settle(session: Session, settlements: Sequence[Settlement]) -> list[bool]:
    """Take tiers off users' debts in one transaction; tell which were owed.

    What a later erasure put there again stays.
    """
    await session.begin()
    digests = padded(item.digest for item in settlements)
    found = await session.rows(session.statements.lock, session.timed({"digests": digests}))
    rows = {bytes(row.digest): row for row in found}
    owed = {digest: json.loads(row.debts or "[]") for digest, row in rows.items()}
    changed: set[bytes] = set()
    results = []
    for item in settlements:
        digest = item.digest
        paid = (
            item.tier in owed.get(digest, ()) and (rows[digest].erased_version or 0) <= item.version
        )
        if paid:
            owed[digest].remove(item.tier)
            changed.add(digest)
        results.append(paid)
    if not changed:
        await session.rollback()
        return results
    debts = [
        {"at_digest": digest, "to_debts": json.dumps(owed[digest])} for digest in sorted(changed)
    ]
    await session.run(session.statements.owe, debts)
    await session.commit()
    return results
