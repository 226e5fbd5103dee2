"""Log events: one line when the state of a stack changes, never one per call.

They go to the logger ``layered_store`` as ``name key=value ...``; the record has the name as
``record.event`` and the values as ``record.facts``, for structured logging. No user id, state value
or secret is ever among them.

==================== ======= =====================================================================
event                level   when
==================== ======= =====================================================================
backend_lost         WARNING a database hangs or failed twice running
backend_back         INFO    it answers again, and nothing failed for a second
circuit_opened       WARNING a breaker refuses calls from now on
circuit_half_open    INFO    it lets one call through to see
circuit_closed       INFO    calls pass again
tier_lost            WARNING the cache tier is passed by: it hangs or failed twice running
tier_back            INFO    it answers again
tier_repaired        INFO    back again, a repair pass removed copies that were behind
channel_lost         WARNING the invalidation channel broke: in-process caches stop answering
channel_back         INFO    it stands again
erasure_incomplete   WARNING a delete could not finish in every tier (the first of a row)
erasure_complete     INFO    a delete finished everywhere again
==================== ======= =====================================================================
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from typing import Final

__all__ = ["EVENTS", "log_event", "log_warning"]

EVENTS: Final = {
    "backend_lost": logging.WARNING,
    "backend_back": logging.INFO,
    "circuit_opened": logging.WARNING,
    "circuit_half_open": logging.INFO,
    "circuit_closed": logging.INFO,
    "tier_lost": logging.WARNING,
    "tier_back": logging.INFO,
    "tier_repaired": logging.INFO,
    "channel_lost": logging.WARNING,
    "channel_back": logging.INFO,
    "erasure_incomplete": logging.WARNING,
    "erasure_complete": logging.INFO,
}
"""Every event and its level."""

_log = logging.getLogger("layered_store")


def log_event(event: str, **facts: str | float) -> None:
    """Log that something changed.

    Args:
        event: one of :data:`EVENTS`.
        facts: what a reader of the log needs: names of blocks, counts, seconds.
    """
    level = EVENTS[event]
    if _log.isEnabledFor(level):
        text = "".join(f" {key}={_shown(value)}" for key, value in facts.items())
        with suppress(Exception):  # a program's filter or handler must not fail a call
            _log.log(level, "%s%s", event, text, extra={"event": event, "facts": facts})


def _shown(value: str | float) -> str:
    text = str(value)
    return json.dumps(text) if " " in text else text


def log_warning(text: str, *values: object) -> None:
    """Log what is no event but should be looked at, such as a bug in a third party's store."""
    with suppress(Exception):
        _log.warning(text, *values)
