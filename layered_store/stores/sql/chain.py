"""SQLite's layout: the history is one log in the order of writing, each user's entries a chain.

An entry holds its place in the log and that of the entry before it of the same user; the user's row
holds the place of the newest, and no state. A write so appends at the end of the file and changes
one small row, where histories in the order of users touch a page each for every key they have. The
log also is the change log: nothing else has to be kept in that order.

Every user's entries are reached from the user's row alone, so only the oldest of them may go: an
entry in the middle would take those behind it out of reach, of an erasure too. Positions come from
the counter and are never used twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Integer,
    and_,
    bindparam,
    delete,
    literal,
    literal_column,
    select,
    update,
)

from layered_store.stores.sql.schema import COUNTER_ROW

if TYPE_CHECKING:
    from sqlalchemy import Select

    from layered_store.stores.sql.dialects import Statements
    from layered_store.stores.sql.schema import Tables

__all__ = ["chain_statements"]


def chain_statements(statements: Statements) -> None:
    """Put SQLite's form in the place of the statements that differ."""
    tables = statements.tables
    latest, history, counter = tables.latest, tables.history, tables.counter
    now_us = bindparam("now_us", type_=BigInteger)
    position = bindparam("at_position", type_=BigInteger)
    digest = bindparam("at_digest", type_=latest.c.digest.type)
    digests = bindparam("digests", type_=latest.c.digest.type, expanding=True)
    write_ids = bindparam("write_ids", type_=latest.c.digest.type, expanding=True)
    max_rows = bindparam("max_rows", type_=BigInteger)
    newest = latest.outerjoin(history, history.c.position == latest.c.position)

    statements.read = (
        select(latest.c.user_id, latest.c.version, history.c.payload)
        .select_from(newest)
        .where(latest.c.digest == digest)
    )
    statements.read_many = (
        select(latest.c.digest, latest.c.user_id, latest.c.version, history.c.payload)
        .select_from(newest)
        .where(latest.c.digest.in_(digests))
    )
    statements.lock = (
        select(
            latest.c.digest,
            latest.c.user_id,
            latest.c.version,
            history.c.payload,
            latest.c.erased_version,
            latest.c.erased_at,
            latest.c.debts,
            latest.c.updated_at_unix_ms,
            latest.c.position,
            now_us.label("now_us"),
        )
        .select_from(newest)
        .where(latest.c.digest.in_(digests))
        .order_by(latest.c.digest)
    )
    statements.advance = (
        update(counter)
        .where(counter.c.id == COUNTER_ROW)
        .values(position=counter.c.position + bindparam("steps", type_=BigInteger))
    )
    statements.store = (
        update(latest)
        .where(latest.c.digest == digest)
        .values(
            user_id=bindparam("to_user_id"),
            version=bindparam("to_version"),
            updated_at_unix_ms=bindparam("to_updated"),
            position=position,
            purge_at=None,
        )
    )
    statements.hide = (
        update(history).where(history.c.position == position).values(payload=None)
    )

    every = _chain(tables, latest.c.digest.in_(digests))
    statements.seen = select(history.c.digest, history.c.write_id).where(
        history.c.position.in_(select(every.c.position)), history.c.write_id.in_(write_ids)
    )
    own = _chain(tables, latest.c.digest == digest)
    statements.forget = delete(history).where(history.c.position.in_(select(own.c.position)))
    # One more than asked for: where the user was erased once, the last entry shows nothing.
    shown = _chain(tables, latest.c.digest == digest, most=max_rows + 1)
    statements.history = (
        select(history.c.payload)
        .select_from(shown.join(history, history.c.position == shown.c.position))
        .where(
            history.c.payload.is_not(None),
            history.c.recorded_at >= now_us - bindparam("max_age_us", type_=BigInteger),
        )
        .order_by(history.c.version.desc())
        .limit(max_rows)
    )
    statements.changes = (
        select(
            latest.c.digest,
            latest.c.version,
            latest.c.user_id,
            latest.c.position,
            latest.c.debts,
        )
        .select_from(
            history.join(
                latest,
                and_(
                    latest.c.digest == history.c.digest, latest.c.position == history.c.position
                ),
            )
        )
        .where(
            history.c.position > bindparam("after_position", type_=BigInteger),
            history.c.position < bindparam("horizon", type_=BigInteger),
        )
        .order_by(history.c.position)
        .limit(max_rows)
    )
    # A tombstone has an entry of each erasure that made it; they go first, while the row still says
    # where they are.
    over = _chain(
        tables,
        and_(latest.c.digest == digest, latest.c.purge_at < bindparam("due", type_=BigInteger)),
    )
    statements.purge_history = delete(history).where(
        history.c.position.in_(select(over.c.position))
    )


def _chain(tables: Tables, of: Any, *, most: Any = None) -> Any:
    """Return a query of users' entries, the newest first.

    Args:
        tables: of the store.
        of: which users' rows to start from.
        most: how many entries of each user to follow.
    """
    latest, history = tables.latest, tables.history
    columns: list[Any] = [history.c.position, history.c.previous]
    if most is not None:
        columns.append(literal_column("1", Integer).label("place"))
    first: Select[Any] = (
        select(*columns)
        .select_from(latest.join(history, history.c.position == latest.c.position))
        .where(of)
    )
    chain = first.cte("chain", recursive=True)
    further: list[Any] = [history.c.position, history.c.previous]
    if most is not None:
        further.append(chain.c.place + literal(1, Integer))
    rest = select(*further).select_from(
        chain.join(history, history.c.position == chain.c.previous)
    )
    if most is not None:
        rest = rest.where(chain.c.place < most)
    return chain.union_all(rest)
