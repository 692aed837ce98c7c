-- CANCEL: end a job that has not started, or that waits to go on. One that runs is marked, and its worker told: from
-- then on it ends cancelled, whatever happens. Repeatable: its worker is told again.
--
-- KEYS  1 record  2 queued index  3 running index  4 due index  5 dead index  6 ended index  7 waiters
-- ARGV  1 job id  2 retention in seconds
-- Returns 'cancelled' when it has ended so, or will; else the state it is in, 'unknown' when there is no record.
local state, channel = unpack(read(RECORD, 'state', 'channel'))
if state == 'queued' or state == 'waiting' then
  end_job(ARGV[1], state, 'cancelled', now_in_ms(), ARGV[2])
  if state == 'waiting' then
    announce(ARGV[1])
  end
elseif state == 'running' then
  redis.call('HSETNX', RECORD, 'cancelled_ms', integer(now_in_ms()))
else
  return state or 'unknown'
end
if channel and channel ~= '' then -- also when it was taken over: the worker may be slow, and still at it
  redis.call('PUBLISH', channel, ARGV[1])
end
return 'cancelled'
