-- Fragment: how every job ends, whatever ended it. After values and places.
--
-- end_job(job_id, before, state, now_ms, retention_seconds)
--   before   the state that it was in: it leaves the indexes of that
--   record   state and ended_ms are set, and it lives for the retention time from now
--   ended    it is the latest of the 1,000 that are kept there; a dead one also stands in dead for as long as its record
--   waiters  channels of the clients that wait; each is told the job's id, then the set goes
local function end_job(job_id, before, state, now_ms, retention_seconds)
  redis.call('HSET', RECORD, 'state', state, 'ended_ms', integer(now_ms))
  redis.call('EXPIRE', RECORD, retention_seconds)
  leave(job_id, before)
  own(ENDED, 'zset')
  redis.call('ZADD', ENDED, integer(now_ms), job_id)
  redis.call('ZREMRANGEBYRANK', ENDED, 0, -1001)
  if state == 'dead' then
    own(DEAD, 'zset')
    redis.call('ZADD', DEAD, integer(now_ms), job_id)
    redis.call('ZREMRANGEBYSCORE', DEAD, '-inf', integer(now_ms - retention_seconds * 1000))
  end
  own(WAITERS, 'set')
  for _, channel in ipairs(redis.call('SMEMBERS', WAITERS)) do
    redis.call('PUBLISH', channel, job_id)
  end
  redis.call('DEL', WAITERS)
end
