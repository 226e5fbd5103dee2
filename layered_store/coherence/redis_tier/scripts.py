"""The Lua scripts of a Redis cache tier: each one step of the protocol, atomic on one slot.

A value under a record key begins with ``LS``, a form byte and a kind byte, then 8 bytes of version
(big-endian) and 16 of generation. Kinds: ``S`` a state that was published, ``F`` a state that a
reader filled in, ``D`` a tombstone, ``T`` a token. The guard is one string, generation then server
id, whose expiry is the end of trust: while it exists and names this server, copies of its
generation may be believed. The register of a bucket's leases, the hash ``leases``, is whole since
its field ``born`` and belongs to the server run in ``run``: another run begins an empty one, and so
does a clock that was set (``last`` is when it was looked at before).

Somebody may set the server's clock. Set forward, what expires does so too early, which only costs.
Set back, it lasts longer than it was given, which shows by its time left: then it counts as ended.

Whoever has taken in a message has taken in all of its moment and before. So moments are told in
microseconds, of which no two scripts share one; a millisecond has messages before and after.

Any key may hold something else, written by another program: it then counts as missing and is
replaced. A lock that never expires is not ours.

A server that is full (``maxmemory``, nothing evicted) takes nothing new: what cannot be stored is
removed at least, and told of. A script that was let remove something may then go on to write.

Each script is loaded behind a head (:func:`source`) that names the server run it was loaded on.
"""

from __future__ import annotations

from typing import Final

from layered_store.coherence.contract import TRUST_SECONDS

__all__ = [
    "BEGIN",
    "BURY",
    "CLEAR",
    "FILL",
    "HOLDERS",
    "PING",
    "PUT",
    "READ",
    "RENEW",
    "REPAIR",
    "SCRIPTS",
    "STALE",
    "STAMP",
    "TICKET",
    "source",
]


def source(
    script: str, server: str, *, sharded: bool, forgets: bool, longest: float = TRUST_SECONDS
) -> str:
    """Return a script as it is loaded on one run of one server.

    Args:
        script: one of this module's.
        server: the run id, 40 hexadecimal digits.
        sharded: whether the channel is a cluster's, which only the nodes of its shard carry.
        forgets: whether scripts end with the run of the server that knows them. Those before
            Redis 7 hand them on to replicas and to the append-only file, so the script looks
            itself.
        longest: seconds for which a tier is believed at most.
    """
    head = (
        f"local server = '{server}'\nlocal publish = '{'SPUBLISH' if sharded else 'PUBLISH'}'\n"
        f"local longest = {longest * 1000:.0f}\n"
    )
    return head + ("" if forgets else _CHECK) + script


_CHECK: Final = """
if not string.find(redis.call('INFO', 'server'), 'run_id:' .. server, 1, true) then
  return redis.error_reply('NOSCRIPT this script is of another server run')
end
"""

_LIBRARY: Final = """
local function fetch(key)
  local r = redis.pcall('GET', key)
  if not r then return nil end
  if type(r) ~= 'string' or #r < 28 or string.sub(r, 1, 3) ~= 'LS\\1' then return '', '' end
  return r, string.sub(r, 4, 4)
end
local function version(r)
  local n = 0
  for i = 5, 12 do n = n * 256 + string.byte(r, i) end
  return n
end
local function generation(r) return string.sub(r, 13, 28) end
local function moment()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end
local function now() return math.floor(moment() / 1000) end
local function text(n) return string.format('%.0f', n) end
local function tell(channel, version, erased, digest, at)
  local notice = {'i', text(at or moment()), version, erased, server, digest}
  redis.call(publish, channel, table.concat(notice, '|'))
end
local function keep(key, value, life)
  if redis.pcall('SET', key, value, 'PX', life).err then redis.call('DEL', key) end
end
local function plain(key)
  local r = redis.pcall('GET', key)
  return type(r) == 'string' and r
end
local function fields(key, ...) return redis.pcall('HMGET', key, ...) end
local function register(key, t)
  local known = fields(key, 'run', 'born', 'last')
  local gap = t - (tonumber(known[3]) or t)
  local set = (gap < 0 or gap > 1000) and redis.call('HLEN', key) > 3
  if known[1] ~= server or set or not string.find(known[2] or '', '^%d+$') then
    redis.call('DEL', key)
    redis.call('HSET', key, 'run', server, 'born', text(t))
  end
  redis.call('HSET', key, 'last', text(t))
end
local function trust(key)
  local g = plain(key)
  local left = g and redis.call('PTTL', key) or 0
  if left >= 0 and left <= longest then return g end
  redis.call('DEL', key)
  return false
end
local function holders(key, at)
  redis.pcall('HDEL', key, '')
  register(key, math.floor(at / 1000))
  return {text(at), redis.call('HGET', key, 'born'), redis.call('HGETALL', key)}
end
"""

READ: Final = "return redis.call('MGET', unpack(KEYS))"
"""Keys: guard, records. So it is one step: what was trusted stood there at that moment."""

CLEAR: Final = """
if redis.pcall('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
"""Keys: record. Arguments: what stood there and is no record. As if it had been evicted."""

TICKET: Final = (
    _LIBRARY
    + """
local g = trust(KEYS[2])
if not g or string.sub(g, 17) ~= server then return {} end
local gen = string.sub(g, 1, 16)
local r, kind = fetch(KEYS[1])
if kind == 'T' then return {r, gen} end
if (kind == 'S' or kind == 'F' or kind == 'D') and generation(r) == gen then return {'', gen} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {ARGV[1], gen}
"""
)
"""Keys: record, guard. Arguments: a new token, the token's life in ms."""

FILL: Final = (
    _LIBRARY
    + """
local g = plain(KEYS[2])
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
local g = plain(KEYS[2])
local may = g and string.sub(g, 1, 16) == ARGV[3]
local r, kind = fetch(KEYS[1])
if kind == 'T' then
  if may and r == ARGV[2] then keep(KEYS[1], ARGV[4], ARGV[5])
  else redis.call('DEL', KEYS[1]) end
elseif kind == 'S' or kind == 'F' or kind == 'D' then
  if version(r) < tonumber(ARGV[1]) or (g and generation(r) ~= string.sub(g, 1, 16)) then
    if may and generation(r) == ARGV[3] then keep(KEYS[1], ARGV[4], ARGV[5])
    else redis.call('DEL', KEYS[1]) end
  elseif version(r) == tonumber(ARGV[1]) and string.sub(r, 29) ~= string.sub(ARGV[4], 29) then
    redis.call('DEL', KEYS[1])
  elseif kind == 'F' and version(r) == tonumber(ARGV[1]) then
    redis.call('SETRANGE', KEYS[1], 3, 'S')
  end
elseif r then
  redis.call('DEL', KEYS[1])
end
tell(ARGV[6], ARGV[1], ARGV[7], ARGV[8])
return 1
"""
)
"""Keys: record, guard. Arguments: version, token, generation, value, life in ms, channel, erased,
digest.

A copy of the same version with another state is of a write that the database lost, in a failover to
a replica that never had it, before it gave that version again."""

BURY: Final = (
    _LIBRARY
    + """
local g = plain(KEYS[2])
local r, kind = fetch(KEYS[1])
local copy = kind == 'S' or kind == 'F' or kind == 'D'
if copy and g and generation(r) == string.sub(g, 1, 16) then
  if version(r) <= tonumber(ARGV[1]) then
    keep(KEYS[1], ARGV[2] .. string.sub(g, 1, 16) .. ARGV[3], ARGV[4])
  end
elseif r then
  redis.call('DEL', KEYS[1])
end
local at = moment()
tell(ARGV[5], ARGV[1], '1', ARGV[6], at)
return holders(KEYS[3], at)
"""
)
"""Keys: record, guard, register. Arguments: version, tombstone before and after the generation, its
life in ms, channel, digest. It replaces a copy and voids a token, but leaves nothing where nothing
was: it may come so late that the user was written again, and that was replayed already."""

HOLDERS: Final = _LIBRARY + "return holders(KEYS[1], moment())"
"""Keys: register."""

BEGIN: Final = (
    _LIBRARY
    + """
trust(KEYS[1])
local holder = plain(KEYS[3])
local life = redis.call('PTTL', KEYS[3])
if holder and holder ~= ARGV[1] and life >= 0 and life <= tonumber(ARGV[3]) then return {} end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[3])
local known = fields(KEYS[2], 'gen', 'cursor', 'pass')
if known[1] and #known[1] == 16 and known[2] and tonumber(known[3]) then
  return {text(now()), known[1], known[2], tonumber(known[3])}
end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[2], 'gen', ARGV[4])
tell(ARGV[5], '0', '0', '')
return {text(now()), ARGV[4], ARGV[2], 0}
"""
)
"""Keys: guard, repair, lock. Arguments: process, head, life of the lock in ms, a new generation,
channel.

A generation that was never stamped holds no copies, so it is replaced by a new one: number 0. What
changed before its head is not replayed, so nobody is told of it: all in-process caches are told to
drop everything."""

RENEW: Final = (
    _LIBRARY
    + """
if fields(KEYS[2], 'gen')[1] ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[2], 'gen', ARGV[2], 'cursor', ARGV[3], 'pass', ARGV[4])
tell(ARGV[5], '0', '0', '')
return 1
"""
)
"""Keys: guard, repair. Arguments: the old generation, a new one, head, number of the pass,
channel."""

REPAIR: Final = (
    _LIBRARY
    + """
local acted = {}
for i, key in ipairs(KEYS) do
  local v, erased, digest = ARGV[3 * i - 1], ARGV[3 * i], ARGV[3 * i + 1]
  local r, kind = fetch(key)
  local current = (kind == 'S' or kind == 'F' or kind == 'D') and version(r) >= tonumber(v)
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
local holder = plain(KEYS[3])
if holder and holder ~= ARGV[1] then return 0 end
local known = fields(KEYS[2], 'gen', 'pass')
if known[1] ~= ARGV[2] or (known[2] or '0') ~= ARGV[8] then return 0 end
redis.call('HSET', KEYS[2], 'cursor', ARGV[3], 'pass', ARGV[5])
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[7])
local left = math.min(tonumber(ARGV[4]) - now(), tonumber(ARGV[6]))
if left > 0 then
  redis.call('SET', KEYS[1], ARGV[2] .. server, 'PX', text(left))
  redis.call('HSET', KEYS[2], 'run', server, 'until', text(now() + left))
end
return 1
"""
)
"""Keys: guard, repair, lock. Arguments: process, generation, cursor, end of trust in ms, number of
the pass, longest trust in ms (the clock may have been set back since the pass began), life of the
lock in ms, number that was there when the pass began. Returns 0 when another process took over;
not when only the lock ran out, or one slow page would be repaired for ever.
"""

STALE: Final = (
    _LIBRARY
    + """
local known = fields(KEYS[2], 'gen', 'run', 'until')
local ended = tonumber(known[3])
if not ended or known[2] ~= server then return false end
local left = ended - now()
if left > longest then redis.call('HDEL', KEYS[2], 'until') end
if left > longest or left + tonumber(ARGV[1]) < 0 then return false end
local r, kind = fetch(KEYS[1])
if (kind == 'S' or kind == 'F') and generation(r) == known[1] then return r end
return false
"""
)
"""Keys: record, repair. Arguments: how long ago trust may have ended, in ms."""

PING: Final = (
    _LIBRARY
    + """
local at = moment()
local t = math.floor(at / 1000)
register(KEYS[1], t)
local lease = tonumber(ARGV[2])
if lease > 0 then redis.call('HSET', KEYS[1], ARGV[1], text(t + lease) .. '|' .. ARGV[3])
else redis.call('HDEL', KEYS[1], ARGV[1]) end
if redis.call('HLEN', KEYS[1]) > 64 then
  local all = redis.call('HGETALL', KEYS[1])
  for i = 1, #all, 2 do
    local till = tonumber(string.match(all[i + 1], '^(%d+)|'))
    if till and till + 60000 < t then redis.call('HDEL', KEYS[1], all[i]) end
  end
end
local echo = {'p', text(at), ARGV[4], '0', server, ARGV[1]}
redis.call(publish, ARGV[5], table.concat(echo, '|'))
local g = trust(KEYS[2])
if not g or string.sub(g, 17) ~= server then return 0 end
return redis.call('PTTL', KEYS[2])
"""
)
"""Keys: register, guard. Arguments: process, lease in ms, seen, number, channel."""

SCRIPTS: Final = {
    "READ": READ,
    "CLEAR": CLEAR,
    "TICKET": TICKET,
    "FILL": FILL,
    "PUT": PUT,
    "BURY": BURY,
    "HOLDERS": HOLDERS,
    "BEGIN": BEGIN,
    "RENEW": RENEW,
    "REPAIR": REPAIR,
    "STAMP": STAMP,
    "STALE": STALE,
    "PING": PING,
}
"""By name."""
