"""The JSON Schema of config files."""

from __future__ import annotations

from typing import Any

import pytest

from layered_store.config import json_schema, load_stack

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


GOOD: list[dict[str, Any]] = [
    {"store": {"use": "memory"}},
    {"store": {"use": "memory", "history_limit": None, "id": "db"}},
    {"store": {"use": "memory", "history_limit": "${LIMIT:-5}"}},
    {"store": {"use": "memory", "layers": [{"use": "cached", "ttl": "1m30s", "max_entries": 5}]}},
    {"store": {"use": "cached", "inner": {"use": "memory"}, "ttl": 5}},
    {
        "store": {"use": "write_through", "inner": {"use": "memory"}, "origin": {"use": "memory"}},
        "lint": {"allow": ["LS022"], "max_staleness": "5m"},
    },
    {"store": {"use": "memory", "layers": [{"use": "ramp", "layer": {"use": "retry"}}]}},
]
BAD: list[dict[str, Any]] = [
    {},
    {"store": {}},
    {"store": {"use": "memry"}},
    {"store": {"use": "memory", "ttl": 5}},
    {"store": {"use": "memory", "history_limit": "many"}},
    {"store": {"use": "cached"}},
    {"store": {"use": "cached", "inner": {"use": "memory"}, "ttl": "soon"}},
    {"store": {"use": "memory", "layers": [{"use": "memory"}]}},
    {"store": {"use": "memory", "layers": [{"use": "cached", "inner": {"use": "memory"}}]}},
    {"store": {"use": "memory"}, "stroe": {}},
    {"store": {"use": "memory", "history_limit": -1}},
    {"store": {"use": "memory", "history_limit": "${A B}"}},
    {"store": {"use": "cached", "inner": {"use": "memory"}, "ttl": -1}},
    {"store": {"use": "cached", "inner": {"use": "memory"}, "invalidation": "on"}},
    {"store": {"use": "cached", "inner": {"use": "memory"}, "refresh_ahead": "half"}},
    {"store": {"use": "memory"}, "lint": {"allow": ["LS999"]}},
    {"store": {"use": "memory"}, "lint": {"allow": {"LS999": "why"}}},
    {"store": {"use": "memory"}, "lint": {"max_staleness": "soon"}},
    {"store": {"use": "sql", "url": 5}},
    {"store": {"use": "sql", "url": "sqlite://", "order": "random"}},
    {"store": {"use": "redis", "url": "redis://h", "ttl": "forever"}},
    {"store": {"use": "timeout", "inner": {"use": "memory"}}},
    {"store": {"use": "write_through", "inner": {"use": "memory"}}},
    {"store": {"use": "memory", "layers": [{"use": "retry", "atempts": 3}]}},
    {"store": {"use": "memory", "layers": [{"use": "ramp", "layer": {"use": "retry", "a": 3}}]}},
    {"store": {"use": "memory", "layers": [{"use": "ramp", "layer": {"use": "memory"}}]}},
]


@pytest.mark.parametrize("config", GOOD)
@pytest.mark.filterwarnings("ignore::layered_store.config.LintWarning")
def test_good_files_pass_both(validator: Any, config: dict[str, Any]) -> None:
    """What the schema accepts here, the loader builds."""
    assert list(validator.iter_errors(config)) == []
    load_stack(config)


@pytest.mark.parametrize("config", BAD)
def test_bad_files_fail_both(validator: Any, config: dict[str, Any]) -> None:
    """What the schema refuses here, the loader refuses."""
    assert list(validator.iter_errors(config))
    with pytest.raises(ValueError):  # noqa: PT011  ConfigError
        load_stack(config)


def test_options_carry_their_docs_and_defaults() -> None:
    """Editors show for an option what its block's docstring says."""
    ttl = json_schema()["$defs"]["layer.cached"]["properties"]["ttl"]
    assert "above 0" in ttl["description"]
    assert ttl["default"] == 60.0
