"""``layered-store export``: everything about one user, or about all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

import click

from layered_store.cli.common import fail, notices, progress, run
from layered_store.copying import count_users
from layered_store.enumerable import enumerable_of, pages
from layered_store.errors import CorruptDataError, UnsupportedError, ValidationError
from layered_store.interface import StateStore
from layered_store.snapshot import StateSnapshot

__all__ = ["command"]

_EVERYTHING: Final = 2**31 - 1
_PAGE: Final = 500
_SIDE_BY_SIDE: Final = 250


@click.command("export")
@click.argument("stack")
@click.argument("user", required=False)
@click.option("--all", "everyone", is_flag=True, help="Export all users, one JSON line each.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True),
    default="-",
    show_default="standard output",
    help="File to write to.",
)
def command(stack: str, user: str | None, output: str, *, everyone: bool) -> None:
    """Write everything that is stored about USER as JSON: the latest state and the history.

    The exit code is 1 when nothing is stored, and when a record cannot be read; --all leaves such a
    user out.

    \b
    layered-store export stack.toml u-1
    layered-store export stack.toml --all --output users.jsonl
    """
    if (user is None) is not everyone:
        raise click.UsageError("give a USER or --all")

    async def work(store: StateStore) -> tuple[int, int]:
        if user is not None:
            line = _record(user, await store.get_latest(user), await _history(store, user))
            if line:
                with click.open_file(output, "w", encoding="utf-8") as file:
                    file.write(line)
            return (1 if line else 0), 0
        listing = enumerable_of(store)
        if listing is None:
            raise UnsupportedError(
                "this stack's system of record cannot list its users",
                operation="export",
                layer=store.name,
            )
        count = unreadable = 0
        with (
            click.open_file(output, "w", encoding="utf-8") as file,
            progress("users", shown=not file.isatty()) as bar,  # not between a terminal's lines
        ):
            task = bar.add_task("exporting", total=await count_users(listing))
            async for record in _records(store, listing):
                if record is None:
                    unreadable += 1
                    continue
                file.write(record)
                count += 1
                bar.update(task, completed=count)
        return count, unreadable

    count, unreadable = run(stack, work)
    if everyone:
        notices.print(f"{count:,} users")
        if unreadable:
            fail(f"{unreadable:,} users were left out, since a record of theirs cannot be read")
    elif not count:
        notices.print("nothing is kept about this user")
        raise SystemExit(1)


async def _records(store: StateStore, listing: Any) -> AsyncIterator[str | None]:
    """Yield a line for each user; None for one with a record that cannot be read."""
    gate = asyncio.Semaphore(_SIDE_BY_SIDE)

    async def record(user: str, latest: StateSnapshot | None) -> str | None:
        async with gate:
            try:
                if latest is None:  # erased since it was listed, or it cannot be read
                    latest = await store.get_latest(user)
                return _record(user, latest, await _history(store, user))
            except (CorruptDataError, ValidationError):  # or it has no form in JSON
                return None

    async for page in pages(listing, _PAGE):
        latest = await store.get_latest_many(page.user_ids)
        lines = (record(user, latest.get(user)) for user in page.user_ids)
        for line in await asyncio.gather(*lines):
            if line != "":
                yield line


async def _history(store: StateStore, user: str) -> list[StateSnapshot]:
    return await store.get_history(user, _EVERYTHING)


def _record(user: str, latest: StateSnapshot | None, history: list[StateSnapshot]) -> str:
    """Return the line about a user; empty when nothing is kept."""
    if latest is None and not history:
        return ""
    record = {
        "user_id": user,
        "latest": None if latest is None else json.loads(latest.to_json()),
        "history": [json.loads(snapshot.to_json()) for snapshot in history],
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
