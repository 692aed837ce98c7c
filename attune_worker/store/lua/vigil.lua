-- Fragment: since when could every worker have said that it lives? Used by beat and judge, after values.
--
-- vigil(sweep, now, unwatched_ms)   notes that Redis is there and somebody runs; returns the time (ms) since when that
--                                   was noted without a gap longer than unwatched_ms
--   sweep  HASH  last_ms, steady_ms
-- TTL   a day
local function vigil(sweep, now, unwatched_ms)
  local last, steady = unpack(read(sweep, 'last_ms', 'steady_ms'))
  last, steady = number(last, -1), number(steady, now)
  if last < 0 or now < last or now - last > unwatched_ms then
    steady = now
  end
  redis.call('HSET', sweep, 'last_ms', integer(now), 'steady_ms', integer(steady))
  redis.call('EXPIRE', sweep, 86400)
  return steady
end
