"""Driver errors become ours: one table per kind of server, by its own error codes.

The texts of drivers are never copied: they may show values. The code and the class name are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import exc as sa

from layered_store.errors import (
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    kind_of_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MISSING_TABLE", "concerns_one", "read_only", "statement_lost", "translate"]

MISSING_TABLE: Final = (
    "a table does not exist; create it (create_tables=True does) or check the table names"
)
_REFUSED: Final = "the database refused the login; check user, password and rights"
_NO_RIGHTS: Final = "the database's user has no right to do this; grant it"
_NO_DATABASE: Final = "the database does not exist; create it or check the URL"
_READ_ONLY: Final = "the database is read-only"
_FULL: Final = "the database has no room left"
_CONFLICT: Final = "another transaction was in the way (lock or serialization conflict)"
_BUSY: Final = "the database accepts no more connections or is not ready"
_MANY: Final = "the database accepts no more connections; lower pool_size, or raise its limit"
_LOST: Final = "the connection to the database failed"
_SLOW: Final = "the database did not answer within the time limit"
_GARBAGE: Final = "the server does not answer as a database of this kind"
_NO_STATEMENT: Final = (
    "prepared statements do not last here, as behind a pooler in transaction mode; pass url=, or"
    " build the engine without them"
)
_UNWRITABLE: Final = "a user id has characters that the encoding of the connection lacks"
_DAMAGED: Final = "the file is damaged or is no SQLite database"
_CANNOT_OPEN: Final = "the database file cannot be opened; check that its directory exists"

_DISTRUSTED: Final = (
    "the server's certificate was not accepted; check the authority in the URL, the host's name and"
    " whether it ran out"
)
_BAD_CERTIFICATE: Final = re.compile(
    r"certificate verify failed|server certificate for .* does not match host name", re.IGNORECASE
).search
_LOGIN_FAILED: Final = re.compile(r"FATAL: .*(authentication failed|no pg_hba.conf entry)").search
_DETAIL: Final = re.compile(r"\nDETAIL: ").search
_ABOUT_CALLS: Final = (
    "another transaction",
    "the write and an erasure",
    "the server's clock was set since the write began",
)

# (text, whether repeating the same call can help)
_Rule = tuple[str, bool]

# By SQLSTATE, longest prefix first: PostgreSQL manual, appendix A.
_POSTGRES: Final[dict[str, _Rule]] = {
    "0A000": ("a cached plan is out of date", True),
    "26000": (_NO_STATEMENT, True),
    "42P05": (_NO_STATEMENT, True),
    "23505": (_CONFLICT, True),
    "25006": (_READ_ONLY, True),
    "25P03": (_LOST, True),
    "25P04": (_SLOW, True),
    "3D000": (_NO_DATABASE, False),
    "42P01": (MISSING_TABLE, False),
    "42501": (_NO_RIGHTS, False),
    "3F000": (MISSING_TABLE, False),
    "55000": (_BUSY, True),
    "55P03": (_CONFLICT, True),
    "57014": (_SLOW, True),
    "53100": (_FULL, True),
    "53300": (_MANY, True),
    "08": (_LOST, True),
    "28": (_REFUSED, False),
    "40": (_CONFLICT, True),
    "53": (_BUSY, True),
    "57": (_BUSY, True),
    "58": ("the database reports an error of its system", True),
    "XX": ("the database reports an internal error", True),
}
# By error number: MariaDB knowledge base, "MariaDB Error Codes".
_MYSQL: Final[dict[int, _Rule]] = {
    **dict.fromkeys((1044, 1045, 1698, 1130), (_REFUSED, False)),
    **dict.fromkeys((1142, 1143), (_NO_RIGHTS, False)),
    # Another way to log in, an expired password, a locked account, TLS alone.
    **dict.fromkeys((1251, 1820, 1862, 3118, 3159, 4151), (_REFUSED, False)),
    **dict.fromkeys((1205, 1213, 1020, 1062), (_CONFLICT, True)),
    **dict.fromkeys((1290, 1792, 1836), (_READ_ONLY, True)),
    **dict.fromkeys((3, 28, 1021, 1114), (_FULL, True)),
    **dict.fromkeys((1040, 1203, 1226), (_MANY, True)),
    **dict.fromkeys((1047, 1053, 1077, 1079), (_BUSY, True)),
    **dict.fromkeys((1969, 3024), (_SLOW, True)),
    **dict.fromkeys((1927, 2002, 2003, 2006, 2013, 2014, 2055, 4031), (_LOST, True)),
    1049: (_NO_DATABASE, False),
    1153: ("a state is larger than the server takes (max_allowed_packet)", False),
    1146: (MISSING_TABLE, False),
    2012: (_GARBAGE, True),
    2027: (_GARBAGE, True),
}
# By the name of the result code, else of the primary one: sqlite.org/rescode.html.
_SQLITE: Final[dict[str, _Rule]] = {
    "SQLITE_CONSTRAINT_PRIMARYKEY": (_CONFLICT, True),
    "SQLITE_CONSTRAINT_ROWID": (_CONFLICT, True),
    "SQLITE_CONSTRAINT_UNIQUE": (_CONFLICT, True),
    "SQLITE_BUSY": (_CONFLICT, True),
    "SQLITE_LOCKED": (_CONFLICT, True),
    "SQLITE_FULL": (_FULL, True),
    "SQLITE_IOERR": ("reading or writing the database file failed", True),
    "SQLITE_READONLY": (_READ_ONLY, False),
    "SQLITE_CANTOPEN": (_CANNOT_OPEN, False),
    "SQLITE_CORRUPT": (_DAMAGED, False),
    "SQLITE_NOTADB": (_DAMAGED, False),
    "SQLITE_PERM": (_REFUSED, False),
    "SQLITE_AUTH": (_REFUSED, False),
}


def translate(
    exc: Exception, *, operation: str, layer: str, outcome_unknown: bool = False
) -> StoreError:
    """Return what a driver's or SQLAlchemy's error means to a caller; raise it ``from exc``.

    Args:
        exc: the error; one of ours is returned, with its place.
        operation: the store operation.
        layer: the store's name.
        outcome_unknown: whether a commit had been sent.
    """
    if isinstance(exc, StoreError):
        return exc.placed(operation, layer)
    place: Any = {"operation": operation, "layer": layer, "outcome_unknown": outcome_unknown}
    if isinstance(exc, ModuleNotFoundError):
        return StoreError(
            f"the driver {exc.name!r} is not installed; install the extra of this database",
            **place,
        )
    if isinstance(exc, sa.TimeoutError):
        return StoreTimeoutError("no connection became free within the time limit", **place)
    chain = list(_causes(exc))
    for cause in chain:
        _forget_rows(cause)
    for cause in chain:
        rule = _rule(cause)
        if rule is not None:
            text, retryable = rule
            kind = StoreTimeoutError if text is _SLOW else UnavailableError
            return kind(text, retryable=retryable, **place)
    if any(isinstance(cause, UnicodeEncodeError) for cause in chain):
        return StoreError(_UNWRITABLE, **place)
    for cause in chain:
        if isinstance(cause, TimeoutError):
            return StoreTimeoutError(_SLOW, **place)
        if isinstance(cause, OSError | EOFError):
            return UnavailableError(f"{_LOST} ({kind_of_error(cause)})", **place)
    name = type(chain[-1]).__name__
    own = _of_driver(exc)
    if own is not None:
        return own(name, place)
    if isinstance(exc, sa.DBAPIError) and (
        exc.connection_invalidated or isinstance(exc, sa.InterfaceError | sa.OperationalError)
    ):
        return UnavailableError(f"{_LOST} ({name})", **place)
    if isinstance(exc, sa.InternalError):
        # Without a code of the server's it is the driver that lost track of the protocol.
        return UnavailableError(f"{_GARBAGE} ({name})", **place)
    if isinstance(exc, sa.SQLAlchemyError):
        return _refused(name, place)
    # A driver that meets bytes it does not expect raises almost anything.
    return UnavailableError(f"{_GARBAGE} ({name})", **place)


def _of_driver(exc: Exception) -> Callable[[str, dict[str, Any]], StoreError] | None:
    """Return what an error means that came from a driver itself, not through SQLAlchemy."""
    module = type(exc).__module__
    kinds = {base.__name__ for base in type(exc).__mro__}
    if module == "sqlite3":
        if "ProgrammingError" in kinds:  # closed below us
            return lambda name, place: UnavailableError(f"{_LOST} ({name})", **place)
        return _refused
    if module.startswith("asyncpg"):
        # InterfaceError: the connection was closed; InternalClientError: it lost the protocol.
        if "PostgresError" not in kinds:
            return lambda name, place: UnavailableError(f"{_LOST} ({name})", **place)
        return _refused
    return None


def _refused(name: str, place: dict[str, Any]) -> StoreError:
    return StoreError(f"the database refused the statement ({name})", **place)


def concerns_one(error: Exception, *, alone_at_work: bool) -> bool:
    """Tell whether an error may be about one call, and not about the connection or the server.

    Args:
        error: ours.
        alone_at_work: whether nobody else writes meanwhile: a conflict is then another program's.
    """
    if not isinstance(error, UnavailableError):
        return True
    if error.message.startswith(_CONFLICT):
        return not alone_at_work
    return error.message.startswith(_ABOUT_CALLS)


def statement_lost(error: StoreError) -> bool:
    """Tell whether a prepared statement was not there, or another's stood in its place."""
    return error.message == _NO_STATEMENT


def read_only(error: StoreError) -> bool:
    """Tell whether the server takes no writes, as a replica does."""
    return error.message == _READ_ONLY


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it stands for, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        below = getattr(current, "orig", None) or current.__cause__
        current = below if isinstance(below, BaseException) else None


def _forget_rows(cause: BaseException) -> None:
    """Take from a driver's error what PostgreSQL tells in detail: whole rows, with ids and states.

    It stays the cause of ours, and a log shows causes.
    """
    if getattr(cause, "detail", None) and hasattr(cause, "sqlstate"):
        cause.detail = None  # type: ignore[attr-defined]
    text = cause.args[0] if cause.args else None
    if isinstance(text, str) and (found := _DETAIL(text)):
        cause.args = (text[: found.start()], *cause.args[1:])


def _rule(cause: BaseException) -> _Rule | None:
    sqlite = getattr(cause, "sqlite_errorname", None)
    if isinstance(sqlite, str):
        # Extended codes, such as SQLITE_READONLY_DBMOVED, begin with the primary one.
        primary = "_".join(sqlite.split("_")[:2])
        if primary == "SQLITE_ERROR" and str(cause).startswith("no such table"):
            return MISSING_TABLE, False
        return _SQLITE.get(sqlite) or _SQLITE.get(primary)
    # Before the SQLSTATE: MySQL's drivers carry one too, and it says less than the number.
    arguments = cause.args
    if arguments and type(arguments[0]) is int and not isinstance(cause, OSError):
        return _MYSQL.get(arguments[0])
    state = getattr(cause, "sqlstate", None)
    if state is None and _BAD_CERTIFICATE(str(cause)):
        return _DISTRUSTED, False
    if state is None and _LOGIN_FAILED(str(cause)):
        return _REFUSED, False  # of a login psycopg tells the text alone
    if state in (None, "08P01") and "unsupported startup parameter" in str(cause):
        return _NO_STATEMENT, True  # so says pgbouncer, before any statement is lost
    if isinstance(state, str) and re.fullmatch("[0-9A-Z]{5}", state):
        return _POSTGRES.get(state) or _POSTGRES.get(state[:2])
    return None
