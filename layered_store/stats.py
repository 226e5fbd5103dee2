"""What blocks count, in plain integers, until somebody scrapes."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Sample"]


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
