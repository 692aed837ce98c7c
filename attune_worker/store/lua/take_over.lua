-- TAKE_OVER: take a running job away from a worker that is dead. It waits, and is due at once; a job that too many
-- workers died with is dead itself, and one that was cancelled while it ran ends so.
-- Repeatable: a job that this worker does not run (any more) is left as it is.
--
-- KEYS  1 record  2 queued index  3 running index  4 due index  5 dead index  6 ended index  7 waiters
-- ARGV  1 job id  2 lease of the dead worker  3 attempts so far as JSON  4 one line on how the worker was lost
--       5 number of workers it may cost  6 why it waits now  7 retention in seconds
-- Returns the state after it; false when there was nothing to do.
-- TTL   none while it waits.
local state, worker, crashes, lost, cancelled_ms =
  unpack(read(RECORD, 'state', 'worker', 'crashes', 'lost', 'cancelled_ms'))
if state ~= 'running' or (worker or '') ~= ARGV[2] then
  own(RUNNING, 'hash')
  if redis.call('HGET', RUNNING, ARGV[1]) == ARGV[2] then -- the index was wrong: let it say what the record says
    leave(ARGV[1], 'running')
    if state == 'running' then
      redis.call('HSET', RUNNING, ARGV[1], worker or '')
    end
  end
  return false
end
local now_ms = now_in_ms()
crashes = number(crashes, 0) + 1
redis.call('HSET', RECORD, 'crashes', integer(crashes), 'progress', ARGV[3],
  'lost', lost and lost .. '\n' .. ARGV[4] or ARGV[4])
local ending = cancelled_ms and 'cancelled' or (crashes >= tonumber(ARGV[5]) and 'dead')
if ending then
  end_job(ARGV[1], state, ending, now_ms, ARGV[7])
  announce(ARGV[1])
  return ending
end
redis.call('HSET', RECORD, 'state', 'waiting', 'due_ms', integer(now_ms), 'reason', ARGV[6], 'ahead', 1)
leave(ARGV[1], state)
wait_until(ARGV[1], now_ms)
return 'waiting'
