"""What the commands share: finding the stack, running it, saying what went wrong."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click
from rich.console import Console

from layered_store.config import LintWarning, load_stack
from layered_store.errors import ConfigError, StoreError, ValidationError
from layered_store.options import nearest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rich.console import RenderableType

    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot

__all__ = [
    "DEFAULT_STACK",
    "NumberRange",
    "build",
    "console",
    "fail",
    "guarded",
    "json_option",
    "moving",
    "new_snapshot",
    "notices",
    "progress",
    "run",
    "show_whole",
    "source_of",
]

T = TypeVar("T")

DEFAULT_STACK: Final[dict[str, Any]] = {
    "store": {
        "use": "sql",
        "url": "sqlite+aiosqlite:///layered_store.db",
        "layers": [{"use": "metrics", "name": "default"}, {"use": "cached"}],
    }
}
"""What commands use when no STACK is given: an SQLite file in the working directory."""

# Without a colour system nothing is styled at all: the library would go on with bold and dim.
_styles: Final[Any] = None if os.environ.get("NO_COLOR") else "auto"

_REDIS: Final = ("redis", "rediss", "redis+cluster", "redis+sentinel")

console = Console(highlight=False, soft_wrap=True, color_system=_styles)
"""Where results go; plain text when it is no terminal, and under NO_COLOR."""

_wide: Final = Console(highlight=False, color_system=_styles, width=10_000)

notices = Console(stderr=True, highlight=False, soft_wrap=True, color_system=_styles)


class NumberRange(click.FloatRange):
    """A number in a range; NaN is in none, though no comparison finds it outside."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def source_of(stack: str | None, *, counted: bool = False) -> Any:
    """Return what to load for an argument: a file, or a stack of the one backend of a URL.

    Args:
        stack: the argument.
        counted: whether the backend of a URL gets metrics. No cache: other processes may write
            there, and nothing would tell this one.

    Raises:
        ConfigError: it is neither.
    """
    if stack is None:
        return DEFAULT_STACK
    scheme, found, _ = stack.partition("://")
    if not found:
        if not stack.lower().endswith((".toml", ".json")):
            raise ConfigError(
                "a config file ends in .toml or .json; a backend is given as its URL, an SQLite"
                " file as sqlite+aiosqlite:///NAME",
                path="STACK",
            )
        return Path(stack)
    kind = "redis" if scheme.startswith(("redis", "unix")) else "sql"
    if kind == "sql" and (near := nearest(scheme, _REDIS)):
        raise ConfigError("is not the URL of a backend", path="store.url", suggestion=f"{near}://")
    # Escaped: the shell has filled in its variables already, and ours are for config files.
    table: dict[str, Any] = {"use": kind, "url": stack.replace("${", "$${")}
    if counted:
        table["layers"] = [{"use": "metrics", "name": "default"}]
    return {"store": table}


def refuse_missing(url: str) -> None:
    """Refuse the URL of an SQLite file that is not there: a mistyped one would be made, empty."""
    from layered_store.stores.sql.engines import in_memory, parse_url

    parsed = parse_url(url, "SQLStore")
    path = parsed.database or ""
    if not (in_memory(parsed) or path.startswith("file:") or Path(path).exists()):
        raise ConfigError("there is no such SQLite file; check its name", path="store.url")


def build(
    stack: str | None, *, quiet: bool = False, made: bool = False, counted: bool = False
) -> StateStore:
    """Return the stack that an argument names, telling the linter's warnings on stderr.

    Args:
        stack: the argument.
        quiet: leave the warnings out.
        made: whether an SQLite file that is not there may be made.
        counted: whether the backend of a URL gets metrics.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = load_stack(source_of(stack, counted=counted))
    if not made and stack and "://" in stack and stack.startswith("sqlite"):
        refuse_missing(stack)
    if not quiet:
        for warning in caught:
            if issubclass(warning.category, LintWarning):
                notices.print(f"warning: {warning.message}", markup=False)
    return built


def show_whole(*parts: RenderableType) -> None:
    """Print what may be wide: folded to the width of a terminal, unfolded anywhere else."""
    (console if console.is_terminal else _wide).print(*parts, soft_wrap=False)


def guarded(work: Callable[[], T]) -> T:
    """Run ``work``; end the process with one line instead of a traceback when it fails."""
    try:
        return work()
    except ConfigError as exc:
        fail(str(exc), code=2)
    except ValidationError as exc:
        fail(exc.message, code=2)
    except StoreError as exc:
        fail(str(exc))
    except (KeyboardInterrupt, asyncio.CancelledError):
        fail("interrupted", code=130)
    except (click.ClickException, click.Abort):
        raise
    except BrokenPipeError:
        # Whoever read our output has seen enough, as head does.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the flush at the end
        sys.exit(1)
    except OSError as exc:
        fail(": ".join(map(str, filter(None, (exc.filename, exc.strerror or type(exc).__name__)))))
    except ModuleNotFoundError as exc:
        fail(f"this needs {exc.name}, which is not installed", code=2)
    except Exception as exc:
        if os.environ.get("LAYERED_STORE_TRACEBACK"):
            raise
        # Its text may hold anything, so only its kind is told.
        fail(
            f"{type(exc).__name__}, which no block should raise; set LAYERED_STORE_TRACEBACK=1"
            " to see where"
        )


def fail(message: str, code: int = 1) -> NoReturn:
    """Say what went wrong, in one line, and end the process."""
    notices.print(f"error: {message}", markup=False)
    sys.exit(code)


def new_snapshot(store: StateStore, user: str, **fields: Any) -> StateSnapshot:
    """Return a state of the class that the stack keeps."""
    try:
        return store.snapshot_type(user_id=user, **fields)
    except TypeError:
        raise ConfigError(
            f"states of this stack are {store.snapshot_type.__name__}s, with fields that must be"
            " given: only put --file can"
        ) from None


def quick_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes an event loop: uvloop's where it is installed, else None (asyncio's)."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def run(
    stack: str | None, work: Callable[[StateStore], Awaitable[T]], *, made: bool = False
) -> T:
    """Build the stack, open it, await ``work`` on it and close it; on uvloop where there is one.

    Args:
        stack: see :func:`build`.
        work: what to do.
        made: see there too.
    """

    async def whole() -> T:
        async with build(stack, made=made) as store:
            return await work(store)

    def started() -> T:
        with asyncio.Runner(loop_factory=quick_loop()) as runner:
            return runner.run(whole())

    return guarded(started)


def progress(unit: str, *, shown: bool = True) -> Any:
    """Return a progress bar on stderr, shown only on a terminal.

    Args:
        unit: what is counted, such as ``"users"``.
        shown: whether it may be shown at all.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Counted(ProgressColumn):
        def render(self, task: Any) -> Text:
            total = "" if task.total is None else f" of {task.total:,.0f}"
            speed = f", {task.speed:,.0f} a second" if task.speed else ""
            return Text(f"{task.completed:,.0f}{total} {unit}{speed}")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        Counted(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=notices, disable=not (shown and moving()))


def moving() -> bool:
    """Tell whether what moves may be shown: on a terminal, and not under NO_COLOR."""
    return notices.is_terminal and not os.environ.get("NO_COLOR")
