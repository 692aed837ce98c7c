-- CLAIM: take a job for one worker: one that is queued, that waits (be its time come or not), or whose worker let
-- its lease run out. A job that has ended, or runs elsewhere under a live lease, is left alone.
-- Repeatable by the same owner, so that an answer lost on the network does not lose the job.
--
-- KEYS  1 record  2 queued index  3 running index  4 waiters  5 due index
-- ARGV  1 job id  2 owner (unique to this delivery)  3 lease in ms  4 retention in seconds
-- Returns {'claimed', fence, job JSON, accepted_ms, now_ms, deadline_ms (0: none), started_ms (of the first start),
--       attempts so far as JSON (false: none)}
--      or {state} with the state that forbids it; 'unknown' when there is no record.
local state, owner, lease_ms, deadline_ms, accepted_ms, started_ms, job, progress = unpack(read(KEYS[1],
  'state', 'owner', 'lease_ms', 'deadline_ms', 'accepted_ms', 'started_ms', 'job', 'progress'))
local now_ms = now_in_ms()
local again = state == 'running' and owner == ARGV[2]
local abandoned = state == 'running' and now_ms >= number(lease_ms, 0)
if state ~= 'queued' and state ~= 'waiting' and not again and not abandoned then
  return { state or 'unknown' }
end
local index = ({ queued = KEYS[2], running = KEYS[3], waiting = KEYS[5] })[state]
deadline_ms = number(deadline_ms, 0)
if not again and deadline_ms > 0 and now_ms >= deadline_ms then
  end_job(KEYS[1], index, KEYS[4], ARGV[1], 'expired', now_ms, ARGV[4])
  return { 'expired' }
end
if not again then
  redis.call('HINCRBY', KEYS[1], 'fence', 1)
  redis.call('HINCRBY', KEYS[1], 'attempts', 1)
  redis.call('HSETNX', KEYS[1], 'started_ms', now_ms)
  redis.call('HSET', KEYS[1], 'state', 'running', 'owner', ARGV[2])
  redis.call('HDEL', KEYS[1], 'due_ms', 'reason')
  own(index, 'zset')
  redis.call('ZREM', index, ARGV[1])
end
redis.call('HSET', KEYS[1], 'lease_ms', now_ms + ARGV[3])
own(KEYS[3], 'zset')
redis.call('ZADD', KEYS[3], now_ms + ARGV[3], ARGV[1])
return {
  'claimed', tonumber(redis.call('HGET', KEYS[1], 'fence')), job,
  number(accepted_ms, now_ms), now_ms, deadline_ms, number(started_ms, now_ms), progress,
}
