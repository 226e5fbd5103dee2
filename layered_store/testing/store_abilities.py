"""The checks of abilities beyond the interface: versions and listing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from layered_store.call import call_begins
from layered_store.clock import SYSTEM_CLOCK
from layered_store.coherence.contract import Authority
from layered_store.enumerable import Enumerable, pages
from layered_store.testing.report import expect

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from layered_store.testing.store_suite import Suite

__all__ = ["late_write", "listing", "versions"]


async def versions(suite: Suite) -> None:
    """Versions grow with every write and erasure; a repeated write counts once."""
    authority: Authority = suite.need(Authority, "versions")
    user_id = suite.user("versions")
    first = suite.snapshot(user_id, 1)
    second = suite.snapshot(user_id, 2)
    absent = await authority.read(user_id)
    expect(absent.snapshot is None, "read() of an absent user gave a state")
    head = await authority.head()
    seen = [absent.version, (await authority.write(first)).version]
    with call_begins():
        record = await authority.write(second)
        again = await authority.write(second)
    expect(record == again, "a write that was repeated with the same write id counted twice")
    seen.append(record.version)
    read = await authority.read(user_id)
    expect(read == record, "read() does not give the record that the write left")
    many = await authority.read_many([user_id, suite.user("versions-absent")])
    expect(len(many) == 2, "read_many() left out an id")  # noqa: PLR2004
    expect(many[user_id] == read, "read_many() disagrees with read()")
    if suite.history > 1:
        kept = await suite.store.get_history(user_id, 5)
        expect(kept == [second, first], "a repeated write stands in the history twice")
    seen.append(await authority.erase(user_id, ("tier",)))
    expect(await authority.debts(user_id), "a tier that may hold an erased user is not kept")
    erased = await authority.read(user_id)
    expect(erased.snapshot is None, "read() of an erased user gave a state")
    await authority.settle(authority.digest(user_id), seen[-1], "tier")
    expect(not await authority.debts(user_id), "settle() did not take the debt away")
    seen.append((await authority.write(first)).version)
    expect(seen == sorted(set(seen)), f"the versions {seen} do not grow")
    expect(await authority.covers(head), "changes after a fresh cursor are not known")
    found, more = set(), True
    while more:
        page = await authority.changes(head, 100)
        found |= {change.digest for change in page.items}
        head, more = page.cursor, page.more
    expect(authority.digest(user_id) in found, "changes() skipped a user that changed")


async def late_write(suite: Suite) -> None:
    """A write that began before an erasure cannot bring the user back."""
    authority: Authority = suite.need(Authority, "versions")
    user_id = suite.user("late")
    await authority.write(suite.snapshot(user_id, 1))
    with call_begins(getattr(suite.store, "clock", SYSTEM_CLOCK)):
        # The erasure is another caller's, so it runs in a context without this write.
        await asyncio.create_task(_outside(authority.erase(user_id)))
        await authority.write(suite.snapshot(user_id, 2))
    got = await suite.store.get_latest(user_id)
    expect(got is None, "a write that began before an erasure brought the user back")


async def _outside(call: Awaitable[Any]) -> None:
    await call


async def listing(suite: Suite) -> None:
    """Every user is listed."""
    listing: Enumerable = suite.need(Enumerable, "listing")
    ids = {(await suite.write(f"listed-{number}"))[0].user_id for number in range(7)}
    found: set[str] = set()
    async for page in pages(listing, 3):
        found.update(page.user_ids)
    expect(ids <= found, f"the listing left out {len(ids - found)} of {len(ids)} users")
    if suite.can_delete:
        gone = ids.pop()
        await suite.store.delete(gone)
        async for page in pages(listing, 100):
            expect(gone not in page.user_ids, "the listing shows a deleted user")
