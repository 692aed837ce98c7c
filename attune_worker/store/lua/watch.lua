-- WATCH: read where a job is and, unless it has ended, leave word where to say so when it does.
--
-- KEYS  1 record  2 waiters
-- ARGV  1 channel of the waiting client  2 seconds to remember it
-- Returns {state, result JSON, accepted_ms, started_ms, ended_ms, attempts (how often it was started), reason (why it
--       waits), attempts so far as JSON, due_ms}, false for what is not there.
-- TTL   waiters: as given, from the latest client that began to wait.
local record = redis.call('HMGET', KEYS[1],
  'state', 'result', 'accepted_ms', 'started_ms', 'ended_ms', 'attempts', 'reason', 'progress', 'due_ms')
if record[1] == 'queued' or record[1] == 'running' or record[1] == 'waiting' then
  redis.call('SADD', KEYS[2], ARGV[1])
  redis.call('EXPIRE', KEYS[2], ARGV[2])
end
return record
