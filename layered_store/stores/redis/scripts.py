"""The Lua scripts of a store that is used on its own: each one step, atomic on one slot."""

from __future__ import annotations

from hashlib import sha1
from typing import Final

__all__ = ["ERASE", "NOW", "UPSERT", "RedisScript"]


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
local zeros = string.rep('\\0', 16)
local function number(s, from, to)
  local n = 0
  for i = from, to do n = n * 256 + string.byte(s, i) end
  return n
end
local function parse(key)
  local r = redis.pcall('GET', key)
  if type(r) ~= 'string' or #r < 29 or string.sub(r, 1, 3) ~= 'LS\\1' then return 0, '', 0, 0 end
  local version = number(r, 5, 12)
  if version >= 9007199254740991 then return 0, '', 0, 0 end
  local n = string.byte(r, 29)
  if #r < 29 + 16 * n then return 0, '', 0, 0 end
  local ids, erased, moment = string.sub(r, 30, 29 + 16 * n), 0, 0
  if string.byte(r, 4) == 68 then
    if #r == 37 + 16 * n then erased, moment = version, number(r, #r - 7, #r) end
  elseif string.sub(r, 13, 28) ~= zeros and string.sub(r, 13, 14) == '\\0\\0' then
    erased, moment = number(r, 13, 20), number(r, 21, 28)
  end
  return version, ids, erased, moment
end
local function find(ids, id)
  local at = string.find(ids, id, 1, true)
  while at and at % 16 ~= 1 do at = string.find(ids, id, at + 1, true) end
  return at
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
local version, ids, erased, moment = parse(KEYS[1])
local at = find(ids, ARGV[1])
if at == 1 then return 1 end
if at then return 0 end
if ARGV[3] == '1' then
  for _, entry in ipairs(redis.pcall('LRANGE', KEYS[2], 0, 63)) do
    if string.sub(entry, 30, 45) == ARGV[1] then return 0 end
  end
end
if moment > 0 then
  local t, began = now(), tonumber(ARGV[4])
  if moment > t or moment < t - 1000 * tonumber(ARGV[6]) then
    moment = 0
  elseif erased ~= tonumber(ARGV[5]) and (began < moment or began > t) then
    return {erased, moment, t}
  end
end
local ttl, limit = tonumber(ARGV[7]), tonumber(ARGV[8])
ids = string.sub(ARGV[1] .. ids, 1, 256)
local erasure = moment > 0 and wide(erased) .. wide(moment) or zeros
local head = 'LS\\1S' .. wide(version + 1) .. erasure
local value = head .. string.char(#ids / 16) .. ids .. ARGV[2]
if ttl > 0 then
  redis.call('SET', KEYS[1], value, 'PX', ttl)
else
  redis.call('SET', KEYS[1], value)
end
if limit > 0 then
  if redis.call('TYPE', KEYS[2]).ok ~= 'list' then redis.call('DEL', KEYS[2]) end
  redis.call('LPUSH', KEYS[2], head .. '\\1' .. ARGV[1] .. ARGV[2])
  redis.call('LTRIM', KEYS[2], 0, limit - 1)
  if ttl > 0 then redis.call('PEXPIRE', KEYS[2], ttl) else redis.call('PERSIST', KEYS[2]) end
end
return 1
"""
)
"""Keys: record, history. Arguments: write id, snapshot, 1 for a repeat, least time at which the
call began in microseconds of this server (0: not known), version of the last erasure known to come
before it (0: none), life of a tombstone and of the record in ms (0: for ever), states of history
(0: none).

Returns 1 when the snapshot is the latest state, 0 when a later write or erasure won. Else nothing
was stored, since the user was erased and the write may have begun before: the erasure's version and
time, and the time now, in microseconds.
"""

NOW: Final = RedisScript(_LIBRARY + "return now()")
"""Keys: any on the server that is asked for its time, in microseconds."""

ERASE: Final = RedisScript(
    _LIBRARY
    + """
local version, ids = parse(KEYS[1])
if find(ids, ARGV[2]) then return 0 end
ids = string.sub(ARGV[2] .. ids, 1, 256)
local value = 'LS\\1D' .. wide(version + 1) .. zeros .. string.char(#ids / 16) .. ids .. wide(now())
redis.call('SET', KEYS[1], value, 'PX', ARGV[1])
redis.call('DEL', KEYS[2])
return version + 1
"""
)
"""Keys: record, history. Arguments: life of the tombstone in ms, write id.

A tombstone holds the version and the time of the erasure, and states that are written within its
life carry them on, so that a write that began before it cannot bring the user back. A time in the
future (damaged, or the server's clock was set back) bars nothing, or it would refuse every write
until then. A repeat of an erasure changes nothing, so that it spares what was written since.

Returns the tombstone's version, 0 for a repeat.
"""
