"""The error tree: classes, what each says of itself, privacy."""

from __future__ import annotations

import copy
import pickle
import re
import traceback
from typing import Any

import pytest

import layered_store
from layered_store import errors
from layered_store.errors import (
    CircuitOpenError,
    ClosedError,
    ConfigError,
    CorruptDataError,
    ErasureIncompleteError,
    OverloadedError,
    RejectedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    UnsupportedError,
    ValidationError,
)

# Class, the one above it, also a, retryable.
TREE: list[tuple[type[StoreError], type, type, bool]] = [
    (StoreError, Exception, Exception, False),
    (ValidationError, StoreError, ValueError, False),
    (ConfigError, StoreError, ValueError, False),
    (UnsupportedError, StoreError, Exception, False),
    (ClosedError, StoreError, Exception, False),
    (CorruptDataError, StoreError, Exception, False),
    (ErasureIncompleteError, StoreError, Exception, True),
    (UnavailableError, StoreError, Exception, True),
    (StoreTimeoutError, UnavailableError, TimeoutError, True),
    (RejectedError, StoreError, Exception, False),
    (CircuitOpenError, RejectedError, Exception, False),
    (OverloadedError, RejectedError, Exception, True),
]
ALL = [row[0] for row in TREE]


@pytest.mark.parametrize(("cls", "above", "also", "retryable"), TREE)
def test_tree(cls: type[StoreError], above: type, also: type, retryable: bool) -> None:
    """Each class stands where the contract draws it, and says whether repeating can help."""
    assert cls.__bases__[0] is above
    assert issubclass(cls, also)
    error = cls("why")
    assert error.retryable is retryable
    assert error.operation in (None, "delete")
    assert error.layer is None
    assert error.user_id is None
    assert not error.outcome_unknown
    assert "why" in str(error)
    assert getattr(layered_store, cls.__name__) is cls


def test_the_drawing_is_the_tree() -> None:
    """The docstring of the module names exactly these classes, in this order."""
    below = re.findall(r"([A-Z]\w+Error) ", (errors.__doc__ or "").split("Whether")[0])
    assert sorted(set(below)) == sorted(cls.__name__ for cls in ALL)
    assert set(errors.__all__) == {cls.__name__ for cls in ALL}


@pytest.mark.parametrize("cls", ALL)
def test_place(cls: type[StoreError]) -> None:
    """The text names the layer and the operation; the user stays an attribute."""
    options: dict[str, Any] = {"layer": "RedisStore"}
    if cls is not ConfigError:
        options["operation"] = "get_latest"
    if cls not in (ConfigError, CircuitOpenError):
        options["user_id"] = "marked-user"
    error = cls("it is gone", **options)
    assert error.layer == "RedisStore"
    assert "RedisStore" in str(error)
    assert "it is gone" in str(error)
    if cls is not ConfigError:
        assert error.operation == "get_latest"
        assert str(error).startswith("RedisStore.get_latest: ")
    if "user_id" in options:
        assert error.user_id == "marked-user"
    text = str(error) + repr(error) + "".join(traceback.format_exception(error))
    assert "marked-user" not in text


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    "again",
    [copy.copy, lambda error: pickle.loads(pickle.dumps(error)), lambda error: error.fresh()],  # noqa: S301
)
def test_copies(cls: type[StoreError], again: Any) -> None:
    """A copy has the same class, text and attributes: over processes and for each waiter."""
    error = cls("why", layer="X")
    error.retryable = not error.retryable
    twin = again(error)
    assert type(twin) is cls
    assert twin is not error
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)
    assert twin.args == error.args


def test_fresh_keeps_the_cause() -> None:
    """Every waiter sees the driver's error, and a traceback of its own."""
    try:
        try:
            raise OSError("refused")
        except OSError as exc:
            raise UnavailableError("gone") from exc
    except UnavailableError as exc:
        error = exc
    twin = error.fresh()
    assert twin.__cause__ is error.__cause__
    assert twin.__traceback__ is None
    with pytest.raises(UnavailableError):
        raise twin
    assert error.__traceback__ is not twin.__traceback__


def test_unknown_outcome_is_said() -> None:
    """A write that may have taken effect says so in its text."""
    error = StoreTimeoutError("no answer", operation="upsert_latest", outcome_unknown=True)
    assert str(error) == "upsert_latest: no answer (the write may or may not have taken effect)"


def test_retryable_is_data() -> None:
    """An error can say otherwise than its class."""
    assert not UnavailableError("login refused", retryable=False).retryable
    assert StoreError("odd", retryable=True).retryable


def test_validation_error() -> None:
    """It names the field."""
    error = ValidationError("must not be empty", field="user_id", operation="delete")
    assert (error.field, str(error)) == ("user_id", "delete: user_id must not be empty")


def test_config_error() -> None:
    """It names the place, the option and the nearest name, and can hold several problems."""
    error = ConfigError("must be above 0", option="ttl", layer="Cached")
    assert str(error) == "Cached.ttl: must be above 0"
    error.path = "store.inner.ttl"
    assert str(error) == "store.inner.ttl: must be above 0"
    near = ConfigError("unknown option", path="store.tll", suggestion="ttl")
    assert str(near) == "store.tll: unknown option (did you mean 'ttl'?)"
    both = ConfigError("2 problems", problems=iter([error, near]))
    assert both.problems == (error, near)
    assert str(both) == f"2 problems\n  {error}\n  {near}"
    assert ConfigError("x").path is None
    assert ConfigError("x").suggestion is None


def test_erasure_incomplete_error() -> None:
    """It names the tiers that may still hold the user, in their order."""
    error = ErasureIncompleteError(pending=["RedisStore", "SQLStore"], user_id="marked")
    assert error.pending == ("RedisStore", "SQLStore")
    assert str(error).endswith("repeat the delete (pending: RedisStore, SQLStore)")
    assert "marked" not in str(error)


def test_circuit_open_error() -> None:
    """It says when to come again, and is not to be repeated before."""
    error = CircuitOpenError(retry_after=2.5)
    assert error.retry_after == 2.5
    assert not error.retryable
