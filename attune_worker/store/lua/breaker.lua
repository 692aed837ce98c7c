-- Fragment: one circuit of the fleet's breaker. Uses values.lua. Times in ms of Redis' clock.
--
-- breaker_look(key, now, rules, call)           whether a call may be made; reads only. `call` (optional) is the call's
--                                               id: one that holds a probe's lease already is allowed again
--   returns {key, state, allowed, probe, retry_at, reason, why, generation, failures, probes, ...}; `retry_at` is
--   never nil, `reason` one of open, probing, forced_open, or '' when allowed
-- breaker_take(circuit, now, call, lease_ms, rules)  takes what was looked at: open becomes half-open, a probe gets its
--                                               lease. Returns the permit's generation
-- breaker_settle(key, now, result, rules)       counts {call, generation, outcome, latency_ms, worker, error,
--                                               retry_after_ms}. Returns 'opened: WHY', 'reopened: WHY', 'closed', or false
-- breaker_list(index, name)                     adds a circuit's name to the index of those there are
-- breaker_override(circuit, now, fields)        lays an override over a circuit, or lifts it
-- breaker_become(circuit, now, state, changes)  changes the state; every result of before is void
--
-- HASH  state, generation (grows at every transition, and never twice the same, also after an eviction), failures,
--       failed_at ('<ms>/<worker>/<call>' of each, at most failure_threshold), opened_ms, opened_by, retry_ms, reopens,
--       reason, error, last_failure_ms, last_success_ms, last_success_by, other_success_ms and other_success_by (of
--       the last worker before that one), reset_ms, reset_by, reset_reason, override, override_ms, override_by,
--       override_reason, override_until_ms, 'lease:<call>' (its end), b0 to b9 ('<start> <calls> <failures> <slow>
--       <worker in trouble, * for several>'; only with a rule about rates)
-- rules {failure_threshold, window_ms, recovery_ms, max_open_ms, half_open_calls, failure_rate, slow_ms, slow_rate,
--       minimum_calls, lone_worker_opens}
-- TTL   a day longer than the open time or the override; 366 days for an override without end.
--       What is garbled or not ours counts as missing, and a missing circuit is closed.
local BREAKER_DAY_MS = 86400000
local BREAKER_LONGEST_MS = 31 * BREAKER_DAY_MS
local BREAKER_MAX_LISTED = 1000
local BREAKER_OTHERS_MS = 30000 -- others succeed if one of them did so lately; later nobody can tell
local BREAKER_OVERRIDES = { open = true, disabled = true, metrics_only = true }
local BREAKER_KEPT = {
  'failures', 'failed_at', 'opened_ms', 'opened_by', 'retry_ms', 'reopens', 'reason', 'error',
  'last_failure_ms', 'last_success_ms', 'last_success_by', 'other_success_ms', 'other_success_by',
  'override', 'override_ms', 'override_by', 'override_reason', 'override_until_ms', 'reset_ms', 'reset_by', 'reset_reason',
}

-- A whole number between the bounds, or nil.
local function breaker_whole(text, low, high)
  local n = number(text, nil)
  return n and n >= low and n <= high and n == math.floor(n) and n or nil
end

-- A name as one word within failed_at and the buckets.
local function breaker_word(name)
  return type(name) == 'string' and string.gsub(string.sub(name, 1, 120), '[%s/*%z]', '_') or ''
end

-- The failures in `failed_at` that the window still holds, oldest first.
local function breaker_failures(text, now, rules)
  local found = {}
  for ms, worker, call in string.gmatch(string.sub(text or '', -30000), '(%d+)/([^/ ]*)/([^/ ]*)') do
    local at = breaker_whole(ms, now - rules.window_ms + 1, now + rules.window_ms)
    if at then
      found[#found + 1] = { at = at, worker = worker, call = call }
    end
  end
  while #found > rules.failure_threshold do
    table.remove(found, 1)
  end
  return found
end

local function breaker_read(key, now, rules)
  local hash = whole(key)
  local circuit = { key = key, hash = hash, state = 'closed', leases = {}, probes = 0 }
  circuit.generation = breaker_whole(hash.generation, 0, 2 ^ 52) or 0
  circuit.reopens = breaker_whole(hash.reopens, 0, 1000) or 0
  circuit.retry_ms = breaker_whole(hash.retry_ms, 1, now + BREAKER_LONGEST_MS)
  circuit.failed = breaker_failures(hash.failed_at, now, rules)
  if hash.state == 'half_open' or (hash.state == 'open' and circuit.retry_ms) then
    circuit.state = hash.state
  end
  if circuit.state == 'half_open' then
    for field, value in pairs(hash) do
      local ends = string.sub(field, 1, 6) == 'lease:' and breaker_whole(value, now + 1, now + BREAKER_LONGEST_MS)
      if ends then
        circuit.leases[string.sub(field, 7)] = ends
        circuit.probes = circuit.probes + 1
        circuit.next_lease_end = math.min(circuit.next_lease_end or ends, ends)
      end
    end
  end
  circuit.until_ms = number(hash.override_until_ms, nil)
  if BREAKER_OVERRIDES[hash.override] and (not circuit.until_ms or circuit.until_ms > now) then
    circuit.override = hash.override
  end
  return circuit
end

-- Give the circuit's key its time to live, once its fields are written.
local function breaker_keep(circuit, now, retry_ms)
  local ttl = math.max(BREAKER_DAY_MS, (retry_ms or 0) - now + BREAKER_DAY_MS)
  if circuit.override then
    ttl = math.max(ttl, circuit.until_ms and circuit.until_ms - now + BREAKER_DAY_MS or 366 * BREAKER_DAY_MS)
  end
  redis.call('PEXPIRE', circuit.key, integer(ttl))
end

local function breaker_become(circuit, now, state, changes)
  local generation = math.max(circuit.generation + 1, now)
  local fields = { 'state', state, 'generation', integer(generation) }
  for _, name in ipairs(BREAKER_KEPT) do
    local value = changes[name]
    if value == nil then
      value = circuit.hash[name]
    end
    if value then
      fields[#fields + 1] = name
      fields[#fields + 1] = value
    end
  end
  redis.call('DEL', circuit.key) -- leases, buckets and whatever else was there
  redis.call('HSET', circuit.key, unpack(fields))
  breaker_keep(circuit, now, number(changes.retry_ms, nil))
  return generation
end

local function breaker_look(key, now, rules, call)
  local circuit = breaker_read(key, now, rules)
  circuit.allowed, circuit.probe, circuit.retry_at, circuit.reason = true, false, now, ''
  circuit.failures = #circuit.failed
  circuit.why = circuit.override and circuit.hash.override_reason or circuit.hash.reason or ''
  if circuit.override == 'open' then
    circuit.allowed, circuit.reason = false, 'forced_open'
    circuit.retry_at = circuit.until_ms or now + rules.recovery_ms -- without an end: when to look again
  elseif circuit.override or circuit.state == 'closed' then
    return circuit
  elseif circuit.state == 'open' and now < circuit.retry_ms then
    circuit.allowed, circuit.reason, circuit.retry_at = false, 'open', circuit.retry_ms
  elseif circuit.probes < rules.half_open_calls or (call and circuit.leases[call]) then
    circuit.probe = true
  else
    circuit.allowed, circuit.reason, circuit.retry_at = false, 'probing', circuit.next_lease_end
  end
  return circuit
end

local function breaker_take(circuit, now, call, lease_ms, rules)
  if not circuit.probe then
    return circuit.generation
  end
  local generation = circuit.generation
  if circuit.state == 'open' then
    generation = breaker_become(circuit, now, 'half_open', {})
  else
    for field in pairs(circuit.hash) do
      local holder = string.sub(field, 1, 6) == 'lease:' and string.sub(field, 7)
      if holder and not circuit.leases[holder] then
        redis.call('HDEL', circuit.key, field)
      end
    end
  end
  redis.call('HSET', circuit.key, 'lease:' .. call, integer(now + math.min(lease_ms, BREAKER_DAY_MS)))
  breaker_keep(circuit, now)
  return generation
end

-- Open for the recovery time, doubled for each time before, or for as long as the provider asks.
local function breaker_open(circuit, now, result, rules, reopens, reason, failed)
  local longest = math.max(rules.max_open_ms, rules.recovery_ms)
  local open_ms = math.min(longest, rules.recovery_ms * 2 ^ math.min(reopens, 40))
  open_ms = math.max(open_ms, math.min(number(result.retry_after_ms, 0), BREAKER_DAY_MS))
  breaker_become(circuit, now, 'open', {
    failures = failed and integer(#failed),
    failed_at = false,
    opened_ms = integer(now),
    opened_by = breaker_word(result.worker),
    retry_ms = integer(now + math.ceil(open_ms)),
    reopens = integer(reopens),
    reason = reason,
    error = type(result.error) == 'string' and string.sub(result.error, 1, 120) or false,
    last_failure_ms = result.outcome == 'failure' and integer(now) or nil,
  })
  local error = type(result.error) == 'string' and ' (' .. string.sub(result.error, 1, 120) .. ')' or ''
  return (reopens > 0 and 'reopened: ' or 'opened: ') .. reason .. error
end

-- The fields of a success: when, and whose; and the last one of another worker.
local function breaker_success(circuit, now, worker)
  local by, ms = circuit.hash.last_success_by, breaker_whole(circuit.hash.last_success_ms, 1, now + BREAKER_DAY_MS)
  local fields = { last_success_ms = integer(now), last_success_by = worker, failures = '0', failed_at = false }
  if by and ms and by ~= worker then
    fields.other_success_ms, fields.other_success_by = integer(ms), by
  end
  return fields
end

-- Whether the trouble is one worker's alone while others succeed; `worker` '*' stands for several.
local function breaker_lone(circuit, now, rules, worker)
  if rules.lone_worker_opens == true or worker == '*' then
    return false
  end
  for _, whose in ipairs({ 'last', 'other' }) do
    local by = circuit.hash[whose .. '_success_by']
    local lately = now - math.min(rules.window_ms, BREAKER_OTHERS_MS) + 1
    local ms = breaker_whole(circuit.hash[whose .. '_success_ms'], lately, now + rules.window_ms)
    if ms and by and by ~= worker then
      return true
    end
  end
  return false
end

-- Count a call in its bucket, a tenth of the window, and return why the rates open the circuit, if they do.
local function breaker_rates(circuit, now, result, rules, slow, fields)
  local width = math.max(1, math.floor(rules.window_ms / 10))
  local slot = math.floor(now / width)
  local calls, failures, slows, trouble = 0, 0, 0, ''
  for i = 0, 9 do
    local bucket = { string.match(circuit.hash['b' .. i] or '', '^(%d+) (%d+) (%d+) (%d+) (%S*)$') }
    local start = number(bucket[1], -1)
    if i == slot % 10 then
      if start ~= slot * width then
        bucket = { '', 0, 0, 0, '' }
      end
      local worker = breaker_word(result.worker)
      local failed = result.outcome == 'failure'
      bucket[2], bucket[3], bucket[4] = bucket[2] + 1, bucket[3] + (failed and 1 or 0), bucket[4] + (slow and 1 or 0)
      if failed or slow then
        bucket[5] = (bucket[5] == '' or bucket[5] == worker) and worker or '*'
      end
      start = slot * width
      fields['b' .. i] =
        table.concat({ integer(start), integer(bucket[2]), integer(bucket[3]), integer(bucket[4]), bucket[5] }, ' ')
    end
    if start > now - rules.window_ms and start <= now then
      calls, failures, slows = calls + bucket[2], failures + bucket[3], slows + bucket[4]
      if bucket[5] ~= '' then
        trouble = (trouble == '' or trouble == bucket[5]) and bucket[5] or '*'
      end
    end
  end
  if calls < rules.minimum_calls or breaker_lone(circuit, now, rules, trouble) then
    return nil
  end
  if failures > 0 and failures / calls >= number(rules.failure_rate, math.huge) then
    return integer(failures) .. ' of ' .. integer(calls) .. ' calls failed'
  end
  if slows > 0 and slows / calls >= number(rules.slow_rate, math.huge) then
    return integer(slows) .. ' of ' .. integer(calls) .. ' calls were slow'
  end
  return nil
end

-- Count a result where it changes no state by itself; returns why the circuit is to open, if it is, and the failures.
local function breaker_count(circuit, now, result, rules, slow)
  local worker, call, failed, opens = breaker_word(result.worker), breaker_word(result.call), circuit.failed, nil
  local fields = {}
  if result.outcome == 'failure' then
    local lone, texts = true, {}
    for _, failure in ipairs(failed) do
      if call ~= '' and failure.call == call then
        return nil, failed -- told twice
      end
    end
    failed[#failed + 1] = { at = now, worker = worker, call = call }
    if #failed > rules.failure_threshold then
      table.remove(failed, 1)
    end
    for i, failure in ipairs(failed) do
      lone = lone and failure.worker == worker
      texts[i] = integer(failure.at) .. '/' .. failure.worker .. '/' .. failure.call
    end
    fields = {
      failures = integer(#failed),
      failed_at = table.concat(texts, ' '),
      last_failure_ms = integer(now),
      error = type(result.error) == 'string' and string.sub(result.error, 1, 120) or nil,
    }
    if #failed >= rules.failure_threshold and not breaker_lone(circuit, now, rules, lone and worker or '*') then
      opens = integer(#failed) .. ' failures in a row'
    end
  else
    fields = breaker_success(circuit, now, worker)
    failed = {}
  end
  if number(rules.failure_rate, nil) or number(rules.slow_rate, nil) then
    opens = breaker_rates(circuit, now, result, rules, slow, fields) or opens
  end
  local list = { 'state', circuit.state, 'generation', integer(circuit.generation) }
  for name, value in pairs(fields) do
    if value then
      list[#list + 1], list[#list + 2] = name, value
    else
      redis.call('HDEL', circuit.key, name)
    end
  end
  redis.call('HSET', circuit.key, unpack(list))
  breaker_keep(circuit, now, circuit.retry_ms)
  return opens, failed
end

local function breaker_settle(key, now, result, rules)
  local circuit = breaker_read(key, now, rules)
  local generation, metrics = tonumber(result.generation), circuit.override == 'metrics_only'
  local slow = number(rules.slow_rate, nil) and number(result.latency_ms, 0) > number(rules.slow_ms, math.huge)
  if (circuit.override and not metrics) or (generation and generation ~= circuit.generation) then
    return false
  end
  if metrics or circuit.state == 'closed' then
    if result.outcome == 'ignored' then
      return false
    end
    local reason, failed = breaker_count(circuit, now, result, rules, slow)
    if metrics or not reason then
      return false
    end
    circuit.hash = whole(key)
    return breaker_open(circuit, now, result, rules, 0, reason, #failed > 0 and failed or nil)
  end
  if circuit.state == 'open' or not generation or not circuit.leases[result.call] then
    return false
  end
  if result.outcome == 'ignored' then
    redis.call('HDEL', key, 'lease:' .. result.call)
    return false
  end
  if result.outcome == 'failure' or slow then
    local reason = result.outcome == 'failure' and 'the probe failed' or 'the probe was slow'
    return breaker_open(circuit, now, result, rules, circuit.reopens + 1, reason)
  end
  local changes = breaker_success(circuit, now, breaker_word(result.worker))
  for _, name in ipairs({ 'opened_ms', 'opened_by', 'retry_ms', 'reopens', 'reason', 'error', 'reset_ms', 'reset_by', 'reset_reason' }) do
    changes[name] = false
  end
  breaker_become(circuit, now, 'closed', changes)
  return 'closed'
end

local function breaker_override(circuit, now, fields)
  for _, name in ipairs({ 'override', 'override_by', 'override_reason', 'override_ms', 'override_until_ms' }) do
    redis.call('HDEL', circuit.key, name)
  end
  circuit.override, circuit.until_ms = fields.override, number(fields.override_until_ms, nil)
  for name, value in pairs(fields) do
    redis.call('HSET', circuit.key, name, value)
  end
  if redis.call('EXISTS', circuit.key) == 1 then
    breaker_keep(circuit, now, circuit.retry_ms)
  end
end

local function breaker_list(index, name)
  own(index, 'set')
  if redis.call('SCARD', index) < BREAKER_MAX_LISTED or redis.call('SISMEMBER', index, name) == 1 then
    redis.call('SADD', index, name)
  end
  -- as long as the longest override, so that what is forced can be found
  redis.call('PEXPIRE', index, integer(366 * BREAKER_DAY_MS))
end
