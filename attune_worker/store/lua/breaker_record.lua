-- BREAKER_RECORD: count how a call ended.
-- Repeatable: a result with the same call id counts once as long as the failures are remembered.
--
-- KEYS  1 index of circuits  2 circuit  3 the provider's own circuit, where the call was its probe (optional)
-- ARGV  1 the circuit's name as JSON  2 rules as JSON, in ms  3 result as JSON, see breaker_settle  4 the same for KEYS[3]
-- Returns for each circuit 'opened: WHY', 'reopened: WHY' or 'closed', or '' when its state stays
-- TTL   see breaker.lua
local now, rules, events = now_in_ms(), cjson.decode(ARGV[2]), {}
for i = 2, #KEYS do
  events[i - 1] = breaker_settle(KEYS[i], now, cjson.decode(ARGV[i + 1]), rules) or ''
end
if redis.call('EXISTS', KEYS[2]) == 1 then
  breaker_list(KEYS[1], ARGV[1])
end
return events
