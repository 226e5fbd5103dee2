"""User ids: which are valid, how they are shown, what stands for them in keys."""

from __future__ import annotations

import random
import re

import pytest

from layered_store import ConfigError, ValidationError
from layered_store._alphanumeric import ALPHANUMERIC_RANGES
from layered_store.identity import (
    DIGEST_BYTES,
    PrivateStr,
    check_user_id,
    digest_function,
    is_valid_user_id,
    redact,
)

VALID = [
    "a",
    "-",
    "_",
    "0",
    "u-1_B",
    "x" * 256,
    "ä" * 128,
    "名前",
    "नमस्ते".replace("्", ""),
    "²",
    "ⅷ",
    "\N{COMBINING GREEK YPOGEGRAMMENI}",
    "\N{HALFWIDTH HANGUL LETTER YEO}",
    "𝔘",
]
INVALID = [
    "",
    " ",
    "a b",
    "a.b",
    "a:b",
    "a/b",
    "a\n",
    "\n",
    "a\0",
    "{a}",
    "x" * 257,
    "ä" * 128 + "a",
    "名" * 86,
    "e\N{COMBINING ACUTE ACCENT}",
    "👍",
    "\u200b",
    "\ud800",
    "a\udfff",
    None,
    1,
    b"u-1",
    ["u-1"],
    True,
]


@pytest.mark.parametrize("user_id", VALID)
def test_valid(user_id: str) -> None:
    """1 to 256 bytes of letters, alphabetic marks, numbers, ``_`` and ``-``."""
    assert is_valid_user_id(user_id)
    check_user_id(user_id)


@pytest.mark.parametrize("user_id", INVALID, ids=repr)
def test_invalid(user_id: object) -> None:
    """Anything else is refused by name, without showing it."""
    assert not is_valid_user_id(user_id)
    with pytest.raises(ValidationError) as refused:
        check_user_id(user_id, "get_latest")
    error = refused.value
    assert error.field == "user_id"
    assert error.operation == "get_latest"
    assert error.user_id == (user_id if isinstance(user_id, str) else None)
    assert str(error).startswith("get_latest: user_id m")
    assert len(str(error)) < 120


def test_a_subclass_of_str_is_an_id() -> None:
    """Names of an enumeration or of a framework's own text class work."""

    class Name(str):
        __slots__ = ()

    assert is_valid_user_id(Name("u-1"))


def test_the_table_is_well_formed() -> None:
    """Ascending, disjoint ranges, each whole on its line."""
    last = -1
    for word in ALPHANUMERIC_RANGES.split():
        match = re.fullmatch(r"([0-9A-F]+)(?:-([0-9A-F]+))?", word)
        assert match, word
        first, end = int(match[1], 16), int(match[2] or match[1], 16)
        assert last < first <= end
        last = end


def test_agrees_with_python_on_letters() -> None:
    """Whatever Python takes for a letter or a digit is alphanumeric here too."""
    chance = random.Random(1)
    for code in chance.sample(range(0x110000), 20_000):
        character = chr(code)
        if character.isalnum():
            assert is_valid_user_id(character), hex(code)


@pytest.mark.parametrize(
    ("user_id", "shown"),
    [
        ("abcde", "abcd..."),
        ("abcd", "[redacted]"),
        ("", "[redacted]"),
        ("äöüßx", "äöüß..."),
        (None, "[redacted]"),
        (12345, "[redacted]"),
    ],
)
def test_redact(user_id: object, shown: str) -> None:
    """Four characters of a longer id, nothing of a short one."""
    assert redact(user_id) == shown


def test_private_str() -> None:
    """Equal to the id, and redacted wherever its repr is taken."""
    assert PrivateStr("user-1") == "user-1"
    assert repr(("a", PrivateStr("user-1"))) == "('a', 'user...')"


def test_digest() -> None:
    """Fixed length, keyed, the same for the same key, and never the fingerprint of a user."""
    plain, keyed = digest_function(), digest_function("secret")
    assert len(plain("u-1")) == DIGEST_BYTES
    assert plain("u-1") == digest_function(b"")("u-1")
    assert keyed("u-1") == digest_function(b"secret")("u-1") != plain("u-1")
    assert plain("u-1") != plain("U-1") != plain("u-1-")
    assert plain.fingerprint != keyed.fingerprint
    assert "secret" not in repr(keyed)
    assert len({plain(f"u-{number}") for number in range(10_000)}) == 10_000


@pytest.mark.parametrize("key", ["x" * 65, b"x" * 65, "ä" * 33, "\udcff", 7, None, ["k"]])
def test_bad_digest_key(key: object) -> None:
    """A key of another kind or length is refused without being shown."""
    with pytest.raises(ConfigError, match="digest_key: must be 0 to 64 bytes"):
        digest_function(key)  # type: ignore[arg-type]
