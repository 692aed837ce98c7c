-- CLAIM: take a job for one worker: one that is queued, or that waits (be its time come or not). A job that has ended,
-- or runs, is left alone: only TAKE_OVER takes a job away from a worker.
-- Repeatable by the same owner while the job runs, so that an answer lost on the network does not lose the job. Once
-- that run is over the same owner is refused: it is a question that was held up on its way, and nobody waits for the
-- answer any more. So the owner stays on record when the job is put back or taken over.
--
-- KEYS  1 record  2 queued index  3 running index  4 due index  5 dead index  6 ended index  7 waiters
-- ARGV  1 job id  2 owner (unique to this delivery)  3 lease of the worker  4 channel on which it hears that the job
--       was cancelled  5 retention in seconds
-- Returns {'claimed', fence, job JSON, accepted_ms, now_ms, deadline_ms (0: none), started_ms (of the first start),
--       attempts so far as JSON (false: none), crashes, starts}
--      or {state} with the state that forbids it; 'unknown' when there is no record.
local state, owner, fence, attempts, deadline_ms, accepted_ms, started_ms, job, progress, crashes = unpack(read(RECORD,
  'state', 'owner', 'fence', 'attempts', 'deadline_ms', 'accepted_ms', 'started_ms', 'job', 'progress', 'crashes'))
local now_ms = now_in_ms()
local same = owner == ARGV[2]
local again = same and state == 'running'
if not again and (same or (state ~= 'queued' and state ~= 'waiting')) then
  return { state or 'unknown' }
end
deadline_ms = number(deadline_ms, 0)
fence = number(fence, -1)
if fence < 0 or fence >= 2 ^ 53 or fence % 1 ~= 0 then -- cannot be ours: none can be counted on from it
  fence = now_ms -- is followed by one that was never given out
end
if not again then
  if deadline_ms > 0 and now_ms >= deadline_ms then
    end_job(ARGV[1], state, 'expired', now_ms, ARGV[5])
    return { 'expired' }
  end
  fence = fence + 1
  started_ms = number(started_ms, now_ms)
  attempts = number(attempts, 0) + 1
  redis.call('HSET', RECORD, 'state', 'running', 'owner', ARGV[2], 'attempts', integer(attempts),
    'started_ms', integer(started_ms))
  redis.call('HDEL', RECORD, 'due_ms', 'reason', 'ahead')
  leave(ARGV[1], state)
end
redis.call('HSET', RECORD, 'fence', integer(fence), 'worker', ARGV[3], 'channel', ARGV[4])
own(RUNNING, 'hash')
redis.call('HSET', RUNNING, ARGV[1], ARGV[3])
return {
  'claimed', fence, job, number(accepted_ms, now_ms), now_ms, deadline_ms, number(started_ms, now_ms), progress,
  number(crashes, 0), number(attempts, 1),
}
