"""``layered-store lint``: advice on a stack."""

from __future__ import annotations

import json
import sys
import warnings

import click

from layered_store.cli.common import console, guarded, json_option, source_of
from layered_store.config.lint import Finding, Severity, lint
from layered_store.config.loader import load_unchecked

__all__ = ["command"]


@click.command("lint")
@click.argument("stack", required=False)
@json_option
def command(stack: str | None, *, as_json: bool) -> None:
    """Say what is wrong or doubtful about the order and options of STACK.

    Exit 1 when there is an error that the file does not allow.
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
            console.print(str(finding), markup=False)
    sys.exit(1 if any(finding.severity is Severity.ERROR for finding in findings) else 0)
