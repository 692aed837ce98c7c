-- PUT_BACK: have a running job wait until it is due. Only the holder of the current fencing token may. A job that was
-- cancelled while it ran ends instead.
-- Repeatable: the same again is answered in the same way and changes nothing.
--
-- KEYS  1 record  2 queued index  3 running index  4 due index  5 dead index  6 ended index  7 waiters
-- ARGV  1 job id  2 fence  3 ms to wait  4 why it waits  5 attempts so far as JSON  6 retention in seconds
-- Returns 1 when the job now waits, 0 when the token is stale, or the job has ended or is gone.
-- TTL   none: an accepted job must not vanish. It is due at its deadline at the latest.
local state, fence, deadline_ms, cancelled_ms = unpack(read(RECORD, 'state', 'fence', 'deadline_ms', 'cancelled_ms'))
if fence ~= ARGV[2] then
  return 0
end
if state ~= 'running' then
  return state == 'waiting' and 1 or 0
end
local now_ms = now_in_ms()
redis.call('HSET', RECORD, 'progress', ARGV[5])
if cancelled_ms then
  end_job(ARGV[1], state, 'cancelled', now_ms, ARGV[6])
  announce(ARGV[1]) -- it may have been put back by other hands than its task's
  return 0
end
local due_ms = now_ms + ARGV[3]
deadline_ms = number(deadline_ms, 0)
if deadline_ms > 0 then
  due_ms = math.min(due_ms, deadline_ms)
end
redis.call('HSET', RECORD, 'state', 'waiting', 'due_ms', integer(due_ms), 'reason', ARGV[4])
if tonumber(ARGV[3]) == 0 then -- its worker ends: what has begun goes before what has not
  redis.call('HSET', RECORD, 'ahead', 1)
end
redis.call('HDEL', RECORD, 'channel')
leave(ARGV[1], state)
wait_until(ARGV[1], due_ms)
return 1
