"""The Lua scripts of a store that is used on its own: each one step, atomic on one slot."""

from __future__ import annotations

from hashlib import sha1
from typing import Final

__all__ = ["ERASE", "UPSERT", "RedisScript"]


class RedisScript:
    """A Lua script that is sent by its digest, and whole only to a server that lacks it.

    Args:
        source: the Lua text.
    """

    __slots__ = ("sha", "source")

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        # Not a protection: SHA-1 is how Redis names scripts.
        self.sha = sha1(self.source, usedforsecurity=False).hexdigest().encode()

    def __repr__(self) -> str:
        return f"RedisScript({self.sha.decode()})"


# A number of more than 14 digits is exact only as text with '%.0f'. What is no record of ours or is
# of a newer form, counts as nothing: the write that follows replaces it.
_LIBRARY: Final = """
local function parse(key)
  local r = redis.pcall('GET', key)
  if type(r) ~= 'string' or #r < 28 or string.sub(r, 1, 3) ~= 'LS\\1' then return 0, '', '', '' end
  local version = 0
  for i = 5, 12 do version = version * 256 + string.byte(r, i) end
  if version >= 9007199254740991 then return 0, '', '', '' end
  local n = string.byte(r, 29) or 0
  if #r < 29 + 16 * n and #r > 28 then return 0, '', '', '' end
  return version, string.sub(r, 4, 4), string.sub(r, 30, 29 + 16 * n), string.sub(r, 30 + 16 * n)
end
local function wide(n)
  local bytes = {}
  for i = 8, 1, -1 do
    local rest = math.fmod(n, 256)
    bytes[i] = string.char(rest)
    n = (n - rest) / 256
  end
  return table.concat(bytes)
end
local function now()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end
"""

UPSERT: Final = RedisScript(
    _LIBRARY
    + """
local version, kind, ids, rest = parse(KEYS[1])
local at = string.find(ids, ARGV[1], 1, true)
while at and at % 16 ~= 1 do at = string.find(ids, ARGV[1], at + 1, true) end
if at == 1 then return 1 end
if at then return 0 end
if kind == 'D' and #rest == 8 then
  local erased = 0
  for i = 1, 8 do erased = erased * 256 + string.byte(rest, i) end
  local t = now()
  if erased <= t and t - tonumber(ARGV[2]) < erased then return 0 end
end
local ttl, limit = tonumber(ARGV[3]), tonumber(ARGV[4])
ids = string.sub(ARGV[1] .. ids, 1, 64)
local value = 'LS\\1S' .. wide(version + 1) .. string.rep('\\0', 16)
  .. string.char(#ids / 16) .. ids .. ARGV[5]
if ttl > 0 then
  redis.call('SET', KEYS[1], value, 'PX', ttl)
else
  redis.call('SET', KEYS[1], value)
end
if limit > 0 then
  local held = redis.call('TYPE', KEYS[2]).ok
  if held ~= 'list' and held ~= 'none' then redis.call('DEL', KEYS[2]) end
  redis.call('LPUSH', KEYS[2], value)
  redis.call('LTRIM', KEYS[2], 0, limit - 1)
  if ttl > 0 then redis.call('PEXPIRE', KEYS[2], ttl) else redis.call('PERSIST', KEYS[2]) end
end
return 1
"""
)
"""Keys: record, history. Arguments: write id, age of the call in microseconds, life in ms (0: for
ever), states of history (0: none), snapshot. Returns 1 when the snapshot is the latest state, 0
when a later write or erasure won.
"""

ERASE: Final = RedisScript(
    _LIBRARY
    + """
local version, kind, ids = parse(KEYS[1])
local at = string.find(ids, ARGV[2], 1, true)
while at and at % 16 ~= 1 do at = string.find(ids, ARGV[2], at + 1, true) end
if at then return 1 end
ids = string.sub(ARGV[2] .. ids, 1, 64)
local value = 'LS\\1D' .. wide(version + 1) .. string.rep('\\0', 16)
  .. string.char(#ids / 16) .. ids .. wide(now())
redis.call('SET', KEYS[1], value, 'PX', ARGV[1])
redis.call('DEL', KEYS[2])
return 1
"""
)
"""Keys: record, history. Arguments: life of the tombstone in ms, write id. A tombstone holds the
version and the time of the erasure, so that a write that began before it cannot bring the user
back; a time in the future (damaged, or the server's clock was set back) bars nothing, or it would
swallow every write until then. A repeat of an erasure changes nothing, so that it spares what was
written since.
"""
