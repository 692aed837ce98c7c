-- BREAKER_STATUS: how a circuit stands; reads only.
--
-- KEYS  1 circuit
-- ARGV  1 rules as JSON, in ms
-- Returns {} when there is no such circuit, else names and values in turn: state, override, failures, probes,
--      generation, reopens, reason, by and, where known, error, last_failure_ms, last_success_ms, opened_ms, retry_ms;
--      of an override forced_ms and, unless it has no end, until_ms; else of a circuit that is not closed probe_ms: from
--      when on a call may find out how the provider is, and of a closed one reset_ms, if somebody closed it
local now = now_in_ms()
local circuit = breaker_look(KEYS[1], now, cjson.decode(ARGV[1]))
local hash = circuit.hash
if not next(hash) then
  return {}
end
local is_closed = circuit.state == 'closed'
local answer = {
  'state', circuit.state, 'override', circuit.override or '',
  'reason', is_closed and not circuit.override and hash.reset_reason or circuit.why, 'probes', circuit.probes,
  'failures', is_closed and circuit.failures or breaker_whole(hash.failures, 0, 1e6) or 0,
  'generation', integer(circuit.generation), 'reopens', circuit.reopens,
  'by', (circuit.override and hash.override_by or is_closed and hash.reset_by or hash.opened_by) or '',
}
local function add(name, value)
  if value then
    answer[#answer + 1], answer[#answer + 2] = name, value
  end
end
add('error', hash.error)
for _, name in ipairs({ 'last_failure_ms', 'last_success_ms', 'opened_ms' }) do
  local ms = breaker_whole(hash[name], 1, now + BREAKER_DAY_MS)
  add(name, ms and integer(ms))
end
if circuit.override then
  local ms = breaker_whole(hash.override_ms, 1, now + BREAKER_DAY_MS)
  add('forced_ms', ms and integer(ms))
  add('until_ms', circuit.until_ms and integer(circuit.until_ms))
elseif not is_closed then
  add('probe_ms', integer(circuit.retry_at))
elseif hash.reset_by then
  local ms = breaker_whole(hash.reset_ms, 1, now + BREAKER_DAY_MS)
  add('reset_ms', ms and integer(ms))
end
if circuit.override == 'open' then
  add('retry_ms', circuit.until_ms and integer(circuit.until_ms))
elseif not is_closed then
  add('retry_ms', circuit.retry_ms and integer(circuit.retry_ms))
end
return answer
