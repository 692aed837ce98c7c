-- BREAKER_SET: what an operator does to a circuit: reset it, open it for a time, or override it.
-- Repeatable: it leaves the circuit as it says.
--
-- KEYS  1 circuit  2 index of circuits
-- ARGV  1 reset, open or override  2 the circuit's name as JSON  3 rules as JSON, in ms  4 who  5 why
--       6 ms that it holds (0: no end)  7 of an override: open, disabled, metrics_only, or '' to lift it
-- Returns the circuit's state: closed, open or half_open
-- TTL   see breaker.lua
local now = now_in_ms()
local circuit, for_ms = breaker_read(KEYS[1], now, cjson.decode(ARGV[3])), tonumber(ARGV[6])
if ARGV[1] == 'override' then
  local fields = {}
  if ARGV[7] ~= '' then
    fields = {
      override = ARGV[7],
      override_ms = integer(now),
      override_by = ARGV[4],
      override_reason = ARGV[5],
      override_until_ms = for_ms > 0 and integer(now + for_ms) or nil,
    }
  end
  breaker_override(circuit, now, fields)
elseif ARGV[1] == 'open' then
  local ends = math.max(now + for_ms, circuit.state == 'open' and circuit.retry_ms or 0)
  circuit.state = 'open'
  breaker_become(circuit, now, 'open', {
    failed_at = false,
    opened_ms = integer(now),
    opened_by = ARGV[4],
    retry_ms = integer(ends),
    reopens = '0',
    reason = ARGV[5],
    error = false,
  })
else
  local changes = { reset_ms = integer(now), reset_by = ARGV[4], reset_reason = ARGV[5] }
  for _, name in ipairs(BREAKER_KEPT) do
    changes[name] = changes[name] or false
  end
  circuit.state, circuit.override = 'closed', nil
  breaker_become(circuit, now, 'closed', changes)
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  breaker_list(KEYS[2], ARGV[2])
end
return circuit.state
