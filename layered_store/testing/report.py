"""What a run of checks found, and how each check is run."""

from __future__ import annotations

import asyncio
import inspect
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

__all__ = [
    "Broken",
    "Patience",
    "Report",
    "Result",
    "Unneeded",
    "build",
    "error_texts",
    "expect",
    "left_since",
    "title_of",
    "watched_logs",
]

_GRACE_SECONDS: Final = 0.1
"""Who else uses this event loop may have begun a task meanwhile, which ends by itself."""

_NO_END: Final = "did not end within"

_MARKS: Final = {"passed": "ok  ", "failed": "FAIL", "skipped": "skip"}


class Broken(Exception):  # noqa: N818  a finding, which is no error of the check
    """A rule does not hold; the text says which, what was seen and what to do."""


class Unneeded(Exception):  # noqa: N818
    """A check does not apply, since the store lacks an ability; the text says which."""


def expect(condition: object, message: str) -> None:
    """Raise :class:`Broken` with this text unless a condition holds."""
    if not condition:
        raise Broken(message)


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found.

    Args:
        check: the rule, as a sentence.
        outcome: ``"passed"``, ``"failed"`` or ``"skipped"``.
        message: what is wrong and what to do about it, or why it was skipped.
    """

    check: str
    outcome: str
    message: str = ""

    def __str__(self) -> str:
        text = f"{_MARKS[self.outcome]}  {self.check}"
        return f"{text}\n        {self.message}" if self.message else text


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What a run of checks found. True in a condition when nothing failed; prints all of it.

    Args:
        subject: what was checked.
        abilities: what it can do beyond the two required operations.
        results: one for each check.
    """

    subject: str
    abilities: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Result, ...]:
        """The checks that failed."""
        return tuple(result for result in self.results if result.outcome == "failed")

    def raise_for_failures(self) -> None:
        """Raise AssertionError with the report as its text, unless all is well."""
        if not self.ok:
            raise AssertionError(str(self))

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        # What a bare `assert await check_store(...)` shows.
        first = "".join(f"; {each.check}: {each.message}" for each in self.failures[:1])
        return f"<Report {self._counts()}{first}>"

    def _counts(self) -> str:
        count = dict.fromkeys(_MARKS, 0)
        for result in self.results:
            count[result.outcome] += 1
        return (
            f"{self.subject}: {count['passed']} passed, {count['failed']} failed,"
            f" {count['skipped']} skipped"
        )

    def __str__(self) -> str:
        head = f"{self._counts()}; abilities: {', '.join(self.abilities) or 'none'}"
        order = sorted(self.results, key=lambda result: result.outcome != "failed")
        return "\n".join([head, *(f"  {result}" for result in order)])


class Patience:
    """Runs checks one after the other, each within a limit of real time.

    What hangs once mostly hangs in every check: once one did not end, the others have a tenth.

    Args:
        limit: seconds for one check.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._hung = False

    async def check(self, name: str, check: Callable[[], Awaitable[None]]) -> Result:
        """Run one check."""
        result = await _run(name, check, self._limit / (10 if self._hung else 1))
        self._hung = self._hung or result.message.startswith(_NO_END)
        return result


async def _run(name: str, check: Callable[[], Awaitable[None]], limit: float) -> Result:
    try:
        async with asyncio.timeout(limit):
            await check()
    except Unneeded as exc:
        return Result(name, "skipped", str(exc))
    except Broken as exc:
        return Result(name, "failed", str(exc))
    except TimeoutError as exc:
        if isinstance(exc, StoreError):
            return Result(name, "failed", f"raised {type(exc).__name__}: {exc}")
        return Result(name, "failed", f"{_NO_END} {limit:g} s")
    except Exception as exc:  # noqa: BLE001  a broken store may raise anything
        return Result(name, "failed", f"raised {type(exc).__name__}: {exc}")
    return Result(name, "passed")


async def left_since(before: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Return the tasks of this event loop that run on and were not there before.

    Not the loop's own end of generators that somebody threw away, such as the store of a test
    before: it comes whenever they are collected, and runs no coroutine.
    """
    left = {task for task in asyncio.all_tasks() - before if inspect.iscoroutine(task.get_coro())}
    if left:
        _, left = await asyncio.wait(left, timeout=_GRACE_SECONDS)
    return left


@contextmanager
def watched_logs() -> Iterator[list[str]]:
    """Collect what is logged meanwhile, as logging is set up."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield texts
    finally:
        root.removeHandler(handler)


def error_texts(exc: BaseException) -> list[str]:
    """Return what a traceback of an error shows of it, and of those that it came from."""
    texts = []
    cause: BaseException | None = exc
    while cause is not None:
        texts += [str(cause), repr(cause)]
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return texts


def title_of(check: Callable[..., Any]) -> str:
    """Return the rule that a check is about: the first line of its docstring."""
    return (check.__doc__ or "").strip().split("\n")[0].rstrip(".")


async def build(factory: Callable[..., Any], *args: Any) -> Any:
    """Call a factory, which may be a coroutine function."""
    made = factory(*args)
    return await made if inspect.isawaitable(made) else made

