-- CANCEL: end a job that has not started. One that runs goes on.
--
-- KEYS  1 record  2 queued index  3 waiters
-- ARGV  1 job id  2 retention in seconds
-- Returns the state after it; 'unknown' when there is no record.
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'queued' then
  end_job(KEYS[1], KEYS[2], KEYS[3], ARGV[1], 'cancelled', now_in_ms(), ARGV[2])
  return 'cancelled'
end
return state or 'unknown'
