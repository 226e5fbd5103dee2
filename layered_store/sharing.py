"""Which users belong to a share of all: always the same ones, in every process and release."""

from __future__ import annotations

from hashlib import blake2b

__all__ = ["belongs", "place_of"]


def place_of(user_id: str, salt: str = "") -> float:
    """Return the user's place in [0, 1), evenly spread; the user is in every share above it.

    A larger share holds all users of a smaller one, so nobody leaves while a share grows.

    Args:
        user_id: the user.
        salt: another salt gives independent places, 0 to 64 UTF-8 bytes.
    """
    told = blake2b(user_id.encode(), digest_size=8, key=salt.encode(), person=b"ls-share").digest()
    # 53 bits, as many as a float holds, so that no place is rounded up to 1.
    return (int.from_bytes(told, "big") >> 11) / 2**53


def belongs(user_id: str, share: float, salt: str = "") -> bool:
    """Tell whether a user is in this share; 0 and 1 are answered without a digest."""
    return share >= 1.0 or (share > 0.0 and place_of(user_id, salt) < share)
