"""The command line, ``layered-store``: one module per command."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    try:
        import click  # noqa: F401  optional
        import rich  # noqa: F401  optional
    except ImportError as exc:
        sys.stderr.write(
            f"layered-store: the command line needs {exc.name};"
            " install it with: pip install 'layered-store[cli]'\n"
        )
        sys.exit(2)
    from layered_store.cli.group import cli

    cli.main(args=arguments, prog_name="layered-store")
