"""Every error that layered_store raises on purpose.

::

    StoreError                    has .operation, .layer, .retryable, .outcome_unknown
    ├── ValidationError           also a ValueError: an argument was refused, nothing was stored
    ├── ConfigError               also a ValueError: a stack that cannot be built
    ├── UnsupportedError          no store below can do this
    ├── ClosedError               used after aclose
    ├── CorruptDataError          the system of record holds something that cannot be read back
    ├── ErasureIncompleteError    delete could not finish everywhere; repeat it
    ├── UnavailableError          the backend could not be reached (retryable)
    │   └── StoreTimeoutError     also a TimeoutError
    └── RejectedError             a layer refused, the backend was not asked
        ├── CircuitOpenError      .retry_after in seconds; never retried
        └── OverloadedError       a limit was reached; may be repeated later

Whether a call may be repeated is data on the error (``retryable``), so that no layer keeps a list
of classes. User ids are attributes (``user_id``), never message text: messages end in logs.
"""

from __future__ import annotations

import copy
import errno
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CircuitOpenError",
    "ClosedError",
    "ConfigError",
    "CorruptDataError",
    "ErasureIncompleteError",
    "OverloadedError",
    "RejectedError",
    "StoreError",
    "StoreTimeoutError",
    "UnavailableError",
    "UnsupportedError",
    "ValidationError",
]

_UNKNOWN_OUTCOME = "the write may or may not have taken effect"


class StoreError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: what happened and what to do about it; no user id, state value or secret.
        operation: name of the store operation, such as ``"get_latest"``.
        layer: name of the layer or backend that raised it, such as ``"RedisStore"``.
        retryable: whether repeating the same call can succeed; None takes the class's default.
        outcome_unknown: True when a write may have taken effect although the call failed.
        user_id: the user the call was about; kept out of the text.
    """

    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        operation: str | None = None,
        layer: str | None = None,
        retryable: bool | None = None,
        outcome_unknown: bool = False,
        user_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.operation = operation
        self.layer = layer
        self.retryable = self.default_retryable if retryable is None else retryable
        self.outcome_unknown = outcome_unknown
        self.user_id = user_id

    def __str__(self) -> str:
        place = ".".join(part for part in (self.layer, self.operation) if part)
        text = f"{place}: {self.message}" if place else self.message
        return f"{text} ({_UNKNOWN_OUTCOME})" if self.outcome_unknown else text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))

    def placed(self, operation: str, layer: str | None) -> Self:
        """Return this error, with the place where it happened unless it names one already."""
        self.operation = self.operation or operation
        self.layer = self.layer or layer
        return self

    def fresh(self) -> Self:
        """Return an equal error for one more waiter.

        An exception object collects a traceback wherever it is raised, so a result that many
        callers share is raised as one copy each, with the same cause.
        """
        twin = copy.copy(self)
        twin.__cause__ = self.__cause__
        twin.__suppress_context__ = True
        own_notes(twin)
        return twin


def own_notes(twin: BaseException) -> None:
    """Give a copied error a list of notes of its own: what one caller adds is not the others'."""
    notes = twin.__dict__.get("__notes__")
    if notes is not None:
        twin.__dict__["__notes__"] = list(notes)


def kind_of_error(exc: BaseException) -> str:
    """Return what may be told of an error whose text may hold anything: its class.

    Of a system error that has no class of its own, the code: EMFILE (no file descriptor is left),
    EHOSTUNREACH.
    """
    own = type(exc) is OSError and errno.errorcode.get(exc.errno or 0)
    return own or type(exc).__name__


def _rebuild(
    cls: type[StoreError], args: tuple[object, ...], state: dict[str, object]
) -> StoreError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ValidationError(StoreError, ValueError):
    """An argument was refused before anything was stored anywhere.

    Args:
        message: the rule that was broken.
        field: the name of the argument or snapshot field.
        operation: see :class:`StoreError`.
        layer: see :class:`StoreError`.
        user_id: see :class:`StoreError`.
    """

    def __init__(
        self,
        message: str = "",
        *,
        field: str | None = None,
        operation: str | None = None,
        layer: str | None = None,
        user_id: str | None = None,
    ) -> None:
        text = f"{field} {message}" if field else message
        super().__init__(text, operation=operation, layer=layer, user_id=user_id)
        self.field = field


class ConfigError(StoreError, ValueError):
    """A stack that cannot be built: an option is unknown, missing or out of range.

    Args:
        message: the allowed range and the remedy.
        option: name of the constructor's option.
        path: dotted place in a config file, such as ``"store.inner.ttl"``; set by the loader.
        suggestion: the nearest valid name, when there is one.
        layer: name of the class whose option it is.
        problems: all errors of a config file, when it has several; empty otherwise.
    """

    def __init__(
        self,
        message: str = "",
        *,
        option: str | None = None,
        path: str | None = None,
        suggestion: str | None = None,
        layer: str | None = None,
        problems: Iterable[ConfigError] = (),
    ) -> None:
        super().__init__(message, layer=layer)
        self.option = option
        self.path = path
        self.suggestion = suggestion
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if self.problems:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            return f"{self.message}{lines}"
        where = self.path or ".".join(part for part in (self.layer, self.option) if part)
        text = f"{where}: {self.message}" if where else self.message
        return f"{text} (did you mean {self.suggestion!r}?)" if self.suggestion else text


class UnsupportedError(StoreError):
    """No store below can do this."""


class ClosedError(StoreError):
    """The store was used after ``aclose``, or from an event loop it does not belong to."""


class CorruptDataError(StoreError):
    """The system of record holds something for this user that cannot be read back."""


class ErasureIncompleteError(StoreError):
    """``delete`` could not finish everywhere; repeat it, which is safe.

    The system of record already has the user erased, unless ``pending`` names it.

    Args:
        message: what could not be reached.
        pending: names of the tiers that may still hold the user, outermost first.
        operation: see :class:`StoreError`.
        layer: see :class:`StoreError`.
        user_id: see :class:`StoreError`.
    """

    default_retryable: ClassVar[bool] = True

    def __init__(
        self,
        message: str = "",
        *,
        pending: Iterable[str] = (),
        operation: str | None = "delete",
        layer: str | None = None,
        user_id: str | None = None,
    ) -> None:
        self.pending = tuple(pending)
        text = message or "erasure is not finished; repeat the delete"
        if self.pending:
            text = f"{text} (pending: {', '.join(self.pending)})"
        super().__init__(text, operation=operation, layer=layer, user_id=user_id)


class UnavailableError(StoreError):
    """The backend could not be reached, or did not answer properly; repeating may help."""

    default_retryable: ClassVar[bool] = True


class StoreTimeoutError(UnavailableError, TimeoutError):
    """The backend did not answer within the time limit."""


class RejectedError(StoreError):
    """A layer refused the call; the backend was not asked and nothing took effect."""


class CircuitOpenError(RejectedError):
    """The circuit breaker is open.

    Args:
        message: why it is open.
        retry_after: seconds until the next call may be tried.
        operation: see :class:`StoreError`.
        layer: see :class:`StoreError`.
    """

    def __init__(
        self,
        message: str = "the circuit is open",
        *,
        retry_after: float = 0.0,
        operation: str | None = None,
        layer: str | None = None,
    ) -> None:
        super().__init__(message, operation=operation, layer=layer)
        self.retry_after = retry_after


class OverloadedError(RejectedError):
    """A limit on concurrent or waiting calls was reached."""

    default_retryable: ClassVar[bool] = True
