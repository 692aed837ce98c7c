-- Fragment: the cost record of every call, and the sums of each day. Needs values.lua and telemetry.lua.
--
-- ledger_settle(keys, now, call, keep)   once for each way a call can be settled, by care of the caller
--   keys  {ledger, costs (of the day of its admission)}
--   call  {record (its JSON, kept as it is), outcome = 'succeeded' | 'failed' | 'orphaned' (its worker died, nobody knows
--         what it did) | 'released' (it was never made), was_orphaned (so it was settled before, and this corrects it),
--         group (of the sums), cost_nano (nil: unknown), estimate_nano (what was reserved; nil: no price is known),
--         expected_nano (what it should have cost; nil: no price is known), input, output (tokens)}
--   keep  {ledger_ms, records, sums_s}: how long, how many, and how long the sums
--
-- ledger STREAM  'record' = JSON; with 'corrects' = 'orphaned' where an entry of this call came before. A call that
--                was never made is there only as such a correction
-- costs  HASH    'groups' (how many); for each '<group>|calls', 'cost_nano', 'unknown' (calls that may have cost
--                something, nobody knows what), 'unknown_nano' (at most, by what was reserved), 'orphaned',
--                'orphaned_nano' (the same of calls whose worker died), 'unpriced' (of both, those without an
--                estimate), 'input', 'output'; of the calls that succeeded and of which both what they should have
--                cost and what they did is known 'compared' (how many), 'expected_nano', 'compared_nano' and 'off_nano'
--                (the sum of the differences, each without its sign). Beyond the 20,000th group all others are '~other'
-- TTL   ledger: keep.ledger_ms after the last call, its entries about as long; costs: keep.sums_s after the last write
local LEDGER = { most_groups = 20000, other = '~other' }

local function ledger_write(key, now, call, keep)
  local fields = { 'record', call.record }
  if call.was_orphaned then
    fields[3], fields[4] = 'corrects', 'orphaned'
  end
  own(key, 'stream')
  redis.call('XADD', key, 'MAXLEN', '~', integer(keep.records), '*', unpack(fields))
  redis.call('XTRIM', key, 'MINID', '~', integer(math.max(now - keep.ledger_ms, 0)))
  redis.call('PEXPIRE', key, integer(keep.ledger_ms))
end

local function ledger_group(key, group)
  if redis.call('HEXISTS', key, group .. '|calls') == 1 then
    return group
  elseif number(redis.call('HGET', key, 'groups'), 0) >= LEDGER.most_groups then
    return LEDGER.other
  end
  telemetry_count(key, 'groups', 1)
  return group
end

-- Count calls whose cost nobody knows, or take back that they are such.
local function ledger_uncertain(key, prefix, word, estimate_nano, sign)
  telemetry_count(key, prefix .. word, sign)
  if estimate_nano then
    telemetry_count(key, prefix .. word .. '_nano', sign * estimate_nano)
  else
    telemetry_count(key, prefix .. 'unpriced', sign)
  end
end

-- Hold what a call cost against what it should have cost.
local function ledger_compare(key, prefix, cost_nano, expected_nano)
  telemetry_count(key, prefix .. 'compared', 1)
  telemetry_count(key, prefix .. 'expected_nano', expected_nano)
  telemetry_count(key, prefix .. 'compared_nano', cost_nano)
  telemetry_count(key, prefix .. 'off_nano', math.abs(cost_nano - expected_nano))
end

local function ledger_sum(key, call, keep)
  own(key, 'hash')
  local prefix = ledger_group(key, call.group) .. '|'
  local calls = (call.outcome == 'released' and 0 or 1) - (call.was_orphaned and 1 or 0)
  local estimate_nano, cost_nano = number(call.estimate_nano, nil), number(call.cost_nano, nil)
  local expected_nano = number(call.expected_nano, nil)
  telemetry_count(key, prefix .. 'calls', calls)
  if call.was_orphaned then
    ledger_uncertain(key, prefix, 'orphaned', estimate_nano, -1)
  end
  if call.outcome == 'orphaned' then
    ledger_uncertain(key, prefix, 'orphaned', estimate_nano, 1)
  elseif call.outcome ~= 'released' then
    if cost_nano then
      telemetry_count(key, prefix .. 'cost_nano', cost_nano)
      if expected_nano and call.outcome == 'succeeded' then
        ledger_compare(key, prefix, cost_nano, expected_nano)
      end
    else
      ledger_uncertain(key, prefix, 'unknown', estimate_nano, 1)
    end
    telemetry_count(key, prefix .. 'input', number(call.input, 0))
    telemetry_count(key, prefix .. 'output', number(call.output, 0))
  end
  redis.call('EXPIRE', key, integer(keep.sums_s))
end

local function ledger_settle(keys, now, call, keep)
  if call.outcome ~= 'released' or call.was_orphaned then
    ledger_write(keys.ledger, now, call, keep)
    ledger_sum(keys.costs, call, keep)
  end
end
