"""``layered-store serve``: a stack over HTTP."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from pathlib import Path

import click

from layered_store.cli.common import build, guarded, notices

__all__ = ["command"]


@click.command("serve")
@click.argument("stack", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any."
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File that holds the API key; else the environment variable LAYERED_STORE_API_KEY.",
)
@click.option(
    "--max-body", type=click.IntRange(1), default=65_536, show_default=True, help="Bytes."
)
@click.option(
    "--drain",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Seconds that running requests get at the end.",
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
    drain: int,
    public_without_key: bool,
) -> None:
    """Answer HTTP requests from STACK (default: an SQLite file, cached, with metrics)."""
    try:
        import uvicorn

        from layered_store.service import create_app
    except ImportError as exc:
        notices.print(
            f"error: serve needs {exc.name}; install it with: pip install 'layered-store[serve]'",
            markup=False,
        )
        sys.exit(2)
    key = _key(api_key_file)
    if key is None and not _is_local(host) and not public_without_key:
        raise click.UsageError(
            f"refusing to listen on {host} without an API key; set LAYERED_STORE_API_KEY,"
            " or give --public-without-key"
        )
    app = create_app(guarded(lambda: build(stack)), api_key=key, max_body=max_body)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="info",
        access_log=False,  # it would log user ids
        timeout_graceful_shutdown=drain,
        server_header=False,
    )
    server = uvicorn.Server(config)
    # The server drains on SIGTERM and then raises it again, for whoever handled it before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    sys.exit(0 if server.started else 1)


def _key(path: Path | None) -> str | None:
    key = os.environ.get("LAYERED_STORE_API_KEY") if path is None else path.read_text().strip()
    if path is not None and not key:
        raise click.UsageError("the API key file is empty")
    return key or None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
