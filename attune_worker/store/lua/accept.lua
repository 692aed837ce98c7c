-- ACCEPT: write the record of a job and put it in line. Repeatable: the same job again changes nothing but the time
-- of its last wake-up.
--
-- KEYS  1 record  2 queued index  3 running index  4 due index  5 dead index  6 ended index  7 waiters
-- ARGV  1 job id  2 job as JSON  3 digest of that JSON  4 priority  5 deadline in ms from now, 0: none
-- Returns {'accepted' | 'exists' | 'conflict', 1 when a wake-up is due, else 0}.
--       conflict: the id belongs to a different job. A wake-up is due while the job is queued, and when it waits
--       although its time has come.
-- TTL   none until the job ends. Fencing tokens count from the time of acceptance: one of an earlier job with this id,
--       whose record has expired since, is none of this one's.
local digest, state, due_ms, deadline_ms = unpack(read(RECORD, 'digest', 'state', 'due_ms', 'deadline_ms'))
local now_ms = now_in_ms()
if digest then
  if digest ~= ARGV[3] then
    return { 'conflict', 0 }
  end
  if state == 'queued' then
    line_up(ARGV[1], now_ms, number(deadline_ms, 0))
    return { 'exists', 1 }
  end
  return { 'exists', state == 'waiting' and now_ms >= number(due_ms, 0) and 1 or 0 }
end
deadline_ms = tonumber(ARGV[5]) > 0 and now_ms + ARGV[5] or 0
redis.call('HSET', RECORD,
  'state', 'queued', 'job', ARGV[2], 'digest', ARGV[3], 'priority', ARGV[4],
  'accepted_ms', integer(now_ms), 'deadline_ms', integer(deadline_ms), 'fence', integer(now_ms), 'attempts', 0)
line_up(ARGV[1], now_ms, deadline_ms)
return { 'accepted', 1 }
