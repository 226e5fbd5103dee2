"""A Redis store as the shared cache tier of several processes.

Every script of the protocol begins with the run id of the server that it was loaded on.
A server that was restarted, restored or failed over to does not know that script (scripts are
neither saved nor replicated), answers NOSCRIPT, and cannot be mistaken for the one before.

Each module knows those above it only:

* ``scripts``: the steps of the protocol, in Lua
* ``buckets``: the keys that they touch
* ``connection``: a connection apart from those of the calls, and what its server is
* ``loading``: the scripts on each server run, and how they are called
* ``batches``: reads of one turn of the event loop, in one script call
* ``messages``, ``channel``: the invalidation channel
* ``passes``: the steps of a repair pass, on all buckets
* ``tier``: the tier itself, and the steps on one user
"""

from __future__ import annotations

from layered_store.coherence.redis_tier.tier import RedisTier

__all__ = ["RedisTier"]
