"""The event loop that commands run on."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import pytest

from layered_store.cli.common import quick_loop, run


def test_uvloop_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's store runs on a loop that uvloop made."""
    made: list[asyncio.AbstractEventLoop] = []

    def new_event_loop() -> asyncio.AbstractEventLoop:
        made.append(asyncio.SelectorEventLoop())
        return made[-1]

    monkeypatch.setitem(sys.modules, "uvloop", SimpleNamespace(new_event_loop=new_event_loop))

    async def work(_: object) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert [run("sqlite://", work)] == made


def test_without_uvloop_it_is_asyncios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing breaks where it cannot be had."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert quick_loop() is None
