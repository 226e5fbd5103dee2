"""``layered-store copy``: move all users from one store to another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import click

from layered_store.cli.common import build, console, guarded, json_option, notices, progress
from layered_store.clock import SYSTEM_CLOCK
from layered_store.copying import CopiedUsers, Copy, Counts, Progress, count_users
from layered_store.enumerable import enumerable_of
from layered_store.errors import ConfigError
from layered_store.identity import digest_function

__all__ = ["command"]

_LABELS: Final = {
    "users": "users looked at",
    "states": "states written",
    "conflicts": "users left alone, since TO holds other states of them",
    "unreadable": "users left alone, since a record of theirs cannot be read",
    "erased": "users erased meanwhile, and so not in TO",
    "users_in_source": "users in FROM",
    "users_in_target": "users in TO",
}


@click.command("copy")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option(
    "--state",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(".layered-store-copy.json"),
    help="File that keeps the progress; removed when everything was copied.",
)
@click.option("--page", type=click.IntRange(1, 10_000), default=500, help="Users copied at a time.")
@json_option
def command(source: str, target: str, state: Path, page: int, *, as_json: bool) -> None:
    """Copy all users, with their histories, FROM one stack TO another.

    After an interruption, run it again and it continues where it stopped; nothing is written
    twice. Users who are erased on either side meanwhile are not brought back. At the end the users
    on both sides are counted.

    The exit code is 1 when users were left alone, because TO holds different states of them or
    because one of their records cannot be read, and when TO has fewer users than FROM.

    \b
    layered-store copy redis://127.0.0.1:6379/0 sqlite+aiosqlite:///states.db
    layered-store copy old.toml new.toml
    """
    # The places themselves may hold passwords, so only a digest is kept.
    pair = blake2b(os.fsencode(f"{source}\0{target}"), digest_size=16).hexdigest()
    done, counts = guarded(lambda: asyncio.run(_copy(source, target, _Place(state, pair), page)))
    result = {**asdict(done), "users_in_source": counts.source, "users_in_target": counts.target}
    del result["cursor"]
    if as_json:
        click.echo(json.dumps(result))
    else:
        for name, label in _LABELS.items():
            value = result[name]
            console.print(f"{'unknown' if value is None else format(value, ','):>13}  {label}")
    if not counts.source and not done.users:
        notices.print("warning: FROM has no users; is its name right?", markup=False)
    if counts.left:
        notices.print(
            f"error: {counts.left} users were erased in FROM meanwhile and still stand in TO,"
            " which cannot list its users",
            markup=False,
        )
    short = counts.target is not None and counts.target + done.unreadable < counts.source
    if short:
        notices.print(
            "error: TO has fewer users than FROM; when FROM was written to meanwhile, copy again",
            markup=False,
        )
    sys.exit(1 if short or done.conflicts or done.unreadable or counts.left else 0)


async def _copy(source: str, target: str, place: _Place, page: int) -> tuple[Progress, Counts]:
    reached = place.read()
    async with build(source) as old, build(target, made=True) as new:
        if old.snapshot_type is not new.snapshot_type:
            raise ConfigError(
                f"FROM keeps states of the class {old.snapshot_type.__name__}, TO of"
                f" {new.snapshot_type.__name__}; give both the same snapshot_type in config files"
            )
        # Not before both are open: a name mistyped the first time leaves nothing behind.
        place.write(reached)
        with place.copied() as copied, progress("users") as bar:
            copy = Copy(old, new, reached, copied=copied, age=place.age, page=page)
            task = bar.add_task("counting", total=None)
            listing = enumerable_of(old)
            total = None if listing is None else await count_users(listing)
            bar.update(task, description="copying", total=total, completed=reached.users)
            async for _ in copy.run():
                place.write(reached)
                bar.update(task, completed=reached.users)
            bar.update(task, description="verifying")
            counts = await copy.finish()
    place.remove()
    return reached, counts


class _Place:
    """What is kept of a copy in files, so that it can go on after a kill.

    Args:
        path: of the place reached; beside it, with ``.users`` at its end, are the digests of the
            users copied so far.
        pair: digest of what is copied to what.
    """

    def __init__(self, path: Path, pair: str) -> None:
        self._path = path
        self._users = path.with_name(f"{path.name}.users")
        self._saved: dict[str, Any] = {
            "pair": pair,
            "key": os.urandom(32).hex(),
            "began": SYSTEM_CLOCK.time(),
        }

    def read(self) -> Progress:
        """Return the place reached by an earlier run of this copy."""
        try:
            saved = json.loads(self._path.read_text())
            reached = Progress(**saved.pop("reached"))
            bytes.fromhex(saved["key"])
            if saved["pair"] == self._saved["pair"] and isinstance(saved["began"], float):
                notices.print(f"going on after {reached.users:,} users")
                self._saved = saved
                return reached
        except FileNotFoundError:
            self._users.unlink(missing_ok=True)
            return Progress()
        except OSError as exc:
            raise click.ClickException(f"cannot read {self._path}: {exc.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise click.ClickException(
            f"{self._path} belongs to another copy; finish that one, remove the file or give"
            " --state"
        )

    @property
    def age(self) -> float:
        """Seconds since the copy began."""
        return max(0.0, SYSTEM_CLOCK.time() - float(self._saved["began"]))

    @contextlib.contextmanager
    def copied(self) -> Any:
        """Give the users copied so far; those that come are kept in the file."""
        digest = digest_function(bytes.fromhex(self._saved["key"]))
        with self._users.open("a+b", buffering=0) as file:
            file.seek(0)
            known = file.read()
            # A kill may have cut off the last digest.
            file.truncate(len(known) // 16 * 16)
            yield CopiedUsers(digest, known, file.write)

    def write(self, reached: Progress) -> None:
        """Keep the place reached; the file is replaced whole, so that a kill leaves old or new."""
        fresh = self._path.with_name(f"{self._path.name}.new")
        try:
            fresh.write_text(json.dumps({**self._saved, "reached": asdict(reached)}))
            os.replace(fresh, self._path)
        except OSError as exc:
            raise click.ClickException(f"cannot write {self._path}: {exc.strerror}") from None

    def remove(self) -> None:
        """The copy is whole."""
        self._path.unlink(missing_ok=True)
        self._users.unlink(missing_ok=True)
