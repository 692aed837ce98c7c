-- WATCH: read where a job is and, unless it has ended, leave word where to say so when it does.
--
-- KEYS  1 record  2 waiters
-- ARGV  1 channel of the waiting client  2 seconds to remember it  3... fields to read; the first is the state
-- Returns the fields' values, false for what is not there.
-- TTL   waiters: as given, from the latest client that began to wait.
local record = redis.call('HMGET', KEYS[1], unpack(ARGV, 3))
if record[1] == 'queued' or record[1] == 'running' or record[1] == 'waiting' then
  redis.call('SADD', KEYS[2], ARGV[1])
  redis.call('EXPIRE', KEYS[2], ARGV[2])
end
return record
