"""What must hold of the histories that all processes of a run wrote down.

The system of record numbers each user's writes and erasures, and every worker writes down each
number it hears of before it uses it. So the order of all states of a user is known, and the rules
are comparisons of numbers and of times on one clock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NEVER = float("inf")
_STALEST = 8


class Write(NamedTuple):
    """An upsert (of one user) or a delete that some process began."""

    process: int
    state: int | None
    start: float
    end: float
    outcome: str
    version: int
    """What stood in the system of record after it: its own number, or what won; 0: unknown."""
    superseded: bool
    overtaken: bool
    tombs: tuple[int, ...]
    """Of a delete: the versions of the tombstones it is known to have left."""
    lost: bool
    """Of a delete: whether it may have left one more, whose number nobody was told."""


class Read(NamedTuple):
    """A read that was answered."""

    process: int
    start: float
    end: float
    state: int | None


@dataclass
class Stored:
    """What the system of record holds of a user at the end."""

    version: int
    state: int | None
    history: list[int]


@dataclass
class Report:
    """Figures and violations of a run."""

    violations: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    staleness: list[float] = field(default_factory=list)
    stalest: list[tuple[float, str]] = field(default_factory=list)
    """The reads that were furthest behind, and what they showed."""

    def broken(self, rule: str, user: str, detail: str) -> None:
        self.violations.append(f"{rule}: {user}: {detail}")


def check(
    histories: dict[int, list[list[Any]]],
    stored: dict[str, Stored],
    *,
    bound: float,
    report: Report | None = None,
) -> Report:
    """Return what the histories break.

    Args:
        histories: by process, what it wrote down, in its order.
        stored: the system of record at the end, by user.
        bound: seconds after which every process must show an acknowledged write.
        report: where to add to.
    """
    report = report or Report()
    versions: dict[int, int] = {}
    said: dict[tuple[int, str], tuple[int | None, int]] = {}
    # Of each delete: the tombstones it left, as far as is known, and how often it was sent.
    tombs: dict[int, list[int]] = defaultdict(list)
    sent: dict[int, int] = defaultdict(int)
    for entries in histories.values():
        for entry in entries:
            if entry[0] == "v":
                _, call, user, state, version = entry
                if versions.setdefault(state, version) != version:
                    report.broken("written twice", user, f"{state} as {versions[state]}, {version}")
                said[call, user] = (state, version)
            elif entry[0] == "e":
                _, call, user, version = entry
                tombs[call].append(version)
                said[call, user] = (None, version)
            elif entry[0] == "E":
                sent[entry[1]] += 1
    states = defaultdict(set)
    for state, version in versions.items():
        states[version].add(state)

    writes: dict[str, list[Write]] = defaultdict(list)
    reads: dict[str, list[Read]] = defaultdict(list)
    finals: dict[str, list[tuple[int, int | None]]] = defaultdict(list)
    outcomes: dict[str, int] = defaultdict(int)
    calls = 0
    for process, entries in histories.items():
        ends = {entry[1]: (entry[2], entry[3]) for entry in entries if entry[0] in "ud"}
        counted: set[int] = set()
        for entry in entries:
            kind = entry[0]
            if kind in ("U", "D"):
                call, user, start = entry[1], entry[2], entry[-1]
                state = entry[3] if kind == "U" else None
                end, outcome = ends.get(call, (NEVER, "killed"))
                acked = outcome == "ok"
                stood, version = said.get((call, user), (None, 0))
                # Dropped for an erasure; else what stood may be a later write than a repeated one.
                superseded = kind == "U" and acked and stood is None and version > 0
                overtaken = kind == "U" and acked and stood not in (None, state)
                if kind == "U" and not acked:
                    version = versions.get(state, 0)
                writes[user].append(
                    Write(process, state, start, end if acked else NEVER, outcome, version,
                          superseded, overtaken, tuple(tombs[call]), sent[call] > len(tombs[call]))
                )  # fmt: skip
                if call not in counted:
                    counted.add(call)
                    calls += 1
                    outcomes[f"{'upsert' if kind == 'U' else 'delete'} {outcome}"] += 1
            elif kind in ("r", "h"):
                calls += 1
                _, user, start, end, value, outcome = entry
                outcomes[f"{'read' if kind == 'r' else 'history'} {outcome}"] += 1
                if kind == "h":
                    _check_history(report, user, value, versions)
                elif outcome == "ok":
                    reads[user].append(Read(process, start, end, value))
            elif kind == "f":
                finals[entry[1]].append((process, entry[2]))

    for user, kept in stored.items():
        for state in kept.history:
            versions.setdefault(state, 0)
        _check_user(report, user, writes[user], reads[user], versions, bound)
        _check_stored(report, user, kept, writes[user], versions)
        for process, state in finals[user]:
            if state != kept.state:
                report.broken("not converged", user, f"process {process} reads {state}")
    late = sorted(report.staleness)
    report.figures |= {
        "calls": calls,
        "outcomes": dict(sorted(outcomes.items())),
        "users": len(stored),
        "processes": len(histories),
        "stale reads": len(late),
        "staleness p50/p99/worst (s)": tuple(
            round(late[min(len(late) - 1, int(len(late) * share))], 4) if late else 0.0
            for share in (0.5, 0.99, 1.0)
        ),
        "stalest reads": [f"{late:.3f} s, {what}" for late, what in report.stalest],
        "violations": len(report.violations),
    }
    return report


def _check_history(report: Report, user: str, states: list[int], versions: dict[int, int]) -> None:
    known = [versions[state] for state in states if versions.get(state)]
    if known != sorted(known, reverse=True) or len(set(states)) != len(states):
        report.broken("history out of order or doubled", user, str(states))


def _check_user(
    report: Report,
    user: str,
    writes: list[Write],
    reads: list[Read],
    versions: dict[int, int],
    bound: float,
) -> None:
    deletes = [write for write in writes if write.state is None]
    # Acknowledged writes by version, and the earliest end among all of a version or later.
    acked = sorted(
        (write.version, write.end) for write in writes if write.end < NEVER and write.version
    )
    acked_versions = [version for version, _ in acked]
    earliest = [end for _, end in acked]
    for index in range(len(earliest) - 2, -1, -1):
        earliest[index] = min(earliest[index], earliest[index + 1])
    # Acknowledged erasures by their end, and the highest version up to each.
    ended = sorted((write.end, write.version) for write in deletes if write.end < NEVER)
    ends = [end for end, _ in ended]
    highest = [version for _, version in ended]
    for index in range(1, len(highest)):
        highest[index] = max(highest[index], highest[index - 1])

    def absent_as(read: Read, floor: int) -> int | None:
        """Return the lowest version that an absent answer may stand for; None: there is none."""
        if floor == 0:
            return 0  # never written, as far as this process knew
        possible = []
        for write in deletes:
            if write.start < read.end:
                possible += [version for version in write.tombs if version >= floor]
                possible += [floor] if write.lost else []
        return min(possible) if possible else None

    by_process: dict[int, list[Read]] = defaultdict(list)
    for read in reads:
        by_process[read.process].append(read)
    for process, own_reads in by_process.items():
        # Moments at which this process had shown or been told a version.
        floors = [
            (write.end, write.version, "own write")
            for write in writes
            if write.process == process and write.end < NEVER and write.version
        ]
        pending = sorted(floors)
        floor, reason = 0, ""
        seen: list[tuple[float, int]] = []
        for read in sorted(own_reads, key=lambda read: read.start):
            while pending and pending[0][0] < read.start:
                _, version, why = pending.pop(0)
                if version > floor:
                    floor, reason = version, why
            for _, version in [each for each in seen if each[0] < read.start]:
                if version > floor:
                    floor, reason = version, "own read"
            seen = [each for each in seen if each[0] >= read.start]
            position = bisect_left(ends, read.start)
            gone = highest[position - 1] if position else 0
            if read.state is None:
                stands = absent_as(read, floor)
                if stands is None:
                    report.broken(
                        "absent though never deleted", user, f"{read}, floor {floor} ({reason})"
                    )
                    continue
                top = max((w.version for w in deletes if w.start < read.end), default=0)
                if any(w.lost and w.start < read.end for w in deletes):
                    top = max(top, acked_versions[-1] if acked_versions else 0)
                effective = max(stands, top)
            else:
                stands = effective = versions.get(read.state, 0)
                if not stands:
                    report.broken("a state from nowhere", user, str(read))
                    continue
                if stands < floor:
                    report.broken(
                        "went backwards", user, f"{read} is {stands}, floor {floor} ({reason})"
                    )
                if stands <= gone:
                    report.broken("erased readable", user, f"{read} is {stands}, erased at {gone}")
            seen.append((read.end, stands))
            after = bisect_right(acked_versions, effective)
            if after < len(earliest) and earliest[after] < read.start:
                late = read.start - earliest[after]
                report.staleness.append(late)
                report.stalest.append((late, f"{user}: {read} as {stands}, {earliest[after]:.3f}"))
                report.stalest = sorted(report.stalest, reverse=True)[:_STALEST]
                if late > bound:
                    report.broken("too stale", user, f"{read} is {late:.3f} s behind")


def _check_stored(
    report: Report, user: str, kept: Stored, writes: list[Write], versions: dict[int, int]
) -> None:
    if len(set(kept.history)) != len(kept.history):
        report.broken("history doubled", user, str(kept.history))
    deletes = [write for write in writes if write.state is None]
    last_tomb = max((write.version for write in deletes), default=0)
    acked_tomb = max((write.version for write in deletes if write.end < NEVER), default=0)
    # A delete whose reply was lost may have erased anything before its end.
    unknown = any(write.lost for write in deletes)
    in_history = set(kept.history)
    for write in writes:
        if write.end == NEVER:
            continue
        if write.version > kept.version:
            report.broken("lost", user, f"{write}, at the end {kept.version}")
        if write.state is None:
            continue
        if write.superseded:
            own = versions.get(write.state, 0)
            overlapped = any(
                delete.start < write.end and delete.end > write.start for delete in deletes
            )
            if not own and not overlapped and write.state not in in_history:
                report.broken("dropped though no erasure was under way", user, str(write))
        elif write.overtaken and last_tomb:
            continue  # an erasure may have come between it and what stood when it was repeated
        elif write.version > last_tomb and not unknown and write.state not in in_history:
            report.broken("lost from the history", user, str(write))
    for state in kept.history:
        if 0 < versions.get(state, 0) <= acked_tomb:
            report.broken("erased but in the history", user, str(state))
