-- CANCEL: end a job that has not started, or that waits to go on. One that runs goes on.
--
-- KEYS  1 record  2 queued index  3 waiters  4 due index
-- ARGV  1 job id  2 retention in seconds
-- Returns the state after it; 'unknown' when there is no record.
local state = read(KEYS[1], 'state')[1]
local index = ({ queued = KEYS[2], waiting = KEYS[4] })[state]
if index then
  end_job(KEYS[1], index, KEYS[3], ARGV[1], 'cancelled', now_in_ms(), ARGV[2])
  return 'cancelled'
end
return state or 'unknown'
