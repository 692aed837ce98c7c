-- LEAD: let one worker at a time do a thing, for as long as it says so again before its lease runs out.
--
-- KEYS  1 lease
-- ARGV  1 worker  2 lease in ms, 0: give it up
-- Returns 1 when this worker leads now, else 0.
-- TTL   the lease. A value without one is nobody's.
own(KEYS[1], 'string')
local leader = redis.call('GET', KEYS[1])
if leader and leader ~= ARGV[1] and redis.call('PTTL', KEYS[1]) > 0 then
  return 0
end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
