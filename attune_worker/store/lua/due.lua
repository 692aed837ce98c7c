-- DUE: take the jobs of one shard whose time has come: those that wait, and those that are queued past their deadline.
-- Each is due again after a while, should its wake-up be lost.
--
-- KEYS  1 due index
-- ARGV  1 most jobs to take of each kind  2 ms after which they are due again
-- Returns {how many jobs wait here, job id, job id, ...}
-- TTL   none; a job leaves the index when it is claimed or ends.
own(KEYS[1], 'zset')
if redis.call('ZCARD', KEYS[1]) == 0 then
  return { 0 }
end
local now_ms = now_in_ms()
local found = { redis.call('ZCOUNT', KEYS[1], '0', '+inf') } -- below zero are the deadlines of queued jobs
local function take(first, last, again)
  for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], first, last, 'LIMIT', 0, ARGV[1])) do
    redis.call('ZADD', KEYS[1], integer(again), job_id)
    found[#found + 1] = job_id
  end
end
take('0', integer(now_ms), now_ms + ARGV[2])
take(integer(-now_ms), '(0', -(now_ms + ARGV[2]))
return found
