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


async def together(
    work: Iterable[Coroutine[Any, Any, T]], *, whatever_fails: bool = True
) -> list[T]:
    """Run all, many at once, so that they share round trips; a lone one gets no task of its own.

    The first failure is raised when all have ended: nothing is left running behind it.

    Args:
        work: what to do, each made when it begins.
        whatever_fails: whether to go on with what is left when something failed. A tier that hangs
            would cost reads its time limit again and again.
    """
    coroutines = iter(work)
    results: list[T | BaseException] = []
    while wave := list(islice(coroutines, _AT_ONCE)):
        if len(wave) == 1 and not results:
            return [await wave[0]]
        results += await asyncio.gather(*wave, return_exceptions=True)
        if not whatever_fails:
            _raise_first(results[-len(wave) :])
    _raise_first(results)
    return results  # type: ignore[return-value]


def _raise_first(results: Iterable[object]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result
