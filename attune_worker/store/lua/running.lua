-- RUNNING: read a part of the running jobs of one shard.
--
-- KEYS  1 running index
-- ARGV  1 cursor, 0 at first  2 about how many
-- Returns {the next cursor, 0 at the end; {job id, lease, job id, ...}}
own(KEYS[1], 'hash')
return redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
