-- RESEND: note that the wake-up of a queued job is sent again now.
--
-- KEYS  1 record  2 queued index
-- ARGV  1 job id
-- Returns the job's priority, or -1 when it is not queued; then it leaves the index.
local state, priority = unpack(read(KEYS[1], 'state', 'priority'))
own(KEYS[2], 'zset')
if state ~= 'queued' then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return -1
end
redis.call('ZADD', KEYS[2], integer(now_in_ms()), ARGV[1])
return math.min(math.max(math.floor(number(priority, 5)), 0), 9)
