"""What a store is given and what one below answered: checked in the same words everywhere.

Arguments are refused with a ``ValidationError`` before anything is asked. Answers are looked at
because our backends check what they read, but a store from elsewhere may answer anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from layered_store.call import call_under_way
from layered_store.errors import CorruptDataError, ValidationError
from layered_store.identity import check_user_id
from layered_store.operations import Op
from layered_store.options import name_of
from layered_store.sealed import SealedSnapshot
from layered_store.snapshot import StateSnapshot

if TYPE_CHECKING:
    from layered_store.interface import StateStore

__all__ = [
    "check_history",
    "check_limit",
    "check_snapshot",
    "check_snapshots",
    "check_state",
    "check_states",
    "check_user_ids",
    "is_state_of",
    "listed",
    "not_of_user",
    "states_by_user",
]

T = TypeVar("T")


def check_limit(limit: object, block: object = None) -> int:
    """Return ``limit``, or raise ValidationError unless it is an int of at least 0."""
    if type(limit) is not int or limit < 0:
        raise ValidationError(
            "must be an int of at least 0",
            field="limit",
            operation=Op.GET_HISTORY,
            layer=name_of(block),
        )
    return limit


def listed(
    values: Iterable[T], field: str, operation: str, block: object = None
) -> tuple[T, ...]:
    """Return what a batch was given as a tuple; a text or a lone value is refused.

    An iterator can be read once only, and a call may be repeated; a store that empties the list it
    is given would leave nothing to repeat.
    """
    if not isinstance(values, str | bytes):
        try:
            each = iter(values)
        except TypeError:
            pass
        else:
            return tuple(each)  # what it raises on the way is the caller's own
    raise ValidationError(
        f"must be a list (or another iterable), not one {type(values).__name__}",
        field=field,
        operation=operation,
        layer=name_of(block),
    )


def check_user_ids(user_ids: Iterable[str], block: object = None) -> tuple[str, ...]:
    """Return the ids of a batch of reads, each once, or raise ValidationError."""
    wanted = listed(user_ids, "user_ids", Op.GET_LATEST_MANY, block)
    for user_id in wanted:
        check_user_id(user_id, Op.GET_LATEST_MANY, block)
    return tuple(dict.fromkeys(wanted))


def is_state_of(value: object, user_id: str) -> bool:
    """Tell whether what a store answered is a state of this user."""
    return getattr(value, "user_id", None) == user_id


def not_of_user(user_id: str, operation: str, layer: str) -> CorruptDataError:
    """Return the error for an answer from below that is no state of the user asked for."""
    return CorruptDataError(
        "the store below answered with a record of another user, or with no snapshot",
        operation=operation,
        layer=layer,
        user_id=user_id,
    )


def check_state(
    found: StateSnapshot | None, user_id: str, layer: StateStore
) -> StateSnapshot | None:
    """Return what a store below answered, or raise CorruptDataError if it is another user's."""
    if found is not None and not is_state_of(found, user_id):
        raise not_of_user(user_id, Op.GET_LATEST, layer.name)
    return found


def states_by_user(found: object, layer: StateStore) -> Mapping[str, StateSnapshot]:
    """Return what a store below answered to a batch, or raise CorruptDataError if no mapping."""
    if isinstance(found, Mapping):
        return found
    raise CorruptDataError(
        "the store below answered a batch with no dict of states by user",
        operation=Op.GET_LATEST_MANY,
        layer=layer.name,
    )


def check_states(
    found: object, wanted: Iterable[str], layer: StateStore
) -> dict[str, StateSnapshot]:
    """Return what a store below answered to a batch, of the users asked for only.

    A record of another user is left out; asked for alone, it raises.
    """
    states = states_by_user(found, layer)
    return {key: states[key] for key in wanted if is_state_of(states.get(key), key)}


def check_history(found: object, user_id: str, layer: str) -> list[StateSnapshot]:
    """Return a history from below, or raise CorruptDataError unless all of it is the user's."""
    if isinstance(found, Iterable):
        history = list(found)
        if all(is_state_of(each, user_id) for each in history):
            return history
    raise not_of_user(user_id, Op.GET_HISTORY, layer)


def check_snapshots(
    snapshots: Iterable[StateSnapshot], snapshot_type: type[StateSnapshot], block: object = None
) -> tuple[StateSnapshot, ...]:
    """Return the snapshots of a batch of writes, or raise ValidationError for a bad one."""
    batch = listed(snapshots, "snapshots", Op.UPSERT_LATEST_MANY, block)
    for snapshot in batch:
        check_snapshot(snapshot, snapshot_type, Op.UPSERT_LATEST_MANY, block)
    return batch


def check_snapshot(
    snapshot: object,
    snapshot_type: type[StateSnapshot],
    operation: str = Op.UPSERT_LATEST,
    block: object = None,
) -> None:
    """Raise ValidationError unless ``snapshot`` is a valid one of exactly ``snapshot_type``.

    A sealed one (:class:`layered_store.sealed.SealedSnapshot`) may stand in its place.
    """
    if type(snapshot) is not snapshot_type and type(snapshot) is not SealedSnapshot:
        raise ValidationError(
            f"must be a {snapshot_type.__name__}, not {type(snapshot).__name__}; build the stores"
            " with snapshot_type= to keep a subclass with all its fields",
            field="snapshot",
            operation=operation,
            layer=name_of(block),
        )
    call = call_under_way()
    if call is not None and call.sound is snapshot:
        return  # each layer of a call asks for the same one
    try:
        snapshot.validate()
    except ValidationError as exc:
        exc.placed(operation, name_of(block))
        raise
    if call is not None and type(snapshot) is StateSnapshot:  # a subclass may hold what changes
        call.sound = snapshot
