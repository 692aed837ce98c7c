-- JUDGE: which workers live, and which have died? A lease that has run out is removed, and never comes back.
-- Nobody is judged who had no chance to speak: while Redis was away, or the whole fleet stood still, leases ran out
-- of themselves. So somebody must have looked, or said that it lives, every so often for a quarter of a lease: those
-- that live and failed to say so have tried again by then.
--
-- KEYS  1 workers: lease -> its end, ms  2 sweep
-- ARGV  1 length of a lease in ms  2 ms of silence from which on nobody had a chance
-- Returns {now_ms, '1' when leases were judged else '0', {leases that have run out just now}, {leases that are left}}
-- TTL   sweep: a day
local LONGEST_LEASE_MS = 600000
local MOST_AT_ONCE = 100
local BEATS_PER_LEASE = 4
local now = now_in_ms()
local lease_ms = tonumber(ARGV[1])
local steady = vigil(KEYS[2], now, tonumber(ARGV[2]))

own(KEYS[1], 'zset')
-- After a failover this clock may be behind the one that a lease was written by.
local far = redis.call('ZRANGEBYSCORE', KEYS[1], integer(now + LONGEST_LEASE_MS + 1), '+inf', 'LIMIT', 0, MOST_AT_ONCE)
for _, lease in ipairs(far) do
  redis.call('ZADD', KEYS[1], integer(now + lease_ms), lease)
end
local judged = now - steady >= lease_ms / BEATS_PER_LEASE
local died = {}
if judged then
  died = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', integer(now), 'LIMIT', 0, MOST_AT_ONCE)
  if #died > 0 then
    redis.call('ZREM', KEYS[1], unpack(died))
  end
end
return { now, judged and '1' or '0', died, redis.call('ZRANGE', KEYS[1], 0, -1) }
