"""Whatever a config holds: it is built, or it is a ConfigError."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layered_store.config import json_schema, load_stack
from layered_store.config.registry import BUILT_IN, spec_of
from layered_store.errors import ConfigError
from layered_store.interface import StateStore

NAMES = sorted(
    {option.name for kind in BUILT_IN for option in spec_of(kind).options}
    | {"use", "id", "layers", "inner", "lint", "store", "allow"}
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            *BUILT_IN,
            "${X}",
            "${X:-1}",
            "${",
            "$${X}",
            "30s",
            "none",
            "***",
            "redis://h",
            "sqlite://",
            "json:JSONDecoder",
            10**400,
        ]
    )
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def tables(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A table that names a block, and gives its options values that may be anything."""

    def options(kind: str) -> st.SearchStrategy[Any]:
        found: dict[str, Any] = {option.name: inner for option in spec_of(kind).options}
        optional = {**found, "id": inner, "layers": st.lists(inner, max_size=2) | inner}
        return st.fixed_dictionaries({"use": st.just(kind)}, optional=optional)

    return st.sampled_from(sorted(BUILT_IN)).flatmap(options)


likely = st.recursive(scalars, lambda inner: tables(inner) | st.lists(inner, max_size=2))


@given(document=anything | likely | st.fixed_dictionaries({"store": likely, "lint": anything}))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore::layered_store.config.LintWarning")
def test_anything(document: Any) -> None:
    """No other error than ConfigError, whose text is readable and short enough to read."""
    if not isinstance(document, dict):
        document = {"store": document}
    try:
        stack = load_stack(document, environ={"X": "marked-value"})
    except ConfigError as exc:
        for problem in exc.problems or (exc,):
            assert problem.path is not None
            assert "marked-value" not in str(problem)
            assert 10 < len(str(problem)) < 1_000
    else:
        assert isinstance(stack, StateStore)
        # What loads is also what the schema lets through, but for texts from the environment.
        jsonschema = pytest.importorskip("jsonschema")
        if "X" not in str(document):
            schema = jsonschema.Draft202012Validator(SCHEMA)
            wrapped = document if "store" in document else {"store": document}
            assert list(schema.iter_errors(wrapped)) == []


SCHEMA = json_schema()
