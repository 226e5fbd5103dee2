"""What must hold of a history, whatever happened.

:func:`check_fleet` compares what the callers of all processes saw with what the database committed.
:func:`check_register` needs the callers' view only: it looks for one order in which each user
behaves like one variable.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Sequence

from tests.simulation.history import Call
from tests.simulation.sql_model import Commit

__all__ = ["Violation", "check_fleet", "check_register"]

_NEVER = float("inf")


class Violation(AssertionError):
    """A rule was broken.

    Args:
        rule: a short name of the rule.
        text: what happened.
    """

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


def check_fleet(
    calls: Sequence[Call],
    commits: Sequence[Commit],
    bound: float,
    may_be_late: Container[int | None] = (),
) -> None:
    """Check the calls of one user in all processes.

    Args:
        calls: of this user.
        commits: what the database committed for it, in order; position 0 is "never written".
        bound: how old an answer may be, in seconds.
        may_be_late: writes that may outlive an erasure that they began before, by a documented
            limit.

    Raises:
        Violation: a rule was broken.
    """
    place = {commit.value: at for at, commit in enumerate(commits, 1) if commit.value is not None}
    erasures = [at for at, commit in enumerate(commits, 1) if commit.value is None]
    orders = [commit.order for commit in commits]

    def superseded(at: int) -> float:
        return commits[at].time if at < len(commits) else _NEVER

    def committed_by(order: int) -> int:
        return bisect_right(orders, order)

    _check_acknowledged(calls, place, commits)
    _check_late(calls, commits, may_be_late)
    # Erasures that returned, as (when they returned, what they had erased).
    erased: list[tuple[int, int]] = []
    # By process: (when it was seen there, what).
    seen: dict[str, list[tuple[int, int, str]]] = {}
    for call in sorted((c for c in calls if c.ok), key=lambda c: c.ended or 0):
        assert call.ended is not None
        if call.kind == "delete":
            mine = [
                at
                for at in erasures
                if commits[at - 1].call == call.began and commits[at - 1].order < call.ended
            ]
            if not mine:
                raise Violation("erased", f"delete returned without an erasure: {call}")
            erased.append((call.ended, mine[-1]))
            seen.setdefault(call.process, []).append((call.ended, mine[-1], "deleted"))
            continue
        if call.kind == "upsert":
            at = place.get(call.value)
            if at is not None:
                seen.setdefault(call.process, []).append((call.ended, at, "written"))
            continue
        known = committed_by(call.ended)
        floor_erased = max((at for ended, at in erased if ended < call.began), default=0)
        own = [each for each in seen.get(call.process, ()) if each[0] < call.began]
        floor_own, how = max(((at, how) for _, at, how in own), default=(0, ""))
        if call.value is None:
            # Absent at the beginning and after each erasure: take it as the one that is right.
            wanted = max(floor_erased, floor_own)
            candidates = [at for at in (0, *erasures) if at <= known]
            fitting = [
                at for at in candidates if at >= wanted and superseded(at) >= call.began_at - bound
            ]
            at = fitting[0] if fitting else candidates[-1]
        else:
            found = place.get(call.value)
            if found is None or found > known:
                raise Violation("invented", f"read what was not committed: {call}")
            at = found
        if at < floor_erased:
            raise Violation("erased", f"read after its erasure returned: {call}")
        if at < floor_own:
            rule = "monotonic" if how == "seen" else "own writes"
            raise Violation(rule, f"the process had {how} version {floor_own}, not {at}: {call}")
        if superseded(at) < call.began_at - bound:
            age = call.began_at - superseded(at)
            raise Violation("stale", f"read what was replaced {age:.3f} s ago: {call}")
        seen.setdefault(call.process, []).append((call.ended, at, "seen"))


def _check_late(
    calls: Sequence[Call], commits: Sequence[Commit], may_be_late: Container[int | None]
) -> None:
    """A write that began before an erasure was committed does not come after it."""
    began = {call.value: call.began for call in calls if call.kind == "upsert"}
    erased = 0
    for commit in commits:
        if commit.value is None:
            erased = commit.order
        elif began[commit.value] < erased and commit.value not in may_be_late:
            raise Violation("late", f"write {commit.value} began before an erasure and outlived it")


def _check_acknowledged(
    calls: Sequence[Call], place: dict[int | None, int], commits: Sequence[Commit]
) -> None:
    values = [commit.value for commit in commits if commit.value is not None]
    if len(values) != len(set(values)):
        twice = next(value for value in values if values.count(value) > 1)
        raise Violation("doubled", f"write {twice} was committed twice")
    # One whose process died never returned, so it is under way to the end.
    deletes = {
        call.began: _NEVER if call.ended is None else call.ended
        for call in calls
        if call.kind == "delete"
    }
    for call in calls:
        if call.kind != "upsert" or not call.ok or call.value in place:
            continue
        assert call.ended is not None
        # By an erasure that was committed meanwhile, or whose call was under way still.
        overtaken = any(
            commit.value is None
            and commit.order < call.ended
            and max(commit.order, deletes.get(commit.call, 0)) > call.began
            for commit in commits
        )
        if not overtaken:
            raise Violation("lost", f"an acknowledged write was never committed: {call}")


def check_register(calls: Sequence[Call]) -> None:
    """Check that the calls of one user fit into one order that respects their times.

    A write that did not return normally may have happened at any time after it began, or never.

    Raises:
        Violation: there is no such order.

    Source:
        Wing and Gong, Testing and Verifying Concurrent Objects, 1993; the memory of configurations
        that were tried is Lowe's, 2017.
    """
    ops = [
        call
        for call in calls
        if call.ok or (call.kind != "read" and call.outcome != "ValidationError")
    ]
    ops.sort(key=lambda call: call.began)
    ends = [call.ended if call.ok and call.ended is not None else _NEVER for call in ops]
    must = sum(1 << at for at, call in enumerate(ops) if call.ok)
    everything = (1 << len(ops)) - 1
    tried: set[tuple[int, int | None]] = set()
    stack: list[tuple[int, int | None]] = [(everything, None)]
    while stack:
        left, state = stack.pop()
        if not left & must:
            return
        if (left, state) in tried:
            continue
        tried.add((left, state))
        first_end = min(ends[at] for at in range(len(ops)) if left >> at & 1)
        for at, call in enumerate(ops):
            if not left >> at & 1:
                continue
            if call.began > first_end:
                break
            rest = left & ~(1 << at)
            if call.kind == "read":
                if call.value == state:
                    stack.append((rest, state))
            else:
                stack.append((rest, call.value if call.kind == "upsert" else None))
    shown = "\n  ".join(map(str, ops))
    raise Violation("register", f"no order explains these calls:\n  {shown}")
