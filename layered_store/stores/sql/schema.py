"""The tables, for every dialect; the only place that knows their columns.

``latest`` has one row per user, keyed by the user's digest: whatever the database thinks of case,
accents and trailing spaces, two users never share a row. ``history`` has one row per write.
SQLite has another layout than the servers: see :mod:`layered_store.stores.sql.chain`.
``counter`` has one row per number that the store keeps: which is which stands below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.types import UserDefinedType

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import BindParameter, ColumnElement
    from sqlalchemy.engine import Dialect

__all__ = ["COUNTER_ROW", "VERSION_ROW", "Hex", "Tables", "build_tables"]

COUNTER_ROW: Final = 1
"""Row of the counter table that numbers transactions."""

VERSION_ROW: Final = 2
"""Row of the counter table that holds the version of the tables (see ``versions.py``)."""

_MYSQL = ("mysql", "mariadb")


class Hex(UserDefinedType[bytes]):
    """Bytes that travel to MariaDB and MySQL as hexadecimal text.

    aiomysql cannot send bytes with the newest PyMySQL, which took its encoder away
    (PyMySQL issue 1274).

    Args:
        spec: the column's type in DDL.
    """

    cache_ok = True

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def get_col_spec(self, **_: Any) -> str:
        return self.spec

    def bind_processor(self, dialect: Dialect) -> Callable[[bytes | None], str | None]:  # noqa: ARG002
        return lambda value: None if value is None else value.hex()

    def bind_expression(self, bindvalue: BindParameter[bytes]) -> ColumnElement[bytes]:
        return func.unhex(bindvalue, type_=self)


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one store.

    Args:
        metadata: all of them, for ``create_all``.
        latest: one row per user, a tombstone where the user was erased.
        history: one row per write, with its write id.
        counter: one row that numbers transactions, where the database offers nothing better, and
            one with the version of the tables.
    """

    metadata: MetaData
    latest: Table
    history: Table
    counter: Table


def build_tables(latest_name: str, history_name: str, family: str) -> Tables:
    """Return the tables under these names.

    Args:
        latest_name: of the table of latest states.
        history_name: of the table of histories.
        family: ``sqlite``, ``postgresql`` or ``mysql`` (MariaDB too).
    """
    metadata = MetaData()
    build = _chained if family == "sqlite" else _keyed
    latest, history = build(metadata, latest_name, history_name)
    counter = Table(
        f"{latest_name}_counter",
        metadata,
        Column("id", BigInteger, primary_key=True, autoincrement=False),
        Column("position", BigInteger, nullable=False),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )
    return Tables(metadata, latest, history, counter)


def _chained(metadata: MetaData, latest_name: str, history_name: str) -> tuple[Table, Table]:
    """SQLite: states stand in the history alone, in the order of writing."""
    latest = Table(
        latest_name,
        metadata,
        Column("digest", LargeBinary, primary_key=True),
        Column("user_id", Text, nullable=True),
        Column("version", BigInteger, nullable=False),
        Column("erased_version", BigInteger, nullable=True),
        Column("erased_at", BigInteger, nullable=True),
        Column("purge_at", BigInteger, nullable=True),
        Column("debts", Text, nullable=True),
        Column("position", BigInteger, nullable=False),
        Column("updated_at_unix_ms", BigInteger, nullable=True),
        sqlite_with_rowid=False,
    )
    _index_tombstones(latest)
    history = Table(
        history_name,
        metadata,
        # INTEGER and nothing else makes it the row's own number, so that rows are appended.
        Column("position", Integer, primary_key=True, autoincrement=False),
        Column("digest", LargeBinary, nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("write_id", LargeBinary, nullable=False),
        Column("recorded_at", BigInteger, nullable=False),
        Column("previous", BigInteger, nullable=True),
        Column("payload", LargeBinary, nullable=True),
    )
    return latest, history


def _keyed(metadata: MetaData, latest_name: str, history_name: str) -> tuple[Table, Table]:
    """PostgreSQL, MariaDB, MySQL: the latest state in the user's row, the history by user."""
    # MySQL's BLOB ends at 64 kB and its BINARY is the only binary type that can be a key.
    key = LargeBinary().with_variant(Hex("BINARY(16)"), *_MYSQL)
    blob = LargeBinary().with_variant(Hex("LONGBLOB"), *_MYSQL)
    # Compared in Python only; stored so that no server can fold or refuse a character.
    name = Text().with_variant(
        mysql.VARCHAR(256, charset="utf8mb4", collation="utf8mb4_bin"), *_MYSQL
    )
    latest = Table(
        latest_name,
        metadata,
        Column("digest", key, primary_key=True),
        Column("user_id", name, nullable=True),
        Column("version", BigInteger, nullable=False),
        Column("erased_version", BigInteger, nullable=True),
        Column("erased_at", BigInteger, nullable=True),
        Column("purge_at", BigInteger, nullable=True),
        Column("debts", Text, nullable=True),
        Column("position", BigInteger, nullable=False),
        Column("payload", blob, nullable=True),
        Column("write_id", key, nullable=True),
        Column("updated_at_unix_ms", BigInteger, nullable=True),
        Index(f"{latest_name}_position", "position", "digest"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )
    _index_tombstones(latest)
    history = Table(
        history_name,
        metadata,
        Column("digest", key, primary_key=True),
        Column("version", BigInteger, primary_key=True, autoincrement=False),
        Column("write_id", key, nullable=False),
        Column("recorded_at", BigInteger, nullable=False),
        Column("payload", blob, nullable=True),
        UniqueConstraint("digest", "write_id", name=f"{history_name}_write"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )
    return latest, history


def _index_tombstones(latest: Table) -> None:
    """Index tombstones by the time at which they go."""
    # Where the database can, those alone: each write of any user would renew an entry for nothing.
    tombstones = latest.c.purge_at.is_not(None)
    Index(
        f"{latest.name}_purge_at",
        latest.c.purge_at,
        sqlite_where=tombstones,
        postgresql_where=tombstones,
    )
