-- BREAKER_AVAILABLE: ask for a permit to call: from a tier's circuit and, if given, from the provider's own.
-- Repeatable: the holder of a probe's lease is allowed again.
--
-- KEYS  1 circuit  2 the provider's own circuit (optional)
-- ARGV  1 call id  2 lease of a probe in ms  3 rules as JSON, in ms
-- Returns {1, 0, '', generation, probe (0 or 1) of each circuit in turn} when both allow it, with the leases taken,
--      or {0, ms until it is worth asking again, reason of the first circuit that refuses, its place from 0}, with nothing changed.
-- TTL   see breaker.lua
local now, rules, circuits = now_in_ms(), cjson.decode(ARGV[3]), {}
for i, key in ipairs(KEYS) do
  circuits[i] = breaker_look(key, now, rules, ARGV[1])
  if not circuits[i].allowed then
    return { 0, math.max(0, circuits[i].retry_at - now), circuits[i].reason, i - 1 }
  end
end
local answer = { 1, 0, '' }
for _, circuit in ipairs(circuits) do
  answer[#answer + 1] = breaker_take(circuit, now, ARGV[1], tonumber(ARGV[2]), rules)
  answer[#answer + 1] = circuit.probe and 1 or 0
end
return answer
