"""What blocks count, in plain integers, until somebody scrapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from layered_store.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Reads", "Sample"]


class Sample(NamedTuple):
    """One figure of one block.

    Args:
        metric: a key of the catalogue, such as ``"reads"``.
        value: the total since the block was built, or the present value of a gauge.
        labels: label values beyond ``stack`` and ``layer``, in the catalogue's order.
    """

    metric: str
    value: float
    labels: tuple[str, ...] = ()


class Reads:
    """What one tier counts of its reads: each user asked for once, under one result.

    A read counts when it ends. A cancelled one, and one whose argument was refused, count as none:
    neither says anything about the tier.

    Attributes:
        hit: the tier had the user.
        miss: it did not have the user.
        negative_hit: it knew, without asking the tier below, that there is no such user.
        stale: it answered with an old value, since the tier below failed.
        error: it could not tell. Never counted as a miss.
    """

    __slots__ = ("error", "hit", "miss", "negative_hit", "stale")

    def __init__(self) -> None:
        self.hit = self.miss = self.negative_hit = self.stale = self.error = 0

    def found(self, snapshot: object) -> None:
        """Count a read that was answered: None is a miss."""
        if snapshot is None:
            self.miss += 1
        else:
            self.hit += 1

    def failed(self, exc: Exception, users: int = 1) -> None:
        """Count reads that raised."""
        if not isinstance(exc, ValidationError):
            self.error += users

    def samples(self) -> Iterator[Sample]:
        """Yield all five results, those that never happened too."""
        for result in ("hit", "miss", "negative_hit", "stale", "error"):
            yield Sample("reads", getattr(self, result), (result,))
