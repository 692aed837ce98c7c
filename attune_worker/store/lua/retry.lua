-- RETRY: put a job that ended without an answer back in line, as if it had been submitted now. Its fencing token goes
-- on from where it was, so that nobody who ran it before can end it.
-- Repeatable with the same token, so that an answer lost on the network does not look like a refusal.
--
-- KEYS  1 record  2 queued index  3 running index  4 due index  5 dead index  6 ended index  7 waiters
-- ARGV  1 job id  2 token (unique to this request)
-- Returns the state before it; false when the job is under way, has succeeded or is unknown, or its prompt is gone.
-- TTL   none until the job ends again. Its deadline is as long as it was, from now.
local state, job, accepted_ms, deadline_ms, retried, retried_from =
  unpack(read(RECORD, 'state', 'job', 'accepted_ms', 'deadline_ms', 'retried', 'retried_from'))
if retried == ARGV[2] then
  return retried_from
end
if not job or not ({ dead = true, failed = true, expired = true, cancelled = true })[state] then
  return false
end
local now_ms = now_in_ms()
deadline_ms = number(deadline_ms, 0)
if deadline_ms > 0 then
  deadline_ms = now_ms + math.max(deadline_ms - number(accepted_ms, deadline_ms), 0)
end
redis.call('HDEL', RECORD, 'result', 'progress', 'reason', 'due_ms', 'started_ms', 'ended_ms', 'cancelled_ms',
  'crashes', 'lost', 'ahead', 'owner', 'worker', 'channel')
redis.call('HSET', RECORD, 'state', 'queued', 'attempts', 0, 'accepted_ms', integer(now_ms),
  'deadline_ms', integer(deadline_ms), 'retried', ARGV[2], 'retried_from', state)
redis.call('PERSIST', RECORD)
own(ENDED, 'zset')
redis.call('ZREM', ENDED, ARGV[1])
own(DEAD, 'zset')
redis.call('ZREM', DEAD, ARGV[1])
leave(ARGV[1], state)
line_up(ARGV[1], now_ms, deadline_ms)
return state
