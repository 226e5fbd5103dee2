"""What may be shown of an option: all but the secrets in it."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, Final

__all__ = ["mask_url", "masked"]

_SHOWN_IN_QUERIES: Final = frozenset(
    {
        "application_name",
        "cache",
        "charset",
        "check_same_thread",
        "client_name",
        "command_timeout",
        "connect_timeout",
        "db",
        "decode_responses",
        "encoding",
        "health_check_interval",
        "host",
        "isolation_level",
        "max_connections",
        "mode",
        "port",
        "prepared_statement_cache_size",
        "protocol",
        "read_timeout",
        "retry_on_timeout",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_timeout",
        "ssl",
        "ssl_ca",
        "ssl_ca_certs",
        "ssl_cert",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
        "ssl_min_version",
        "sslcert",
        "sslkey",
        "sslmode",
        "sslrootcert",
        "target_session_attrs",
        "timeout",
        "unix_socket",
        "uri",
        "write_timeout",
    }
)
"""Options of the drivers whose values hide nothing; those of all others are masked."""


def mask_url(url: object) -> str:
    """Return a URL with its password hidden, and the values of query options that may be secret.

    Where it cannot be told which part is the password, nothing but the scheme is shown.
    """
    scheme, mark, rest = str(url).partition("://")
    if not mark:
        return "***" if "@" in scheme else scheme
    head, query, fragment = _URL.fullmatch(rest).groups()  # type: ignore[union-attr]
    if "@" in (query or "") + (fragment or ""):
        # A password with an unescaped '?', or a value with an '@': the drivers do not agree.
        return f"{scheme}://***"
    if "@" in head and not head.startswith("/"):
        # A password may itself hold '/' or '@', so all up to the last '@' is hidden.
        login, _, place = head.rpartition("@")
        user, colon, _ = login.partition(":")
        shown = user if "/" not in user else "***"
        head = f"{shown}:***@{place}" if colon else f"{shown}@{place}"
    options = "" if query is None else "?" + "&".join(map(_mask_option, query.split("&")))
    return f"{scheme}://{head}{options}" + ("" if fragment is None else "#***")


_URL: Final = re.compile(r"([^?#]*)(?:\?([^#]*))?(?:#(.*))?", re.DOTALL)


def _mask_option(option: str) -> str:
    name, sign, value = option.partition("=")
    return option if not value or name in _SHOWN_IN_QUERIES else f"{name}{sign}***"


_says_secret: Final = re.compile(
    r"(?:.*_)?(?:password|passwd|pwd|passphrase|secret|token|credential|apikey|dsn|"
    r"connection_string|(?:access|api|auth|encryption|private|secret|shared|signing)_key)s?"
    r"|keys?|auth"
).fullmatch


def masked(name: str, value: Any) -> Any:
    """Return the value of an option that has no mask of its own as it may be shown.

    A third party's block need not know of masks: what its name says is secret is hidden, and so are
    the passwords of URLs.
    """
    if isinstance(value, str) and "://" in value:
        return mask_url(value)
    hides = not isinstance(value, bool | int | float | timedelta | type | None)
    if hides and _says_secret(name):
        return "***"
    if isinstance(value, dict):
        return {key: masked(str(key), each) for key, each in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(masked(name, each) for each in value)
    return value
