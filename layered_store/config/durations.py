"""Durations in config files: ``"30s"``, ``"250ms"``, ``"1h30m"``, or plain numbers of seconds."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["DURATION_PATTERN", "parse_duration"]

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_NUMBER: Final = r"\d+(?:\.\d+)?\s*"

DURATION_PATTERN: Final = (
    rf"^\s*(?=\d)(?:{_NUMBER}|(?:{_NUMBER}d\s*)?(?:{_NUMBER}h\s*)?(?:{_NUMBER}m(?!s)\s*)?"
    rf"(?:{_NUMBER}s\s*)?(?:{_NUMBER}ms)?)\s*$"
)
"""What a duration written as text looks like: a number, or each unit once and larger ones first;
also stands in the JSON Schema."""

_whole: Final = re.compile(DURATION_PATTERN).match
_parts: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")


def parse_duration(text: str) -> float:
    """Return the seconds that a text such as ``"30s"`` or ``"1m 30s"`` stands for.

    Units are ``d``, ``h``, ``m``, ``s`` and ``ms``, each once and in this order; a bare number is
    seconds.

    Raises:
        ValueError: it is no duration; the text of the error does not show it.
    """
    text = text.strip()
    if re.fullmatch(r"\d+(?:\.\d+)?", text, re.ASCII):
        return float(text)
    if not text.isascii() or not _whole(text):
        raise ValueError('must be a duration such as 30, "30s", "5m", "250ms" or "1h30m"')
    return sum(float(number) * _UNITS[unit] for number, unit in _parts.findall(text))
