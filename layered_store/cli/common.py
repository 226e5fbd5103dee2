"""What the commands share: finding the stack, running it, saying what went wrong."""

from __future__ import annotations

import asyncio
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from rich.console import Console

from layered_store.config import LintWarning, load_stack
from layered_store.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from layered_store.interface import StateStore

__all__ = ["DEFAULT_STACK", "build", "console", "guarded", "json_option", "progress", "run"]

T = TypeVar("T")

DEFAULT_STACK: Final[dict[str, Any]] = {
    "store": {
        "use": "sql",
        "url": "sqlite+aiosqlite:///layered_store.db",
        "layers": [{"use": "metrics", "name": "default"}, {"use": "cached"}],
    }
}
"""What commands use when no STACK is given: an SQLite file in the working directory."""

console = Console(highlight=False, soft_wrap=True)
"""Where results go; plain text when it is no terminal, no colour under NO_COLOR."""

notices = Console(stderr=True, highlight=False, soft_wrap=True)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def build(stack: str | None, *, quiet: bool = False) -> StateStore:
    """Return the stack that an argument names, telling the linter's warnings on stderr."""
    source: Any = DEFAULT_STACK
    if stack is not None and "://" in stack:
        kind = "redis" if stack.startswith(("redis", "unix:")) else "sql"
        # Doubled, since what looks like a variable in a URL of the shell is none.
        source = {"store": {"use": kind, "url": stack.replace("${", "$${")}}
    elif stack is not None:
        source = Path(stack)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = load_stack(source)
    if not quiet:
        for warning in caught:
            if issubclass(warning.category, LintWarning):
                notices.print(f"warning: {warning.message}", markup=False)
    return built


def guarded(work: Callable[[], T]) -> T:
    """Run ``work``; end the process with one line instead of a traceback when it fails."""
    try:
        return work()
    except ConfigError as exc:
        notices.print(f"error: {exc}", markup=False)
        sys.exit(2)
    except StoreError as exc:
        notices.print(f"error: {exc}", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def run(stack: str | None, work: Callable[[StateStore], Awaitable[T]]) -> T:
    """Build the stack, open it, await ``work`` on it and close it."""

    async def whole() -> T:
        async with build(stack) as store:
            return await work(store)

    return guarded(lambda: asyncio.run(whole()))


def progress() -> Any:
    """Return a progress bar on stderr, shown only on a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=notices, disable=not notices.is_terminal)
