-- HASTEN: have waiting jobs of one shard be due now, because what they wait for may be over.
-- Repeatable: what is due already is left as it is. Their records keep the old time, which CLAIM does not look at.
--
-- KEYS  1 due index
-- ARGV  1 most jobs to take
-- Returns how many that were.
-- TTL   none; a job leaves the index when it is claimed or ends.
own(KEYS[1], 'zset')
local now_ms = integer(now_in_ms())
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now_ms, '+inf', 'LIMIT', 0, ARGV[1])
for _, job_id in ipairs(found) do
  redis.call('ZADD', KEYS[1], now_ms, job_id)
end
return #found
