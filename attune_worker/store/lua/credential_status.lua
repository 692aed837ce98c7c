-- CREDENTIAL_STATUS: how a key of a provider stands; changes nothing.
--
-- KEYS  1 credential
-- ARGV  1 '1' to forget that it was refused, first
-- Returns JSON: {now_ms, forgotten, refused: {ms, error, status, recheck_ms} (absent: it is not), calls, reserved,
--      windows: {name: {utilization, counted (tokens beyond what was told), reset_ms, status, capacity}} (without a quota
--      or before anything was told: none), windowless}
local now = now_in_ms()
local forgotten = false
local refused = read(KEYS[1], 'refused_ms', 'refused_error', 'refused_status')
if ARGV[1] == '1' then
  forgotten = redis.call('HDEL', KEYS[1], 'refused_ms', 'refused_error', 'refused_status', 'recheck_ms') > 0
end
local state = credential_read(KEYS[1], now)
local windows = {}
for name, window in pairs(state.windows) do
  windows[name] = {
    utilization = window.utilization,
    counted = integer(math.max(state.settled - window.covered, 0)),
    reset_ms = window.reset > 0 and integer(window.reset) or nil,
    status = window.status ~= '' and window.status or nil,
    capacity = window.capacity and integer(window.capacity) or nil,
  }
end
return cjson.encode({
  now_ms = now,
  forgotten = forgotten,
  refused = state.recheck and {
    ms = integer(number(refused[1], 0)), error = refused[2] or '', status = refused[3] or '',
    recheck_ms = integer(state.recheck),
  } or nil,
  calls = state.calls,
  reserved = integer(state.reserved),
  windows = windows,
  windowless = state.windowless,
})
