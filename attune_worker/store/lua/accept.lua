-- ACCEPT: write the record of a job and put it in line. Repeatable: the same job again changes nothing.
--
-- KEYS  1 record  2 queued index
-- ARGV  1 job id  2 job as JSON  3 digest of that JSON  4 priority  5 deadline in ms from now, 0: none
-- Returns {'accepted' | 'exists' | 'conflict', 1 when a wake-up is due, else 0}.
--       conflict: the id belongs to a different job. A wake-up is due while the job is queued, when the lease of
--       the worker that took it has run out, and when it waits although its time has come.
-- TTL   none until the job ends.
local digest, state, lease_ms, due_ms = unpack(read(KEYS[1], 'digest', 'state', 'lease_ms', 'due_ms'))
local now_ms = now_in_ms()
if digest then
  if digest ~= ARGV[3] then
    return { 'conflict', 0 }
  end
  local due = state == 'queued'
    or (state == 'running' and now_ms >= number(lease_ms, 0))
    or (state == 'waiting' and now_ms >= number(due_ms, 0))
  return { 'exists', due and 1 or 0 }
end
redis.call('HSET', KEYS[1],
  'state', 'queued', 'job', ARGV[2], 'digest', ARGV[3], 'priority', ARGV[4],
  'accepted_ms', now_ms, 'deadline_ms', tonumber(ARGV[5]) > 0 and now_ms + ARGV[5] or 0,
  'fence', 0, 'attempts', 0, 'owner', '', 'lease_ms', 0)
own(KEYS[2], 'zset')
redis.call('ZADD', KEYS[2], now_ms, ARGV[1])
return { 'accepted', 1 }
