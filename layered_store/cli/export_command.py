"""``layered-store export``: everything about one user, or about all."""

from __future__ import annotations

import json
from typing import Any

import click

from layered_store.cli.common import progress, run
from layered_store.enumerable import enumerable_of, pages
from layered_store.errors import UnsupportedError
from layered_store.interface import StateStore

__all__ = ["command"]

_EVERYTHING = 2**31 - 1
_PAGE = 500


@click.command("export")
@click.argument("stack")
@click.argument("user", required=False)
@click.option("--all", "everyone", is_flag=True, help="Export all users, one JSON line each.")
@click.option("--output", type=click.File("w"), default="-", help="Where to; standard output.")
def command(stack: str, user: str | None, output: Any, *, everyone: bool) -> None:
    """Write everything that is kept about USER as JSON: the latest state and the history."""
    if (user is None) is not everyone:
        raise click.UsageError("give a USER or --all")

    async def work(store: StateStore) -> int:
        if user is not None:
            return await _write(store, user, output)
        listing = enumerable_of(store)
        if listing is None:
            raise UnsupportedError("this stack's system of record cannot list its users")
        count = 0
        with progress("users") as bar:
            task = bar.add_task("users", total=None)
            async for page in pages(listing, _PAGE):
                for each in page.user_ids:
                    count += await _write(store, each, output)
                bar.update(task, completed=count)
        return count

    if not run(stack, work) and not everyone:
        click.echo("nothing is kept about this user", err=True)
        raise SystemExit(1)


async def _write(store: StateStore, user: str, output: Any) -> int:
    latest = await store.get_latest(user)
    history = await store.get_history(user, _EVERYTHING)
    if latest is None and not history:
        return 0
    record = {
        "user_id": user,
        "latest": None if latest is None else json.loads(latest.to_json()),
        "history": [json.loads(snapshot.to_json()) for snapshot in history],
    }
    output.write(json.dumps(record, ensure_ascii=False) + "\n")
    return 1
