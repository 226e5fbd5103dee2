"""The texts of a store's statements for SQLite, compiled once for the driver itself."""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.dialects import sqlite

from layered_store.stores.sql.sweep import Sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layered_store.stores.sql.dialects import Statements
    from layered_store.stores.sql.session import Rules

__all__ = ["LiteStatements"]

_NAMED: Final = sqlite.dialect(paramstyle="named")


class _Text:
    """A statement as text; those with lists of values have one text for each length."""

    def __init__(self, statement: Any, columns: Sequence[str] | None = None) -> None:
        compiled = statement.compile(dialect=_NAMED, column_keys=columns)
        self._compiled = compiled
        self._expands = "POSTCOMPILE" in compiled.string
        self._texts: dict[tuple[int, ...], str] = {}
        self._fixed = dict(compiled.params)
        names = [str(column[0]) for column in getattr(compiled, "_result_columns", ())]
        self.make: Any = tuple
        if names:
            make_class: Any = namedtuple  # noqa: PYI024  the names are known at run time
            self.make = make_class("row", names)._make

    def bind(self, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the text and the values by name."""
        flat = {name: values.get(name, value) for name, value in self._fixed.items()}
        if not self._expands:
            return self._compiled.string, flat
        lists = {name: value for name, value in values.items() if isinstance(value, list)}
        shape = tuple(map(len, lists.values()))
        text = self._texts.get(shape)
        if text is None:
            state = self._compiled.construct_expanded_state(values)
            text = self._texts[shape] = state.statement
        for name, several in lists.items():
            del flat[name]
            flat.update({f"{name}_{n}": value for n, value in enumerate(several, 1)})
        return text, flat


class LiteStatements:
    """The texts of a store's statements for SQLite.

    Args:
        statements: what to compile.
        rules: the store's options.
    """

    def __init__(self, statements: Statements, rules: Rules) -> None:
        self._statements = statements
        self._texts: dict[int, tuple[Any, _Text]] = {}
        quote = _NAMED.identifier_preparer.quote
        tables = statements.tables
        latest, history = quote(tables.latest.name), quote(tables.history.name)
        counter = quote(tables.counter.name)
        self.sweep = Sweep(latest, history, rules)
        newest = f"{latest} l LEFT JOIN {history} h ON h.position = l.position"
        columns = "l.user_id, l.version, h.payload"
        self.read = f"SELECT {columns} FROM {newest} WHERE l.digest = ?"
        self.read_many = f"SELECT l.digest, {columns} FROM {newest} WHERE l.digest IN (%s)"
        self.states = (
            f"SELECT digest, version, erased_version, position FROM {latest} WHERE digest IN (%s)"
        )
        self.advance = f"UPDATE {counter} SET position = ? WHERE id = 1"
        self.position = f"SELECT position FROM {counter} WHERE id = 1"
        self.append = (
            f"INSERT INTO {history}"
            " (position, digest, version, write_id, recorded_at, previous, payload)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)"
        )
        self.put = (
            f"INSERT INTO {latest} (digest, user_id, version, updated_at_unix_ms, position)"
            " VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (digest) DO UPDATE SET user_id = excluded.user_id,"
            " version = excluded.version, updated_at_unix_ms = excluded.updated_at_unix_ms,"
            " position = excluded.position"
        )
        # Only of a user who was erased: setting it costs a page of its index.
        self.revive = f"UPDATE {latest} SET purge_at = NULL WHERE digest = ?"
        self.hide = f"UPDATE {history} SET payload = NULL WHERE position = ?"

    def text(self, statement: Any) -> _Text:
        """Return a statement's text, compiled on first use."""
        known = self._texts.get(id(statement))
        if known is not None:
            return known[1]
        columns = None
        if statement is self._statements.append:
            columns = [column.name for column in self._statements.tables.history.c]
        text = _Text(statement, columns)
        # The statement stays too, so that no other has its id.
        self._texts[id(statement)] = (statement, text)
        return text
