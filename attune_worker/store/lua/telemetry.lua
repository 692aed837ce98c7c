-- Fragment: what the fleet learns from a call. Needs values.lua; used by settle and feedback.
--
-- evidence_read(key, ref)            n (outcomes of the place so far), the model's evidence as a table, its sizes as text
-- evidence_write(key, ref, n, e, sizes)   writes them back; the sizes stay as they are where they are nil
-- evidence_observe(key, ref, half_life, score, cost_nano, sized)   counts one outcome, and the lengths of the call `sized`
--                                    where there is one; returns the place's new n
--   evidence  HASH  n; judged; and for each model 'provider/id' = JSON
--                   [successes, failures, seen, calls, cost_nano, priced, recent]. The arithmetic is that of
--                   telemetry/evidence.py, which says what the numbers mean. Written with 17 digits, so that
--                   nothing is lost between two calls.
-- sizes_after(text, call)            the sizes with the lengths of one more prompt and its answer
--   evidence  HASH  for each model '<ref>|sizes' = JSON [calls, weight, bytes, input, output], as telemetry/sizes.py has
--                   it; of calls whose tokens are known, whatever they say of the model as such
-- telemetry_count(key, field, n)     HINCRBY that begins again from 0 where the field holds no integer; never goes below 0
--                                    by that
-- telemetry_settle(keys, now, call)  counts a call; returns n of the stage, of the workflow and of the fleet,
--                                    each false where the call was no evidence
--   keys  {stats, stage, workflow, fleet, stages}
--   call  {ref, names (JSON of workflow and stage), kind = 'success' | 'failure' | 'other', score (0 to 1, or
--          nil: says nothing about the model), latency_ms, cost_nano (nil: unknown), input, output (tokens),
--          bytes (of the prompt, where its tokens are known; nil: its lengths are not counted), half_life = {stage,
--          workflow, fleet} in outcomes}
--   stats   HASH  '<ref>|calls', 'succeeded', 'failed', 'cost_nano', 'unpriced', 'input', 'output'; of the calls
--                 that succeeded 'latency_ms' (sum) and 'h<i>' (how many took at most 25 ms * 2^(i/2))
--   stages  ZSET  names, by the time of their last call (ms); at most 10,000, none older than 35 days
-- TTL  35 days for all of them
local function evidence_read(key, ref)
  local values = read(key, 'n', ref, ref .. '|sizes')
  local n = math.floor(math.max(0, number(values[1], 0)))
  local empty = { successes = 0, failures = 0, seen = 0, calls = 0, cost_nano = 0, priced = 0, recent = '' }
  local parsed, list = pcall(cjson.decode, values[2] or '')
  if not parsed or type(list) ~= 'table' then
    return n, empty, values[3]
  end
  for i = 1, 6 do
    if type(list[i]) ~= 'number' or not number(list[i]) or list[i] < 0 then
      return n, empty, values[3]
    end
  end
  local recent = list[7]
  if list[3] > n or type(recent) ~= 'string' or #recent > 20 or not recent:match('^[01]*$') then
    return n, empty, values[3]
  end
  return n, {
    successes = list[1], failures = list[2], seen = list[3], calls = math.floor(list[4]),
    cost_nano = list[5], priced = list[6], recent = recent,
  }, values[3]
end

local function evidence_write(key, ref, n, e, sizes)
  local text = string.format('[%.17g,%.17g,%.17g,%.0f,%.17g,%.17g,"%s"]',
    e.successes, e.failures, e.seen, e.calls, e.cost_nano, e.priced, e.recent)
  if sizes then
    redis.call('HSET', key, 'n', integer(n), ref, text, ref .. '|sizes', sizes)
  else
    redis.call('HSET', key, 'n', integer(n), ref, text)
  end
  redis.call('EXPIRE', key, 3024000)
end

local function sizes_after(text, call)
  local parsed, list = pcall(cjson.decode, text or '')
  local sums = { 0, 0, 0, 0, 0 }
  if parsed and type(list) == 'table' and #list == 5 then
    for i = 1, 5 do
      if type(list[i]) ~= 'number' or not number(list[i]) or list[i] < 0 then
        sums = { 0, 0, 0, 0, 0 }
        break
      end
      sums[i] = list[i]
    end
  end
  local fading = 0.5 ^ (1 / 300)
  return string.format('[%.0f,%.17g,%.17g,%.17g,%.17g]',
    sums[1] + 1, sums[2] * fading + 1, sums[3] * fading + call.bytes, sums[4] * fading + number(call.input, 0),
    sums[5] * fading + number(call.output, 0))
end

local function evidence_observe(key, ref, half_life, score, cost_nano, sized)
  local n, e, sizes = evidence_read(key, ref)
  n = n + 1
  local fading = 0.5 ^ ((n - e.seen) / half_life)
  evidence_write(key, ref, n, {
    successes = e.successes * fading + score,
    failures = e.failures * fading + 1 - score,
    seen = n,
    calls = e.calls + 1,
    cost_nano = e.cost_nano * fading + (cost_nano or 0),
    priced = e.priced * fading + (cost_nano and 1 or 0),
    recent = string.sub(e.recent .. (score >= 0.5 and '1' or '0'), -20),
  }, sized and sizes_after(sizes, sized))
  return n
end

local function telemetry_count(key, field, n)
  if n ~= 0 and type(redis.pcall('HINCRBY', key, field, integer(n))) == 'table' then -- an error
    redis.call('HSET', key, field, integer(math.max(n, 0)))
  end
end

local function telemetry_settle(keys, now, call)
  local cost_nano = type(call.cost_nano) == 'number' and call.cost_nano or nil
  local prefix = call.ref .. '|'
  own(keys.stats, 'hash')
  telemetry_count(keys.stats, prefix .. 'calls', 1)
  telemetry_count(keys.stats, prefix .. (cost_nano and 'cost_nano' or 'unpriced'), cost_nano or 1)
  telemetry_count(keys.stats, prefix .. 'input', number(call.input, 0))
  telemetry_count(keys.stats, prefix .. 'output', number(call.output, 0))
  if call.kind == 'success' then
    local latency_ms = math.max(0, number(call.latency_ms, 0))
    local bucket = math.ceil(2 * math.log(math.max(latency_ms, 25) / 25) / math.log(2) - 1e-9)
    telemetry_count(keys.stats, prefix .. 'succeeded', 1)
    telemetry_count(keys.stats, prefix .. 'latency_ms', latency_ms)
    telemetry_count(keys.stats, prefix .. 'h' .. integer(math.min(math.max(0, bucket), 30)), 1)
  elseif call.kind == 'failure' then
    telemetry_count(keys.stats, prefix .. 'failed', 1)
  end
  redis.call('EXPIRE', keys.stats, 3024000)

  own(keys.stages, 'zset')
  if redis.call('ZADD', keys.stages, integer(now), call.names) == 1 then
    redis.call('ZREMRANGEBYSCORE', keys.stages, '-inf', integer(now - 3024000000))
    redis.call('ZREMRANGEBYRANK', keys.stages, 0, -10001)
  end
  redis.call('EXPIRE', keys.stages, 3024000)

  local sized = call.kind == 'success' and type(call.bytes) == 'number' and call or nil
  if type(call.score) ~= 'number' then
    for _, key in ipairs(sized and { keys.stage, keys.workflow, keys.fleet } or {}) do
      local field = call.ref .. '|sizes'
      redis.call('HSET', key, field, sizes_after(read(key, field)[1], sized))
      redis.call('EXPIRE', key, 3024000)
    end
    return false, false, false
  end
  local score = math.min(math.max(call.score, 0), 1)
  return evidence_observe(keys.stage, call.ref, call.half_life.stage, score, cost_nano, sized),
    evidence_observe(keys.workflow, call.ref, call.half_life.workflow, score, cost_nano, sized),
    evidence_observe(keys.fleet, call.ref, call.half_life.fleet, score, cost_nano, sized)
end
