-- Fragment: how every job ends, whatever ended it. Used by claim, finish and cancel, after values.
--
-- end_job(record, index, waiters, job_id, state, now_ms, retention_seconds)
--   record   HASH  state and ended_ms are set, and it lives for the retention time from now
--   index    ZSET  the index the job stood in (queued, running or due); it leaves it
--   waiters  SET   channels of the clients that wait; each is told the job's id, then the set goes
local function end_job(record, index, waiters, job_id, state, now_ms, retention_seconds)
  redis.call('HSET', record, 'state', state, 'ended_ms', now_ms)
  redis.call('EXPIRE', record, retention_seconds)
  own(index, 'zset')
  redis.call('ZREM', index, job_id)
  own(waiters, 'set')
  for _, channel in ipairs(redis.call('SMEMBERS', waiters)) do
    redis.call('PUBLISH', channel, job_id)
  end
  redis.call('DEL', waiters)
end
