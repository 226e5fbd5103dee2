"""Checks of options: one sentence each that names the option, range and remedy."""

from __future__ import annotations

import math
from datetime import timedelta
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeGuard, overload

from layered_store.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Seconds",
    "check_a",
    "check_choice",
    "check_count",
    "check_salt",
    "check_seconds",
    "check_share",
    "check_snapshot_type",
    "check_store",
    "is_utf8",
    "name_of",
    "nearest",
]

_SHOWN_BELOW = 10**20
_INT64_MAX = 2**63 - 1
_MAX_SALT_BYTES = 64
Seconds = float | timedelta
"""A duration: seconds, or a timedelta. Strings like ``"30s"`` live in config files only."""


@overload
def check_seconds(value: object, option: str, owner: object, *, positive: bool = ...) -> float: ...
@overload
def check_seconds(
    value: object, option: str, owner: object, *, positive: bool = ..., optional: bool
) -> float | None: ...
def check_seconds(
    value: object, option: str, owner: object, *, positive: bool = True, optional: bool = False
) -> float | None:
    """Return a duration in seconds as a float.

    Args:
        value: a number of seconds or a timedelta; None only when ``optional``.
        option: the option's name, for the error.
        owner: the block whose option it is.
        positive: refuse 0 as well as negative durations.
        optional: None means no limit.
    """
    if value is None and optional:
        return None
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, int | float) and not isinstance(seconds, bool):
        try:
            result = float(seconds)
        except OverflowError:
            result = math.inf
        if math.isfinite(result) and (result > 0 if positive else result >= 0):
            return result
    bound = "above 0" if positive else "of at least 0"
    extra = ", or None for no limit" if optional else ""
    wanted = f"must be a finite number of seconds (or a timedelta) {bound}{extra}"
    raise _refuse(wanted, option, owner, seconds)


@overload
def check_count(
    value: object, option: str, owner: object, *, minimum: int = ..., maximum: int | None = ...
) -> int: ...
@overload
def check_count(
    value: object,
    option: str,
    owner: object,
    *,
    minimum: int = ...,
    maximum: int | None = ...,
    optional: bool,
) -> int | None: ...
def check_count(
    value: object,
    option: str,
    owner: object,
    *,
    minimum: int = 1,
    maximum: int | None = None,
    optional: bool = False,
) -> int | None:
    """Return ``value`` when it is an int in the range; None only when ``optional``.

    Without a ``maximum`` it may have 63 bits: more cannot be counted to, and some cannot be added.
    """
    if value is None and optional:
        return None
    most = _INT64_MAX if maximum is None else maximum
    if type(value) is int and minimum <= value <= most:
        return value
    bound = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    if maximum is None and type(value) is int and value > most:
        bound += " and below 2**63"
    extra = ", or None for no limit" if optional else ""
    raise _refuse(f"must be an int {bound}{extra}", option, owner, value)


def check_share(
    value: object, option: str, owner: object, *, zero: bool = True, one: bool = True
) -> float:
    """Return ``value`` as a float when it is a number from 0 to 1.

    Args:
        value: the share.
        option: the option's name, for the error.
        owner: the block whose option it is.
        zero: whether 0 itself is allowed.
        one: whether 1 itself is allowed.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        low = value >= 0 if zero else value > 0
        high = value <= 1 if one else value < 1
        if low and high:
            return float(value)
    left = "0" if zero else "above 0"
    right = "1" if one else "below 1"
    raise _refuse(f"must be a share from {left} to {right}", option, owner, value)


def check_salt(value: object, owner: object) -> None:
    """Refuse a ``salt`` that is not a str of at most 64 UTF-8 bytes."""
    if not is_utf8(value) or len(value.encode()) > _MAX_SALT_BYTES:
        raise _refuse("must be a str of at most 64 UTF-8 bytes", "salt", owner, value)


def is_utf8(value: object) -> TypeGuard[str]:
    """Tell whether this is a str that UTF-8 can encode: one without lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_choice(value: object, option: str, owner: object, choices: tuple[Any, ...]) -> Any:
    """Return ``value`` when it is one of ``choices``."""
    if any(
        value is choice or (type(value) is type(choice) and value == choice)
        for choice in choices
    ):
        return value
    message = f"must be one of {', '.join(repr(choice) for choice in choices)}"
    texts = [choice for choice in choices if isinstance(choice, str)]
    if texts and isinstance(value, str):
        near = nearest(value, texts)
        raise ConfigError(message, option=option, layer=name_of(owner), suggestion=near)
    raise _refuse(message, option, owner, value)


def check_store(value: object, option: str, owner: object) -> Any:
    """Return ``value`` when it is a StateStore."""
    from layered_store.interface import StateStore  # noqa: PLC0415

    if isinstance(value, StateStore):
        return value
    if isinstance(value, type):
        raise ConfigError(
            f"must be a StateStore; pass an instance, {value.__name__}(...), not the class",
            option=option,
            layer=name_of(owner),
        )
    remedy = "pass an instance, such as MemoryStore()"
    raise _refuse(f"must be a StateStore; {remedy}", option, owner, value)


def _refuse(message: str, option: str, owner: object, value: object) -> ConfigError:
    # Numbers are shown, since they help and hide nothing; other values may be secrets.
    shown = repr(value) if isinstance(value, float | bool | None) else type(value).__name__
    if type(value) is int:
        shown = str(value) if abs(value) < _SHOWN_BELOW else "a huge int"
    elif isinstance(value, type):
        shown = f"the class {value.__name__}"
    return ConfigError(f"{message}, not {shown}", option=option, layer=name_of(owner))


def name_of(owner: object) -> str | None:
    """Return what an error names: a function, the class of a block, or nothing."""
    if owner is None:
        return None
    return owner.__name__ if isinstance(owner, FunctionType) else type(owner).__name__


def check_snapshot_type(value: object, owner: object) -> None:
    """Refuse anything but StateSnapshot or a subclass of it."""
    from layered_store.snapshot import StateSnapshot  # noqa: PLC0415

    if not (isinstance(value, type) and issubclass(value, StateSnapshot)):
        raise _refuse("must be StateSnapshot or a subclass", "snapshot_type", owner, value)


def check_a(value: object, kind: type[Any], option: str, owner: object) -> None:
    """Refuse anything but a ``kind``: a collaborator such as a clock or a source of randomness."""
    if not isinstance(value, kind):
        raise _refuse(f"must be a {kind.__name__}", option, owner, value)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` was probably meant to be."""
    from difflib import get_close_matches  # noqa: PLC0415  only when something is wrong

    close = get_close_matches(name.lower().replace("-", "_"), list(known), n=1, cutoff=0.6)
    return close[0] if close else None
