"""Query options of database URLs: what a driver does not know is refused at once."""

from __future__ import annotations

import pytest
from sqlalchemy.engine import make_url

from layered_store.errors import ConfigError
from layered_store.stores.sql.store import SQLStore
from layered_store.stores.sql.url_options import check_options, typed_options

KNOWN = [
    "sqlite+aiosqlite:///x.db?timeout=3&check_same_thread=false",
    "sqlite+aiosqlite:///file:x.db?mode=ro&uri=true&cache=shared",
    "postgresql+asyncpg://h/d?ssl=require&command_timeout=3&prepared_statement_cache_size=0",
    "postgresql+asyncpg:///d?host=a:1&host=b:2&target_session_attrs=read-write",
    "postgresql+psycopg://h/d?sslmode=require&application_name=x&channel_binding=prefer",
    "postgresql+psycopg_async://h/d?connect_timeout=3",
    "mysql+aiomysql://h/d?charset=utf8mb4&ssl_ca=/ca.pem&init_command=SELECT+1",
    "mariadb+asyncmy://h/d?read_timeout=3&ssl_check_hostname=true",
]


@pytest.mark.parametrize("url", KNOWN)
def test_known(url: str) -> None:
    """What the driver knows goes to it as it is."""
    assert check_options(make_url(url), "SQLStore") == make_url(url)
    assert SQLStore(url).url == url


UNKNOWN = [
    ("sqlite:///x.db?timeot=3", "timeot; .*uri=true .*'timeout'"),
    ("sqlite:///x.db?mode=ro", "mode; .*uri=true"),
    ("sqlite:///x.db?mode=ro&uri=false", "mode; .*uri=true"),
    ("postgresql://h/d?comand_timeout=3", "asyncpg does not know: comand_timeout .*'command_time"),
    ("postgresql://h/d?connect_timeout=3", "asyncpg does not know: connect_timeout .*'timeout'"),
    ("postgresql://h/d?sslmode=require&sslrootcert=x", "sslrootcert; set PGSSLROOTCERT in the env"),
    ("postgresql://h/d?sslcert=x", "sslcert; set PGSSLCERT in the environment instead$"),
    ("postgresql+psycopg://h/d?ssl=require", "psycopg does not know: ssl"),
    ("mysql://h/d?read_timeout=3", "aiomysql does not know: read_timeout"),
    ("mysql+asyncmy://h/d?bogus=3", "asyncmy does not know: bogus"),
]


@pytest.mark.parametrize(("url", "match"), UNKNOWN)
def test_unknown(url: str, match: str) -> None:
    """SQLite's driver would leave it out, and the others fail at the first call, unexplained."""
    with pytest.raises(ConfigError, match=rf"^SQLStore.url: has a query option that .*{match}"):
        SQLStore(url)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///x.db?timeout=marked",
        "postgresql://h/d?prepared_statement_cache_size=marked",
        "postgresql://h/d?timeout=marked",
        "postgresql://h/d?direct_tls=marked",
        "postgresql+psycopg://h/d?prepare_threshold=marked",
        "mysql://h/d?connect_timeout=marked",
        "postgresql://h/d?marked@h=x",
        "postgresql://h/d?marked-value=3",
    ],
)
def test_no_value_is_shown(url: str) -> None:
    """It may be a secret, as may be what is no name."""
    with pytest.raises(ConfigError, match="has a query option") as told:
        SQLStore(url)
    assert "marked" not in str(told.value)
    assert told.value.__cause__ is None
    assert told.value.__context__ is None


def test_what_is_no_text_for_the_driver_is_none() -> None:
    """A URL has only text, with which asyncpg and psycopg fail in their midst."""
    asyncpg = "postgresql+asyncpg://h/d?timeout=3&statement_cache_size=0&direct_tls=off&ssl=prefer"
    assert typed_options(make_url(asyncpg)) == {
        "timeout": 3.0,
        "statement_cache_size": 0,
        "direct_tls": False,
    }
    for text, value in (("0", 0), ("none", None)):
        psycopg = f"postgresql+psycopg_async://h/d?prepare_threshold={text}&sslmode=prefer"
        assert typed_options(make_url(psycopg)) == {"prepare_threshold": value}
    assert typed_options(make_url("sqlite+aiosqlite:///x.db?timeout=3")) == {}


def test_a_driver_that_cannot_be_loaded_is_told_at_the_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when libpq is missing below psycopg: what it would know cannot be told."""

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    url = make_url("postgresql+psycopg://h/d?bogus=3")
    assert check_options(url, "SQLStore") is url


def test_sslmode_is_ssl_for_asyncpg() -> None:
    """URLs of hosted databases say it in the words of PostgreSQL's own tools."""
    url = make_url("postgresql+asyncpg://h/d?sslmode=require&timeout=3")
    assert check_options(url, "SQLStore").query == {"ssl": "require", "timeout": "3"}
    both = make_url("postgresql+asyncpg://h/d?sslmode=require&ssl=prefer")
    with pytest.raises(ConfigError, match="asyncpg does not know: sslmode"):
        check_options(both, "SQLStore")
