"""Every statement of the store, built once per store, and what differs between databases.

The change log needs positions that no later commit undercuts:

* PostgreSQL: the transaction's 64-bit id. A page ends below the oldest id still running
  (``pg_snapshot_xmin``), so nothing below it can be committed later. Tables that came with a dump
  hold ids of another server, which may be far ahead of this one's: such rows get a new place.
* SQLite: a counter row, raised inside ``BEGIN IMMEDIATE``, which admits one writer at a time. Each
  entry of the history has a position of its own: see :mod:`layered_store.stores.sql.chain`.
* MariaDB, MySQL: the same counter row; it is locked right before the last statements of a
  transaction, so commits happen in the order of positions. The alternative, database time with an
  overlap, needs a bound on how long a commit can take, and there is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite

from layered_store.stores.sql.chain import chain_statements
from layered_store.stores.sql.manyrows import ManyRows
from layered_store.stores.sql.schema import COUNTER_ROW, VERSION_ROW
from layered_store.stores.sql.versions import is_current, upgrade

if TYPE_CHECKING:
    from layered_store.stores.sql.schema import Tables

__all__ = ["FAMILIES", "NOW_US", "XID", "Statements"]

FAMILIES: Final = {
    "sqlite": "sqlite",
    "postgresql": "postgresql",
    "mysql": "mysql",
    "mariadb": "mysql",
}
"""What a SQLAlchemy dialect name counts as."""

_BEGIN: Final = {
    # A reader that turns writer is refused at once however long busy_timeout is: writers begin so.
    "sqlite": ("BEGIN IMMEDIATE",),
    # Each statement must see what was committed while it waited for a lock.
    "postgresql": ("BEGIN ISOLATION LEVEL READ COMMITTED",),
    # Without it, locking a missing row locks a gap, and two such writers deadlock.
    "mysql": ("SET TRANSACTION ISOLATION LEVEL READ COMMITTED", "START TRANSACTION"),
}
_END: Final = {
    # The server may be set to begin another transaction behind each (completion_type).
    "mysql": " AND NO CHAIN",
}
NOW_US: Final = {
    "postgresql": "(extract(epoch from clock_timestamp()) * 1000000)::bigint",
    "mysql": "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))",
}
XID: Final = "pg_current_xact_id()::text::bigint"
_XMIN: Final = "pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
_XMAX: Final = "pg_snapshot_xmax(pg_current_snapshot())::text::bigint"

_AGED: Final = 32
"""Most entries of a user that a trim removes for their age."""


@dataclass(slots=True)
class Statements:
    """The statements for one kind of database.

    Args:
        tables: the tables they speak of.
        family: ``sqlite``, ``postgresql`` or ``mysql`` (MariaDB too).
    """

    tables: Tables
    family: str
    commit: str = field(init=False)
    rollback: str = field(init=False)
    begin: tuple[str, ...] = field(init=False)
    host_time: bool = field(init=False)
    counted: bool = field(init=False)
    chained: bool = field(init=False)
    read: Any = field(init=False)
    read_many: Any = field(init=False)
    lock: Any = field(init=False)
    place: Any = field(init=False)
    seen: Any = field(init=False)
    advance: Any = field(init=False)
    position: Any = field(init=False)
    start_counter: Any = field(init=False)
    start_version: Any = field(init=False)
    set_version: Any = field(init=False)
    numbers: Any = field(init=False)
    store: Any = field(init=False)
    hide: Any = field(init=False, default=None)
    bury: Any = field(init=False)
    append: Any = field(init=False)
    trim: Any = field(init=False)
    trim_aged: Any = field(init=False)
    forget: Any = field(init=False)
    purge_history: Any = field(init=False)
    history: Any = field(init=False)
    debts: Any = field(init=False)
    owe: Any = field(init=False)
    now: Any = field(init=False)
    horizon: Any = field(init=False)
    changes: Any = field(init=False)
    end_of_ids: Any = field(init=False, default=None)
    adopt: Any = field(init=False, default=None)
    owing: Any = field(init=False)
    users: Any = field(init=False)
    purgeable: Any = field(init=False)
    purge: Any = field(init=False)
    many: dict[int, ManyRows] = field(init=False, default_factory=dict)
    """By statement, how several rows go out as one."""

    def __post_init__(self) -> None:
        self.begin = _BEGIN[self.family]
        self.commit = f"COMMIT{_END.get(self.family, '')}"
        self.rollback = f"ROLLBACK{_END.get(self.family, '')}"
        self.host_time = self.family == "sqlite"
        self.counted = self.family != "postgresql"
        self.chained = self.family == "sqlite"
        latest, history, counter = self.tables.latest, self.tables.history, self.tables.counter
        now_us: Any = (
            bindparam("now_us", type_=BigInteger)
            if self.host_time
            else literal_column(NOW_US[self.family], BigInteger)
        )
        digest = bindparam("at_digest", type_=latest.c.digest.type)
        position: Any = (
            bindparam("at_position", type_=BigInteger)
            if self.counted
            else literal_column(XID, BigInteger)
        )

        self.place = self._placeholder(latest)
        self.position = select(counter.c.position).where(counter.c.id == COUNTER_ROW)
        self.start_counter = self._ignoring(counter, "id").values(id=COUNTER_ROW, position=1)
        self.start_version = self._ignoring(counter, "id").values(
            id=VERSION_ROW, position=bindparam("to_version", type_=BigInteger)
        )
        self.set_version = (
            update(counter)
            .where(counter.c.id == VERSION_ROW)
            .values(position=bindparam("to_version", type_=BigInteger))
        )
        self.numbers = select(counter.c.id, counter.c.position)
        self.append = insert(history)
        self.debts = select(latest.c.debts).where(latest.c.digest == digest)
        self.owe = (
            update(latest).where(latest.c.digest == digest).values(debts=bindparam("to_debts"))
        )
        of_the_state = ("user_id", "payload", "write_id", "updated_at_unix_ms")
        self.bury = (
            update(latest)
            .where(latest.c.digest == digest)
            .values(
                **{name: None for name in of_the_state if name in latest.c},
                version=bindparam("to_version"),
                erased_version=bindparam("to_version"),
                erased_at=bindparam("to_erased_at", type_=BigInteger),
                purge_at=bindparam("to_purge_at", type_=BigInteger),
                debts=bindparam("to_debts"),
                position=position,
            )
        )
        self.now = select(now_us)
        end = (
            select(counter.c.position + 1).where(counter.c.id == COUNTER_ROW).scalar_subquery()
            if self.counted
            else literal_column(_XMIN, BigInteger)
        )
        self.horizon = select(end.label("horizon"), now_us.label("now_us"))
        # Tombstones alone are in the index of purge_at.
        self.owing = (
            select(latest.c.digest, latest.c.version)
            .where(
                latest.c.purge_at.is_not(None),
                latest.c.debts.like(bindparam("tier_pattern"), escape="/"),
            )
            .limit(bindparam("max_rows", type_=BigInteger))
        )
        self.users = (
            select(latest.c.digest, latest.c.user_id)
            .where(
                latest.c.digest > bindparam("after_digest", type_=latest.c.digest.type),
                latest.c.user_id.is_not(None),
            )
            .order_by(latest.c.digest)
            .limit(bindparam("max_rows", type_=BigInteger))
        )
        due = bindparam("due", type_=BigInteger)
        paid = or_(latest.c.debts.is_(None), latest.c.debts == "[]")
        self.purgeable = (
            select(latest.c.digest)
            .where(latest.c.purge_at < due, paid)
            .order_by(latest.c.purge_at)
            .limit(bindparam("max_rows", type_=BigInteger))
        )
        self.purge = delete(latest).where(latest.c.digest == digest, latest.c.purge_at < due)
        if self.chained:
            chain_statements(self)
        else:
            self._keyed(now_us, position)

    def _keyed(self, now_us: Any, position: Any) -> None:
        """Build those that differ in SQLite, where :func:`chain_statements` builds them."""
        latest, history, counter = self.tables.latest, self.tables.history, self.tables.counter
        digest = bindparam("at_digest", type_=latest.c.digest.type)
        digests = bindparam("digests", type_=latest.c.digest.type, expanding=True)
        write_ids = bindparam("write_ids", type_=latest.c.digest.type, expanding=True)
        self.read = select(latest.c.user_id, latest.c.version, latest.c.payload).where(
            latest.c.digest == digest
        )
        self.read_many = select(
            latest.c.digest, latest.c.user_id, latest.c.version, latest.c.payload
        ).where(latest.c.digest.in_(digests))
        # Rows are locked in one order everywhere, so that two batches cannot wait for each other.
        self.lock = (
            select(
                latest.c.digest,
                latest.c.user_id,
                latest.c.version,
                latest.c.payload,
                latest.c.erased_version,
                latest.c.erased_at,
                latest.c.debts,
                latest.c.updated_at_unix_ms,
                now_us.label("now_us"),
            )
            .where(latest.c.digest.in_(digests))
            .order_by(latest.c.digest)
            .with_for_update()
        )
        self.seen = select(history.c.digest, history.c.write_id).where(
            history.c.digest.in_(digests), history.c.write_id.in_(write_ids)
        )
        self.advance = (
            update(counter)
            .where(counter.c.id == COUNTER_ROW)
            .values(position=func.last_insert_id(counter.c.position + 1))
        )
        values = {
            "user_id": bindparam("to_user_id"),
            "version": bindparam("to_version"),
            "payload": bindparam("to_payload", type_=latest.c.payload.type),
            "write_id": bindparam("to_write_id", type_=latest.c.digest.type),
            "updated_at_unix_ms": bindparam("to_updated"),
            "position": position,
        }
        if self.family == "mysql":
            # The rows are there and locked: an insert, since many of those are one statement.
            given = mysql.insert(latest).values(digest=digest, **values)
            self.store = given.on_duplicate_key_update(
                {**{name: given.inserted[name] for name in values}, "purge_at": null()}
            )
            names = [column.name for column in history.c]
            for statement, columns in (
                (self.place, None), (self.append, names), (self.store, None)
            ):  # fmt: skip
                self.many[id(statement)] = ManyRows(statement, columns)
        else:
            self.store = (
                update(latest).where(latest.c.digest == digest).values(**values, purge_at=None)
            )
        self.trim = delete(history).where(
            history.c.digest == digest,
            history.c.version <= bindparam("floor", type_=BigInteger),
        )
        # Only the oldest entries are looked at: each write would otherwise pass all of its user's.
        oldest = (
            select(history.c.version, history.c.recorded_at)
            .where(history.c.digest == digest)
            .order_by(history.c.version)
            .limit(_AGED)
            .subquery()
        )
        aged = select(func.coalesce(func.max(oldest.c.version), 0)).where(
            oldest.c.recorded_at < bindparam("cutoff", type_=BigInteger)
        )
        self.trim_aged = delete(history).where(
            history.c.digest == digest,
            history.c.version
            <= func.greatest(bindparam("floor", type_=BigInteger), aged.scalar_subquery()),
        )
        self.forget = delete(history).where(history.c.digest == digest)
        self.history = (
            select(history.c.payload)
            .where(
                history.c.digest == digest,
                history.c.payload.is_not(None),
                history.c.recorded_at >= now_us - bindparam("max_age_us", type_=BigInteger),
            )
            .order_by(history.c.version.desc())
            .limit(bindparam("max_rows", type_=BigInteger))
        )
        after = bindparam("after_position", type_=BigInteger)
        self.changes = (
            select(
                latest.c.digest,
                latest.c.version,
                latest.c.user_id,
                latest.c.position,
                latest.c.debts,
            )
            .where(
                or_(
                    latest.c.position > after,
                    and_(
                        latest.c.position == after,
                        latest.c.digest > bindparam("after_digest", type_=latest.c.digest.type),
                    ),
                ),
                latest.c.position < bindparam("horizon", type_=BigInteger),
                latest.c.position > 0,
            )
            .order_by(latest.c.position, latest.c.digest)
            .limit(bindparam("max_rows", type_=BigInteger))
        )
        if not self.counted:
            xmax = literal_column(_XMAX, BigInteger)
            self.end_of_ids = select(xmax)
            foreign = (
                select(latest.c.digest)
                .where(latest.c.position >= xmax)
                .limit(bindparam("max_rows", type_=BigInteger))
                .with_for_update(skip_locked=True)
            )
            self.adopt = (
                update(latest).where(latest.c.digest.in_(foreign)).values(position=position)
            )
        # What recalls the erasure itself goes with its tombstone.
        self.purge_history = delete(history).where(
            history.c.digest == digest,
            ~select(latest.c.digest).where(latest.c.digest == digest).exists(),
        )

    def _ignoring(self, table: Any, key: str) -> Any:
        """Return an insert that leaves a row that is there as it is."""
        if self.family == "mysql":
            # Not INSERT IGNORE, which also turns other errors into warnings.
            return mysql.insert(table).on_duplicate_key_update({key: table.c[key]})
        dialect: Any = sqlite if self.family == "sqlite" else postgresql
        return dialect.insert(table).on_conflict_do_nothing()

    def _placeholder(self, latest: Any) -> Any:
        """Return the insert that gives a new user a row to lock.

        Nobody sees it: the transaction fills it before it commits. Versions begin at the
        database's milliseconds, so that a user whose tombstone was forgotten goes on growing.
        """
        if self.family == "mysql":
            start: Any = literal_column(f"{NOW_US['mysql']} DIV 1000 - 1", BigInteger)
        elif self.family == "postgresql":
            start = literal_column(f"{NOW_US['postgresql']} / 1000 - 1", BigInteger)
        else:
            start = bindparam("start_version", type_=BigInteger)
        return self._ignoring(latest, "digest").values(
            digest=bindparam("at_digest", type_=latest.c.digest.type), version=start, position=0
        )

    async def create(self, connection: Any) -> None:
        """Create the missing tables, bring older ones up to date; one process at a time.

        Raises:
            ConfigError: the tables are of a version that this release does not know.
        """
        if await is_current(connection, self):
            return
        name = self.tables.latest.name
        if self.family == "postgresql":
            await connection.exec_driver_sql("BEGIN")
            lock = select(func.pg_advisory_xact_lock(func.hashtext(f"layered_store.{name}")))
            await connection.execute(lock)
            await upgrade(connection, self)
            await connection.exec_driver_sql("COMMIT")
        elif self.family == "mysql":
            await connection.execute(
                text("SELECT GET_LOCK(:name, 30)"), {"name": f"ls.{name}"[:64]}
            )
            try:
                await upgrade(connection, self)
            finally:
                await connection.execute(
                    text("SELECT RELEASE_LOCK(:name)"), {"name": f"ls.{name}"[:64]}
                )
        else:
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
            await upgrade(connection, self)
            await connection.exec_driver_sql("COMMIT")
