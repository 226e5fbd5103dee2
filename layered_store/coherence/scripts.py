"""The Lua scripts of a Redis cache tier: each one step of the protocol, atomic on one slot.

A value under a record key begins with ``LS``, a form byte and a kind byte, then 8 bytes of version
(big-endian) and 16 of generation. Kinds: ``S`` a state that was published, ``F`` a state that a
reader filled in, ``D`` a tombstone, ``T`` a token. The guard is one string, generation then server
id, whose expiry is the end of trust: while it exists and names this server, copies of its
generation may be believed.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "BEGIN",
    "BURY",
    "FILL",
    "HOLDERS",
    "PING",
    "PUT",
    "RENEW",
    "REPAIR",
    "STAMP",
    "TICKET",
]

_LIBRARY: Final = """
local function fetch(key)
  local r = redis.pcall('GET', key)
  if type(r) ~= 'string' then
    if r then redis.call('DEL', key) end
    return nil
  end
  if #r < 28 or string.sub(r, 1, 3) ~= 'LS\\1' then return '', '' end
  return r, string.sub(r, 4, 4)
end
local function version(r)
  local n = 0
  for i = 5, 12 do n = n * 256 + string.byte(r, i) end
  return n
end
local function generation(r) return string.sub(r, 13, 28) end
local function now()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function text(n) return string.format('%.0f', n) end
local function tell(channel, version, erased, digest)
  local notice = 'i|' .. text(now()) .. '|' .. version .. '|' .. erased .. '|' .. digest
  redis.call('PUBLISH', channel, notice)
end
local function register(key, t)
  redis.call('HSETNX', key, 'born', text(t))
  return {text(t), redis.call('HGET', key, 'born'), redis.call('HGETALL', key)}
end
"""

TICKET: Final = (
    _LIBRARY
    + """
local g = redis.call('GET', KEYS[2])
if not g or string.sub(g, 17) ~= ARGV[1] then return {} end
local gen = string.sub(g, 1, 16)
local r, kind = fetch(KEYS[1])
if r then
  if kind == 'T' then return {r, gen} end
  if (kind == 'S' or kind == 'F' or kind == 'D') and generation(r) == gen then return {'', gen} end
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {ARGV[2], gen}
"""
)
"""Keys: record, guard. Arguments: server id, a new token, the token's life in ms."""

FILL: Final = (
    _LIBRARY
    + """
local g = redis.call('GET', KEYS[2])
if not g or string.sub(g, 1, 16) ~= ARGV[2] then return 0 end
local r = fetch(KEYS[1])
if r ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return 1
"""
)
"""Keys: record, guard. Arguments: token, generation, value, life in ms."""

PUT: Final = (
    _LIBRARY
    + """
local g = redis.call('GET', KEYS[2])
local may = g and string.sub(g, 1, 16) == ARGV[3]
local r, kind = fetch(KEYS[1])
if r then
  if kind == 'T' then
    if may and r == ARGV[2] then redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5])
    else redis.call('DEL', KEYS[1]) end
  elseif kind == 'S' or kind == 'F' or kind == 'D' then
    if version(r) < tonumber(ARGV[1]) or (g and generation(r) ~= string.sub(g, 1, 16)) then
      if may and generation(r) == ARGV[3] then redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5])
      else redis.call('DEL', KEYS[1]) end
    elseif kind == 'F' and version(r) == tonumber(ARGV[1]) then
      redis.call('SETRANGE', KEYS[1], 3, 'S')
    end
  else
    redis.call('DEL', KEYS[1])
  end
end
tell(ARGV[6], ARGV[1], ARGV[7], ARGV[8])
return 1
"""
)
"""Keys: record, guard. Arguments: version, token, generation, value, life in ms, channel, erased,
digest."""

BURY: Final = (
    _LIBRARY
    + """
local g = redis.call('GET', KEYS[2])
local r, kind = fetch(KEYS[1])
local newer = r and (kind == 'S' or kind == 'F' or kind == 'D') and version(r) > tonumber(ARGV[1])
if not newer then
  if g then
    redis.call('SET', KEYS[1], ARGV[2] .. string.sub(g, 1, 16) .. ARGV[3], 'PX', ARGV[4])
  elseif r then
    redis.call('DEL', KEYS[1])
  end
end
tell(ARGV[5], ARGV[1], '1', ARGV[6])
return register(KEYS[3], now())
"""
)
"""Keys: record, guard, register. Arguments: version, tombstone before and after the generation, its
life in ms, channel, digest."""

HOLDERS: Final = _LIBRARY + "return register(KEYS[1], now())"
"""Keys: register."""

BEGIN: Final = (
    _LIBRARY
    + """
local holder = redis.call('GET', KEYS[3])
if holder and holder ~= ARGV[1] then return {} end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[3])
local known = redis.call('HMGET', KEYS[2], 'gen', 'cursor')
if known[1] and known[2] then return {text(now()), known[1], known[2], 0} end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[2], 'gen', ARGV[4], 'cursor', ARGV[2])
return {text(now()), ARGV[4], ARGV[2], 1}
"""
)
"""Keys: guard, repair, lock. Arguments: process, head, life of the lock in ms, a new generation."""

RENEW: Final = (
    _LIBRARY
    + """
if redis.call('HGET', KEYS[2], 'gen') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[2], 'gen', ARGV[2], 'cursor', ARGV[3])
return 1
"""
)
"""Keys: guard, repair. Arguments: the old generation, a new one, head."""

REPAIR: Final = (
    _LIBRARY
    + """
local acted = {}
for i, key in ipairs(KEYS) do
  local v, erased, digest = ARGV[3 * i - 1], ARGV[3 * i], ARGV[3 * i + 1]
  local r, kind = fetch(key)
  local current = r and (kind == 'S' or kind == 'F' or kind == 'D') and version(r) >= tonumber(v)
  if r and not current then redis.call('DEL', key) end
  if not (current and kind ~= 'F') then
    tell(ARGV[1], v, erased, digest)
    acted[#acted + 1] = i - 1
  end
  if current and kind == 'F' then redis.call('SETRANGE', key, 3, 'S') end
end
return acted
"""
)
"""Keys: records. Arguments: channel, then version, erased and digest of each."""

STAMP: Final = (
    _LIBRARY
    + """
if redis.call('GET', KEYS[3]) ~= ARGV[1] then return 0 end
if redis.call('HGET', KEYS[2], 'gen') ~= ARGV[2] then return 0 end
local left = tonumber(ARGV[5]) - now()
if left <= 0 then return 0 end
redis.call('HSET', KEYS[2], 'cursor', ARGV[3])
redis.call('SET', KEYS[1], ARGV[2] .. ARGV[4], 'PX', text(left))
return 1
"""
)
"""Keys: guard, repair, lock. Arguments: process, generation, cursor, server id, end of trust in
ms.
"""

PING: Final = (
    _LIBRARY
    + """
local t = now()
redis.call('HSETNX', KEYS[1], 'born', text(t))
redis.call('HSET', KEYS[1], ARGV[1], text(t + tonumber(ARGV[2])) .. '|' .. ARGV[3])
if redis.call('HLEN', KEYS[1]) > 64 then
  local all = redis.call('HGETALL', KEYS[1])
  for i = 1, #all, 2 do
    local till = tonumber(string.match(all[i + 1], '^(%d+)|'))
    if till and till + 60000 < t then redis.call('HDEL', KEYS[1], all[i]) end
  end
end
redis.call('PUBLISH', ARGV[5], 'p|' .. text(t) .. '|' .. ARGV[4] .. '|0|' .. ARGV[1])
local g = redis.call('GET', KEYS[2])
if not g or string.sub(g, 17) ~= ARGV[6] then return 0 end
return redis.call('PTTL', KEYS[2])
"""
)
"""Keys: register, guard. Arguments: process, lease in ms, seen, number, channel, server id."""
