-- QUEUED: read which queued jobs of one shard have not been woken for a while, the longest first.
--
-- KEYS  1 queued index
-- ARGV  1 ms since the last wake-up  2 most jobs
-- Returns {job id, when its last wake-up was sent in ms, job id, ...}
own(KEYS[1], 'zset')
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', integer(now_in_ms() - ARGV[1]), 'WITHSCORES', 'LIMIT', 0, ARGV[2])
