"""Failures of Redis and of the driver become ours; their texts are never copied, their codes
are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import (
    OverloadedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    kind_of_error,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ConnectionLostError",
    "GarbageError",
    "NotSentError",
    "ReplyError",
    "cause_of",
    "not_sent",
    "translate",
]


# A command inside of a script that was refused: for want of rights, or (by Redis before 7, which
# puts its own words in front) for what the script's reply would else begin with.
_NO_RIGHTS: Final = re.compile(r"ACL failure in script|he user executing the script can't ").search
_INSIDE: Final = re.compile(r"Error running script .*?: -([A-Z]+) ").search
# What a server that has no place left says to a new connection, before it closes it.
_NO_PLACE: Final = re.compile(r"(?:ERR )?max number of clients ").match


def _code_of(text: str) -> str:
    if _NO_RIGHTS(text):
        return "NOPERM"
    if _NO_PLACE(text):
        return "MAXCLIENTS"
    inside = _INSIDE(text)
    code = inside[1] if inside else text.split(" ", 1)[0]
    return code if code.isalpha() and code.isupper() else "ERR"


class ReplyError(Exception):
    """An error reply; holds its code only, since the rest may show data."""

    def __init__(self, text: str = "") -> None:
        super().__init__(_code_of(text))

    @property
    def code(self) -> str:
        """What kind of error it is, such as ``"OOM"``."""
        return str(self.args[0])


class GarbageError(Exception):
    """The peer sent bytes that are no Redis reply."""

    def __init__(self, *_: object) -> None:
        # The parser's text shows what it read.
        super().__init__()


class ConnectionLostError(Exception):
    """The connection ended while a reply was awaited."""


class NotSentError(Exception):
    """A call never reached the server; the cause says why."""


def not_sent(cause: Exception) -> NotSentError:
    """Return the result of a call that never left, for this reason."""
    error = NotSentError()
    error.__cause__ = cause
    return error


_REFUSED: Final = "the server refused the login or the command; check user, password and rights"
_DISTRUSTED: Final = (
    "the server's certificate was not accepted; check ssl_ca_certs, the name of the host and"
    " whether it ran out"
)
_LOST: Final = "the connection failed"
_SLOW: Final = "no answer within the time limit"

# By the first word of the reply: (text, whether repeating the same call can help).
_REPLIES: Final[dict[str, tuple[str, bool]]] = {
    "READONLY": ("the server is a read-only replica", True),
    "OOM": ("the server is out of memory (maxmemory)", True),
    "LOADING": ("the server is loading its data", True),
    "MAXCLIENTS": ("the server takes no more connections", True),
    "BUSY": ("the server is busy running a script", True),
    "MASTERDOWN": ("the replica lost its primary", True),
    "MISCONF": ("the server cannot save to disk and refuses writes", True),
    "NOREPLICAS": ("too few replicas are connected", True),
    "CLUSTERDOWN": ("the cluster is down", True),
    "TRYAGAIN": ("the cluster is moving these keys", True),
    "MOVED": ("the server is a cluster node; use a redis+cluster:// URL", False),
    "ASK": ("the server is a cluster node; use a redis+cluster:// URL", False),
    "NOAUTH": (_REFUSED, False),
    "WRONGPASS": (_REFUSED, False),
    "NOPERM": (_REFUSED, False),
    "DENIED": ("the server is in protected mode and takes no connections from here", False),
}
# What the driver says of a URL that names something else than is there.
_WRONG_PLACE: Final = (
    (
        re.compile(r"DB index is out of range|invalid DB index").search,
        "the server has no database of this number; check the end of the URL",
    ),
    (
        re.compile(r"cluster support disabled|Cluster mode is not enabled").search,
        "the server is no cluster node; use a redis:// URL",
    ),
    (
        re.compile(r"unknown command .SENTINEL").search,
        "the server is no Sentinel; check the port, or use a redis:// URL",
    ),
)
# The driver's classes for the same replies, by name: it cuts the first word off the text.
_CLASSES: Final = {
    "AuthenticationError": "WRONGPASS",
    "AuthenticationWrongNumberOfArgsError": "WRONGPASS",
    "AuthorizationError": "NOPERM",
    "NoPermissionError": "NOPERM",
    "ReadOnlyError": "READONLY",
    "OutOfMemoryError": "OOM",
    "BusyLoadingError": "LOADING",
    "ClusterDownError": "CLUSTERDOWN",
    "SlotNotCoveredError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
    "TryAgainError": "TRYAGAIN",
}


def translate(exc: BaseException, *, operation: str, layer: str, write: bool) -> StoreError:
    """Return what a failure means to a caller; raise it ``from`` :func:`cause_of` it.

    Args:
        exc: what went wrong; one of ours is returned, with its place.
        operation: the store operation.
        layer: the store's name.
        write: whether the call may have changed something if the server received it.
    """
    if isinstance(exc, StoreError):
        return exc.placed(operation, layer)
    place: Any = {"operation": operation, "layer": layer}
    if isinstance(exc, NotSentError):
        cause = exc.__cause__ or TimeoutError()
        if isinstance(cause, StoreError):
            cause = cause.fresh()  # many share it
        inner = translate(cause, write=False, **place)
        inner.outcome_unknown = False
        return inner
    name = type(exc).__name__
    code = exc.code if isinstance(exc, ReplyError) else _CLASSES.get(name)
    if code is None and name == "ResponseError":
        code = _code_of(str(exc))  # what fails inside of a script has no class of its own
        code = code if code in _REPLIES else None
    if code in _REPLIES:
        text, retryable = _REPLIES[code]
        return UnavailableError(f"{text} ({code})", retryable=retryable, **place)
    if isinstance(exc, GarbageError) or name == "InvalidResponse":
        return UnavailableError(
            "the server does not answer as Redis", outcome_unknown=write, **place
        )
    if name == "MaxConnectionsError":
        return OverloadedError("all connections are in use", **place)
    if isinstance(exc, TimeoutError) or name == "TimeoutError":
        return StoreTimeoutError(_SLOW, outcome_unknown=write, **place)
    causes = tuple(_causes(exc))
    for says, text in _WRONG_PLACE:
        if any(says(str(cause)) for cause in causes):
            return UnavailableError(text, retryable=False, **place)
    if isinstance(exc, ReplyError) or name.endswith("ResponseError"):
        return StoreError(f"the server refused the command ({code or name})", **place)
    for cause in causes:
        # Of several servers that it tried, the driver tells in a text.
        told = f"{type(cause).__name__} {cause}"
        if "CERTIFICATE_VERIFY_FAILED" in told:
            return UnavailableError(_DISTRUSTED, retryable=False, **place)
        if "AuthenticationError" in told:
            return UnavailableError(_REFUSED, retryable=False, **place)
    if name in ("MasterNotFoundError", "SlaveNotFoundError"):
        return UnavailableError("no Sentinel knows a primary of this service", **place)
    return UnavailableError(f"{_LOST} ({_reason(exc)})", outcome_unknown=write, **place)


def cause_of(exc: BaseException) -> BaseException | None:
    """Return what to raise :func:`translate`'s error ``from``: the driver's, no note of ours."""
    if isinstance(exc, NotSentError) and exc.__cause__ is not None:
        exc = exc.__cause__
    return exc.__cause__ if isinstance(exc, StoreError) else exc


def _reason(exc: BaseException) -> str:
    """Name the system's error below the driver's: refused, unknown host and no such socket differ.

    Their texts are left out, which have the address and may have more.
    """
    system = next((cause for cause in _causes(exc) if isinstance(cause, OSError)), exc)
    return kind_of_error(system)


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it."""
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__
