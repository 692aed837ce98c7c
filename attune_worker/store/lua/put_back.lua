-- PUT_BACK: have a running job wait until it is due. Only the holder of the current fencing token may.
-- Repeatable: the same again is answered with 1 and changes nothing.
--
-- KEYS  1 record  2 running index  3 due index
-- ARGV  1 job id  2 fence  3 ms to wait  4 why it waits  5 attempts so far as JSON
-- Returns 1 when the job now waits, 0 when the token is stale, or the job has ended or is gone.
-- TTL   none: an accepted job must not vanish. It is due at its deadline at the latest.
local state, fence, deadline_ms = unpack(read(KEYS[1], 'state', 'fence', 'deadline_ms'))
if fence ~= ARGV[2] then
  return 0
end
if state ~= 'running' then
  return state == 'waiting' and 1 or 0
end
local due_ms = now_in_ms() + ARGV[3]
deadline_ms = number(deadline_ms, 0)
if deadline_ms > 0 then
  due_ms = math.min(due_ms, deadline_ms)
end
redis.call('HSET', KEYS[1],
  'state', 'waiting', 'owner', '', 'lease_ms', 0, 'due_ms', integer(due_ms), 'reason', ARGV[4], 'progress', ARGV[5])
own(KEYS[2], 'zset')
redis.call('ZREM', KEYS[2], ARGV[1])
own(KEYS[3], 'zset')
redis.call('ZADD', KEYS[3], integer(due_ms), ARGV[1])
return 1
