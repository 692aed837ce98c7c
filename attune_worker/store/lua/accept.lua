-- ACCEPT: write the record of a job and put it in line. Repeatable: the same job again changes nothing.
--
-- KEYS  1 record  2 queued index
-- ARGV  1 job id  2 job as JSON  3 digest of that JSON  4 priority  5 deadline in ms from now, 0: none
-- Returns {'accepted' | 'exists' | 'conflict', state}; conflict: the id belongs to a different job.
-- TTL   none until the job ends.
local digest, state = unpack(redis.call('HMGET', KEYS[1], 'digest', 'state'))
if digest then
  return { digest == ARGV[3] and 'exists' or 'conflict', state }
end
local now_ms = now_in_ms()
redis.call('HSET', KEYS[1],
  'state', 'queued', 'job', ARGV[2], 'digest', ARGV[3], 'priority', ARGV[4],
  'accepted_ms', now_ms, 'deadline_ms', tonumber(ARGV[5]) > 0 and now_ms + ARGV[5] or 0,
  'fence', 0, 'attempts', 0, 'owner', '', 'lease_ms', 0)
redis.call('ZADD', KEYS[2], now_ms, ARGV[1])
return { 'accepted', 'queued' }
