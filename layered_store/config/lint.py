"""Advice on a built stack: only what can be proved from its blocks and their options.

Three severities: an *error* cannot work as meant, and :func:`load_stack` refuses it unless the file
allows the rule; a *warning* is probably not meant; a *note* is worth knowing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final

from layered_store.coherence.contract import Invalidations
from layered_store.config.durations import parse_duration
from layered_store.config.registry import nearest, shown
from layered_store.errors import ConfigError
from layered_store.interface import StateStore
from layered_store.stack import Place, kind_of, walk

__all__ = ["RULES", "Finding", "LintPolicy", "LintWarning", "Severity", "lint"]


class Severity(StrEnum):
    """How much a finding matters."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class LintWarning(UserWarning):
    """A warning of the linter about a stack that was loaded."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the linter has to say.

    Args:
        rule: its id, such as ``"LS001"``.
        severity: error, warning or note.
        reason: what goes wrong and what to do.
        place: the block, as roles from the outermost down with its kind.
    """

    rule: str
    severity: Severity
    reason: str
    place: str

    def __str__(self) -> str:
        return f"{self.rule} {self.severity} at {self.place}: {self.reason}"

    def to_dict(self) -> dict[str, str]:
        """Return the finding as plain strings."""
        return {
            "rule": self.rule,
            "severity": self.severity.value,
            "reason": self.reason,
            "place": self.place,
        }


@dataclass(frozen=True, slots=True)
class LintPolicy:
    """What a file says about the linter, in its ``[lint]`` table.

    Args:
        allow: rules whose findings are accepted, with the reason.
        max_staleness: seconds; the oldest answer that the application can accept.
    """

    allow: Mapping[str, str]
    max_staleness: float | None = None

    @classmethod
    def from_config(cls, table: object) -> LintPolicy:
        """Read the table; raise ConfigError with all that is wrong in it."""
        if not isinstance(table, Mapping):
            raise ConfigError("must be a table", path="lint")
        problems = [
            ConfigError(
                "unknown key; known are allow, max_staleness",
                path=f"lint.{shown(key)}",
                suggestion=nearest(str(key), ("allow", "max_staleness")),
            )
            for key in table
            if key not in ("allow", "max_staleness")
        ]
        allow = table.get("allow", {})
        if isinstance(allow, list | tuple):
            allow = {rule: "" for rule in map(str, allow)}
        if not isinstance(allow, Mapping):
            problems.append(
                ConfigError("must be a list of rules, or a table of reasons", path="lint.allow")
            )
            allow = {}
        for index, rule in enumerate(allow):
            if rule not in RULES:
                known = next((known for known in RULES if known == str(rule).upper()), None)
                place = rule if re.fullmatch(r"LS\d{1,4}", str(rule), re.IGNORECASE) else index
                problems.append(
                    ConfigError(
                        f"there is no rule of this id; known are {', '.join(RULES)}",
                        path=f"lint.allow.{place}",
                        suggestion=known,
                    )
                )
        limit = table.get("max_staleness")
        try:
            limit = parse_duration(limit) if isinstance(limit, str) else limit
        except ValueError as exc:
            problems.append(ConfigError(str(exc), path="lint.max_staleness"))
            limit = None
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float)):
            problems.append(ConfigError("must be a duration", path="lint.max_staleness"))
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise ConfigError("problems in [lint]", problems=problems)
        return cls(allow, limit)


@dataclass(frozen=True, slots=True)
class _At:
    """A block with what stands above and below it."""

    place: Place
    above: tuple[StateStore, ...]
    below: tuple[StateStore, ...]
    max_staleness: float | None = None
    is_first: bool = True
    is_origin: bool = True

    @property
    def store(self) -> StateStore:
        return self.place.store

    def is_a(self, kind: str) -> bool:
        return _is_a(self.store, kind)

    def under(self, kind: str) -> StateStore | None:
        """The nearest block of this kind above, or None."""
        return next((store for store in reversed(self.above) if _is_a(store, kind)), None)

    def over(self, kind: str) -> list[StateStore]:
        """The blocks of this kind below."""
        return [store for store in self.below if _is_a(store, kind)]

    def ends(self) -> list[StateStore]:
        return [store for store in self.below if not store.children()]


Check = Callable[[_At], str | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: it looks at one block and gives a reason, or None."""

    id: str
    severity: Severity
    title: str
    check: Check


RULES: Final[dict[str, Rule]] = {}
"""All rules by id."""

_TEST_ONLY: Final = frozenset({"LS022", "LS028"})


def _rule(rule_id: str, severity: Severity, title: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        RULES[rule_id] = Rule(rule_id, severity, title, check)
        return check

    return register


def lint(
    stack: StateStore, *others: StateStore, max_staleness: float | None = None
) -> list[Finding]:
    """Return what is provably wrong, doubtful or worth knowing about a stack.

    Args:
        stack: the stack.
        others: further stacks of the same application, for the rules about sharing.
        max_staleness: seconds; the oldest answer that the application can accept.

    Returns:
        findings, errors first.
    """
    found = []
    for at in _places(stack, max_staleness):
        where = f"{at.place.path or 'outermost'} ({kind_of(at.store)})"
        for rule in RULES.values():
            if (reason := rule.check(at)) is not None:
                found.append(Finding(rule.id, rule.severity, reason, where))
    found += _shared_keys([stack, *others])
    order = list(Severity)
    return sorted(found, key=lambda finding: order.index(finding.severity))


def enforce(
    stack: StateStore, policy: LintPolicy, replaced: Iterable[StateStore] = ()
) -> list[LintWarning]:
    """Return the warnings that loading gives; raise ConfigError for errors not allowed.

    Blocks that were passed in as overrides are trusted to be meant, and in a test run (pytest says
    so in the environment) the rules about blocks that only tests should use are silent.
    """
    testing = "PYTEST_CURRENT_TEST" in os.environ
    meant = {id(store) for store in replaced}
    trusted = {
        f"{place.path or 'outermost'} ({kind_of(place.store)})"
        for place in walk(stack)
        if id(place.store) in meant
    }
    findings = [
        finding
        for finding in lint(stack, max_staleness=policy.max_staleness)
        if finding.rule not in policy.allow
        and not (finding.rule in _TEST_ONLY and (testing or finding.place in trusted))
    ]
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if errors:
        problems = [
            ConfigError(
                f"{finding}; to accept it, put {finding.rule} in [lint] allow", path="store"
            )
            for finding in errors
        ]
        if len(problems) == 1:
            raise problems[0]
        raise ConfigError("the linter refuses this stack:", path="store", problems=problems)
    return [LintWarning(str(f)) for f in findings if f.severity is Severity.WARNING]


def _places(stack: StateStore, max_staleness: float | None) -> Iterator[_At]:
    places = list(walk(stack))
    seen: set[int] = set()
    for place in places:
        prefix = f"{place.path}." if place.path else ""
        above = tuple(
            p.store
            for p in places
            if p is not place and (not p.path or place.path.startswith(f"{p.path}."))
        )
        below = tuple(p.store for p in places if p is not place and p.path.startswith(prefix))
        yield _At(
            place,
            above,
            below,
            max_staleness,
            id(place.store) not in seen,
            _is_record(place, {p.path: p.store for p in places}),
        )
        seen.add(id(place.store))


def _is_record(place: Place, by_path: Mapping[str, StateStore]) -> bool:
    """Tell whether this end of the stack is the system of record, not a tier or a secondary."""
    if place.store.children():
        return False
    roles = place.path.split(".") if place.path else []
    for depth, role in enumerate(roles):
        holder = by_path[".".join(roles[:depth])]
        siblings = holder.children()
        if role == "inner" and "origin" in siblings:
            return False
        if role == "secondary":
            return False
    return True


def _is_a(store: StateStore, kind: str) -> bool:
    return any(getattr(cls, "kind", None) == kind for cls in type(store).__mro__) or (
        kind_of(store) == kind
    )


def _number(store: object, *names: str) -> float | None:
    """Return the first of these options that holds a number."""
    for name in names:
        value: object = getattr(store, name, None)
        if isinstance(value, timedelta):
            value = value.total_seconds()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


_LIMITS: Final = ("time_limit", "timeout", "operation_timeout", "command_timeout", "socket_timeout")


def _limited(store: StateStore) -> bool:
    """Tell whether a backend ends its calls by itself.

    A third party's says so with an attribute ``time_limit`` in seconds; memory never waits.
    """
    return _is_a(store, "memory") or _number(store, *_LIMITS) is not None


@_rule("LS001", Severity.ERROR, "retry with no time limit below it")
def _retry_without_limit(at: _At) -> str | None:
    if not at.is_a("retry") or at.over("timeout") or all(map(_limited, at.ends())):
        return None
    return (
        "a call that hangs is never repeated, since nothing below ends it; "
        "put Timeout(..., seconds=)"
        " inside Retry"
    )


@_rule("LS002", Severity.WARNING, "time limit above retry and none below")
def _limit_only_outside(at: _At) -> str | None:
    if not at.is_a("retry") or at.under("timeout") is None or at.over("timeout"):
        return None
    if all(_is_a(end, "memory") for end in at.ends()):
        return None
    return (
        "the first attempt that hangs uses up the whole Timeout outside, so nothing is repeated;"
        " put"
        " a shorter Timeout inside Retry as well"
    )


@_rule("LS003", Severity.WARNING, "fallback below retry or breaker")
def _fallback_below(at: _At) -> str | None:
    if not at.is_a("fallback"):
        return None
    outer = at.under("retry") or at.under("circuit_breaker")
    if outer is None:
        return None
    return (
        f"{type(outer).__name__} above never sees a failed read, since Fallback answers it; put"
        f" Fallback outside and {type(outer).__name__} around its inner"
    )


@_rule("LS004", Severity.WARNING, "retries of the driver multiply with ours")
def _driver_retries(at: _At) -> str | None:
    layer = at.under("retry")
    retries = _driver_retry_count(getattr(at.store, "client", None))
    if layer is None or not retries:
        return None
    attempts = _number(layer, "attempts") or 1
    return (
        f"the client repeats each call {retries} times below Retry, up to"
        f" {int(attempts) * (retries + 1)} attempts in all; build the client without retries"
    )


def _driver_retry_count(client: Any) -> int:
    try:
        retry = client.get_retry()
        return max(0, int(retry.get_retries()))
    except Exception:  # noqa: BLE001  not a client of this kind
        return 0


@_rule("LS006", Severity.ERROR, "an open circuit is retried")
def _open_circuit_retried(at: _At) -> str | None:
    from layered_store.errors import CircuitOpenError

    if not at.is_a("retry") or not at.over("circuit_breaker"):
        return None
    for name in ("retry_on", "on", "retry_if"):
        wanted = getattr(at.store, name, None)
        if isinstance(wanted, type):
            wanted = (wanted,)
        if isinstance(wanted, list | tuple | set | frozenset) and any(
            isinstance(cls, type) and issubclass(CircuitOpenError, cls) for cls in wanted
        ):
            return (
                "an open circuit refuses at once, so the attempts are wasted and the caller waits;"
                " leave CircuitOpenError out of what is repeated"
            )
    return None


@_rule("LS007", Severity.WARNING, "attempts and their limits exceed the limit outside")
def _sum_of_limits(at: _At) -> str | None:
    outer = at.under("timeout")
    if not at.is_a("retry") or outer is None:
        return None
    limit = _number(outer, "seconds")
    inner = min((n for s in at.over("timeout") if (n := _number(s, "seconds"))), default=None)
    attempts = _number(at.store, "attempts")
    if limit is None or inner is None or attempts is None or attempts * inner <= limit:
        return None
    return (
        f"{attempts:g} attempts of {inner:g} s need {attempts * inner:g} s, but the Timeout outside"
        f" ends the call after {limit:g} s; lower one or raise the other"
    )


@_rule("LS009", Severity.WARNING, "in-process TTL longer than the shared tier's")
def _ttl_order(at: _At) -> str | None:
    ttl = _number(at.store, "ttl")
    if not at.is_a("cached") or ttl is None:
        return None
    for tier in at.over("redis"):
        shared = _number(tier, "ttl")
        if shared is not None and ttl > shared:
            return (
                f"an entry lives {ttl:g} s here but {shared:g} s in Redis below: this process would"
                " answer with what the shared tier has dropped; make the TTL here the shorter"
            )
    return None


@_rule("LS011", Severity.WARNING, "in-process cache over a shared tier with no invalidation")
def _no_channel(at: _At) -> str | None:
    if not at.is_a("cached") or not at.over("redis"):
        return None
    if getattr(at.store, "invalidation", "auto") != "off" and _channel_below(at.store):
        return None
    ttl = _number(at.store, "ttl") or 0.0
    return (
        f"another process's write or erasure shows here up to {ttl:g} s late; use"
        " WriteThrough(RedisStore(url), origin=SQLStore(url)) below with invalidation='auto'"
    )


def _channel_below(store: StateStore) -> bool:
    inner = store.children().get("inner")
    return inner is not None and inner.capability(Invalidations) is not None


@_rule("LS017", Severity.ERROR, "a layer that does not forward")
def _forwards(at: _At) -> str | None:
    if not at.store.children():
        return None
    hidden = [
        name
        for name, ways in (
            ("delete", ("delete",)),
            ("get_history", ("get_history",)),
            ("health", ("health_check", "health_report")),
        )
        if all(getattr(type(at.store), way) is getattr(StateStore, way) for way in ways)
    ]
    if not hidden:
        return None
    return (
        f"it wraps a store but does not forward {', '.join(hidden)}, so the default hides what is"
        " inside; subclass Layer"
    )


@_rule("LS022", Severity.WARNING, "memory as the system of record")
def _memory_of_record(at: _At) -> str | None:
    if not at.is_a("memory") or not at.is_origin:
        return None
    return "everything is lost when this process ends; use SQLStore outside tests"


@_rule("LS023", Severity.NOTE, "metrics missing, or only inside the cache")
def _metrics_outside(at: _At) -> str | None:
    if at.above or not at.store.children():
        return None
    inside = at.over("metrics")
    if at.is_a("metrics") or (inside and not at.over("cached") and not at.is_a("cached")):
        return None
    if inside and not _metrics_only_inside(at):
        return None
    if inside:
        return "Metrics stands only inside the cache and never sees a hit; put it outermost"
    return "nothing counts this stack's calls; wrap it in Metrics(..., name=)"


def _metrics_only_inside(at: _At) -> bool:
    for store in (at.store, *at.below):
        if _is_a(store, "metrics"):
            return False
        if _is_a(store, "cached"):
            return True
    return True


@_rule("LS025", Severity.ERROR, "the same block twice")
def _twice(at: _At) -> str | None:
    if at.is_first:
        return None
    return "this very object stands in the stack twice and shares its state; build a second one"


@_rule("LS026", Severity.WARNING, "pool smaller than the bulkhead")
def _pool(at: _At) -> str | None:
    places = _number(at.store, "max_in_flight")
    if not at.is_a("bulkhead") or places is None:
        return None
    for end in at.ends():
        pool = _number(end, "pool_size")
        if pool is not None and pool < places:
            return (
                f"{places:g} calls are let in but {type(end).__name__} has {pool:g} connections;"
                " the"
                " rest queue there unseen; make the pool at least as large"
            )
    return None


@_rule("LS027", Severity.NOTE, "bulkhead above the cache")
def _bulkhead_above_cache(at: _At) -> str | None:
    if not at.is_a("bulkhead") or not at.over("cached"):
        return None
    return "hits take places that only calls to a backend need; put Bulkhead below Cached"


@_rule("LS028", Severity.ERROR, "a block that injects faults")
def _faults(at: _At) -> str | None:
    if type(at.store).__module__ != "layered_store.testing.faults" and not getattr(
        type(at.store), "injects_faults", False
    ):
        return None
    return "it makes calls fail on purpose; take it out of every stack outside tests"


@_rule("LS034", Severity.WARNING, "answers may be older than max_staleness")
def _staleness(at: _At) -> str | None:
    if not at.is_a("cached") or at.max_staleness is None:
        return None
    ttl = _number(at.store, "ttl") or 0.0
    stale = _number(at.store, "stale_if_error") or 0.0
    bounded = 0.0 if _channel_below(at.store) else ttl
    oldest = ttl + stale if stale else bounded
    if oldest <= at.max_staleness:
        return None
    return (
        f"an answer may be {oldest:g} s old (ttl and stale_if_error), over the max_staleness of"
        f" {at.max_staleness:g} s; lower one of them"
    )


@_rule("LS037", Severity.WARNING, "retry outside the cache")
def _retry_over_cache(at: _At) -> str | None:
    if not at.is_a("retry") or not at.over("cached"):
        return None
    return (
        "every attempt passes the cache again, and callers that share one load each repeat it; put"
        " Retry below Cached, around each backend"
    )


@_rule("LS038", Severity.NOTE, "breaker outside retry")
def _breaker_over_retry(at: _At) -> str | None:
    if not at.is_a("circuit_breaker") or not at.over("retry"):
        return None
    return (
        "it sees calls, not attempts, and opens later; the usual order is Retry(CircuitBreaker())"
    )


@_rule("LS039", Severity.NOTE, "cache without jitter")
def _jitter(at: _At) -> str | None:
    if not at.is_a("cached") or _number(at.store, "ttl_jitter") != 0.0:
        return None
    return "entries stored together expire together and are loaded together; set ttl_jitter=0.1"


@_rule("LS040", Severity.WARNING, "two in-process caches on one path")
def _two_caches(at: _At) -> str | None:
    outer = at.under("cached")
    if not at.is_a("cached") or outer is None:
        return None
    total = (_number(outer, "ttl") or 0.0) + (_number(at.store, "ttl") or 0.0)
    return f"lifetimes add up: an answer may be {total:g} s old; keep one of the two"


@_rule("LS041", Severity.NOTE, "Redis as the system of record")
def _redis_of_record(at: _At) -> str | None:
    if not at.is_a("redis") or not at.is_origin:
        return None
    return (
        "what Redis acknowledged may be lost when it dies (as its appendfsync setting allows); keep"
        " the record in SQLStore if that matters"
    )


@_rule("LS042", Severity.WARNING, "the system of record forgets")
def _record_expires(at: _At) -> str | None:
    ttl = _number(at.store, "ttl")
    if not at.is_a("redis") or not at.is_origin or ttl is None:
        return None
    return f"users not written for {ttl:g} s vanish; take ttl out, or add a system of record"


def _shared_keys(stacks: list[StateStore]) -> list[Finding]:
    """LS013: blocks that keep their data under the same keys of one server."""
    owners: dict[tuple[object, ...], StateStore] = {}
    found = []
    for stack in stacks:
        for place in walk(stack):
            store = place.store
            if not _is_a(store, "redis"):
                continue
            where = getattr(store, "url", None)
            where = where if where is not None else id(getattr(store, "client", store))
            key = (where, getattr(store, "prefix", None))
            if owners.setdefault(key, store) is not store:
                found.append(
                    Finding(
                        "LS013",
                        Severity.WARNING,
                        "another block keeps its data on this Redis under the same prefix, so they"
                        " overwrite each other; give each a prefix= of its own",
                        f"{place.path or 'outermost'} ({kind_of(store)})",
                    )
                )
    return found


RULES["LS013"] = Rule(
    "LS013", Severity.WARNING, "two blocks on one Redis with the same prefix", lambda _: None
)
