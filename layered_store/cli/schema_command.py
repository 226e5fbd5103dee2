"""``layered-store schema``: the format of config files."""

from __future__ import annotations

import json

import click

from layered_store.config.schema import json_schema

__all__ = ["command"]


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of config files, for editors and checks."""
    click.echo(json.dumps(json_schema(), indent=2))
