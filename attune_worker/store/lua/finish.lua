-- FINISH: write how a running job ended. Only the holder of the current fencing token may.
-- Repeatable: the same end again is answered with 1 and changes nothing.
--
-- KEYS  1 record  2 running index  3 waiters
-- ARGV  1 job id  2 fence  3 state  4 result as JSON  5 retention in seconds
-- Returns 1 when the job now stands as given, 0 when the token is stale or the job is gone.
-- TTL   the record lives for the retention time from now. A prompt that was answered is dropped, and so are the
--       attempts of earlier starts: the result has them.
local state, fence = unpack(read(KEYS[1], 'state', 'fence'))
if fence ~= ARGV[2] then
  return 0
end
if state ~= 'running' then
  return state == ARGV[3] and 1 or 0
end
redis.call('HSET', KEYS[1], 'result', ARGV[4])
redis.call('HDEL', KEYS[1], 'progress')
if ARGV[3] == 'succeeded' then
  redis.call('HDEL', KEYS[1], 'job')
end
end_job(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[3], now_in_ms(), ARGV[5])
return 1
