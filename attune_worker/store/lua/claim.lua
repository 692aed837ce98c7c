-- CLAIM: take a job for one worker: one that is queued, or whose worker let its lease run out.
-- A job that has ended, or runs elsewhere under a live lease, is left alone.
-- Repeatable by the same owner, so that an answer lost on the network does not lose the job.
--
-- KEYS  1 record  2 queued index  3 running index  4 waiters
-- ARGV  1 job id  2 owner (unique to this delivery)  3 lease in ms  4 retention in seconds
-- Returns {'claimed', fence, job JSON, accepted_ms, now_ms, deadline_ms (0: none)}
--      or {state} with the state that forbids it; 'unknown' when there is no record.
local state, owner, lease_ms, deadline_ms, accepted_ms, job =
  unpack(redis.call('HMGET', KEYS[1], 'state', 'owner', 'lease_ms', 'deadline_ms', 'accepted_ms', 'job'))
if not state then
  return { 'unknown' }
end
local now_ms = now_in_ms()
local again = state == 'running' and owner == ARGV[2]
local abandoned = state == 'running' and now_ms >= tonumber(lease_ms)
if state ~= 'queued' and not again and not abandoned then
  return { state }
end
deadline_ms = tonumber(deadline_ms)
if not again and deadline_ms > 0 and now_ms >= deadline_ms then
  end_job(KEYS[1], abandoned and KEYS[3] or KEYS[2], KEYS[4], ARGV[1], 'expired', now_ms, ARGV[4])
  return { 'expired' }
end
local fence = redis.call('HGET', KEYS[1], 'fence')
if not again then
  fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
  redis.call('HINCRBY', KEYS[1], 'attempts', 1)
  redis.call('HSET', KEYS[1], 'state', 'running', 'owner', ARGV[2], 'started_ms', now_ms)
  redis.call('ZREM', KEYS[2], ARGV[1])
end
redis.call('HSET', KEYS[1], 'lease_ms', now_ms + ARGV[3])
redis.call('ZADD', KEYS[3], now_ms + ARGV[3], ARGV[1])
return { 'claimed', tonumber(fence), job, tonumber(accepted_ms), now_ms, deadline_ms }
