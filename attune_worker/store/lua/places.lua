-- Fragment: the indexes that a job stands in, by its state. After values, in scripts whose KEYS are those of a job:
--       1 record  2 queued index  3 running index  4 due index  5 dead index  6 ended index  7 waiters
--
-- line_up(job_id, now_ms, deadline_ms)   a queued job: its wake-up is sent now; due at its deadline (0: none)
-- wait_until(job_id, due_ms)             a waiting job
-- announce(job_id)                       a job that has ended while no worker had it: it gets a last wake-up, so that
--                                        whoever asks Celery for its result hears of the end
-- leave(job_id, state)                   takes it out of where it stood in that state
-- Deadlines of queued jobs stand in the due index below zero, so that both kinds can be counted and read apart.
local RECORD, QUEUED, RUNNING, DUE, DEAD, ENDED, WAITERS = unpack(KEYS)

local function line_up(job_id, now_ms, deadline_ms)
  own(QUEUED, 'zset')
  redis.call('ZADD', QUEUED, integer(now_ms), job_id)
  if deadline_ms > 0 then
    own(DUE, 'zset')
    redis.call('ZADD', DUE, integer(-deadline_ms), job_id)
  end
end

local function wait_until(job_id, due_ms)
  own(DUE, 'zset')
  redis.call('ZADD', DUE, integer(due_ms), job_id)
end

local function announce(job_id)
  wait_until(job_id, -1) -- among the deadlines that have passed
end

local function leave(job_id, state)
  if state == 'running' then
    own(RUNNING, 'hash')
    redis.call('HDEL', RUNNING, job_id)
    return
  end
  if state == 'queued' then
    own(QUEUED, 'zset')
    redis.call('ZREM', QUEUED, job_id)
  end
  own(DUE, 'zset')
  redis.call('ZREM', DUE, job_id)
end
