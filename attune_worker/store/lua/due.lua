-- DUE: take the jobs of one shard whose time has come. Each is due again after a while, should its wake-up be lost.
--
-- KEYS  1 due index
-- ARGV  1 most jobs to take  2 ms after which they are due again
-- Returns {how many jobs wait here, job id, job id, ...}
-- TTL   none; a job leaves the index when it is claimed or ends.
own(KEYS[1], 'zset')
local waiting = redis.call('ZCARD', KEYS[1])
if waiting == 0 then
  return { 0 }
end
local now_ms = now_in_ms()
local taken = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', integer(now_ms), 'LIMIT', 0, ARGV[1])
for _, job_id in ipairs(taken) do
  redis.call('ZADD', KEYS[1], integer(now_ms + ARGV[2]), job_id)
end
return { waiting, unpack(taken) }
