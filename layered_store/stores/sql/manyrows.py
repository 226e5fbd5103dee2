"""Inserts of many rows as one statement, for MariaDB and MySQL.

Their drivers send a statement for each row as soon as a value stands in a function (``UNHEX``), and
SQLAlchemy joins rows only where nothing follows the values. A batch of 64 users would so wait for
hundreds of round trips, all but the first few while it holds the lock of all writers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.mysql.reserved_words import RESERVED_WORDS_MARIADB, RESERVED_WORDS_MYSQL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ManyRows"]

_MOST_BYTES: Final = 1 << 20
"""Of values in one statement, far below the smallest packet that servers take by default."""

_DIALECT: Final = mysql.dialect(paramstyle="format")
# Which of the two servers it will be is not known yet: names are quoted that either reserves.
_DIALECT.identifier_preparer.reserved_words = RESERVED_WORDS_MARIADB | RESERVED_WORDS_MYSQL


class ManyRows:
    """The text of an insert, with its group of values as often as there are rows.

    Args:
        statement: ``INSERT ... VALUES (...)``, with or without ``ON DUPLICATE KEY UPDATE``; all its
            parameters stand among the values.
        columns: those that get a value, where the statement does not say so.
    """

    def __init__(self, statement: Any, columns: Sequence[str] | None = None) -> None:
        compiled = statement.compile(dialect=_DIALECT, column_keys=columns)
        self._head, _, rest = str(compiled).partition(" VALUES ")
        self._group, on, tail = rest.partition(" ON DUPLICATE KEY UPDATE ")
        self._tail = on + tail
        self._defaults = compiled.params
        # For each parameter in its order what makes of a value that which the driver takes.
        self._names: list[tuple[str, Any]] = []
        for name in compiled.positiontup or ():
            kind = compiled.binds[name].type.dialect_impl(_DIALECT)
            self._names.append((name, kind.bind_processor(_DIALECT) or _as_it_is))

    def pack(self, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield statements with their parameters: one, unless the states are large."""
        values: list[Any] = []
        count = size = 0
        for row in rows:
            own = [make(row.get(name, self._defaults[name])) for name, make in self._names]
            length = sum(len(value) for value in own if isinstance(value, str | bytes))
            if count and size + length > _MOST_BYTES:
                yield self._text(count), tuple(values)
                values, count, size = [], 0, 0
            values += own
            count += 1
            size += length
        if count:
            yield self._text(count), tuple(values)

    def _text(self, count: int) -> str:
        return f"{self._head} VALUES {', '.join([self._group] * count)}{self._tail}"


def _as_it_is(value: Any) -> Any:
    return value
