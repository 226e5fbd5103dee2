"""Durations of config files."""

import re

import pytest

from layered_store.config.durations import DURATION_PATTERN, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("250ms", 0.25),
        ("5m", 300),
        ("1h30m", 5400),
        ("1m 30s", 90),
        ("2d", 172_800),
        ("7", 7),
        ("1.5s", 1.5),
        ("1d 2h3m4s5ms", 93_784.005),
        (" 2.5 ", 2.5),
        (" 30s ", 30),
    ],
)
def test_reads_units(text: str, seconds: float) -> None:
    """Each unit, and several after one another, give seconds; the JSON Schema takes them too."""
    assert parse_duration(text) == pytest.approx(seconds)
    assert re.search(DURATION_PATTERN, text)


@pytest.mark.parametrize(
    "text",
    ["", "s", "30 parsecs", "-5s", "5s5", "5s5s", "30s1m", "1e3s", "٣s", "30s\n!", "inf", "nan"],
)
def test_refuses_the_rest_without_showing_it(text: str) -> None:
    """What is no duration is refused, and the error does not quote it."""
    with pytest.raises(ValueError, match="must be a duration") as caught:
        parse_duration(text)
    assert not text or len(text) < 3 or text not in str(caught.value)
