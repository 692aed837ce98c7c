-- WAKE: look at a job that DUE has taken: does it still wait, and how urgent is it? One that is past its deadline ends.
-- The longer it has been overdue, the later it is due again: a busy fleet is not flooded with wake-ups.
--
-- KEYS  1 record  2 queued index  3 running index  4 due index  5 dead index  6 ended index  7 waiters
-- ARGV  1 job id  2 ms after which it is due again at the earliest  3 and at the latest  4 retention in seconds
-- Returns the job's priority, 0 (the most urgent) for one that lost its worker, or -1 when it needs no wake-up. One that
-- has ended gets its last.
local state, due_ms, deadline_ms, priority, ahead =
  unpack(read(RECORD, 'state', 'due_ms', 'deadline_ms', 'priority', 'ahead'))
local now_ms = now_in_ms()
deadline_ms = number(deadline_ms, 0)
local urgency = ahead and 0 or math.min(math.max(math.floor(number(priority, 5)), 0), 9)
local queued = state == 'queued' and deadline_ms > 0
if not queued and state ~= 'waiting' then
  own(DUE, 'zset')
  redis.call('ZREM', DUE, ARGV[1])
  return (state and state ~= 'queued' and state ~= 'running') and urgency or -1
end
if deadline_ms > 0 and now_ms >= deadline_ms then
  end_job(ARGV[1], state, 'expired', now_ms, ARGV[4])
  return urgency
end
own(DUE, 'zset')
if queued then
  redis.call('ZADD', DUE, 'XX', integer(-deadline_ms), ARGV[1])
  return -1
end
local again_ms = math.max(tonumber(ARGV[2]), math.min(now_ms - number(due_ms, now_ms), tonumber(ARGV[3])))
redis.call('ZADD', DUE, 'XX', integer(now_ms + again_ms), ARGV[1])
return urgency
