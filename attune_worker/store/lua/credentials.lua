-- Fragment: one key of a provider, or token of a subscription: is it refused, and what is left of its quota? Needs
-- values.lua.
--
-- credential_look(key, now, want)   may a call be made by it? Changes nothing.
--   want     {tokens (at most, of the call), recheck_ms, quota = {keep_free, burst} (absent: it has no quota)}
--   returns  {allowed, retry_at (ms), reason (of the rule that holds out longest): credential_refused, quota_used_up,
--            quota_paced, quota_reserved (calls under way hold it), quota_unknown (another call finds out)}
-- credential_take(look, now, lease_ms)   reserves the tokens, and moves on the next check of a refused key; returns what
--   was settled of the quota so far, to be kept with the call (nil without a quota)
-- credential_settle(key, now, settled)   once per call (twice where it was an orphan's), by care of the caller
--   settled  {quota (whether there is one), admitted (its ADMIT is known), released (it was never made), counted (it was
--            settled as an orphan's), reserved_tokens, used_tokens (absent: not known, the reservation counts as used),
--            covers (what take returned), admitted_ms, at (when it ended, ms), succeeded,
--            refused = {error, status, recheck_ms}, windows = {{name, utilization, reset_ms, status}}}
--   returns  'refused' or 'accepted' where that changed, else false
-- credential_read(key, now)         what is known of a key with a quota, see below
--
-- hash  refused_ms refused_error refused_status, recheck_ms (when one call tries it again); and of a quota
--       calls reserved (tokens, both of calls under way), held_ms (the latest end of their leases), settled (tokens of
--       all calls that have ended; only grows), guessed (those of them that nobody counted: what had been reserved;
--       only grows), windowless_ms (the provider answered and told of no window);
--       for each window 5h and 7d, as told by the provider: <w>_utilization (0 to 1), <w>_reset_ms (0: the window of
--       before has ended, the next is not told of yet), <w>_status, <w>_told_ms; and counted: <w>_covered (how much of
--       settled the told utilization includes for certain), <w>_capacity (tokens, learned), <w>_base ('utilization
--       settled covered' from which it is being learned; settled without the guessed, with the calls that were under way)
-- TTL   8 days after the last write: a day longer than the longest window
--
-- A call was answered after it was admitted, so the utilization in its answer includes all that had been settled by
-- then. What was settled since may be in it or not, and is counted besides. Answers may arrive in any order: within
-- one window the utilization never goes down.
-- Used, at most, is what was told, a unit of it (nobody says how it is rounded), and what was settled since, is under
-- way, and is asked for, as shares of the capacity. It stays below 1 - keep_free, and below the pace: burst + (1 - burst)
-- * the part of the window that is over. While the capacity is not known, one call at a time goes, and stays away from
-- the end: so the weight of a call, a tenth of the window at most, does no harm.
-- Where a window has ended and the next is not told of, one call at a time finds out, whatever its size: it would wait
-- for ever. More do not go, as the provider's clock may be behind ours, and as others may use the subscription too.
--
-- The capacity lies between two bounds: tokens that are certainly in a rise of the utilization, over the rise and a unit
-- of rounding; and all that may be in it, over the rise less a unit. What was learned is moved between them. What a call
-- had reserved is not certainly in it where nobody said what it used: it may never have reached the provider.
local CREDENTIAL = {
  ttl_ms = 691200000,
  day_ms = 86400000,
  soon_ms = 1000, -- when to look again for what may end at any time: a call
  quiet_ms = 600000, -- so long after the last lease nothing is under way: a call that is still open was lost
  slack_ms = 3600000, -- a reset further ahead than its window and this is none
  same_reset_ms = 60000, -- resets that differ by less are one
  unit = 0.01, -- the provider tells hundredths
  unlearned_share = 0.9, -- how far calls of unknown weight go
  learn_rise = 0.02,
  rebase_rise = 0.1,
  most_tokens = 1e15,
  windows = { { name = '5h', length_ms = 18000000 }, { name = '7d', length_ms = 604800000 } },
}
local function credential_count(text)
  local n = number(text, 0)
  return n >= 0 and n <= CREDENTIAL.most_tokens and n or 0
end

-- When a refused key is tried again; nil for one that is not refused.
local function credential_recheck(refused_ms, recheck_ms, now)
  local refused = number(refused_ms, 0)
  if refused <= 0 or refused > now + CREDENTIAL.day_ms then
    return nil
  end
  local at = number(recheck_ms, now)
  return at <= now + CREDENTIAL.day_ms and at or now
end

local function credential_base(text, utilization)
  local u, settled, covered = string.match(text or '', '^(%S+) (%S+) (%S+)$')
  u = number(u, nil)
  if u and u >= 0 and u <= utilization then
    return { utilization = u, settled = credential_count(settled), covered = credential_count(covered) }
  end
end

-- A window as it stands now; nil where nothing was told, or cannot be read.
local function credential_window(spec, found, settled, now)
  local function field(name)
    return found[spec.name .. '_' .. name]
  end
  local utilization, reset = number(field('utilization'), nil), number(field('reset_ms'), nil)
  if not utilization or utilization < 0 or utilization > 1 or not reset or reset < 0
    or reset > now + spec.length_ms + CREDENTIAL.slack_ms then
    return nil
  end
  local runs, ended = reset > now, reset > 0 and reset <= now
  local capacity = credential_count(field('capacity'))
  return {
    name = spec.name,
    length_ms = spec.length_ms,
    ended = ended,
    reset = runs and reset or 0,
    utilization = runs and utilization or 0,
    status = runs and field('status') or '',
    told = math.min(number(field('told_ms'), 0), now),
    covered = ended and settled or math.min(credential_count(field('covered')), settled),
    capacity = capacity >= 1 and capacity or nil,
    base = runs and credential_base(field('base'), utilization) or nil,
  }
end

local function credential_read(key, now)
  local names = { 'refused_ms', 'recheck_ms', 'calls', 'reserved', 'held_ms', 'settled', 'guessed', 'windowless_ms' }
  local found = {}
  for _, spec in ipairs(CREDENTIAL.windows) do
    for _, name in ipairs({ 'utilization', 'reset_ms', 'status', 'told_ms', 'covered', 'capacity', 'base' }) do
      names[#names + 1] = spec.name .. '_' .. name
    end
  end
  for index, value in ipairs(read(key, unpack(names))) do
    found[names[index]] = value
  end
  local held = number(found.held_ms, 0)
  held = held <= now + CREDENTIAL.day_ms and held or 0
  local under_way = held + CREDENTIAL.quiet_ms > now
  local state = {
    recheck = credential_recheck(found.refused_ms, found.recheck_ms, now),
    held = held,
    calls = under_way and credential_count(found.calls) or 0,
    reserved = under_way and credential_count(found.reserved) or 0,
    settled = credential_count(found.settled),
    guessed = credential_count(found.guessed),
    windowless = number(found.windowless_ms, nil) ~= nil,
    windows = {},
  }
  for _, spec in ipairs(CREDENTIAL.windows) do
    local window = credential_window(spec, found, state.settled, now)
    state.windows[spec.name] = window
    state.runs = state.runs or (window ~= nil and window.reset > 0)
  end
  local week, hours = state.windows['7d'], state.windows['5h']
  if week and hours and not week.capacity then -- a week holds what five hours of it do
    week.holds = hours.capacity
  end
  return state
end

-- Until when a window holds a call, and why; nil where it does not.
local function credential_hold(window, state, want, now)
  local limit, burst = 1 - number(want.quota.keep_free, 0), number(want.quota.burst, 1)
  local soon, resets = now + CREDENTIAL.soon_ms, window.reset
  if resets == 0 then
    return state.calls > 0 and not state.windowless and soon or nil, 'quota_unknown'
  elseif window.status == 'rejected' then
    return resets, 'quota_used_up'
  end
  local capacity = window.capacity or window.holds
  local since = math.max(state.settled - window.covered, 0)
  local used = window.utilization + CREDENTIAL.unit
  local all = used
  if capacity then
    used = used + (since + want.tokens) / capacity
    all = used + state.reserved / capacity
  else
    limit = math.min(limit, CREDENTIAL.unlearned_share - number(want.quota.keep_free, 0))
  end
  if used > limit then
    return resets, 'quota_used_up'
  elseif not capacity and state.calls > 0 then
    return soon, 'quota_unknown'
  elseif all > limit then
    return soon, 'quota_reserved'
  end
  local over = math.max(0, 1 - (resets - now) / window.length_ms)
  local pace = burst + (1 - burst) * over
  if used > pace then
    local share = math.min((used - burst) / (1 - burst), 1)
    return math.min(resets, math.ceil(resets - window.length_ms * (1 - share))), 'quota_paced'
  elseif all > pace then
    return soon, 'quota_reserved'
  end
end

local function credential_look(key, now, want)
  local look = { key = key, allowed = true, retry_at = now, recheck_ms = number(want.recheck_ms, 0) }
  local function hold(at, reason)
    if at and at > look.retry_at then
      look.allowed, look.retry_at, look.reason = false, at, reason
    end
  end
  if not want.quota then
    local refused, recheck = unpack(read(key, 'refused_ms', 'recheck_ms'))
    look.recheck = credential_recheck(refused, recheck, now)
    hold(look.recheck, 'credential_refused')
    return look
  end
  want.tokens = math.max(number(want.tokens, 0), 0)
  local state = credential_read(key, now)
  look.state, look.recheck, look.tokens = state, state.recheck, want.tokens
  hold(look.recheck, 'credential_refused')
  for _, window in pairs(state.windows) do
    hold(credential_hold(window, state, want, now))
  end
  if not state.runs and not state.windowless and state.calls > 0 then
    hold(now + CREDENTIAL.soon_ms, 'quota_unknown')
  end
  return look
end

local function credential_write(key, fields)
  local texts = {}
  for name, value in pairs(fields) do
    texts[#texts + 1], texts[#texts + 2] = name, type(value) == 'number' and integer(value) or value
  end
  if #texts > 0 then
    redis.call('HSET', key, unpack(texts))
    redis.call('PEXPIRE', key, CREDENTIAL.ttl_ms)
  end
end

-- Windows that have ended begin anew with what was settled so far.
local function credential_roll(fields, state)
  for name, window in pairs(state.windows) do
    if window.ended then
      fields[name .. '_utilization'], fields[name .. '_reset_ms'], fields[name .. '_status'] = '0', '0', ''
      fields[name .. '_covered'], fields[name .. '_base'] = window.covered, ''
    end
  end
end

local function credential_take(look, now, lease_ms)
  local fields, state = {}, look.state
  if look.recheck then
    fields.recheck_ms = now + look.recheck_ms
  end
  if state then
    credential_roll(fields, state)
    fields.calls, fields.reserved = state.calls + 1, math.min(state.reserved + look.tokens, CREDENTIAL.most_tokens)
    fields.held_ms = math.max(state.held, now + math.min(lease_ms, CREDENTIAL.day_ms))
  end
  credential_write(look.key, fields)
  return state and integer(state.settled)
end

-- What a rise of the utilization says of the capacity, and the base for the next.
local function credential_learn(fields, window, state, utilization, covered)
  local base, unit = window.base, CREDENTIAL.unit
  local rise = base and utilization - base.utilization + 1e-9 or 0
  if base and rise >= CREDENTIAL.learn_rise then
    local least = (covered - state.guessed - base.settled) / (rise + unit)
    local most = (state.settled + state.reserved - base.covered) / (rise - unit)
    local capacity = math.min(math.max(window.capacity or 0, least), most)
    if least > 0 and capacity >= 1 then
      fields[window.name .. '_capacity'] = math.floor(capacity)
    end
  end
  if not base or rise >= CREDENTIAL.rebase_rise then
    local certain = math.max(state.settled - state.guessed, 0) + state.reserved
    fields[window.name .. '_base'] = string.format('%.6f %.0f %.0f', utilization, certain, covered)
  end
end

-- What an answer tells of one window.
local function credential_told(fields, spec, state, told, settled, now)
  local utilization, reset = number(told.utilization, nil), number(told.reset_ms, nil)
  if not utilization or utilization < 0 or utilization > 1 or not reset or reset <= now
    or reset > now + spec.length_ms + CREDENTIAL.slack_ms then
    return
  end
  local at = math.min(number(settled.at, now), now)
  local window = state.windows[spec.name]
  local same = window and window.reset > 0 and math.abs(window.reset - reset) < CREDENTIAL.same_reset_ms
  local newer = not window or at >= window.told
  if window and window.reset > 0 and not same and not newer then
    return
  end
  local covers = number(settled.covers, nil)
  local covered = math.min(covers and credential_count(covers) or state.settled, state.settled)
  if same then
    utilization = math.max(window.utilization, utilization)
    covered = covers and math.max(window.covered, covered) or window.covered
  else
    covered = math.max(covered, window and window.reset == 0 and window.covered or 0)
    window = { name = spec.name, capacity = window and window.capacity }
  end
  local prefix = spec.name .. '_'
  fields[prefix .. 'utilization'] = string.format('%.6f', utilization)
  fields[prefix .. 'covered'] = covered
  if newer then
    fields[prefix .. 'status'] = type(told.status) == 'string' and told.status or ''
    fields[prefix .. 'told_ms'] = at
  end
  if not same then
    fields[prefix .. 'reset_ms'], fields[prefix .. 'base'] = reset, ''
  end
  credential_learn(fields, window, state, utilization, covered)
end

local function credential_count_call(key, now, settled)
  local state, fields = credential_read(key, now), {}
  credential_roll(fields, state)
  local reserved = credential_count(settled.reserved_tokens)
  local tokens = settled.released and 0 or math.max(number(settled.used_tokens, reserved), 0)
  if settled.counted then -- the reservation is among what was settled, which never goes down
    tokens = math.max(tokens - reserved, 0)
  elseif settled.admitted then
    state.calls, state.reserved = math.max(state.calls - 1, 0), math.max(state.reserved - reserved, 0)
    fields.calls, fields.reserved = state.calls, state.reserved
  end
  state.settled = math.min(state.settled + tokens, CREDENTIAL.most_tokens)
  fields.settled = state.settled
  if tokens > 0 and not number(settled.used_tokens, nil) then
    state.guessed = math.min(state.guessed + tokens, CREDENTIAL.most_tokens)
    fields.guessed = state.guessed
  end
  local told = {}
  for _, one in ipairs(type(settled.windows) == 'table' and settled.windows or {}) do
    told[one.name] = one
  end
  for _, spec in ipairs(CREDENTIAL.windows) do
    if told[spec.name] then
      credential_told(fields, spec, state, told[spec.name], settled, now)
    end
  end
  if next(told) and state.windowless then
    redis.call('HDEL', key, 'windowless_ms')
  elseif settled.succeeded and not next(told) and not state.runs and not state.windowless then
    fields.windowless_ms = now
  end
  credential_write(key, fields)
end

local function credential_settle(key, now, settled)
  if settled.quota and (settled.admitted or not settled.released) then
    credential_count_call(key, now, settled)
  end
  local refused, recheck = unpack(read(key, 'refused_ms', 'recheck_ms'))
  recheck = credential_recheck(refused, recheck, now)
  local at = math.min(number(settled.at, now), now)
  local verdict = settled.refused
  if type(verdict) == 'table' then
    credential_write(key, {
      refused_ms = recheck and number(refused, at) or at,
      refused_error = type(verdict.error) == 'string' and verdict.error or '',
      refused_status = number(verdict.status, nil) and integer(verdict.status) or '',
      recheck_ms = math.max(recheck or 0, at + number(verdict.recheck_ms, 0)),
    })
    return not recheck and 'refused'
  elseif settled.succeeded and recheck and number(settled.admitted_ms, at) >= number(refused, 0) then
    redis.call('HDEL', key, 'refused_ms', 'refused_error', 'refused_status', 'recheck_ms')
    return 'accepted'
  end
  return false
end
