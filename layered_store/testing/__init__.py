"""The testing kit: for the tests of applications, of stores and of layers.

Nothing here needs pytest; :mod:`layered_store.testing.plugin` offers it as fixtures::

    pytest_plugins = ["layered_store.testing.plugin"]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# At once, not when first asked for: the module of the same name would else stand in its place.
from layered_store.testing.explore import Explored, LoopClock, Schedule, ScheduleError, explore

if TYPE_CHECKING:
    from layered_store.testing.clock import FakeClock
    from layered_store.testing.faults import Fault, Faults
    from layered_store.testing.layer_laws import check_layer
    from layered_store.testing.path import CallPath, Recording, record
    from layered_store.testing.recorded import Recorded, RecordedCall
    from layered_store.testing.report import Report, Result
    from layered_store.testing.scripted import Gate, Scripted, Takes
    from layered_store.testing.store_checks import check_store
    from layered_store.testing.swap import on_clock

__all__ = [
    "CallPath",
    "Explored",
    "FakeClock",
    "Fault",
    "Faults",
    "Gate",
    "LoopClock",
    "Recorded",
    "RecordedCall",
    "Recording",
    "Report",
    "Result",
    "Schedule",
    "ScheduleError",
    "Scripted",
    "Takes",
    "check_layer",
    "check_store",
    "explore",
    "on_clock",
    "record",
]

# Imported when first asked for, so that a test pays only for what it uses.
_LAZY = {
    "CallPath": "path",
    "FakeClock": "clock",
    "Fault": "faults",
    "Faults": "faults",
    "Gate": "scripted",
    "Recorded": "recorded",
    "RecordedCall": "recorded",
    "Recording": "path",
    "Report": "report",
    "Result": "report",
    "Scripted": "scripted",
    "Takes": "scripted",
    "check_layer": "layer_laws",
    "check_store": "store_checks",
    "on_clock": "swap",
    "record": "path",
}


if not TYPE_CHECKING:  # which would take any name for one of this module

    def __getattr__(name: str) -> Any:
        try:
            module = _LAZY[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
