-- CREDENTIAL_STATUS: how a key of a provider stands; changes nothing, unless it is told to forget a refusal.
--
-- KEYS  1 credential
-- ARGV  1 '1' to forget that it was refused, first
--       2 JSON of the quota's {keep_free, burst} (empty: it has none)
-- Returns JSON: {now_ms, forgotten, refused: {ms, error, status, recheck_ms} (absent: it is not), calls, reserved,
--      held: {reason, ms (until then)} (absent: the smallest call may be made now),
--      windows: {name: {utilization, counted (tokens beyond what was told), reset_ms, status, capacity, pace (the share
--      that may be used by now)}} (without a quota or before anything was told: none), windowless}
local now = now_in_ms()
local forgotten = false
local refused = read(KEYS[1], 'refused_ms', 'refused_error', 'refused_status')
if ARGV[1] == '1' then
  forgotten = redis.call('HDEL', KEYS[1], 'refused_ms', 'refused_error', 'refused_status', 'recheck_ms') > 0
end
local state = credential_read(KEYS[1], now)
local quota = ARGV[2] ~= '' and cjson.decode(ARGV[2]) or nil
local look = credential_look(KEYS[1], now, { tokens = 0, quota = quota })
local burst, keep_free = number(quota and quota.burst, 1), number(quota and quota.keep_free, 0)
local windows = {}
for name, window in pairs(state.windows) do
  local over = window.reset > 0 and math.max(0, 1 - (window.reset - now) / window.length_ms) or 0
  windows[name] = {
    utilization = window.utilization,
    counted = integer(math.max(state.settled - window.covered, 0)),
    reset_ms = window.reset > 0 and integer(window.reset) or nil,
    status = window.status ~= '' and window.status or nil,
    capacity = window.capacity and integer(window.capacity) or nil,
    pace = math.min(burst + (1 - burst) * over, 1 - keep_free),
  }
end
return cjson.encode({
  now_ms = now,
  forgotten = forgotten,
  refused = state.recheck and {
    ms = integer(number(refused[1], 0)), error = refused[2] or '', status = refused[3] or '',
    recheck_ms = integer(state.recheck),
  } or nil,
  held = not look.allowed and { reason = look.reason, ms = integer(look.retry_at) } or nil,
  calls = state.calls,
  reserved = integer(state.reserved),
  windows = windows,
  windowless = state.windowless,
})
