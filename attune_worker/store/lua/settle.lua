-- SETTLE: what a call did, written once however often it arrives: ledger, breaker, limits, credential, budgets and
-- telemetry.
-- A call without an intent (it was made while Redis was away) is charged in full and counts all the same. One that
-- ended a while ago tells nothing of now: see `age` below. One whose intent has gone and was written longer ago than a
-- settled call is known was settled before: an open one is never forgotten.
-- A call whose worker died is settled as orphaned by another: its place is free, and what was reserved counts as spent.
-- If the worker tells after all what the call did, that corrects it, once.
--
-- KEYS  1 call  2 open calls  3 circuits  4 circuit of the tier  5 circuit of the provider  6 limits of the provider
--       7 limits of the model  8 slots of the provider  9 stats of the day  10 evidence of the stage
--       11 evidence of the workflow  12 evidence of the fleet  13 stages  14 ledger  15 costs of the day
--       16 the job's calls  17 credential; then the budgets
-- ARGV  1 JSON: {call, ref, kept_s, outcome: succeeded | failed | released (the call was never made) | orphaned,
--       ended_ms (when it ended, by this clock), intent_ms (when its intent was written; absent: it has none, or it is
--       not known), names (provider and tier as JSON), rules, result (see breaker.lua), limits (see limits.lua),
--       credential: {name, and what credentials.lua is told},
--       budgets: [{per, limit_nano, reserved_nano, cost_nano}], cost_nano, call_of (what
--       telemetry.lua counts; absent when released or orphaned), kept: names and values of further fields of the call,
--       for its job's history, sums: {group, estimate_nano, expected_nano, input,
--       output} and
--       keep (see ledger.lua)}
--       2 the record of the call, as JSON (see ledger.py), kept as it is
-- Returns {'settled' | 'again' | 'other' (released, but leave was given for another candidate: nothing is done), what
--       became of the circuit or '', {soft budgets that were passed just now}, what became of the provider's circuit,
--       and of the credential}
-- TTL   call: kept_s, in which a second settlement is known for one; the job's calls: as long as the last of them
-- How much of a wait that began with the end of the call is still to come; nil when it is over.
local function left_of(wait_ms, age_ms)
  local left = number(wait_ms, 0) - age_ms
  return left > 0 and left or nil
end

local request = cjson.decode(ARGV[1])
local now = now_in_ms()
local OLD_MS = 5000
local CLOCKS_MS = 1000 -- less than that may as well be what the worker's idea of our clock is wrong by
local age = now - number(request.ended_ms, now)
age = age < CLOCKS_MS and 0 or age
local old = age > OLD_MS
local state, ref, generation, probed, tokens, windows, admitted_ms, taken_by, covers = unpack(read(
  KEYS[1], 'state', 'ref', 'generation', 'probed', 'tokens', 'windows', 'admitted_ms', 'credential', 'covers'))
local outcome, was_orphaned = request.outcome, state == 'orphaned'
local orphaned = outcome == 'orphaned'
local forgotten = not state and now - number(request.intent_ms, now) > 1000 * request.kept_s
if state == 'settled' or forgotten or (orphaned and state ~= 'open') then
  return { 'again', '', {}, '', '' }
end
local admitted = state == 'open' or was_orphaned
local credential = request.credential
if admitted and outcome == 'released' and (ref ~= request.ref or (taken_by or '') ~= (credential.name or '')) then
  return { 'other', '', {}, '', '' }
end
redis.call('HSET', KEYS[1], 'state', orphaned and 'orphaned' or 'settled', 'outcome', outcome, 'settled_ms', integer(now),
  'cost_nano', request.cost_nano and integer(request.cost_nano) or '', unpack(request.kept))
redis.call('EXPIRE', KEYS[1], request.kept_s)
-- first, so that no error counts a call twice, or leaves it there for good

local sums = request.sums
sums.record, sums.outcome, sums.was_orphaned, sums.cost_nano = ARGV[2], outcome, was_orphaned, request.cost_nano
ledger_settle({ ledger = KEYS[14], costs = KEYS[15] }, now, sums, request.keep)

local result = request.result
result.call = request.call
result.generation = admitted and number(generation, nil) or nil
result.retry_after_ms = left_of(result.retry_after_ms, age)
local event, of_provider
if admitted or not old then -- the circuit knows nothing of a call without an intent, so nobody waits for its result
  event = breaker_settle(KEYS[4], now, result, request.rules)
end
if admitted and number(probed, nil) then -- it was the probe of the provider's own circuit, too
  result.generation = number(probed, nil)
  of_provider = breaker_settle(KEYS[5], now, result, request.rules)
end
if event or (result.outcome == 'failure' and (admitted or not old)) then
  breaker_list(KEYS[3], request.names)
end

local limits = request.limits
limits.call = request.call
limits.admitted_ms = admitted and number(admitted_ms, nil) or nil
limits.reserved_tokens = admitted and number(tokens, 0) or 0
limits.cooldown_ms = left_of(limits.cooldown_ms, age)
limits.observed = not old and limits.observed or nil
limits.released = admitted and outcome == 'released'
limits_settle(KEYS[6], KEYS[7], KEYS[8], now, limits)

credential.admitted, credential.released, credential.counted = admitted, outcome == 'released', was_orphaned
credential.reserved_tokens = admitted and number(tokens, 0) or credential.reserved_tokens
credential.used_tokens, credential.succeeded = limits.used_tokens, outcome == 'succeeded'
credential.admitted_ms, credential.covers, credential.at = limits.admitted_ms, covers or nil, now - age
local of_credential = credential_settle(KEYS[17], now, credential)

local known, window_of = pcall(cjson.decode, windows or '[]')
local passed = {}
for index, budget in ipairs(request.budgets) do
  local window = admitted and known and type(window_of) == 'table' and window_of[index]
  if type(window) ~= 'string' or not string.match(window, '^%d%d%d%d%-%d%d') then -- nothing was reserved, so it is all of this window
    budget.window = budget_window(now - age, budget.per)
    budget.cost_nano = budget.cost_nano or budget.reserved_nano
    budget.reserved_nano = 0
  else
    budget.window = window
    budget.counted = was_orphaned
  end
  if budget_settle(KEYS[17 + index], now, budget) then
    passed[#passed + 1] = index - 1
  end
end

local call = request.call_of
if call then
  local stage_n, workflow_n, fleet_n = telemetry_settle({
    stats = KEYS[9], stage = KEYS[10], workflow = KEYS[11], fleet = KEYS[12], stages = KEYS[13],
  }, now, call)
  redis.call('HSET', KEYS[1], 'ref', call.ref, 'workflow', call.workflow, 'stage', call.stage, 'day', call.day,
    'score', call.score or '', 'n', stage_n or '', 'n_workflow', workflow_n or '', 'n_fleet', fleet_n or '')
end
redis.call('HDEL', KEYS[1], 'lease', 'tenant', 'budgets', 'place')
if not orphaned then -- what an orphan's own settlement would still need
  redis.call('HDEL', KEYS[1], 'windows', 'generation', 'probed', 'covers')
end
if redis.pcall('LINDEX', KEYS[16], -1) == request.call then -- a later one may still be open
  redis.call('EXPIRE', KEYS[16], request.kept_s)
end
own(KEYS[2], 'zset')
redis.call('ZREM', KEYS[2], request.call)
return { 'settled', event or '', passed, of_provider or '', of_credential or '' }
