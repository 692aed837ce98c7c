-- COUNTS: how many jobs of one shard are in each state that is not an ordinary end.
--
-- KEYS  1 queued index  2 running index  3 due index  4 dead index
-- ARGV  1 retention in seconds
-- Returns {queued, running, waiting, dead}
for index, type in ipairs({ 'zset', 'hash', 'zset', 'zset' }) do
  own(KEYS[index], type)
end
return {
  redis.call('ZCARD', KEYS[1]),
  redis.call('HLEN', KEYS[2]),
  redis.call('ZCOUNT', KEYS[3], '0', '+inf'), -- below zero are deadlines of queued jobs
  redis.call('ZCOUNT', KEYS[4], integer(now_in_ms() - ARGV[1] * 1000), '+inf'),
}
