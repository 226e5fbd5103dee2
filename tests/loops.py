"""Event loops that tests hold up at a place of their choice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class AskedLoop(asyncio.SelectorEventLoop):
    """A closed event loop that has something done whenever it is asked whether it is."""

    def __init__(self, asked: Callable[[], None]) -> None:
        super().__init__()
        self.close()
        self.asked = asked

    def is_closed(self) -> bool:
        if hasattr(self, "asked"):
            self.asked()
        return super().is_closed()
