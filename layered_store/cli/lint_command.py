"""``layered-store lint``: advice on a stack."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import click

from layered_store.cli.common import console, guarded
from layered_store.cli.common import json_option as _json_option
from layered_store.config.lint import Finding, Severity, lint
from layered_store.config.loader import load_unchecked

__all__ = ["command"]


@click.command("lint")
@click.argument("stack", type=click.Path(dir_okay=False, path_type=Path))
@_json_option
def command(stack: Path, *, as_json: bool) -> None:
    """Say what is wrong or doubtful about the order and options of STACK.

    Exit 1 when there is an error that the file does not allow.
    """

    def work() -> list[Finding]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built, policy = load_unchecked(stack)
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
