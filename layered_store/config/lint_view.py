"""What a rule of the linter sees: one block, with what stands above and below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from layered_store.interface import StateStore
from layered_store.limits import call_limits, is_a, number
from layered_store.stack import Place, children_of, kind_of, walk

__all__ = [
    "RULES",
    "At",
    "Check",
    "Rule",
    "Severity",
    "is_a",
    "number",
    "places_of",
    "rule",
    "where",
]


class Severity(StrEnum):
    """How much a finding matters."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class At:
    """A block with what stands above and below it."""

    place: Place
    above: tuple[StateStore, ...]
    places_below: tuple[Place, ...]
    max_staleness: float | None = None
    is_first: bool = True
    is_origin: bool = True

    @property
    def store(self) -> StateStore:
        return self.place.store

    def is_a(self, kind: str) -> bool:
        return is_a(self.store, kind)

    def under(self, kind: str) -> StateStore | None:
        """The nearest block of this kind above, or None."""
        return next((store for store in reversed(self.above) if is_a(store, kind)), None)

    def over(self, kind: str) -> list[StateStore]:
        """The blocks of this kind below."""
        return [store for store in self.below if is_a(store, kind)]

    @property
    def below(self) -> tuple[StateStore, ...]:
        return tuple(place.store for place in self.places_below)

    def ends(self) -> list[StateStore]:
        return [store for store in self.below if not children_of(store)]

    def child(self, role: str) -> StateStore | None:
        return children_of(self.store).get(role)

    def call_limits(self) -> list[float | None]:
        """How long one call may take on the way to each backend below, in seconds."""
        return call_limits(self.places_below)


Check = Callable[[At], str | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: it looks at one block and gives a reason, or None.

    Args:
        id: such as ``"LS001"``.
        severity: of what it finds.
        title: what it is about, in a few words.
        check: looks at a block that the rule is about.
        of: the kind of block that the rule is about; None is all.
    """

    id: str
    severity: Severity
    title: str
    check: Check
    of: str | None = None

    def reason(self, at: At) -> str | None:
        """Return what is wrong with a block; None when nothing is."""
        return self.check(at) if self.of is None or at.is_a(self.of) else None


RULES: Final[dict[str, Rule]] = {}
"""All rules by id."""


def rule(
    rule_id: str, severity: Severity, title: str, *, of: str | None = None
) -> Callable[[Check], Check]:
    """Register a function as the rule of this id, about blocks of the kind ``of``."""

    def register(check: Check) -> Check:
        RULES[rule_id] = Rule(rule_id, severity, title, check, of)
        return check

    return register


def where(place: Place) -> str:
    name = getattr(place.store, "block_id", None)
    known = f", id {name!r}" if name else ""
    return f"{place.path or 'outermost'} ({kind_of(place.store)}{known})"


def places_of(stack: StateStore, max_staleness: float | None) -> Iterator[At]:
    places = list(walk(stack))
    seen: set[int] = set()
    for place in places:
        prefix = f"{place.path}." if place.path else ""
        above = tuple(
            p.store
            for p in places
            if p is not place and (not p.path or place.path.startswith(f"{p.path}."))
        )
        below = tuple(p for p in places if p is not place and p.path.startswith(prefix))
        yield At(
            place,
            above,
            below,
            max_staleness,
            id(place.store) not in seen,
            _is_record(place, {p.path: p.store for p in places}),
        )
        seen.add(id(place.store))


def _is_record(place: Place, by_path: Mapping[str, StateStore]) -> bool:
    """Tell whether this end of the stack is the system of record, no tier, secondary or trial."""
    if children_of(place.store):
        return False
    roles = place.path.split(".") if place.path else []
    for depth, role in enumerate(roles):
        holder = by_path[".".join(roles[:depth])]
        siblings = children_of(holder)
        if role == "inner" and "origin" in siblings:
            return False
        if role in ("secondary", "candidate"):
            return False
    return True
