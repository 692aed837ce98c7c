-- FINISH: write how a job ended. Only the holder of the current fencing token may, while the job runs, or waits because
-- it was taken over and nobody has started it since: an answer that was paid for is not thrown away.
-- Repeatable: the same end again is answered with 'written' and changes nothing.
--
-- KEYS  1 record  2 queued index  3 running index  4 due index  5 dead index  6 ended index  7 waiters
-- ARGV  1 job id  2 fence  3 state  4 result as JSON  5 retention in seconds
-- Returns 'written' when the job now stands as given, 'stale' when the token is, or the job has ended or is gone,
--       'cancelled' when it was cancelled while it ran: no other end is taken from then on, and nothing was written.
-- TTL   the record lives for the retention time from now. A prompt that was answered is dropped, and so are the
--       attempts of earlier starts: the result has them.
local state, fence, cancelled_ms = unpack(read(RECORD, 'state', 'fence', 'cancelled_ms'))
if fence ~= ARGV[2] then
  return 'stale'
end
if state ~= 'running' and state ~= 'waiting' then
  return state == ARGV[3] and redis.call('HGET', RECORD, 'result') == ARGV[4] and 'written' or 'stale'
end
if cancelled_ms and ARGV[3] ~= 'cancelled' then
  return 'cancelled'
end
redis.call('HSET', RECORD, 'result', ARGV[4])
redis.call('HDEL', RECORD, 'progress')
if ARGV[3] == 'succeeded' then
  redis.call('HDEL', RECORD, 'job')
end
end_job(ARGV[1], state, ARGV[3], now_in_ms(), ARGV[5])
return 'written'
