"""The command line, ``layered-store``: one module per command."""

from __future__ import annotations

import os
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

    try:
        try:
            cli.main(args=arguments, prog_name="layered-store")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as exc:
        # A full disk below our output; whoever closed a pipe has seen enough.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the flush at the end
        if not isinstance(exc, BrokenPipeError):
            sys.stderr.write(f"error: the output cannot be written: {exc.strerror}\n")
        sys.exit(1)
