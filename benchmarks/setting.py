"""What every benchmark gets: how long it may take, data, and real servers."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from layered_store import StateSnapshot
from layered_store.codec import SnapshotCodec

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from servers import start_postgres, start_redis  # noqa: E402

__all__ = ["AXES", "Setting", "snapshot", "user"]

AXES = 23
"""Axes of the snapshots that are stored: as many as the applications' catalogue has."""

_random = Random(7)
_VALUES = {f"axis_{chr(97 + n)}_name": _random.random() for n in range(AXES)}
_TIME = 1_732_406_400_000


def user(number: int) -> str:
    """Return a user id."""
    return f"user-{number:07d}"


def snapshot(user_id: str, form: int = 0) -> StateSnapshot:
    """Return a snapshot of 23 axes with full-precision floats; each form holds other values."""
    names = list(_VALUES)
    axes = dict(zip(names, [_VALUES[name] for name in names[form:] + names[:form]], strict=True))
    return StateSnapshot(user_id, updated_at_unix_ms=_TIME + form, axes=axes)


def encoded(user_id: str, form: int = 0) -> bytes:
    """Return its stored form."""
    return SnapshotCodec(StateSnapshot).encode(snapshot(user_id, form))


@dataclass
class Setting:
    """How thoroughly to measure, and where.

    Args:
        quick: only check that everything runs: figures mean little.
        random: for orders and keys.
    """

    quick: bool = False
    random: Random = field(default_factory=lambda: Random(1))

    def __post_init__(self) -> None:
        self._servers: dict[str, Any] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def some(self, full: int, quick: int | None = None) -> int:
        """Return how many: ``full``, or fewer when quick."""
        if not self.quick:
            return full
        return max(1, full // 20) if quick is None else quick

    @property
    def rounds(self) -> int:
        return self.some(11, 2)

    @property
    def folder(self) -> Path:
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="layered_store-bench-")
        return Path(self._folder.name)

    @property
    def redis_url(self) -> str:
        """A private Redis."""
        if "redis" not in self._servers:
            self._servers["redis"] = start_redis()
        return f"redis://127.0.0.1:{self._servers['redis'].port}/0"

    async def postgres(self) -> str:
        """A private PostgreSQL whose commits wait for the disk; without a scheme."""
        import asyncpg

        if "postgres" not in self._servers:
            self._servers["postgres"] = await asyncio.to_thread(start_postgres)
        dsn = f"postgresql://tester@127.0.0.1:{self._servers['postgres'].port}/postgres"
        for _ in range(100):
            try:
                connection = await asyncpg.connect(dsn)
                break
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.1)
        await connection.execute("ALTER SYSTEM SET fsync = on")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()
        return dsn

    def close(self) -> None:
        """Stop the servers and remove the files."""
        for server in self._servers.values():
            server.close()
        if self._folder is not None:
            self._folder.cleanup()
