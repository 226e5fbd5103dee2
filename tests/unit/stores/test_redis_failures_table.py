"""What failures of Redis and of its driver mean to a caller, without a server."""

from __future__ import annotations

import errno
import socket
import ssl

import pytest
import redis.exceptions as driver
from redis.asyncio.sentinel import MasterNotFoundError

from layered_store.errors import (
    ClosedError,
    OverloadedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
)
from layered_store.stores.redis import RedisStore
from layered_store.stores.redis.failures import (
    GarbageError,
    ReplyError,
    cause_of,
    not_sent,
    translate,
)

SECRET = "marked-value"


def caused(error: Exception, *causes: BaseException) -> Exception:
    at: BaseException = error
    for cause in causes:
        at.__cause__ = cause
        at = cause
    return error


# How Redis tells what failed inside of a script; before version 7 in words of its own.
BEFORE_7 = "Error running script (call to f_0f3): @user_script:9: @user_script: 9: "
INSIDE = [
    (f"{BEFORE_7}-OOM command not allowed", "(maxmemory)", "OOM", True),
    (f"{BEFORE_7}-READONLY You can't write", "is a read-only replica", "READONLY", True),
    (f"ACL failure in script: User {SECRET} has no permissions", "and rights", "NOPERM", False),
    ("The user executing the script can't run this command", "and rights", "NOPERM", False),
    (f"{BEFORE_7}The user executing the script can't access", "and rights", "NOPERM", False),
]
ERRORS: list[tuple[Exception, type[StoreError], str, bool, bool]] = [
    # (the error, our class, a part of the text, whether to repeat, whether the end is unknown)
    (driver.MaxConnectionsError(SECRET), OverloadedError, "all connections", True, False),
    (driver.OutOfMemoryError(SECRET), UnavailableError, "out of memory", True, False),
    (driver.ReadOnlyError(SECRET), UnavailableError, "read-only replica", True, False),
    (driver.BusyLoadingError(SECRET), UnavailableError, "loading its data", True, False),
    (driver.AuthenticationError(SECRET), UnavailableError, "refused the login", False, False),
    (driver.InvalidResponse(SECRET), UnavailableError, "does not answer as Redis", True, True),
    (GarbageError(SECRET), UnavailableError, "does not answer as Redis", True, True),
    (driver.TimeoutError(SECRET), StoreTimeoutError, "no answer within", True, True),
    (TimeoutError(SECRET), StoreTimeoutError, "no answer within", True, True),
    (driver.ResponseError(SECRET), StoreError, "command (ResponseError)", False, False),
    (ReplyError(f"WRONGTYPE {SECRET}"), StoreError, "command (WRONGTYPE)", False, False),
    (ReplyError(SECRET), StoreError, "command (ERR)", False, False),
    (ReplyError(f"ERR {SECRET}"), StoreError, "command (ERR)", False, False),
    (ReplyError("Marked value"), StoreError, "command (ERR)", False, False),
    *(
        (ReplyError(f"{code} {SECRET}"), UnavailableError, f"({code})", retryable, False)
        for codes, retryable in (
            ("READONLY OOM LOADING BUSY MASTERDOWN MISCONF NOREPLICAS CLUSTERDOWN TRYAGAIN", True),
            ("MOVED ASK NOAUTH WRONGPASS NOPERM", False),
        )
        for code in codes.split()
    ),
    *(
        (error, UnavailableError, f"{text} ({code})", retryable, False)
        for reply, text, code, retryable in INSIDE
        for error in (ReplyError(f"ERR {reply}"), driver.ResponseError(reply))
    ),
    (MasterNotFoundError(SECRET), UnavailableError, "no Sentinel knows", True, False),
    (
        driver.ConnectionError(f"SSLError CERTIFICATE_VERIFY_FAILED {SECRET}"),
        UnavailableError,
        "certificate was not accepted",
        False,
        False,
    ),
    (
        caused(driver.ConnectionError(SECRET), ssl.SSLError("CERTIFICATE_VERIFY_FAILED")),
        UnavailableError,
        "certificate was not accepted",
        False,
        False,
    ),
    (
        caused(MasterNotFoundError(SECRET), driver.AuthenticationError(SECRET)),
        UnavailableError,
        "refused the login",
        False,
        False,
    ),
    # Named by the system's error below the driver's.
    (
        caused(driver.ConnectionError(SECRET), socket.gaierror(SECRET)),
        UnavailableError,
        "failed (gaierror)",
        True,
        True,
    ),
    (
        caused(driver.ConnectionError(SECRET), OSError(errno.EHOSTUNREACH, SECRET)),
        UnavailableError,
        "failed (EHOSTUNREACH)",
        True,
        True,
    ),
    (
        caused(driver.ConnectionError(SECRET), *(ValueError() for _ in range(9)), OSError(SECRET)),
        UnavailableError,
        "failed (OSError)",
        True,
        True,
    ),
    (
        caused(driver.ConnectionError(SECRET), ValueError(SECRET)),
        UnavailableError,
        "failed (ConnectionError)",
        True,
        True,
    ),
]


@pytest.mark.parametrize(("error", "kind", "text", "retryable", "unknown"), ERRORS)
@pytest.mark.parametrize("write", [True, False])
def test_each_failure_has_its_class_its_text_and_says_whether_to_repeat(
    error: Exception, kind: type[StoreError], text: str, retryable: bool, unknown: bool, write: bool
) -> None:
    """Never the driver's text; and of a read no end is unknown."""
    ours = translate(error, operation="delete", layer="RedisStore", write=write)
    assert type(ours) is kind
    assert text in ours.message
    assert ours.retryable is retryable
    assert (ours.operation, ours.layer) == ("delete", "RedisStore")
    assert ours.outcome_unknown is (unknown and write)
    assert SECRET not in str(ours)


def test_what_was_not_sent_has_no_unknown_end() -> None:
    """Whatever the reason was, whose class stays."""
    for cause, kind in (
        (TimeoutError(), StoreTimeoutError),
        (ConnectionRefusedError(), UnavailableError),
    ):
        ours = translate(not_sent(cause), operation="delete", layer="RedisStore", write=True)
        assert type(ours) is kind
        assert not ours.outcome_unknown


def test_the_cause_is_the_drivers_error() -> None:
    """Not the note that the call never left; and no error of ours is its own cause."""
    refused, closed = driver.ConnectionError(), ClosedError("closed")
    assert cause_of(refused) is refused
    assert cause_of(not_sent(refused)) is refused
    assert cause_of(closed) is None
    closed.__cause__ = refused
    assert cause_of(not_sent(closed)) is refused


async def test_a_caller_finds_the_drivers_error_as_the_cause() -> None:
    """Of a read and of a write that nobody took."""
    store = RedisStore("redis://127.0.0.1:1/0")
    for call in (store.get_latest("u-1"), store.delete("u-1"), store.get_latest_many(["u-1"])):
        with pytest.raises(UnavailableError) as caught:
            await call
        assert isinstance(caught.value.__cause__, driver.ConnectionError)
    await store.aclose()


def test_many_who_were_not_sent_each_have_an_error_of_their_own() -> None:
    """With its operation and layer, though a link that is closed knows neither."""
    closed = ClosedError("this store was closed")
    first, second = (
        translate(not_sent(closed), operation=operation, layer="RedisStore", write=True)
        for operation in ("get_latest", "delete")
    )
    assert str(first) == "RedisStore.get_latest: this store was closed"
    assert str(second) == "RedisStore.delete: this store was closed"
    assert closed.layer is None


def test_ours_is_returned_as_it_is() -> None:
    """What a link raised on purpose is not translated again, and told where if it does not say."""
    error = UnavailableError("mine")
    assert translate(error, operation="delete", layer="RedisStore", write=True) is error
    assert str(error) == "RedisStore.delete: mine"
    assert translate(error, operation="get_latest", layer="Other", write=False) is error
    assert str(error) == "RedisStore.delete: mine"


def test_a_circle_of_causes_ends() -> None:
    """What leads to an error may go round; the error itself is named then."""
    error = driver.ConnectionError(SECRET)
    caused(error, ValueError(), error)
    ours = translate(error, operation="delete", layer="RedisStore", write=True)
    assert ours.message.endswith("(ConnectionError)")
