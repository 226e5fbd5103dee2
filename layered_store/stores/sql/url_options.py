"""Query options of a database URL: one that the driver does not know is told before it is used."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import ArgumentError

from layered_store.errors import ConfigError
from layered_store.options import nearest

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

__all__ = ["check_options", "typed_options"]

_SSL_OF_MYSQL: Final = (
    "ssl_ca",
    "ssl_capath",
    "ssl_cert",
    "ssl_check_hostname",
    "ssl_cipher",
    "ssl_key",
)
# Those that SQLAlchemy takes itself, or passes on under another name.
_OF_SQLALCHEMY: Final[dict[str, tuple[str, ...]]] = {
    "asyncpg": ("prepared_statement_cache_size", "prepared_statement_name_func"),
    "aiomysql": _SSL_OF_MYSQL,
    "asyncmy": _SSL_OF_MYSQL,
}
_OF_SQLITE: Final = (
    "cached_statements",
    "check_same_thread",
    "detect_types",
    "isolation_level",
    "timeout",
    "uri",
)
# What asyncpg takes of PostgreSQL's own options from the environment alone.
_BY_ENVIRONMENT: Final = ("sslcert", "sslcrl", "sslkey", "sslrootcert")
_TRUE: Final = ("true", "yes", "on", "y", "t", "1")
_FALSE: Final = ("false", "no", "off", "n", "f", "0")


def _truth(text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise ValueError
    return text.lower() in _TRUE


def _threshold(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


# What a URL can only say as text, and these drivers take only as it is meant.
_TYPES: Final[dict[str, dict[str, Callable[[str], Any]]]] = {
    "asyncpg": {
        "command_timeout": float,
        "direct_tls": _truth,
        "max_cacheable_statement_size": int,
        "max_cached_statement_lifetime": int,
        "statement_cache_size": int,
        "timeout": float,
    },
    "psycopg": {"autocommit": _truth, "prepare_threshold": _threshold},
}


def check_options(url: URL, owner: str) -> URL:
    """Return the URL as its driver takes it.

    SQLite's driver leaves out what it does not know (``?mode=ro`` without ``uri=true`` would be
    writable); the others fail at the first call, with an error that does not say why. The
    ``sslmode`` of PostgreSQL's own tools and of hosted databases' URLs is the ``ssl`` of asyncpg.

    Raises:
        ConfigError: an option that the driver does not know, or that has no such value.
    """
    if not url.query:
        return url
    driver = url.get_driver_name().removesuffix("_async")
    if driver == "asyncpg" and "sslmode" in url.query and "ssl" not in url.query:
        query = {"ssl" if name == "sslmode" else name: value for name, value in url.query.items()}
        url = url.set(query=query)
    try:
        known = _known(driver)
    except ImportError:  # of a library of the driver's own; told at the first call
        return url
    if driver == "aiosqlite" and str(url.query.get("uri", "")).lower() in _TRUE:
        known = [*known, *url.query]  # the rest is SQLite's
    for name in url.query:
        if name not in known:
            raise _unknown(name, known, driver, owner)
    try:
        url.get_dialect()().create_connect_args(url)
        typed_options(url)
    except (ArgumentError, ValueError, TypeError):
        pass
    else:
        return url
    # Out here, since the error would show the value.
    raise ConfigError(
        f"has a query option with a value that {driver} does not take", option="url", layer=owner
    )


def typed_options(url: URL) -> dict[str, Any]:
    """Return those options of a URL that its driver does not take as text, as what they mean."""
    types = _TYPES.get(url.get_driver_name().removesuffix("_async"), {})
    return {
        name: types[name](value if isinstance(value, str) else value[-1])
        for name, value in url.query.items()
        if name in types
    }


def _known(driver: str) -> list[str]:
    if driver == "aiosqlite":
        return list(_OF_SQLITE)
    module = importlib.import_module(driver)
    if driver == "psycopg":
        # What it does not take itself it hands to libpq.
        of_libpq = (option.keyword.decode() for option in module.pq.Conninfo.get_defaults())
        return [*of_libpq, *inspect.signature(module.AsyncConnection.connect).parameters]
    return [*_OF_SQLALCHEMY[driver], *inspect.signature(module.connect).parameters]


def _unknown(name: str, known: list[str], driver: str, owner: str) -> ConfigError:
    shown = re.fullmatch(r"[a-z][a-z_]{0,40}", name) is not None
    hint = "; SQLite's own options need uri=true" if driver == "aiosqlite" else ""
    close = nearest(name, known) if shown else None
    if driver == "asyncpg" and name in _BY_ENVIRONMENT:
        hint, close = f"; set PG{name.upper()} in the environment instead", None
    if (driver, name) == ("asyncpg", "connect_timeout"):
        close = "timeout"  # that is its name for it
    return ConfigError(
        f"has a query option that {driver} does not know{f': {name}' if shown else ''}{hint}",
        option="url",
        suggestion=close,
        layer=owner,
    )
