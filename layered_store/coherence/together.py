"""Doing several things at once."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable
    from typing import Any

__all__ = ["together"]

T = TypeVar("T")

_AT_ONCE: Final = 1024
"""How many run at once: a few full round trips. More would hold up the event loop, and wait for the
tier longer than one of its replies may take."""


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all, many at once, so that they share round trips; a single one without a task of its own.

    The first failure is raised when all have ended: nothing is left running behind it.
    """
    coroutines = iter(work)
    results: list[T | BaseException] = []
    while wave := list(islice(coroutines, _AT_ONCE)):
        if len(wave) == 1 and not results:
            return [await wave[0]]
        results += await asyncio.gather(*wave, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]
