"""Advice on a built stack: only what can be proved from its blocks and their options.

Three severities: an *error* cannot work as meant, and :func:`load_stack` refuses it unless the file
allows the rule; a *warning* is probably not meant; a *note* is worth knowing. The rules are in
``rules_of_calls.py``, ``rules_of_state.py`` and ``rules_of_blocks.py``; they look at kinds and
options, never at classes, so that they judge third parties' blocks too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from layered_store.config import rules_of_blocks, rules_of_calls, rules_of_state
from layered_store.config.durations import parse_duration
from layered_store.config.lint_view import RULES, Severity, places_of, where
from layered_store.config.registry import shown
from layered_store.errors import ConfigError
from layered_store.interface import StateStore
from layered_store.options import Seconds, check_seconds, nearest
from layered_store.stack import walk

__all__ = ["RULES", "Finding", "LintPolicy", "LintWarning", "Severity", "enforce", "lint"]

assert rules_of_calls, "imported for the rules that it registers"
assert rules_of_blocks, "likewise"
_TEST_ONLY: Final = frozenset({"LS022", "LS028"})


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
            allow = dict.fromkeys(map(str, allow), "")
        if not isinstance(allow, Mapping):
            problems.append(
                ConfigError("must be a list of rules, or a table of reasons", path="lint.allow")
            )
            allow = {}
        for index, (rule, reason) in enumerate(allow.items()):
            if rule in RULES and not isinstance(reason, str):
                problems.append(
                    ConfigError("must be text: why it is accepted", path=f"lint.allow.{rule}")
                )
            if rule not in RULES:
                known = next((known for known in RULES if known == str(rule).upper()), None)
                place = rule if re.fullmatch(r"LS\d{1,4}", str(rule), re.IGNORECASE) else index
                problems.append(
                    ConfigError(
                        f"there is no rule of this id; known are {', '.join(sorted(RULES))}",
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
        if limit is not None and (
            isinstance(limit, bool)
            or not isinstance(limit, int | float)
            or not 0 <= limit < float("inf")
        ):
            problems.append(
                ConfigError(
                    'must be a duration of at least 0, such as 300 or "5m"',
                    path="lint.max_staleness",
                )
            )
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise ConfigError("problems in [lint]", problems=problems)
        return cls(allow, limit)


def lint(
    stack: StateStore, *others: StateStore, max_staleness: Seconds | None = None
) -> list[Finding]:
    """Return what is provably wrong, doubtful or worth knowing about a stack.

    Args:
        stack: the stack.
        others: further stacks of the same application, for the rules about sharing.
        max_staleness: seconds; the oldest answer that the application can accept.

    Returns:
        findings, errors first, then by rule.

    Raises:
        ConfigError: ``max_staleness`` is no duration.
    """
    found = []
    limit = check_seconds(max_staleness, "max_staleness", lint, positive=False, optional=True)
    for at in places_of(stack, limit):
        for rule in RULES.values():
            if (reason := rule.reason(at)) is not None:
                found.append(Finding(rule.id, rule.severity, reason, where(at.place)))
    clashes = RULES["LS013"]
    for place, reason in rules_of_state.shared_keys([stack, *others]):
        found.append(Finding(clashes.id, clashes.severity, reason, where(place)))
    order = list(Severity)
    return sorted(found, key=lambda finding: (order.index(finding.severity), finding.rule))


def enforce(
    stack: StateStore, policy: LintPolicy, replaced: Iterable[StateStore] = ()
) -> list[LintWarning]:
    """Return the warnings that loading gives; raise ConfigError for errors not allowed.

    Blocks that were passed in as overrides are trusted to be meant, and in a test run (pytest says
    so in the environment) the rules about blocks that only tests should use are silent.
    """
    testing = "PYTEST_CURRENT_TEST" in os.environ
    meant = {id(store) for store in replaced}
    trusted = {where(place) for place in walk(stack) if id(place.store) in meant}
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
