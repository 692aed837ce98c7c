-- ADMIT: may a call be made now, and to which of the candidates? The first that everything allows is taken:
-- breaker, cooldown, rate limits, slots, credential and budgets together, and the call's intent is written.
-- Nothing is written for a candidate that is refused, except that who is told to come back when a rate limit allows
-- it stands in line: thousands that are refused together do not come back together. Repeatable: the same call again gets the same answer.
--
-- KEYS  1 call  2 open calls  3 circuits  4 leases of the workers  5 the job's calls; for each candidate: circuit of its
--       tier, circuit of its provider, limits of the provider, limits of the model (by this credential), slots of the
--       provider, credential; then the budgets
-- ARGV  1 JSON: {call, job, worker, lease (of the worker that runs the job; absent: no worker's), lease_ms (of the
--       call), rules (see breaker.lua), recheck_ms (see credentials.lua), candidates: [{ref, want (see limits.lua),
--       quota (see credentials.lua; absent: an API key), estimate_nano,
--       budgets: [{key: place among the budgets, want (see budget.lua)}], intent: names and values of the fields that
--       the call can be settled by where its worker cannot do it any more (see intent.py)}]}
-- Returns {'admitted', place of the candidate from 0, now_ms, admitted_ms, 'tier' | 'provider' (the circuit that the call
--      probes) or '', refusals of the candidates before it, as below}
--      or {'settled'} when the call has been settled already, or its worker was found dead
--      or {'refused', now_ms, {'wait' | 'budget', retry_at_ms, reason, left_nano, or 'provider' where it is the provider's
--      own circuit, or '', place of the budget, or -1} for each candidate}
-- TTL   call: none while it is open, because what it has reserved can only be settled by it; SETTLE sets one. The job's
--       calls: 63 days, as budgets have, until SETTLE sets another
local request = cjson.decode(ARGV[1])
local now = now_in_ms()
local KEYS_PER_CANDIDATE = 6
local SOON_MS = 1000 -- when to look again for what may end at any time: a probe, or a call that has reserved money
local LEASE_MS = 500 -- when to look again for a worker's lease, which may come back if it was only late
local JOB_CALLS_S = 5443200
local first_candidate = 6
local first_budget = first_candidate - 1 + #request.candidates * KEYS_PER_CANDIDATE

local state, place, admitted_ms = unpack(read(KEYS[1], 'state', 'place', 'admitted_ms'))
place = number(place, -1)
if state == 'open' and place >= 0 and place < #request.candidates then
  return { 'admitted', place, now, number(admitted_ms, now), '', {} }
elseif state == 'settled' or state == 'orphaned' then
  return { 'settled' }
end

if request.lease and number(redis.pcall('ZSCORE', KEYS[4], request.lease), 0) <= now then
  local refusals = {}
  for index in ipairs(request.candidates) do
    refusals[index] = { 'wait', integer(now + LEASE_MS), 'lease', '', -1 }
  end
  return { 'refused', now, refusals }
end

local function look(candidate, base)
  local looked = { budgets = {} }
  looked.circuit = breaker_look(KEYS[base + 1], now, request.rules)
  looked.provider = breaker_look(KEYS[base + 2], now, request.rules)
  looked.limits = limits_look(KEYS[base + 3], KEYS[base + 4], KEYS[base + 5], now, candidate.want)
  looked.credential = credential_look(KEYS[base + 6], now, {
    tokens = candidate.want.tokens, recheck_ms = request.recheck_ms, quota = candidate.quota,
  })
  for _, one in ipairs(candidate.budgets) do
    local budget = budget_look(KEYS[first_budget + one.key + 1], now, one.want)
    if budget.reason == 'budget_reserved' then
      looked.retry_at = now + SOON_MS
      looked.refusal = { 'wait', integer(looked.retry_at), budget.reason, '', -1 }
    elseif not budget.allowed then
      looked.refusal = { 'budget', integer(budget.resets_at), budget.reason, integer(budget.left_nano), one.key }
      return looked
    end
    looked.budgets[#looked.budgets + 1] = budget
  end
  for _, part in ipairs({ looked.circuit, looked.provider, looked.limits, looked.credential }) do
    if part.reason == 'probing' then
      part.retry_at = math.min(part.retry_at, now + SOON_MS)
    end
    if not part.allowed and (not looked.refusal or part.retry_at > looked.retry_at) then
      looked.retry_at = part.retry_at
      looked.refusal = { 'wait', integer(part.retry_at), part.reason, part == looked.provider and 'provider' or '', -1 }
    end
  end
  return looked
end

local refusals, soonest = {}, nil
for index, candidate in ipairs(request.candidates) do
  local base = first_candidate - 1 + (index - 1) * KEYS_PER_CANDIDATE
  local looked = look(candidate, base)
  if not looked.refusal then
    local lease_ms = request.lease_ms
    local of_provider = breaker_take(looked.provider, now, request.call, lease_ms, request.rules)
    local taken = breaker_take(looked.circuit, now, request.call, lease_ms, request.rules)
    limits_take(looked.limits, now, request.call, lease_ms)
    local covers, intent = credential_take(looked.credential, now, lease_ms), candidate.intent
    if covers then
      intent[#intent + 1], intent[#intent + 2] = 'covers', covers
    end
    local windows = {}
    for at, budget in ipairs(looked.budgets) do
      budget_take(budget, now)
      windows[at] = budget.window
    end
    redis.call('HSET', KEYS[1], 'state', 'open', 'job', request.job, 'worker', request.worker, 'ref', candidate.ref,
      'place', index - 1, 'generation', integer(taken),
      'probed', looked.provider.probe and integer(of_provider) or '', 'admitted_ms', integer(now), 'tokens', candidate.want.tokens or 0,
      'estimate_nano', candidate.estimate_nano and integer(candidate.estimate_nano) or '', 'windows', cjson.encode(windows), unpack(intent))
    redis.call('PERSIST', KEYS[1]) -- whatever was found there
    own(KEYS[2], 'zset')
    redis.call('ZADD', KEYS[2], integer(now + lease_ms), request.call)
    if request.job ~= '' then
      own(KEYS[5], 'list')
      redis.call('RPUSH', KEYS[5], request.call)
      redis.call('EXPIRE', KEYS[5], JOB_CALLS_S)
    end
    local probes = looked.circuit.probe and 'tier' or looked.provider.probe and 'provider' or ''
    return { 'admitted', index - 1, now, now, probes, refusals }
  end
  refusals[index] = looked.refusal
  if looked.retry_at and (not soonest or looked.retry_at < soonest.retry_at) then
    soonest = looked
  end
end
if soonest then
  limits_line_up(soonest.limits, now)
end
return { 'refused', now, refusals }
