"""Inserts of many rows as one statement."""

from __future__ import annotations

import pytest
from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, Table, bindparam, null
from sqlalchemy.dialects import mysql

from layered_store.stores.sql.manyrows import ManyRows
from layered_store.stores.sql.schema import Hex

TABLE = Table(
    "rank",
    MetaData(),
    Column("digest", LargeBinary().with_variant(Hex("BINARY(16)"), "mysql"), primary_key=True),
    Column("version", BigInteger),
    Column("gone", BigInteger),
)


def test_rows_are_one_statement() -> None:
    """Each value as the driver takes it, in the order of its place; reserved names quoted."""
    rows = ManyRows(mysql.insert(TABLE), ["digest", "version"])
    packed = list(rows.pack([{"digest": b"\x01" * 16, "version": n} for n in (1, 2)]))
    text = "INSERT INTO `rank` (digest, version) VALUES (unhex(%s), %s), (unhex(%s), %s)"
    assert packed == [(text, ("01" * 16, 1, "01" * 16, 2))]
    assert not list(rows.pack([]))


def test_what_follows_the_values_stands_once() -> None:
    """Also with parameters under names of their own, and values of the statement itself."""
    given = mysql.insert(TABLE).values(digest=bindparam("at", type_=TABLE.c.digest.type), version=7)
    given = given.on_duplicate_key_update({"version": given.inserted.version, "gone": null()})
    packed = list(ManyRows(given).pack([{"at": b"a"}, {"at": b"b"}]))
    ((text, values),) = packed
    assert text.count("(unhex(%s), %s)") == 2
    assert text.endswith(" ON DUPLICATE KEY UPDATE version = VALUES(version), gone = NULL")
    assert values == ("61", 7, "62", 7)


@pytest.mark.parametrize(
    ("size", "counts"), [(100, [40]), (60_000, [8] * 5), (2_000_000, [1] * 40)]
)
def test_large_values_are_spread_over_statements(size: int, counts: list[int]) -> None:
    """A server closes the connection on which a statement is larger than it takes."""
    rows = ManyRows(mysql.insert(TABLE), ["digest", "version"])
    packed = list(rows.pack([{"digest": bytes(size), "version": n} for n in range(40)]))
    assert [text.count("(unhex(%s), %s)") for text, _ in packed] == counts
    assert [value for _, values in packed for value in values[1::2]] == list(range(40))
