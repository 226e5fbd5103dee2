"""What a worker writes down of its calls, and how it is read back.

One JSON list a line, written at once with no buffer of the process, so that ``kill -9`` loses
nothing that happened before. Times are CLOCK_MONOTONIC in seconds, one clock for all processes of
a machine. ``state`` is the number that each upsert carries, unique in the run; None is "absent".

====== ================================================================ =====
kind   then                                                             when
====== ================================================================ =====
U      call, user, state, start                                         an upsert begins
u      call, end, outcome                                               it ended
D      call, user, start                                                a delete begins
d      call, end, outcome                                               it ended
r      user, start, end, state, outcome                                 a read ended
h      user, start, end, states, outcome                                a read of the history ended
v      call, user, state, version                                       the system of record said
E      call, user                                                       an erasure is sent to it
e      call, user, version                                              it erased
f      user, state                                                      read after all came to rest
m      figures                                                          at the end
====== ================================================================ =====

``outcome`` is ``ok``, ``cancelled`` or the name of the error's class.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Appends to one file."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, *entry: Any) -> None:
        os.write(self._fd, json.dumps(entry, separators=(",", ":")).encode() + b"\n")


def read(path: Path) -> list[list[Any]]:
    """Return the entries of one worker; a line cut off by its death is left out."""
    entries: list[list[Any]] = []
    if not path.exists():
        return entries  # it was ended before it began
    for line in path.read_bytes().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
