-- Fragment: how much a provider lets through in a minute and at once, and which of its models is left alone.
--
-- limits_look(provider_key, model_key, slots_key, now, want)   may the call be made? Changes nothing.
--   want     {tokens, requests_per_minute, tokens_per_minute, concurrency, burst_ms, learn}; absent: no such limit,
--            except that learned limits and pauses hold unless learn is false
--   returns  {allowed, retry_at (ms, the earliest), reason (of the rule that holds out longest): cooldown,
--            provider_limit (from the provider's headers), requests_per_minute, tokens_per_minute, concurrency}
-- limits_line_up(look, now)   who comes back at look.retry_at stands in line: the next one is told to come later
-- limits_take(look, now, call_id, lease_ms)   reserves a request, the tokens, and a slot until the lease ends; a line
--   whose turn nobody took is dropped
-- limits_settle(provider_key, model_key, slots_key, now, settled)   once per call, by care of the caller
--   settled  {call, reserved_tokens, used_tokens (absent: not known, the reservation stands), released (the call was
--            never made: everything comes back), admitted_ms (when it was taken, absent: not known), cooldown_ms,
--            reason, requests_per_minute, tokens_per_minute, burst_ms,
--            observed = {requests = {limit, remaining, reset_ms}, tokens = {the same}}}
--
-- provider hash  requests_tat tokens_tat requests_full tokens_full requests_window tokens_window
--                line_ms (when the next one in line may come)
-- model hash     the same seven for limits that were learned; requests_limit requests_learned tokens_limit
--                tokens_learned (ms); cooldown_ms cooldown_reason paused_ms (both: until)
-- slots zset     call id -> end of its lease, ms
-- TTL            hashes an hour, and longer than the cooldown; slots a day
--
-- The buckets are GCRA and pace the calls: one time (tat) says when a bucket is full again. Its rate is
-- limit / (60 s + burst), and it holds burst seconds of that: a full bucket and 60 s of refill are the limit. (A bucket
-- holds one request at least.) A call with more tokens than the bucket holds waits until it is full, and leaves a debt.
-- Written times are rounded up, so that no rounding lets more through.
-- *_full is the latest time at which a call found the bucket full: what was reserved before then, time has paid
-- back already, and giving it back again would let it through twice. Of what was reserved later time may have paid
-- back a part, and the bucket does not know which; so it paces, and cannot vouch for the limit.
--
-- The windows do: *_window is 'slot:count slot:count ...', what was taken in each slot of five seconds (its number
-- since 1970), by the time of admission; at settlement the slot of the admission is put right. The last 60 s, in whole slots,
-- and the call must come to no more than the limit, so that no 60 s see more, in tokens as used, or as reserved while
-- the call runs. Two go beyond: a call that used more than it had reserved, and one that is larger than the limit
-- itself; that one waits until the window is empty, or it would wait for ever, and all others wait until it has left.
-- (Calls from before a limit was learned are not in its window.)
local LIMITS = {
  minute_ms = 60000,
  hour_ms = 3600000,
  day_ms = 86400000,
  slot_poll_ms = 500, -- a slot comes free when a call ends, which nobody can foretell
  learned_ms = 600000, -- how long a limit is believed
  relearn_ms = 60000, -- the same limit is not written more often
  longest_pause_ms = 120000,
  longest_cooldown_ms = 604800000,
  longest_line_ms = 120000, -- so far ahead calls are told when to come back
  slot_ms = 5000, -- of a window
  window_slots = 12, -- before the present one
  window_size = 1024, -- no text of ours is longer
  highest_count = 1e14,
}

-- What was taken in the slots that the last minute touches, the sum, and the slots' words as they were. Slots ahead are
-- of a clock that went back.
local function limits_window(text, present)
  local window, sum, words = {}, 0, {}
  if not text or #text > LIMITS.window_size then
    return window, sum, words
  end
  for word in string.gmatch(text, '%S+') do
    local slot, count = string.match(word, '^(%d+):(%d+)$')
    slot, count = number(slot, 0), number(count, math.huge)
    if count > LIMITS.highest_count then -- not ours
      return {}, 0, {}
    end
    if math.abs(slot - present) <= LIMITS.window_slots and not window[slot] then
      window[slot], sum, words[slot] = count, sum + count, word
    end
  end
  return window, sum, words
end

local function limits_bucket(name, limit, burst_ms, least, now, tat, full, window)
  limit = number(limit, 0)
  if limit <= 0 then
    return nil
  end
  burst_ms = math.min(math.max(number(burst_ms, 2000), 1), LIMITS.minute_ms)
  local unit_ms = (LIMITS.minute_ms + burst_ms) / limit
  tat = number(tat, now)
  if tat > now + LIMITS.hour_ms then -- no debt goes that far: not ours
    tat = now
  end
  full = number(full, 0)
  local present = math.floor(now / LIMITS.slot_ms)
  local slots, taken, words = limits_window(window, present)
  return {
    name = name,
    limit = limit,
    present = present,
    window = slots,
    taken = taken,
    words = words,
    unit_ms = unit_ms,
    holds_ms = math.max(burst_ms, least * unit_ms),
    tat = math.max(tat, now),
    found_full = tat <= now,
    full_ms = math.max(now - tat, 0),
    full = full <= now and full or 0,
  }
end

local function limits_ready_at(bucket, amount)
  local ready_at = bucket.tat - (bucket.holds_ms - math.min(amount * bucket.unit_ms, bucket.holds_ms))
  local taken, slot = bucket.taken, bucket.present - LIMITS.window_slots
  while taken > 0 and taken + amount > bucket.limit and slot <= bucket.present + LIMITS.window_slots do
    if bucket.window[slot] then
      taken = taken - bucket.window[slot]
      ready_at = math.max(ready_at, (slot + 1) * LIMITS.slot_ms + LIMITS.minute_ms) -- then the slot has left
    end
    slot = slot + 1
  end
  return ready_at
end

local function limits_move(bucket, amount, now)
  local tat = math.min(math.max(bucket.tat + amount * bucket.unit_ms, now), now + LIMITS.hour_ms - 1)
  return bucket.name .. '_tat', string.format('%.3f', math.ceil(tat * 1000) / 1000)
end

local function limits_count(bucket, amount, at)
  local slot, words = math.floor(at / LIMITS.slot_ms), {}
  local count = math.min(math.max((bucket.window[slot] or 0) + amount, 0), LIMITS.highest_count)
  bucket.words[slot] = count > 0 and integer(slot) .. ':' .. integer(math.ceil(count)) or nil
  for one = bucket.present - LIMITS.window_slots, bucket.present + LIMITS.window_slots do
    words[#words + 1] = bucket.words[one] -- none for a slot in which nothing was taken
  end
  return bucket.name .. '_window', table.concat(words, ' ')
end

local function limits_learned(limit, learned, now)
  local age_ms = now - number(learned, -math.huge)
  limit = number(limit, 0)
  if limit > 0 and age_ms < LIMITS.learned_ms and age_ms > -LIMITS.longest_pause_ms then
    return limit, age_ms
  end
end

local function limits_until(text, now, longest_ms)
  local at = number(text, 0)
  return at <= now + longest_ms and at or 0
end

-- Both buckets of a hash, as far as there are such limits.
local function limits_buckets(found, requests, tokens, burst_ms, now)
  return {
    requests = limits_bucket('requests', requests, burst_ms, 1, now, found[1], found[2], found[3]),
    tokens = limits_bucket('tokens', tokens, burst_ms, 0, now, found[4], found[5], found[6]),
  }
end

local function limits_model(model_key, burst_ms, now)
  local found = read(model_key, 'requests_tat', 'requests_full', 'requests_window', 'tokens_tat', 'tokens_full',
    'tokens_window', 'cooldown_ms', 'paused_ms', 'requests_limit', 'requests_learned', 'tokens_limit', 'tokens_learned')
  local model = {
    cooldown = limits_until(found[7], now, LIMITS.longest_cooldown_ms),
    paused = limits_until(found[8], now, LIMITS.longest_pause_ms),
    requests = { limits_learned(found[9], found[10], now) },
    tokens = { limits_learned(found[11], found[12], now) },
  }
  model.buckets = limits_buckets(found, model.requests[1], model.tokens[1], burst_ms, now)
  return model
end

local function limits_provider(provider_key, limits, now)
  if not limits.requests_per_minute and not limits.tokens_per_minute then
    return {}
  end
  local found = read(provider_key, 'requests_tat', 'requests_full', 'requests_window', 'tokens_tat', 'tokens_full',
    'tokens_window')
  return limits_buckets(found, limits.requests_per_minute, limits.tokens_per_minute, limits.burst_ms, now)
end

local function limits_look(provider_key, model_key, slots_key, now, want)
  local tokens = math.max(number(want.tokens, 0), 0)
  local look = { allowed = true, retry_at = now, tokens = tokens }
  local function hold(at, reason, line_key, step_ms)
    if at > look.retry_at then
      look.allowed, look.retry_at, look.reason = false, math.ceil(at), reason
      look.line_key, look.step_ms = line_key, step_ms
    end
  end
  local function hold_for(key, buckets, requests_reason, tokens_reason)
    for name, amount in pairs({ requests = 1, tokens = tokens }) do
      local bucket = buckets[name]
      if bucket then
        local reason = name == 'requests' and requests_reason or tokens_reason
        hold(limits_ready_at(bucket, amount), reason, key, amount * bucket.unit_ms)
      end
    end
  end
  local model = limits_model(model_key, want.burst_ms, now)
  hold(model.cooldown, 'cooldown')
  look.provider = { key = provider_key, buckets = limits_provider(provider_key, want, now) }
  look.model = { key = model_key, buckets = {} }
  look.slots_key = slots_key
  hold_for(provider_key, look.provider.buckets, 'requests_per_minute', 'tokens_per_minute')
  if want.learn ~= false then
    look.model.buckets = model.buckets
    hold(model.paused, 'provider_limit')
    hold_for(model_key, model.buckets, 'provider_limit', 'provider_limit')
  end
  local slots = number(want.concurrency, 0)
  if slots > 0 then
    own(slots_key, 'zset')
    local from, to = '(' .. integer(now), integer(now + LIMITS.day_ms)
    if redis.call('ZCOUNT', slots_key, from, to) >= slots then
      local first = redis.call('ZRANGEBYSCORE', slots_key, from, to, 'WITHSCORES', 'LIMIT', 0, 1)
      hold(math.min(number(first[2], now), now + LIMITS.slot_poll_ms), 'concurrency')
    end
  end
  if look.line_key then
    local line = limits_until(read(look.line_key, 'line_ms')[1], now, LIMITS.longest_line_ms)
    look.retry_at = math.ceil(math.max(look.retry_at, line))
  end
  return look
end

local function limits_line_up(look, now)
  if look.line_key then
    local line = math.min(look.retry_at + look.step_ms, now + LIMITS.longest_line_ms)
    redis.call('HSET', look.line_key, 'line_ms', integer(math.ceil(line)))
    redis.call('PEXPIRE', look.line_key, LIMITS.hour_ms)
  end
end

local function limits_take(look, now, call_id, lease_ms)
  for _, hash in ipairs({ look.provider, look.model }) do
    local fields, nobody_came = {}, true
    for name, amount in pairs({ requests = 1, tokens = look.tokens }) do
      local bucket = hash.buckets[name]
      if bucket then
        fields[#fields + 1], fields[#fields + 2] = limits_move(bucket, amount, now)
        fields[#fields + 1], fields[#fields + 2] = limits_count(bucket, amount, now)
        nobody_came = nobody_came and bucket.found_full and bucket.full_ms >= amount * bucket.unit_ms
        if bucket.found_full then
          fields[#fields + 1], fields[#fields + 2] = name .. '_full', integer(now)
        end
      end
    end
    if #fields > 0 then
      redis.call('HSET', hash.key, unpack(fields))
      redis.call('PEXPIRE', hash.key, LIMITS.hour_ms)
      if nobody_came then -- full for longer than a turn lasts: those in line were cancelled, or gave up
        redis.call('HDEL', hash.key, 'line_ms')
      end
    end
  end
  own(look.slots_key, 'zset')
  redis.call('ZREMRANGEBYSCORE', look.slots_key, '-inf', integer(now))
  redis.call('ZADD', look.slots_key, integer(now + math.min(lease_ms, LIMITS.day_ms)), call_id)
  redis.call('PEXPIRE', look.slots_key, LIMITS.day_ms)
end

-- The fields that change when a call turns out to have needed more or less than was reserved.
local function limits_correct(fields, buckets, settled, now)
  local reserved = math.max(number(settled.reserved_tokens, 0), 0)
  local change = {
    requests = settled.released and -1 or 0,
    tokens = settled.released and -reserved or math.max(number(settled.used_tokens, reserved), 0) - reserved,
  }
  for name, amount in pairs(change) do
    local bucket = buckets[name]
    if bucket and amount ~= 0 then
      local admitted_ms = number(settled.admitted_ms, nil)
      if amount > 0 or bucket.full <= (admitted_ms or math.huge) then
        fields[#fields + 1], fields[#fields + 2] = limits_move(bucket, amount, now)
      end
      if amount > 0 or admitted_ms then
        fields[#fields + 1], fields[#fields + 2] = limits_count(bucket, amount, admitted_ms or now)
      end
    end
  end
end

-- The fields that change by what the provider's headers said; returns the time until which to pause.
local function limits_learn(fields, model, observed, now)
  local pause = 0
  for _, name in ipairs({ 'requests', 'tokens' }) do
    local seen = type(observed[name]) == 'table' and observed[name] or {}
    local limit, reset_ms = number(seen.limit, 0), number(seen.reset_ms, 0)
    local known, age_ms = unpack(model[name])
    if limit > 0 and (limit ~= known or age_ms > LIMITS.relearn_ms) then
      for _, text in ipairs({ name .. '_limit', integer(limit), name .. '_learned', integer(now) }) do
        fields[#fields + 1] = text
      end
      if not known then -- nothing was reserved from it yet, so nothing of it comes back
        fields[#fields + 1], fields[#fields + 2] = name .. '_full', integer(now)
      end
    end
    if number(seen.remaining, 1) == 0 and reset_ms > 0 then
      pause = math.max(pause, now + math.min(reset_ms, LIMITS.longest_pause_ms))
    end
  end
  return pause
end

local function limits_settle(provider_key, model_key, slots_key, now, settled)
  redis.pcall('ZREM', slots_key, settled.call)
  local fields = {}
  limits_correct(fields, limits_provider(provider_key, settled, now), settled, now)
  if #fields > 0 then
    redis.call('HSET', provider_key, unpack(fields))
    redis.call('PEXPIRE', provider_key, LIMITS.hour_ms)
  end
  local model = limits_model(model_key, settled.burst_ms, now)
  fields = {}
  limits_correct(fields, model.buckets, settled, now)
  local cooldown = now + math.min(math.max(number(settled.cooldown_ms, 0), 0), LIMITS.longest_cooldown_ms)
  if cooldown > now and cooldown > model.cooldown then
    local reason = type(settled.reason) == 'string' and settled.reason or ''
    for _, text in ipairs({ 'cooldown_ms', integer(cooldown), 'cooldown_reason', reason }) do
      fields[#fields + 1] = text
    end
    model.cooldown = cooldown
  end
  if type(settled.observed) == 'table' then
    local pause = limits_learn(fields, model, settled.observed, now)
    if pause > model.paused then
      fields[#fields + 1], fields[#fields + 2] = 'paused_ms', integer(pause)
    end
  end
  if #fields > 0 then
    redis.call('HSET', model_key, unpack(fields))
    redis.call('PEXPIRE', model_key, integer(LIMITS.hour_ms + math.max(model.cooldown - now, 0)))
  end
end
