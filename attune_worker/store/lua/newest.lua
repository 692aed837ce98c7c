-- NEWEST: read the latest entries of an index that is sorted by time.
--
-- KEYS  1 index
-- ARGV  1 lowest score  2 most entries
-- Returns {job id, score, job id, ...}
own(KEYS[1], 'zset')
return redis.call('ZREVRANGEBYSCORE', KEYS[1], '+inf', ARGV[1], 'WITHSCORES', 'LIMIT', 0, ARGV[2])
