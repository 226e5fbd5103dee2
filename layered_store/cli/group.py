"""The group of all commands, each imported when it is run."""

from __future__ import annotations

import importlib
from typing import Final

import click

from layered_store import __version__
from layered_store.options import nearest

__all__ = ["cli"]

_SECTIONS: Final = {
    "Look at a stack": {
        "show": "Print its blocks, outermost first; opens no connection.",
        "lint": "List what is wrong or doubtful about their order and options.",
        "check": "Open it, probe every backend, print the health tree.",
        "bench": "Measure throughput, latency percentiles and hit ratios.",
        "schema": "Print the JSON Schema of config files, for editors.",
    },
    "Use it": {
        "serve": "Answer HTTP requests from it.",
        "get": "Print a user's latest state.",
        "put": "Store a state of a user.",
        "history": "Print a user's states, newest first.",
        "erase": "Remove everything about a user from every tier.",
        "export": "Write everything that is stored about a user, or about all users.",
        "copy": "Copy all users to another stack, histories included.",
    },
}
_COMMANDS: Final = tuple(name for section in _SECTIONS.values() for name in section)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"layered_store.cli.{cmd_name}_command")
        found: click.Command = module.command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            near = nearest(args[0], _COMMANDS)
            hint = f" Did you mean {near!r}?" if near else f" There are {', '.join(_COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="layered-store")
def cli() -> None:
    """Inspect, check, serve and use layered_store stacks.

    STACK is a config file (.toml or .json), or the URL of one backend, such as
    redis://127.0.0.1:6379/0 or sqlite+aiosqlite:///states.db. Where STACK is optional, the default
    is the SQLite file layered_store.db in this directory, with an in-process cache and metrics.

    \b
    First steps:
      layered-store put sqlite+aiosqlite:///states.db u-1 --axis warmth=0.7
      layered-store get sqlite+aiosqlite:///states.db u-1
      layered-store show stack.toml

    Exit codes: 0: success; 1: the command failed (unhealthy, not found, backend unreachable);
    2: the arguments or the config are wrong; 130: interrupted. Set NO_COLOR to turn colours and
    progress bars off.
    """
