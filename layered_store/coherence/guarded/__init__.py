"""Copies in a shared tier, kept in step with the system of record by many processes.

The argument for each step stands in ``docs/notes/0002-coherence.md``. In short: the system of
record numbers each user's writes. A copy is created only with a token that was taken before the
record was read or written and that every write removes; it is replaced only by a higher version of
the same generation; it is believed only under a stamp that a repair pass leaves after it has
replayed every change of the system of record; and an in-process cache answers only under a lease
that this process's own echo over the invalidation channel renews.

Each module knows those above it only:

* ``watch``: the event loop that keeps watch, and what runs there
* ``seen``, ``backlog``, ``reachability``: what a process knows of users, copies and the tier
* ``leases``, ``channel``, ``repair``: the upkeep, which runs all the time
* ``startup``: how it begins
* ``reading``, ``writing``, ``erasing``: the operations
* ``copies``: all of it together
"""

from __future__ import annotations

from layered_store.coherence.guarded.copies import GuardedCopies

__all__ = ["GuardedCopies"]
