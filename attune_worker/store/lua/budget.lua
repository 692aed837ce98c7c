-- Fragment: what has been spent, and may still be, in a day or a month (UTC).
--
-- budget_look(key, now, want)   may the call be made? Changes nothing.
--   want     {per = 'day' | 'month', limit_nano, hard, amount_nano (absent: the price is not known)}
--   returns  {allowed, left_nano, resets_at (ms), window, reason: budget (used up until resets_at), budget_reserved
--            (calls under way may give back enough), budget_too_small (for this call, in any window),
--            unknown_price; absent when allowed}
-- budget_take(look, now)   counts the amount as reserved
-- budget_set(key, now, wish)   sets a limit for the running fleet, or goes back to the configured one. What is spent
--   and reserved stays as it is, so a limit below that refuses at once.
--   wish     {per, hard, limit_nano (absent: back to the configured one), until_ms (0: for good; absent: the end of
--            the window), by, reason}
--   returns  until_ms
-- budget_settle(key, now, settled)   once per call (twice where it was an orphan's), by care of the caller
--   settled  {per, window (of its admission), reserved_nano, cost_nano (absent: not known, the reservation counts as
--            spent), counted (it was settled as an orphan's: the reservation is among what is spent, and now put
--            right), limit_nano (the soft limit; absent: none)}
--   returns  true when the window's spending passed the soft limit by this, for the first time
--
-- hash  <window>:spent <window>:reserved <window>:warned, all in nano-USD, for windows like 2026-11-23 or 2026-11;
--       only the current one and the one before are kept
--       hard_limit, soft_limit: '<nano-USD> <until, ms; 0: for good>', a limit that an operator set, which takes the
--       place of the configured one. In one field, so that it is whole or nothing; what is garbled is nothing. For
--       people: hard_by, hard_reason, hard_ms (when it was set), and the same of soft
-- TTL   63 days, so a month and the one before it; a day longer than a limit that was set holds, and none while one is
--       set for good: it must not lapse by itself
--
-- Sums are written with HSET, not HINCRBY: a script is alone anyway, and a garbled value is no error. Doubles are
-- exact up to 2^53 nano-USD, nine million dollars; sums stop there.
local BUDGET = { day_ms = 86400000, ttl_seconds = 5443200, most_nano = 9007199254740991, most_fields = 256,
  longest_ms = 3660 * 86400000 }

-- Year, month and day of a day counted from 1970-01-01: Howard Hinnant's civil_from_days.
local function budget_date(day)
  local z = day + 719468
  local era = math.floor(z / 146097)
  local of_era = z - era * 146097
  local year_of_era = math.floor(
    (of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096)) / 365
  )
  local of_year = of_era - (365 * year_of_era + math.floor(year_of_era / 4) - math.floor(year_of_era / 100))
  local shifted = math.floor((5 * of_year + 2) / 153) -- months since March
  local month = shifted < 10 and shifted + 3 or shifted - 9
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  return year, month, of_year - math.floor((153 * shifted + 2) / 5) + 1
end

-- The current window, the one before, and when the current one ends (ms).
local function budget_window(now, per)
  local today = math.floor(now / BUDGET.day_ms)
  local year, month, date = budget_date(today)
  if per == 'month' then
    local year_before, month_before = budget_date(today - date)
    local _, _, date_after = budget_date(today - date + 32) -- the first of this month and 31 days: early in the next
    return string.format('%04d-%02d', year, month), string.format('%04d-%02d', year_before, month_before),
      (today - date + 33 - date_after) * BUDGET.day_ms
  end
  return string.format('%04d-%02d-%02d', year, month, date), string.format('%04d-%02d-%02d', budget_date(today - 1)),
    (today + 1) * BUDGET.day_ms
end

local function budget_nano(value)
  local n = number(value, -1)
  if n < 0 or n ~= math.floor(n) then
    return nil
  end
  return math.min(n, BUDGET.most_nano)
end

local function budget_drop_old(key, current, before)
  if redis.call('HLEN', key) > BUDGET.most_fields then
    return
  end
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local window = string.match(field, '^([%d-]+):%a+$')
    if window and window ~= current and window ~= before then
      redis.call('HDEL', key, field)
    end
  end
end

-- A limit that was set and still holds: {nano, until_ms (infinite: for good)}, or nil.
local function budget_limit(text, now)
  local nano, until_ms = string.match(text or '', '^(%d+) (%d+)$')
  nano, until_ms = budget_nano(nano), number(until_ms, nil)
  if not nano or not until_ms or (until_ms > 0 and (until_ms <= now or until_ms > now + BUDGET.longest_ms)) then
    return nil
  end
  return { nano = nano, until_ms = until_ms > 0 and until_ms or math.huge }
end

-- Give the key its time to live; `hard` and `soft` are the limits that were set.
local function budget_keep(key, now, hard, soft)
  local until_ms = math.max(hard and hard.until_ms or 0, soft and soft.until_ms or 0)
  if until_ms == math.huge then
    redis.call('PERSIST', key)
  else
    local set_seconds = math.ceil((until_ms - now + BUDGET.day_ms) / 1000)
    redis.call('EXPIRE', key, integer(math.max(BUDGET.ttl_seconds, set_seconds)))
  end
end

local function budget_look(key, now, want)
  local window, before, resets_at = budget_window(now, want.per)
  local found = read(key, window .. ':spent', window .. ':reserved', 'hard_limit', 'soft_limit')
  local hard, soft = budget_limit(found[3], now), budget_limit(found[4], now)
  local configured, set = budget_nano(want.limit_nano) or 0, soft
  if want.hard then
    set = hard
  end
  local reserved, limit = budget_nano(found[2]) or 0, set and set.nano or configured
  -- what the limit will be when this one is over
  local lasting = set and set.until_ms <= resets_at and configured or limit
  local used, known = (budget_nano(found[1]) or 0) + reserved, budget_nano(want.amount_nano)
  local amount = known or 0
  local look = {
    key = key,
    allowed = true,
    left_nano = limit - used,
    resets_at = resets_at,
    window = window,
    before = before,
    begun = found[1] or found[2],
    reserved_nano = reserved,
    amount_nano = amount,
    hard = hard,
    soft = soft,
  }
  if want.hard and not known then
    look.allowed, look.reason = false, 'unknown_price'
  elseif want.hard and amount > 0 and used + amount > limit then -- what is free passes no limit
    look.allowed, look.reason = false, amount > lasting and 'budget_too_small' or 'budget'
    if lasting > limit then
      look.resets_at = set.until_ms
    end
    if used - reserved + amount <= limit then
      look.reason = 'budget_reserved'
    end
  end
  return look
end

local function budget_take(look, now)
  redis.call('HSET', look.key, look.window .. ':reserved',
    integer(math.min(look.reserved_nano + look.amount_nano, BUDGET.most_nano)))
  budget_keep(look.key, now, look.hard, look.soft)
  if not look.begun then
    budget_drop_old(look.key, look.window, look.before)
  end
end

local function budget_settle(key, now, settled)
  local window = settled.window
  local current, before = budget_window(now, settled.per)
  if window ~= current and window ~= before then
    return false -- nobody asks about that window any more
  end
  local found = read(key, window .. ':spent', window .. ':reserved', window .. ':warned',
    'hard_limit', 'soft_limit')
  local hard, soft = budget_limit(found[4], now), budget_limit(found[5], now)
  local reserved = budget_nano(settled.reserved_nano) or 0
  local cost = budget_nano(settled.cost_nano) or reserved
  if settled.counted then
    cost, reserved = cost - reserved, 0
  end
  local spent = math.min(math.max((budget_nano(found[1]) or 0) + cost, 0), BUDGET.most_nano)
  local limit = budget_nano(settled.limit_nano)
  if limit and soft then
    limit = soft.nano
  end
  local passed = limit ~= nil and spent > limit and not found[3]
  redis.call('HSET', key, window .. ':spent', integer(spent),
    window .. ':reserved', integer(math.max((budget_nano(found[2]) or 0) - reserved, 0)))
  if passed then
    redis.call('HSET', key, window .. ':warned', integer(now))
  end
  budget_keep(key, now, hard, soft)
  return passed
end

local function budget_set(key, now, wish)
  local kind, window, _, resets_at = wish.hard and 'hard' or 'soft', budget_window(now, wish.per)
  local until_ms = number(wish.until_ms, resets_at)
  own(key, 'hash')
  if wish.limit_nano then
    redis.call('HSET', key, kind .. '_limit', integer(wish.limit_nano) .. ' ' .. integer(until_ms),
      kind .. '_by', wish.by, kind .. '_reason', wish.reason, kind .. '_ms', integer(now))
  else
    redis.call('HDEL', key, kind .. '_limit', kind .. '_by', kind .. '_reason', kind .. '_ms')
  end
  if kind == 'soft' then
    redis.call('HDEL', key, window .. ':warned') -- that was about another limit
  end
  local found = read(key, 'hard_limit', 'soft_limit')
  budget_keep(key, now, budget_limit(found[1], now), budget_limit(found[2], now))
  return until_ms
end
