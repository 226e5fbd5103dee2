"""``layered-store serve``: a stack over HTTP."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from layered_store.cli.common import NumberRange, build, fail, guarded, notices
from layered_store.stack import kind_of, walk

if TYPE_CHECKING:
    from layered_store.interface import StateStore

__all__ = ["command"]

_KEY = "LAYERED_STORE_API_KEY"


@click.command("serve")
@click.argument("stack", required=False)
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    help="Port to listen on; 0 takes any free port.",
)
@click.option(
    "--api-key-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"File with the API key. Default: the environment variable {_KEY}.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=65_536,
    help="Largest request body, in bytes.",
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(1),
    default=1_000,
    help="Most requests at the same time; further ones get a 503.",
)
@click.option(
    "--patience",
    type=NumberRange(0, 86_400, min_open=True),
    default=10.0,
    help="Seconds that a caller has to send a whole request.",
)
@click.option(
    "--drain",
    type=click.IntRange(0),
    default=10,
    help="Seconds that running requests get to finish at shutdown.",
)
@click.option(
    "--public-without-key", is_flag=True, help="Listen on a public address without an API key."
)
def command(
    stack: str | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    max_body: int,
    max_in_flight: int,
    patience: float,
    drain: int,
    *,
    public_without_key: bool,
) -> None:
    """Answer HTTP requests from STACK.

    Without STACK: an SQLite file layered_store.db in this directory, cached, with metrics. A URL
    is served with metrics and without a cache; a config file is served as it is written.

    \b
    layered-store serve
    layered-store serve stack.toml --port 9000
    LAYERED_STORE_API_KEY=... layered-store serve stack.toml --host 0.0.0.0
    """
    try:
        from layered_store.service import create_app
        from layered_store.service.server import build_server
    except ImportError as exc:
        missing = str(exc.name).partition(".")[0]
        fail(f"serve needs {missing}; install it with: pip install 'layered-store[serve]'", code=2)
    try:
        host.encode("idna")
    except UnicodeError:
        raise click.BadParameter("no host can have this name", param_hint="--host") from None
    key = _key(api_key_file)
    if key is None and not _is_local(host) and not public_without_key:
        raise click.UsageError(
            f"refusing to listen on {host} without an API key; set {_KEY},"
            " or give --public-without-key"
        )
    app = guarded(
        lambda: create_app(
            _counted(build(stack, made=True, counted=True)),
            api_key=key,
            max_body=max_body,
            max_in_flight=max_in_flight,
            body_seconds=patience,
        )
    )
    server = build_server(app, host=host, port=port, drain=drain, patience=patience)

    def end(*_: object) -> None:
        # Before the server listens to signals itself, and once more when it has drained. Raising
        # would do nothing wherever exceptions are dropped, such as in a finalizer.
        server.should_exit = True

    signal.signal(signal.SIGTERM, end)
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    except SystemExit:
        if server.started:
            raise
        # The server has a code of its own for a port that is taken, and logged the reason.
    sys.exit(0 if server.started else 1)


def _counted(stack: StateStore) -> StateStore:
    """Return the stack; say so when nothing counts its calls."""
    if not any(kind_of(place.store) == "metrics" for place in walk(stack)):
        notices.print(
            "note: this stack has no metrics, so /metrics shows nothing about it; put"
            ' { use = "metrics", name = "..." } first in its layers',
            markup=False,
        )
    return stack


def _key(path: Path | None) -> str | None:
    if path is None:
        # Set to nothing is not set: no key, and the rules for that.
        return os.environ.get(_KEY, "").strip() or None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is no text"
        raise click.UsageError(f"the API key file cannot be read: {reason}") from None
    if not key:
        raise click.UsageError("the API key file is empty")
    return key


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
