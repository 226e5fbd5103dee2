"""What errors of databases' drivers mean to a caller: their own classes, without a server."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from pathlib import Path

import asyncpg
import psycopg
import pymysql.err as mysql
import pytest
from sqlalchemy import exc as sa

from layered_store.errors import StoreError, StoreTimeoutError, UnavailableError
from layered_store.stores.erasures import Began, KnownErasures
from layered_store.stores.sql.failures import concerns_one, statement_lost, translate
from layered_store.stores.sql.postgres import refused
from layered_store.testing import FakeClock

SECRET = "marked-value"
CONFLICT = "another transaction was in the way"
LOST = "the connection to the database failed"
GARBAGE = "the server does not answer as a database"
REFUSED = "the database refused the statement"
LOGIN = "the database refused the login"
NO_STATEMENT = "prepared statements do not last here"
SLOW = "did not answer within the time limit"


def wrapped(
    kind: type[sa.DBAPIError], orig: BaseException, *, invalidated: bool = False
) -> sa.DBAPIError:
    """As SQLAlchemy hands on what a driver raised."""
    return kind(f"SELECT '{SECRET}'", {"value": SECRET}, orig, connection_invalidated=invalidated)


def caused(kind: type[Exception], cause: BaseException) -> Exception:
    error = kind(SECRET)
    error.__cause__ = cause
    return error


def postgres(state: str) -> asyncpg.PostgresError:
    """What asyncpg makes of the server's answer."""
    fields = {"S": "ERROR", "V": "ERROR", "C": state, "M": SECRET, "D": SECRET}
    error = asyncpg.PostgresError.new(fields)
    assert error.sqlstate == state
    return error


def mariadb(number: int) -> sa.DBAPIError:
    """As SQLAlchemy hands on the server's answer."""
    return wrapped(sa.OperationalError, mysql.OperationalError(number, SECRET))


def lite(raises: Callable[[sqlite3.Connection], object]) -> sqlite3.Error:
    """What SQLite itself raises."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY CHECK (a > 0))")
        with pytest.raises(sqlite3.Error) as caught:
            raises(connection)
    finally:
        connection.close()
    return caught.value


def twice(connection: sqlite3.Connection) -> None:
    for _ in range(2):
        connection.execute("INSERT INTO t VALUES (1)")


def unfit(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO t VALUES (-1)")


def closed(connection: sqlite3.Connection) -> None:
    connection.close()
    connection.execute("SELECT 1")


ERRORS: list[tuple[str, Exception, type[StoreError], str, bool]] = [
    # (what, the error, our class, how the text begins or what it holds, whether to repeat)
    ("no driver", ModuleNotFoundError(name="asyncpg"), StoreError, "'asyncpg' is not", False),
    ("pool", sa.TimeoutError("QueuePool limit"), StoreTimeoutError, "no connection became", True),
    # PostgreSQL, by SQLSTATE: the longest prefix counts.
    ("unique", postgres("23505"), UnavailableError, CONFLICT, True),
    ("check", postgres("23514"), StoreError, REFUSED, False),
    ("sa check", wrapped(sa.IntegrityError, postgres("23514")), StoreError, REFUSED, False),
    ("serialization", postgres("40001"), UnavailableError, CONFLICT, True),
    ("deadlock", postgres("40P01"), UnavailableError, CONFLICT, True),
    ("cancelled by a limit", postgres("57014"), StoreTimeoutError, SLOW, True),
    ("transaction_timeout", postgres("25P04"), StoreTimeoutError, SLOW, True),
    (
        "transaction_timeout of psycopg",
        wrapped(sa.InternalError, psycopg.errors.lookup("25P04")(SECRET)),
        StoreTimeoutError,
        SLOW,
        True,
    ),
    ("shutdown", postgres("57P01"), UnavailableError, "accepts no more connections", True),
    ("disk full", postgres("53100"), UnavailableError, "no room left", True),
    ("too many", postgres("53300"), UnavailableError, "lower pool_size, or raise its limit", True),
    ("takes no logins now", postgres("55000"), UnavailableError, "or is not ready", True),
    ("standby", postgres("25006"), UnavailableError, "read-only", True),
    ("password", postgres("28P01"), UnavailableError, LOGIN, False),
    ("no rights", postgres("42501"), UnavailableError, "the database's user has no right", False),
    ("no table", postgres("42P01"), UnavailableError, "a table does not exist", False),
    ("no database", postgres("3D000"), UnavailableError, "the database does not exist", False),
    ("syntax", postgres("42601"), StoreError, f"{REFUSED} (PostgresSyntaxError)", False),
    ("statement gone", postgres("26000"), UnavailableError, NO_STATEMENT, True),
    ("startup", postgres("08P01"), UnavailableError, LOST, True),
    ("closed", asyncpg.InterfaceError(SECRET), UnavailableError, f"{LOST} (InterfaceError)", True),
    ("lost track", asyncpg.InternalClientError(SECRET), UnavailableError, LOST, True),
    (
        "pgbouncer",
        psycopg.OperationalError("FATAL:  unsupported startup parameter: options"),
        UnavailableError,
        NO_STATEMENT,
        True,
    ),
    (
        "login of psycopg",
        psycopg.OperationalError("at 1.2.3.4 failed: FATAL:  password authentication failed"),
        UnavailableError,
        LOGIN,
        False,
    ),
    (
        "certificate of psycopg",
        psycopg.OperationalError('server certificate for "a" does not match host name "b"'),
        UnavailableError,
        "certificate was not accepted",
        False,
    ),
    (
        "an id in no such encoding",
        wrapped(sa.DBAPIError, UnicodeEncodeError("latin-1", SECRET, 0, 1, SECRET)),
        StoreError,
        "a user id has characters",
        False,
    ),
    # Through SQLAlchemy, with and without what the driver raised.
    ("sa unique", wrapped(sa.IntegrityError, postgres("23505")), UnavailableError, CONFLICT, True),
    (
        "sa operational",
        wrapped(sa.OperationalError, psycopg.OperationalError(SECRET)),
        UnavailableError,
        f"{LOST} (OperationalError)",
        True,
    ),
    (
        "sa interface",
        wrapped(sa.InterfaceError, psycopg.InterfaceError(SECRET)),
        UnavailableError,
        f"{LOST} (InterfaceError)",
        True,
    ),
    (
        "invalidated",
        wrapped(sa.DBAPIError, psycopg.DatabaseError(SECRET), invalidated=True),
        UnavailableError,
        f"{LOST} (DatabaseError)",
        True,
    ),
    (
        "not invalidated",
        wrapped(sa.DBAPIError, psycopg.DatabaseError(SECRET)),
        StoreError,
        f"{REFUSED} (DatabaseError)",
        False,
    ),
    (
        "sa internal",
        wrapped(sa.InternalError, mysql.InternalError(SECRET)),
        UnavailableError,
        f"{GARBAGE} of this kind (InternalError)",
        True,
    ),
    (
        "sa data",
        wrapped(sa.DataError, psycopg.DataError(SECRET)),
        StoreError,
        f"{REFUSED} (DataError)",
        False,
    ),
    ("sa itself", sa.ArgumentError(SECRET), StoreError, f"{REFUSED} (ArgumentError)", False),
    # MariaDB, by number: not by the SQLSTATE beside it.
    (
        "mysql unique",
        wrapped(sa.IntegrityError, mysql.IntegrityError(1062, SECRET)),
        UnavailableError,
        CONFLICT,
        True,
    ),
    ("mysql deadlock", mariadb(1213), UnavailableError, CONFLICT, True),
    ("mysql login", mariadb(1045), UnavailableError, LOGIN, False),
    ("mysql expired password", mariadb(1820), UnavailableError, LOGIN, False),
    ("mysql locked account", mariadb(4151), UnavailableError, LOGIN, False),
    (
        "a node of Galera that is not ready",
        mariadb(1047),
        UnavailableError,
        "accepts no more connections or is not ready",
        True,
    ),
    (
        "mysql too many of a user",
        mariadb(1226),
        UnavailableError,
        "lower pool_size, or raise its limit",
        True,
    ),
    ("mysql slow", mariadb(1969), StoreTimeoutError, SLOW, True),
    (
        "mysql packet",
        wrapped(sa.InternalError, mysql.InternalError(1153, SECRET)),
        UnavailableError,
        "a state is larger than the server takes (max_allowed_packet)",
        False,
    ),
    ("mysql unknown number", mariadb(9999), UnavailableError, f"{LOST} (OperationalError)", True),
    # SQLite, by the name of its code.
    ("lite unique", lite(twice), UnavailableError, CONFLICT, True),
    ("lite check", lite(unfit), StoreError, REFUSED, False),
    ("lite closed", lite(closed), UnavailableError, f"{LOST} (ProgrammingError)", True),
    ("lite syntax", lite(lambda c: c.execute("SELEC")), StoreError, REFUSED, False),
    ("lite table", lite(lambda c: c.execute("DELETE FROM x")), UnavailableError, "a table", False),
    # Of the system, at any depth.
    ("timeout", caused(ValueError, TimeoutError(SECRET)), StoreTimeoutError, SLOW, True),
    (
        "reset",
        caused(ValueError, ConnectionResetError(104, SECRET)),
        UnavailableError,
        f"{LOST} (ConnectionResetError)",
        True,
    ),
    ("no descriptors", OSError(errno.EMFILE, SECRET), UnavailableError, f"{LOST} (EMFILE)", True),
    ("eof", EOFError(SECRET), UnavailableError, f"{LOST} (EOFError)", True),
    ("bytes", IndexError(SECRET), UnavailableError, f"{GARBAGE} of this kind (IndexError)", True),
]


@pytest.mark.parametrize(
    ("error", "kind", "text", "retryable"),
    [case[1:] for case in ERRORS],
    ids=[case[0] for case in ERRORS],
)
def test_each_error_has_its_class_its_text_and_says_whether_to_repeat(
    error: Exception, kind: type[StoreError], text: str, retryable: bool
) -> None:
    """And never the driver's text, which may show values."""
    ours = translate(error, operation="get_latest", layer="SQLStore", outcome_unknown=True)
    assert type(ours) is kind
    assert text in ours.message
    assert ours.retryable is retryable
    assert (ours.operation, ours.layer, ours.outcome_unknown) == ("get_latest", "SQLStore", True)
    assert SECRET not in str(ours)


def test_what_sqlite_finds_in_a_file_is_told(tmp_path: Path) -> None:
    """A file that is no database, one whose folder is missing, one that is locked."""

    def ours(raises: Callable[[], object]) -> StoreError:
        with pytest.raises(sqlite3.Error) as caught:
            raises()
        return translate(caught.value, operation="upsert_latest", layer="SQLStore")

    other = tmp_path / "text.db"
    other.write_text("this is no database" * 100)
    connection = sqlite3.connect(other)
    damaged = ours(lambda: connection.execute("SELECT * FROM t"))
    connection.close()
    assert "damaged" in damaged.message and not damaged.retryable
    missing = ours(lambda: sqlite3.connect(tmp_path / "none" / "x.db"))
    assert "check that its directory exists" in missing.message and not missing.retryable
    first, second = (sqlite3.connect(tmp_path / "x.db", timeout=0) for _ in range(2))
    first.execute("BEGIN EXCLUSIVE")
    locked = ours(lambda: second.execute("BEGIN IMMEDIATE"))
    first.close()
    second.close()
    assert CONFLICT in locked.message and locked.retryable


def test_ours_is_returned_as_it_is() -> None:
    """What a layer raised on purpose is not translated again."""
    error = UnavailableError("mine", operation="delete", layer="Other")
    assert translate(error, operation="get_latest", layer="SQLStore") is error


def test_a_circle_of_causes_ends() -> None:
    """An error that is, through another, its own cause is still translated."""
    error = ValueError(SECRET)
    error.__cause__ = caused(KeyError, error)
    ours = translate(error, operation="get_latest", layer="SQLStore")
    assert type(ours) is UnavailableError


@pytest.mark.parametrize(
    ("error", "alone", "one"),
    [
        (postgres("42601"), True, True),
        (postgres("40001"), False, True),
        (postgres("40001"), True, False),
        (postgres("57P01"), False, False),
    ],
)
def test_who_was_meant(error: Exception, alone: bool, one: bool) -> None:
    """A refusal is about one call, an outage about all; a conflict unless nobody else writes."""
    ours = translate(error, operation="upsert_latest", layer="SQLStore")
    assert concerns_one(ours, alone_at_work=alone) is one


def test_a_write_whose_order_to_an_erasure_nobody_can_tell_is_about_one_call() -> None:
    """Others that came with it are tried, and the database is not taken for lost."""
    erasures = KnownErasures(FakeClock())
    with pytest.raises(UnavailableError, match="clock was set") as refused:
        erasures.before(1.0, 10**18, Began(low=0.0, high=0.0))
    assert concerns_one(refused.value, alone_at_work=True)


def test_a_lost_statement_is_told_from_other_failures() -> None:
    """Both what is gone and what stands in its place: the next attempt prepares nothing."""

    def lost(state: str) -> bool:
        return statement_lost(
            translate(postgres(state), operation="get_latest", layer="SQLStore")
        )

    assert lost("26000") and lost("42P05")
    assert not lost("0A000") and not lost("57P01")


@pytest.mark.parametrize(
    ("error", "did_nothing"),
    [
        *[(postgres(state), True) for state in ("40001", "53100", "57014")],
        *[(postgres(state), False) for state in ("08006", "57P01", "58030", "XX000")],
        (asyncpg.InterfaceError(SECRET), False),
        (ConnectionResetError(SECRET), False),
    ],
    ids=lambda value: getattr(value, "sqlstate", None) or type(value).__name__,
)
def test_after_which_errors_a_statement_of_postgresql_surely_did_nothing(
    error: Exception, did_nothing: bool
) -> None:
    """Not after those that may come when it was committed."""
    assert refused(error) is did_nothing
