"""What every layer measures is exported under a name of the catalogue."""

from __future__ import annotations

import pytest
from stacks import DEEP, LAYERS

from layered_store import MemoryStore, StateSnapshot
from layered_store.metrics.catalogue import CATALOGUE
from layered_store.stack import walk


@pytest.mark.parametrize("name", [*LAYERS, *DEEP])
async def test_samples_are_in_the_catalogue(name: str) -> None:
    """With as many labels as stand there and a number; a misspelt one would be left out unseen."""
    stack = {**LAYERS, **DEEP}[name](MemoryStore())
    if "ReadOnly" not in name:
        await stack.upsert_latest(StateSnapshot("u-1"))
    for user_id in ("u-1", "u-1", "nobody"):
        await stack.get_latest(user_id)
    for place in walk(stack):
        for sample in place.store.samples():
            assert len(sample.labels) == len(CATALOGUE[sample.metric].labels), place.label
            assert isinstance(sample.value, int | float)
