"""``layered-store put``: store a state."""

from __future__ import annotations

from typing import IO

import click
import msgspec
from click.core import ParameterSource

from layered_store.cli.common import guarded, new_snapshot, run
from layered_store.interface import StateStore
from layered_store.snapshot import Source

__all__ = ["command"]


@click.command("put")
@click.argument("stack")
@click.argument("user")
@click.argument("values", metavar="[NAME=VALUE]...", nargs=-1)
@click.option("--axis", "axes", multiple=True, metavar="NAME=VALUE", help="The same as an option.")
@click.option("--confidence", type=float, default=1.0, help="From 0 to 1.")
@click.option(
    "--source",
    type=click.Choice([str(source) for source in Source]),
    default=str(Source.SELF_REPORT),
    help="How the state became known.",
)
@click.option(
    "--file",
    "source_file",
    type=click.File("rb"),
    help="Read the state as JSON from a file, or - for standard input, instead of the options;"
    " it is stored for USER, whatever user it names.",
)
def command(
    stack: str,
    user: str,
    values: tuple[str, ...],
    axes: tuple[str, ...],
    confidence: float,
    source: str,
    source_file: IO[bytes] | None,
) -> None:
    """Store a state of USER: the axes given, and no others.

    \b
    layered-store put stack.toml u-1 warmth=0.7 energy=0.25
    layered-store put stack.toml u-1 --file state.json
    """

    async def work(store: StateStore) -> None:
        if source_file is not None:
            snapshot = store.snapshot_type.from_json(text)
            snapshot = msgspec.structs.replace(snapshot, user_id=user)
        else:
            snapshot = new_snapshot(
                store, user, source=Source(source), confidence=confidence, axes=pairs
            )
        await store.upsert_latest(snapshot)

    given = (*values, *axes)
    context = click.get_current_context()
    options = any(
        context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        for name in ("confidence", "source")
    )
    if source_file is not None and (given or options):
        raise click.UsageError("give either --file, or axes, --confidence and --source")
    pairs = dict(map(_axis, given))
    if len(pairs) < len(given):
        raise click.UsageError("an axis is given twice")
    # Before the loop runs, which an interruption would not reach while this waits for input.
    text = b"" if source_file is None else guarded(source_file.read)
    run(stack, work, made=True)


def _axis(text: str) -> tuple[str, float]:
    name, sign, value = text.partition("=")
    try:
        if sign:
            return name, float(value)
    except ValueError:
        pass
    raise click.BadParameter(
        "must be NAME=VALUE with a number, such as warmth=0.7", param_hint="--axis"
    )
