"""``layered-store copy``: move all users from one store to another."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

import click

from layered_store.cli.common import build, console, guarded, json_option, notices, progress
from layered_store.copying import Progress, copy_users
from layered_store.enumerable import Enumerable, enumerable_of, pages

__all__ = ["command"]


@click.command("copy")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option(
    "--state",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(".layered-store-copy.json"),
    show_default=True,
    help="Where the place reached is kept; removed when everything was copied.",
)
@click.option("--page", type=click.IntRange(1, 10_000), default=500, show_default=True)
@json_option
def command(source: str, target: str, state: Path, page: int, *, as_json: bool) -> None:
    """Copy all users, with their histories, FROM one stack TO another.

    Started again after an interruption it goes on where it was; nothing is written twice. In the
    end the users of both sides are counted. Exit 1 when users were left alone because TO holds
    other states of them, or when TO has fewer users.
    """
    # The places themselves may hold passwords, so only a digest is kept.
    pair = blake2b(f"{source}\0{target}".encode(), digest_size=16).hexdigest()
    done, counts = guarded(lambda: asyncio.run(_copy(source, target, state, page, pair)))
    result = {**asdict(done), "users_in_source": counts[0], "users_in_target": counts[1]}
    del result["cursor"]
    if as_json:
        click.echo(json.dumps(result))
    else:
        for name, value in result.items():
            console.print(
                f"{name.replace('_', ' '):>16} {value if value is not None else 'unknown'}"
            )
    short = None not in counts and counts[1] < counts[0]  # type: ignore[operator]
    raise SystemExit(1 if short or done.conflicts else 0)


async def _copy(
    source: str, target: str, state: Path, page: int, pair: str
) -> tuple[Progress, tuple[int | None, int | None]]:
    done = _resume(state, pair)
    async with build(source) as old, build(target) as new:
        with progress() as bar:
            task = bar.add_task("counting", total=None)
            there = await _count(enumerable_of(old))
            bar.update(task, description="copying", total=there, completed=done.users)
            async for reached in copy_users(old, new, done, page):
                _save(state, pair, reached)
                bar.update(task, completed=reached.users)
            bar.update(task, description="verifying")
            counts = there, await _count(enumerable_of(new))
    state.unlink(missing_ok=True)
    return done, counts


def _resume(state: Path, pair: str) -> Progress:
    try:
        saved = json.loads(state.read_text())
        if saved.pop("pair") == pair:
            notices.print(f"going on after {saved['users']} users")
            return Progress(**saved)
    except FileNotFoundError:
        return Progress()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise click.ClickException(f"{state} belongs to another copy; remove it or give --state")


def _save(state: Path, pair: str, reached: Progress) -> None:
    # Replaced whole, so that a kill leaves the old or the new one.
    fresh = state.with_name(f"{state.name}.new")
    fresh.write_text(json.dumps({"pair": pair, **asdict(reached)}))
    os.replace(fresh, state)


async def _count(listing: Enumerable | None) -> int | None:
    if listing is None:
        return None
    return sum([len(page.user_ids) async for page in pages(listing, 5_000)])
