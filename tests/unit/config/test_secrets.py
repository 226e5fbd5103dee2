"""No secret of a config file is ever shown, wherever it stands and whatever is wrong."""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from layered_store.config import load_stack, to_config
from layered_store.errors import ConfigError
from layered_store.masking import mask_url
from layered_store.stack import describe

SECRET = "hunter2Marked"  # noqa: S105

KEY = "aGVsbG8taGVsbG8taGVsbG8taGVsbG8taGVsbG8tISE="
WHOLE: dict[str, Any] = {
    "store": {
        "use": "write_through",
        "id": "tiers",
        "layers": [
            {"use": "metrics", "name": "users"},
            {"use": "ramp", "share": 0.5, "layer": {"use": "redis", "url": "redis://h/0"}},
            {"use": "cached", "ttl": "1m", "max_entries": 5, "invalidation": "auto"},
            {"use": "encrypted", "keys": [KEY], "id_key": KEY, "hash_user_ids": True},
        ],
        "inner": {
            "use": "redis",
            "id": "cache",
            "url": "redis://127.0.0.1:6379/0",
            "prefix": "p:",
            "digest_key": "k",
            "timeout": 1,
            "layers": [{"use": "timeout", "seconds": 0.5}],
        },
        "origin": {
            "use": "sql",
            "url": "sqlite+aiosqlite:///states.db",
            "digest_key": "k",
            "order": "arrival",
            "latest_table": "latest",
            "snapshot_type": "layered_store.snapshot:StateSnapshot",
        },
    },
    "lint": {"allow": ["LS022"], "max_staleness": "5m"},
}

FORMS = (
    SECRET,
    f"redis://user:{SECRET}@host:port/0",
    f"redis://:{SECRET}@h/0?socket_timeout=soon&nonsense={SECRET}",
    f"redis://h/0?health_check_interval={SECRET}",
    f"redis+cluster://u:{SECRET}@h:x,i",
    f"redis+sentinel://u:{SECRET}@h",
    f"postgresql+asyncpg://u:{SECRET}@h:99999999/db",
    f"oracle://u:{SECRET}@h/db",
    f"${{NOT_SET_ANYWHERE}}{SECRET}",
    f"{SECRET}${{",
    [SECRET],
    {"use": SECRET},
    {SECRET + " ": SECRET},
)


def texts(error: BaseException | None) -> Iterator[str]:
    """Everything that a log or a debugger may show of an error and of all that go along."""
    pending, seen = [error], set()
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield f"{each} {each!r} {each.args} {vars(each)}"
        yield "".join(traceback.format_exception(each))
        pending += [each.__cause__, each.__context__, *getattr(each, "problems", ())]


def places(table: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a config, tables and lists included."""
    if path:
        yield path
    items = table.items() if isinstance(table, Mapping) else enumerate(table)
    for key, value in items:
        if isinstance(value, Mapping | list):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


@pytest.mark.parametrize("path", list(places(WHOLE)), ids=lambda path: ".".join(map(str, path)))
@pytest.mark.filterwarnings("ignore::layered_store.config.LintWarning")
def test_a_secret_in_every_place(path: tuple[Any, ...]) -> None:
    """Put where any value belongs, in any form, it is in no error, repr, description or config."""
    forms = FORMS if path[-1] == "url" else [FORMS[0], FORMS[1], *FORMS[-4:]]
    for number, form in enumerate(forms):
        config = copy.deepcopy(WHOLE)
        at: Any = config
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = form
        if number < 2:
            # With a second mistake beside it, so that it is refused whatever it is.
            broken = copy.deepcopy(config)
            broken["misspelled"] = form
            with pytest.raises(ConfigError) as caught:
                load_stack(broken, environ={})
            assert [text for text in texts(caught.value) if SECRET in text] == []
        try:
            stack = load_stack(config, environ={})
        except ConfigError as exc:
            assert [text for text in texts(exc) if SECRET in text] == []
            continue
        if {"url", "digest_key", "keys", "id_key"} & set(path):
            shown = f"{stack!r} {describe(stack)} {describe(stack)!r} {to_config(stack)}"
            assert SECRET not in shown


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.toml", f'[store]\nurl = "{SECRET}" x'),
        ("a.toml", f"[store]\n{SECRET}"),
        ("a.toml", f"[store]\nurl = {SECRET}"),
        ("a.toml", f'[store]\nurl = "{SECRET}"\nurl = "{SECRET}"'),
        ("a.json", f'{{"store": {SECRET}}}'),
        ("a.json", f'{{"store": "{SECRET}'),
        ("a.json", f'["{SECRET}"]'),
        ("a.json", f'{{"{SECRET} {SECRET}": 1, "{SECRET} {SECRET}": 2}}'),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: str) -> None:
    """The parser's own error, which quotes the file, does not go along with ours."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_stack(path)
    assert [text for text in texts(caught.value) if SECRET in text] == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:S@h/0", "redis://u:***@h/0"),
        ("redis://:S@h", "redis://:***@h"),
        ("redis://user@h", "redis://user@h"),
        ("redis://u:S@S@h", "redis://u:***@h"),
        ("postgresql+asyncpg://u:S/S@h/db", "postgresql+asyncpg://u:***@h/db"),
        ("postgresql+asyncpg://u:S?S@h/db", "postgresql+asyncpg://***"),
        ("redis://u:S#S@h/0", "redis://***"),
        ("redis://h/0?password=S@S", "redis://***"),
        ("redis://h/0?password=S&socket_timeout=2", "redis://h/0?password=***&socket_timeout=2"),
        ("redis+sentinel://h/s?sentinel_password=S", "redis+sentinel://h/s?sentinel_password=***"),
        ("unix://u:S@/x.sock?db=1", "unix://u:***@/x.sock?db=1"),
        ("redis://h#S", "redis://h#***"),
        ("sqlite+aiosqlite:///a@b.db?mode=ro", "sqlite+aiosqlite:///a@b.db?mode=ro"),
        ("u:S@h", "***"),
    ],
)
def test_masked_urls(url: str, shown: str) -> None:
    """A password is hidden however it is written, and what is no secret can be read."""
    assert mask_url(url) == shown


def test_what_is_masked_is_said_to_be_so() -> None:
    """Loading a masked secret names its place and the remedy."""
    config = {"use": "sql", "url": "sqlite://", "digest_key": SECRET}
    written = to_config(load_stack(config))
    assert SECRET not in json.dumps(written)
    with pytest.raises(ConfigError, match=r"store\.digest_key.*\$\{NAME\}"):
        load_stack(written)
