"""The group of all commands, each imported when it is run."""

from __future__ import annotations

import importlib
from typing import Final

import click

__all__ = ["cli"]

_COMMANDS: Final = (
    "serve",
    "show",
    "check",
    "lint",
    "schema",
    "get",
    "put",
    "erase",
    "history",
    "export",
    "copy",
    "bench",
)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"layered_store.cli.{cmd_name}_command")
        found: click.Command = module.command
        return found


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="layered-store", prog_name="layered-store")
def cli() -> None:
    """Look at, check, serve and use stacks of layered_store.

    STACK is a config file (.toml or .json), or the URL of one backend, such as
    redis://127.0.0.1:6379/0 or sqlite+aiosqlite:///states.db.

    Exit codes: 0 done, 1 the command failed (unhealthy, not found, backend unreachable), 2 the
    arguments or the config are wrong.
    """
