-- BEAT: a worker says that it lives. Repeatable: the same again only makes its lease longer.
--
-- KEYS  1 workers: lease -> its end, ms  2 sweep
-- ARGV  1 lease  2 for how long, ms; 0: it ends  3 '1': it was there before  4 as JUDGE's second
-- Returns 1, or 0 when it was there before and is gone: others hold the worker for dead. It must take a new lease then.
-- TTL   none; JUDGE removes the leases that have run out.
own(KEYS[1], 'zset')
if ARGV[2] == '0' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  return 1
end
local now = now_in_ms()
vigil(KEYS[2], now, tonumber(ARGV[4]))
if ARGV[3] == '1' and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
  return 0
end
redis.call('ZADD', KEYS[1], integer(now + ARGV[2]), ARGV[1])
return 1
