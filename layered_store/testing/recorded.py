"""A layer that notes what passes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, ParamSpec, TypeVar

from layered_store.errors import ConfigError, StoreError
from layered_store.identity import redact
from layered_store.interface import Op
from layered_store.layer import AroundLayer
from layered_store.options import nearest
from layered_store.snapshot import StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Recorded", "RecordedCall"]

P = ParamSpec("P")
T = TypeVar("T")

_OPERATIONS: Final = tuple(op.value for op in Op)


@dataclass(slots=True)
class RecordedCall:
    """One call that passed a :class:`Recorded`.

    Args:
        operation: the operation's name, such as ``"get_latest"``.
        args: its arguments.
        outcome: ``"running"``, ``"ok"``, ``"cancelled"``, or the name of the error's class.
        result: what it returned.
        error: what it raised.
    """

    operation: str
    args: tuple[Any, ...] = field(repr=False)
    outcome: str = "running"
    result: Any = field(default=None, repr=False)
    error: BaseException | None = field(default=None, repr=False)

    @property
    def user_ids(self) -> tuple[str, ...]:
        """The users that it was about, in the order of its arguments."""
        found: list[str] = []
        first = self.args[0] if self.args else ()
        for each in first if isinstance(first, list | tuple) else (first,):
            if isinstance(each, StateSnapshot):
                found.append(each.user_id)
            elif isinstance(each, str):
                found.append(each)
        return tuple(found)

    def __str__(self) -> str:
        shown = ", ".join(redact(user_id) for user_id in self.user_ids)
        return f"{self.operation}({shown}): {self.outcome}"


@dataclass(eq=False, repr=False)
class Recorded(AroundLayer):
    """Note each call to ``inner``, in the order in which they began, and how it ended.

    Calls of capabilities count as the operation that they stand for. Hits of a cache below are
    seen as well. Example::

        below = Recorded(MemoryStore())
        stack = Cached(below)
        await stack.get_latest("u-1")
        await stack.get_latest("u-1")
        assert below.operations == ["get_latest", "get_latest"]  # an absent user is not cached

    Args:
        inner: the store to watch.

    Attributes:
        calls: what was called.
    """

    kind: ClassVar[str] = "recorded"
    stands_in: ClassVar[bool] = True  # a path does not name it

    def __post_init__(self) -> None:
        self.calls: list[RecordedCall] = []
        super().__post_init__()

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        call = RecordedCall(op.value, args + tuple(kwargs.values()))
        self.calls.append(call)
        try:
            call.result = result = await method(*args, **kwargs)
        except Exception as exc:
            call.outcome, call.error = type(exc).__name__, exc
            raise
        except BaseException as exc:
            call.outcome, call.error = "cancelled", exc
            raise
        call.outcome = "ok"
        return result

    @property
    def operations(self) -> list[str]:
        """The operations' names, in the order in which they began."""
        return [call.operation for call in self.calls]

    @property
    def errors(self) -> list[StoreError]:
        """The errors that passed, in the order of the calls that raised them."""
        return [call.error for call in self.calls if isinstance(call.error, StoreError)]

    def of(self, operation: str) -> list[RecordedCall]:
        """Return the calls of one operation.

        Raises:
            ConfigError: there is no such operation, so that nobody asserts that a misspelt one was
                not called.
        """
        if operation not in _OPERATIONS:
            raise ConfigError(
                f"must be the name of an operation: {', '.join(_OPERATIONS)}",
                option="operation",
                layer=self.name,
                suggestion=nearest(str(operation), _OPERATIONS),
            )
        return [call for call in self.calls if call.operation == operation]

    def count(self, operation: str | None = None) -> int:
        """Return how many calls there were, of one operation or in all."""
        return len(self.calls if operation is None else self.of(operation))

    def clear(self) -> None:
        """Forget all calls."""
        self.calls.clear()
