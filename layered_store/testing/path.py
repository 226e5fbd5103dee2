"""What each call met on its way through a stack, in words that a test can compare."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, overload

from layered_store import hotpath
from layered_store.coherence.contract import Authority, CacheTier, TierRead, Versioned
from layered_store.errors import (
    CircuitOpenError,
    ClosedError,
    CorruptDataError,
    ErasureIncompleteError,
    OverloadedError,
    RejectedError,
    StoreTimeoutError,
    UnavailableError,
    UnsupportedError,
    ValidationError,
)
from layered_store.interface import Op
from layered_store.layer import AroundLayer
from layered_store.options import check_store
from layered_store.stack import children_of, kind_of, walk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

    from layered_store.interface import StateStore

__all__ = ["CallPath", "Recording", "Step", "record"]

_ERROR_WORDS: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (asyncio.CancelledError, "cancelled"),
    (StoreTimeoutError, "timeout"),
    (UnavailableError, "unavailable"),
    (CircuitOpenError, "open"),
    (OverloadedError, "full"),
    (RejectedError, "refused"),
    (ErasureIncompleteError, "incomplete"),
    (CorruptDataError, "corrupt"),
    (ValidationError, "invalid"),
    (ClosedError, "closed"),
    (UnsupportedError, "unsupported"),
)
"""The word for an error, by the first class that fits; any other is ``"error"``."""

_SHORT_NAMES: Final = {"circuit_breaker": "circuit"}
_WRITES: Final = {
    Op.UPSERT_LATEST: "written",
    Op.UPSERT_LATEST_MANY: "written",
    Op.DELETE: "erased",
}
_CAPABILITIES: Final = (Authority, CacheTier)


@dataclass(frozen=True, slots=True)
class Step:
    """What one block did with a call.

    Args:
        block: the block's short name, such as ``"redis"``.
        word: what it did, such as ``"hit"`` or ``"timeout"``.
        operation: what was asked of it.
        store: the block.
    """

    block: str
    word: str
    operation: str
    store: StateStore = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.block} {self.word}"


class CallPath(str):
    """The path of one call, as text: ``"cached miss, circuit closed, redis timeout, sql hit"``.

    Attributes:
        operation: which call it was, such as ``"get_latest"``.
        outcome: how it ended: ``"ok"``, ``"running"``, or the word for its error.
        steps: the parts, in the order in which the blocks were entered.
    """

    __slots__ = ("operation", "outcome", "steps")

    operation: str
    outcome: str
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, frame: _Frame) -> CallPath:
        steps = tuple(_steps(frame))
        self = cls(", ".join(map(str, steps)))
        self.operation = frame.op.value
        self.outcome = "running" if not frame.done else _error_word(frame.error) or "ok"
        self.steps = steps
        return self


class Recording(Sequence[CallPath]):
    """The paths of the calls of one stack, in the order in which the calls began.

    Compares with a list of strings, prints one line for each call.
    """

    def __init__(self, stack: StateStore) -> None:
        self._stack = stack
        self._calls: list[_Frame] = []
        self._apart: list[_Frame] = []

    @property
    def background(self) -> list[CallPath]:
        """What the stack did on its own, such as a refresh ahead."""
        return [CallPath.of(frame) for frame in self._apart]

    @property
    def last(self) -> CallPath:
        """The call that began last; IndexError when there was none."""
        return self[-1]

    def clear(self) -> None:
        """Forget the calls so far."""
        self._calls.clear()
        self._apart.clear()

    @overload
    def __getitem__(self, index: int) -> CallPath: ...
    @overload
    def __getitem__(self, index: slice) -> list[CallPath]: ...
    def __getitem__(self, index: int | slice) -> CallPath | list[CallPath]:
        if isinstance(index, slice):
            return [CallPath.of(frame) for frame in self._calls[index]]
        return CallPath.of(self._calls[index])

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[CallPath]:
        return iter([CallPath.of(frame) for frame in self._calls])

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return "\n".join(self)

    def __repr__(self) -> str:
        return f"Recording({list(self)!r})"

    def _begun(self, frame: _Frame) -> None:
        """Take note of a call that no recorded block made."""
        (self._calls if frame.store is self._stack else self._apart).append(frame)


@asynccontextmanager
async def record(stack: StateStore) -> AsyncIterator[Recording]:
    """Record the path of every call that enters ``stack`` while the block runs.

    ::

        async with record(stack) as path:
            await stack.get_latest("u-1")
        assert path == ["cached miss, circuit closed, redis timeout, sql hit"]

    A block is named when it did something of its own: the ends always (``hit``, ``miss``,
    ``written``, ``erased``, or the kind of error), a cache by how it answered (``hit``,
    ``negative hit``, ``stale``, ``shared`` with another's load, ``miss``), a circuit breaker by its
    state, a repetition by its attempts. A layer that only passed the call on is left out. Blocks of
    third parties are recorded alike: by what they called and what came of it. A layer with an
    attribute ``caches = True`` is told as a cache, one whose ``state`` is an Enum by that.

    Nothing is installed in the stack unless somebody records: meanwhile every block's operations
    are replaced on the object itself, which also takes hits off the fused path. So record the
    outermost block: hits that are fused above ``stack`` are not seen.

    Args:
        stack: whose calls; calls into it by any task are recorded.

    Raises:
        ConfigError: ``stack`` is no store.
    """
    check_store(stack, "stack", record)
    recording = Recording(stack)
    taps = [_tap(place.store) for place in walk(stack)]
    try:
        for tap in taps:
            tap.listeners.append(recording)
        yield recording
    finally:
        for tap in taps:
            tap.listeners.remove(recording)
            tap.remove_if_unused()


@dataclass(eq=False, slots=True)
class _Frame:
    """One call of one block, and the calls that it made of the blocks below."""

    store: StateStore
    op: Op
    method: str
    args: tuple[Any, ...]
    parent: _Frame | None
    state: str = ""
    shares: bool = False
    done: bool = False
    result: Any = None
    error: BaseException | None = None
    below: list[_Frame] = field(default_factory=list)


_current: ContextVar[_Frame | None] = ContextVar("layered_store_path", default=None)
_taps: dict[int, _Tap] = {}


def _tap(store: StateStore) -> _Tap:
    tap = _taps.get(id(store))
    if tap is None:
        tap = _taps[id(store)] = _Tap(store)
    return tap


class _Tap:
    """The recording functions in place of one block's operations."""

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self.listeners: list[Recording] = []
        self._open: list[_Frame] = []
        self._installed: list[tuple[dict[str, Any], str, Any, Any]] = []
        for op in Op:
            self._install(store, op.value, op)
        if isinstance(store, AroundLayer):
            self._install(store, "around", None)
        elif not children_of(store):
            for kind in _CAPABILITIES:
                ability = store.capability(kind)
                for method, op in kind.operations.items() if ability is not None else ():
                    self._install(ability, method, op)

    def _install(self, owner: Any, name: str, op: Op | None) -> None:
        names = getattr(owner, "__dict__", None)
        if names is None or getattr(names.get(name), "path_tap", None) is self:
            return
        before = names.get(name)
        plain = getattr(owner, name)
        if getattr(before, "__module__", None) == hotpath.__name__:
            # A fused read would pass by the blocks below, so the layer's own method stands in.
            plain = getattr(type(owner), name).__get__(owner)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if op is None:
                return await self._noted(args[0], plain, args, kwargs, skip=2)
            return await self._noted(op, plain, args, kwargs, method=name)

        call.path_tap = self  # type: ignore[attr-defined]
        names[name] = call
        self._installed.append((names, name, call, before))

    def remove_if_unused(self) -> None:
        if self.listeners:
            return
        _taps.pop(id(self.store), None)
        for names, name, call, before in self._installed:
            if names.get(name) is not call:
                continue  # closed meanwhile, or replaced by the test
            if before is None:
                del names[name]
            else:
                names[name] = before

    async def _noted(
        self,
        op: Op,
        plain: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        skip: int = 0,
        method: str = "",
    ) -> Any:
        parent = _current.get()
        if parent is not None and parent.done:
            parent = None  # a task that outlived the call that started it
        if parent is not None and parent.store is self.store:
            return await plain(*args, **kwargs)  # its own helper
        frame = _Frame(self.store, op, method or op.value, args[skip:], parent)
        state = getattr(self.store, "state", None)
        if isinstance(state, enum.Enum):
            frame.state = state.name.lower().replace("_", " ")
        frame.shares = any(other.below and _same_users(other, frame) for other in self._open)
        if parent is None:
            for recording in self.listeners:
                recording._begun(frame)  # noqa: SLF001
        else:
            parent.below.append(frame)
            if isinstance(now := getattr(parent.store, "state", None), enum.Enum):
                parent.state = now.name.lower().replace("_", " ")
            for recording in self.listeners:
                if recording._stack is self.store:  # noqa: SLF001
                    recording._begun(frame)  # noqa: SLF001
        self._open.append(frame)
        token = _current.set(frame)
        try:
            frame.result = result = await plain(*args, **kwargs)
        except BaseException as exc:
            frame.error = exc
            raise
        finally:
            frame.done = True
            self._open.remove(frame)
            _current.reset(token)
        return result


def _same_users(one: _Frame, other: _Frame) -> bool:
    return bool(_users(one.args) & _users(other.args))


def _users(args: tuple[Any, ...]) -> set[str]:
    if not args:
        return set()
    first = args[0] if isinstance(args[0], list | tuple) else (args[0],)
    return {user_id for user_id in first if isinstance(user_id, str)}


# From frames to words


def _steps(frame: _Frame, cut_off_as: str = "", plays: str = "") -> Iterator[Step]:
    """Yield the steps of a call, in the order in which the blocks were entered.

    Args:
        frame: the call.
        cut_off_as: the word for what ended here since a layer above ended it.
        plays: the name of the end that a layer above gave it.
    """
    plays = getattr(frame.store, "plays", "") or plays
    if getattr(frame.store, "stands_in", False):
        if frame.error is not None and all(each.error is None for each in frame.below):
            # The fault is told of the block that seems to fail.
            word = _error_word(frame.error)
            word = cut_off_as if word == "cancelled" and cut_off_as else word
            name = plays or _name(_end_below(frame.store))
            yield Step(name, word, frame.op.value, frame.store)
            return
        word = ""
    else:
        word = _word(frame, cut_off_as)
    if _cuts_off(frame):
        # It is told of the block that was too slow.
        cut_off_as, word = _error_word(frame.error), ""
    below = [step for each in frame.below for step in _steps(each, cut_off_as, plays)]
    if word == frame.state and frame.below and not below:
        return  # housekeeping that no block tells of
    if word:
        is_end = not children_of(frame.store)
        name = plays if plays and is_end else _name(frame.store)
        yield Step(name, word, frame.op.value, frame.store)
    yield from below


def _name(store: StateStore) -> str:
    kind = kind_of(store)
    return _SHORT_NAMES.get(kind, kind)


def _end_below(store: StateStore) -> StateStore:
    while below := children_of(store):
        store = next(iter(below.values()))
    return store


def _cuts_off(frame: _Frame) -> bool:
    """Whether this block ended the call below it."""
    last = frame.below[-1].error if frame.below else None
    return (
        isinstance(frame.error, Exception)
        and isinstance(last, asyncio.CancelledError)
        and bool(children_of(frame.store))
    )


def _word(frame: _Frame, cut_off_as: str) -> str:
    """Return what a block did with a call; empty when it only passed the call on."""
    if not frame.done:
        return "running" if not frame.below else ""
    if not children_of(frame.store):
        return _end_word(frame, cut_off_as)
    parts = [frame.state] if frame.state else []
    attempts = _attempts(frame)
    if attempts > 1:
        parts.append(f"{attempts} attempts")
    own = _own_word(frame, cut_off_as)
    if own and own != frame.state:
        parts.append(own)
    return " ".join(parts)


def _end_word(frame: _Frame, cut_off_as: str) -> str:
    if frame.error is not None:
        word = _error_word(frame.error)
        return cut_off_as if word == "cancelled" and cut_off_as else word
    if frame.method in ("ticket", "fill"):
        return "" if frame.method == "ticket" else "filled"
    if frame.op in _WRITES:
        return _WRITES[frame.op]
    return _read_word(frame.result, frame.args)


def _read_word(result: Any, args: tuple[Any, ...]) -> str:
    if isinstance(result, TierRead):
        if not result.trusted:
            return "untrusted"
        return _read_word(result.found, args)
    if isinstance(result, Versioned):
        result = result.snapshot
    if isinstance(result, Mapping):
        answers = {_read_word(value, ()) for value in result.values()}
        found = sum(1 for value in result.values() if _read_word(value, ()) == "hit")
        wanted = len(_users(args)) or len(result)
        if found in (0, wanted):
            return answers.pop() if len(answers) == 1 else "hit" if found else "miss"
        return f"hit {found} of {wanted}"
    return "miss" if result is None or result == [] else "hit"


def _own_word(frame: _Frame, cut_off_as: str) -> str:
    """Return what a layer itself did: answered, refused, failed; empty when it passed on."""
    reads = frame.op in (Op.GET_LATEST, Op.GET_LATEST_MANY)
    if frame.error is not None:
        word = _error_word(frame.error)
        if not frame.below:
            return cut_off_as if word == "cancelled" and cut_off_as else word
        if any(type(each.error) is type(frame.error) for each in frame.below):
            return _miss_word(frame) if reads else ""
        return word if word != "cancelled" else ""
    if not reads:
        return ""
    if not frame.below:
        if frame.shares:
            return "shared"
        return "negative hit" if frame.result is None else _read_word(frame.result, frame.args)
    if all(each.error is not None for each in frame.below) and frame.result is not None:
        return "stale"
    return _miss_word(frame)


def _miss_word(frame: _Frame) -> str:
    if not getattr(frame.store, "caches", False):
        return ""
    wanted, asked = _users(frame.args), set()
    for each in frame.below:
        asked |= _users(each.args)
    if frame.op is Op.GET_LATEST_MANY and asked < wanted:
        return f"hit {len(wanted) - len(asked)} of {len(wanted)}"
    return "miss"


def _attempts(frame: _Frame) -> int:
    """Return how often a layer with one store below repeated the same call."""
    if len(children_of(frame.store)) != 1:
        return 1
    same = [each for each in frame.below if each.op is frame.op]
    return max((_count(same, each) for each in same), default=1)


def _count(frames: Iterable[_Frame], like: _Frame) -> int:
    return sum(1 for each in frames if each.method == like.method and each.args == like.args)


def _error_word(error: BaseException | None) -> str:
    if error is None:
        return ""
    return next((word for kind, word in _ERROR_WORDS if isinstance(error, kind)), "error")
