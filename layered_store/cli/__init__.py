"""The command line, ``layered-store``: one module per command."""

from __future__ import annotations

import io
import os
import sys
from typing import Final

__all__ = ["main"]

_UTF_8: Final = ("utf-8", "utf8")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Closed, as some schedulers start a job: it reads nothing, and its output is unwanted.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
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

    if not sys.flags.safe_path and "" not in sys.path:
        # A config file may name a class of the project's; last, where it hides no other module.
        sys.path.append("")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in _UTF_8:
            # JSON in a file or pipe is UTF-8; on an old terminal a "?" is better than no answer.
            stream.reconfigure(errors="replace", encoding=None if stream.isatty() else "utf-8")
    try:
        try:
            cli.main(args=arguments, prog_name="layered-store")
        finally:
            sys.stdout.flush()
    except OSError as exc:
        # A full disk below our output; whoever closed a pipe has seen enough.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the flush at the end
        if not isinstance(exc, BrokenPipeError):
            sys.stderr.write(f"error: the output cannot be written: {exc.strerror}\n")
        sys.exit(1)
