"""Coherence between processes: the capabilities that stores offer and the protocol over them."""

from layered_store.coherence.contract import (
    ABSENT,
    Authority,
    CacheTier,
    Capability,
    Change,
    Changes,
    Holders,
    Invalidations,
    LeasedCache,
    Notice,
    Pass,
    Ticket,
    TierRead,
    Versioned,
)

__all__ = [
    "ABSENT",
    "Authority",
    "CacheTier",
    "Capability",
    "Change",
    "Changes",
    "Holders",
    "Invalidations",
    "LeasedCache",
    "Notice",
    "Pass",
    "Ticket",
    "TierRead",
    "Versioned",
]
