-- WAKE: look at a job that DUE has taken: does it still wait, and how urgent is it?
-- The longer it has been overdue, the later it is due again: a busy fleet is not flooded with wake-ups.
--
-- KEYS  1 record  2 due index
-- ARGV  1 job id  2 ms after which it is due again at the earliest  3 and at the latest
-- Returns the job's priority, or -1 when it does not wait; then it leaves the index.
local state, due_ms, priority = unpack(read(KEYS[1], 'state', 'due_ms', 'priority'))
own(KEYS[2], 'zset')
if state ~= 'waiting' then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return -1
end
local now_ms = now_in_ms()
local again_ms = math.max(tonumber(ARGV[2]), math.min(now_ms - number(due_ms, now_ms), tonumber(ARGV[3])))
redis.call('ZADD', KEYS[2], 'XX', integer(now_ms + again_ms), ARGV[1])
return math.min(math.max(math.floor(number(priority, 5)), 0), 9)
