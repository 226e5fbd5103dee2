"""``layered-store lint``: advice on a stack."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from typing import Final

import click
from rich.padding import Padding
from rich.text import Text

from layered_store.cli.common import console, guarded, json_option, show_whole, source_of
from layered_store.config.lint import Finding, Severity, lint
from layered_store.config.loader import load_unchecked

__all__ = ["command"]

_COLOURS: Final = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


@click.command("lint")
@click.argument("stack", required=False)
@json_option
def command(stack: str | None, *, as_json: bool) -> None:
    """List what is wrong or doubtful about the blocks of STACK; opens no connection.

    A stack with an error cannot work as intended: it does not load, and the exit code is 1.
    Warnings are probably not intended, notes are worth knowing. To accept a finding, name its rule
    in the file, with the reason:

    \b
    [lint]
    allow = { LS003 = "writes are what we retry" }
    """

    def work() -> list[Finding]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built, policy = load_unchecked(source_of(stack))
        return [
            finding
            for finding in lint(built, max_staleness=policy.max_staleness)
            if finding.rule not in policy.allow
        ]

    findings = guarded(work)
    if as_json:
        click.echo(json.dumps([finding.to_dict() for finding in findings], indent=2))
    elif not findings:
        console.print("nothing to say")
    else:
        for finding in findings:
            colour = _COLOURS[finding.severity]
            show_whole(
                Text.assemble(
                    (f"{finding.rule} {finding.severity}", colour), " at ", (finding.place, "bold")
                ),
                Padding(Text(finding.reason), (0, 0, 0, 2), expand=False),
            )
        counts = Counter(finding.severity for finding in findings)
        console.print(", ".join(_counted(counts[each], each) for each in Severity))
    sys.exit(1 if any(finding.severity is Severity.ERROR for finding in findings) else 0)


def _counted(number: int, severity: Severity) -> str:
    return f"{number} {severity}{'' if number == 1 else 's'}"
